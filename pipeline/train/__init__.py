"""Training: the engine, the schedule, the loop, exact evaluation and checkpoints."""
