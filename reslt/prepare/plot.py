"""The long tail, drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reslt.core.files import atomic_file
from reslt.data.groups import SHOTS, by_frequency


def draw_counts(train: np.ndarray, groups: dict[str, np.ndarray], name: str, file: Path) -> None:
    """(C,) training counts -> a PNG: a bar per class by descending count, logarithmic, coloured many / medium / few."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    rank = np.empty(len(train), np.int64)
    rank[by_frequency(train)] = np.arange(len(train))
    for shot, colour in zip(SHOTS, ("#3b6ea5", "#e0a030", "#c0392b"), strict=True):
        of_shot = groups[shot]
        label = f"{shot}: {of_shot.sum():,} classes, {train[of_shot].sum():,} images"
        axes.bar(rank[of_shot], train[of_shot], width=1.0, color=colour, label=label)
    axes.set(yscale="log", xlabel="classes, by images", ylabel="training images", title=name)
    axes.set_ylim(bottom=0.8)
    axes.legend()
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    pyplot.close(figure)
