"""Recipes, finished runs and processes of `reslt.reproduce`, for the tests that share them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import yaml

from reslt.reproduce.rows import create_run

PROJECT = Path(__file__).resolve().parents[1]
SMALL = {
    "model": "cifar_resnet20", "model_kwargs": {"channels": [4, 8, 16]}, "branch": "bn", "crop": "pad", "img_size": 16,
    "epochs": 2, "batch_size": 8, "warmup_epochs": 0, "lr": 0.05, "workers": 0,
}  # fmt: skip


def write_recipe(file: Path, data: Path | str, **settings) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"data": str(data), **SMALL, **settings}
    if settings.get("method") == "ce":
        del content["branch"]  # a recipe must not state what its method does not use
    file.write_text(yaml.safe_dump(content))
    return file


def pretend(recipe, seed: int, output: Path, last: dict, *, best=None, chosen=None, tables=None, settings=None) -> Path:
    """Write the folder that a finished run would leave. `last`, `best` and `chosen` are the accuracies of the last epoch,
    of the best epoch on test, and of the epoch that a validation list chose."""
    run, _ = create_run(str(recipe), settings or {}, seed, str(output), [])
    folder = run.config.run_folder
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"config": run.config.stored(), "versions": {"torch": "9.8", "timm": "7.6"}})
    )
    if chosen:
        (folder / "checkpoints/best").write_text("1-1\n")
    rows = [] if chosen else [last, *([best] if best else [])]
    pd.DataFrame([{"epoch": e, **row} for e, row in enumerate(rows, 1)]).to_csv(folder / "summary.csv", index=False)
    result = {"split": "test", "epoch": 2, "last": last, "best_on_test": None if chosen else {"epoch": 2}}
    standard = {c: last[f"test_{c}"] for c in ("many", "medium", "few", "all")}
    result["tables"] = tables or {"standard": {"reslt (fused)": chosen or standard}}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def unpadded(table: str) -> str:
    """Return a Markdown table without the spaces that align its columns."""
    return re.sub(" +", " ", table)


def accuracies(*values) -> dict[str, float]:
    """Return the columns of summary.csv for many, medium, few and all."""
    return {f"test_{c}": value for c, value in zip(("many", "medium", "few", "all"), values, strict=True)}


def started(*arguments) -> subprocess.Popen:
    """Start the command as a process of its own. Ctrl-C reaches it even if the tests run in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", "reslt.reproduce", *map(str, arguments)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_until(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes() -> dict[int, list[str]]:
    """Return {process: its fields in /proc/<process>/stat after the name: state, parent, group, session, ...}."""
    found = {}
    for stat in [Path(f"/proc/{p}/stat") for p in os.listdir("/proc") if p.isdigit()]:
        try:
            found[int(stat.parent.name)] = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def in_session(leader: int) -> list[int]:
    """Return the processes of a run: the leader of the session and the workers that it forked."""
    return [p for p, (state, _, _, session, *_) in processes().items() if int(session) == leader and state != "Z"]


def runs_of(command: int) -> list[int]:
    """Return the runs of a command: its children that lead a session of their own."""
    return [p for p, (_, parent, _, session, *_) in processes().items() if (int(parent), int(session)) == (command, p)]
