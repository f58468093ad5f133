"""Tracking: one MLflow run per training, and look-ups in the model registry."""
