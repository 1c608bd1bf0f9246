"""Static estimates: an op's time from the TPU compiler's schedule."""
