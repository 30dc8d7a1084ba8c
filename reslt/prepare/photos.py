"""A user's photos before they become a dataset: class names, paths, and an account of everything else that was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from reslt.core.errors import UserError
from reslt.core.text import counted, has_controls, listed, shown
from reslt.data.find_images import Found

# Names that people give to the parts of a dataset: of folders, and in the column of a table.
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


@dataclass
class Account:
    """Every image file of a source, counted once: taken, left out for a reason, or in a place not looked at."""

    decisions: list[str] = field(default_factory=list)  # one line each, with numbers
    left_out: Counter = field(default_factory=Counter)  # reason -> images
    not_looked_at: Counter = field(default_factory=Counter)  # place -> images

    @classmethod
    def of(cls, found: Found) -> Account:
        """Return an account of the decisions made by finding: hidden places, linked folders, files that are not images."""
        account = cls(not_looked_at=Counter(found.unseen))
        if found.unseen:
            account.decisions.append(
                f"not looked at: hidden images, and images in system folders: {_counted(found.unseen)}"
            )
        if found.links:
            account.decisions.append(f"read once: folders linked to another folder here: {listed(found.links)}")
        kinds = found.other_kinds()
        if n := kinds.pop("", 0):
            account.decisions.append(f"left out: {counted(n, 'file')} without ending; an image needs one, such as .jpg")
        account.decisions += [
            f"left out: {counted(n, f'{shown(kind, 20)} file')}, not a supported image format"
            for kind, n in kinds.most_common(8)
        ]
        if rest := sum(n for _, n in kinds.most_common()[8:]):
            account.decisions.append(f"left out: {rest:,} files of other kinds, not a supported image format")
        return account

    def skip(self, place: str, images: int, why: str) -> None:
        """Count images in a place that is not looked at, and note why."""
        self.not_looked_at[place] += images
        self.decisions.append(f"not looked at: {counted(images, 'image')} in {shown(place, 60)}: {why}")

    def note_unread(self, tables: list[str]) -> None:
        """Name the tables and JSON files in the source that are not read."""
        if tables:
            self.decisions.append(
                f"not read: {listed(tables, 4)} (a table is read with --csv, COCO's JSON with --json)"
            )

    def balance(self, taken: int) -> str:
        """Return the closing line: images found = taken + left out (by reason) + not looked at (where)."""
        found = taken + self.left_out.total() + self.not_looked_at.total()
        return (
            f"images: {found:,} found = {taken:,} taken + {self.left_out.total():,} left out{_listed(self.left_out)} "
            f"+ {self.not_looked_at.total():,} not looked at{_listed(self.not_looked_at)}"
        )


@dataclass(frozen=True)
class Photos:
    """Class names, and {split: paths relative to `root`, per class}. Without a split, all paths are under 'train'."""

    root: Path
    names: list[str]
    paths: dict[str, list[list[str]]]
    account: Account = field(default_factory=Account)


def order_classes(names: Iterable[str]) -> list[str]:
    """Return class names in the order of their labels: by number if all are whole numbers, else alphabetically."""
    names = list(names)
    if not all(name.isascii() and name.isdecimal() for name in names):
        return sorted(names)
    digits = {name: name.lstrip("0") for name in names}
    return sorted(names, key=lambda name: (len(digits[name]), digits[name], name))  # int() refuses very long ones


def require_two(names: list[str], source: Path) -> None:
    """Raise UserError if there are fewer than two classes, or if a name cannot be printed on one line."""
    if odd := [name for name in names if has_controls(name)]:
        raise UserError(
            f"{source}: the class name {odd[0][:80]!r} contains a control character, such as a line break; rename it"
        )
    if len(names) < 2:
        only = shown(names[0], 60) if names else "none"
        raise UserError(f"{source}: there must be at least 2 classes, and there is only {only}")


def _listed(counts: Counter) -> str:
    return f" ({_counted(+counts)})" if counts.total() else ""


def _counted(counts: Counter, longest: int = 8) -> str:
    parts = [f"{shown(name, 60)}: {n:,}" for name, n in counts.most_common(longest)]
    if len(counts) > longest:
        parts.append(f"{len(counts) - longest:,} others: {sum(n for _, n in counts.most_common()[longest:]):,}")
    return ", ".join(parts)
