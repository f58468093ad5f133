"""The driver of a training, and what goes before and after it."""
