"""Exceptions that end a command with a message for the user: invalid input, or a signal."""

from __future__ import annotations


class UserError(Exception):
    """Invalid input from the user; its text names place, value and remedy."""


class LocalFault(UserError):
    """Invalid input that one process may find and the others not, such as an unreadable image."""


class Stopped(Exception):
    """An orderly stop requested by a signal, with everything saved; its text states how far the run got."""

    def __init__(self, signal_number: int, text: str):
        super().__init__(text)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number  # as shells report it
