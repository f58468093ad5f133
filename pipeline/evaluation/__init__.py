"""Evaluation of a finished model: probabilities, label files, and what is counted from them."""
