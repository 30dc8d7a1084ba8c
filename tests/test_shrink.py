"""`prepare shrink`: a copy of a dataset with smaller images, which trains as the original does."""

import io
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import TINY_FLAGS, make_dataset
from PIL import Image, features

from reslt.augment.decode import decode
from reslt.data.datasets import load_dataset
from reslt.prepare import __main__, shrink  # noqa: F401 (before `project`, which moves what is loaded)
from reslt.prepare.folder import write_lists


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Return a smooth image, so that ways to shrink it differ by no more than compression does."""
    across, down = np.meshgrid(np.linspace(0, 250, width), np.linspace(0, 250, height))
    return Image.fromarray(np.stack([across, down, 250 - across], 2).astype(np.uint8)).convert(mode)


@pytest.fixture
def photos(project, tmp_path) -> Path:
    """data_lists/photos: six photos of two classes, two of them in two lists, and one file that is already small."""
    root, folder = tmp_path / "photos", project / "data_lists" / "photos"
    lists = {
        "train": [("a/1.jpg", 0), ("a/2 x.jpg", 0), ("b/3.png", 1), ("b/small.jpg", 1)],
        "val": [("b/3.png", 1), ("a/4.jpg", 0)],
        "test": [("b/5.bmp", 1), ("a//4.jpg", 0)],
    }
    for i, path in enumerate(["a/1.jpg", "a/2 x.jpg", "b/3.png", "a/4.jpg", "b/5.bmp"]):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        photo(400, 200 + 10 * i).save(root / path)
    photo(60, 20).save(root / "b/small.jpg", quality=50)
    write_lists(folder, lists)
    info = {"description": "mine", "class_names": ["x", "y"], "images": "elsewhere", "defaults": {"lr": 0.3}}
    (folder / "info.yaml").write_text(yaml.safe_dump(info))
    (folder / "local.yaml").write_text(yaml.safe_dump({"image_root": str(root)}))
    return root


def files_in(folder: Path) -> dict[str, bytes]:
    """Return {path: content} of all files except locks."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_copy_has_the_same_lists_and_each_image_once_with_a_short_side_of_size(
    photos, run_prepare, project, tmp_path, workers
):
    small = tmp_path / "small"
    done = run_prepare("shrink", "photos", "--size", 32, "--output", small, "--workers", workers)
    assert (done.code, done.err.count("Error")) == (0, 0), done
    assert "5 shrunk, 1 copied" in done.out
    assert "train.py --data photos_32" in done.out
    assert files_in(small).keys() == files_in(photos).keys() | {"shrink.yaml"}
    for i, path in enumerate(["a/1.jpg", "a/2 x.jpg", "b/3.png", "a/4.jpg", "b/5.bmp"]):
        with Image.open(small / path) as image, Image.open(photos / path) as original:
            assert image.size == (round(400 * 32 / (200 + 10 * i)), 32)
            assert (image.format, image.mode) == (original.format, "RGB")
            expected = np.asarray(original.resize(image.size, Image.Resampling.LANCZOS)).astype(int)
            assert np.abs(np.asarray(image) - expected).mean() < 2
    assert (small / "b/small.jpg").read_bytes() == (photos / "b/small.jpg").read_bytes()
    before, after = load_dataset("photos"), load_dataset("photos_32")
    assert {s: images.digest for s, images in after.lists.items()} == {s: i.digest for s, i in before.lists.items()}
    assert (after.class_names, after.num_classes) == (("x", "y"), 2)
    assert after.image_root.folder == small
    info = yaml.safe_load((project / "data_lists/photos_32/info.yaml").read_text())
    assert info.keys() == {"description", "class_names", "defaults"}
    assert info["defaults"] == {"lr": 0.3}


def test_existing_copies_stay_and_only_missing_ones_are_made(photos, run_prepare, tmp_path):
    small = tmp_path / "small"
    command = ("shrink", "photos", "--size", 32, "--output", small, "--workers", 0)
    assert run_prepare(*command).code == 0
    whole = files_in(small)
    (small / "a/1.jpg").unlink()
    (small / "b/3.png").write_bytes(b"mine")
    again = run_prepare(*command)
    assert again.code == 0, again
    assert "1 shrunk" in again.out
    assert "5 already there" in again.out
    assert files_in(small) == {**whole, "b/3.png": b"mine"}


def test_an_image_appears_whole_or_not_at_all_and_a_full_disk_is_reported(photos, run_prepare, tmp_path, monkeypatch):
    small = tmp_path / "small"
    save, full = Image.Image.save, [True]

    def failing(image, file, *args, **options):
        if full and "3.png" in str(file):
            Path(file).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        return save(image, file, *args, **options)

    monkeypatch.setattr(Image.Image, "save", failing)
    command = ("shrink", "photos", "--size", 32, "--output", small, "--workers", 0)
    done = run_prepare(*command)
    assert done.code == 2
    assert f"{small / 'b/3.png'}: No space left on device; fix this, then repeat the command" in done.err
    assert files_in(small).keys() == {"shrink.yaml", "a/1.jpg", "a/2 x.jpg"}
    full.clear()
    assert run_prepare(*command).code == 0
    assert files_in(small).keys() == files_in(photos).keys() | {"shrink.yaml"}


def test_bad_images_are_named_with_every_line_and_can_be_repaired_or_skipped(photos, run_prepare, tmp_path):
    small, half = tmp_path / "small", (photos / "a/4.jpg").read_bytes()
    (photos / "a/4.jpg").write_bytes(half[: len(half) // 2])
    (photos / "a/1.jpg").unlink()
    (photos / "b/small.jpg").write_bytes((photos / "b/small.jpg").read_bytes()[:700])
    command = ("shrink", "photos", "--size", 32, "--output", small, "--workers", 0)
    done = run_prepare(*command)
    problems = [line for line in done.out.splitlines() if line.startswith("PROBLEM")]
    assert done.code == 1
    expected = [("train", 1, "a/1.jpg"), ("train", 4, "b/small.jpg"), ("val", 2, "a/4.jpg"), ("test", 2, "a//4.jpg")]
    assert len(problems) == len(expected)
    for line, (split, number, path) in zip(problems, expected, strict=True):
        assert f"{split}.txt:{number}: {photos / path}: " in line
    assert "there is no such image" in problems[0]
    assert "truncated" in problems[1]
    assert "truncated" in problems[2]
    assert files_in(small).keys() == {"shrink.yaml", "a/2 x.jpg", "b/3.png", "b/5.bmp"}
    kept = load_dataset("photos_32", bad_images="skip")
    assert {split: len(images) for split, images in kept.lists.items()} == {"train": 2, "val": 1, "test": 1}
    for path in ("a/1.jpg", "a/4.jpg", "b/small.jpg"):
        photo(300, 300).save(photos / path)
    repaired = run_prepare(*command)
    assert repaired.code == 0, repaired
    assert "3 shrunk, 3 already there" in repaired.out or "3 already there, 3 shrunk" in repaired.out
    assert load_dataset("photos_32", bad_images="skip").left_out == {}


def test_a_dataset_without_a_readable_image_is_the_users_error_and_makes_no_copy(
    photos, run_prepare, project, tmp_path
):
    (tmp_path / "empty").mkdir()
    command = ("shrink", "photos", "--size", 32, "--output", tmp_path / "small", "--workers", 0)
    done = run_prepare(*command, "--data-dir", tmp_path / "empty")
    assert done.code == 2
    assert "no image could be read; the first: " in done.err
    assert "train.txt:1: there is no such image" in done.err
    assert not (project / "data_lists/photos_32").exists()
    assert run_prepare(*command).code == 0


def test_no_file_of_another_dataset_or_setting_is_overwritten(photos, run_prepare, project, tmp_path):
    def shrunk(size, output, *more):
        return run_prepare("shrink", "photos", "--size", size, "--output", output, "--workers", 0, *more)

    assert shrunk(32, tmp_path / "small").code == 0
    before = files_in(project / "data_lists"), files_in(tmp_path / "small"), files_in(photos)
    for done, message in (
        (shrunk(32, photos, "--name", "new"), "it exists and contains other files"),
        (shrunk(48, tmp_path / "small"), "it contains images made differently"),
        (shrunk(32, tmp_path / "small", "--quality", 80), "it contains images made differently"),
        (shrunk(32, tmp_path / "other", "--name", "photos"), "--name photos: "),
        (shrunk(32, tmp_path / "other"), "--name photos_32: "),
        (shrunk(32, tmp_path / "other", "--name", "../new"), "--name ../new: give a plain name"),
        (shrunk(0, tmp_path / "other"), "--size 0: give a whole number from 1"),
        (shrunk(32, tmp_path / "other", "--quality", 101), "--quality 101: give a whole number from 1 to 100"),
    ):
        assert done.code == 2, done
        assert message in done.err
    assert (files_in(project / "data_lists"), files_in(tmp_path / "small"), files_in(photos)) == before


def test_a_copy_is_upright_without_metadata_and_in_the_format_of_the_content(project, run_prepare, tmp_path):
    """The content decides the format, not the name. A GIF cannot represent the colors and becomes a PNG."""
    root, exif = tmp_path / "photos", Image.Exif()
    exif[0x0112] = 6  # stored rotated by 90 degrees
    root.mkdir()
    large = photo(300, 200)
    large.save(root / "turned.jpg", exif=exif, comment=b"mine", icc_profile=b"no profile")
    large.save(root / "a.png", "JPEG")
    large.save(root / "b.gif")
    large.save(root / "c.jpg", "MPO", save_all=True, append_images=[large])
    large.convert("RGBA").save(root / "d.png")
    large.save(root / "e.tif", exif=exif)
    large.convert("L").save(root / "f.pgm")
    formats = {"turned.jpg": "JPEG", "a.png": "JPEG", "b.gif": "PNG", "c.jpg": "JPEG", "d.png": "PNG", "e.tif": "TIFF"}
    formats["f.pgm"] = "PPM"
    for feature, name, kind in (
        ("webp", "g.webp", "WEBP"),
        ("avif", "h.avif", "AVIF"),
        ("jpg_2000", "i.jp2", "JPEG2000"),
    ):
        if features.check(feature):
            large.save(root / name)
            formats[name] = kind
    write_lists(project / "data_lists" / "kinds", {"train": [(name, i % 2) for i, name in enumerate(formats)]})
    small = tmp_path / "small"
    done = run_prepare(
        "shrink", "kinds", "--size", 20, "--output", small, "--data-dir", root, "--name", "k", "--workers", 0
    )
    assert done.code == 0, done
    for name, kind in formats.items():
        whole = decode(root / name)
        with Image.open(small / name) as image:
            turned = name in ("turned.jpg", "e.tif")
            assert (image.format, image.size) == (kind, (20, 30) if turned else (30, 20))
            assert "icc_profile" not in image.info
            assert image.info.get("comment") != b"mine"
            assert image.getexif().get(0x0112, 1) == 1
        expected = np.asarray(whole.resize(image.size, Image.Resampling.LANCZOS)).astype(int)
        assert np.abs(np.asarray(decode(small / name)) - expected).mean() < 4


def test_quality_applies_to_jpegs(photos, run_prepare, tmp_path):
    sizes = []
    for quality in (30, 95):
        output = tmp_path / str(quality)
        done = run_prepare(
            "shrink", "photos", "--size", 96, "--output", output, "--quality", quality, "--name", f"q{quality}"
        )
        assert done.code == 0, done
        sizes.append((output / "a/1.jpg").stat().st_size)
        with Image.open(output / "a/1.jpg") as image:
            reference = io.BytesIO()
            photo(32, 32).save(reference, "JPEG", quality=quality)
            assert image.quantization == Image.open(reference).quantization
    assert sizes[0] < sizes[1]


def test_a_copy_of_a_dataset_in_any_folder_trains(project, run_prepare, run_script, tmp_path):
    folder = make_dataset(tmp_path / "flowers", side=40, splits=("val", "test"))
    small = tmp_path / "small"
    done = run_prepare("shrink", folder, "--size", 16, "--output", small, "--workers", 0)
    assert done.code == 0, done
    assert "58 shrunk" in done.out  # 16 + 8 + 4 and twice 3 x 5
    with Image.open(small / "train/2/3.png") as image:
        assert image.size == (16, 16)
    trained = run_script("train", "--data", "flowers_16", *TINY_FLAGS, "--epochs", 1, "--output", tmp_path / "runs")
    assert trained.code == 0, trained
    assert "many" in trained.out
