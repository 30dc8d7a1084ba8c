"""Photos from JSON in COCO's form, which iNaturalist uses too: images, annotations and categories."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from reslt.core.errors import UserError
from reslt.core.text import counted, listed, shown
from reslt.prepare.file_kind import JSON, require_kind
from reslt.prepare.listings import Listing, listed_photos
from reslt.prepare.photos import Photos

SEVERAL, NONE = "several categories", "no annotation"


def from_json(files: dict[str, Path], data_dir: Path | None = None) -> Photos:
    """Read {split: file}: each an object with `images` (id, file_name), `annotations` (image_id, category_id) and
    `categories` (id, name). Paths start from `data_dir` (None: each file's folder).

    Classes are ordered by name, as for every source; the ids of categories are not labels. Images without annotation, or
    with annotations of several categories, are left out. Raises UserError for an invalid file."""
    decisions: list[str] = []
    return listed_photos([_listing(file, split, decisions) for split, file in files.items()], data_dir, decisions)


def _listing(file: Path, split: str, decisions: list[str]) -> Listing:
    content = _read(file, "--json" if split == "train" else f"--{split}-json")
    image_ids = _column(content, file, "images", "id", (int, str))
    paths = _column(content, file, "images", "file_name", (str,))
    annotated = _column(content, file, "annotations", "image_id", (int, str))
    categories = _column(content, file, "annotations", "category_id", (int, str))
    names = _category_names(content, file)

    if len(numbers := {image_id: i for i, image_id in enumerate(image_ids)}) < len(image_ids):
        twice = next(image_id for image_id, n in Counter(image_ids).items() if n > 1)
        raise UserError(f"{file}: images: several have the id {shown(str(twice))}; give each its own")
    if (k := next((k for k, category in enumerate(categories) if category not in names), None)) is not None:
        raise UserError(
            f"{file}: annotation {k + 1}: category_id {shown(str(categories[k]))} is not among the categories"
        )
    category_of: dict[int, int | str] = {}
    several: set[int] = set()
    unknown = 0
    for image_id, category in zip(annotated, categories, strict=True):
        if (i := numbers.get(image_id)) is None:
            unknown += 1
        elif category_of.setdefault(i, category) != category:
            several.add(i)
    left_out = dict.fromkeys(several, SEVERAL) | {i: NONE for i in range(len(paths)) if i not in category_of}
    if unknown:
        decisions.append(f"{file.name}: ignored: {counted(unknown, 'annotation')} of images that it does not list")
    for reason, n in Counter(left_out.values()).items():
        decisions.append(f"left out: {counted(n, 'image')} of {file.name}: {reason}")
    used = {names[category] for i, category in category_of.items() if i not in several}
    if unused := [name for name in names.values() if name not in used]:
        decisions.append(f"{file.name}: {len(unused):,} categories without images: {listed(unused, 6)}")
    return Listing(
        file=file,
        unit="image",
        numbers=range(1, len(paths) + 1),
        paths=paths,
        labels=[names[category_of[i]] if i in category_of else "" for i in range(len(paths))],
        splits=None,
        split=split,
        left_out=left_out,
    )


def _read(file: Path, flag: str) -> dict:
    require_kind(file, flag, JSON)
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError, MemoryError) as fault:
        reason = {UnicodeDecodeError: "not UTF-8 text", RecursionError: "nested too deeply"}.get(
            type(fault), str(fault) or "too large"
        )
        if isinstance(fault, json.JSONDecodeError):
            reason = f"line {fault.lineno}: {fault.msg}"
        raise UserError(f"{flag} {file}: not readable as JSON: {reason}") from None
    parts = ("images", "annotations", "categories")
    has = content if isinstance(content, dict) else {}
    if missing := [part for part in parts if not isinstance(has.get(part), list)]:
        there = f"it has: {listed(list(has))}" if has else "its top level is no object"
        raise UserError(
            f"{flag} {file}: there is no list {missing[0]!r} in it ({there}); it must have COCO's form: images, annotations "
            "(without them there are no labels) and categories"
        )
    return content


def _column(content: dict, file: Path, part: str, key: str, types: tuple[type, ...]) -> list:
    """Return one value of each object of a list. Raises UserError if an object lacks it, or has one of another type."""
    objects = content[part]
    try:
        values = [entry[key] for entry in objects]
    except (KeyError, TypeError, IndexError):
        k = next(k for k, entry in enumerate(objects) if not (isinstance(entry, dict) and key in entry))
        raise UserError(f"{file}: {part}: entry {k + 1} has no {key!r}") from None
    if not set(map(type, values)) <= set(types):
        k = next(k for k, value in enumerate(values) if type(value) not in types)
        kinds = " or ".join({int: "a whole number", str: "a text"}[kind] for kind in types)
        raise UserError(f"{file}: {part}: entry {k + 1}: {key!r} is not {kinds}")
    return values


def _category_names(content: dict, file: Path) -> dict[int | str, str]:
    """Return {id: name} of the categories. Raises UserError for an empty name, and if two share an id or a name."""
    ids = _column(content, file, "categories", "id", (int, str))
    texts = [str(name).strip() for name in _column(content, file, "categories", "name", (int, str))]
    if "" in texts:
        raise UserError(f"{file}: categories: entry {texts.index('') + 1}: the name is empty; give it one")
    for key, values in (("id", ids), ("name", texts)):
        if len(set(values)) < len(values):
            twice = next(value for value, n in Counter(values).items() if n > 1)
            raise UserError(f"{file}: categories: several have the {key} {shown(str(twice))}; give each its own")
    return dict(zip(ids, texts, strict=True))
