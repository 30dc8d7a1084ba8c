"""Errors, signals, files that appear whole, seeds: what every other room stands on. Loads no torch."""
