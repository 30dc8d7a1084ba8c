"""Training that runs share. Several methods begin with the same first stage: cRT, LWS and tau-normalization, for example, with
plain cross-entropy. Other runs differ only in their prediction. Also the training of the teachers that a run requires. Imports
no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from reslt.config.command_line import without_flags
from reslt.config.methods import METHODS, PARTS_OF_A_METHOD
from reslt.config.parts import PARTS
from reslt.config.recipes import list_recipes
from reslt.config.resolve import resolve
from reslt.config.schema import PREDICTION, Config
from reslt.config.yaml_files import read_yaml
from reslt.core.errors import UserError
from reslt.data.groups import SHOTS
from reslt.reproduce.rows import Row, Run, as_flag, create_run

# Settings that do not affect a first stage
OF_LATER_STAGES = ("stage2_epochs", "stage2_lr", "router_topk", *PREDICTION)
FIRST_STAGE, TEACHER = "first stage of other rows", "teacher of other rows"
OF_PLACES = ("experiment", "output", "overwrite", "resume", "force_resume", *OF_LATER_STAGES)


def share_first_stages(rows: list[Row], output: str, flags: list[str]) -> list[Row]:
    """Return rows in which runs start from another run that trains the same: that of their first stage, or of all their stages
    with another prediction. `flags`: those of train.py for every run."""
    stages = FirstStages(output, flags)
    for row in rows:
        for run in row.runs:
            stages.add(run)
    return [replace(row, runs=[stages.shared(run) for run in row.runs]) for row in rows]


def rows_of_required(rows: list[Row]) -> list[Row]:
    """Return a row for each recipe that has no row itself, but runs from which others start or learn."""
    in_rows = dict.fromkeys(run for row in rows for run in row.runs)
    by_recipe: dict[tuple, list[Run]] = {}
    for run in in_rows:
        for required in run.requires:
            if required not in in_rows:
                name = FIRST_STAGE if required is run.first_stage else TEACHER
                found = by_recipe.setdefault((name, required.recipe, *map(str, required.settings.items())), [])
                found += [required] * (required not in found)
    return [
        Row(runs[0].recipe, name, {}, {}, runs, series=name, x=None, axis=None)
        for (name, *_), runs in by_recipe.items()
    ]


def with_teachers(rows: list[Row]) -> list[Row]:
    """Return rows in which each run has a teacher per shot group, if its method requires teachers and none are named. A
    teacher is a run with the same settings, by the method that teaches, on the images of one group."""
    found: dict[Run, Run] = {}
    for run in dict.fromkeys(run for row in rows for run in row.runs):
        lacks = run.config is not None and run.config.method.described.taught_by and run.config.model.teachers is None
        found[run] = _taught(run) if lacks else run
    return [replace(row, runs=[found[run] for run in row.runs]) for row in rows]


def _taught(run: Run) -> Run:
    try:
        teachers = tuple(_teacher(run, shot) for shot in SHOTS)
    except UserError as fault:
        return replace(run, config=None, fault=str(fault))
    places = tuple(str(teacher.config.run_folder) for teacher in teachers)
    config = run.config.changed(teachers=places)
    return replace(run, arguments=(*run.arguments, *as_flag("teachers", places)), config=config, teachers=teachers)


def _teacher(run: Run, shot: str) -> Run:
    """Return the run that trains the teacher of a shot group's classes."""
    arguments = without_flags(list(run.arguments), frozenset({"experiment", "method", *PARTS_OF_A_METHOD}))
    arguments += ["--method", run.config.method.described.taught_by, "--only-shots", shot]
    config = resolve(arguments, ignore_unused=True).config
    experiment = f"{run.config.run.experiment.removesuffix(f'-seed{run.seed}')}-{shot}_teacher-seed{run.seed}"
    arguments = [*without_flags(arguments, config.unused), "--experiment", experiment]
    config = config.changed(experiment=experiment)
    return Run(f"{run.recipe} ({shot} teacher)", run.settings, run.seed, tuple(arguments), config)


class FirstStages:
    """The first stages of the runs of a table, each trained once. `flags`: those of train.py for every run."""

    def __init__(self, output: str, flags: list[str]):
        self.output, self.flags = output, flags
        self.by_key: dict[str, Run] = {}
        self.sharing: dict[Run, Run] = {}  # rows may share runs

    def add(self, run: Run) -> None:
        """Let a run without stages of its own serve as the first stage of others. If several train the same, one that is
        already trained serves, else the first."""
        if run.config is None or _begins_with(run.config):
            return
        other = self.by_key.setdefault(_key(run.config), run)
        if _is_trained_whole(run.config) and not _is_trained_whole(other.config):
            self.by_key[_key(run.config)] = run

    def shared(self, run: Run) -> Run:
        """Return the run, changed to start from the run of its first stage; unchanged if there is none to share, or if it was
        already trained as a whole."""
        if run not in self.sharing:
            self.sharing[run] = self._starting_from(run)
        return self.sharing[run]

    def _starting_from(self, run: Run) -> Run:
        if run.config is None or _is_trained_whole(run.config):
            return run
        if not _begins_with(run.config):
            return self._predicting_with(run)
        try:
            return self._begun_by(run, self._first_stage(run))
        except UserError as fault:
            return replace(run, config=None, fault=str(fault))

    def _predicting_with(self, run: Run) -> Run:
        """Return a run that only predicts, with the weights of another run that trains the same, or of the one that an earlier
        call with more rows chose; the run itself if there is neither."""
        stages = run.config.method.stages or ()
        if run.config.model.init_from or any("epochs" in stage or "reinit" in stage for stage in stages):
            return run  # with zero epochs, its stages would train more
        first = self.by_key[_key(run.config)]
        if any(run.config[name] != first.config[name] for name in PREDICTION):
            return self._begun_by(run, first)
        source = _source_of_same(run.config)
        return run if source is None else self._begun_with(run, source)

    def _begun_by(self, run: Run, first: Run) -> Run:
        # its last epoch, as in a run of both stages, even if validation chose another
        begun = self._begun_with(run, str(first.config.run_folder / "checkpoints" / "last"))
        return replace(begun, first_stage=first)

    def _begun_with(self, run: Run, weights: str) -> Run:
        start = {"init_from": weights, "epochs": 0}
        arguments = without_flags(list(run.arguments), frozenset({*start, "pretrained", "pretrained_file"}))
        arguments += [part for name, value in start.items() for part in as_flag(name, value)]
        config = run.config.changed(**start, pretrained=False, pretrained_file=None)
        return replace(run, arguments=tuple(arguments), config=config)

    def _first_stage(self, run: Run) -> Run:
        """Return the run that trains only the first stage: that of a recipe if there is one, else a new one."""
        method = _begins_with(run.config)
        arguments = without_flags(
            list(run.arguments), frozenset({"experiment", "method", *PARTS_OF_A_METHOD, *OF_PLACES[2:]})
        )
        off = ("router_topk", *PREDICTION)
        arguments += ["--method", method, *(part for name in off for part in as_flag(name, None))]
        arguments += [part for name, value in _own_parts(run.config).items() for part in as_flag(name, value)]
        arguments += ["--output", self.output, "--resume", "auto"]
        config = resolve(arguments, ignore_unused=True).config
        required, found = run.config.flat(), config.flat()
        same = {*PARTS_OF_A_METHOD, *OF_PLACES, "method", *config.unused}
        changed = {name: required[name] for name in required if name not in same and required[name] != found[name]}
        arguments += [part for name, value in changed.items() for part in as_flag(name, value)]
        config = resolve(arguments, ignore_unused=True).config
        key = _key(config)
        if key not in self.by_key:
            self.by_key[key] = self._of_a_recipe(run, key) or self._own(run, config, arguments, key)
        return self.by_key[key]

    def _of_a_recipe(self, run: Run, key: str) -> Run | None:
        data = f"{run.recipe.partition('/')[0]}/"
        for recipe in list_recipes():
            if recipe.startswith(data) and "/" in run.recipe:
                found, _ = create_run(recipe, {}, run.seed, self.output, self.flags)
                if found.config is not None and not _begins_with(found.config) and _key(found.config) == key:
                    return found
        return None

    def _own(self, run: Run, config: Config, arguments: list[str], key: str) -> Run:
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        data, method = config.data.data.strip("/").rpartition("/")[2], config.method.method
        experiment = f"{data}-{config.model.model}-{method}-first_stage-{digest}-seed{run.seed}"
        arguments = without_flags(arguments, config.unused)
        arguments += ["--experiment", experiment]
        return Run(
            f"{run.recipe} (first stage)",
            run.settings,
            run.seed,
            tuple(arguments),
            config.changed(experiment=experiment),
        )


def _begins_with(config: Config) -> str | None:
    """Return the method of a run's first stage, if the run begins like another method and continues with appended stages."""
    begins_with, stages = METHODS[config.method.method].begins_with, list(config.method.stages or ())
    shared = list(METHODS[begins_with].stages) if begins_with else []
    ended = stages[: len(shared)] == shared and all("epochs" in stage for stage in stages[len(shared) :])
    return begins_with if ended and config.model.init_from is None else None


def _own_parts(config: Config) -> dict[str, str]:
    """Return the parts that differ from those of the run's method: its first stage has them too."""
    own, of_method = config.method, METHODS[config.method.method]
    return {kind: getattr(own, kind) for kind in PARTS if getattr(own, kind) != getattr(of_method, kind)}


def _key(config: Config) -> str:
    """Return the settings that determine the weights after a run, including the seed, as text."""
    return _key_of(config.stored())


def _key_of(stored: Mapping[str, object]) -> str:
    return json.dumps({name: value for name, value in stored.items() if name not in OF_PLACES}, sort_keys=True)


def _is_trained_whole(config: Config) -> bool:
    """Return whether a run's folder contains a run that trained its own first stage."""
    file = config.run_folder / "config.yaml"
    try:
        return file.is_file() and _recorded(file).get("init_from") is None
    except (UserError, KeyError, TypeError, AttributeError):
        return True  # its state is read and reported as that of any run


def _source_of_same(config: Config) -> str | None:
    """Return the weights with which an earlier call with more rows started a run without training, if they are those of a run
    that trained the same; else None."""
    try:
        recorded = _recorded(config.run_folder / "config.yaml")
        source = recorded["init_from"]
        trained = _recorded(Path(source).parents[1] / "config.yaml")
        is_same = recorded["epochs"] == 0 and _key_of(trained) == _key(config)
    except (UserError, KeyError, TypeError, AttributeError, IndexError):
        return None
    return source if is_same else None


def _recorded(file: Path) -> dict:
    """Return the configuration in a run's config.yaml. Raises UserError if there is none."""
    return read_yaml(file)["config"]
