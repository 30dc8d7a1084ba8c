"""A tiny long-tailed dataset of real PNG files, and the entry points called in this process."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REAL_IMAGES = os.environ.get("RESLT_DATA")  # read now: tests run without it
TRAIN_COUNTS = (16, 8, 4)
TINY_FLAGS = [
    "--model",
    "cifar_resnet20",
    "--model-kwargs",
    "width=0.5",
    "--branch",
    "bn",
    "--crop",
    "pad",
    "--crop-padding",
    "2",
    "--img-size",
    "16",
    "--epochs",
    "2",
    "--batch-size",
    "8",
    "--lr",
    "0.05",
    "--warmup-epochs",
    "0",
    "--workers",
    "0",
    "--checkpoint-hist",
    "9",
]


@dataclass
class Outcome:
    """What an entry point printed and how it ended."""

    code: int
    out: str
    err: str


def make_dataset(folder: Path, counts=TRAIN_COUNTS, test_images=5, splits=("test",), side=16) -> Path:
    """Lists and images of len(counts) classes, each a colour plus noise. Returns the folder of lists."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    colours = generator.integers(40, 215, (len(counts), 3))
    for split in ("train", *splits):
        lines = []
        for c, count in enumerate(counts):
            for i in range(count if split == "train" else test_images):
                path = f"{split}/{c}/{i}.png"
                (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
                pixels = colours[c] + generator.integers(-40, 40, (side, side, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / path)
                lines.append(f"{path} {c}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    (folder / "info.yaml").write_text("image_root: images\n")
    return folder


@pytest.fixture
def tiny(tmp_path) -> Path:
    return make_dataset(tmp_path / "tiny")


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
        capsys.readouterr()
        code = 0
        try:
            {"train": train, "evaluate": evaluate}[script].main()
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def real_images() -> Path:
    """The folder that RESLT_DATA names, with cifar100/{train,test}/<class>/ and lists/<name>/."""
    if not REAL_IMAGES or not (Path(REAL_IMAGES) / "cifar100").is_dir():
        pytest.skip("RESLT_DATA names no folder with the real CIFAR-100 images (cifar100/, lists/)")
    return Path(REAL_IMAGES)
