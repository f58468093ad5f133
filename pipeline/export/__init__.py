"""Prediction, export and registration of trained models."""
