"""How a folder of images differs from what a list's paths say: the rules that would rewrite the paths."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reslt.lists import ImageList
from reslt.paths import ImageRoot, PathRule

SAMPLES = 300  # paths looked at for each first folder of each list
MOST_SUGGESTED = 50


def find_rules(lists: list[ImageList], root: Path, known: tuple[PathRule, ...] = ()) -> tuple[PathRule, ...]:
    """The fewest rules under which most of a sample of the lists' paths exist below `root`; () where none helps.

    Candidates are `known` and what the files on disk suggest, tried on the sample. File names may repeat from class to
    class, so that a rule can find a file and yet a wrong one: a rule that leads past the files whose paths are most
    like the list's, or leads two paths to one file, is not used."""
    paths = [path for images in lists for path in _sample(images)]
    absent = {path for path in paths if not (root / path).is_file()}
    if not absent:
        return ()
    likely = likely_places(absent, root)
    trials = {rule: _try(rule, paths, absent, likely, root) for rule in (*known, *suggested_rules(likely))}

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


def _try(rule: PathRule, paths: list[str], absent: set[str], likely: dict[str, set[str]], root: Path) -> Trial:
    rewritten = {path: new for path in paths if (new := rule.apply(path)) is not None}
    there = {path: new for path, new in rewritten.items() if not Path(new).is_absolute() and (root / new).is_file()}
    finds = {path for path in there if path in absent}
    misleads = any(there[path] not in likely[path] for path in finds if path in likely)
    if misleads or len(set(there.values())) < len(there):
        return Trial(set(), len(rewritten), len(rewritten))
    return Trial(finds, len(rewritten) - len(finds), len([p for p in rewritten if p not in absent and p not in there]))


def share_found(lists: list[ImageList], root: ImageRoot) -> float:
    """Share of a sample of the lists' paths that exist, 0..1."""
    paths = [path for images in lists for path in _sample(images)]
    return sum(root.file(path).is_file() for path in paths) / len(paths)


def likely_places(absent: set[str], root: Path) -> dict[str, set[str]]:
    """{path: files below `root` with the same name and the longest common end}; a path is left out where there is none, or
    where several have its name and no folder of it."""
    named, likely = _files_named({path.rpartition("/")[2] for path in absent}, root), {}
    for path in absent:
        tails = {
            place: _common_tail(path.split("/"), place.split("/")) for place in named.get(path.rpartition("/")[2], [])
        }
        longest = max(tails.values(), default=0)
        if longest > 1 or len(tails) == 1:
            likely[path] = {place for place, tail in tails.items() if tail == longest}
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
    """{file name: paths below `root`} of the wanted names. Linked folders are entered, each folder once."""
    places, entered = {}, set()
    for folder, below, files in os.walk(root, followlinks=True):
        if (here := os.path.realpath(folder)) in entered:
            below.clear()
            continue
        entered.add(here)
        for name in names.intersection(files):
            places.setdefault(name, []).append(Path(folder, name).relative_to(root).as_posix())
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
    """Up to SAMPLES paths, spread evenly, of each first folder that 20,000 paths spread over the list show."""
    spread = np.unique(np.linspace(0, len(images) - 1, 20_000).astype(np.int64))
    by_first = {}
    for i in spread.tolist():
        path = images.path(i)
        by_first.setdefault(path.partition("/")[0], []).append(path)
    return [p for group in by_first.values() for p in group[:: -(-len(group) // SAMPLES)]]
