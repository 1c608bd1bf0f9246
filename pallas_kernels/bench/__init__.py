"""Is an op right, and how fast? See `python -m pallas_kernels.bench --help`."""
