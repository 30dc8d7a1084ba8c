"""A practitioner's path, command by command: from folders of photos to a model that another program loads.

Slow: two to three minutes on 2 cores. If RESLT_DATA names a folder with the ImageNet weights of EfficientNet-Lite0
(weights/tf_efficientnet_lite0.safetensors), a head is trained on those features; if not, a tiny network trains from
scratch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageFilter

from tests.conftest import REAL_IMAGES

PROJECT = Path(__file__).resolve().parents[1]
CLASSES = [
    "bullseye",
    "brick",
    "checkers",
    "chevron",
    "crescent",
    "daisy",
    "ladder",
    "lattice",
    "polka_dots",
    "ring",
    "stripes",
    "triangle",
]
COUNTS = np.round(200 * (4 / 200) ** (np.arange(12) / 11)).astype(int)  # 200 .. 4
LATER = "zigzag"
SIDE = 96


def draw(kind: str, random: np.random.Generator) -> Image.Image:
    """Draw a photo of a pattern with random colors, size, rotation, blur and noise on a random gradient."""
    low, high = np.sort(random.integers(0, 255, (2, 3)), 0)
    ramp = np.linspace(0, 1, SIDE)[:, None, None] * np.ones((1, SIDE, 1))
    image = Image.fromarray((low + (high - low) * ramp).astype(np.uint8)).rotate(int(random.integers(4)) * 90)
    layer, color = Image.new("L", (SIDE, SIDE)), tuple(int(c) for c in random.integers(0, 255, 3))
    pen, c, r = ImageDraw.Draw(layer), SIDE // 2, int(random.integers(26, 40))
    box = (c - r, c - r, c + r, c + r)
    step = int(random.integers(10, 16))
    match kind:
        case "bullseye":
            for k in range(r, 4, -8):
                pen.ellipse((c - k, c - k, c + k, c + k), fill=255 * ((r - k) // 8 % 2 == 0))
        case "brick":
            for row, y in enumerate(range(0, SIDE, step)):
                for x in range(-step, SIDE, 2 * step):
                    pen.rectangle(
                        (x + row % 2 * step + 1, y + 1, x + row % 2 * step + 2 * step - 2, y + step - 2), fill=255
                    )
        case "checkers":
            for i in range(0, SIDE, step):
                for j in range(0, SIDE, step):
                    pen.rectangle((i, j, i + step - 1, j + step - 1), fill=255 * ((i + j) // step % 2))
        case "chevron":
            for y in range(-SIDE, SIDE, 2 * step):
                pen.line([(0, y + SIDE // 2), (c, y + SIDE), (SIDE, y + SIDE // 2)], fill=255, width=step // 2)
        case "crescent":
            pen.ellipse(box, fill=255)
            pen.ellipse((c - r + 14, c - r, c + r + 14, c + r), fill=0)
        case "daisy":
            for k in range(7):
                x, y = c + 0.6 * r * np.cos(k * 0.9), c + 0.6 * r * np.sin(k * 0.9)
                pen.ellipse((x - r / 3, y - r / 3, x + r / 3, y + r / 3), fill=255)
        case "ladder":
            pen.line([(c - r, 0), (c - r, SIDE)], fill=255, width=5)
            pen.line([(c + r, 0), (c + r, SIDE)], fill=255, width=5)
            for y in range(0, SIDE, step):
                pen.line([(c - r, y), (c + r, y)], fill=255, width=4)
        case "lattice":
            for k in range(0, SIDE, step):
                pen.line([(k, 0), (k, SIDE)], fill=255, width=2)
                pen.line([(0, k), (SIDE, k)], fill=255, width=2)
        case "polka_dots":
            for x in range(0, SIDE, 2 * step):
                for y in range(0, SIDE, 2 * step):
                    pen.ellipse((x, y, x + step, y + step), fill=255)
        case "ring":
            pen.ellipse(box, outline=255, width=6)
        case "stripes":
            for y in range(0, SIDE, 2 * step):
                pen.rectangle((0, y, SIDE, y + step), fill=255)
        case "triangle":
            pen.polygon([(c, c - r), (c + r, c + r), (c - r, c + r)], fill=255)
        case "zigzag":
            for y in range(0, SIDE, 3 * step):
                pen.line([(x, y + step * (x // step % 2)) for x in range(0, SIDE + step, step)], fill=255, width=4)
    turned = layer.rotate(float(random.uniform(-25, 25)), resample=Image.BILINEAR)
    image.paste(color, mask=turned.point(lambda value: int(0.85 * value)))
    image = image.filter(ImageFilter.GaussianBlur(float(random.uniform(0, 1.2))))
    noisy = np.asarray(image, np.float32) + random.normal(0, 10, (SIDE, SIDE, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def add_photos(folder: Path, kind: str, count: int, random: np.random.Generator) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    first = len(list(folder.iterdir()))
    for i in range(first, first + count):
        draw(kind, random).save(folder / f"{i:04}.jpg", quality=90)


@pytest.fixture(scope="module")
def weights() -> Path | None:
    """ImageNet weights of EfficientNet-Lite0, None if RESLT_DATA has none."""
    file = Path(REAL_IMAGES or "none") / "weights/tf_efficientnet_lite0.safetensors"
    return file if file.is_file() else None


@pytest.mark.slow
def test_from_folders_of_photos_to_a_model_that_timm_alone_loads(tmp_path, weights):
    photos, new, random = tmp_path / "photos", tmp_path / "new", np.random.default_rng(0)
    for kind, count in zip(CLASSES, COUNTS, strict=True):
        add_photos(photos / kind, kind, count, random)
        add_photos(new / kind, kind, 5, random)
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "RESLT_CACHE": str(tmp_path / "cache")}
    environment.pop("RESLT_DATA", None)
    (tmp_path / "data_lists").mkdir()

    def run(*words: object, **changes: str) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=tmp_path,
            env=environment | changes,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    # Make lists from folders, and check them
    printed = run("-m", "reslt.prepare", "own", "--from", photos, "--name", "patterns", "--val-per-class", 5)
    assert "--recipe own_finetune" in printed
    assert "no problem" in run("-m", "reslt.prepare", "check", "patterns", "--decode")

    # Fine-tune (only the head, for a first result) with the flags that suit the class counts; evaluate
    [command] = [line for line in printed.splitlines() if "train.py" in line]
    advised = command.split("train.py")[1].split()
    assert advised[:4] == ["--data", "patterns", "--recipe", "own_finetune"]
    flags = ["--data", "patterns", *advised[advised.index("--logit-adjust") :], "--img-size", "96", "--workers", "0"]
    if weights is None:
        start = ["--no-pretrained"]
        flags += ["--model", "test_efficientnet.r160_in1k", "--epochs", "4"]
    else:
        start = ["--pretrained-file", weights]
        flags += ["--model", "tf_efficientnet_lite0", "--tune", "head", "--epochs", "30"]
    run(PROJECT / "train.py", *flags, *start, "--experiment", "first")
    first = tmp_path / "output/first"
    run(PROJECT / "evaluate.py", "--ckpt", first, "--save-predictions", "--workers", 0)
    result = json.loads((first / "result.json").read_text())
    assert result["class_mean"] > (80 if weights else 100 / 12)
    assert 0 < result["temperature"] < 100

    # Write a report
    page = tmp_path / "report.html"
    run("-m", "reslt.report", first, "--html", page)
    text = page.read_text(encoding="utf-8")
    assert all(kind in text for kind in CLASSES)
    assert 'src="http' not in text

    # Predict new photos
    run("-m", "reslt.predict", "--ckpt", first, new, "--output", "predictions.csv", "--workers", 0)
    rows = pd.read_csv(tmp_path / "predictions.csv")
    assert len(rows) == 60
    right = np.mean([Path(path).parent.name == name for path, name in zip(rows["path"], rows["name_1"], strict=True)])
    assert right > (0.7 if weights else 1 / 12)

    # Add fifteen photos and a class; continue from the trained model
    add_photos(photos / CLASSES[-1], CLASSES[-1], 5, random)
    add_photos(photos / LATER, LATER, 10, random)
    printed = run("-m", "reslt.prepare", "own", "--from", photos, "--extend", "patterns")
    assert "15 new" in printed
    assert LATER in printed
    second = tmp_path / "output/second"
    run(PROJECT / "train.py", *flags, "--init-from", first, "--experiment", "second")
    assert json.loads((second / "result.json").read_text())["class_mean"] > (80 if weights else 100 / 13)

    # Export it: timm alone computes the probabilities that this suite predicts
    run("-m", "reslt.export", second, "exported", "--format", "timm")
    run("-m", "reslt.predict", "--ckpt", second, new, "--output", "second.jsonl", "--topk", 13, "--workers", 0)
    (tmp_path / "alone").mkdir()
    shutil.copytree(tmp_path / "exported", tmp_path / "alone/exported")
    (tmp_path / "alone/predict.py").write_text(WITH_TIMM_ALONE)
    run("alone/predict.py", new, PYTHONPATH="")
    here = [json.loads(line) for line in (tmp_path / "second.jsonl").read_text().splitlines()]
    there = json.loads((tmp_path / "alone/probabilities.json").read_text())
    for row in here:
        pairs = dict(zip(row["names"], row["probabilities"], strict=True))
        assert pairs == pytest.approx(there[Path(row["path"]).relative_to(new).as_posix()], abs=1e-5)


WITH_TIMM_ALONE = """
import json, pathlib, sys
import timm, torch
from PIL import Image

folder, new = pathlib.Path(__file__).parent, pathlib.Path(sys.argv[1])
sys.modules["reslt"] = None  # importing it would raise
config = json.loads((folder / "exported/config.json").read_text())
model = timm.create_model(f"local-dir:{folder / 'exported'}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model), is_training=False)
found = {}
for file in sorted(new.rglob("*.jpg")):
    with torch.inference_mode():
        logits = model(transform(Image.open(file).convert("RGB"))[None])[0]
    probabilities = (logits / config.get("temperature", 1.0)).softmax(0).tolist()
    found[file.relative_to(new).as_posix()] = dict(zip(model.pretrained_cfg["label_names"], probabilities))
(folder / "probabilities.json").write_text(json.dumps(found))
"""
