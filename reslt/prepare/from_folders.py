"""Photos from a folder of class folders, or of split folders that contain class folders."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from reslt.core.errors import UserError
from reslt.core.text import counted, listed
from reslt.data.find_images import Found, by_folder, find_images, stem
from reslt.data.lists import SPLITS
from reslt.prepare.from_metadata import METADATA, from_metadata, metadata_files, states_labels
from reslt.prepare.from_table import read_table
from reslt.prepare.photos import SPLIT_NAMES, Account, Photos, order_classes, require_two

# Such as train2017, test_images, val-set: probably folders of splits, but not under a name that is read as one.
LOOKS_LIKE_SPLIT = re.compile(rf"({'|'.join(SPLIT_NAMES)})[ _-]?(\d+|set|data|images?|imgs?|photos)?", re.IGNORECASE)


def from_folder(source: Path, label_column: str | None = None, split_column: str | None = None) -> Photos:
    """Find photos in source/<class>/..., or in source/train/<class>/..., val/ (valid/, validation/, dev/) and test/, or
    beside a metadata.csv or metadata.jsonl, whose columns `label_column` and `split_column` are the class and the split.

    Raises UserError for a layout that states no classes, or that can be read in more than one way."""
    found = _find(source)
    metadata = metadata_files(found)
    if metadata and (label_column or split_column or states_labels(found, metadata)):
        return from_metadata(found, metadata, label_column, split_column)
    if column := label_column or split_column:
        flag = "--label-column" if label_column else "--split-column"
        raise UserError(
            f"{flag} {column} belongs to --csv, or to a folder with metadata.csv or metadata.jsonl in it or in its "
            f"folders of splits, and {source} has none; drop it"
        )
    top, loose = by_folder(found.images, 0)
    if not top:
        if loose:
            raise UserError(
                f"--from {source}: {len(loose):,} images, but there are no class folders in it; {_doors(found)}"
            )
        if kinds := [f"{n:,} {kind or 'without ending'}" for kind, n in found.other_kinds().most_common()]:
            raise UserError(
                f"--from {source}: no file in it has the ending of an image, such as .jpg{_unseen(found)}; there are: "
                f"{listed(kinds, 4)}"
            )
        raise UserError(f"--from {source}: there are no class folders in it{_unseen(found)}; {_doors(found)}")
    train = [folder for folder in top if SPLIT_NAMES.get(folder.lower()) == "train"]
    others = [folder for folder in top if folder.lower() not in SPLIT_NAMES]
    classes, flat = by_folder([image for folder in train for image in top[folder]], 1)
    other_splits = len(top) - len(train) - len(others)
    if classes and (other_splits or not others or not flat):  # else train/ may be the class of that name
        if others:
            raise UserError(
                f"--from {source}: {listed(order_classes(top))} are partly splits and partly not; move {others[0]} away, or "
                "give the folder of classes"
            )
        return split_folders(found)
    split_like = {folder: match[1].lower() for folder in top if (match := LOOKS_LIKE_SPLIT.fullmatch(folder))}
    kinds = {SPLIT_NAMES[name] for name in split_like.values()}
    if len(split_like) == len(top) or kinds > {"train"}:
        look = f"--from {source}: {listed(order_classes(split_like))} look like splits, not classes"
        if by_folder(found.images, 1)[0]:
            raise UserError(f"{look}; call them train, val and test, of which there must be train")
        raise UserError(f"{look}, and there are no class folders in them; {_doors(found)}")
    return class_folders(found)


def from_splits(source: Path) -> Photos:
    """Find photos in source/train/<class>/, and in val/ and test/ if they exist. Raises UserError for another layout."""
    return split_folders(_find(source))


def class_folders(found: Found) -> Photos:
    """Read the folders of the root as classes, with all folders below them. Raises UserError for an empty class."""
    classes, loose = by_folder(found.images, 0)
    names, account = order_classes(found.subfolders()), Account.of(found)
    _require_images(found.root, names, classes)
    if len(names) == 1 and len(below := by_folder(found.images, 1)[0]) > 1:
        raise UserError(
            f"--from {found.root}: there must be at least 2 classes, and there is only {names[0]}; are its folders "
            f"({listed(order_classes(below), 4)}) the classes? Then give --from {shlex.quote(str(found.root / names[0]))}"
        )
    if len(names) == 1:
        raise UserError(
            f"--from {found.root}: there must be at least 2 classes, and there is only {names[0]}; {_doors(found)}"
        )
    if len(loose) > len(found.images) - len(loose):
        raise UserError(
            f"--from {found.root}: {len(loose):,} images beside the folders {listed(names, 4)}, which contain only "
            f"{len(found.images) - len(loose):,}; are these the classes? Move one of both away; {_doors(found)}"
        )
    if loose:
        account.skip("the folder itself", len(loose), "beside the class folders, so without a class")
    _note_nested(classes, 1, account)
    account.note_unread(found.tables())
    return Photos(found.root, names, {"train": [classes[name] for name in names]}, account)


def split_folders(found: Found) -> Photos:
    """Read root/{train,val,test}/<class>/, with all folders below them.

    Raises UserError if there is no train/<class>/, or if a class is empty there or exists only in another split."""
    top, loose = by_folder(found.images, 0)
    folders, account = {}, Account.of(found)
    for folder in top:
        if split := SPLIT_NAMES.get(folder.lower()):
            if split in folders:
                raise UserError(f"{found.root / folder}: there are two folders of {split} images; keep one")
            folders[split] = folder
    inside = {split: by_folder(top[folder], 1) for split, folder in folders.items()}
    train = folders.get("train", "train")
    below = [path.split("/") for path in found.folders.values()]
    names = order_classes(parts[1] for parts in below if len(parts) == 2 and parts[0] == train)
    if not names:
        raise UserError(f"--from {found.root}: there is no train/<class>/ folder in it; {_doors(found)}")
    _require_images(found.root / train, names, inside["train"][0] if "train" in folders else {})
    if empty := sorted(set(found.subfolders()) - set(top)):
        account.decisions.append(f"folders without images: {listed(empty)}")
    if loose:
        account.skip("the folder itself", len(loose), "beside the folders of splits")
    for folder in top.keys() - set(folders.values()):
        account.skip(f"{folder}/", len(top[folder]), "not a split")
    paths = {}
    for split in SPLITS:
        if split not in folders:
            continue
        classes, flat = inside[split]
        if unknown := order_classes(classes.keys() - set(names)):
            raise UserError(f"{found.root / folders[split]}: class {unknown[0]!r} is not under {train}/")
        if flat:
            account.skip(f"{folders[split]}/", len(flat), "not in a class folder, so without a class")
        _note_nested(classes, 2, account)
        if classes:
            paths[split] = [classes.get(name, []) for name in names]
    account.note_unread(found.tables())
    require_two(names, found.root)
    return Photos(found.root, names, paths, account)


def _find(source: Path) -> Found:
    """Find the files below --from. Raises UserError if it is not a folder."""
    if source.is_file():
        raise UserError(
            f"--from {source}: this is a file, not a folder; a table is read with --csv, COCO's JSON with --json"
        )
    if not source.is_dir():
        raise UserError(f"--from {source}: there is no such folder")
    return find_images(source)


def _require_images(folder: Path, names: list[str], classes: dict[str, list[str]]) -> None:
    if empty := [name for name in names if name not in classes]:
        raise UserError(f"{folder / empty[0]}: the class has no image; add some or remove its folder")


def _note_nested(classes: dict[str, list[str]], depth: int, account: Account) -> None:
    """Note the images in folders below class folders, which are used too. Raises UserError if these folders are splits."""
    nested = [image for images in classes.values() for image in by_folder(images, depth)[0].values()]
    folders = {"/".join(image.split("/")[: depth + 1]) for images in nested for image in images}
    if not folders:
        return
    below = {folder.rsplit("/", 1)[1].lower() for folder in folders}
    if below <= SPLIT_NAMES.keys() and len({SPLIT_NAMES[folder] for folder in below}) > 1:
        raise UserError(
            f"{sorted(folders)[0]}: the classes contain folders of splits ({listed(sorted(below))}), whose images would be "
            "mixed; put them into train/<class>/, val/<class>/ and test/<class>/"
        )
    account.decisions.append(
        f"taken: {counted(sum(map(len, nested)), 'image')} in {counted(len(folders), 'folder')} below class folders "
        f"({listed(sorted(folders), 3)}), as of the class above"
    )


def _unseen(found: Found) -> str:
    return f", except in {listed(list(found.unseen), 4)}, which are not looked at" if found.unseen else ""


def _doors(found: Found) -> str:
    """Return the remedy if folders state no classes: commands that read the tables in them."""
    commands = [_command(found, table) for table in found.tables()[:3]]
    if not commands:
        return "put the images into a folder per class, or give a table of files and labels with --csv"
    return "the labels may be in a table; it is read with:\n" + "\n".join(f"  {command}" for command in commands)


def _command(found: Found, path: str) -> str:
    """Return the command that reads a table, with the columns that its first row reveals, and COLUMN for the others."""
    file = shlex.quote(str(found.root / path))
    if Path(path).name in METADATA:
        return f"python -m reslt.prepare own --from {shlex.quote(str(found.root))} --label-column COLUMN --name NAME"
    if path.lower().endswith(".jsonl"):
        source = shlex.quote(str((found.root / path).parent))
        return (
            f"python -m reslt.prepare own --from {source} --name NAME  ({path} must be called metadata.jsonl for this)"
        )
    if path.lower().endswith(".json"):
        return f"python -m reslt.prepare own --json {file} --data-dir {shlex.quote(str(found.root))} --name NAME"
    try:
        table, _ = read_table(found.root / path, [], rows=1)
    except UserError:
        table = None
    columns = [] if table is None or table.empty or len(table.columns) > 50 else list(map(str, table.columns))
    image, folder = next(
        ((column, start) for column in columns for start in _starts(found, str(table[column].iloc[0]).strip())),
        ("COLUMN", None),
    )
    others = [column for column in columns if column != image]
    label = others[0] if image != "COLUMN" and len(others) == 1 else "COLUMN"
    data_dir = f" --data-dir {shlex.quote(str(found.root / folder))}" if folder is not None else ""
    note = f"  (its columns: {listed(columns)})" if columns and "COLUMN" in (image, label) else ""
    return (
        f"python -m reslt.prepare own --csv {file} --image-column {shlex.quote(image)} --label-column {shlex.quote(label)}"
        f"{data_dir} --name NAME{note}"
    )


def _starts(found: Found, cell: str) -> list[str]:
    """Return [the first folder below which the cell is the path of an image, with or without file ending], or []."""
    if not cell:
        return []
    paths = ((image, name) for image in found.images for name in (image, stem(image)))
    return next(([name[: -len(cell)].rstrip("/")] for _, name in paths if f"/{name}".endswith(f"/{cell}")), [])
