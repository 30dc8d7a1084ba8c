"""A dataset's folder under data_lists/, written and described: shared by all commands that create or change one."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from reslt.config.places import DESCRIPTIONS, lists_folder
from reslt.config.yaml_files import read_yaml
from reslt.core.errors import UserError
from reslt.core.files import atomic_folder, flush, write_atomically
from reslt.core.locks import locked, sweep
from reslt.core.log import logger
from reslt.data.bad_images import BAD_IMAGES, record_bad_images
from reslt.data.datasets import load_dataset
from reslt.data.groups import SHOTS
from reslt.data.lists import SPLITS, write_list
from reslt.data.paths import PathRule, read_local
from reslt.prepare.sides import SIDES

FILES = (
    SIDES,
    "local.yaml",
    "info.yaml",
    "test.txt",
    "val.txt",
    BAD_IMAGES,
    "train.txt",
)  # in the order of replacement
YAML_KEY = r"""['"]?[A-Za-z_]+['"]?[ ]*:"""  # at the start of a line
UNLISTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]|[ ]$")


def new_folder(name: str) -> Path:
    """Return the dataset folder of this name, which must not exist yet, nor be that of a dataset that the project
    describes. Raises UserError."""
    folder = folder_named(name)
    for taken in (folder, DESCRIPTIONS / name):
        if taken.exists():
            raise UserError(f"--name {name}: {taken} already exists; remove it or choose another name")
    return folder


def folder_named(name: str, flag: str = "--name") -> Path:
    """Return the dataset folder of this name, which may exist. Raises UserError for a name that is not plain."""
    if not name or name.startswith(".") or Path(name).name != name or "\\" in name:
        raise UserError(f"{flag} {name}: give a plain name for a folder under data_lists/")
    return lists_folder() / name


def require_writable(folder: Path) -> None:
    """Raise OSError, with the folder's name, if no folder can be created in it."""
    with atomic_folder(folder / ".writable") as _:
        pass
    (folder / ".writable").rmdir()


def claim_output(output: Path, name: str, made_from: dict) -> None:
    """Record the source and settings of images in the file `name` of their folder, which may state more. Raises UserError if
    the folder contains other images, or something else."""
    file = output / name
    others = not output.is_dir() or any(path.name != name for path in output.iterdir())
    if file.is_file() and others:
        found = {key: value for key, value in read_yaml(file).items() if key in made_from}
        if found != made_from:
            raise UserError(
                f"--output {output}: it contains images made differently ({found}, not {made_from}); choose another"
            )
        return
    if output.exists() and others:
        raise UserError(f"--output {output}: it exists and contains other files; give a folder that is new or empty")
    write_yaml(file, made_from)


@contextmanager
def dataset_files(folder: Path) -> Iterator[Path]:
    """Yield a folder to write all files of a dataset to; they become those of `folder` if the block succeeds.

    A folder that exists keeps everything else that it contains, such as notes and images. Its train.txt is removed first and
    replaced last, so that a process killed in between leaves an incomplete dataset, never one of mixed lists."""
    if not folder.exists():
        with atomic_folder(folder) as temporary:
            yield temporary
        return
    made = folder / ".new"
    shutil.rmtree(made, ignore_errors=True)  # left by a killed process
    made.mkdir()
    try:
        yield made
        for file in made.iterdir():
            flush(file)
        (folder / "train.txt").unlink(missing_ok=True)
        for name in FILES:
            if (made / name).exists():
                os.replace(made / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        flush(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def new_dataset(name: str) -> Iterator[Path]:
    """Yield a folder to write a new dataset to; it becomes data_lists/<name> if the block succeeds.

    Raises UserError as `new_folder` does, and if another process is creating a dataset of this name."""
    folder = new_folder(name)
    sweep(folder.parent)
    with locked(folder), atomic_folder(new_folder(name)) as temporary:
        yield temporary


def write_lists(folder: Path, lines: dict[str, Iterable[tuple[str, int]]]) -> None:
    """Write {split: (path, label) rows}; train.txt last, since it marks the dataset as complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in sorted(lines, key=SPLITS.index, reverse=True):
        rows = list(lines[split])
        for path, _ in rows:
            if UNLISTABLE.search(path):
                raise UserError(
                    f"{path!r}: a list cannot contain this name (control characters such as line breaks, bytes that are not "
                    "UTF-8, or spaces at its end); rename the file or its folder"
                )
        write_list(folder / f"{split}.txt", rows)


def write_image_root(folder: Path, root: Path) -> None:
    """Write this machine's image root to local.yaml."""
    write_yaml(folder / "local.yaml", {"image_root": str(root.resolve())})


def write_local(folder: Path, rules: tuple[PathRule, ...], data_dir: Path | None) -> None:
    """Write rules, and the image root if one is given, to local.yaml; keep its other content."""
    write_yaml(folder / "local.yaml", local_content(folder, rules, data_dir))


def local_content(folder: Path, rules: tuple[PathRule, ...], data_dir: Path | None) -> dict:
    """Return the content of local.yaml with these rules, and with this image root if one is given."""
    content = read_local(folder) | {"path_rules": [{"match": rule.match, "replace": rule.replace} for rule in rules]}
    if data_dir:
        content["image_root"] = str(data_dir.expanduser().resolve())
    return {key: value for key, value in content.items() if value}


def record_where_possible(folder: Path, bad: list[tuple[str, int, str, str]], output: Path) -> Path | None:
    """Write bad_images.csv into the dataset's folder or, with a warning, into `output`. Return the file; None if neither
    can be written."""
    file = folder / BAD_IMAGES
    try:
        record_bad_images(folder, bad)
        return file
    except OSError as fault:
        reason = fault.strerror
    if not bad:
        if file.exists():  # a file system that is read-only refuses to remove one that does not
            logger.warning(f"{file} cannot be removed ({reason}), but it is out of date: no image is bad")
        return None
    elsewhere = output / f"{folder.resolve().name}-{BAD_IMAGES}"
    try:
        record_bad_images(output, bad, elsewhere.name)
    except OSError as fault:
        logger.warning(f"{file} cannot be written ({reason}), nor can {elsewhere} ({fault.strerror})")
        return None
    logger.warning(
        f"{file} cannot be written ({reason}): the bad images are in {elsewhere}; --bad-images skip reads this file only from "
        "the dataset's folder"
    )
    return elsewhere


def write_yaml(file: Path, content: dict) -> None:
    """Write a mapping as YAML, completely or not at all."""
    write_atomically(file, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))


def changed_yaml(text: str, changes: dict) -> str:
    """Return a YAML mapping with some keys changed or added. The text of all other keys, and comments, are kept."""
    parts = re.split(rf"(?m)^(?={YAML_KEY})", text)  # the text before the first key, then a part per key
    for key, value in changes.items():
        written = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=120)
        for i, part in enumerate(parts):
            if (found := re.match(YAML_KEY, part)) and found[0].strip(" :'\"") == key:
                comments = re.search(r"(?:^[ \t]*(?:#.*)?\n?)*\Z", part, re.MULTILINE)  # above the next key
                parts[i] = written + comments[0]
                break
        else:
            parts.append(written if "".join(parts).endswith("\n") or not "".join(parts) else f"\n{written}")
    result = "".join(parts)
    expected = (yaml.safe_load(text) or {}) | changes
    if _parsed(result) != expected:  # a mapping written in another style, such as {a: 1}
        return yaml.safe_dump(expected, sort_keys=False, allow_unicode=True, width=120)
    return result


def _parsed(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def describe(folder: Path, flags: str = "") -> str:
    """Return a description of a dataset's lists, and the command that trains on it."""
    dataset = load_dataset(str(folder), images_needed=False)
    counts = dataset.images_per_class
    sizes = ", ".join(f"{split} {len(images):,}" for split, images in dataset.lists.items())
    shots = " / ".join(str(int(dataset.shot_groups["standard"][shot].sum())) for shot in SHOTS)
    return (
        f"{folder}: {sizes} images; {dataset.num_classes} classes with {counts.max():,}..{counts.min():,} training images; "
        f"many / medium / few: {shots} classes\n"
        f"train with: accelerate launch train.py --data {shlex.quote(dataset.reference)}{flags}"
    )
