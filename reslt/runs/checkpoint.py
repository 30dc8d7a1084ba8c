"""One checkpoint on disk: a folder that is written completely or not at all. Safetensors and JSON, no pickle.

    model.safetensors, ema.safetensors, optimizer.safetensors, processes.safetensors, state.json, SHA256SUMS

`processes` exists if several processes trained: it contains the BatchNorm statistics of each. state.json contains the
configuration and the counters. `sha256sum -c SHA256SUMS` verifies a checkpoint by hand."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from reslt.config.checks import build, raise_all
from reslt.config.command_line import key_values
from reslt.config.imports import naming_imports
from reslt.config.methods import unused_settings
from reslt.config.model_arguments import trusted_arguments
from reslt.config.resolve import raise_for_unused
from reslt.config.schema import FIELDS, Config, flag_of
from reslt.core.errors import UserError
from reslt.core.files import atomic_folder, regular_file
from reslt.data.classes import Classes
from reslt.data.classes import fault_of as fault_of_classes
from reslt.models.create import check_model_name
from reslt.models.finite import not_finite
from reslt.models.fold import is_folded
from reslt.training.state import Progress

SUMS = "SHA256SUMS"
PARTS = ("model", "ema", "optimizer", "processes")
NEEDED = {"model.safetensors", "state.json"}


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder and the content of state.json. Weights are read on request."""

    folder: Path
    state: dict
    weights: str | None = None  # 'model' or 'ema' if the user named that file

    @property
    def epochs_done(self) -> int:
        """Number of completed epochs."""
        return self.state["epochs_done"]

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps per epoch when it was written; None: unknown."""
        return self.state.get("steps_per_epoch")

    @property
    def stage(self) -> int:
        """The number of the stage, from 1, in which it was written."""
        return self.state.get("stage", 1)

    @property
    def ended_an_epoch(self) -> bool:
        """Whether it was written at the end of an epoch, not mid-epoch."""
        progress = self.state.get("progress")
        return progress is None or progress["steps"] in (0, self.steps_per_epoch)  # 0: the run has no epoch

    @property
    def steps_of_the_next(self) -> dict[str, int]:
        """{'steps_of_the_next': completed steps of the unfinished epoch}, for result.json; {} at the end of an epoch."""
        return {} if self.ended_an_epoch else {"steps_of_the_next": self.state["progress"]["steps"]}

    def progress_in(self, steps_per_epoch: int) -> Progress:
        """Return the progress of the current epoch, or of the one just ended. If the number of steps per epoch has
        changed or is unknown, a whole epoch comes next."""
        is_known = self.state.get("progress") and self.steps_per_epoch == steps_per_epoch
        return Progress(**self.state["progress"]) if is_known else Progress(epoch=self.epochs_done)

    @property
    def classes(self) -> Classes:
        """The classes of the training dataset."""
        return Classes.read(self.state)

    @property
    def run(self) -> Path:
        """The folder of the run; for a checkpoint that was copied elsewhere, its own."""
        return self.folder.parents[1] if self.folder.parent.name == "checkpoints" else self.folder

    def config(self, **changes) -> Config:
        """Return the run's configuration for use without training, with changes. `model_kwargs`: the typed arguments of the
        model, since a file is not trusted to state them.

        Raises UserError for a value out of range, for a change that the method does not use, for an argument of the model
        that is not typed or differs from training, and for a method or model that a module must register. The message then
        names the modules that the run was trained with; they are not imported."""
        only_for_training = dict(pretrained=False, pretrained_file=None, init_from=None, resume=None, overwrite=False)
        only_for_training |= dict(
            teachers=None, log_with=None, force_resume=False, profile_trace=None, output=".", experiment=None
        )
        typed, faults = key_values(changes.pop("model_kwargs", {}))
        unused = unused_settings(self.state["config"] | changes)
        raise_for_unused(changes, self.state["config"] | changes)
        stored = {k: v for k, v in self.state["config"].items() if k in FIELDS and k not in unused}
        stated = stored.get("model_kwargs", {})
        stored["model_kwargs"], more = trusted_arguments(stated, typed, self.folder / "state.json")
        raise_all(faults + more)
        values = stored | only_for_training | changes
        where = {k: flag_of(k) if k in changes else str(self.folder / "state.json") for k in values}
        with naming_imports(stored.get("imports")):
            config, faults = build(values, where)
            raise_all(faults)
            check_model_name(config.model.model)
        return config

    def load_evaluated(self, model: torch.nn.Module) -> None:
        """Load the weights to evaluate into a model: those that the user named, else those of `evaluated`.

        Raises UserError if they do not fit, or are not finite."""
        part = self.weights or self.evaluated
        tensors = self.tensors(part)
        if bad := not_finite(tensors, model):
            raise UserError(f"{self.folder / part}.safetensors: {bad} is not finite; use another checkpoint")
        try:
            model.load_state_dict(tensors)
        except RuntimeError as fault:
            raise UserError(
                f"{self.folder / part}.safetensors does not fit the model that state.json names: {fault}"
            ) from None

    @property
    def evaluated(self) -> str:
        """The weights to evaluate by default: 'ema' if the run has a moving average, else 'model'."""
        return "ema" if self.has("ema") else "model"

    @property
    def is_best(self) -> bool:
        """Whether it is the checkpoint of its run that the validation list chose."""
        pointer = self.folder.with_name("best")
        return pointer.is_file() and pointer.read_text(encoding="utf-8", errors="replace").strip() == self.folder.name

    @property
    def weights_digest(self) -> str | None:
        """The SHA-256 of the file of the weights to evaluate, from SHA256SUMS; None if that does not state it."""
        name = f"{self.weights or self.evaluated}.safetensors"
        lines = regular_file(self.folder / SUMS).read_text(encoding="utf-8").splitlines()
        return next((line.partition("  ")[0] for line in lines if line.partition("  ")[2] == name), None)

    def has(self, part: str) -> bool:
        """Return whether one of `PARTS` exists."""
        return (self.folder / f"{part}.safetensors").is_file()

    def tensors(self, part: str) -> dict[str, torch.Tensor]:
        """Return the tensors of one of `PARTS`, on the CPU. Raises UserError if they cannot be read."""
        file = self.folder / f"{part}.safetensors"
        try:
            return load_file(regular_file(file))
        except (OSError, SafetensorError) as fault:
            raise UserError(f"{file}: not readable: {fault}") from None


def write(final: Path, tensors: dict[str, dict[str, torch.Tensor]], state: dict, replaces: bool = False) -> None:
    """Write one checkpoint, completely or not at all: a .safetensors file per entry of `tensors`, state.json, and the
    digests. The tensors are contiguous, on the CPU, and each has its own memory.

    Raises UserError if writing fails, or if the folder exists without `replaces`; older checkpoints are not changed."""
    try:
        with atomic_folder(final, replaces) as folder:
            for part, named in tensors.items():
                save_file(named, folder / f"{part}.safetensors")
            (folder / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
            names = sorted(file.name for file in folder.iterdir())
            (folder / SUMS).write_text(_sums(folder, names), encoding="utf-8")
    except (OSError, SafetensorError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) and fault.strerror else fault
        raise UserError(f"{final}: the checkpoint could not be written: {reason}; earlier ones are intact") from None


def load(folder: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises UserError if a file is missing or differs from its digest, or if
    state.json is invalid."""
    try:
        stated = regular_file(folder / SUMS).read_bytes()
        names = [line.partition("  ")[2] for line in stated.decode().splitlines()]
        if wrong := [name for name in names if name != Path(name).name]:
            raise ValueError(f"{SUMS} names {wrong[0][:80]!r}")
        required = {file.name for file in folder.iterdir() if file.suffix == ".safetensors"} | NEEDED
        if missing := required - set(names):
            raise ValueError(f"{SUMS} does not name {', '.join(sorted(missing))}")
        if (now := _sums(folder, names).encode()) != stated:
            stated_lines, found = stated.splitlines(keepends=True), now.splitlines(keepends=True)
            damaged = [name for name, a, b in zip(names, stated_lines, found, strict=True) if a != b]
            raise ValueError(f"{', '.join(damaged)} differs from its digest in {SUMS}")
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if fault := _fault_of(state):
            raise ValueError(f"state.json: {fault}")
        return Checkpoint(folder, state)
    except (OSError, ValueError, RecursionError) as fault:
        raise UserError(f"{folder}: the checkpoint is damaged: {fault}") from None


def at(place: Path) -> Checkpoint:
    """Load the checkpoint of a folder, or of a file in it; model.safetensors or ema.safetensors select the weights to use.

    Raises UserError as `load` does, and for a file that is not part of a checkpoint."""
    if place.is_dir():
        return load(place)
    if place.name not in ("state.json", SUMS, *(f"{part}.safetensors" for part in PARTS)):
        if is_folded(place):
            raise UserError(f"{place}: this is a folded file, not a checkpoint; give the folder of its run")
        raise UserError(
            f"{place}: not a file of this suite's checkpoints; give the folder of a run (output/NAME), or of one of its "
            "checkpoints (the authors' files: evaluate.py --format released, or python -m reslt.checkpoint convert)"
        )
    return replace(load(place.parent), weights=place.stem if place.stem in ("model", "ema") else None)


def _sums(folder: Path, names: list[str]) -> str:
    """Return the content of SHA256SUMS for these files."""
    return "".join(f"{_digest(folder / name)}  {name}\n" for name in names)


def _fault_of(state: object) -> str | None:
    """Return the error in the content of state.json; None if it is valid."""

    def is_count(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    def is_number(value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")

    if not isinstance(state, dict):
        return "it is not a mapping"
    for name in ("epochs_done", "steps_done"):
        if not is_count(state.get(name)):
            return f"{name} is {str(state.get(name))[:80]!r}, not a whole number from 0"
    for name, kinds in (("config", dict), ("optimizer", dict), ("scaler", (dict, type(None)))):
        if name not in state or not isinstance(state[name], kinds):
            return f"{name} is missing, or not a mapping"
    if fault := fault_of_classes(state):
        return fault
    if not is_count(state.get("stage", 1)):
        return f"stage is {str(state['stage'])[:80]!r}, not a whole number"
    optimizer, progress = state["optimizer"], state.get("progress")
    if progress is not None and not is_count(state.get("steps_per_epoch")):
        return f"steps_per_epoch is {str(state.get('steps_per_epoch'))[:80]!r}, not a whole number from 0"
    per_parameter, groups = optimizer.get("state"), optimizer.get("param_groups")
    if not isinstance(per_parameter, dict) or not all(key.isdecimal() for key in per_parameter):
        return "optimizer: state is not a mapping of parameter numbers"
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return "optimizer: param_groups is not a list of mappings"
    if progress is None:
        return None
    if not isinstance(progress, dict) or set(progress) != {field.name for field in fields(Progress)}:
        return "progress lacks a number, or has an extra one"
    sums = progress["loss_sums"], progress["hits"]
    if not all(isinstance(of_each, list) and len(of_each) == len(sums[0]) for of_each in sums):
        return "progress: loss_sums and hits are not lists of the same length"
    if not all(is_number(value) for value in (*sums[0], *sums[1], progress["seconds"], progress["waited"])):
        return "progress contains a value that is not a number"
    if not all(is_count(progress[name]) for name in ("epoch", "steps", "images")):
        return "progress: epoch, steps or images is not a whole number from 0"
    if progress["steps"] > state["steps_per_epoch"]:
        return f"progress: {progress['steps']} steps of an epoch of {state['steps_per_epoch']}"
    return None


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(regular_file(file), "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
