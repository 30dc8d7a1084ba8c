"""Where the project keeps its recipes and lists, and the folder that `--data` names."""

from __future__ import annotations

import os
from pathlib import Path

from reslt.core.errors import UserError
from reslt.core.spelling import did_you_mean

PROJECT = Path(__file__).resolve().parents[2]


RECIPES = PROJECT / "reslt" / "recipes"


DATA_LISTS = PROJECT / "data_lists"


def dataset_folder(data: str) -> Path:
    """The folder of lists that `--data` names. Raises UserError with the names that exist."""
    if data not in ("", "..") and Path(data).name == data and (DATA_LISTS / data).is_dir():
        return DATA_LISTS / data
    folder = Path(os.path.expanduser(data))  # leaves ~nobody as it is, where pathlib raises
    if data and folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"data: {data} is a file; give the folder that holds it, {folder.parent}")
    known = sorted(p.name for p in DATA_LISTS.glob("[!.]*") if p.is_dir())
    raise UserError(
        f"data: {data!r} is neither a folder nor a dataset{did_you_mean(data, known)}; known: {', '.join(known) or 'none'}"
    )
