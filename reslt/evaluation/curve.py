"""The accuracies of one list over the values of a predictor's setting, as text, CSV and plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reslt.core.files import atomic_file, write_atomically
from reslt.evaluation.tables import CLASS_MEAN, Evaluation, render

if TYPE_CHECKING:
    import pandas as pd

NOT_CHOSEN = "on the test list: no value is chosen"


@dataclass(frozen=True)
class Curve:
    """The `evaluations` of one list, one for each of the `values` of the setting `key`. Only a validation list chooses a
    value."""

    key: str
    values: tuple[float, ...]
    evaluations: list[Evaluation]

    @property
    def split(self) -> str:
        """The evaluated list."""
        return self.evaluations[0].split

    @property
    def chosen(self) -> float | None:
        """The value with the highest score on the validation list, the smallest if scores are equal; None on a test list."""
        if self.split != "val":
            return None
        return max(zip(self.values, self.evaluations, strict=True), key=lambda at: (at[1].accuracies.score, -at[0]))[0]

    @property
    def remark(self) -> str:
        """The choice in words, or the reason why there is none."""
        return NOT_CHOSEN if self.chosen is None else f"{self.key} {self.chosen:g} is chosen on the validation list"

    def table(self) -> pd.DataFrame:
        """Return a row per value, in percent: many, medium, few and all of the fused prediction, and class_mean if the
        list is unbalanced."""
        import pandas as pd

        rows = [evaluation.tables()["standard"].iloc[0] for evaluation in self.evaluations]
        return pd.DataFrame(
            [row.tolist() for row in rows], columns=list(rows[0].index), index=pd.Index(self.values, name=self.key)
        )

    def text(self) -> str:
        """Return the table as text, with the chosen value marked."""
        table, first = self.table(), self.evaluations[0]
        table.index = [f"{value:g}" for value in self.values]
        lines = render(table).splitlines()
        marked = [line + "  <- chosen" * (v == self.chosen) for v, line in zip(self.values, lines[1:], strict=True)]
        images = int(first.accuracies.images.sum())
        title = f"{first.dataset.name}, {self.split} list ({images:,} images), {self.key} swept; {self.remark}"
        return "\n".join([title, lines[0], *marked])

    def write(self, folder: Path, suffix: str) -> str:
        """Write sweep-<key><suffix>.csv and .png into a folder, each atomically. Return a line that names them."""
        table = self.table().reset_index()
        table["list"] = self.split
        table["remark"] = [
            NOT_CHOSEN if self.chosen is None else "chosen" if value == self.chosen else "" for value in self.values
        ]
        stem = f"sweep-{self.key}{suffix}"
        write_atomically(folder / f"{stem}.csv", table.to_csv(index=False, float_format="%.10g"))
        self._draw(folder / f"{stem}.png")
        return f"{stem}.csv and {stem}.png are in {folder}"

    def _draw(self, file: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        for column, accuracies in self.table().rename(columns={CLASS_MEAN: "class mean"}).items():
            if accuracies.notna().any():
                width = 2.5 if column == "all" else 1.5
                axes.plot(self.values, accuracies.to_numpy(), marker="o", markersize=4, linewidth=width, label=column)
        if self.chosen is not None:
            axes.axvline(self.chosen, color="gray", linestyle="--", label=f"chosen: {self.chosen:g}")
        axes.set(xlabel=self.key, ylabel=f"top-1 accuracy on the {self.split} list, %", title=self.remark)
        figure.legend(loc="outside right upper")
        figure.suptitle(self.evaluations[0].dataset.name)
        with atomic_file(file) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        pyplot.close(figure)
