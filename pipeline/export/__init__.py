"""Export: the packaged model, and predictions by it."""
