"""Long-tailed subsets of balanced data: the embedded digits, CIFAR-LT, and any folder of class folders.

Images are written before the lists that name them, and each file is written completely or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from reslt.config.places import DESCRIPTIONS, default_images_folder, lists_folder, own_folder
from reslt.config.schema import DEFAULTS
from reslt.config.yaml_files import read_yaml
from reslt.core.errors import UserError
from reslt.core.files import atomic_file
from reslt.core.locks import locked, sweep
from reslt.data.datasets import check_images, load_dataset
from reslt.data.paths import find_image_root
from reslt.prepare.folder import new_dataset, new_folder, write_image_root, write_lists, write_yaml

EMBEDDED = DEFAULTS["data"]
DIGITS_POOL, DIGITS_FACTOR, DIGITS_SIDE = 100, 0.02, 32


def kept_per_class(n_max: float, num_classes: int, imb_factor: float, profile: str = "exp") -> np.ndarray:
    """Return (C,) numbers of images to keep. exp: int(n_max F^(c/(C-1))), the CIFAR-LT convention; step: n_max, then
    int(n_max F) for the second half of the classes. Raises UserError if a class would keep none."""
    if profile == "step":
        kept = [int(n_max * (imb_factor if c >= num_classes / 2 else 1)) for c in range(num_classes)]
    else:
        kept = [int(n_max * imb_factor ** (c / max(num_classes - 1, 1))) for c in range(num_classes)]
    if min(kept) < 1:
        raise UserError(
            f"--imb-factor {imb_factor}: the rarest of {num_classes} classes would keep no image of {n_max:g}"
        )
    return np.array(kept)


def cifar_subset(labels: np.ndarray, imb_factor: float) -> np.ndarray:
    """(N,) labels of the balanced CIFAR training set -> the indices to keep, class by class, in the published convention:
    one generator with seed 0 shuffles the indices of each class in turn, and the first n of them are kept."""
    num_classes = int(labels.max()) + 1
    kept = kept_per_class(len(labels) / num_classes, num_classes, imb_factor)
    generator, chosen = np.random.RandomState(0), []
    for c in range(num_classes):
        indices = np.flatnonzero(labels == c)
        generator.shuffle(indices)
        chosen.append(indices[: kept[c]])
    return np.concatenate(chosen)


def make_if_embedded(data: str) -> None:
    """Create the embedded dataset if `data` names it and it does not exist yet. A user's lists of this name are kept."""
    if data == EMBEDDED and not _has_digits():
        make_digits(only_if_missing=True)


def _has_digits() -> bool:
    lists = [lists_folder() / EMBEDDED / f"{split}.txt" for split in ("train", "test")]
    return (default_images_folder() / EMBEDDED).is_dir() and all(file.is_file() for file in lists)


def make_digits(only_if_missing: bool = False) -> None:
    """Write scikit-learn's 1,797 scans of digits as PNGs of 32 pixels a side. In each class, 100 scans are the training pool,
    of which 100..2 are listed; the other 797 scans are the test list.

    Only missing files are written, since another process may be training on these images. If another process is creating
    them, wait for it. Raises UserError if there are other lists of this name; with `only_if_missing`, return instead."""
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    scans, labels = np.round(bunch.images * (255 / 16)).astype(np.uint8), bunch.target
    kept = kept_per_class(DIGITS_POOL, int(labels.max()) + 1, DIGITS_FACTOR)
    lines = {"train": [], "test": []}
    for c, count in enumerate(kept):
        indices = np.flatnonzero(labels == c)
        for split, chosen in (("train", indices[:count]), ("test", indices[DIGITS_POOL:])):
            lines[split] += [(f"{split}/{c}/{i:04d}.png", c, i) for i in chosen]

    root, lists = default_images_folder() / EMBEDDED, lists_folder() / EMBEDDED
    with locked(lists, waits=True):
        if only_if_missing and _has_digits():  # another process has created them meanwhile
            return
        for split, rows in lines.items():
            file = lists / f"{split}.txt"
            if file.is_file() and file.read_text("utf-8", "replace") != "".join(f"{p} {c}\n" for p, c, _ in rows):
                if only_if_missing:
                    return
                raise UserError(f"{file}: this is not the list of the embedded dataset; rename its folder to keep it")
        sweep(root, below=True)
        for path, _, i in lines["train"] + lines["test"]:
            if not _is_written(root / path):
                with atomic_file(root / path, durable=False) as file:
                    digit = Image.fromarray(scans[i]).resize((DIGITS_SIDE, DIGITS_SIDE), Image.Resampling.BICUBIC)
                    digit.save(file, "PNG")
        write_lists(own_folder(EMBEDDED), {split: [row[:2] for row in rows] for split, rows in lines.items()})
        sweep(lists)


def _is_written(file: Path) -> bool:
    """Return whether an image exists and is not empty, as a power failure may leave it."""
    try:
        return file.stat().st_size > 0
    except OSError:
        return False


def make_cifar(name: str, imb_factor: float, source: Path) -> Path:
    """Create CIFAR-10-LT or CIFAR-100-LT from torchvision's copy in `source` (downloaded if missing): the lists, and PNGs
    under data/<name>/, which all factors share. Return the folder of lists."""
    root = default_images_folder() / name
    with locked(root, waits=True):  # all factors share the images, and the download
        return _make_cifar(name, imb_factor, source, root)


def _make_cifar(name: str, imb_factor: float, source: Path, root: Path) -> Path:
    from PIL import Image
    from torchvision import datasets
    from tqdm import tqdm

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    parts = {}
    try:
        for split in ("train", "test"):
            is_there = (source / kind.base_folder).is_dir()
            parts[split] = kind(str(source), train=split == "train", download=not is_there)
    except Exception as fault:  # networks and archives fail in many ways
        if source.is_dir() and not any(source.iterdir()):
            source.rmdir()
        raise UserError(
            f"{name}: torchvision could neither find nor download it: {fault}; without network access, put "
            f"{kind.base_folder}/ (unpacked from {kind.url}) into {source}, or give its folder with --source DIR"
        ) from None
    lines = {}
    for split, part in parts.items():
        labels = np.array(part.targets)
        chosen = cifar_subset(labels, imb_factor) if split == "train" else np.arange(len(labels))
        lines[split] = [(f"{split}/{part.classes[labels[i]]}/{i:05d}.png", int(labels[i])) for i in chosen]
        for i, (path, _) in zip(tqdm(chosen, desc=f"{name} {split}", disable=None), lines[split], strict=True):
            if not _is_written(root / path):
                with atomic_file(root / path, durable=False) as file:
                    Image.fromarray(part.data[i]).save(file)
    folder, info = _benchmark(name, imb_factor)
    _write_info(folder, info)
    write_lists(folder, lines)
    (folder / "local.yaml").unlink(missing_ok=True)  # the image root of lists that were adopted earlier
    return folder


def adopt_cifar(name: str, imb_factor: float, lists: Path, data_dir: Path | None) -> Path:
    """Copy given lists unchanged, after a check of their format, class counts and images. Return the folder."""
    if not lists.is_dir():
        raise UserError(f"--lists {lists}: there is no such folder")
    folder, info = _benchmark(name, imb_factor)
    given = load_dataset(str(lists), find_image_root(folder, info, data_dir).folder)
    per_class, num_classes = {"cifar10": (5000, 10), "cifar100": (500, 100)}[name]
    expected = kept_per_class(per_class, num_classes, imb_factor)
    if given.num_classes != num_classes or (given.images_per_class != expected).any():
        raise UserError(
            f"{given.lists['train'].file}: {len(given.lists['train'])} images of {given.num_classes} classes are not {name} "
            f"with imbalance factor {imb_factor:g}, which has {expected.sum()} of {num_classes}; is --imb-factor right?"
        )
    check_images(given, list(given.lists))
    _write_info(folder, info)
    for split, image_list in given.lists.items():
        with atomic_file(folder / f"{split}.txt") as file:
            shutil.copyfile(image_list.file, file)
    if data_dir:
        write_image_root(folder, data_dir)
    return folder


def make_longtail(source: Path, imb_factor: float, profile: str, seed: int, name: str) -> tuple[Path, list[str]]:
    """Create a long-tailed dataset from train/<class>/ and test/<class>/ (and val/<class>/, if it exists): class c, in the
    order of labels, keeps at most as many training images as `kept_per_class` states. Return the folder of lists, and
    remarks."""
    folder = new_folder(name)
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}: give a whole number from 0 to {2**32 - 1}")
    from reslt.prepare.from_folders import from_splits  # and pandas, which a run on the embedded dataset does without

    photos = from_splits(source)
    train, account = photos.paths["train"], photos.account
    kept = kept_per_class(max(map(len, train)), len(photos.names), imb_factor, profile)
    generator = np.random.RandomState(seed)
    chosen = [[files[i] for i in generator.permutation(len(files))[: kept[c]]] for c, files in enumerate(train)]
    per_split = photos.paths | {"train": chosen}
    lines = {
        split: [(path, c) for c, paths in enumerate(per_class) for path in paths]
        for split, per_class in per_split.items()
    }
    account.left_out["beyond the profile"] = sum(map(len, train)) - len(lines["train"])
    description = f"{profile} profile, imbalance factor {imb_factor:g}, seed {seed}"

    with new_dataset(name) as temporary:
        write_yaml(temporary / "info.yaml", {"description": description, "class_names": photos.names})
        write_image_root(temporary, source)
        write_lists(temporary, {split: rows for split, rows in lines.items() if rows})
    return folder, [*account.decisions, account.balance(sum(map(len, lines.values())))]


def _benchmark(name: str, imb_factor: float) -> tuple[Path, dict]:
    """Return data_lists/<name>_lt_<factor>, and its info.yaml or, if it has none, that of the nearest published factor."""
    folder = own_folder(f"{name}_lt_{imb_factor:g}")
    if (folder / "info.yaml").is_file():
        return folder, read_yaml(folder / "info.yaml")
    published = [DESCRIPTIONS / f"{name}_lt_{factor}" for factor in ("0.01", "0.02", "0.1")]
    nearest = min(published, key=lambda place: abs(np.log(float(place.name.rpartition("_")[2]) / imb_factor)))
    description = f"imbalance factor {imb_factor:g}; settings of {nearest.name}"
    prepare = f"{name} --imb-factor {imb_factor:g}"
    return folder, read_yaml(nearest / "info.yaml") | {"description": description, "prepare": prepare}


def _write_info(folder: Path, info: dict) -> None:
    if not (folder / "info.yaml").is_file():
        write_yaml(folder / "info.yaml", info)
