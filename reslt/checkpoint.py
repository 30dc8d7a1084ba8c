"""A run's folder on disk: config.yaml, and checkpoints that appear whole or not at all. Safetensors and JSON, no pickle.

    checkpoints/<epochs done>-<steps done>/  model.safetensors, ema.safetensors, optimizer.safetensors, state.json
    checkpoints/last, checkpoints/best       text files that hold the name of one of these folders

state.json holds the configuration, the counters, and a SHA-256 digest of each file beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3

from reslt.config import FIELDS, Config, build, raise_all
from reslt.errors import UserError

HARMLESS = {
    "data_dir",
    "workers",
    "output",
    "experiment",
    "resume",
    "overwrite",
    "checkpoint_hist",
    "log_with",
    "eval_split",
}
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy", "safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder and the content of state.json. Weights are read on request."""

    folder: Path
    state: dict

    @property
    def epochs_done(self) -> int:
        return self.state["epochs_done"]

    @property
    def num_classes(self) -> int:
        return self.state["num_classes"]

    @property
    def run(self) -> Path:
        """The folder of the run; of a checkpoint that was copied elsewhere, its own."""
        return self.folder.parents[1] if self.folder.parent.name == "checkpoints" else self.folder

    def config(self, **changes) -> Config:
        """The run's configuration for use without training, with changes. Raises UserError for a value out of range."""
        only_for_training = dict(pretrained=False, pretrained_file=None, resume=None, overwrite=False, log_with=None)
        values = {k: v for k, v in self.state["config"].items() if k in FIELDS} | only_for_training | changes
        where = {k: "--" + k.replace("_", "-") if k in changes else str(self.folder / "state.json") for k in values}
        config, faults = build(values, where)
        raise_all(faults)
        return config

    def load_evaluated(self, model: torch.nn.Module) -> None:
        """Put the weights that count into a model: the moving average's where the run keeps one."""
        model.load_state_dict(self.tensors(self.evaluated_weights))

    @property
    def evaluated_weights(self) -> str:
        """'ema' where the run keeps a moving average, else 'model'."""
        return "ema" if (self.folder / "ema.safetensors").is_file() else "model"

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of 'model', 'ema' or 'optimizer', on the CPU."""
        return load_file(self.folder / f"{name}.safetensors")


@dataclass
class TrainState:
    """What a run must keep to go on: model, moving average, optimizer, the scaler of fp16."""

    model: torch.nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    num_classes: int

    @property
    def evaluated(self) -> torch.nn.Module:
        """The weights that count: the moving average where there is one."""
        return self.ema.module if self.ema else self.model

    def restore(self, checkpoint: Checkpoint) -> int:
        """Put a checkpoint's state back. Returns how many epochs are done."""
        self.model.load_state_dict(checkpoint.tensors("model"))
        if self.ema:
            self.ema.module.load_state_dict(checkpoint.tensors("ema"))
        rest = checkpoint.state["optimizer"]
        values = {int(index): dict(rest) for index, rest in rest["state"].items()}
        for key, tensor in checkpoint.tensors("optimizer").items():
            index, _, name = key.partition(".")
            values[int(index)][name] = tensor
        self.optimizer.load_state_dict({"state": values, "param_groups": rest["param_groups"]})
        if self.scaler is not None and checkpoint.state["scaler"]:
            self.scaler.load_state_dict(checkpoint.state["scaler"])
        return checkpoint.epochs_done


@contextmanager
def open_run(config: Config, recipe: str | None, paper: dict) -> Iterator[Path]:
    """Create the run's folder, or enter it to resume. A new folder is removed again when the run fails before its
    first checkpoint. Raises UserError where another run stands in its place."""
    folder = run_folder(config)
    if (folder / "config.yaml").exists() and not config.resume:
        if not config.overwrite:
            raise UserError(
                f"{folder} holds a run already; --resume auto goes on with it, --overwrite replaces it, "
                "--experiment NAME starts another"
            )
        shutil.rmtree(folder)
    is_new = not folder.exists()
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        content = {"config": _plain(config), "recipe": recipe, "paper": paper, "versions": _versions()}
        _replace(folder / "config.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        yield folder
    except BaseException:
        if is_new and not (folder / "checkpoints" / "last").exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def run_folder(config: Config) -> Path:
    """The folder of `--resume DIR`, else <output>/<experiment>."""
    return Path(config.resume) if config.resume not in (None, "auto") else Path(config.output) / config.experiment


def save(run: Path, state: TrainState, config: Config, *, epochs_done: int, steps_done: int, is_best=False) -> None:
    """Write a checkpoint, then point `last`, and `best` if it is, at it."""
    name = f"{epochs_done}-{steps_done}"
    final, folder = run / "checkpoints" / name, run / "checkpoints" / f".{name}.writing"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    optimizer_tensors, optimizer_rest = _split_optimizer(state.optimizer.state_dict())
    parts = {"model": state.model.state_dict(), "optimizer": optimizer_tensors}
    if state.ema:
        parts["ema"] = state.ema.module.state_dict()
    for part, content in parts.items():
        on_cpu = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in content.items()}
        save_file(on_cpu, folder / f"{part}.safetensors")
    files = sorted(folder.iterdir())
    content = {
        "epochs_done": epochs_done,
        "steps_done": steps_done,
        "num_classes": state.num_classes,
        "is_best": is_best,
        "config": _plain(config),
        "optimizer": optimizer_rest,
        "scaler": state.scaler.state_dict() if state.scaler else None,
        "sha256": {file.name: _digest(file) for file in files},
    }
    (folder / "state.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    for path in [*files, folder / "state.json", folder]:
        _fsync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(folder, final)
    _fsync(final.parent)
    _point_at(Checkpoint(final, content))


def _point_at(checkpoint: Checkpoint) -> None:
    for pointer in ["last"] + ["best"] * checkpoint.state["is_best"]:
        _replace(checkpoint.folder.parent / pointer, checkpoint.folder.name + "\n")


def prune(run: Path, keep: int) -> None:
    """Remove all checkpoints but the `keep` newest and those that a pointer names."""
    named = {p.read_text().strip() for p in (run / "checkpoints").iterdir() if p.is_file()}
    for folder in _newest_first(run)[keep:]:
        if folder.name not in named:
            shutil.rmtree(folder)


def load(folder: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises UserError where a file is missing or differs from its digest."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        damaged = [name for name, digest in state["sha256"].items() if _digest(folder / name) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise UserError(f"{folder}: not a whole checkpoint ({type(fault).__name__}: {fault})") from None
    if damaged:
        raise UserError(f"{folder}: {damaged[0]} differs from the digest in state.json; the checkpoint is damaged")
    return Checkpoint(folder, state)


def find(ckpt: Path, which: str | None = None) -> Checkpoint:
    """The checkpoint that a user names: a run's folder, a checkpoint's folder or a file in it. Raises UserError.

    In a run's folder `which` is 'last', 'best', or None: the best where a validation list chose one, else the last."""
    if ckpt.is_file():
        ckpt = ckpt.parent
    if (ckpt / "state.json").is_file():
        return load(ckpt)
    if which is None:
        which = "best" if (ckpt / "checkpoints" / "best").is_file() else "last"
    pointer = ckpt / "checkpoints" / which
    if pointer.is_file():
        return load(pointer.parent / pointer.read_text().strip())
    if which == "best" and (ckpt / "checkpoints" / "last").is_file():
        raise UserError(f"{ckpt} has no best checkpoint: it is chosen on a validation list alone; use --which last")
    raise UserError(
        f"{ckpt}: there is no checkpoint; give the folder of a run (output/NAME), or of one of its checkpoints"
    )


def to_resume(run: Path, config: Config) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies (None where there is none), and what was skipped and why.

    Raises UserError where the configuration differs from the checkpoint's in more than harmless keys."""
    skipped = []
    for folder in _newest_first(run):
        try:
            checkpoint = load(folder)
        except UserError as fault:
            skipped.append(str(fault))
            continue
        before, now = checkpoint.state["config"], json.loads(json.dumps(_plain(config)))
        changed = [
            f"{k}: {before.get(k)!r} -> {now[k]!r}" for k in now if k not in HARMLESS and before.get(k) != now[k]
        ]
        if changed:
            raise UserError(
                f"--resume: {run} was started with another configuration ({'; '.join(changed)}); give the old values, or "
                "start another run with --experiment NAME"
            )
        _point_at(checkpoint)  # the run may have died before it did
        return checkpoint, skipped
    return None, skipped


def _split_optimizer(content: dict) -> tuple[dict, dict]:
    """A torch optimizer's state dict -> ({'<parameter>.<name>': tensor}, the rest as JSON)."""
    tensors, rest = {}, {}
    for index, values in content["state"].items():
        tensors |= {f"{index}.{name}": v for name, v in values.items() if isinstance(v, torch.Tensor)}
        rest[str(index)] = {name: v for name, v in values.items() if not isinstance(v, torch.Tensor)}
    return tensors, {"state": rest, "param_groups": content["param_groups"]}


def _newest_first(run: Path) -> list[Path]:
    found = [p for p in (run / "checkpoints").glob("*-*") if p.is_dir() and not p.name.startswith(".")]
    return sorted(found, key=lambda p: [int(part) for part in p.name.split("-")], reverse=True)


def _plain(config: Config) -> dict:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    _fsync(temporary)
    os.replace(temporary, file)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
