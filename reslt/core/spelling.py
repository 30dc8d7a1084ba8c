"""Spelling suggestions for error messages."""

from __future__ import annotations


def did_you_mean(word: str, known: list[str]) -> str:
    """Return ' (did you mean X?)' for the closest known word, else ''."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
