"""Photos from a table: a column of image paths, and one of class names."""

from __future__ import annotations

import posixpath
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from reslt.core.errors import UserError
from reslt.core.spelling import did_you_mean
from reslt.prepare.photos import Photos, require_two


def from_csv(file: Path, image_column: str, label_column: str, data_dir: Path | None) -> Photos:
    """Read a table with a header: a column of paths relative to `data_dir` (None: its folder), one of class names.

    Numbers as class names are sorted numerically, others alphabetically. Raises UserError."""
    separator = "\t" if file.suffix.lower() in (".tsv", ".tab") else ","
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header would lose cells
            table = pd.read_csv(
                file, dtype=str, keep_default_na=False, sep=separator, encoding="utf-8-sig", index_col=False
            )
    except (OSError, ValueError, pd.errors.ParserError, pd.errors.ParserWarning) as fault:
        raise UserError(
            f"--csv {file}: not readable as a table: {fault}; it must be UTF-8 text with a header, cells separated by commas "
            "(.tsv: by tabs), and no row longer than the header"
        ) from None
    for flag, column in (("--image-column", image_column), ("--label-column", label_column)):
        if column not in table.columns:
            known = list(map(str, table.columns))
            raise UserError(
                f"{flag} {column}: {file} has no such column{did_you_mean(column, known)}; it has: {', '.join(known)}"
            )
    root = data_dir or file.parent
    table = table[[image_column, label_column]].set_axis(["path", "label"], axis=1)
    table = table.apply(lambda column: column.str.strip())
    for column, name in (("path", image_column), ("label", label_column)):
        if len(blank := np.flatnonzero(table[column] == "")):
            raise UserError(f"{file}: row {blank[0] + 2}: column {name} is empty; fill it in, or remove the row")
    absolute = root.absolute().as_posix() + "/"
    table["path"] = table["path"].str.replace("\\", "/", regex=False).str.removeprefix(absolute)
    table["path"] = table["path"].map(posixpath.normpath)  # one spelling of a//b and ./a/b
    if len(twice := np.flatnonzero(table["path"].duplicated())):
        raise UserError(
            f"{file}: row {twice[0] + 2}: duplicate image {table['path'].iloc[twice[0]]}; give one row per image"
        )
    for row, path in enumerate(table["path"], 2):
        if path.startswith("/") or ".." in path.split("/") or not (root / path).is_file():
            raise UserError(
                f"{file}: row {row}: there is no image {path!r} below {root}; give the folder that the paths start from with "
                "--data-dir DIR"
            )
    labels = table["label"].unique().tolist()
    names = sorted(labels, key=int) if all(label.isdecimal() for label in labels) else sorted(labels)
    require_two(names, file)
    by_label = table.groupby("label")["path"].apply(list)
    return Photos(root, names, {"train": [by_label[name] for name in names]})
