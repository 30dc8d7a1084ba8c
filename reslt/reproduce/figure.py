"""Drawings of results, as in the paper's figures: lines over a setting or a size, bars per branch, row or shot group, and
clusters of features."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from reslt.core.files import atomic_file
from reslt.reproduce.rows import COLUMNS, as_text
from reslt.reproduce.table import Spread, TableRow

EXPERT = "expert"
USUAL = {3: "bars", 6: "branches", 7: "bars", 8: "groups", 9: "clusters"}  # drawings by the figure's number
MOST_COLUMNS = 3  # of panels side by side
INSIDE = 8  # entries of a legend; a longer one is drawn below the panels
ACCURACY, PAPER = "top-1 accuracy, %", "the paper"
CLOSEST, MOST_TICKS, LONGEST_TICKS = 0.03, 10, 45  # of an axis: a share of its length, ticks, characters
LONGEST_LINE = 14  # characters of a label below a bar
MARKERS = "osD^v"  # the next one is used when the ten colors repeat


def draw(title: str, lines: list[TableRow], file: Path, number: int | None = None) -> None:
    """Draw a PNG of the rows that have results. The kind of drawing is the one that a row states, else the usual one of the
    figure with this `number`, else lines if rows have an x, else branches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [line for line in lines if line.done]
    if not done:
        return
    stated = next((line.row.drawing for line in done if line.row.drawing), None)
    by_rows = "lines" if any(line.row.x is not None for line in done) else "branches"
    drawing = stated or USUAL.get(number, by_rows)
    if drawing == "clusters":
        figure = _clusters(pyplot, done, file.parent / "features")
    else:
        figure = {"lines": _lines, "branches": _branches, "bars": _bars, "groups": _groups}[drawing](pyplot, done)
    if figure is None:
        return
    figure.suptitle(title)
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    pyplot.close(figure)


def _lines(pyplot, lines: list[TableRow]):
    """Plot mean top-1 over x, with standard deviations over seeds as bars, and the paper's numbers as crosses, or as a dotted
    line if they belong to a whole series. If a series consists of several rows of the paper, each series has a panel."""
    points = [line for line in lines if line.row.x is not None]
    by_series = _grouped((line.row.series, line) for line in points)
    labels_of = {series: dict.fromkeys(line.row.label for line in members) for series, members in by_series.items()}
    if all(len(labels) == 1 for labels in labels_of.values()):
        figure, panels = _panels(pyplot, 1, (7, 4.5))
        _lines_of(panels[0], by_series, _styles(by_series), is_short=len(by_series) > INSIDE // 2)
    else:
        figure, panels = _panels(pyplot, len(by_series), (5, 4))
        styles = _styles(label for labels in labels_of.values() for label in labels)
        for axes, (series, members) in zip(panels, by_series.items(), strict=True):
            _lines_of(axes, _grouped((line.row.label, line) for line in members), styles, is_short=True)
            axes.set_title(series)
    _add_legend(figure, panels)
    return figure


def _lines_of(axes, members_of: dict[str, list[TableRow]], styles: dict[str, dict], is_short: bool) -> None:
    """Draw a line for each name. `is_short`: the legend has a single entry for all numbers of the paper."""
    everything = [line for members in members_of.values() for line in members]
    at = _positions(axes, [line.row.x for line in everything])
    for name, members in members_of.items():
        members = sorted(members, key=lambda line: at[line.row.x])
        x, spreads = [at[line.row.x] for line in members], [line.compared("all") for line in members]
        deviations = np.nan_to_num([s.deviation for s in spreads])
        axes.errorbar(x, [s.mean for s in spreads], yerr=deviations, capsize=3, label=name, **styles[name])
        stated = {at[line.row.x]: line.row.stated["all"] for line in members if "all" in line.row.stated}
        of_paper = {"color": styles[name]["color"], "label": PAPER if is_short else f"{name}, paper"}
        if stated and members[0].row.axis in members[0].row.settings:
            # Varied by --vary: the paper does not state the x of its number.
            axes.axhline(next(iter(stated.values())), linestyle=":", **of_paper)
        elif stated:
            axes.plot(*zip(*stated.items(), strict=True), "x", **of_paper)
    axes.set(xlabel=next((line.row.axis for line in everything if line.row.axis), ""), ylabel=ACCURACY)


def _positions(axes, values: list) -> dict:
    """Return {value: position on the x axis}, and label the axis. The position of a number is the number itself; if some would
    be too close to each other, or are not numbers, the positions are at equal distances."""
    are_numbers = all(isinstance(value, (int, float)) for value in values)
    distinct = sorted(set(values)) if are_numbers else list(dict.fromkeys(values))
    if are_numbers and (len(distinct) < 2 or min(np.diff(distinct)) >= CLOSEST * (distinct[-1] - distinct[0])):
        if len(distinct) <= MOST_TICKS:
            axes.set_xticks(distinct, list(map(as_text, distinct)))
        return {value: value for value in distinct}
    labels = list(map(as_text, distinct))
    is_long = sum(map(len, labels)) > LONGEST_TICKS
    turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if is_long else {}
    axes.set_xticks(range(len(distinct)), labels, **turned)
    axes.margins(x=0.1)
    return {value: place for place, value in enumerate(distinct)}


def _styles(names: Iterable[str]) -> dict[str, dict]:
    """Return the color and the marker of each name."""
    return {
        name: {"color": f"C{place % 10}", "marker": MARKERS[place // 10 % len(MARKERS)]}
        for place, name in enumerate(dict.fromkeys(names))
    }


def _branches(pyplot, lines: list[TableRow]):
    """Plot a panel per recipe, with a group of bars per shot group: the fused prediction and each branch."""
    figure, panels = _panels(pyplot, len(lines), (5, 4), sharey=True)
    for axes, line in zip(panels, lines, strict=True):
        results = [progress.result for _, progress in line.runs if progress.result]
        fused, *others = [name for name in results[0].predictions if not name.startswith(EXPERT)]
        labels = {fused: "all branches"} | {name: name for name in others}
        spreads = {
            label: [Spread.of([r.predictions[name][column] for r in results]) for column in COLUMNS]
            for name, label in labels.items()
        }
        _groups_of_bars(axes, spreads, {}, _styles(spreads))
        axes.set(title=f"{line.row.series}, {line.row.recipe}", ylabel=ACCURACY)
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    return figure


def _bars(pyplot, lines: list[TableRow]):
    """Plot a panel per series, with a bar per row: mean top-1, and the paper's number as a cross."""
    by_series = _grouped((line.row.series, line) for line in lines)
    most = max(map(len, by_series.values()))
    colors_of = _styles(label for members in by_series.values() for label in _labels(members))
    figure, panels = _panels(pyplot, len(by_series), (max(4.5, 1.1 * most + 1), 4.5), sharey=True)
    for axes, (series, members) in zip(panels, by_series.items(), strict=True):
        spreads, stated = [line.compared("all") for line in members], [line.row.stated.get("all") for line in members]
        places = np.arange(len(members))
        deviations = error_bars(spreads)
        colors = [colors_of[label]["color"] for label in _labels(members)]
        bars = axes.bar(places, [s.mean for s in spreads], 0.7, yerr=deviations, capsize=3, color=colors)
        axes.bar_label(bars, fmt="%.1f", label_type="center", color="white")
        _mark_paper(axes, [(at, value) for at, value in zip(places, stated, strict=True) if value is not None])
        axes.set_xticks(places, [textwrap.fill(label, LONGEST_LINE) for label in _labels(members)])
        axes.set(title=series, ylabel=ACCURACY)
        axes.set_ylim(bottom=0)
    _add_legend(figure, panels)
    return figure


def _groups(pyplot, lines: list[TableRow]):
    """Plot a panel per series, with a group of bars per shot group: a bar per row, and the paper's numbers as crosses."""
    by_series = _grouped((line.row.series, line) for line in lines)
    figure, panels = _panels(pyplot, len(by_series), (5, 4), sharey=True)
    styles = _styles(label for members in by_series.values() for label in _labels(members))
    for axes, (series, members) in zip(panels, by_series.items(), strict=True):
        labels = _labels(members)
        spreads = {label: [line.compared(c) for c in COLUMNS] for label, line in zip(labels, members, strict=True)}
        stated = {label: [line.row.stated.get(c) for c in COLUMNS] for label, line in zip(labels, members, strict=True)}
        _groups_of_bars(axes, spreads, stated, styles)
        axes.set(title=series, ylabel=ACCURACY)
    _add_legend(figure, panels)
    return figure


def _clusters(pyplot, lines: list[TableRow], folder: Path):
    """Plot the t-SNE of test features of the first run with a result of each row: a column per row, and a line of panels per
    series and number of classes, with class indices on the clusters. Return None if no run has features."""
    from matplotlib.patheffects import withStroke

    from reslt.reproduce.clusters import choose_classes, embed, read_features, record_features

    by_series = _grouped((line.row.series, line) for line in lines)
    labels = list(dict.fromkeys(label for members in by_series.values() for label in _labels(members)))
    panels = {}
    for series, members in by_series.items():
        for label, line in zip(_labels(members), members, strict=True):
            run = next(run for run, progress in line.runs if progress.result)
            file = record_features(run, folder)
            if file is None:
                continue
            features, classes = read_features(file)
            for chosen in choose_classes(classes):
                place = f"{series}: {len(chosen)} classes"
                panels.setdefault(place, {})[label] = embed(features, classes, chosen)
    if not panels:
        return None
    size = (4 * len(labels), 3.6 * len(panels))
    figure, grid = pyplot.subplots(len(panels), len(labels), figsize=size, layout="constrained", squeeze=False)
    for row, (place, embedded) in zip(grid, panels.items(), strict=True):
        for axes, label in zip(row, labels, strict=True):
            if label not in embedded:
                axes.remove()
                continue
            points, classes = embedded[label]
            colors = pyplot.get_cmap("tab20" if len(np.unique(classes)) > 10 else "tab10")
            for rank, index in enumerate(np.unique(classes)):
                members = points[classes == index]
                axes.scatter(*members.T, s=5, color=colors(rank), linewidths=0)
                axes.annotate(
                    str(index),
                    np.median(members, 0),
                    ha="center",
                    va="center",
                    weight="bold",
                    path_effects=[withStroke(linewidth=3, foreground="white")],
                )
            axes.set(title=f"{label}, {place}", xticks=[], yticks=[])
            axes.title.set_fontsize("medium")
    return figure


def _groups_of_bars(
    axes, spreads: dict[str, list[Spread]], stated: dict[str, list[float | None]], styles: dict[str, dict]
) -> None:
    """Draw a group of bars per column of COLUMNS, with one bar per name, and the paper's numbers as crosses."""
    width, marks = 0.8 / len(spreads), []
    for i, (name, of_columns) in enumerate(spreads.items()):
        at = np.arange(len(COLUMNS)) + (i - (len(spreads) - 1) / 2) * width
        deviations = error_bars(of_columns)
        axes.bar(
            at, [s.mean for s in of_columns], width, yerr=deviations, capsize=2, label=name, color=styles[name]["color"]
        )
        marks += [(x, value) for x, value in zip(at, stated.get(name, ()), strict=False) if value is not None]
    _mark_paper(axes, marks)
    axes.set_xticks(range(len(COLUMNS)), COLUMNS)
    axes.set_ylim(bottom=0)


def error_bars(spreads: list[Spread]) -> np.ndarray:
    """Return the (2, n) lengths of error bars below and above the means: the standard deviations, cut at 0 and 100 %. NaN,
    which draws nothing, for a single run."""
    means, deviations = (np.array([getattr(s, name) for s in spreads]) for name in ("mean", "deviation"))
    return np.stack([np.minimum(deviations, means), np.minimum(deviations, 100 - means)])


def _mark_paper(axes, marks: list[tuple[float, float]]) -> None:
    if marks:
        axes.plot(*zip(*marks, strict=True), "x", color="black", label=PAPER, zorder=3)


def _labels(members: list[TableRow]) -> list[str]:
    """Return the labels of rows, followed by the recipe's name if several rows have the same label."""
    labels = [line.row.label for line in members]
    return [
        label if labels.count(label) == 1 else f"{label} ({line.row.recipe.rpartition('/')[2]})"
        for label, line in zip(labels, members, strict=True)
    ]


def _grouped(pairs: Iterable[tuple[str, TableRow]]) -> dict[str, list[TableRow]]:
    groups: dict[str, list[TableRow]] = {}
    for name, line in pairs:
        groups.setdefault(name, []).append(line)
    return groups


def _panels(pyplot, count: int, size: tuple[float, float], sharey: bool = False):
    """Return a figure and `count` axes. `size`: (width, height) of each in inches."""
    columns = min(count, MOST_COLUMNS)
    rows = -(-count // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(columns * size[0], rows * size[1]), layout="constrained", squeeze=False, sharey=sharey
    )
    for axes in grid.flat[count:]:
        axes.remove()
    return figure, list(grid.flat[:count])


def _add_legend(figure, panels) -> None:
    """Add one legend for all panels, with each name once: below them, or, if it is short, in the only panel of lines."""
    entries = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    if not entries:
        return
    entries |= {PAPER: entries.pop(PAPER)} if PAPER in entries else {}  # last
    are_bars = any(axes.patches for axes in panels)  # bars leave no room for a legend
    if len(panels) == 1 and len(entries) <= INSIDE and not are_bars:
        panels[0].legend(entries.values(), entries.keys())
        return
    width, height = figure.get_size_inches()
    columns = max(1, int(width / (0.8 + 0.08 * max(map(len, entries)))))
    rows = -(-len(entries) // columns)
    figure.set_size_inches(width, height + 0.22 * rows + 0.2)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, fontsize="small")
