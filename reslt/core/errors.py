"""Ends of a run that a user can act on: a mistake in the input, or a signal."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave: its text names place, value and remedy."""


class LocalFault(UserError):
    """A mistake that one process of several may meet alone."""


class Stopped(Exception):
    """An end that a signal asked for, with everything saved: its text says how far the run got."""

    def __init__(self, signal_number: int, text: str):
        super().__init__(text)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number  # as shells report it
