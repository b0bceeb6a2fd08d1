"""What local saves: logs of API calls, priced, beside the time and energy that this machine would take for them."""
