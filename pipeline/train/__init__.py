"""Training: the DeepSpeed engine, learning rate schedule, training loop, exact evaluation and checkpoints."""
