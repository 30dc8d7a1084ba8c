"""A user's photos as found, before they become a dataset: class names, paths, and an account of everything else."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from reslt.core.errors import UserError


@dataclass
class Account:
    """Every image file of a source, counted once: taken, left out for a reason, or in a place not looked at."""

    decisions: list[str] = field(default_factory=list)  # one line each, with numbers
    left_out: Counter = field(default_factory=Counter)  # reason -> images
    not_looked_at: Counter = field(default_factory=Counter)  # place -> images

    def balance(self, taken: int) -> str:
        """Return the closing line: images found = taken + left out (by reason) + not looked at (where)."""
        found = taken + self.left_out.total() + self.not_looked_at.total()
        return (
            f"images: {found:,} found = {taken:,} taken + {self.left_out.total():,} left out{_listed(self.left_out)} "
            f"+ {self.not_looked_at.total():,} not looked at{_listed(self.not_looked_at)}"
        )


def _listed(counts: Counter) -> str:
    return f" ({', '.join(f'{name}: {n:,}' for name, n in counts.items())})" if counts else ""


@dataclass(frozen=True)
class Photos:
    """Class names, and {split: paths relative to `root`, per class}. Without a split, all paths are under 'train'."""

    root: Path
    names: list[str]
    paths: dict[str, list[list[str]]]
    account: Account = field(default_factory=Account)


def require_two(names: list[str], source: Path) -> None:
    """Raise UserError if there are fewer than two classes."""
    if len(names) < 2:
        raise UserError(f"{source}: there must be at least 2 classes, and there is only {', '.join(names) or 'none'}")
