"""A dataset from a user's own photos: lists, class names, and a record of the side that each image is on."""

from __future__ import annotations

import os
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reslt.augment.decode import PACKAGE  # marks a reason that names a package to install
from reslt.core.errors import UserError
from reslt.core.locks import locked, sweep
from reslt.core.text import counted
from reslt.data.datasets import load_dataset, read_info
from reslt.data.lists import SPLITS, read_list
from reslt.data.paths import ImageRoot
from reslt.prepare.advice import FINE_TUNING, defaults_for
from reslt.prepare.contents import digests_of
from reslt.prepare.earlier import DEFAULT_HELD_OUT, OUR_DESCRIPTION, Earlier, is_own, read_earlier
from reslt.prepare.folder import changed_yaml, dataset_files, folder_named, new_folder, write_image_root, write_lists
from reslt.prepare.photos import Photos, require_two
from reslt.prepare.sides import sides_of_new, write_sides

NAMED = 10  # unreadable images that are printed


class Photo(NamedTuple):
    """An image of the source: path below the root, class index, split in the source ('train' if it has none), digest."""

    path: str
    label: int
    split: str
    digest: bytes


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

    `held_out`: images per class to set aside for 'val' and 'test' if the source has no such split; they are chosen by
    content and `seed`. None: as in the dataset to extend, else the default. At least half of a class, rounded up, stays in
    training. With `decode`, files that cannot be read are left out and named.

    `existing`: 'refuse' a dataset of that name, 'overwrite' it, or 'extend' it, which keeps class indices and the content of
    info.yaml. Both keep every image that the dataset ever listed on its side; images are recognized by content. Raises
    UserError for a source or a dataset that does not allow this."""
    require_two(photos.names, photos.root)
    folder, messages = _target(name, existing), [*photos.account.decisions]
    sweep(folder.parent)
    with locked(folder):
        _target(name, existing)  # again: another process may have created it meanwhile
        with dataset_files(folder) as made:  # before decoding, which would be wasted if this place cannot be written
            earlier = read_earlier(folder, photos, existing == "extend", messages)
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
                    f"{split}: {short} of {len(names)} classes have fewer than {n} images in this list: at most half of a "
                    f"class is set aside{kept}"
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
        if folder.exists() and is_own(folder, read_info(folder)):
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
    if existing == "overwrite" and not is_own(folder, info):
        raise UserError(f"--overwrite: {folder} was not made by `own`; move it away, or choose another --name")
    return folder


def _readable(photos: Photos, scratch: Path, decode: bool, workers: int, messages: list[str]) -> list[Photo]:
    """Return the photos that can be read, with digests; without `decode`, all that can be opened and are not empty."""
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
    """Decode all images. Return the digest of each, or None, and the reason why it cannot be read."""
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
    """Return the photos without copies. Of several photos of a class with the same content, keep one that is listed already,
    else one of the test split, else the first. If they are of several classes, keep none: the right label is unknown."""
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
    """Return {'val', 'test': images per class, 'seed'}: the given values, else those of the dataset, else the defaults.

    `splits`: those of the source, for which nothing is set aside."""
    given = {key: n for key, n in (*held_out.items(), ("seed", seed)) if n is not None}
    settings = DEFAULT_HELD_OUT | {"seed": 0} | earlier.set_aside | given
    unstated = [split for split in DEFAULT_HELD_OUT if split not in splits and split not in given]
    if earlier.images and unstated and "held_out" not in earlier.info:
        messages.append(
            "info.yaml does not state how many images per class are set aside; from now on: "
            f"{', '.join(f'{split} {settings[split]}' for split in unstated)} (other numbers: --val-per-class, "
            "--test-per-class)"
        )
    return settings


def _sides(
    photos: Photos, found: list[Photo], earlier: Earlier, settings: dict[str, int], messages: list[str]
) -> dict[Photo, str]:
    """Return the split of each photo: its earlier side, else its split in the source, else as `sides_of_new` assigns it."""
    split_given = set(photos.paths) - {"train"}
    sides, new, known, moved = {}, defaultdict(list), defaultdict(Counter), []
    for photo in found:
        # A file that was changed in place or listed by hand is not in the record; then its path decides.
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
    """Return {split: (path, class index) rows}, ordered by class and then as in the source. Raises UserError for a class
    without training images."""
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
    """Return the text of info.yaml. For a dataset to extend, keep the user's own changes."""
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
        if {key: stated[key] for key in keys if key in stated} != was:  # the user has changed these settings
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
    """Raise UserError if the dataset cannot be loaded, before it replaces one that can."""
    try:
        load_dataset(str(made), images_needed=False)
    except UserError as fault:
        raise UserError(str(fault).replace(str(made), str(folder))) from None
