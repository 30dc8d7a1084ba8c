"""Image folders whose layout differs from a list's paths: the stated rules that fit, and help with writing one by hand."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import yaml

from reslt.data.find_images import walk
from reslt.data.lists import ImageList
from reslt.data.paths import ImageRoot, PathRule

SAMPLES = 1_000  # paths of each list on which rules are tried


def fit_rules(lists: list[ImageList], root: Path, stated: tuple[PathRule, ...]) -> tuple[PathRule, ...]:
    """Return those of the stated rules, in order, under which most of a sample of the lists' paths exist below `root`.

    Rules are added one by one, the most helpful first, as long as one helps. Return () if none does."""
    paths = [path for images in lists for path in _sample(images)]
    exists = cache(lambda path: (root / path).is_file())

    def found(rules: tuple[PathRule, ...]) -> int:
        return sum(exists(ImageRoot(root, rules).rewritten(path)) for path in paths)

    chosen = ()
    while True:
        trials = [tuple(rule for rule in stated if rule in (*chosen, added)) for added in stated]
        best = max(trials, key=found, default=())
        if found(best) <= found(chosen):
            return chosen
        chosen = best


def share_found(lists: list[ImageList], root: ImageRoot) -> float:
    """Return the fraction of a sample of the lists' paths that exist, 0..1."""
    paths = [path for images in lists for path in _sample(images)]
    return sum(root.file(path).is_file() for path in paths) / len(paths)


def rule_by_hand(lists: list[ImageList], root: ImageRoot, local_file: Path) -> str | None:
    """Return instructions for a rule that finds the first missing path of a list most of whose images are missing. Return
    None if there is no such list, or no file of that name below the root."""
    for images in lists:
        paths = _sample(images)
        missing = [path for path in paths if not root.file(path).is_file()]
        if 2 * len(missing) > len(paths):
            break
    else:
        return None
    path, name = missing[0], missing[0].rpartition("/")[2]
    places = [
        Path(here, name).relative_to(root.folder).as_posix() for here, files in walk(root.folder) if name in files
    ]
    class_folder_and_name = "/" + "/".join(path.split("/")[-2:])
    places = [place for place in places if f"/{place}".endswith(class_folder_and_name)] or places
    if not places:
        return None
    old, new = path.split("/"), places[0].split("/")
    while old and new and old[-1] == new[-1]:
        old.pop()
        new.pop()
    match, replace = ("".join(f"{part}/" for part in parts) for parts in (old, new))
    where = f"is at {places[0]!r}, if that is the same image"
    if len(places) > 1:
        replace, where = "FOLDER/", f"may be any of {len(places):,} files, such as {places[0]!r}; choose its FOLDER"
    rule = {"match": "^" + re.escape(match), "replace": replace.replace("\\", r"\\")}
    return (
        f"no stated rule leads to {path!r}; below {root.folder} it {where}. Add a rule to {local_file} "
        "(a regular expression and its replacement; the first that matches a path counts) and run this again, for example:\n"
        + yaml.safe_dump({"path_rules": [rule]}, default_flow_style=None, allow_unicode=True, width=1000).rstrip()
    )


def _sample(images: ImageList) -> list[str]:
    """Return up to SAMPLES paths, spread evenly over the list."""
    return [images.path(i) for i in np.unique(np.linspace(0, len(images) - 1, SAMPLES).astype(np.int64)).tolist()]
