"""Slurm: the batch script of a run."""
