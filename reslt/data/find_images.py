"""The image files below a folder: each is found once; those in hidden and system folders are only counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from reslt.core.errors import UserError

IMAGE_SUFFIXES = {
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".hif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe",
    ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
TABLES = {".csv", ".tsv", ".tab", ".json", ".jsonl"}
SYSTEM_FILES = {"Thumbs.db", "desktop.ini"}  # operating systems leave them in folders of photos
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
HIDDEN_FILES = "hidden files"  # such as the ._photo.jpg of macOS


@dataclass
class Found:
    """The files below `root` and below folders linked into it; paths are relative to it, with forward slashes."""

    root: Path
    images: list[str] = field(default_factory=list)  # sorted
    other_files: list[str] = field(default_factory=list)  # sorted
    unseen: Counter = field(default_factory=Counter)  # name of hidden or system folders -> images in them
    folders: dict[str, str] = field(default_factory=dict)  # real folder -> the path under which it was read
    links: list[str] = field(default_factory=list)  # linked folders that were read under another path

    @cached_property
    def known(self) -> frozenset[str]:
        """The images, for look-ups."""
        return frozenset(self.images)

    @cached_property
    def by_stem(self) -> dict[str, list[str]]:
        """{path without file ending: images of that path}."""
        stems: dict[str, list[str]] = {}
        for image in self.images:
            stems.setdefault(stem(image), []).append(image)
        return stems

    def subfolders(self) -> list[str]:
        """Return the sorted names of the folders directly below the root, with or without images."""
        return sorted(folder for folder in self.folders.values() if folder and "/" not in folder)

    def tables(self) -> list[str]:
        """Return the tables and JSON files in the root and in the folders directly below it, the root's first."""
        tables = [
            path for path in self.other_files if os.path.splitext(path)[1].lower() in TABLES and path.count("/") < 2
        ]
        return sorted(tables, key=lambda path: (path.count("/"), path))

    def other_kinds(self) -> Counter:
        """Return {file ending or '': number of files} of the files that are neither images nor `tables`."""
        tables = set(self.tables())
        names = [PurePosixPath(path) for path in self.other_files if path not in tables]
        return Counter(name.suffix.lower() for name in names if name.name not in SYSTEM_FILES)


def find_images(root: Path) -> Found:
    """Search a folder, then the folders linked into it; each real folder is read once.

    Raises UserError for a folder that cannot be read."""
    found = Found(root)
    to_read, linked = [""], []
    while to_read or linked:
        folder = to_read.pop() if to_read else linked.pop(0)
        real = os.path.realpath(root / folder)
        if real in found.folders:
            found.links.append(folder)  # perhaps a link to a folder above it
            continue
        found.folders[real] = folder
        for entry in _entries(root / folder):
            path = f"{folder}/{entry.name}" if folder else entry.name
            is_image = os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES
            is_hidden = entry.name.startswith(".")
            if _is_folder(entry):
                if is_hidden or entry.name in SYSTEM_FOLDERS:
                    found.unseen[f"{entry.name}/"] += _count_images(entry.path)
                else:
                    (linked if entry.is_symlink() else to_read).append(path)
            elif is_hidden:
                found.unseen[HIDDEN_FILES] += is_image
            else:
                (found.images if is_image else found.other_files).append(path)
    found.unseen = +found.unseen  # drop the places that contain no image
    for paths in (found.images, found.other_files, found.links):
        paths.sort(key=lambda path: path.split("/"))  # folder by folder: "a/x" before "a b/x"
    return found


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below a folder and below those linked into it, once, with its file names; skip hidden ones."""
    entered = set()
    for here, below, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(here)) in entered:  # reached through a link before
            below.clear()
            continue
        entered.add(real)
        below[:] = [name for name in below if not name.startswith(".")]
        yield here, [name for name in files if not name.startswith(".")]


def by_folder(images: list[str], depth: int) -> tuple[dict[str, list[str]], list[str]]:
    """Group images by the folder at `depth` in their paths. Return {folder: images}, and the images without one."""
    folders: dict[str, list[str]] = {}
    loose = []
    for image in images:
        parts = image.split("/", depth + 1)
        if len(parts) == depth + 2:
            folders.setdefault(parts[depth], []).append(image)
        else:
            loose.append(image)
    return folders, loose


def stem(path: str) -> str:
    """Return a path without the file ending."""
    return path[: -len(os.path.splitext(path)[1])] if os.path.splitext(path)[1] else path


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as fault:
        raise UserError(f"{folder}: cannot be read: {fault.strerror}; its images would be missing") from None


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _count_images(folder: str) -> int:
    """Count image files below a folder, without following links; folders that cannot be read count as empty."""
    return sum(os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES for _, _, names in os.walk(folder) for name in names)
