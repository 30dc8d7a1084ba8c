"""Training: one step, one epoch, and the state that continues from epoch to epoch."""
