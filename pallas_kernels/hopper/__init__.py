"""What Pallas has no word for on Hopper GPUs."""
