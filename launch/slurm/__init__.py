"""Slurm: the batch script of a training."""
