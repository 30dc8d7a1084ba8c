"""One step, one epoch, and the state that a run carries from one to the next."""
