"""Experiment tracking with MLflow: one MLflow run per training run, and queries of the model registry."""
