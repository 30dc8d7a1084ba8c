"""A tiny long-tailed dataset of real PNG files, and fixtures that call the commands in this process."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

ALONE = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True)  # an Accelerator of one process
REAL_IMAGES = os.environ.get("RESLT_DATA")  # read before tests remove it
TRAIN_COUNTS = (16, 8, 4)
TINY_FLAGS = [
    "--model", "cifar_resnet20", "--model-kwargs", "channels=8,16,32", "--crop", "pad", "--crop-padding", "2",
    "--img-size", "16", "--epochs", "2", "--batch-size", "8", "--lr", "0.05", "--warmup-epochs", "0", "--workers", "0",
    "--checkpoint-seconds", "0", "--checkpoint-hist", "9",
]  # fmt: skip


def pytest_configure(config) -> None:
    """Set one thread per process before torch is loaded, since test processes run side by side. Hide the GPU, since its
    sums differ from run to run and tests compare bits; CUDA_VISIBLE_DEVICES=0 makes it visible."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def caplog(caplog, monkeypatch):
    """pytest's caplog with the messages of the suite's logger, even if a command of an earlier test has disconnected that
    logger from the root logger."""
    logger = logging.getLogger("reslt")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def pytest_terminal_summary(terminalreporter) -> None:
    """Print how many code blocks of the documentation run, after their tests."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    if any("test_docs.py" in getattr(report, "nodeid", "") for report in reports):
        from tests.docs.pages import pages, totals

        terminalreporter.write_line(totals(pages()))


@dataclass
class Outcome:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def make_dataset(folder: Path, counts=TRAIN_COUNTS, test_images=5, splits=("test",), side=16) -> Path:
    """Write lists and images of len(counts) classes, each a color plus noise. Return the folder of lists."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    colors = generator.integers(40, 215, (len(counts), 3))
    for split in ("train", *splits):
        lines = []
        for label, count in enumerate(counts):
            for i in range(count if split == "train" else test_images):
                path = f"{split}/{label}/{i}.png"
                (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
                pixels = colors[label] + generator.integers(-40, 40, (side, side, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / path)
                lines.append(f"{path} {label}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    (folder / "info.yaml").write_text("image_root: images\ndefaults: {branch: bn}\n")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(tmp_path_factory):
    """Keep images that tests decode out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RESLT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """The cache folder of one test alone."""
    monkeypatch.setenv("RESLT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path) -> Path:
    return make_dataset(tmp_path / "tiny")


def at_update(monkeypatch, step: int, do: Callable[[], None]) -> None:
    """Call `do` just before the optimizer takes step `step` of the run, counted from 0."""
    from reslt.training.step import TrainStep

    original = TrainStep.update

    def update(self, window, now):
        if now == step:
            do()
        return original(self, window, now)

    monkeypatch.setattr(TrainStep, "update", update)


def train_until(run_script, monkeypatch, step: int, *flags) -> Outcome:
    """Run train.py until a SIGTERM just before the optimizer takes step `step`; the run finishes this step and stops."""
    with monkeypatch.context() as patched:
        at_update(patched, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        outcome = run_script("train", *flags)
    assert outcome.code == 128 + signal.SIGTERM, outcome.err
    return outcome


@pytest.fixture
def run_script(monkeypatch, capsys):
    """run_script('train', '--data', ...) -> Outcome, in this process."""
    import evaluate
    import train

    monkeypatch.delenv("RESLT_DATA", raising=False)

    def run(script: str, *arguments) -> Outcome:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        entry_points = {"train": train, "evaluate": evaluate}
        try:
            return outcome_of(lambda _: entry_points[script].main(), (), capsys)
        finally:  # or later tests would train with this one's precision
            AcceleratorState._reset_state(reset_partial_state=True)

    return run


def train_once(run_script, data: Path, name: str, *flags) -> Path:
    """Return the folder of a run on a tiny dataset, trained beside it by the first test that needs it."""
    run = data.parent / "runs" / name
    if not run.exists():
        where = ("--data", data, "--output", run.parent, "--experiment", name)
        outcome = run_script("train", *TINY_FLAGS, *flags, *where)
        assert outcome.code == 0, outcome.err
    return run


def last_checkpoint(run: Path) -> Path:
    """Return the folder of a run's last checkpoint."""
    return run / "checkpoints" / (run / "checkpoints/last").read_text().strip()


def fault(*flags) -> str:
    """Return the error in these flags of train.py that is found before torch is loaded."""
    from reslt.config.resolve import resolve
    from reslt.core.errors import UserError

    with pytest.raises(UserError) as raised:
        resolve([str(flag) for flag in flags])
    return str(raised.value)


@pytest.fixture
def real_images() -> Path:
    """The folder that RESLT_DATA names, with cifar100/{train,test}/<class>/ and lists/<name>/."""
    if not REAL_IMAGES or not (Path(REAL_IMAGES) / "cifar100").is_dir():
        pytest.skip("RESLT_DATA names no folder with the real CIFAR-100 images (cifar100/, lists/)")
    return Path(REAL_IMAGES)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with a data_lists/ of its own, so that tests do not touch the real one. The descriptions of the benchmarks
    are the project's."""
    root = tmp_path / "project"
    (root / "data_lists").mkdir(parents=True)
    monkeypatch.setenv("RESLT_LISTS", str(root / "data_lists"))
    monkeypatch.delenv("RESLT_DATA", raising=False)
    return root


def outcome_of(main, arguments: tuple, capsys) -> Outcome:
    """Call a command's `main` in this process."""
    capsys.readouterr()
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        code = ended.code
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err)


@pytest.fixture
def run_prepare(capsys):
    """run_prepare('check', ...) -> Outcome of `python -m reslt.prepare`, in this process."""
    from reslt.prepare.__main__ import main

    return lambda *arguments: outcome_of(main, arguments, capsys)


@pytest.fixture
def reproduce(capsys, monkeypatch):
    """reproduce('--table', 5, ...) -> Outcome of `python -m reslt.reproduce` in this process. Its runs are processes of
    their own."""
    from reslt.reproduce.__main__ import main

    monkeypatch.delenv("RESLT_DATA", raising=False)
    return lambda *arguments: outcome_of(main, arguments, capsys)


@pytest.fixture
def recipes(tmp_path, monkeypatch) -> Path:
    """A folder that replaces the one with the project's recipes."""
    from reslt.config import recipes as known_recipes

    monkeypatch.setattr(known_recipes, "RECIPES", tmp_path / "recipes")
    return tmp_path / "recipes"


@pytest.fixture(scope="session")
def photo(tmp_path_factory) -> Path:
    """A real photo, reduced to 96 x 64 pixels, as JPEG."""
    from sklearn.datasets import load_sample_images

    file = tmp_path_factory.mktemp("photo") / "photo.jpg"
    Image.fromarray(load_sample_images().images[0]).resize((96, 64)).save(file, quality=90)
    return file


def lay_out(root: Path, lists: dict[Path, list[tuple[str, int]]], photo: Path) -> None:
    """Write list files, and a photo below `root` for each of their paths. Each file has another content: bytes after a
    JPEG's end, which are not decoded."""
    for file, lines in lists.items():
        file.write_text("".join(f"{path} {label}\n" for path, label in lines))
        for path, _ in lines:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            if not (root / path).exists():
                (root / path).write_bytes(photo.read_bytes() + path.encode())
