"""Evaluation of a trained model: probabilities, label files, metrics."""
