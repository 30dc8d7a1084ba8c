"""Results -> the paper's figures: lines over a setting or a size, bars per branch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reslt.core.files import atomic_file
from reslt.reproduce.rows import COLUMNS, as_text
from reslt.reproduce.table import Spread, TableRow

EXPERT = "expert"


def draw(title: str, lines: list[TableRow], file: Path) -> None:
    """Draw a PNG of the rows that have results: a line per series if rows have an x, else bars per prediction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [line for line in lines if line.done]
    if not done:
        return
    figure = _lines(pyplot, done) if any(line.row.x is not None for line in done) else _bars(pyplot, done)
    figure.suptitle(title)
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    pyplot.close(figure)


def _lines(pyplot, lines: list[TableRow]):
    """Plot mean top-1 against x, standard deviations over seeds as bars, and the paper's numbers as crosses."""
    points = [line for line in lines if line.row.x is not None]
    are_numbers = all(isinstance(line.row.x, (int, float)) for line in points)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for series in dict.fromkeys(line.row.series for line in points):
        members = [line for line in points if line.row.series == series]
        if are_numbers:
            members.sort(key=lambda line: line.row.x)
        x = [line.row.x if are_numbers else as_text(line.row.x) for line in members]
        spreads = [line.compared("all") for line in members]
        deviations = np.nan_to_num([s.deviation for s in spreads])
        drawn = axes.errorbar(x, [s.mean for s in spreads], yerr=deviations, marker="o", capsize=3, label=series)
        stated = [(at, line.row.stated["all"]) for at, line in zip(x, members, strict=True) if "all" in line.row.stated]
        if stated:
            color = drawn.lines[0].get_color()
            axes.plot(*zip(*stated, strict=True), "x", color=color, label=f"{series}, paper")
    axes.set(xlabel=next((line.row.axis for line in points if line.row.axis), ""), ylabel="top-1 accuracy, %")
    axes.legend()
    return figure


def _bars(pyplot, lines: list[TableRow]):
    """Plot a panel per recipe, a group of bars per shot group: the fused prediction and each branch."""
    figure, panels = pyplot.subplots(
        1, len(lines), figsize=(5 * len(lines), 4), layout="constrained", squeeze=False, sharey=True
    )
    for axes, line in zip(panels[0], lines, strict=True):
        results = [progress.result for _, progress in line.runs if progress.result]
        fused, *others = [name for name in results[0].predictions if not name.startswith(EXPERT)]
        labels = {fused: "all branches"} | {name: name for name in others}
        width = 0.8 / len(labels)
        for i, (name, label) in enumerate(labels.items()):
            spreads = [Spread.of([r.predictions[name][column] for r in results]) for column in COLUMNS]
            left = np.arange(len(COLUMNS)) + (i - (len(labels) - 1) / 2) * width
            deviations = np.nan_to_num([s.deviation for s in spreads])
            axes.bar(left, [s.mean for s in spreads], width, yerr=deviations, capsize=2, label=label)
        axes.set(title=f"{line.row.series}, {line.row.recipe}", ylabel="top-1 accuracy, %")
        axes.set_xticks(range(len(COLUMNS)), COLUMNS)
        axes.legend(fontsize="small")
    return figure
