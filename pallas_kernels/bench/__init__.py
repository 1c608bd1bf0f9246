"""Checks and times the ops. See `python -m pallas_kernels.bench --help`."""
