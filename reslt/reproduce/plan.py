"""The plan of the remaining work: states, training images, time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from reslt.config.places import dataset_folder
from reslt.config.stages import total_epochs
from reslt.core.errors import UserError
from reslt.data.datasets import count_classes, how_to_prepare, list_files, read_info
from reslt.data.groups import STANDARD_SPLIT, shot_groups
from reslt.data.lists import ImageList, read_list
from reslt.data.set_aside import number_set_aside
from reslt.reproduce.jobs import duration
from reslt.reproduce.rate import Rate
from reslt.reproduce.rows import Run, as_text
from reslt.reproduce.status import RunStatus
from reslt.reproduce.table import TableRow, markdown, note_on_marks


@dataclass
class TrainingList:
    """Facts about the training list of a dataset, even if it does not exist yet. Raises UserError if it is invalid."""

    data: str

    @cached_property
    def folder(self) -> Path:
        """The folder of the lists."""
        return dataset_folder(self.data)

    @cached_property
    def info(self) -> dict:
        """The dataset's description."""
        return read_info(self.folder)

    @cached_property
    def there(self) -> ImageList | None:
        """The list itself; None if it does not exist yet."""
        file = list_files(self.folder).get("train")
        return read_list(file) if file else None

    def images(self, val_from_train: float | None = None, only_shots: str | None = None) -> int | None:
        """Return the number of training images, from the list or else from the description, without those that
        --val-from-train sets aside, and only of the classes of `only_shots`. None if unknown."""
        if self.there is not None:
            counts = np.bincount(self.there.labels)
            counts = counts - (number_set_aside(counts, val_from_train) if val_from_train else 0)
            split = self.info.get("shot_split", STANDARD_SPLIT)
            return int(counts[shot_groups(counts, split)[only_shots]].sum() if only_shots else counts.sum())
        if only_shots:
            return None
        published = (self.info.get("published") or {}).get("lists", {}).get("train", {})
        images = self.info.get("training_images", published.get("lines"))
        return images and round(images * (1 - (val_from_train or 0)))

    @property
    def num_classes(self) -> int | None:
        """The number of classes; None if neither the description nor the list states it."""
        if self.there is None and not {"class_names", "num_classes"} & set(self.info):
            return None
        largest = int(self.there.labels.max()) if self.there is not None else 0
        return count_classes(self.info, self.folder / "info.yaml", largest)


@dataclass(frozen=True)
class Estimate:
    """The remaining work of a run: training images and seconds, None if unknown."""

    state: str
    images: int | None = 0
    seconds: float | None = 0.0


def estimate(run: Run, progress: RunStatus, lists: dict[str, TrainingList], rate: Rate) -> Estimate:
    """Estimate the remaining work of one run. `lists`: those of each dataset."""
    if progress.result:
        return Estimate("done")
    if progress.fault:
        return Estimate(f"not possible: {progress.fault}")
    training = lists[run.config.data.data]
    try:
        data, epochs = run.config.data, total_epochs(run.config) - progress.epochs_done
        of_list = training.images(data.val_from_train, data.only_shots)
        images = images_left(run.config.optim.batch_size, epochs, data.limit_train, of_list)
        if images is not None:
            images *= 2 if run.config.method.trains_on_pairs else run.config.method.views_in_training
        per_second = None if images is None else rate.of(run.config, training.num_classes)
        state = f"epoch {progress.epochs_done} of {total_epochs(run.config)}" if progress.epochs_done else "to do"
        if progress.epochs_done == total_epochs(run.config):
            state = "trained, to be evaluated" if progress.epochs_done else "to be evaluated"
        state += ", lists missing" if training.there is None else ""
    except UserError as fault:
        return Estimate(f"not possible: {fault}")
    return Estimate(state, images, images / per_second if per_second else None)


def images_left(batch_size: int, epochs: int, limit: int | None, images: int | None) -> int | None:
    """Return the training images that a run processes in `epochs`. Incomplete batches are dropped. Raises UserError if the
    list contains less than one batch."""
    if images is None:
        return None
    used = min(images, limit or images)
    if used < batch_size:
        raise UserError(f"{used} training images are fewer than --batch-size {batch_size}")
    return used // batch_size * batch_size * epochs


def plan(lines: list[TableRow], rate: Rate, devices: int, device: str) -> str:
    """Return the text of `--plan`. `devices`: the number of devices that share the work."""
    names_of_data = {run.config.data.data for line in lines for run, _ in line.runs if run.config}
    lists = {data: TrainingList(data) for data in sorted(names_of_data)}
    names = list(dict.fromkeys(name for line in lines for name in line.row.settings))
    by_run = {run: estimate(run, p, lists, rate) for line in lines for run, p in line.runs}
    cells = []
    for line in lines:
        of_runs = [by_run[run] for run, _ in line.runs]
        settings = [as_text(line.row.settings[name]) if name in line.row.settings else "" for name in names]
        seeds = " ".join(str(run.seed) for run, _ in line.runs)
        cells.append(
            [line.row.recipe, line.row.marked, *settings, seeds, *_amount(of_runs, devices), _states(line, of_runs)]
        )
    done = sum(one.state == "done" for one in by_run.values())
    images, seconds = _amount([one for one in by_run.values() if None not in (one.images, one.seconds)], devices)
    unknown = sum(None in (one.images, one.seconds) for one in by_run.values())
    total = f"{len(by_run)} runs, {done} done; to process: {images} training images, {seconds}"
    total += f", unknown for {unknown} more" if unknown else ""
    how = f"{rate.stated:g} images per second" if rate.stated else f"training steps only, measured now on {device}"
    shared = f"; {devices} devices share the work" if devices > 1 else ""
    parts = [markdown(["recipe", "row", *names, "seeds", "images", "time", "state"], cells)]
    parts.append(
        f"{note_on_marks(lines)}{total}\ntime: {how}, without reading images and without evaluation; other work on the "
        f"device makes it longer{shared}"
    )
    missing = [how_to_prepare(one.folder, one.info) for one in lists.values() if one.there is None]
    if missing:
        parts.append("\n".join(["missing lists:", *(f"  {how}" for how in dict.fromkeys(missing))]))
    return "\n\n".join(parts)


def _states(line: TableRow, of_runs: list[Estimate]) -> str:
    """Return the state of all runs if they have the same, else each state with its seeds."""
    seeds: dict[str, list[str]] = {}
    for (run, _), one in zip(line.runs, of_runs, strict=True):
        seeds.setdefault(one.state, []).append(str(run.seed))
    if len(seeds) == 1:
        return next(iter(seeds))
    return "; ".join(f"{state}: seed {' '.join(of_state)}" for state, of_state in seeds.items())


def _amount(of_runs: list[Estimate], devices: int) -> tuple[str, str]:
    """Return the sums of training images and of time as text."""
    images, seconds = [one.images for one in of_runs], [one.seconds for one in of_runs]
    return (
        "n/a" if None in images else f"{sum(images):,}",
        "n/a" if None in seconds else duration(sum(seconds) / devices),
    )
