"""Errors, signals, atomic files, seeds, logging: the base of every other room. Loads no torch."""
