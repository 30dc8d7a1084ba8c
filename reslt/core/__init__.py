"""Errors, signals, atomic files, seeds, logging: what every other room builds on. Loads no torch."""
