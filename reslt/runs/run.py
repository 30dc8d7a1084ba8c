"""One run on disk, from its first step to its last table: resuming, checkpoints, summary, results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator
from torch import nn

from reslt.augment.settings import ImageSettings
from reslt.config.stages import Stage, stage_at
from reslt.core.errors import Stopped, UserError
from reslt.core.log import logger, warn_once
from reslt.core.phases import BOOKKEEPING, CHECKPOINT, EVALUATION, Phases
from reslt.data.datasets import Dataset
from reslt.evaluation.evaluate import NotFiniteError
from reslt.evaluation.tables import Evaluation
from reslt.loading.pipeline import FEATURES, Pipeline
from reslt.runs import console, folder, init_from, teachers
from reslt.runs.calibration import Calibration, fit_calibration, write_calibration
from reslt.runs.checkpoint import Checkpoint
from reslt.runs.resume import adopt, recorded_pipeline, to_resume
from reslt.runs.summary import Summary, best_of
from reslt.runs.writer import Writer
from reslt.training.accelerator import broadcast_from_main, on_every_process, refuse_differences, wait_for_everyone
from reslt.training.state import EpochStats, Progress, TrainState
from reslt.training.teachers import Teachers


class Measure(Protocol):
    """A function that evaluates a list after `epochs_done` epochs, also at the temperature of a calibration if there is one.
    `is_collected`: whether the evaluation's `outputs` contain the logits of every image."""

    def __call__(
        self, split: str, epochs_done: int, calibration: Calibration | None = None, is_collected: bool = False
    ) -> Evaluation: ...


@dataclass
class Run:
    """A run with an open folder. Its methods are called on all processes; the main one writes and prints."""

    path: Path
    accelerator: Accelerator
    description: dict  # the content of config.yaml: config, recipe, paper
    dataset: Dataset
    steps_per_epoch: int
    stages: tuple[Stage, ...]
    keep: int  # checkpoints in addition to the best
    checkpoint: Checkpoint | None = None  # from which it resumes
    state: TrainState | None = None
    is_forced: bool = False  # --force-resume: config.yaml is written again
    phases: Phases = field(default_factory=lambda: Phases(is_of_process=False))
    summary: Summary = field(init=False)
    saved: tuple[int, int] | None = None  # epoch (from 0) and steps of the newest checkpoint

    def __post_init__(self) -> None:
        self.settings = dict(self.description["config"])  # as stored in checkpoints
        self.named = {name: self.settings[name] for name in ("model", "seed")}  # for result.json
        self.named["train_digest"] = self.dataset.digests["train"]
        self.is_main = self.accelerator.is_main_process
        self.epochs = self.stages[-1].end
        self.writer = Writer(self.phases)

    def find_checkpoint(self, force: bool) -> None:
        """Find the checkpoint to resume from. Raises UserError as `to_resume` does."""
        classes, steps = self.dataset.classes, self.steps_per_epoch
        self.checkpoint, messages = broadcast_from_main(
            lambda: to_resume(self.path, self.settings, classes, steps, self.stages, force),
            self.accelerator,
            "verifying the checkpoint to resume from",
        )
        for message in messages:
            logger.warning(message)
        self.is_forced = force

    def initialize(self, model: nn.Module, place: str | None) -> None:
        """If a place on disk is given, load its weights into a model, on the CPU, and record their digest. If the run resumes,
        the place is not read, since the checkpoint contains the digest, and the weights that do not train. Raises UserError
        as `init_from.initialize` does."""
        if self.checkpoint:
            digest = self.checkpoint.state["config"].get("init_digest")
            if self.settings.get("tune") == "head":  # features are computed before the rest of the state is restored
                self.checkpoint.load_evaluated(model)
        elif place is None:
            return
        else:
            classes = self.dataset.classes
            digest, text = on_every_process(
                lambda: init_from.initialize(model, place, classes), "the weights to start from"
            )
            refuse_differences({place: digest}, "weight")
            logger.info(console.opening(init=text))
        if isinstance(digest, str):
            self.description["init_digest"] = self.settings["init_digest"] = self.named["init_digest"] = digest
        if self.is_main and not self.checkpoint:
            folder.describe(self.path, self.description)

    def read_teachers(self, places: Sequence[str] | None, images: ImageSettings) -> Teachers | None:
        """Read the teachers, on the CPU, and record the digests of their weights. None if none are named. Raises UserError as
        `teachers.read_teachers` does, and if the run to resume began with other teachers."""
        read, digests = None, None
        if places is not None:
            drawn_by = self.settings.get("val_from_train"), self.settings["seed"]
            read, digests = on_every_process(
                lambda: teachers.read_teachers(places, self.dataset, images, drawn_by), "the teachers"
            )
            refuse_differences(dict(zip(places, digests, strict=True)), "weight")
        if self.checkpoint and not self.is_forced and self.checkpoint.state["config"].get("teacher_digests") != digests:
            raise UserError(
                f"--resume: {self.path} was started with other teachers, or without any; give the same --teachers, start "
                "another run with --experiment NAME, or resume anyway with --force-resume"
            )
        if digests:
            for recorded in (self.description, self.settings, self.named):
                recorded["teacher_digests"] = digests
            if self.is_main and not self.checkpoint:
                folder.describe(self.path, self.description)
        return read

    @property
    def first_epoch(self) -> int:
        """The epoch (from 0) that the checkpoint to resume from belongs to; 0 for a fresh start."""
        return self.checkpoint.progress_in(self.steps_per_epoch).epoch if self.checkpoint else 0

    @property
    def recorded(self) -> str | None:
        """How a run to resume loads images: "on" (resident), "off" or "features"; None for a fresh start."""
        return self.checkpoint and recorded_pipeline(self.checkpoint)

    def record(self, pipeline: Pipeline) -> None:
        """Record in checkpoints how images are loaded, since the random numbers of augmentation depend on it."""
        self.settings["data_on_device"] = "on" if pipeline.is_resident else "off"
        if pipeline.training == FEATURES:
            self.settings["on_features"] = True

    def begin(self, state: TrainState) -> Progress:
        """Set the state to train, restore the checkpoint if there is one, and return the progress from which to continue.

        A run without any epoch, which only evaluates given weights, writes its checkpoint now."""
        self.state, progress, epochs_done = state, Progress(), 0
        if self.checkpoint:
            state.restore(self.checkpoint, self.accelerator)
            progress, epochs_done = self.checkpoint.progress_in(self.steps_per_epoch), self.checkpoint.epochs_done
            self.saved = progress.epoch, progress.steps
        has_ended_epoch = progress.steps == self.steps_per_epoch  # if its row is missing, it is written again
        self.summary = Summary(self.path, epochs_done, self.is_main, has_ended_epoch)
        if self.checkpoint:
            wait_for_everyone(self.accelerator)  # all processes have read it
            if self.is_main:
                adopt(self.checkpoint, self.steps_per_epoch)
                folder.choose_best(self.path, self._scores(), verify=True)
                if self.is_forced:
                    folder.describe(self.path, self.description)
        is_evaluated = broadcast_from_main(  # the folder of another machine may lack the summary
            lambda: has_ended_epoch and self.summary.has(progress.epoch + 1), self.accelerator
        )
        if self.epochs == 0 and self.checkpoint is None:
            self.save(progress, is_awaited=True)
        return Progress(progress.epoch + 1) if is_evaluated else progress

    def save(self, progress: Progress, is_awaited: bool = False) -> None:
        """Wait until the previous checkpoint is written, then take one of the present state. It is written while the run
        continues, or, if `is_awaited`, before this returns. Raises UserError if the weights are not finite, or if writing
        fails; an error of the previous checkpoint is raised here too."""
        with self.phases.within(CHECKPOINT):
            self._finish_writing()
            write = folder.begin_save(
                self.path,
                self.state,
                self.settings,
                self.accelerator,
                progress,
                self.steps_per_epoch,
                self.dataset.classes,
                self.keep,
                stage_at(self.stages, progress.epoch).number,
            )
            if self.is_main:
                self.writer.submit(write)
            self.saved = progress.epoch, progress.steps
            if is_awaited:
                self._finish_writing()

    def _finish_writing(self) -> None:
        """Wait for the writer. If it failed, all processes raise its error, since the launcher would kill the others if one
        ended alone."""
        broadcast_from_main(self.writer.finish, self.accelerator, "writing a checkpoint", folder.SAVE_SECONDS)

    def evaluate(self, measure: Measure, splits: list[str], progress: Progress) -> dict[str, Evaluation]:
        """Evaluate lists at the end of an epoch with `measure`. If logits are not finite before the last epoch, the list is
        left out with a warning, since training may recover. If a signal stops the evaluation, the epoch has a checkpoint."""
        results, epochs_done = {}, progress.epoch + 1
        with self.phases.within(EVALUATION):
            for split in splits:
                try:
                    results[split] = measure(split, epochs_done)
                except NotFiniteError as fault:
                    self._finish_writing()  # if the weights are not finite, this raises an error that names them
                    if epochs_done == self.epochs:
                        raise
                    logger.warning(f"{fault}; training continues")
                except Stopped:
                    if self.saved != (progress.epoch, progress.steps):
                        self.save(progress)
                    self._finish_writing()
                    raise
        return results

    def end_epoch(self, progress: Progress, lr: float, stats: EpochStats, results: dict[str, Evaluation]) -> Progress:
        """Add the ended epoch to the summary, print it, save a checkpoint if the epoch is the best so far, and point `best` at
        the best checkpoint. Return the progress at the start of the next epoch."""
        epoch = progress.epoch
        self.phases.begin(BOOKKEEPING)
        line = self.summary.add(epoch, lr, stats, results)
        if self.is_main:
            logger.info(line)
        is_best = broadcast_from_main(lambda: best_of(self._scores()) == epoch + 1, self.accelerator)
        is_saved = self.saved == (epoch, progress.steps)
        if is_best and not is_saved:
            self.save(progress)
        if self.is_main and (is_best or is_saved):
            scores = self._scores()
            self.writer.submit(lambda: self._choose_best(scores), "best checkpoint")
        self._log(lambda: self.accelerator.log(self.summary.rows[-1], step=epoch))
        self.phases.end_epoch()
        return Progress(epoch + 1)

    def _choose_best(self, scores: dict[int, float]) -> None:
        folder.choose_best(self.path, scores)
        folder.prune(self.path, self.keep)

    def _scores(self) -> dict[int, float]:
        """Return {epoch (from 1): score on the validation list} of the stage that was evaluated last: the weights of earlier
        stages are not the result of the method."""
        scores = self.summary.scores("val")
        stage = stage_at(self.stages, max(scores, default=1) - 1)
        return {epoch: score for epoch, score in scores.items() if stage.begin < epoch <= stage.end}

    def conclude(self, results: dict[str, Evaluation], measure: Measure) -> None:
        """Print the final tables, of the last epoch and of the best on the validation list if there is one, and write
        result.json and per_class.csv. `results`: those of the last epoch.

        For both checkpoints, a temperature is fitted on the validation list, and stored; not if the tables are of that list
        itself, since a calibration error on the images of the fit would mislead."""
        self.phases.begin("final tables")
        self._finish_writing()
        final = self.dataset.final_split(self.settings.get("final_split"))
        if final is None:
            return
        is_calibrated = final != "val" and "val" in self.dataset.lists

        def checkpoints() -> tuple[Checkpoint, Checkpoint]:
            best = folder.find(self.path)
            needs_last = is_calibrated and best.epochs_done < self.epochs
            return folder.find(self.path, "last") if needs_last else best, best

        last, best = broadcast_from_main(
            checkpoints, self.accelerator, "reading the best checkpoint", folder.SAVE_SECONDS
        )
        is_drawn = bool(self.settings.get("log_with"))  # figures of the last of the outcomes

        def measured(found: Checkpoint) -> Evaluation:
            collects = is_drawn and found is best
            if is_calibrated:
                return self._calibrated(final, measure, found, collects)
            return measure(final, found.epochs_done, is_collected=collects)

        outcomes = [(None if is_calibrated or (is_drawn and last is best) else results.get(final)) or measured(last)]
        if best.epochs_done < self.epochs:
            best.load_evaluated(self.state.evaluated)
            outcomes.append(measured(best))
        if self.is_main:
            logger.info(console.conclude(self.path, outcomes, self.summary, self.description["paper"]))
            if is_drawn:
                self._log(lambda: self._log_figures(outcomes[-1]))

    def _log_figures(self, evaluation: Evaluation) -> None:
        """Add the figures and numbers of the report on an evaluation to the record of the trackers."""
        from reslt.evaluation.analysis import Analysis, pictures, scalars
        from reslt.evaluation.predictions import SavedPredictions
        from reslt.runs.report_page import log_pictures

        predictions = SavedPredictions.of(evaluation)
        temperature = evaluation.accuracies.temperature
        analysis = Analysis(predictions, self.dataset.classes, temperature, self.summary.rows)
        step = evaluation.settings["epoch"] - 1
        log_pictures(self.accelerator.trackers, pictures(analysis), scalars(analysis), step)

    def _log(self, log: Callable[[], None]) -> None:
        """Call `log`; if it fails, warn once, and continue."""
        try:
            log()
        except Exception as fault:  # trackers raise many types: no network, a full disk
            warn_once("trackers", f"--log-with: {type(fault).__name__}: {fault}; its record may lack values")

    def _calibrated(self, final: str, measure: Measure, found: Checkpoint, is_collected: bool) -> Evaluation:
        """Fit a temperature on the validation list, and evaluate the final list with it. `found`: the checkpoint of the
        present weights; `is_collected`: whether outputs are collected for each image."""
        fitted = measure("val", found.epochs_done, is_collected=True)

        def fit() -> Calibration | None:
            calibration = fit_calibration(found, fitted)
            if calibration is not None:
                try:
                    write_calibration(self.path, calibration)
                except OSError as fault:  # the tables are printed nevertheless
                    logger.warning(f"{self.path}: the temperature cannot be stored: {fault.strerror}")
            return calibration

        calibration = broadcast_from_main(fit, self.accelerator, "fitting the temperature", folder.SAVE_SECONDS)
        return measure(final, found.epochs_done, calibration, is_collected)
