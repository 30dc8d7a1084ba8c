"""Batches of a list: their order, worker processes, and images resident on the device."""
