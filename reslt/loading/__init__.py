"""Batches of a list: their order, the worker processes, images resident on the device."""
