"""How a folder of images differs from what a list's paths say: the rules that would rewrite the paths."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reslt.data.lists import ImageList
from reslt.data.paths import ImageRoot, PathRule

SPREAD, SAMPLES = 20_000, 1_000  # paths of each list whose folders are known, and of those that rules are tried on
MOST_SUGGESTED = 50


def find_rules(lists: list[ImageList], root: Path, known: tuple[PathRule, ...] = ()) -> tuple[PathRule, ...]:
    """The fewest rules under which most of a sample of the lists' paths exist below `root`; () where none helps.

    Candidates are `known` and what the files on disk suggest, tried on the sample. File names may repeat from class to
    class and from split to split, so that a rule can find a file and yet a wrong one. A rule is not used that leads a path into a
    folder that is another one's (where listed images lie already, or that is called as the folder of other listed images),
    or past the files whose paths are most like the list's. That no two paths meet in one file is for the caller to see."""
    spread = [path for images in lists for path in _spread(images, SPREAD)]
    paths = [path for images in lists for path in _sample(images)]
    absent = {path for path in paths if not (root / path).is_file()}
    if not absent:
        return ()
    taken = {folder for folder in {p.rpartition("/")[0] for p in spread} if (root / folder).is_dir()}
    others = {path.split("/")[-2] for path in spread if "/" in path}
    likely = likely_places(absent, root)
    trials = {}
    for rule in (*known, *suggested_rules(likely)):
        trials[rule] = _try(rule, paths, absent, likely, root, taken, others)

    def worth(rule: PathRule) -> tuple[int, int]:
        return len(trials[rule].finds & left) - trials[rule].spoils, -trials[rule].in_vain

    chosen, left = [], set(absent)
    while left and trials and worth(best := max(trials, key=worth))[0] > 0:
        chosen.append(best)
        left -= trials[best].finds
    # The first rule that matches counts, so those that touch paths in vain stand behind those that do not.
    return tuple(sorted(chosen, key=lambda rule: trials[rule].in_vain))


@dataclass(frozen=True)
class Trial:
    """What one rule does to a sample: absent paths that it finds; numbers of paths that it touches in vain, and of
    present ones that it loses."""

    finds: set[str]
    in_vain: int
    spoils: int


def _try(
    rule: PathRule,
    paths: list[str],
    absent: set[str],
    likely: dict[str, set[str]],
    root: Path,
    taken: set[str],
    others: set[str],
) -> Trial:
    rewritten = {path: new for path in paths if (new := rule.apply(path)) is not None}
    there = {path: new for path, new in rewritten.items() if not Path(new).is_absolute() and (root / new).is_file()}
    finds = {path for path in there if path in absent}

    def misleads(path: str, new: str) -> bool:
        folder, own = new.rpartition("/")[0], path.rpartition("/")[0]
        name, own_name = folder.rpartition("/")[2], own.rpartition("/")[2]
        anothers = (folder in taken and folder != own) or (name in others and name != own_name)
        return anothers or (path in likely and new not in likely[path])

    if any(misleads(path, there[path]) for path in finds):
        return Trial(set(), len(rewritten), len(rewritten))
    return Trial(finds, len(rewritten) - len(finds), len([p for p in rewritten if p not in absent and p not in there]))


def share_found(lists: list[ImageList], root: ImageRoot) -> float:
    """BatchShard of a sample of the lists' paths that exist, 0..1."""
    paths = [path for images in lists for path in _sample(images)]
    return sum(root.file(path).is_file() for path in paths) / len(paths)


def likely_places(absent: set[str], root: Path) -> dict[str, set[str]]:
    """{path: files below `root` with the same name and the longest common end}; a path is left out where there is none, or
    where several have its name and none its folder's."""
    same_end, likely = _files_named({path.rpartition("/")[2] for path in absent}, root), {}
    for path in absent:
        parts = path.split("/")
        places = same_end.get("/".join(parts[-2:]), [])
        if len(parts) < 2 or not places:
            alone = same_end.get(parts[-1], [])
            places = alone if len(alone) == 1 else []
        tails = {place: _common_tail(parts, place.split("/")) for place in places}
        if tails:
            likely[path] = {place for place, tail in tails.items() if tail == max(tails.values())}
    return likely


def suggested_rules(likely: dict[str, set[str]]) -> list[PathRule]:
    """Rules that bring some path to a likely place, the most frequent first."""
    votes = Counter()
    for path in sorted(likely):
        for place in sorted(likely[path]):
            votes.update(_rules_between(path, place))
    return [rule for rule, _ in votes.most_common(MOST_SUGGESTED)]


def _rules_between(path: str, place: str) -> list[PathRule]:
    """Rules, from special to general, that turn a list's path into a place on disk."""
    old, new = path.split("/"), place.split("/")
    shared = _common_tail(old, new)
    start, target = old[: len(old) - shared], new[: len(new) - shared]
    literal = "".join(re.escape(part) + "/" for part in start)
    rules = [PathRule(f"^{literal}", "".join(_literal(part) + "/" for part in target))]  # train/... -> elsewhere/...
    if target and len(target[-1]) == 1 and old[-shared].startswith(target[-1]):  # .../airfield -> .../a/airfield
        above = "".join(_literal(part) + "/" for part in target[:-1])
        rules.append(PathRule(rf"^{literal}(.)", rf"{above}\1/\1"))
    for fixed in range(min(len(start), 2)):  # val/<class>/x.jpg -> val/x.jpg: folders that differ from path to path
        groups = start[fixed:]
        pattern = "".join(re.escape(part) + "/" for part in start[:fixed]) + "([^/]+)/" * len(groups)
        put = (rf"\{groups.index(part) + 1}" if part in groups else _literal(part) for part in target)
        rules.append(PathRule(f"^{pattern}", "".join(part + "/" for part in put)))
    return list(dict.fromkeys(rules))


def _files_named(names: set[str], root: Path) -> dict[str, list[str]]:
    """{file name, and folder/file name: paths below `root`} of the wanted names. Linked folders are entered, each once."""
    places, entered = {}, set()
    for folder, below, files in os.walk(root, followlinks=True):
        if (here := os.path.realpath(folder)) in entered:
            below.clear()
            continue
        entered.add(here)
        for name in names.intersection(files):
            place = Path(folder, name).relative_to(root).as_posix()
            for end in {name, "/".join(place.split("/")[-2:])}:
                places.setdefault(end, []).append(place)
    return places


def _common_tail(old: list[str], new: list[str]) -> int:
    """How many of the last parts are the same."""
    same = 0
    for a, b in zip(reversed(old), reversed(new), strict=False):
        if a != b:
            break
        same += 1
    return same


def _literal(text: str) -> str:
    """A text as the replacement of a regular expression."""
    return text.replace("\\", r"\\")


def _sample(images: ImageList) -> list[str]:
    """About SAMPLES paths of a list, evenly from each first folder that the spread shows."""
    by_first = {}
    for path in _spread(images, SPREAD):
        by_first.setdefault(path.partition("/")[0], []).append(path)
    each = max(1, SAMPLES // len(by_first))
    groups = list(by_first.values())[:: -(-len(by_first) // SAMPLES)]
    return [path for group in groups for path in group[:: -(-len(group) // each)]]


def _spread(images: ImageList, count: int) -> list[str]:
    """Up to `count` paths, evenly over the list."""
    return [images.path(i) for i in np.unique(np.linspace(0, len(images) - 1, count).astype(np.int64)).tolist()]
