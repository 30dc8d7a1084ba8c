"""Sources of photos: every image is accounted for, and classes have the same order from every source."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import shlex
import sys
import zipfile
from pathlib import Path
from time import process_time
from types import ModuleType

import numpy as np
import pytest
from conftest import Outcome
from PIL import Image, ImageFile

from reslt.augment import decode
from reslt.data.datasets import load_dataset
from reslt.prepare.from_json import from_json
from reslt.prepare.photos import order_classes

# ---- Photos: every image accounted for ----

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".heic", ".webp")  # of the images that these tests write
COLORS = itertools.count(1)


def put(root: Path, *paths: str) -> None:
    """Write an image at each path, each of another color; `ape/{0..2}.png` means three."""
    for pattern in paths:
        head, braces, tail = re.fullmatch(r"([^{]*)(?:\{0\.\.(\d+)\})?(.*)", pattern).groups()
        for i in range(int(braces) + 1) if braces else [""]:
            file, color = root / f"{head}{i}{tail}", next(COLORS)
            file.parent.mkdir(parents=True, exist_ok=True)
            png = io.BytesIO()
            Image.new("RGB", (4, 4), (color >> 16, color >> 8 & 255, color & 255)).save(png, "PNG")
            file.write_bytes(png.getvalue())


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def images_on_disk(root: Path) -> int:
    """Count image files, hidden ones included, below a folder and the folders linked into it, each real folder once."""
    seen, count = set(), 0
    for here, below, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            below.clear()
            continue
        seen.add(real)
        count += sum(name.lower().endswith(IMAGE_ENDINGS) for name in names)
    return count


def balance_of(outcome: Outcome) -> dict:
    """Parse the last line -> {'found': n, 'taken': n, reasons and places: n}, and assert that it adds up."""
    found, taken, left_out, reasons, unseen, places = re.search(
        r"^images: ([\d,]+) found = ([\d,]+) taken \+ ([\d,]+) left out(?: \((.*?)\))? \+ ([\d,]+) not looked at(?: \((.*)\))?$",
        outcome.out,
        re.MULTILINE,
    ).groups()
    parts = {}
    for total, listed in ((left_out, reasons), (unseen, places)):
        named = {part.rpartition(": ")[0]: int(part.rpartition(": ")[2]) for part in (listed or "").split(", ") if part}
        assert sum(named.values()) == int(total)
        parts |= named
    assert int(found) == int(taken) + int(left_out) + int(unseen)
    return {"found": int(found), "taken": int(taken), **parts}


def sizes_of(dataset) -> dict[str, list[int]]:
    """Return {split: images per class}."""
    return {
        split: np.bincount(images.labels, minlength=dataset.num_classes).tolist()
        for split, images in dataset.lists.items()
    }


def split_folders_with_leftovers(root: Path) -> list:
    put(root, "train/ape/{0..3}.png", "train/bat/{0..2}.png", "val/ape/{0..1}.png", "val/bat/0.png")
    put(root, "train/ape/._0.png", ".cache/{0..4}.png")
    write(root / ".DS_Store", "x")
    return []


def flat_validation(root: Path) -> list:
    put(root, "train/ape/{0..3}.png", "train/bat/{0..2}.png", "val/{0..8}.png", "{0..2}.png")
    write(root / "val.csv", "ImageId,Class\n0.png,ape\n")
    return []


def loose_images(root: Path) -> list:
    put(root, "ape/{0..3}.png", "bat/{0..2}.png", "overview.png", "cover.png")
    return []


def folders_below_classes(root: Path) -> list:
    put(root, "ape/{0..1}.png", "ape/indoor/{0..2}.png", "ape/outdoor/day/{0..1}.png", "bat/{0..2}.png")
    return []


def system_folders(root: Path) -> list:
    put(root, "ape/{0..3}.png", "bat/{0..2}.png", "__MACOSX/ape/._{0..3}.png", ".thumbnails/{0..1}.png")
    put(root, "ape/@eaDir/{0..3}.png", "bat/@eaDir/{0..2}.png")
    return []


def two_tables(root: Path) -> list:
    put(root, "ape/{0..3}.png", "bat/{0..2}.png")
    write(root / "a.csv", "file,label\nape/0.png,x\n")
    write(root / "b.csv", "file,label\nape/0.png,y\n")
    return []


def capital_splits(root: Path) -> list:
    put(root, "Train/ape/{0..3}.png", "Train/bat/{0..2}.png", "Valid/ape/0.png", "Valid/bat/0.png", "Test/{0..5}.png")
    return []


def linked_folder(root: Path) -> list:
    put(root, "ape/{0..3}.png")
    put(root.parent / "elsewhere", "{0..2}.png", "more/{0..1}.png")
    (root / "bat").symlink_to(root.parent / "elsewhere")
    (root / "ape/again").symlink_to(root / "ape")
    return []


def splits_beside_empty_folders(root: Path) -> list:
    put(root, "training/ape/{0..3}.png", "training/bat/{0..2}.png", "testing/ape/0.png", "testing/bat/0.png")
    write(root / "annotations/a.xml", "x")
    return []


def table_of_a_part(root: Path) -> list:
    put(root, "photos/{0..9}.png", "unused/{0..3}.png", "unused/deep/0.png", "0.png")
    write(root / "t.csv", "f,c\n" + "".join(f"photos/{i}.png,{'ab'[i % 2]}\n" for i in range(7)))
    return ["--csv", root / "t.csv", "--image-column", "f", "--label-column", "c"]


def table_of_hidden_images(root: Path) -> list:
    put(root, ".store/{0..4}.png", "{0..1}.png")
    write(root / "t.csv", "f,c\n" + "".join(f".store/{i}.png,{'ab'[i % 2]}\n" for i in range(4)))
    return ["--csv", root / "t.csv", "--image-column", "f", "--label-column", "c"]


def json_with_doubtful_images(root: Path) -> list:
    """Image 5 has two annotations of one category, 6 of two categories, 7 none, 8 is not listed."""
    put(root, "images/{0..8}.png")
    content = {
        "images": [{"id": 10 + i, "file_name": f"{i}.png"} for i in range(8)],
        "annotations": [
            {"image_id": 10 + i, "category_id": c}
            for i, c in [(0, 7), (1, 7), (2, 7), (3, 3), (4, 3), (5, 3), (5, 3), (6, 3), (6, 7)]
        ],
        "categories": [{"id": 7, "name": "ape"}, {"id": 3, "name": "bat"}, {"id": 4, "name": "cow"}],
    }
    write(root / "train.json", json.dumps(content))
    return ["--json", root / "train.json"]


def metadata_of_one_split(root: Path) -> list:
    put(root, "train/{0..4}.png", "train/unnamed.png", "test/{0..2}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "label": "ab"[i % 2]}) for i in range(5)]
    write(root / "train/metadata.jsonl", "\n".join(lines))
    return []


@pytest.mark.parametrize(
    ("layout", "sizes", "others"),
    [
        (split_folders_with_leftovers, {"train": [4, 3], "val": [2, 1]}, {"hidden files": 1, ".cache/": 5}),
        (flat_validation, {"train": [4, 3]}, {"val/": 9, "the folder itself": 3}),
        (loose_images, {"train": [4, 3]}, {"the folder itself": 2}),
        (folders_below_classes, {"train": [7, 3]}, {}),
        (system_folders, {"train": [4, 3]}, {"__MACOSX/": 4, ".thumbnails/": 2, "@eaDir/": 7}),
        (two_tables, {"train": [4, 3]}, {}),
        (capital_splits, {"train": [4, 3], "val": [1, 1]}, {"Test/": 6}),
        (linked_folder, {"train": [4, 5]}, {}),
        (splits_beside_empty_folders, {"train": [4, 3], "test": [1, 1]}, {}),
        (table_of_a_part, {"train": [4, 3]}, {"not listed": 3, "unused/": 5, "the folder itself": 1}),
        (table_of_hidden_images, {"train": [2, 2]}, {".store/": 1, "the folder itself": 2}),
        (json_with_doubtful_images, {"train": [3, 3]}, {"several categories": 1, "no annotation": 1, "not listed": 1}),
        (metadata_of_one_split, {"train": [3, 2]}, {"not listed": 1, "test/": 3}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_image_on_disk_is_counted_as_taken_left_out_or_not_looked_at(
    project, tmp_path, run_prepare, layout, sizes, others
):
    source = tmp_path / "photos"
    arguments = layout(source) or ["--from", source]
    outcome = run_prepare("own", *arguments, "--name", "x", "--no-decode", "--test-per-class", 0)
    assert outcome.code == 0, outcome.err
    taken = sum(map(sum, sizes.values()))
    assert balance_of(outcome) == {"found": images_on_disk(source), "taken": taken, **others}
    dataset = load_dataset("x")
    assert sizes_of(dataset) == sizes
    listed = [images.path(i) for images in dataset.lists.values() for i in range(len(images))]
    assert len(set(listed)) == taken
    assert all((source / path).is_file() for path in listed)


def test_images_that_cannot_be_decoded_are_named_counted_and_not_listed(project, tmp_path, run_prepare):
    """One image is cut off, and one is in HEIC, whose package is not installed."""
    source = tmp_path / "photos"
    put(source, "ape/{0..3}.png", "bat/{0..2}.png", "bat/loose below/0.png")
    (source / "ape/cut.png").write_bytes((source / "ape/0.png").read_bytes()[:40])
    (source / "bat/phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("reslt.augment.decode._heif_is_registered", lambda: False)
        outcome = run_prepare("own", "--from", source, "--name", "x", "--workers", 0, "--test-per-class", 0)
    assert outcome.code == 0, outcome.err
    assert balance_of(outcome) == {"found": images_on_disk(source), "taken": 8, "unreadable": 1, "no decoder": 1}
    assert re.search(r"left out: .*bat/phone\.HEIC: a HEIC image, which requires: pip install pillow-heif", outcome.out)
    assert "taken: 1 image in 1 folder below class folders (bat/loose below)" in outcome.out


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train/{0..3}.png", "test/{0..2}.png"], "test, train look like splits, not classes, and there are no class"),
        (["train/{0..3}.png", "test/0.png", "ape/0.png"], "test, train look like splits, not classes"),
        (["train2017/{0..3}.png", "val2017/{0..2}.png"], "train2017, val2017 look like splits"),
        (["train_images/ape/0.png", "test_images/ape/0.png"], "call them train, val and test"),
        (["val/ape/0.png", "test/ape/0.png"], "look like splits, not classes; call them train"),
        (
            ["train/ape/0.png", "train/bat/0.png", "samples/0.png"],
            "are partly splits and partly not; move samples away",
        ),
        (
            ["ape/train/0.png", "ape/test/0.png", "bat/train/0.png"],
            "the classes contain folders of splits (test, train)",
        ),
        (["photos/ape/0.png", "photos/bat/0.png"], "is only photos; are its folders (ape, bat) the classes? Then give"),
        (
            ["{0..9}.png", "crops/0.png", "masks/0.png"],
            "10 images beside the folders crops, masks, which contain only 2",
        ),
        (["{0..9}.png"], "10 images, but there are no class folders in it; put the images into a folder per class"),
        (["train/ape/0.png", "train/bat/0.png", "val/cow/0.png"], "class 'cow' is not under train/"),
        (["train/ape/0.png", "train/bat/0.png", "val/ape/0.png", "Valid/ape/0.png"], "there are two folders of val"),
        (["ape/0.png", "bat/0.png", "cow/notes.txt"], "cow: the class has no image"),
        (["ape/{0..3}", "bat/{0..3}", "bat/a.txt"], "has the ending of an image, such as .jpg; there are: 8 without"),
        (["{0..3}.png", "labels.jsonl"], "--name NAME  (labels.jsonl must be called metadata.jsonl for this)"),
    ],
)
def test_a_folder_whose_classes_are_missing_or_ambiguous_is_refused(project, tmp_path, run_prepare, files, message):
    put(tmp_path / "photos", *files)
    outcome = run_prepare("own", "--from", tmp_path / "photos", "--name", "x", "--no-decode")
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert not (project / "data_lists/x").exists()


def test_a_flat_layout_with_a_table_names_the_command_that_reads_it(project, tmp_path, run_prepare):
    """This is Kaggle's layout. The error names a command, which makes the dataset with the classes of the table."""
    source = tmp_path / "my photos"
    put(source, "train/ape{0..3}.png", "train/bat{0..2}.png", "test/x{0..4}.png")
    ids = [f"ape{i},ape" for i in range(4)] + [f"bat{i},bat" for i in range(3)]
    write(source / "labels.csv", "\n".join(["id,breed", *ids]))
    refused = run_prepare("own", "--from", source, "--name", "x")
    assert refused.code == 2
    command = shlex.split(re.search(r"^  python -m reslt.prepare (.*)$", refused.err, re.MULTILINE)[1])
    assert command[-1] == "NAME"
    outcome = run_prepare(*command[:-1], "x", "--no-decode", "--test-per-class", 0)
    assert outcome.code == 0, outcome.err
    assert load_dataset("x").class_names == ("ape", "bat")
    assert sizes_of(load_dataset("x")) == {"train": [4, 3]}
    assert "labels.csv: paths without file ending: 7 are .png files" in outcome.out


def test_images_that_a_long_tail_leaves_out_are_counted(project, tmp_path, run_prepare):
    """Factor 0.25 keeps 8 and 2 of 8 and 8 training images."""
    source = tmp_path / "photos"
    put(source, "train/2/{0..7}.png", "train/10/{0..7}.png", "test/2/0.png", "test/10/0.png", "val/{0..4}.png")
    outcome = run_prepare("longtail", "--from", source, "--imb-factor", 0.25, "--name", "x")
    assert outcome.code == 0, outcome.err
    assert balance_of(outcome) == {"found": 23, "taken": 12, "beyond the profile": 6, "val/": 5}
    assert load_dataset("x").class_names == ("2", "10")
    assert sizes_of(load_dataset("x")) == {"train": [8, 2], "test": [1, 1]}


# ---- Photos: tables, JSON, metadata files ----

IMAGES = ["images/{0..5}.png"]
TABLE = ["--image-column", "file", "--label-column", "label"]
OWN = ["--no-decode", "--test-per-class", "0", "--name", "x"]


def table_text(rows: list[list], separator: str = ",") -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows(rows)
    return text.getvalue()


LABELED = [["file", "label"], *([f"images/{i}.png", "ape" if i < 4 else "bat"] for i in range(6))]
SPLITS = ["split", "train", "Validation", "test", "train", "training", "dev"]
OF_SPLITS = {"train": [2, 1], "val": [1, 1], "test": [1, 0]}
PER_CLASS = [["image", "cow", "ape"], *([f"images/{i}", float(i > 3), float(i < 4)] for i in range(6))]


@pytest.mark.parametrize(
    ("files", "arguments", "names", "sizes"),
    [
        (
            {"t.csv": table_text([[*row, s] for row, s in zip(LABELED, SPLITS, strict=True)])},
            ["--csv", "t.csv", *TABLE, "--split-column", "split"],
            ("ape", "bat"),
            OF_SPLITS,
        ),
        (
            {
                "train.csv": table_text([LABELED[i] for i in (0, 1, 4, 5)]),
                "lists/val.csv": table_text(
                    [["label", "file"], ["ape", "../images/1.png"], ["bat", "../images/5.png"]]
                ),
                "test.csv": table_text([["file", "label"], ["images/2.png", "ape"]]),
            },
            ["--csv", "train.csv", "--val-csv", "lists/val.csv", "--test-csv", "test.csv", *TABLE],
            ("ape", "bat"),
            OF_SPLITS,
        ),
        (
            {"t.csv": table_text(PER_CLASS)},
            ["--csv", "t.csv", "--image-column", "image", "--label-column", "cow", "ape"],
            ("ape", "cow"),
            {"train": [4, 2]},
        ),
        ({"t.csv": table_text(LABELED, ";")}, ["--csv", "t.csv", *TABLE], ("ape", "bat"), {"train": [4, 2]}),
        ({"t.csv": table_text(LABELED, "|")}, ["--csv", "t.csv", *TABLE], ("ape", "bat"), {"train": [4, 2]}),
        ({"t.csv": table_text(LABELED, "\t")}, ["--csv", "t.csv", *TABLE], ("ape", "bat"), {"train": [4, 2]}),
        (
            {"t.csv": table_text([[row[0].removeprefix("images/"), row[1]] for row in LABELED])},
            ["--csv", "t.csv", *TABLE, "--data-dir", "images"],
            ("ape", "bat"),
            {"train": [4, 2]},
        ),
        (
            {"t.csv": table_text([[row[0].removeprefix("images/").removesuffix(".png"), row[1]] for row in LABELED])},
            ["--csv", "t.csv", *TABLE],
            ("ape", "bat"),
            {"train": [4, 2]},
        ),
        (
            {"t.csv": table_text(PER_CLASS)},
            ["--csv", "t.csv", "--image-column", "image", "--label-column", "cow", "--label-column", "ape"],
            ("ape", "cow"),
            {"train": [4, 2]},
        ),
        (
            {"t.csv": table_text(LABELED).replace(",", " , ").replace(" , ape", ' , "ape"')},
            ["--csv", "t.csv", *TABLE],
            ("ape", "bat"),
            {"train": [4, 2]},
        ),
    ],
    ids=[
        "split column",
        "table per split",
        "one-hot",
        "semicolons",
        "bars",
        "tabs",
        "data-dir",
        "ids",
        "repeated flag",
        "spaces",
    ],
)
def test_tables_of_every_form_give_their_classes_and_splits(
    project, tmp_path, run_prepare, monkeypatch, files, arguments, names, sizes
):
    put(tmp_path / "photos", *IMAGES)
    for name, text in files.items():
        write(tmp_path / "photos" / name, text)
    monkeypatch.chdir(tmp_path / "photos")
    outcome = run_prepare("own", *arguments, *OWN)
    assert outcome.code == 0, outcome.err
    dataset = load_dataset("x")
    assert (dataset.class_names, sizes_of(dataset)) == (names, sizes)
    assert balance_of(outcome)["taken"] == 6
    assert all(dataset.image_root.file(images.path(0)).is_file() for images in dataset.lists.values())
    separators = {";": "semicolons", "|": "vertical bars", "\t": "tabs"}
    for separator, name in separators.items():
        used = separator in next(iter(files.values()))
        assert (f"t.csv: its cells are separated by {name}" in outcome.out) == used


def test_columns_of_a_table_that_are_not_used_are_named(project, tmp_path, run_prepare):
    """No flag names the column of splits, and one class has a column without images."""
    put(tmp_path / "photos", *IMAGES)
    rows = [[*row, split] for row, split in zip(LABELED, SPLITS, strict=True)]
    write(tmp_path / "photos/t.csv", table_text(rows))
    outcome = run_prepare("own", "--csv", tmp_path / "photos/t.csv", *TABLE, *OWN)
    assert outcome.code == 0, outcome.err
    assert (
        "t.csv: column split seems to state the split, but is not used; to use it: --split-column split" in outcome.out
    )
    write(tmp_path / "photos/t.csv", table_text([[*row, "ant" if i == 0 else 0] for i, row in enumerate(PER_CLASS)]))
    columns = ["--image-column", "image", "--label-column", "ape", "ant", "cow"]
    outcome = run_prepare("own", "--csv", tmp_path / "photos/t.csv", *columns, *OWN[:-1], "y")
    assert outcome.code == 0, outcome.err
    assert "t.csv: 1 label column without an image: ant" in outcome.out
    assert load_dataset("y").class_names == ("ape", "cow")


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (
            [["file", "label", "part"], ["images/0.png", "a", "train"], ["images/1.png", "b", "holdout"]],
            [*TABLE, "--split-column", "part"],
            r"row 3: --split-column part says neither train, val nor test but: holdout",
        ),
        (
            [["file", "a", "b"], ["images/0", 1, 0], ["images/1", 1, 1]],
            None,
            r"row 3: 2 of the 2 label columns contain 1",
        ),
        (
            [["file", "a", "b"], ["images/0", 0, 0], ["images/1", 0, 1]],
            None,
            r"row 2: 0 of the 2 label columns contain 1",
        ),
        ([["file", "a", "b"], ["images/0", 0.5, 0.5]], None, r"row 2: column a contains '0\.5'"),
        ([["file", "label"], ["0", "a"], ["7", "b"]], TABLE, r"row 2: there is no image '0' below .*--data-dir"),
        (
            [["file", "label"], ["both", "a"]],
            TABLE,
            r"row 2: 'both' might be both\.jpg, both\.png; write the file ending",
        ),
        (
            [["file", "label"], ["5.png", "a"]],
            TABLE,
            r"row 2: '5\.png' might be in any of 2 folders .*: images, other;",
        ),
        ([["file", "label"], ["images/0", "a"], ["images/0.png", "b"]], TABLE, r"row 3: duplicate image images/0\.png"),
        (
            [["file", "label", "s"], ["images/0", "a", "train"], ["images/1", "b", "train"], ["images/2", "c", "test"]],
            [*TABLE, "--split-column", "s"],
            r"1 classes of test have no training image: c",
        ),
    ],
)
def test_an_invalid_or_ambiguous_table_is_refused_with_its_row(
    project, tmp_path, run_prepare, rows, arguments, message
):
    put(tmp_path / "photos", *IMAGES, "other/5.png", "both.png", "both.jpg")
    write(tmp_path / "photos/t.csv", table_text(rows))
    arguments = arguments or ["--image-column", "file", "--label-column", "a", "b"]
    outcome = run_prepare("own", "--csv", tmp_path / "photos/t.csv", *arguments, *OWN)
    assert (outcome.code, outcome.out) == (2, "")
    assert re.search(message, outcome.err), outcome.err
    assert len(outcome.err) < 500


def coco(images: range, folder: str = "") -> str:
    """Return COCO's JSON. Images 0 to 3 are apes of category 9, and 4 and 5 bats of category 2; apes come first by name."""
    return json.dumps(
        {
            "images": [{"id": f"id{i}", "file_name": f"{folder}{i}.png"} for i in images],
            "annotations": [{"image_id": f"id{i}", "category_id": 9 if i < 4 else 2} for i in images],
            "categories": [{"id": 2, "name": "bat"}, {"id": 9, "name": "ape"}],
        }
    )


def test_a_json_file_per_split_is_read_and_classes_are_ordered_by_name(project, tmp_path, run_prepare):
    """In COCO's layout, annotations are in one folder and images in a folder per split."""
    put(tmp_path / "coco", "train2017/{0..5}.png", "val2017/{0..4}.png")
    write(tmp_path / "coco/annotations/train.json", coco(range(6), "train2017/"))
    write(tmp_path / "coco/annotations/val.json", coco(range(5), "val2017/"))
    files = [f"{tmp_path}/coco/annotations/{split}.json" for split in ("train", "val")]
    outcome = run_prepare("own", "--json", files[0], "--val-json", files[1], "--data-dir", tmp_path / "coco", *OWN)
    assert outcome.code == 0, outcome.err
    assert load_dataset("x").class_names == ("ape", "bat")
    assert sizes_of(load_dataset("x")) == {"train": [4, 2], "val": [4, 1]}


def test_json_with_missing_images_or_an_unnamed_category_is_refused_with_its_entry(project, tmp_path, run_prepare):
    """The folder that contains most of the images is found even if the first one is missing."""
    put(tmp_path / "coco", "train/{0..5}.png")
    (tmp_path / "coco/train/0.png").unlink()
    write(tmp_path / "coco/a.json", coco(range(6)))
    outcome = run_prepare("own", "--json", tmp_path / "coco/a.json", *OWN)
    assert outcome.code == 2
    assert re.search(
        r"a\.json: image 1: there is no image '0\.png' below .*/coco/train, .* \(1 of 6 images\)", outcome.err
    )
    assert "restore it, or remove the image from a.json" in outcome.err
    put(tmp_path / "coco", "train/0.png")
    write(tmp_path / "coco/a.json", coco(range(6)).replace('"ape"', '" "'))
    outcome = run_prepare("own", "--json", tmp_path / "coco/a.json", *OWN)
    assert outcome.code == 2
    assert "categories: entry 2: the name is empty" in outcome.err


@pytest.mark.slow
def test_json_of_many_images_is_read_in_seconds(tmp_path):
    """The limit of 3 s for 50,000 images allows 30 s for 500,000. They take about 1 s, existence checks included."""
    n, classes = 50_000, 800
    for c in range(classes):
        (tmp_path / f"{c}").mkdir()
    for i in range(n):
        (tmp_path / f"{i % classes}/{i}.jpg").touch()
    content = {
        "images": [{"id": i, "file_name": f"{i % classes}/{i}.jpg"} for i in range(n)],
        "annotations": [{"image_id": i, "category_id": i % classes} for i in range(n)],
        "categories": [{"id": c, "name": f"species {c}"} for c in range(classes)],
    }
    write(tmp_path / "train.json", json.dumps(content))
    start = process_time()
    photos = from_json({"train": tmp_path / "train.json"})
    assert process_time() - start < 3
    assert sum(map(len, photos.paths["train"])) == n


@pytest.mark.parametrize(
    ("train", "arguments", "names"),
    [
        ("metadata.jsonl", [], ("ape", "bat")),
        ("metadata.csv", [], ("ape", "bat")),
        ("metadata.jsonl", ["--label-column", "count"], ("9", "10")),
    ],
)
def test_metadata_beside_images_states_the_classes_of_each_split(
    project, tmp_path, run_prepare, train, arguments, names
):
    put(tmp_path / "hf", "train/{0..5}.png", "test/{0..1}.png")
    rows = [{"file_name": f"{i}.png", "label": "ape" if i % 2 else "bat", "count": 9 + i % 2} for i in range(6)]
    lines = "\n".join(map(json.dumps, rows))
    write(
        tmp_path / "hf/train" / train,
        lines if train.endswith("jsonl") else table_text([list(rows[0]), *(list(row.values()) for row in rows)]),
    )
    write(tmp_path / "hf/test/metadata.jsonl", "\n".join(map(json.dumps, rows[:2])))
    outcome = run_prepare("own", "--from", tmp_path / "hf", *arguments, *OWN)
    assert outcome.code == 0, outcome.err
    assert load_dataset("x").class_names == names
    assert sizes_of(load_dataset("x")) == {"train": [3, 3], "test": [1, 1]}


def test_columns_of_metadata_that_no_flag_names_are_named(project, tmp_path, run_prepare):
    put(tmp_path / "hf", "{0..5}.png")
    splits = ["train", "test", "train", "train", "test", "train"]
    rows = [{"file_name": f"{i}.png", "kind": "ab"[i % 2], "part": splits[i]} for i in range(6)]
    write(tmp_path / "hf/metadata.jsonl", "\n".join(map(json.dumps, rows)))
    outcome = run_prepare("own", "--from", tmp_path / "hf", "--split-column", "part", *OWN)
    assert outcome.code == 0, outcome.err
    assert "metadata.jsonl: the classes are in column kind" in outcome.out
    assert sizes_of(load_dataset("x")) == {"train": [2, 2], "test": [1, 1]}
    outcome = run_prepare("own", "--from", tmp_path / "hf", "--label-column", "kind", *OWN[:-1], "y")
    assert outcome.code == 0, outcome.err
    assert "column part seems to state the split, but is not used; to use it: --split-column part" in outcome.out
    assert sizes_of(load_dataset("y")) == {"train": [3, 3]}


@pytest.mark.parametrize(
    ("lines", "arguments", "names"),
    [
        (['{"file_name": "ape/0.png", "text": "x"}', '{"file_name": "bat/0.png", "text": "y"}'], [], ("ape", "bat")),
        (['{"file_name": "ape/0.png", "text": "x"}', '{"file_name": "bat/0.png", "text": "y"}'], ["text"], ("x", "y")),
        (['{"file_name": "ape/0.png", "label": 5}', '{"file_name": "bat/0.png", "label": 7}'], [], ("5", "7")),
    ],
)
def test_metadata_of_class_folders_is_read_if_it_states_labels(project, tmp_path, run_prepare, lines, arguments, names):
    put(tmp_path / "hf", "ape/0.png", "bat/0.png")
    write(tmp_path / "hf/metadata.jsonl", "\n".join(lines))
    arguments = ["--label-column", *arguments] if arguments else []
    outcome = run_prepare("own", "--from", tmp_path / "hf", *arguments, *OWN)
    assert outcome.code == 0, outcome.err
    assert load_dataset("x").class_names == names


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "1.png", "kind": "a", "sex": "f"}', "which column is the class? Name it with --label-column"),
        ('{"file_name": "1.png", "label": ["a"]}', "line 2: label is missing, empty or not text"),
        ('{"file_name": "1.png"}', "line 2: label is missing, empty or not text"),
        ('{"file_name": "9.png", "label": "a"}', "(1 of 2 lines); restore it, or remove the line from metadata.jsonl"),
        ('{"file_name": "1.png", "label": ', "line 2: not an object in JSON"),
    ],
)
def test_an_error_in_metadata_names_its_line(project, tmp_path, run_prepare, line, message):
    put(tmp_path / "hf", "train/{0..2}.png")
    first = (
        '{"file_name": "0.png", "kind": "b", "sex": "m"}' if "kind" in line else '{"file_name": "0.png", "label": "b"}'
    )
    write(tmp_path / "hf/train/metadata.jsonl", f"{first}\n{line}\n")
    outcome = run_prepare("own", "--from", tmp_path / "hf", *OWN)
    assert outcome.code == 2
    assert message in outcome.err


def zipped(name: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(name, "x")
    return data.getvalue()


SECRET = "4711-content-of-the-file"
MANY = json.dumps({"images": [{"file_name": f"{SECRET}{i}.png"} for i in range(4000)]})


@pytest.mark.parametrize(
    ("name", "content", "flag", "message"),
    [
        ("t.csv", MANY.encode(), "--csv", "it seems to be JSON; JSON in COCO's form is read with --json FILE"),
        (
            "t.csv",
            f'{{"{SECRET}": 1}}\n{{"a": 2}}\n'.encode(),
            "--csv",
            "it seems to be JSON lines; JSON lines are read",
        ),
        ("t.csv", zipped("[Content_Types].xml"), "--csv", "it seems to be an Excel workbook (.xlsx); save it as CSV"),
        ("t.csv", zipped(SECRET), "--csv", "it seems to be a zip archive; unpack it"),
        ("t.csv", b"\x89PNG\r\n\x1a\n" + SECRET.encode(), "--csv", "it seems to be a PNG image"),
        ("t.csv", SECRET.encode("utf-16"), "--csv", "it seems to be UTF-16 text; save it as UTF-8"),
        ("t.csv", f"<!DOCTYPE html><p>{SECRET}".encode(), "--csv", "it seems to be a web page or XML"),
        ("t.csv", f"file,label\n\xe9{SECRET},a\n".encode("latin-1"), "--csv", "must be UTF-8 text with a header"),
        (
            "t.json",
            f"file,label\n{SECRET},a\n".encode(),
            "--json",
            "it seems to be a table; a table is read with --csv",
        ),
        (
            "t.json",
            MANY.encode(),
            "--json",
            "there is no list 'annotations' in it (it has: images); it must have COCO's",
        ),
        ("t.json", f'{{"{SECRET}": '.encode() + b"[" * 99_999, "--json", "not readable as JSON: "),
        ("t.csv", f"{SECRET * 40_000},b\n1,2\n".encode(), "--csv", "--image-column file: "),
        ("t.csv", (",".join(f"column{i}" for i in range(1000)) + "\n").encode(), "--csv", "and 988 more"),
    ],
    ids=lambda value: (
        value[:40] if isinstance(value, str) else "content"
    ),  # the bytes of an archive differ, since it contains the time
)
def test_a_file_of_another_kind_is_recognized_and_not_quoted(
    project, tmp_path, run_prepare, name, content, flag, message
):
    (tmp_path / name).write_bytes(content)
    outcome = run_prepare("own", flag, tmp_path / name, *(TABLE if flag == "--csv" else []), *OWN)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert outcome.err.count(SECRET) <= 1  # a column name may be shown, cut to 40 characters
    assert len(outcome.err) < 900


def test_a_heic_image_is_decoded_if_its_package_is_installed(tmp_path, monkeypatch):
    """A module in place of pillow-heif registers a decoder with PIL: it returns 6 x 4 pixels of one color."""

    class Heif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._size, self._mode, self.tile = (6, 4), "RGB", []

        def load(self):
            self.im = Image.new("RGB", self.size, (10, 20, 30)).im
            return Image.Image.load(self)

    package = ModuleType("pillow_heif")
    package.register_heif_opener = lambda: Image.register_open("HEIF", Heif, lambda head: head[4:12] == b"ftypheic")
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    decode._heif_is_registered.cache_clear()
    try:
        (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
        image = decode.decode(tmp_path / "a.heic")
    finally:
        decode._heif_is_registered.cache_clear()
    assert (image.size, image.getpixel((0, 0))) == ((6, 4), (10, 20, 30))


# ---- Class order and class names ----

NUMBERED = {"12": 1, "2": 2, "1": 3, "10": 2}


def numbered_folders(root: Path) -> list:
    put(root, *(f"{name}/{{0..{n - 1}}}.png" for name, n in NUMBERED.items()))
    return ["--from", root]


def numbered_splits(root: Path) -> list:
    put(root, *(f"train/{name}/{{0..{n - 1}}}.png" for name, n in NUMBERED.items()))
    return ["--from", root]


def numbered_table(root: Path) -> list:
    numbered_folders(root)
    rows = [[f"{name}/{i}.png", name] for name, n in NUMBERED.items() for i in range(n)]
    write(root / "t.csv", table_text([["file", "label"], *rows]))
    return ["--csv", root / "t.csv", *TABLE]


def numbered_one_hot_columns(root: Path) -> list:
    numbered_folders(root)
    rows = [
        [f"{name}/{i}.png", *(int(other == name) for other in NUMBERED)]
        for name, n in NUMBERED.items()
        for i in range(n)
    ]
    write(root / "t.csv", table_text([["file", *NUMBERED], *rows]))
    return ["--csv", root / "t.csv", "--image-column", "file", "--label-column", *NUMBERED]


def numbered_json(root: Path) -> list:
    numbered_folders(root)
    paths = [(name, f"{name}/{i}.png") for name, n in NUMBERED.items() for i in range(n)]
    content = {
        "images": [{"id": k, "file_name": path} for k, (_, path) in enumerate(paths)],
        "annotations": [{"image_id": k, "category_id": f"c{name}"} for k, (name, _) in enumerate(paths)],
        "categories": [{"id": f"c{name}", "name": name} for name in NUMBERED],
    }
    write(root / "t.json", json.dumps(content))
    return ["--json", root / "t.json"]


def numbered_metadata(root: Path) -> list:
    numbered_folders(root)
    rows = [{"file_name": f"{name}/{i}.png", "label": int(name)} for name, n in NUMBERED.items() for i in range(n)]
    write(root / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    return ["--from", root]


@pytest.mark.parametrize(
    "source",
    [numbered_folders, numbered_splits, numbered_table, numbered_one_hot_columns, numbered_json, numbered_metadata],
    ids=lambda source: source.__name__,
)
def test_classes_from_every_source_have_one_order_with_numbers_by_value(project, tmp_path, run_prepare, source):
    outcome = run_prepare("own", *source(tmp_path / "photos"), *OWN)
    assert outcome.code == 0, outcome.err
    dataset = load_dataset("x")
    assert dataset.class_names == ("1", "2", "10", "12")
    assert dataset.images_per_class.tolist() == [3, 2, 2, 1]


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["10", "9", "01", "1", "010"], ["01", "1", "9", "010", "10"]),
        (["10", "9", "a"], ["10", "9", "a"]),
        (["b", "B", "a"], ["B", "a", "b"]),
        (["9" * 5000, "8"], ["8", "9" * 5000]),
    ],
)
def test_whole_numbers_are_ordered_by_value_and_other_names_alphabetically(names, ordered):
    assert order_classes(names) == ordered


YAML_READS_OTHERWISE = ["001", "010", "yes", "no", "null", "~", "0x10", "2001-01-01", "12:30:45", "1_000", "1.50", "+1"]
YAML_READS_AS_TEXT = ["1e3", "08", "None", "é"]


def test_class_names_of_folders_survive_the_round_trip_through_yaml(project, tmp_path, run_prepare):
    names = [*YAML_READS_OTHERWISE, *YAML_READS_AS_TEXT, "5", "- a", "#b", "&c", "[d]"]
    put(tmp_path / "photos", *(f"{name}/0.png" for name in names))
    outcome = run_prepare("own", "--from", tmp_path / "photos", *OWN)
    assert outcome.code == 0, outcome.err
    assert load_dataset("x").class_names == tuple(sorted(names))
    written = (project / "data_lists/x/info.yaml").read_text()
    assert [f"- '{name}'" in written for name in YAML_READS_OTHERWISE] == [True] * len(YAML_READS_OTHERWISE)


@pytest.mark.parametrize("name", YAML_READS_OTHERWISE)
def test_an_unquoted_class_name_that_yaml_reads_otherwise_is_refused_with_its_line(tiny, run_prepare, name):
    info = tiny / "info.yaml"
    info.write_text(f"image_root: images\nclass_names:\n- a\n- {name}\n- b\n")
    outcome = run_prepare("check", tiny, "--output", tiny / "out")
    assert outcome.code == 2
    assert re.search(
        rf"info\.yaml:4: .*{re.escape(name)} is read as .*write it in quotes: \"{re.escape(name)}\"", outcome.err
    )
    info.write_text(f"image_root: images\nclass_names: [a, '{name}', b]\n")
    assert load_dataset(str(tiny)).class_names == ("a", name, "b")


@pytest.mark.parametrize("name", [*YAML_READS_AS_TEXT, "5", "-3"])
def test_an_unquoted_class_name_that_is_read_as_written_stays_valid(tiny, name):
    (tiny / "info.yaml").write_text(f"image_root: images\nclass_names: [a, {name}, b]\n")
    assert load_dataset(str(tiny)).class_names == ("a", name, "b")


def test_a_folder_name_in_info_yaml_that_yaml_reads_otherwise_is_refused(tiny, run_prepare):
    (tiny / "info.yaml").write_text("image_root: 007\n")
    outcome = run_prepare("check", tiny, "--output", tiny / "out")
    assert outcome.code == 2
    assert "info.yaml:1: image_root must be a text: 007 is read as 7" in outcome.err
