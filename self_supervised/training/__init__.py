"""Training: what Lightning needs to know of a method, its optimizers, schedules, checkpoints and checks."""
