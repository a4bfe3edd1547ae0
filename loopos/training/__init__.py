"""Training: optimizers, schedules, one loop, checkpoints, metrics, trackers."""
