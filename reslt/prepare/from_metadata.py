"""Photos with a metadata.csv or metadata.jsonl beside them, as in the image folders of Hugging Face's datasets."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence
from pathlib import Path

from reslt.core.errors import UserError
from reslt.core.spelling import did_you_mean
from reslt.core.text import listed, shown
from reslt.data.find_images import Found
from reslt.prepare.file_kind import JSON_LINES, require_kind
from reslt.prepare.from_table import read_table
from reslt.prepare.listings import Listing, listed_photos, read_splits, unused_splits
from reslt.prepare.photos import SPLIT_NAMES, Photos

METADATA = ("metadata.csv", "metadata.jsonl")
PATH_COLUMN, USUAL_LABEL = "file_name", "label"


def metadata_files(found: Found) -> dict[str, list[str]]:
    """Return {split: metadata files} of the folder itself ('train') and of the folders of splits."""
    files: dict[str, list[str]] = {}
    for path in found.other_files:
        folder, _, name = path.rpartition("/")
        if name in METADATA and (split := SPLIT_NAMES.get((folder or "train").lower())):
            files.setdefault(split, []).append(path)
    return files


def states_labels(found: Found, files: dict[str, list[str]]) -> bool:
    """Return whether metadata files state classes: there are images directly beside one, or all have a column `label`.
    Otherwise they may describe the images of class folders."""
    paths = [path for of_split in files.values() for path in of_split]
    if {posixpath.dirname(path) for path in paths} & {posixpath.dirname(image) for image in found.images}:
        return True
    try:
        return all({PATH_COLUMN, USUAL_LABEL} <= set(_read(found.root / path)[0]) for path in paths)
    except UserError:
        return False


def from_metadata(
    found: Found, files: dict[str, list[str]], label_column: str | None, split_column: str | None = None
) -> Photos:
    """Read {split: metadata files}, each with a column `file_name`, relative to the file's folder, and one of class names.

    `label_column` None: `label`, else the only other column. `split_column`: the column that states train, val or test, if
    there is a single file. Raises UserError for an invalid file or column."""
    if split_column and len(files) > 1:
        raise UserError(f"--split-column {split_column}: {found.root} has a metadata file per split already; drop it")
    listings, decisions = [], []
    for split, paths in files.items():
        if len(paths) > 1:
            raise UserError(f"--from {found.root}: {listed(paths)} describe the same images; keep one")
        remarks: list[str] = []
        listing = _listing(found.root / paths[0], split, label_column, split_column, remarks)
        decisions += [f"read as metadata of the images beside it: {paths[0]}, {len(listing.paths):,} rows", *remarks]
        listings.append(listing)
    return listed_photos(listings, None, decisions, root=found.root)


def _listing(
    file: Path, split: str, label_column: str | None, split_column: str | None, decisions: list[str]
) -> Listing:
    names, rows, numbers = _read(file)
    unit = "row" if file.suffix == ".csv" else "line"
    if split_column and split_column not in names:
        raise UserError(f"--split-column {split_column}: {file} has no such column; it has: {listed(names)}")
    label = _label_column(file, [name for name in names if name != split_column], label_column)
    if label != (label_column or USUAL_LABEL):
        decisions.append(f"{file.name}: the classes are in column {shown(label)}")
    if not split_column:
        others = {name: (str(row.get(name)) for row in rows) for name in names if name not in (PATH_COLUMN, label)}
        decisions += unused_splits(file, others)
    columns = {name: [row.get(name) for row in rows] for name in (PATH_COLUMN, label, *filter(None, [split_column]))}
    for name, values in columns.items():
        if (bad := next((i for i, value in enumerate(values) if not _is_name(value)), None)) is not None:
            raise UserError(
                f"{file}: {unit} {numbers[bad]}: {name} is missing, empty or not text; fill it in, or remove the {unit}"
            )
    return Listing(
        file=file,
        unit=unit,
        numbers=numbers,
        paths=[str(value).strip() for value in columns[PATH_COLUMN]],
        labels=[str(value).strip() for value in columns[label]],
        splits=read_splits(file, unit, numbers, split_column, columns[split_column]) if split_column else None,
        split=split,
    )


def _is_name(value: object) -> bool:
    return (isinstance(value, str) and bool(value.strip())) or (isinstance(value, int) and not isinstance(value, bool))


def _label_column(file: Path, columns: list[str], named: str | None) -> str:
    """Return the column of class names: the `named` one, else `label`, else the only one. Raises UserError."""
    if PATH_COLUMN not in columns:
        raise UserError(f"{file}: there is no column {PATH_COLUMN}; it has: {listed(columns)}")
    others = [column for column in columns if column != PATH_COLUMN]
    label = named or (USUAL_LABEL if USUAL_LABEL in others else others[0] if len(others) == 1 else None)
    if label is None:
        raise UserError(f"{file}: which column is the class? Name it with --label-column; it has: {listed(others)}")
    if label not in others:
        raise UserError(
            f"--label-column {label}: {file} has no such column{did_you_mean(label, others)}; it has: {listed(columns)}"
        )
    return label


def _read(file: Path) -> tuple[list[str], list[dict], Sequence[int]]:
    """Return the columns of a metadata file, its rows, and their numbers."""
    if file.suffix == ".csv":
        table, _ = read_table(file, [PATH_COLUMN], flag="--from")
        return list(map(str, table.columns)), table.to_dict("records"), range(2, len(table) + 2)
    rows, numbers = _read_lines(file)
    return list(dict.fromkeys(name for row in rows for name in row)), rows, numbers


def _read_lines(file: Path) -> tuple[list[dict], list[int]]:
    """Return the objects of JSON lines, and their line numbers; skip blank lines."""
    require_kind(file, "--from", JSON_LINES)
    rows, numbers = [], []
    with open(file, "rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{file}: line {number}: not an object in JSON, {{...}}; correct or remove the line")
            rows.append(row)
            numbers.append(number)
    return rows, numbers
