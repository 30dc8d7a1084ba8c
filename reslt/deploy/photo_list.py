"""The photos that a user names for prediction: files, folders, or a list. Loads no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reslt.core.errors import UserError
from reslt.core.files import regular_file
from reslt.core.log import logger
from reslt.core.text import counted, listed, shown
from reslt.data.classes import Classes, known_classes
from reslt.data.datasets import read_info
from reslt.data.find_images import IMAGE_SUFFIXES, find_images
from reslt.data.paths import ImageRoot, find_image_root

WITH_LABEL = re.compile(r"(?P<path>.*\S)\s+(?P<label>\d{1,9})\s*")


@dataclass(frozen=True)
class PhotoList:
    """Paths as the user sees them, the folder that relative ones start from, and the labels of a list that has them."""

    paths: list[str]
    root: ImageRoot
    labels: list[int] | None = None
    lines: list[int] | None = None  # of the list, from 1
    file: Path | None = None  # the list
    class_names: tuple[str, ...] | None = None  # of the dataset that it belongs to

    def seen_by(self, model: Classes, ckpt: Path) -> PhotoList:
        """Return the photos with labels in the order of a model's classes: by name if the list's dataset and the model have
        names. Raises UserError for the first label that the model does not have."""
        if self.labels is None:
            return self
        data = Classes(len(self.class_names), self.class_names) if self.class_names else None
        match = data and known_classes(model, data)
        classes = match.model_class.tolist() if match else list(range(model.number))
        for label, line in zip(self.labels, self.lines, strict=True):
            if label >= len(classes) or classes[label] < 0:
                what = f"label {label} is outside 0..{len(classes) - 1}"
                if label < len(classes):
                    what = f"label {label} is the class '{shown(self.class_names[label])}', which {ckpt} does not know"
                raise UserError(
                    f"{self.file}:{line}: {what}: the list is of other classes than those of {ckpt}; give the model of these "
                    "classes, or a list without labels"
                )
        return replace(self, labels=[classes[label] for label in self.labels])


def photos_of(places: Sequence[str]) -> PhotoList:
    """Return the photos of files and folders, in this order; those of a folder are found in its subfolders too.

    Files are decoded whatever their name ends in. Raises UserError for a folder without images, or that cannot be read."""
    paths: list[str] = []
    for place in places:
        if not os.path.isdir(place):
            paths.append(place)
            continue
        found = find_images(Path(place))
        hidden, others = found.unseen.total(), len(found.other_files)
        if not found.images:
            why = "".join([f"; {counted(others, 'other file')}"] * bool(others))
            why += "".join([f"; {counted(hidden, 'image')} in hidden or system folders"] * bool(hidden))
            raise UserError(
                f"{place}: there is no image in this folder{why}; images end in "
                f"{listed(sorted(IMAGE_SUFFIXES & {'.jpg', '.jpeg', '.png', '.webp', '.tif', '.bmp', '.heic'}))}, ..."
            )
        if hidden:
            logger.warning(
                f"{place}: not looked at: {counted(hidden, 'image')} that are hidden or in folders of systems"
            )
        paths += [os.path.join(place, path) for path in found.images]
    return PhotoList(paths, ImageRoot(Path(".")))


def photos_in(file: Path, data_dir: str | None) -> PhotoList:
    """Return the photos of a text file, one path per line, or `path label`: if every line ends in a whole number after a
    space, these are the labels.

    Relative paths start from `data_dir`, else from the image root of the dataset that the file is a list of, else from the
    file's folder. Raises UserError for a file that is no list, and for a missing image root."""
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
    names = tuple(map(str, names)) if isinstance(names, list) else None
    return PhotoList(paths, root, labels, numbers, file, names)
