"""The places of dataset folders and recipes, in a checkout and in an installed package.

The project contains descriptions of the benchmarks. A user's own lists and everything that `prepare` writes are in
`lists_folder()`, their images in the folder `data/` next to it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from reslt.core.errors import UserError
from reslt.core.files import atomic_file
from reslt.core.spelling import did_you_mean

PACKAGE = Path(__file__).resolve().parents[1]
PROJECT = PACKAGE.parent  # of a checkout
RECIPES = PACKAGE / "recipes"
IS_CHECKOUT = (PROJECT / "train.py").is_file()
DESCRIPTIONS = PROJECT / "data_lists" if IS_CHECKOUT else PACKAGE / "data_lists"


def lists_folder() -> Path:
    """Return the folder of a user's datasets: $RESLT_LISTS, else ./data_lists, else the checkout's data_lists."""
    if named := os.environ.get("RESLT_LISTS"):
        return Path(os.path.expanduser(named)).absolute()
    here = Path("data_lists").absolute()
    return DESCRIPTIONS if IS_CHECKOUT and not here.is_dir() else here


def default_images_folder() -> Path:
    """Return the folder `data` next to the lists, which contains images by default."""
    return lists_folder().parent / "data"


def dataset_folder(data: str) -> Path:
    """Return the folder of lists that `--data` names. Raises UserError with the names that exist."""
    if data not in ("", ".", "..") and Path(data).name == data:
        for folder in (lists_folder(), DESCRIPTIONS):
            if (folder / data).is_dir():
                return folder / data
    folder = Path(os.path.expanduser(data))  # leaves ~nobody unchanged; pathlib would raise
    if data and folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"data: {data} is a file; give the folder that contains it, {folder.parent}")
    folders = (folder for place in (lists_folder(), DESCRIPTIONS) for folder in place.glob("[!.]*"))
    known = sorted({folder.name for folder in folders if folder.is_dir()})
    raise UserError(
        f"data: {data!r} is neither a folder nor a dataset{did_you_mean(data, known)}; "
        f"known: {', '.join(known) or 'none'}"
    )


def own_folder(name: str) -> Path:
    """Return `lists_folder()/<name>`, to write lists to; copy the project's description of that dataset there."""
    folder, described = lists_folder() / name, DESCRIPTIONS / name / "info.yaml"
    if described.is_file() and not (folder / "info.yaml").exists():
        with atomic_file(folder / "info.yaml") as temporary:
            shutil.copyfile(described, temporary)
    return folder
