"""Text from data, such as class names and paths, for messages and CSV cells: without control characters, cut, counted, and
safe in a spreadsheet."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"  # of terminals, and of the direction of writing
UNPRINTABLE = re.compile(rf"[{CONTROLS}\ud800-\udfff]")  # the last ones: undecodable bytes of a file's name
CONTROL_OR_BREAK = re.compile(rf"[{CONTROLS}\t\n]")
# A spreadsheet reads a cell that begins with one of these as a formula. A cell may also begin inside a text, after a
# character that a spreadsheet of another locale reads as a separator.
FORMULA = re.compile(r"(^|[;,\t\r\n])(?=[=+\-@\t\r])")


def printable(text: str) -> str:
    """Return a text with its control characters, except line breaks and tabs, written as escapes such as \\x1b."""
    return UNPRINTABLE.sub(_escaped, text)


def one_line(text: object) -> str:
    """Return text from data for a message, with line breaks and tabs escaped too, so that it cannot imitate a line."""
    return CONTROL_OR_BREAK.sub(_escaped, printable(str(text)))


def shown(text: str, longest: int = 40) -> str:
    """Return text from data for a message, on one line and cut to `longest` characters."""
    return one_line(text if len(text) <= longest else text[: longest - 3] + "...")


def listed(texts: Collection[str], most: int = 12, quoted: bool = False) -> str:
    """Return up to `most` texts, each cut to 40 characters, separated by commas, and the number of the others."""
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    first = (shown(text) for text in list(texts)[:most])
    return ", ".join(f"'{text}'" if quoted else text for text in first) + more


def counted(number: int, noun: str) -> str:
    """Return '1 image', '1,200 images'."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def has_controls(text: str) -> bool:
    """Return whether a text contains a control character, a line break or a tab."""
    return CONTROL_OR_BREAK.search(text) is not None


def csv_cell(text: str) -> str:
    """Return text from data for a cell of a CSV file, with an apostrophe if a spreadsheet would execute it."""
    return FORMULA.sub(r"\1'", text)


@contextmanager
def printable_output() -> Iterator[None]:
    """Within the block, pass everything that this process prints to standard output through `printable`."""
    if sys.stdout is None:
        yield
        return
    with redirect_stdout(_Printable(sys.stdout)):
        yield


class _Printable:
    """A text stream that escapes control characters and delegates everything else to another stream."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def _escaped(found: re.Match) -> str:
    return found[0].encode("unicode_escape").decode()
