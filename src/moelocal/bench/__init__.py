"""Speed, measured so that it can be believed: on this machine, beside other programs, with all that it depends on."""
