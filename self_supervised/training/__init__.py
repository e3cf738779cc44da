"""Training with Lightning: base class of the methods, optimizers and schedules, checkpoints, monitor."""
