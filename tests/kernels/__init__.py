"""Tests of the ops: first of their definitions, then of all else."""
