"""Two-dimensional embeddings of the features of test images (figure 9 of the paper)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from reslt.reproduce.jobs import run_evaluation
from reslt.reproduce.rows import Run

NUMBERS_OF_CLASSES = (10, 20)
IMAGES_PER_CLASS = 100
SEED = 0  # of the choice of classes, and of t-SNE
PERPLEXITY = 30


def record_features(run: Run, folder: Path) -> Path | None:
    """Return the file of `evaluate.py --features` for a run, in `folder`. It is written unless it exists and is newer than
    the run's result. None, with a message, if that fails."""
    name, source = run.config.run.experiment, run.config.run_folder
    file = folder / f"{name}.safetensors"
    if file.is_file() and file.stat().st_mtime >= (source / "result.json").stat().st_mtime:
        return file
    log = folder / f"{name}.log"
    print(f"features of {run.name}, log: {log}", flush=True)
    if reason := run_evaluation(run, ["--features", file, "--output", folder / name], log):
        print(f"warning: no features of {run.name}: {reason}", file=sys.stderr)
        return None
    return file


def read_features(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the (N, D) features and (N,) labels of a file of `evaluate.py --features`."""
    tensors = load_file(file)
    return tensors["features"], tensors["labels"]


def choose_classes(labels: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the ascending class indices of each panel: 10 and 20 drawn with a fixed seed; all if there are no more."""
    classes = np.unique(labels)
    for number in NUMBERS_OF_CLASSES:
        if len(classes) <= number:
            yield classes
            return
        yield np.sort(np.random.default_rng(SEED).choice(classes, number, replace=False))


def embed(features: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) features, (N,) labels -> the t-SNE of the first IMAGES_PER_CLASS images of each of `classes`: (M, 2) points and
    (M,) labels."""
    from sklearn.manifold import TSNE

    chosen = np.concatenate([np.flatnonzero(labels == index)[:IMAGES_PER_CLASS] for index in classes])
    perplexity = min(PERPLEXITY, max(1, (len(chosen) - 1) // 3))
    tsne = TSNE(init="pca", perplexity=perplexity, random_state=SEED)
    return tsne.fit_transform(features[chosen]), labels[chosen]
