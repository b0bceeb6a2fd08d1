"""What a quantization cost in quality, and whether warm answers are those of a cold run."""
