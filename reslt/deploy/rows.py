"""Files of predictions with a row per photo, written one by one: .csv, .jsonl or .parquet, completely or not at all."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from reslt.core.errors import UserError
from reslt.core.files import atomic_file
from reslt.core.text import csv_cell

WRITER = b"reslt.predict"  # in the metadata of Parquet
ROWS_AT_ONCE = 4096  # in a row group of Parquet


@dataclass(frozen=True)
class Row:
    """The prediction for one photo: classes from the most probable, or the reason why there is none."""

    path: str
    label: int | None = None  # of the list
    classes: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None


class Rows:
    """A file in writing. Bytes of a path that are not text are written as escapes."""

    opened: Mapping[str, str] = {"mode": "w", "encoding": "utf-8", "newline": ""}  # arguments of `open`

    def __init__(self, handle: IO, topk: int, has_labels: bool):
        self.handle, self.topk, self.has_labels = handle, topk, has_labels
        self.begin()

    @property
    def columns(self) -> list[str]:
        """path, label if there are labels, class_1, name_1, probability_1, ..., error."""
        ranks = range(1, self.topk + 1)
        of_ranks = [f"{column}_{k}" for k in ranks for column in ("class", "name", "probability")]
        return ["path", *(["label"] if self.has_labels else []), *of_ranks, "error"]

    def cells(self, row: Row) -> list[object]:
        """Return the values of the columns; None: empty."""
        ranked = [
            cell
            for k in range(self.topk)
            for cell in ((row.classes[k], row.names[k], row.probabilities[k]) if row.error is None else (None,) * 3)
        ]
        return [as_unicode(row.path), *([row.label] if self.has_labels else []), *ranked, row.error]

    def begin(self) -> None:
        """Write the part before the first row."""

    def write(self, row: Row) -> None:
        """Write a row."""
        raise NotImplementedError

    def end(self) -> None:
        """Write the part after the last row."""


class CsvRows(Rows):
    """Comma-separated, UTF-8; an apostrophe precedes text that a spreadsheet would execute."""

    def begin(self) -> None:
        self.writer = csv.writer(self.handle)
        self.writer.writerow(self.columns)

    def write(self, row: Row) -> None:
        self.writer.writerow([_csv_value(cell) for cell in self.cells(row)])


class JsonRows(Rows):
    """A JSON object per line, with lists of classes, names and probabilities."""

    def write(self, row: Row) -> None:
        content = {"path": as_unicode(row.path)} | ({"label": row.label} if self.has_labels else {})
        content |= {"classes": row.classes, "names": row.names, "probabilities": row.probabilities, "error": row.error}
        self.handle.write(json.dumps(content, ensure_ascii=False) + "\n")


class ParquetRows(Rows):
    """Parquet, with the columns of CSV."""

    opened: Mapping[str, str] = {"mode": "wb"}

    def begin(self) -> None:
        import pyarrow
        from pyarrow import parquet

        kinds = {"class": pyarrow.int32(), "label": pyarrow.int32(), "probability": pyarrow.float32()}
        fields = [(name, kinds.get(name.partition("_")[0], pyarrow.string())) for name in self.columns]
        self.schema, self.pending = pyarrow.schema(fields, {b"writer": WRITER}), []
        self.writer, self.table_of = parquet.ParquetWriter(self.handle, self.schema), pyarrow.Table.from_pylist

    def write(self, row: Row) -> None:
        self.pending.append(dict(zip(self.columns, self.cells(row), strict=True)))
        if len(self.pending) == ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        self.writer.write_table(self.table_of(self.pending, schema=self.schema))
        self.pending = []

    def end(self) -> None:
        if self.pending:
            self._flush()
        self.writer.close()


KINDS: Mapping[str, type[Rows]] = {".csv": CsvRows, ".jsonl": JsonRows, ".parquet": ParquetRows}


@contextmanager
def open_rows(file: Path, topk: int, has_labels: bool) -> Iterator[Rows]:
    """Yield the rows of a new file. It gets its name if the block succeeds, and is removed if not."""
    kind = KINDS[file.suffix.lower()]
    with atomic_file(file) as temporary, open(temporary, **kind.opened) as handle:
        rows = kind(handle, topk, has_labels)
        yield rows
        rows.end()


def require_writable(file: Path) -> None:
    """Raise UserError if the suffix is unknown, if the package for the format is missing, or if the file exists and contains
    something else than predictions."""
    if file.suffix.lower() not in KINDS or file.is_dir():
        raise UserError(f"--output {file}: give a file name that ends in {', '.join(KINDS)}")
    if file.suffix.lower() == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise UserError(
                f"--output {file}: Parquet requires a package: pip install pyarrow; or write .csv"
            ) from None
    if file.exists() and not _was_written_here(file):
        raise UserError(f"--output {file}: it exists and contains no predictions; give another name")


def _was_written_here(file: Path) -> bool:
    if not file.is_file():
        return False
    if file.suffix.lower() == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            return (parquet.read_schema(file).metadata or {}).get(b"writer") == WRITER
        except (ArrowException, OSError):
            return False
    with open(file, "rb") as handle:
        first = handle.readline(1 << 16)
    if file.suffix.lower() == ".csv":
        return first.startswith(b"path,") and b"class_1,name_1,probability_1" in first
    return first.startswith(b'{"path": ') and b'"probabilities": [' in first


def as_unicode(path: str) -> str:
    """Return a path in which bytes that are not text are escapes such as \\udcff."""
    return path.encode("utf-8", "backslashreplace").decode()


def _csv_value(cell: object) -> object:
    if isinstance(cell, float):
        return f"{cell:.6g}"
    return csv_cell(cell) if isinstance(cell, str) else cell
