"""Workloads of several ops, a layer's each, that the benchmark can run."""
