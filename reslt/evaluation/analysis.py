"""The numbers and figures of a report, from the predictions for every image of a list."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from reslt.data.classes import Classes
from reslt.data.groups import by_frequency, shot_groups
from reslt.evaluation import plots
from reslt.evaluation.bootstrap import bootstrap_intervals
from reslt.evaluation.calibration import classwise_ece, expected_calibration_error, probabilities_of, reliability
from reslt.evaluation.confusion import confusion_matrix, macro_f1, most_confused, top_k_accuracy, usual_mistake
from reslt.evaluation.metrics import ClassAccuracies
from reslt.evaluation.predictions import SavedPredictions
from reslt.evaluation.tables import CLASS_MEAN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_IN_MATRIX = 50  # classes; with more, a report shows only the most confused pairs
TOP_K = 5


@dataclass(frozen=True)
class Cell:
    """An accuracy and the ends of its 95 % confidence interval, in percent; NaN: not available, or too few images."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Mistake:
    """A wrong prediction; `image`: its place in the list."""

    image: int
    label: int
    predicted: int
    confidence: float


@dataclass(frozen=True, eq=False)
class Analysis:
    """The analysis of one evaluation. `classes`: those of the model, with training counts and shot splits; `temperature`: that
    of the calibration, None without one; `epochs`: the rows of summary.csv."""

    predictions: SavedPredictions
    classes: Classes
    temperature: float | None = None
    epochs: Sequence[dict] = ()

    @property
    def labels(self) -> np.ndarray:
        """(N,) true classes."""
        return self.predictions.labels

    @property
    def predicted(self) -> np.ndarray:
        """(N,) classes of the fused prediction."""
        return self.predictions.predicted[0]

    @cached_property
    def names(self) -> list[str]:
        """(C,) names of the classes; their numbers if names are unknown."""
        return list(self.classes.names or map(str, range(self.classes.number)))

    @cached_property
    def groups(self) -> dict[str, dict[str, np.ndarray]]:
        """{shot split: {'many' | 'medium' | 'few': (C,) bool}}"""
        splits, counts = self.classes.shot_splits, self.classes.images_per_class
        return {name: shot_groups(counts, split) for name, split in splits.items()}

    @cached_property
    def accuracies(self) -> ClassAccuracies:
        """Accuracies per class, for each row of the table."""
        hits = [
            np.bincount(self.labels[rows == self.labels], minlength=self.classes.number)
            for rows in self.predictions.predicted
        ]
        return ClassAccuracies(np.stack(hits), np.bincount(self.labels, minlength=self.classes.number))

    @cached_property
    def tables(self) -> dict[str, dict[str, dict[str, Cell]]]:
        """{shot split: {row: {'many' | 'medium' | 'few' | 'all' | 'class_mean': accuracy and interval}}}"""
        a, names = self.accuracies, list(map(str, self.predictions.described["row_names"]))
        every = np.ones(self.classes.number, bool)
        tables: dict[str, dict[str, dict[str, Cell]]] = {}
        for split, groups in self.groups.items():
            values, tables[split] = a.shots(groups) | {"all": a.all, CLASS_MEAN: a.class_mean}, {}
            for row, name in enumerate(names):
                intervals = bootstrap_intervals(a.hits[row], a.images, groups | {CLASS_MEAN: every})
                tables[split][name] = {
                    column: Cell(float(of_rows[row]), *intervals[column]) for column, of_rows in values.items()
                }
        return tables

    @cached_property
    def top5(self) -> float:
        """Top-5 accuracy, in percent; NaN for 5 classes or fewer."""
        if self.classes.number <= TOP_K:
            return math.nan
        return top_k_accuracy(self.predictions.logits, self.labels, TOP_K)

    @cached_property
    def macro_f1(self) -> float:
        """Mean F1 score of the tested classes, in percent."""
        return macro_f1(self.labels, self.predicted)

    @cached_property
    def confidences(self) -> np.ndarray:
        """(N,) probabilities of the predicted classes, calibrated if there is a calibration."""
        return self._judged[-1][1]

    @cached_property
    def calibration(self) -> pd.DataFrame:
        """`temperature`, and `ece` and `classwise_ece` in percent: a row without and, if calibrated, one with calibration."""
        return pd.DataFrame([row for row, _ in self._judged])

    @cached_property
    def _judged(self) -> list[tuple[dict[str, float], np.ndarray]]:
        """The rows of `calibration` with their (N,) confidences. Only one (N, C) array of probabilities exists at a time."""
        return [self._judge(temperature) for temperature in (1.0, self.temperature) if temperature is not None]

    def _judge(self, temperature: float) -> tuple[dict[str, float], np.ndarray]:
        probabilities = probabilities_of(self.predictions.logits, temperature)
        confidences = np.take_along_axis(probabilities, self.predicted[:, None].astype(np.int64), 1)[:, 0]
        errors = {
            "ece": 100 * expected_calibration_error(confidences, self.predicted == self.labels),
            "classwise_ece": 100 * classwise_ece(probabilities, self.labels),
        }
        return {"temperature": temperature} | errors, confidences

    def poorest(self) -> np.ndarray:
        """Return the tested classes by ascending accuracy, then descending number of images."""
        accuracies, images = self.accuracies.per_class[0], self.accuracies.images
        tested = np.flatnonzero(images > 0)
        return tested[np.lexsort((tested, -images[tested], accuracies[tested]))]

    @cached_property
    def usual_mistake(self) -> np.ndarray:
        """(C,) the class for which the images of each class are most often mistaken; -1: for none."""
        return usual_mistake(self.labels, self.predicted, self.classes.number)

    def most_confused(self, most: int) -> pd.DataFrame:
        """Return the most frequent mistakes; see `confusion.most_confused`."""
        return most_confused(self.labels, self.predicted, self.classes.number, most)

    def worst_mistakes(self, most: int) -> list[Mistake]:
        """Return the most confident wrong predictions, in descending order; if confidences are equal, those with the largest
        difference between the logits of predicted class and label come first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        logits = self.predictions.logits
        margin = logits[wrong, self.predicted[wrong]] - logits[wrong, self.labels[wrong]]
        first = wrong[np.lexsort((-margin, -self.confidences[wrong]))[:most]]
        return [Mistake(int(i), int(self.labels[i]), int(self.predicted[i]), float(self.confidences[i])) for i in first]


def pictures(analysis: Analysis) -> dict[str, Figure]:
    """Return {name: figure} for a page, files or a tracker: `classes`, `reliability`, `confusion` (for up to MOST_IN_MATRIX
    classes), and, if there are epochs, `loss`, `accuracy` and `learning_rate`."""
    a, hits = analysis, analysis.predicted == analysis.labels
    figures = {
        "classes": plots.draw_classes(a.classes.images_per_class, a.accuracies.per_class[0], a.groups["standard"])
    }
    labels = [f"as trained (ECE {a.calibration['ece'].iloc[0]:.1f} %)"]
    if a.temperature is not None:
        labels.append(f"calibrated ({a.calibration['ece'].iloc[1]:.1f} %)")
    diagrams = {label: reliability(own, hits) for label, (_, own) in zip(labels, a._judged, strict=True)}
    figures["reliability"] = plots.draw_reliability(diagrams)
    if a.classes.number <= MOST_IN_MATRIX:
        order = by_frequency(a.classes.images_per_class)
        matrix = confusion_matrix(a.labels, a.predicted, a.classes.number)[np.ix_(order, order)]
        figures["confusion"] = plots.draw_confusion(matrix, [a.names[c] for c in order])
    return figures | plots.draw_curves(a.epochs)


def scalars(analysis: Analysis) -> dict[str, float]:
    """Return {name in a tracker: value} of the numbers of a report that the record of an epoch lacks."""
    a, split = analysis, analysis.predictions.described.get("split", "test")
    fused = next(iter(a.tables["standard"].values()))
    named = {"top5": a.top5, "macro_f1": a.macro_f1}
    for when, row in zip(("", "_calibrated"), a.calibration.to_dict("records"), strict=False):
        named |= {f"ece{when}": row["ece"], f"classwise_ece{when}": row["classwise_ece"]}
    for column, cell in fused.items():
        named |= {f"{column}_low": cell.low, f"{column}_high": cell.high}
    return {f"report/{split}_{name}": value for name, value in named.items() if not np.isnan(value)}
