"""The photos that a user names for prediction: files, folders, or a list. Imports no torch."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from reslt.core.errors import UserError
from reslt.core.files import regular_file
from reslt.core.log import logger
from reslt.core.text import counted, listed, one_line, shown
from reslt.data.classes import Classes, known_classes
from reslt.data.datasets import read_info
from reslt.data.find_images import IMAGE_SUFFIXES, SYSTEM_FILES, find_images
from reslt.data.paths import ImageRoot, find_image_root

WITH_LABEL = re.compile(r"(?P<path>.*\S)\s+(?P<label>\d{1,9})\s*")


@dataclass(frozen=True)
class PhotoList:
    """Paths as the user wrote them, the folder from which relative paths start, and the labels of a list that has them."""

    paths: list[str]
    root: ImageRoot
    labels: list[int] | None = None
    lines: list[int] | None = None  # of the list, from 1
    file: Path | None = None  # the list
    class_names: tuple[str, ...] | None = None  # of the dataset that it belongs to

    @property
    def looked_in(self) -> str:
        """For errors about missing photos of a list: the folder of its paths, and the remedy; '' without a list."""
        if self.file is None:
            return ""
        return f" (the list's paths start from {self.root.folder}, of {self.root.source}; --data-dir changes that)"

    def with_labels_of(self, model: Classes, ckpt: Path) -> PhotoList:
        """Return the photos with labels in the order of a model's classes, matched by name if both the list's dataset and the
        model have names. Raises UserError for the first label that the model lacks."""
        if self.labels is None:
            return self
        data = Classes(len(self.class_names), self.class_names) if self.class_names else None
        match = data and known_classes(model, data)
        classes = match.model_class.tolist() if match else list(range(model.number))
        for label, line in zip(self.labels, self.lines, strict=True):
            if label >= len(classes) or classes[label] < 0:
                what = f"label {label} is outside 0..{len(classes) - 1}"
                if label < len(classes):
                    what = f"label {label} is the class '{shown(self.class_names[label])}', which {ckpt} lacks"
                raise UserError(
                    f"{self.file}:{line}: {what}; the classes of the list are not those of {ckpt}: give a model of these "
                    "classes, or a list without labels"
                )
        return replace(self, labels=[classes[label] for label in self.labels])


def photos_of(places: Sequence[str]) -> PhotoList:
    """Return the photos of files and folders, including subfolders, in this order.

    A file is decoded regardless of its suffix. In a folder, files with the suffix of an image are decoded, and a warning
    counts the others. Raises UserError for a path that does not exist, and for a folder that has no images or cannot be
    read."""
    if missing := [place for place in places if not os.path.exists(place)]:
        more = f" ({len(missing):,} of PHOTOS do not exist)" if len(missing) > 1 else ""
        raise UserError(
            f"{one_line(missing[0])}: there is no such file or folder{more}; paths start from {os.getcwd()}"
        )
    paths: list[str] = []
    not_predicted: Counter[str] = Counter()  # by suffix
    for place in places:
        if not os.path.isdir(place):
            paths.append(place)
            continue
        found = find_images(Path(place))
        hidden, others = found.unseen.total(), len(found.other_files)
        if not found.images:
            why = f"; {counted(others, 'other file')}" if others else ""
            why += f"; {counted(hidden, 'image')} in hidden or system folders" if hidden else ""
            raise UserError(
                f"{place}: there is no image in this folder{why}; images end in "
                f"{listed(sorted(IMAGE_SUFFIXES & {'.jpg', '.jpeg', '.png', '.webp', '.tif', '.bmp', '.heic'}))}, ..."
            )
        if hidden:
            logger.warning(f"{place}: not predicted: {counted(hidden, 'image')}, hidden or in hidden or system folders")
        paths += [os.path.join(place, path) for path in found.images]
        for path in map(PurePath, found.other_files):
            if path.name not in SYSTEM_FILES:
                not_predicted[path.suffix or "no suffix"] += 1
    if not_predicted:
        kinds = listed([suffix for suffix, _ in not_predicted.most_common()], 6)
        logger.warning(f"not predicted: {counted(not_predicted.total(), 'other file')} ({kinds})")
    return PhotoList(paths, ImageRoot(Path(".")))


def photos_in(file: Path, data_dir: str | None) -> PhotoList:
    """Return the photos of a text file, one path per line, or `path label`. If every line ends in a whole number after a
    space, the numbers are the labels.

    A mixture of lines with an image file and a label and lines without a label is an error, as is the header of a table.
    Relative paths start from `data_dir`, else from the image root of the dataset to which the file belongs, else from the
    folder of the file. Raises UserError for a file that is not a list, and for a missing image root."""
    try:
        text = regular_file(file).read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as fault:
        raise UserError(f"--list {file}: {fault.strerror}") from None
    if "\0" in text:
        raise UserError(f"--list {file}: not a text file; each line is a path, or `path label`")
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"--list {file}: the list contains no photo; each line is a path, or `path label`")
    found = [WITH_LABEL.fullmatch(line) for _, line in lines]
    numbers, has_labels = [number for number, _ in lines], all(found)
    paths = [match["path"] for match in found] if has_labels else [line for _, line in lines]
    labels = [int(match["label"]) for match in found] if has_labels else None
    if (file.parent / "info.yaml").is_file():
        info = read_info(file.parent)
        root, names = find_image_root(file.parent, info, data_dir), info.get("class_names")
    else:
        names = None
        root = ImageRoot(
            Path(os.path.expanduser(data_dir or file.parent)), source="--data-dir" if data_dir else str(file)
        )
    if not root.folder.is_dir():
        raise UserError(
            f"--list {shown(str(file), 80)}: the image root {root.folder} (from {root.source}) is not a folder; give the "
            "folder that the list's paths start from with --data-dir"
        )
    _refuse_header(file, lines, root)
    if not has_labels:
        _refuse_mixture(file, lines)
    names = tuple(map(str, names)) if isinstance(names, list) else None
    return PhotoList(paths, root, labels, numbers, file, names)


def _refuse_header(file: Path, lines: list[tuple[int, str]], root: ImageRoot) -> None:
    """Raise UserError if the first line names the columns of a table."""
    number, first = lines[0]
    for separator in (",", ";", "\t"):
        is_of_columns = separator in first and not any(map(_is_image_name, first.split(separator)))
        if is_of_columns and all(separator in line for _, line in lines) and not root.file(first).exists():
            raise UserError(
                f"--list {file}:{number}: '{shown(first)}' is the header of a table; give a list of paths, one per line"
            )


def _refuse_mixture(file: Path, lines: list[tuple[int, str]]) -> None:
    """Raise UserError for the first line without a label if other lines are the name of an image file and a label."""
    found = [WITH_LABEL.fullmatch(line) for _, line in lines]
    labeled = [
        number for (number, _), match in zip(lines, found, strict=True) if match and _is_image_name(match["path"])
    ]
    if labeled:
        number, line = next(line for line, match in zip(lines, found, strict=True) if not match)
        raise UserError(
            f"--list {file}:{number}: '{shown(line)}' has no label, but line {labeled[0]} has one; give all lines a label "
            "(`path label`), or none"
        )


def _is_image_name(text: str) -> bool:
    return os.path.splitext(text.strip())[1].lower() in IMAGE_SUFFIXES
