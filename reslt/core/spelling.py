"""Suggestions for misspelled words."""

from __future__ import annotations

LONGEST_WORD = 100  # characters; the time of a comparison grows with the product of both lengths


def did_you_mean(word: str, known: list[str]) -> str:
    """Return ' (did you mean X?)' for the closest known word, or '' if none is close."""
    import difflib

    known = [other for other in known if len(other) <= LONGEST_WORD]
    close = difflib.get_close_matches(word, known, n=1) if len(word) <= LONGEST_WORD else []
    return f" (did you mean {close[0]}?)" if close else ""
