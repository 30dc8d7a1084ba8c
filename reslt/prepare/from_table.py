"""Photos from tables: a column of image paths, and one of class names or one per class."""

from __future__ import annotations

import lzma
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

from reslt.core.errors import UserError
from reslt.core.spelling import did_you_mean
from reslt.core.text import counted, listed, shown
from reslt.prepare.file_kind import TABLE, require_kind
from reslt.prepare.listings import Listing, listed_photos, read_splits, unused_splits
from reslt.prepare.photos import Photos

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
DAMAGED = (EOFError, ImportError, lzma.LZMAError, zipfile.BadZipFile, zlib.error)  # of compressed tables
ONE, ZERO = {"1", "1.0", "true"}, {"0", "0.0", "", "false"}  # cells of a column per class, in lower case


def from_csv(
    files: dict[str, Path],
    image_column: str,
    label_columns: list[str],
    split_column: str | None = None,
    data_dir: Path | None = None,
) -> Photos:
    """Read tables with headers, {split: file}, each with a column of image paths relative to `data_dir` (None: its folder),
    with or without file ending, and one of class names, or several of 0 and 1 whose names are the classes.

    `split_column`: the column that states train, val or test, if there is a single table. Raises UserError for an invalid
    table or column."""
    decisions: list[str] = []
    listings = [
        _listing(file, split, image_column, label_columns, split_column, decisions) for split, file in files.items()
    ]
    return listed_photos(listings, data_dir, decisions)


def read_table(
    file: Path, columns: list[str], rows: int | None = None, flag: str = "--csv"
) -> tuple[pd.DataFrame, str]:
    """Return a table, with all cells as text, and its separator: the one that yields the most of these columns, then the
    most columns. Raises UserError if the file is not a table; the message does not quote it."""
    require_kind(file, flag, TABLE)
    try:
        headers = {separator: set(_read(file, separator, 0).columns) for separator in SEPARATORS}
        separator = max(headers, key=lambda each: (len(headers[each].intersection(columns)), len(headers[each])))
        return _read(file, separator, rows), separator
    except (OSError, ValueError, pd.errors.ParserError, pd.errors.ParserWarning, *DAMAGED) as fault:
        raise UserError(
            f"{flag} {file}: not readable as a table: {shown(str(fault), 120)}; it must be UTF-8 text with a header, cells "
            "separated by commas (or semicolons, tabs, vertical bars), and no row longer than the header"
        ) from None


def _read(file: Path, separator: str, rows: int | None) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header would lose cells
        table = pd.read_csv(
            file,
            dtype=str,
            keep_default_na=False,
            sep=separator,
            skipinitialspace=True,
            encoding="utf-8-sig",
            index_col=False,
            nrows=rows,
        )
    names = table.columns.str.strip()
    return table.set_axis(names, axis=1) if names.is_unique else table


def _listing(
    file: Path,
    split: str,
    image_column: str,
    label_columns: list[str],
    split_column: str | None,
    decisions: list[str],
) -> Listing:
    flag = "--csv" if split == "train" else f"--{split}-csv"
    table, separator = read_table(file, [image_column, *label_columns], flag=flag)
    if separator != ",":
        decisions.append(f"{file.name}: its cells are separated by {SEPARATORS[separator]}")
    known = list(map(str, table.columns))
    for option, columns in (
        ("--image-column", [image_column]),
        ("--label-column", label_columns),
        ("--split-column", [split_column] if split_column else []),
    ):
        if missing := [column for column in columns if column not in known]:
            raise UserError(
                f"{option} {missing[0]}: {file} has no such column{did_you_mean(missing[0], known)}; it has: {listed(known)}"
            )
    table = table.apply(lambda column: column.str.strip())
    one_per_class = len(label_columns) > 1
    for column in [image_column, *([] if one_per_class else label_columns), *([split_column] if split_column else [])]:
        if len(blank := np.flatnonzero(table[column] == "")):
            raise UserError(f"{file}: row {blank[0] + 2}: column {column} is empty; fill it in, or remove the row")
    if not split_column:
        others = [column for column in table.columns if column not in (image_column, *label_columns)]
        decisions += unused_splits(file, {column: table[column] for column in others})
    labels = _one_per_class(table, file, label_columns) if one_per_class else table[label_columns[0]].tolist()
    used = set(labels)
    if one_per_class and (unused := [column for column in label_columns if column not in used]):
        decisions.append(f"{file.name}: {counted(len(unused), 'label column')} without an image: {listed(unused, 6)}")
    numbers = range(2, len(table) + 2)  # row 1 is the header
    return Listing(
        file=file,
        unit="row",
        numbers=numbers,
        paths=table[image_column].tolist(),
        labels=labels,
        splits=read_splits(file, "row", numbers, split_column, table[split_column].tolist()) if split_column else None,
        split=split,
    )


def _one_per_class(table: pd.DataFrame, file: Path, columns: list[str]) -> list[str]:
    """Return for each row the column that contains 1. Raises UserError unless exactly one does and the others contain 0."""
    cells = np.stack([table[column].str.lower().to_numpy(object) for column in columns], axis=1)
    is_one, is_zero = np.isin(cells, list(ONE)), np.isin(cells, list(ZERO))
    if len(odd := np.argwhere(~(is_one | is_zero))):
        row, k = odd[0]
        raise UserError(
            f"{file}: row {row + 2}: column {columns[k]} contains {shown(table[columns[k]].iloc[row], 20)!r}; of several "
            "label columns, one must contain 1 and the others 0"
        )
    ones = is_one.sum(1)
    if len(wrong := np.flatnonzero(ones != 1)):
        raise UserError(
            f"{file}: row {wrong[0] + 2}: {ones[wrong[0]]} of the {len(columns)} label columns contain 1 ({len(wrong):,} such "
            "rows); an image must have exactly one class; correct or remove the rows"
        )
    return [columns[k] for k in is_one.argmax(1)]
