"""Image lists: one `path label` per line, the format of the ImageNet-LT lists. Parsed in bulk, kept as three arrays.

A path may hold spaces; the label is the last token; blank lines are allowed, nothing else is. Ten million lines become
a block of bytes and two arrays of numbers, never ten million Python strings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reslt.errors import UserError
from reslt.files import whole_file

CHUNK_BYTES = 1 << 22
MAX_LABEL_DIGITS = 9
NEWLINE, SPACE, TAB, RETURN, DOT, SLASH = b"\n \t\r./"
DRIVE = re.compile(rb"^[A-Za-z]:[/\\]")


@dataclass(frozen=True)
class ImageList:
    """N images of one list file, in the file's order."""

    file: Path
    text: np.ndarray  # uint8: all paths, one after the other
    ends: np.ndarray  # (N,) int64: where each path ends in `text`
    labels: np.ndarray  # (N,) int32
    blank_lines: np.ndarray  # 1-based numbers of the file's blank lines, ascending

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, i: int) -> str:
        """Path of image i, relative to the image root, with forward slashes."""
        start = self.ends[i - 1] if i else 0
        return self.text[start : self.ends[i]].tobytes().decode()

    def line(self, i: int) -> int:
        """1-based line of image i in the file."""
        images_before = self.blank_lines - np.arange(len(self.blank_lines)) - 1
        return int(i + 1 + np.searchsorted(images_before, i, side="right"))

    def place(self, i: int) -> str:
        """`file:line`, as error messages name it."""
        return f"{self.file}:{self.line(i)}"

    def check_labels(self, num_classes: int) -> None:
        """Raise UserError for the first label that is not in 0..num_classes-1."""
        outside = np.flatnonzero(self.labels >= num_classes)
        if len(outside):
            i = int(outside[0])
            raise UserError(
                f"{self.place(i)}: label {self.labels[i]} is outside 0..{num_classes - 1}; "
                "is the line wrong, or num_classes or class_names in info.yaml?"
            )


def read_list(file: Path) -> ImageList:
    """Parse a list file. Raises UserError with file, line, text and remedy; time and memory are linear in its size."""
    texts, lengths, labels, blanks = [], [], [], []
    first_line = 1
    try:
        with open(file, "rb") as handle:
            rest = b""
            while block := handle.read(CHUNK_BYTES):
                whole, newline, rest = (rest + block).rpartition(b"\n")
                if newline:
                    first_line += _parse(file, whole + b"\n", first_line, texts, lengths, labels, blanks)
            if rest:
                _parse(file, rest + b"\n", first_line, texts, lengths, labels, blanks)
    except OSError as fault:
        raise UserError(f"{file}: {fault.strerror}") from None
    if not sum(map(len, labels)):
        raise UserError(f"{file}: the list holds no image; each line is `path label`")
    text, length, label, blank = map(np.concatenate, (texts, lengths, labels, blanks))
    return ImageList(Path(file), text, np.cumsum(length, dtype=np.int64), label, blank)


def _parse(file: Path, chunk: bytes, first_line: int, texts, lengths, labels, blanks) -> int:
    """Parse whole lines, append their parts, return how many lines they were."""
    data = np.frombuffer(chunk, np.uint8)
    line_ends = np.flatnonzero(data == NEWLINE)
    line_starts = np.concatenate(([0], line_ends[:-1] + 1))

    def fail(line: int, reason: str) -> None:
        shown = chunk[line_starts[line] : line_ends[line]].decode("utf-8", "backslashreplace").rstrip("\r")
        shown = shown if len(shown) <= 120 else shown[:117] + "..."
        raise UserError(f"{file}:{first_line + line}: {reason}: {shown!r}; each line is `path label`")

    def line_of(offset: int) -> int:
        return int(np.searchsorted(line_ends, offset))

    if chunk.startswith(b"\xef\xbb\xbf") and first_line == 1:
        fail(0, "a byte order mark stands before the text (save as UTF-8 without BOM)")
    if 0 in chunk:
        fail(line_of(chunk.index(0)), "a NUL byte")
    stray = np.flatnonzero((data[:-1] == RETURN) & (data[1:] != NEWLINE))
    if len(stray):
        fail(line_of(stray[0]), "a carriage return inside the line")
    try:
        chunk.decode()
    except UnicodeDecodeError as fault:
        fail(line_of(fault.start), "not UTF-8 text")

    # For every byte: where the last non-space and the last space up to it stand. A line is start..path_last, spaces,
    # before_label + 1..last, spaces.
    is_space = (data == SPACE) | (data == TAB) | (data == RETURN) | (data == NEWLINE)
    position = np.arange(len(data), dtype=np.int32)
    solid_up_to = np.maximum.accumulate(np.where(is_space, -1, position))
    space_up_to = np.maximum.accumulate(np.where(is_space, position, -1))
    last = solid_up_to[line_ends]
    blank = last < line_starts
    blanks.append(first_line + np.flatnonzero(blank))
    line_numbers, starts, last = np.flatnonzero(~blank), line_starts[~blank], last[~blank]
    if len(starts) == 0:
        return len(line_ends)
    before_label = space_up_to[last]  # lies before the line's start where the line is one token
    if (before_label < starts).any():
        fail(line_numbers[np.argmax(before_label < starts)], "no label")
    path_last = solid_up_to[before_label]
    if (path_last < starts).any():
        fail(line_numbers[np.argmax(path_last < starts)], "no path")

    digits = last - before_label
    value = np.zeros(len(starts), np.int64)
    bad = digits > MAX_LABEL_DIGITS
    for place in range(min(int(digits.max()), MAX_LABEL_DIGITS)):
        has = digits > place
        digit = data[np.maximum(last - place, 0)].astype(np.int64) - ord("0")
        bad |= has & ((digit < 0) | (digit > 9))
        value += np.where(has, digit * 10**place, 0)
    if bad.any():
        i = int(np.argmax(bad))
        label = chunk[before_label[i] + 1 : last[i] + 1].decode()
        fail(line_numbers[i], f"the label {label[:40]!r} is not a whole number from 0 (is the label missing?)")

    # Paths that leave the image root: absolute, a drive, or a `..` part. Few lines are candidates; those are looked at.
    suspect = (data[starts] == SLASH) | (data[starts] == ord("\\")) | (data[starts + 1] == ord(":"))
    double_dot = np.flatnonzero((data[:-1] == DOT) & (data[1:] == DOT))
    suspect_lines = set(np.flatnonzero(suspect)) | set(
        np.searchsorted(path_last, double_dot) if len(double_dot) else ()
    )
    for i in sorted(suspect_lines - {len(starts)}):
        path = chunk[starts[i] : path_last[i] + 1]
        if path[:1] in (b"/", b"\\") or DRIVE.match(path) or b".." in re.split(rb"[/\\]", path):
            fail(line_numbers[i], "the path leaves the image root (write it relative to --data-dir)")

    lengths.append(path_last + 1 - starts)
    inside = np.zeros(len(data) + 1, np.int8)
    inside[starts] += 1
    inside[path_last + 1] -= 1
    texts.append(data[np.cumsum(inside[:-1], dtype=np.int8).astype(bool)])
    labels.append(value.astype(np.int32))
    return len(line_ends)


def write_list(file: Path, lines: Iterable[tuple[str, int]]) -> None:
    """Write `path label` lines; the file appears whole or not at all."""
    with whole_file(file) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as handle:
        handle.writelines(f"{path} {label}\n" for path, label in lines)


def images_per_class(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(N,) labels -> (C,) int64 counts."""
    return np.bincount(labels, minlength=num_classes)
