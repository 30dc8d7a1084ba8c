"""Image lists: one `path label` per line, the format of the ImageNet-LT lists. They are parsed in bulk and kept as arrays.

A path may contain spaces; the label is the last token. Blank lines are allowed, and nothing else is. Ten million lines
become a block of bytes and two arrays of numbers, never ten million Python strings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np

from reslt.core.errors import UserError
from reslt.core.files import atomic_file

SPLITS = ("train", "val", "test")  # a dataset's lists
CHUNK_BYTES = 1 << 22
MAX_LABEL_DIGITS = 9
NEWLINE, SPACE, TAB, RETURN, DOT, SLASH = b"\n \t\r./"
DRIVE = re.compile(rb"^[A-Za-z]:")  # even without a slash: on Windows, C:a.jpg is in the current folder of drive C


@dataclass(frozen=True)
class ImageList:
    """N images of one list file, in the file's order."""

    file: Path
    text: np.ndarray  # uint8: all paths, one after the other
    ends: np.ndarray  # (N,) int64: the end of each path in `text`
    labels: np.ndarray  # (N,) int32
    lines_without_image: np.ndarray  # ascending 1-based numbers of the file's lines that are blank or left out

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, i: int) -> str:
        """Return the path of image i, relative to the image root, with forward slashes."""
        start = self.ends[i - 1] if i else 0
        return self.text[start : self.ends[i]].tobytes().decode()

    def line(self, i: int | np.ndarray) -> int | np.ndarray:
        """Return the 1-based line of image i in the file; an array of lines if `i` is an array."""
        images_before = self.lines_without_image - np.arange(len(self.lines_without_image)) - 1
        line = i + 1 + np.searchsorted(images_before, i, side="right")
        return line if isinstance(i, np.ndarray) else int(line)

    def at_line(self, line: int) -> int | None:
        """Return the image in line `line` of the file, the inverse of `line()`; None if the line has no image."""
        others_before = int(np.searchsorted(self.lines_without_image, line))
        others_up_to = int(np.searchsorted(self.lines_without_image, line, side="right"))
        i = line - 1 - others_before
        return i if others_before == others_up_to and 0 <= i < len(self) else None

    def without(self, indices: np.ndarray | list[int]) -> ImageList:
        """Return the list without some of its images; `line()` still returns the file's line numbers."""
        kept = np.ones(len(self), bool)
        kept[np.asarray(indices, np.int64)] = False
        return self.where(kept)

    def where(self, kept: np.ndarray) -> ImageList:
        """Return the list of the images for which (N,) bool `kept` is true; `line()` still returns the file's lines."""
        lengths, left_out = np.diff(self.ends, prepend=0), np.flatnonzero(~kept)
        return ImageList(
            self.file,
            self.text[np.repeat(kept, lengths)],
            np.cumsum(lengths[kept]),
            self.labels[kept],
            np.sort(np.concatenate([self.lines_without_image, self.line(left_out)])),
        )

    def place(self, i: int) -> str:
        """Return `file:line` of image i, for error messages."""
        return f"{self.file}:{self.line(i)}"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the images and their labels, in order, whatever the blank lines and line ends."""
        digest = hashlib.sha256()
        for part in (self.text, self.ends, self.labels):
            digest.update(part)
        return digest.hexdigest()

    def check_labels(self, num_classes: int) -> None:
        """Raise UserError for the first label that is not in 0..num_classes-1."""
        outside = np.flatnonzero(self.labels >= num_classes)
        if len(outside):
            i = int(outside[0])
            raise UserError(
                f"{self.place(i)}: label {self.labels[i]} is outside 0..{num_classes - 1} ({len(outside):,} such lines); "
                "is the line wrong, or num_classes or class_names in info.yaml?"
            )


def read_list(file: Path) -> ImageList:
    """Parse a list file, in time and memory linear in its size. Raises UserError with file, line, text and remedy."""
    # A bytearray grows at its end without a second copy (large ones are remapped); joining parts would double memory.
    text, ends, labels, lines_without_image = bytearray(), bytearray(), bytearray(), bytearray()
    next_line = 1
    try:
        with open(file, "rb") as handle:
            while block := handle.read(CHUNK_BYTES):
                part = _parse(file, block + handle.readline(), next_line)
                ends += (len(text) + part.ends).tobytes()
                text += part.text.tobytes()
                labels += part.labels.tobytes()
                lines_without_image += part.lines_without_image.tobytes()
                next_line += len(part) + len(part.lines_without_image)
    except OSError as fault:
        raise UserError(f"{file}: {fault.strerror}") from None
    if not labels:
        raise UserError(f"{file}: the list contains no image; each line is `path label`")
    return ImageList(
        Path(file),
        np.frombuffer(text, np.uint8),
        np.frombuffer(ends, np.int64),
        np.frombuffer(labels, np.int32),
        np.frombuffer(lines_without_image, np.int64),
    )


def _parse(file: Path, chunk: bytes, first_line: int) -> ImageList:
    """Parse whole lines; the first is line `first_line` of the file. `ends` count from the start of this part's text."""
    chunk = chunk if chunk.endswith(b"\n") else chunk + b"\n"
    data = np.frombuffer(chunk, np.uint8)
    line_ends = np.flatnonzero(data == NEWLINE)
    line_starts = np.concatenate(([0], line_ends[:-1] + 1))

    def fail(line: int, reason: str) -> NoReturn:
        text = chunk[line_starts[line] : line_ends[line]].decode("utf-8", "backslashreplace").rstrip("\r")
        raise UserError(f"{file}:{first_line + line}: {reason}: {_shown(text, 120)}; each line is `path label`")

    def line_of(offset: int) -> int:
        return int(np.searchsorted(line_ends, offset))

    if chunk.startswith(b"\xef\xbb\xbf") and first_line == 1:
        fail(0, "the file begins with a byte order mark (save as UTF-8 without BOM)")
    if 0 in chunk:
        fail(line_of(chunk.index(0)), "a NUL byte")
    stray = np.flatnonzero((data[:-1] == RETURN) & (data[1:] != NEWLINE))
    if len(stray):
        fail(line_of(stray[0]), "a carriage return inside the line")
    try:
        chunk.decode()
    except UnicodeDecodeError as fault:
        fail(line_of(fault.start), "not UTF-8 text")

    # A line is path, spaces, label, spaces. A token is a run of other bytes; the label is the last token of a line, and
    # the path extends from the line's start to the end of the token before it.
    is_space = (data == SPACE) | (data == TAB) | (data == RETURN) | (data == NEWLINE)
    edges = np.flatnonzero(np.diff(is_space, prepend=True))
    token_starts, token_ends = edges[::2], edges[1::2]
    tokens_so_far = np.searchsorted(token_starts, line_ends)
    tokens = np.diff(tokens_so_far, prepend=0)
    line_numbers = np.flatnonzero(tokens)  # of the lines that are not blank
    starts, label = line_starts[line_numbers], tokens_so_far[line_numbers] - 1
    label_starts, label_ends = token_starts[label], token_ends[label]
    alone = tokens[line_numbers] == 1
    if (no_label := alone & (label_starts == starts)).any():
        fail(line_numbers[np.argmax(no_label)], "no label")
    if alone.any():
        fail(line_numbers[np.argmax(alone)], "no path")
    path_ends = token_ends[label - 1]

    digits = label_ends - label_starts
    labels = np.zeros(len(starts), np.int32)
    bad = digits > MAX_LABEL_DIGITS
    for place in range(min(int(digits.max(initial=0)), MAX_LABEL_DIGITS)):
        has = digits > place
        digit = data[np.maximum(label_ends - 1 - place, 0)] - ord("0")  # uint8: bytes below "0" become large
        bad |= has & (digit > 9)
        labels += np.where(has, digit, 0).astype(np.int32) * 10**place
    if bad.any():
        i = int(np.argmax(bad))
        text = chunk[label_starts[i] : label_ends[i]].decode()
        fail(line_numbers[i], f"the label {_shown(text, 40)} is not a whole number from 0 (is the label missing?)")

    # Paths that leave the image root: absolute, a drive, or a `..` part. Only the few candidate lines are examined.
    suspect = (data[starts] == SLASH) | (data[starts] == ord("\\")) | (data[starts + 1] == ord(":"))
    double_dot = np.flatnonzero((data[:-1] == DOT) & (data[1:] == DOT))
    suspect_lines = set(np.flatnonzero(suspect)) | set(np.searchsorted(path_ends, double_dot))
    for i in sorted(suspect_lines - {len(starts)}):
        path = chunk[starts[i] : path_ends[i]]
        if path[:1] in (b"/", b"\\") or DRIVE.match(path) or b".." in re.split(rb"[/\\]", path):
            fail(line_numbers[i], "the path leaves the image root (write it relative to --data-dir)")

    inside = np.zeros(len(data), np.int8)
    inside[starts] += 1
    inside[path_ends] -= 1
    text = data[np.cumsum(inside, dtype=np.int8).astype(bool)]
    return ImageList(file, text, np.cumsum(path_ends - starts), labels, first_line + np.flatnonzero(tokens == 0))


def _shown(text: str, longest: int) -> str:
    """Return a text in quotes, cut to `longest` characters; quoting writes an unprintable character as up to ten."""
    quoted = repr(text[:longest])
    return quoted if len(text) <= longest and len(quoted) <= longest + 2 else quoted[: longest - 2] + "..." + quoted[0]


def write_list(file: Path, lines: Iterable[tuple[str, int]]) -> None:
    """Write `path label` lines to a file, completely or not at all."""
    with atomic_file(file) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as handle:
        handle.writelines(f"{path} {label}\n" for path, label in lines)


def images_per_class(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(N,) labels -> (C,) int64 counts."""
    return np.bincount(labels, minlength=num_classes)
