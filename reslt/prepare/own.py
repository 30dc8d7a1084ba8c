"""A user's own photos -> a dataset: lists, class names, and a record of which image is on which side."""

from __future__ import annotations

import os
import posixpath
import re
import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reslt.augment.decode import PACKAGE
from reslt.core.errors import UserError
from reslt.core.locks import locked, sweep
from reslt.core.text import counted
from reslt.data.datasets import class_names, list_files, load_dataset, read_info
from reslt.data.lists import SPLITS, ImageList, images_per_class, read_list
from reslt.data.paths import ImageRoot, find_image_root
from reslt.prepare.advice import FINE_TUNING, defaults_for
from reslt.prepare.contents import digests_of
from reslt.prepare.folder import changed_yaml, dataset_files, folder_named, new_folder, write_image_root, write_lists
from reslt.prepare.photos import Photos, require_two
from reslt.prepare.sides import SIDES, read_sides, sides_of_new, sides_on_disk, write_sides

DEFAULT_HELD_OUT = {"val": 0, "test": 10}  # images per class
NAMED = 10  # unreadable images that are printed
OUR_DESCRIPTION = re.compile(r"(train|val|test) [\d,]+(, (val|test) [\d,]+)* images of \d+ classes")


class Photo(NamedTuple):
    """An image of the source: path below the root, class index, split as found ('train': that, or none), digest."""

    path: str
    label: int
    split: str
    digest: bytes


@dataclass(frozen=True)
class Earlier:
    """A dataset before it is extended or replaced; by default, none."""

    info: dict = field(default_factory=dict)
    names: list[str] = field(default_factory=list)  # classes, in the order of their indices; [] if they are not kept
    sides: dict[bytes, str] = field(default_factory=dict)  # all images that were ever listed
    listed: dict[str, str] = field(default_factory=dict)  # path -> split, if it has the same image root
    labels: dict[str, int] = field(default_factory=dict)  # path -> class index, likewise
    images: dict[str, int] = field(default_factory=dict)  # per list
    set_aside: dict[str, int] = field(default_factory=dict)  # images per class, as info.yaml or its lists say
    keeps_local: bool = False  # its local.yaml fits


def make_own(
    photos: Photos,
    name: str,
    held_out: dict[str, int | None],
    seed: int | None,
    decode: bool,
    workers: int,
    existing: str = "refuse",
) -> list[str]:
    """Write data_lists/<name>: lists, class names, settings that fit the size. Return remarks, the last one a balance.

    `held_out`: images per class to set aside for 'val' and 'test', if the source has no such split; they are chosen by
    their content and `seed`. None: as in the dataset to extend, else the default. At least half of a class, rounded up,
    stays in training. With `decode`, files that cannot be read are left out, and named.

    `existing`: 'refuse' a dataset of that name, 'overwrite' it, or 'extend' it, which keeps class indices and what its
    info.yaml says. Both keep every image that it ever listed on its side, recognized by content. Raises UserError."""
    require_two(photos.names, photos.root)
    folder, messages = _target(name, existing), [*photos.account.decisions]
    sweep(folder.parent)
    with locked(folder):
        _target(name, existing)  # again: another process may just have created it
        with dataset_files(folder) as made:  # first: a place that cannot be written costs no decoding
            earlier = _earlier(folder, photos, existing, messages)
            found = _readable(photos, made, decode, workers, messages)
            found = _without_copies(photos, found, earlier, messages)
            settings = _settings(earlier, held_out, seed, set(photos.paths), messages)
            side_of = _sides(photos, found, earlier, settings, messages)
            if existing == "extend":
                _report_growth(name, photos, found, earlier, side_of, messages)
            names = earlier.names + [name for name in photos.names if name not in set(earlier.names)]
            lines = _lines(photos, found, side_of, names, bool(earlier.names), messages)
            write_sides(made, earlier.sides | {photo.digest: side_of[photo] for photo in found})
            _write_local(folder, made, photos, earlier, messages)
            (made / "info.yaml").write_text(_info(folder, earlier, names, lines, settings, messages), encoding="utf-8")
            write_lists(made, lines)
            _require_valid(made, folder)
    for split, n in settings.items():
        if split in SPLITS and split not in photos.paths:
            counts = Counter(label for _, label in lines.get(split, []))
            if short := sum(counts[c] < n for c in range(len(names))):
                kept = ", and known images keep their side" * bool(earlier.images)
                messages.append(
                    f"{split}: {short} of {len(names)} classes have fewer than {n} images: at most half of a class is set "
                    f"aside{kept}"
                )
    if "test" not in lines and "val" not in lines:
        messages.append(
            "neither test.txt nor val.txt: training will print no table; --test-per-class N sets some aside"
        )
    return [*messages, photos.account.balance(len(found))]


def _target(name: str, existing: str) -> Path:
    """Return the folder of the dataset to create, extend or overwrite. Raises UserError if it cannot be."""
    folder = folder_named(name, "--extend" if existing == "extend" else "--name")
    if existing == "refuse" or (existing == "overwrite" and not folder.exists()):
        if folder.exists() and _is_own(folder, read_info(folder)):
            raise UserError(
                f"--name {name}: {folder} already exists; add images to it with --extend {name} (instead of --name), "
                "replace it with --overwrite, or choose another name"
            )
        return new_folder(name)
    if not folder.exists():
        raise UserError(f"--extend {name}: {folder} does not exist; create it with --name {name}")
    info = read_info(folder)
    if "prepare" in info:
        raise UserError(
            f"--{existing} {name}: {folder} is not made by `own`, but by `{info['prepare']}`; choose another"
        )
    if existing == "overwrite" and not _is_own(folder, info):
        raise UserError(f"--overwrite: {folder} was not made by `own`; move it away, or choose another --name")
    return folder


def _is_own(folder: Path, info: dict) -> bool:
    """Return whether `own` made a dataset: earlier versions wrote no sides.csv."""
    return (folder / SIDES).exists() or bool(OUR_DESCRIPTION.fullmatch(str(info.get("description"))))


def _earlier(folder: Path, photos: Photos, existing: str, messages: list[str]) -> Earlier:
    """Read the dataset that is to be extended or replaced. Add a message if some of its images cannot be recognized."""
    if not folder.exists():
        return Earlier()
    info = read_info(folder)
    lists = {split: read_list(file) for split, file in list_files(folder).items()}
    root = find_image_root(folder, info, None)
    sides = read_sides(folder)
    if sides is None:
        sides, lost = sides_on_disk(lists, root)
        if lost:
            messages.append(
                f"no longer below {root.folder}: {counted(lost, 'image')} that {folder.name} lists, without a record of the "
                "content; those that were moved or renamed count as new"
            )
    names = []
    if existing == "extend":
        names = class_names(info, folder / "info.yaml", lists["train"]) if "train" in lists else info.get("class_names")
        if not names:
            raise UserError(f"--extend {folder.name}: {folder / 'info.yaml'} states no class_names; add them")
    listed, labels, same_root = {}, {}, root.folder.resolve() == photos.root.resolve()
    if same_root:
        for split in sorted(lists, key=SPLITS.index):
            for i in range(len(lists[split])):
                path = posixpath.normpath(root.rewritten(lists[split].path(i)))
                listed.setdefault(path, split)
                labels.setdefault(path, int(lists[split].labels[i]))
    counts = {split: len(images) for split, images in lists.items()}
    set_aside = _recorded(info) or (_as_listed(lists) if _is_own(folder, info) and "train" in lists else {})
    unruled = all(root.rewritten(path) == path for of_split in photos.paths.values() for c in of_split for path in c)
    return Earlier(info, list(map(str, names)), sides, listed, labels, counts, set_aside, same_root and unruled)


def _recorded(info: dict) -> dict[str, int]:
    """Return `held_out` of info.yaml, {} if there is none. Raises UserError."""
    recorded = info.get("held_out") or {}
    whole = isinstance(recorded, dict) and all(type(n) is int and n >= 0 for n in recorded.values())
    if not whole or not set(recorded) <= {"val", "test", "seed"}:
        raise UserError(f"info.yaml: held_out is {recorded!r}; write it as {{val: N, test: N, seed: N}}")
    return recorded


def _as_listed(lists: dict[str, ImageList]) -> dict[str, int]:
    """Return {'val', 'test': images per class that were set aside}, as the lists of an earlier version of `own` show them:
    the number in classes that had enough images, else at least the largest."""
    classes = max(int(images.labels.max()) for images in lists.values()) + 1
    counts = {split: images_per_class(images.labels, classes) for split, images in lists.items()}
    held_out = {split: counts.get(split, np.zeros(classes, np.int64)) for split in DEFAULT_HELD_OUT}
    enough = counts["train"] > sum(held_out.values()) + 1  # where half of the class did not limit it
    if enough.any():
        return {split: int(n[enough].max()) for split, n in held_out.items()}
    return {split: max(int(n.max()), DEFAULT_HELD_OUT[split]) for split, n in held_out.items()}


def _readable(photos: Photos, scratch: Path, decode: bool, workers: int, messages: list[str]) -> list[Photo]:
    """Return the photos that can be read, with digests; without `decode`, all that are not empty."""
    found, bad = [], []
    for split, per_class in photos.paths.items():
        rows = [(path, c) for c, paths in enumerate(per_class) for path in paths]
        if decode:
            examined = _examined(photos.root, scratch / f"{split}.txt", rows, workers)
        else:
            digests = digests_of(os.path.join(photos.root, path) for path, _ in rows)
            examined = [(digest, "empty, or cannot be opened") for digest in digests]
        for (path, c), (digest, reason) in zip(rows, examined, strict=True):
            if digest is None:
                bad.append((path, reason))
            else:
                found.append(Photo(path, c, split, digest))
    messages += [f"left out: {photos.root / path}: {reason}" for path, reason in bad[:NAMED]]
    if len(bad) > NAMED:
        messages.append(f"left out: {len(bad) - NAMED:,} more files that cannot be read")
    photos.account.left_out.update("no decoder" if PACKAGE in reason else "unreadable" for _, reason in bad)
    return found


def _examined(root: Path, file: Path, rows: list[tuple[str, int]], workers: int) -> list[tuple[bytes | None, str]]:
    """Decode everything -> the digest of each image or None, and the reason why it cannot be read."""
    from reslt.prepare.examine import examine

    if not rows:
        return []
    write_lists(file.parent, {file.stem: rows})
    images = read_list(file)
    file.unlink()
    results = [(None, "")] * len(rows)
    for image in examine(images, ImageRoot(root), np.arange(len(images)), workers):
        results[image.index] = (image.digest, image.reason or "changed while it was read")
    return results


def _without_copies(photos: Photos, found: list[Photo], earlier: Earlier, messages: list[str]) -> list[Photo]:
    """Keep one of several photos with the same content: one that is listed already, or of the test split, or the first.
    None if they are of several classes: which label is right cannot be known."""
    groups = defaultdict(list)
    for photo in found:
        groups[photo.digest].append(photo)
    copies, torn, dropped = [], [], set()
    for group in groups.values():
        if len(group) == 1:
            continue
        if len({photo.label for photo in group}) > 1:
            torn.append(group)
            dropped.update(group)
            continue
        kept = min(group, key=lambda photo: (photo.path not in earlier.listed, -SPLITS.index(photo.split)))
        copies += [(photo, kept) for photo in group if photo is not kept]
        dropped.update(photo for photo in group if photo is not kept)
    if copies:
        first, kept = copies[0]
        messages.append(
            f"left out: copies of other images of the same class: {len(copies):,}, first {first.path!r}, with the same "
            f"content as {kept.path!r}"
        )
        photos.account.left_out["copy of another image"] += len(copies)
    if torn:
        first = torn[0][0]
        other = next(photo for photo in torn[0] if photo.label != first.label)
        n = sum(map(len, torn))
        messages.append(
            f"left out: files with the same content as a file of another class: {n:,}, first {first.path!r} "
            f"({photos.names[first.label]}) and {other.path!r} ({photos.names[other.label]}); remove the wrong ones and "
            "run this again to use the others"
        )
        photos.account.left_out["same content in two classes"] += n
    return [photo for photo in found if photo not in dropped]


def _settings(
    earlier: Earlier, held_out: dict[str, int | None], seed: int | None, splits: set[str], messages: list[str]
) -> dict[str, int]:
    """Return {'val', 'test': images per class, 'seed'}: as given, else as the dataset was made, else the default.

    `splits`: those of the source, of which nothing is set aside."""
    given = {key: n for key, n in (*held_out.items(), ("seed", seed)) if n is not None}
    settings = DEFAULT_HELD_OUT | {"seed": 0} | earlier.set_aside | given
    unstated = [split for split in DEFAULT_HELD_OUT if split not in splits and split not in given]
    if earlier.images and unstated and "held_out" not in earlier.info:
        messages.append(
            "info.yaml does not say how many images per class are set aside; from now on: "
            f"{', '.join(f'{split} {settings[split]}' for split in unstated)} (other numbers: --val-per-class, --test-per-class)"
        )
    return settings


def _sides(
    photos: Photos, found: list[Photo], earlier: Earlier, settings: dict[str, int], messages: list[str]
) -> dict[Photo, str]:
    """Return the split of each photo: the one it was ever on, else the one it is found in, else filled up."""
    split_given = set(photos.paths) - {"train"}
    sides, new, known, moved = {}, defaultdict(list), defaultdict(Counter), []
    for photo in found:
        # A file that was changed in place, or listed by hand, is not in the record: then its path counts.
        side = earlier.sides.get(photo.digest) or earlier.listed.get(photo.path)
        if side is None and photo.split == "train":
            new[photo.label].append(photo)
            continue
        sides[photo] = side = side or photo.split
        found_in = photo.split if photo.split in split_given or side in split_given else side
        if side != found_in or side != earlier.listed.get(photo.path, side):
            moved.append((photo, side))
        if side not in split_given:
            known[photo.label][side] += 1
    if moved:
        photo, side = moved[0]
        messages.append(
            "images that keep the side they have been on, though they are now found in a split or under a path of another: "
            f"{len(moved):,}, first {photo.path!r}, which stays in {side}"
        )
    held_out = {split: settings[split] for split in ("val", "test") if split not in split_given}
    for label, of_class in new.items():
        of_new = sides_of_new([photo.digest for photo in of_class], known[label], held_out, settings["seed"])
        sides |= {photo: of_new[photo.digest] for photo in of_class}
    return sides


def _report_growth(
    name: str, photos: Photos, found: list[Photo], earlier: Earlier, side_of: dict[Photo, str], messages: list[str]
) -> None:
    """Add messages on known and new images and classes. Raises UserError if no image is known."""
    is_known = [photo.digest in earlier.sides or photo.path in earlier.listed for photo in found]
    known, before = sum(is_known), sum(earlier.images.values())
    if not known:
        raise UserError(
            f"--extend {name}: none of the {before:,} images that it lists is below {photos.root}; give the source that "
            f"contains all of them, old and new (to start over: --name {name} --overwrite)"
        )
    new = Counter(side_of[photo] for photo, was in zip(found, is_known, strict=True) if not was)
    fewer = f" ({before - known:,} fewer than were listed)" if known < before else ""
    of_new = f": {', '.join(f'{split} {new[split]:,}' for split in SPLITS if new[split])}" if new else ""
    messages.append(f"{counted(known, 'known image')}, each on its side as before{fewer}; {new.total():,} new{of_new}")
    before = {path: earlier.names[label] for path, label in earlier.labels.items()}
    if relabeled := [
        photo for photo in found if before.get(photo.path, photos.names[photo.label]) != photos.names[photo.label]
    ]:
        photo = relabeled[0]
        messages.append(
            f"images of another class than before: {len(relabeled):,}, first {photo.path!r}: "
            f"{before[photo.path]}, now {photos.names[photo.label]}"
        )
    if added := [name for name in photos.names if name not in set(earlier.names)]:
        messages.append(f"new classes, numbered after the others: {len(added):,}, first {added[0]!r}")


def _lines(
    photos: Photos,
    found: list[Photo],
    side_of: dict[Photo, str],
    names: list[str],
    is_extended: bool,
    messages: list[str],
) -> dict[str, list[tuple[str, int]]]:
    """Return {split: (path, class index) rows} by class, in the source's order. Raises UserError for a class without
    training images."""
    index, lines = {name: c for c, name in enumerate(names)}, {split: [] for split in SPLITS}
    for photo in sorted(found, key=lambda photo: index[photos.names[photo.label]]):
        lines[side_of[photo]].append((photo.path, index[photos.names[photo.label]]))
    trained = {label for _, label in lines["train"]}
    if empty := [name for c, name in enumerate(names) if c not in trained]:
        remedy = "add some, or remove it"
        if is_extended:
            remedy = (
                "put some back; to remove or rename the class, use --name with --overwrite, which numbers the classes "
                "again (images keep their sides)"
            )
        raise UserError("\n".join([*messages, f"class {empty[0]!r} has no readable training image; {remedy}"]))
    return {split: rows for split, rows in lines.items() if rows}


def _write_local(folder: Path, made: Path, photos: Photos, earlier: Earlier, messages: list[str]) -> None:
    """Write local.yaml, or keep it if its image root is that of the photos."""
    if earlier.keeps_local and (folder / "local.yaml").is_file():
        shutil.copyfile(folder / "local.yaml", made / "local.yaml")
        return
    write_image_root(made, photos.root)
    if earlier.images:
        messages.append(f"local.yaml: the image root is now {photos.root.resolve()}")


def _info(folder: Path, earlier: Earlier, names: list[str], lines: dict, settings: dict, messages: list[str]) -> str:
    """Return the text of info.yaml; that of a dataset to extend keeps what its user wrote."""
    sizes = ", ".join(f"{split} {len(rows):,}" for split, rows in lines.items())
    info = {"description": f"{sizes} images of {len(names)} classes", "class_names": names, "held_out": settings}
    before = earlier.info if earlier.names else {}
    if not OUR_DESCRIPTION.fullmatch(str(before.get("description", info["description"]))):
        del info["description"]
    if "num_classes" in before:
        info["num_classes"] = len(names)
    stated, images = before.get("defaults") or {}, earlier.images.get("train", 0)
    written, fitting = defaults_for(images) if before else {}, defaults_for(len(lines["train"]))
    defaults = dict(stated)
    for keys, remark in (
        (("batch_size", "lr"), "for enough steps per epoch"),
        (tuple(FINE_TUNING), "to start from trained weights"),
    ):
        was, now = ({key: of[key] for key in keys if key in of} for of in (written, fitting))
        if {key: stated[key] for key in keys if key in stated} != was:  # the user changed what `own` wrote
            continue
        defaults = {key: value for key, value in defaults.items() if key not in was} | now
        if now:
            shown = ", ".join(f"{key} {_in_yaml(value)}" for key, value in now.items())
            messages.append(f"few training images: {shown}, {remark} (info.yaml, defaults)")
    info["defaults"] = defaults
    changes = {key: value for key, value in info.items() if value != before.get(key, {})}
    return changed_yaml((folder / "info.yaml").read_text(encoding="utf-8") if before else "", changes)


def _in_yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _require_valid(made: Path, folder: Path) -> None:
    """Raise UserError if the dataset could not be loaded, before it replaces one that can."""
    try:
        load_dataset(str(made), images_needed=False)
    except UserError as fault:
        raise UserError(str(fault).replace(str(made), str(folder))) from None
