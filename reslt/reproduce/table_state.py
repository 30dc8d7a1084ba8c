"""The state of a table: its rows, the status of their runs, and its files."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from reslt.core.files import write_atomically
from reslt.reproduce.rows import Row, Run
from reslt.reproduce.speed import Cost
from reslt.reproduce.status import RunStatus, read_status
from reslt.reproduce.table import TableRow, to_csv, to_markdown

NAMED_PACKAGES = ("torch", "timm")


class TableState:
    """The state of a table. It is read from disk once, then updated when a run ends."""

    def __init__(self, name: str, rows: list[Row], folder: Path):
        """`folder`: that of table.md and table.csv."""
        self.title, self.rows, self.folder = name.capitalize(), rows, folder
        self.facts: list[str] = []  # for the header
        self.costs: dict[int, Cost | None] = {}  # of a prediction, by the place of the row; empty: not measured
        runs = [run for row in rows for run in row.runs]
        runs += [required for run in runs for required in run.requires]
        self.progress = {run: read_status(run) for run in runs}

    @property
    def total(self) -> int:
        """The number of runs. Rows may share some."""
        return len(self.progress)

    @property
    def to_do(self) -> list[Run]:
        """The runs without result or fault: the first seed of every row before any second seed, and the runs from which others
        start or learn before these."""
        by_seed = []
        for place in range(len(self.rows[0].runs)):
            of_seed = [row.runs[place] for row in self.rows]
            by_seed += [required for run in of_seed for required in run.requires]
            by_seed += sorted(of_seed, key=lambda run: bool(run.requires))
        return [run for run in dict.fromkeys(by_seed) if not (self.progress[run].result or self.progress[run].fault)]

    @property
    def shared(self) -> list[str]:
        """A line for each run that served as the first stage of others, or as a teacher."""
        served: dict[tuple[Run, str], list[str]] = {}
        for run in self.progress:
            for required in run.requires:
                role = "the first stage" if required is run.first_stage else "a teacher"
                served.setdefault((required, role), []).append(run.config.run.experiment)
        return [f"{run.config.run.experiment} is {role} of {', '.join(names)}" for (run, role), names in served.items()]

    @property
    def is_done(self) -> bool:
        """Whether every run has a result."""
        return all(progress.result for progress in self.progress.values())

    @property
    def lines(self) -> list[TableRow]:
        """The rows with the status of their runs. If a row has only the last epoch, all of its dataset are compared by it."""
        lines = [
            TableRow(row, [(run, self.progress[run]) for run in row.runs], self.costs.get(place))
            for place, row in enumerate(self.rows)
        ]
        only_last = {
            run.config.data.data
            for line in lines
            for run, status in line.runs
            if status.result and not (status.result.protocol or status.result.selected)
        }
        return [
            replace(line, by_last=any(run.config and run.config.data.data in only_last for run, _ in line.runs))
            for line in lines
        ]

    @property
    def files(self) -> list[Path]:
        """The files of the table that exist."""
        return [file for name in ("table.md", "table.csv", "figure.png") if (file := self.folder / name).is_file()]

    def refuse(self, data: str, reason: str) -> None:
        """Mark the remaining runs on a dataset as impossible."""
        for run in self.to_do:
            if run.config.data.data == data:
                self.progress[run] = RunStatus(fault=reason)

    def record(self, run: Run, progress: RunStatus) -> None:
        """Record a run that has ended, and rewrite the table."""
        self.progress[run] = progress
        self.write()

    def write(self) -> str:
        """Write table.md and table.csv, each completely or not at all, and return the content of table.md. Includes results
        that another call has produced in the meantime."""
        for run, before in self.progress.items():
            if not before.result and (now := read_status(run)).result:
                self.progress[run] = now
        text = self.as_markdown()
        write_atomically(self.folder / "table.md", text)
        write_atomically(self.folder / "table.csv", self.as_csv())
        return text

    def as_markdown(self) -> str:
        """Return the content of table.md."""
        return to_markdown(self.title, self.header(), self.lines)

    def as_csv(self) -> str:
        """Return the content of table.csv."""
        return to_csv(self.lines)

    def header(self) -> list[str]:
        """Return facts about the runs, for the top of the table."""
        results = [progress.result for progress in self.progress.values() if progress.result]
        used = {f"{name} {result.versions.get(name)}" for result in results for name in NAMED_PACKAGES}
        versions = sorted(used) or [f"{name} {version(name)}" for name in NAMED_PACKAGES]
        return [f"{len(results)} of {self.total} runs done", *self.facts, ", ".join(versions), *self.shared]
