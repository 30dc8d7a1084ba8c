"""bad_images.csv: the images of a dataset that `prepare check --decode` could not read, and lists without them."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path

from reslt.core.errors import UserError
from reslt.core.files import atomic_file, regular_file
from reslt.core.text import csv_cell
from reslt.data.lists import SPLITS, ImageList

BAD_IMAGES = "bad_images.csv"  # in the dataset's folder
COLUMNS = ["list", "line", "path", "reason"]
NAMED = 10  # images left out of a list that are printed by name


def record_bad_images(folder: Path, bad: list[tuple[str, int, str, str]], name: str = BAD_IMAGES) -> None:
    """Write (list, line, path, reason) rows to bad_images.csv; without rows, remove the file of an earlier check."""
    file = folder / name
    if not bad:
        file.unlink(missing_ok=True)
        return
    with atomic_file(file) as temporary, open(temporary, "w", encoding="utf-8", newline="") as handle:
        csv.writer(handle).writerows(
            [COLUMNS, *((name, line, csv_cell(path), csv_cell(reason)) for name, line, path, reason in bad)]
        )


def leave_out_bad_images(
    lists: dict[str, ImageList], folder: Path, data: str
) -> tuple[dict[str, ImageList], dict[str, tuple[str, ...]]]:
    """Return the lists without the images recorded in bad_images.csv, and the paths of these images, {split: paths}, for
    each list that lost any.

    Raises UserError if that file is damaged or does not match the lists, and if a list has no image left."""
    lists, left_out = dict(lists), {}
    for split, lines in _read_bad_images(folder, data).items():
        images, indices = lists.get(split), []
        for line, path in lines.items():
            i = images.at_line(line) if images else None
            if i is None or path not in (images.path(i), csv_cell(images.path(i))):
                raise UserError(
                    f"{folder / BAD_IMAGES}: {path!r} is not the image at {folder / f'{split}.txt'}:{line}; the list "
                    f"has changed since then. Look for bad images again with: {record_command(data)}"
                )
            indices.append(i)
        left_out[split] = tuple(map(images.path, indices))
        if len(indices) == len(images):
            raise UserError(
                f"{images.file}: no image is left; {describe_left_out(left_out, folder)}; repair or replace some"
            )
        lists[split] = images.without(indices)
    return lists, left_out


def _read_bad_images(folder: Path, data: str) -> dict[str, dict[int, str]]:
    """Return {split: {line: path}} from bad_images.csv; {} if there is none. Raises UserError if it is damaged."""
    file, recorded = folder / BAD_IMAGES, {}
    again = f"rewrite it with: {record_command(data)}"
    if not file.exists():
        return {}
    try:
        with open(regular_file(file), encoding="utf-8", newline="") as handle:
            rows = csv.reader(handle, strict=True)
            if next(rows, None) != COLUMNS:
                raise UserError(f"{file}:1: the columns are not {','.join(COLUMNS)}; {again}")
            for row in rows:
                number = row[1] if len(row) == len(COLUMNS) else ""
                split = row[0].removesuffix(".txt") if number else ""
                if split not in SPLITS or not (number.isascii() and number.isdecimal() and len(number) < 19):
                    shown = ",".join(row)
                    raise UserError(
                        f"{file}:{rows.line_num}: {shown[:120]!r} is not a list, a line, a path and a reason; {again}"
                    )
                recorded.setdefault(split, {})[int(number)] = row[2]
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise UserError(f"{file}: {getattr(fault, 'strerror', None) or fault}; {again}") from None
    return recorded


def describe_left_out(left_out: dict[str, tuple[str, ...]], folder: Path) -> str:
    """Return `--bad-images skip: 2 images left out of train.txt (a.jpg, b.jpg) and 1 of test.txt (c.jpg)`."""
    parts = []
    for split, paths in left_out.items():
        more = f", and {len(paths) - NAMED:,} more, all in {folder / BAD_IMAGES}" if len(paths) > NAMED else ""
        counted = f"{len(paths):,}" if parts else f"{len(paths):,} image{'s' * (len(paths) > 1)} left out"
        parts.append(f"{counted} of {split}.txt ({', '.join(paths[:NAMED])}{more})")
    return f"--bad-images skip: {' and '.join(parts)}"


def record_command(data: str) -> str:
    """Return the command that writes bad_images.csv."""
    return f"python -m reslt.prepare check {shlex.quote(data)} --decode"
