"""Datasets of photos for benchmarks that read files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance


def write_photos(folder: Path, images: int, width: int, height: int, suffix: str, classes: int) -> list[str]:
    """Write `images` files in class folders and return their paths below `folder`. File i is of class i % classes.

    Each is another part of one of scikit-learn's two photos, resized, brighter or darker. JPEGs have quality 90, 4:2:0."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    generator, paths = np.random.default_rng(0), []
    coding = dict(quality=90, subsampling="4:2:0") if suffix == "jpg" else {}
    for i in range(images):
        photo, share = photos[i % len(photos)], generator.uniform(0.7, 1)
        part_width, part_height = share * photo.width, share * photo.height
        left = generator.uniform(0, photo.width - part_width)
        top = generator.uniform(0, photo.height - part_height)
        box = left, top, left + part_width, top + part_height
        part = photo.resize((width, height), Image.Resampling.LANCZOS, box=box)
        paths.append(f"{i % classes}/{i}.{suffix}")
        (folder / paths[-1]).parent.mkdir(parents=True, exist_ok=True)
        ImageEnhance.Brightness(part).enhance(generator.uniform(0.8, 1.2)).save(folder / paths[-1], **coding)
    return paths


def write_dataset(
    folder: Path, lines: int, width: int, height: int, suffix: str, classes: int, files: int | None = None
) -> Path:
    """Write a dataset and its images to one folder and return it: a list of `lines` over `files` photos (None: one per
    line)."""
    paths = write_photos(folder, min(lines, files or lines), width, height, suffix, classes)
    listed = (paths[i % len(paths)] for i in range(lines))
    (folder / "train.txt").write_text("".join(f"{path} {path.partition('/')[0]}\n" for path in listed))
    (folder / "info.yaml").write_text("image_root: .\n")
    return folder
