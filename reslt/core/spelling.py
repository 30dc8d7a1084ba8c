"""Words in messages: suggestions for misspelled ones, and texts out of files, which may be long."""

from __future__ import annotations

from collections.abc import Collection

LONGEST_WORD = 100  # characters; comparing takes their product


def did_you_mean(word: str, known: list[str]) -> str:
    """Return ' (did you mean X?)' for the closest known word, else ''."""
    import difflib

    known = [other for other in known if len(other) <= LONGEST_WORD]
    close = difflib.get_close_matches(word, known, n=1) if len(word) <= LONGEST_WORD else []
    return f" (did you mean {close[0]}?)" if close else ""


def shown(text: str, longest: int = 40) -> str:
    """Return a text as it is, without its control characters and cut to `longest` characters."""
    cut = text if len(text) <= longest else text[: longest - 3] + "..."
    return "".join(character if character.isprintable() else "?" for character in cut)


def listed(texts: Collection[str], most: int = 12) -> str:
    """Return up to `most` texts, each at most 40 characters long, separated by commas, and the number of the others."""
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return ", ".join(shown(text) for text in list(texts)[:most]) + more


def counted(number: int, noun: str) -> str:
    """Return '1 image', '1,200 images'."""
    return f"{number:,} {noun}" + "s" * (number != 1)
