"""A run's folder on disk: config.yaml, and checkpoints that appear whole or not at all. Safetensors and JSON, no pickle.

    checkpoints/<epochs done>-<steps done>/  model.safetensors, ema.safetensors, optimizer.safetensors, state.json, SHA256SUMS
    checkpoints/last, checkpoints/best       text files that hold the name of one of these folders

state.json holds the configuration and the counters; `sha256sum -c SHA256SUMS` verifies a checkpoint by hand.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from reslt.config import FIELDS, Config
from reslt.errors import Parser, UserError, entry_point
from reslt.files import locked, whole_folder, write_whole
from reslt.models.create import create_model
from reslt.released import ReleasedCheckpoint
from reslt.sources import add_foreign_flags
from reslt.train_state import TrainState
from reslt.validation import build, raise_all

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
SUMS = "SHA256SUMS"
STATE_KEYS = {"epochs_done", "steps_done", "num_classes", "is_best", "config", "optimizer", "scaler"}
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy", "safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder and the content of state.json. Weights are read on request."""

    folder: Path
    state: dict
    weights: str | None = None  # 'model' or 'ema' where the user named that file

    @property
    def epochs_done(self) -> int:
        """Epochs that are trained."""
        return self.state["epochs_done"]

    @property
    def num_classes(self) -> int:
        """Classes of the dataset that was trained on."""
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
        """Put the weights that count into a model: those named, else the moving average's where the run keeps one."""
        has_average = (self.folder / "ema.safetensors").is_file()
        model.load_state_dict(self.tensors(self.weights or ("ema" if has_average else "model")))

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of 'model', 'ema' or 'optimizer', on the CPU."""
        return load_file(self.folder / f"{name}.safetensors")


@contextmanager
def open_run(config: Config, recipe: str | None, paper: list[dict]) -> Iterator[Path]:
    """Create the run's folder, or enter it to resume. When the run fails before its first checkpoint, a new folder is
    removed and a replaced one comes back. Raises UserError where another process is at work on the run."""
    folder = config.run_folder
    with locked(folder):
        replaced = folder.with_name(f".{folder.name}.replaced")
        if config.overwrite and (folder / "config.yaml").exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(folder, replaced)
        is_new = not folder.exists()
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            for unfinished in (folder / "checkpoints").glob(".*"):  # of a process that was killed while it wrote
                shutil.rmtree(unfinished, ignore_errors=True)
            if not (folder / "config.yaml").exists() or not _newest_first(folder):  # nothing is trained: it begins now
                content = {
                    "config": _plain(config),
                    "recipe": recipe,
                    "paper": paper,
                    "versions": {name: version(name) for name in PACKAGES},
                }
                write_whole(folder / "config.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
            yield folder
        except BaseException:
            if is_new and not (folder / "checkpoints" / "last").exists():
                shutil.rmtree(folder, ignore_errors=True)
                if replaced.exists():
                    os.rename(replaced, folder)
            raise
        finally:
            shutil.rmtree(replaced, ignore_errors=True)


def save(run: Path, state: TrainState, config: Config, *, epochs_done: int, steps_done: int, is_best=False) -> None:
    """Write a checkpoint, then point `last`, and `best` if it is, at it."""
    tensors, described = state.saved()
    counters = {"epochs_done": epochs_done, "steps_done": steps_done, "is_best": is_best}
    final = run / "checkpoints" / f"{epochs_done}-{steps_done}"
    write(final, tensors, counters | described | {"config": _plain(config)})
    for pointer in ["last"] + ["best"] * is_best:
        write_whole(final.parent / pointer, final.name + "\n")


def write(final: Path, tensors: dict[str, dict[str, torch.Tensor]], state: dict) -> None:
    """One checkpoint: a .safetensors file per entry of `tensors`, state.json, the digests. Whole or not at all."""
    with whole_folder(final) as folder:
        for part, named in tensors.items():
            on_cpu = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in named.items()}
            save_file(on_cpu, folder / f"{part}.safetensors")
        (folder / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        sums = [f"{_digest(file)}  {file.name}\n" for file in sorted(folder.iterdir())]
        (folder / SUMS).write_text("".join(sums))


def prune(run: Path, keep: int) -> None:
    """Remove all checkpoints but the `keep` newest and those that a pointer names."""
    named = {p.read_text().strip() for p in (run / "checkpoints").iterdir() if p.is_file()}
    for folder in _newest_first(run)[keep:]:
        if folder.name not in named:
            shutil.rmtree(folder)


def load(folder: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises UserError where a file is missing or differs from its digest."""
    try:
        digests = dict(reversed(line.split("  ", 1)) for line in (folder / SUMS).read_text().splitlines())
        damaged = [name for name, digest in digests.items() if _digest(folder / name) != digest]
        if damaged or not {"model.safetensors", "state.json"} <= set(digests):
            raise ValueError(f"{', '.join(damaged) or 'a file'} differs from its digest in {SUMS}")
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if missing := STATE_KEYS - set(state):
            raise ValueError(f"state.json lacks {', '.join(sorted(missing))}")
        return Checkpoint(folder, state)
    except (OSError, ValueError) as fault:
        raise UserError(f"{folder}: the checkpoint is damaged: {fault}; name another one with --ckpt") from None


def convert(released: ReleasedCheckpoint, model: torch.nn.Module, output: Path) -> Path:
    """Write a checkpoint of the authors' code, put into its model, as one of ours. Returns its folder."""
    epochs = released.epochs_done or 0
    state = {"epochs_done": epochs, "steps_done": 0, "is_best": False, "num_classes": released.num_classes}
    state |= {"config": _plain(released.config()), "optimizer": {"state": {}, "param_groups": []}, "scaler": None}
    write(output, {"model": model.state_dict()}, state)
    return output


def find(ckpt: Path, which: str | None = None) -> Checkpoint:
    """The checkpoint that a user names: a run's folder, a checkpoint's folder or a file in it. Raises UserError.

    In a run's folder `which` is 'last', 'best', or None: the best where a validation list chose one, else the last."""
    pointers, weights = ckpt / "checkpoints", None
    if ckpt.is_file():  # .../12-340/ema.safetensors, .../checkpoints/best
        if ckpt.name in ("last", "best"):
            return find(ckpt.parents[1], ckpt.name)
        if ckpt.name not in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", SUMS):
            raise UserError(f"{ckpt}: not a file of this suite's checkpoints; the authors' need --format released")
        weights = ckpt.stem if ckpt.name in ("model.safetensors", "ema.safetensors") else None
        ckpt = ckpt.parent
    if (ckpt / "state.json").is_file():
        if which:
            raise UserError(
                f"--which {which} chooses among the checkpoints of a run, but {ckpt} is one of them; drop it"
            )
        return replace(load(ckpt), weights=weights)
    if which is None:
        which = "best" if (pointers / "best").is_file() else "last"
    if (pointers / which).is_file():
        return load(pointers / (pointers / which).read_text().strip())
    if which == "best" and (pointers / "last").is_file():
        raise UserError(f"{ckpt} has no best checkpoint: it is chosen on a validation list alone; use --which last")
    raise UserError(
        f"{ckpt}: there is no checkpoint; give the folder of a run (output/NAME), or of one of its checkpoints"
    )


def to_resume(run: Path, config: Config, num_classes: int) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies (None where there is none), and what was skipped and why.

    Raises UserError where the configuration differs from the checkpoint's in more than harmless keys."""
    verified, skipped = [], []
    for folder in _newest_first(run):
        try:
            verified.append(load(folder))
        except UserError as fault:
            skipped.append(str(fault))
    if not verified:
        if skipped:
            raise UserError(
                f"--resume: no checkpoint of {run} verifies ({'; '.join(skipped)}); --overwrite starts again"
            )
        return None, skipped
    newest = verified[0]
    changed = changed_settings(newest.state["config"], config)
    if newest.num_classes != num_classes:
        changed.append(f"classes: {newest.num_classes} -> {num_classes}")
    if changed:
        raise UserError(
            f"--resume: {run} was started with another configuration ({'; '.join(changed)}); give the old values, or "
            "start another run with --experiment NAME"
        )
    # The run may have died before it set its pointers, or they may name what does not verify.
    best = [checkpoint for checkpoint in verified if checkpoint.state["is_best"]]
    for pointer, named in (("last", [newest]), ("best", best)):
        if named:
            write_whole(run / "checkpoints" / pointer, named[0].folder.name + "\n")
        else:
            (run / "checkpoints" / pointer).unlink(missing_ok=True)
    return newest, skipped


def changed_settings(before: dict, config: Config) -> list[str]:
    """['lr: 0.1 -> 0.2', ...]: what a run's stored configuration and this one differ in, but for the harmless keys."""
    before = _plain(Config()) | before  # an older run lacks the settings that were added since
    now = json.loads(json.dumps(_plain(config)))
    return [f"{k}: {before[k]!r} -> {now[k]!r}" for k in now if k not in HARMLESS and before[k] != now[k]]


def _newest_first(run: Path) -> list[Path]:
    found = [p for p in (run / "checkpoints").glob("*-*") if p.is_dir() and not p.name.startswith(".")]
    return sorted(found, key=lambda p: [int(part) for part in p.name.split("-")], reverse=True)


def _plain(config: Config) -> dict:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@entry_point
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m reslt.checkpoint", description="Checkpoints of other code.")
    commands = parser.add_subparsers(dest="command", required=True)
    converted = commands.add_parser("convert", help="write a checkpoint of the authors' code in this suite's format")
    converted.add_argument("file", type=Path, metavar="FILE.pth.tar")
    converted.add_argument("--output", type=Path, required=True, help="folder to write")
    add_foreign_flags(converted)
    given = parser.parse_args(arguments)
    if given.output.exists():
        raise UserError(f"--output {given.output}: it exists; choose another")
    released = ReleasedCheckpoint.read(given.file, given)
    model = create_model(released.config(), released.num_classes)
    released.load_evaluated(model)
    print(f"evaluate it with: python evaluate.py --ckpt {convert(released, model, given.output)}")


if __name__ == "__main__":
    main()
