"""Figures of an evaluation: accuracy over training images, learning curves, confusion, reliability; as SVG for a page, as PNG,
or as pixels. They are drawn without pyplot, so no figure is global."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image

from reslt.core.files import atomic_file
from reslt.core.text import shown
from reslt.data.groups import SHOTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#24292f"  # of text and axes; a page replaces it with its own color
LINES = {"all": "#7d8590", "many": "#3b82c4", "medium": "#d9930d", "few": "#d1495b"}  # legible on white and on black
MARKERS = {"many": "o", "medium": "s", "few": "^"}
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.parse_math": False,  # a class may be called $x
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#8b949e",
    "grid.alpha": 0.25,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "reslt",  # equal figures have equal ids
}
SIZE = (4.6, 3.4)  # inches: at 96 pixels per inch, the text is legible on a phone
MOST_VECTORS = 2000  # points of a scatter plot; with more, an SVG contains them as pixels
MANY_CLASSES = 200  # with more, a scatter plot has smaller points, and a line of means by count
MOST_NUMBERED = 16  # classes; with more, the cells of a confusion matrix show no numbers
LONGEST_NAME = 22
COUNT_TICKS = 8


@contextmanager
def _styled():
    """Within the block, figures are drawn and saved in the style of reports, without warnings of missing glyphs."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def _figure(size: tuple[float, float] = SIZE) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _laid_out(figure: Figure) -> Figure:
    """Return a figure with a fixed layout: laid out again, it would look slightly different each time."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def draw_classes(images_per_class: np.ndarray, accuracies: np.ndarray, groups: Mapping[str, np.ndarray]) -> Figure:
    """Plot the (C,) accuracies of classes, in percent (NaN: not tested), over their (C,) training images, and the mean of each
    shot group as a line over its range; with many classes, also the mean by count."""
    from matplotlib.ticker import LogLocator, ScalarFormatter

    with _styled():
        figure, is_crowded = _figure(), len(accuracies) > MANY_CLASSES
        axes = figure.subplots()
        for shot in SHOTS:
            chosen = groups[shot] & ~np.isnan(accuracies)
            if not chosen.any():
                continue
            counts, mean = images_per_class[chosen], accuracies[chosen].mean()
            axes.scatter(
                counts,
                accuracies[chosen],
                s=10 if is_crowded else 26,
                marker=MARKERS[shot],
                color=LINES[shot],
                alpha=0.4 if is_crowded else 0.75,
                linewidths=0,
                label=f"{shot} {mean:.1f} %",
                rasterized=len(accuracies) > MOST_VECTORS,
            )
            axes.plot([counts.min() / 1.04, counts.max() * 1.04], [mean, mean], color=LINES[shot], linewidth=2.5)
        if is_crowded:
            axes.plot(*_means_by_count(images_per_class, accuracies), color=INK, linewidth=1.5, label="by count")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=COUNT_TICKS))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter("")
        axes.set(xlabel="training images of the class", ylabel="accuracy, %", ylim=(-3, 103))
        figure.legend(
            loc="outside upper center", ncols=4, handletextpad=0.3, columnspacing=1.0, markerscale=1 + is_crowded
        )
        return _laid_out(figure)


def _means_by_count(images_per_class: np.ndarray, accuracies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean counts and mean accuracies of 12 parts of equal size of the tested classes, by ascending count."""
    tested = np.flatnonzero(~np.isnan(accuracies))
    parts = np.array_split(tested[np.argsort(images_per_class[tested], kind="stable")], 12)
    parts = [part for part in parts if len(part)]
    counts, means = ([values[part].mean() for part in parts] for values in (images_per_class, accuracies))
    return np.array(counts), np.array(means)


def draw_curves(epochs: Sequence[Mapping[str, float]]) -> dict[str, Figure]:
    """Return {'loss' | 'accuracy' | 'learning_rate': figure} of rows of summary.csv, which may lack values. Empty figures are
    left out."""
    from matplotlib.lines import Line2D

    with _styled():
        figures = {}
        for name, column, label in (("loss", "train_loss", "training loss"), ("learning_rate", "lr", "learning rate")):
            x, y = _column(epochs, column)
            if len(x):
                figure = _figure((4.6, 2.8))
                axes = figure.subplots()
                _line(axes, x, y, color=LINES["many"])
                axes.set(xlabel="epoch", ylabel=label)
                figures[name] = _laid_out(figure)
        figure = _figure()
        axes = figure.subplots()
        drawn: dict[str, Line2D] = {}  # for the legend: a color per group, a line style per list
        for split, style in (("train", ":"), ("val", "--"), ("test", "-")):
            for column in ("all", *SHOTS):
                x, y = _column(epochs, "train_accuracy" if (split, column) == ("train", "all") else f"{split}_{column}")
                if len(x):
                    _line(axes, x, y, color=LINES[column], linestyle=style)
                    drawn.setdefault(column, Line2D([], [], color=LINES[column]))
                    drawn.setdefault(split, Line2D([], [], color=INK, linestyle=style))
        axes.set(xlabel="epoch", ylabel="accuracy, %", ylim=(-3, 103))
        if drawn:
            names = [name for name in ("all", *SHOTS, "train", "val", "test") if name in drawn]
            lines = [drawn[name] for name in names]
            figure.legend(lines, names, loc="outside upper center", ncols=4, columnspacing=1.0, handlelength=1.8)
            figures["accuracy"] = _laid_out(figure)
        return figures


def _column(epochs: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return epochs and values of the rows that have one."""
    pairs = [(row["epoch"], row[name]) for row in epochs if not np.isnan(row.get(name, np.nan))]
    return tuple(np.array(pairs, float).reshape(-1, 2).T)


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, **style) -> None:
    axes.plot(x, y, marker="o" if len(x) <= 12 else None, markersize=4, **style)
    axes.xaxis.get_major_locator().set_params(integer=True)


def draw_confusion(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    """Plot a (C, C) matrix of images, with true classes as rows, as shares of each row; an empty row stays empty."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    classes, images = len(matrix), matrix.sum(1, keepdims=True)
    shares = np.divide(100 * matrix, images, out=np.zeros(matrix.shape), where=images > 0)
    labels = [shown(name, LONGEST_NAME) for name in names]
    side = max(3.4, (0.36 if classes <= MOST_NUMBERED else 0.19) * classes + 1.4)
    with _styled():
        figure = _figure((side + 0.5, side))
        axes = figure.subplots()
        # Opacity grows with the share, so that 0 % is the page's background; with its root, so that rare mistakes are visible.
        blues = LinearSegmentedColormap.from_list("blues", [(0.18, 0.45, 0.72, 0), (0.18, 0.45, 0.72, 1)])
        image = axes.imshow(shares, cmap=blues, norm=PowerNorm(0.5, 0, 100), interpolation="none")
        places, small = range(classes), {"fontsize": 9 if classes <= MOST_NUMBERED else 7.5}
        axes.set_xticks(places, labels, rotation=90 if max(map(len, labels)) > 2 else 0, **small)
        axes.set_yticks(places, labels, **small)
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(True)
        if classes <= MOST_NUMBERED:
            for row, column in zip(*np.nonzero(matrix), strict=True):
                share = shares[row, column]
                color = "white" if share > 35 else INK
                axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8.5, color=color)
        else:
            figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.7, pad=0.02).outline.set_visible(
                False
            )
        return _laid_out(figure)


def draw_reliability(diagrams: Mapping[str, pd.DataFrame]) -> Figure:
    """Plot reliability diagrams in one figure, and, below, the share of images in each bin of confidence. `diagrams`: {label:
    rows of `calibration.reliability`}."""
    with _styled():
        figure = _figure((4.6, 4.4))
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
        axes.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1, alpha=0.6, label="perfect")
        for place, (label, diagram) in enumerate(diagrams.items()):
            color, bins = (LINES["few"], LINES["many"])[place % 2], len(diagram)
            filled = diagram[diagram["images"] > 0]
            marker = "os"[place % 2]
            share = 100 * diagram["images"] / diagram["images"].sum()
            line = {"color": color, "linewidth": 1.2, "marker": marker, "markersize": 4}
            axes.plot(filled["confidence"], filled["accuracy"], label=label, **line)
            size = 10 + 2 * share[filled.index]
            axes.scatter(filled["confidence"], filled["accuracy"], size, color=color, marker=marker, clip_on=False)
            below.stairs(share, np.linspace(0, 1, bins + 1), color=color, fill=False, linewidth=1.6)
        axes.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        below.set(xlabel="confidence", ylabel="% images", ylim=(0, None))
        figure.legend(loc="outside upper center", ncols=3, columnspacing=1.0, handlelength=1.6)
        return _laid_out(figure)


def as_svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an <svg> element of class `figure` for a page. Its ids begin with `name`; its text and axes have the
    page's color `--ink`. `label`: its description for screen readers, without markup."""
    text = io.StringIO()
    with _styled():
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = text.getvalue()
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"\b(id=\"|href=\"#|url\(#)", rf"\g<1>{name}-", svg).replace(INK, "var(--ink)")
    size = re.match(r"<svg[^>]*? viewBox=\"0 0 ([\d.]+) ([\d.]+)\"", svg)
    width = round(float(size[1]) * 96 / 72)
    opening = f'<svg class="figure" role="img" aria-label="{label}" viewBox="0 0 {size[1]} {size[2]}"'
    opening += f' style="--width:{width}px"'
    return re.sub(r"<svg[^>]*>", f'{opening} xmlns:xlink="http://www.w3.org/1999/xlink">', svg, count=1)


def save_png(figure: Figure, file: Path) -> None:
    """Write a figure as PNG, completely or not at all."""
    with _styled(), atomic_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def as_pixels(figure: Figure) -> np.ndarray:
    """Return a figure as (H, W, 3) uint8."""
    content = io.BytesIO()
    with _styled():
        figure.savefig(content, format="png", dpi=120)
    return np.asarray(Image.open(content).convert("RGB"))
