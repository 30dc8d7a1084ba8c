"""A user's own photos, from class folders and tables to accuracies listed by class name."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from reslt.config.resolve import resolve
from reslt.data.datasets import load_dataset
from reslt.prepare import advice
from reslt.prepare.advice import defaults_for, settings_for
from reslt.prepare.sides import sides_of_new

BIRDS = {"house sparrow": 300, "great auk": 140, "Öre gull": 66, "owl": 30, "tern": 14, "wren": 7, "zebra finch": 3}

SMALL = ["--model", "cifar_resnet20", "--img-size", "32", "--epochs", "1", "--workers", "0", "--no-pretrained"]


def write_photos(root: Path, classes: dict[str, int]) -> Path:
    """Write crops of two real photos, tinted by class, as JPEG files in class folders; the root's name seeds the crops."""
    generator, photos = np.random.default_rng(list(root.name.encode())), load_sample_images().images
    for c, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            x, y = generator.integers(0, 500), generator.integers(0, 300)
            crop = photos[c % 2][y : y + 96, x : x + 120, :] // 2 + np.array([c * 16, 90 - c * 12, (c % 3) * 40])
            crop = crop + generator.integers(0, 16, crop.shape)  # no two crops of the sky are the same
            Image.fromarray(crop.astype(np.uint8)).resize((40, 32)).save(root / name / f"photo {i:03d}.jpg")
    return root


@pytest.fixture
def birds(tmp_path) -> Path:
    """Return 7 class folders of 300 to 3 photos. One photo is truncated; names contain spaces and a non-ASCII letter."""
    root = write_photos(tmp_path / "birds", BIRDS)
    truncated = root / "great auk/photo 007.jpg"
    truncated.write_bytes(truncated.read_bytes()[:300])
    return root


def splits(dataset) -> dict[str, list[str]]:
    return {split: [images.path(i) for i in range(len(images))] for split, images in dataset.lists.items()}


def sizes(dataset) -> dict[str, int]:
    return {split: len(images) for split, images in dataset.lists.items()}


def test_photos_become_a_dataset_that_trains_and_is_reported_by_class_names(
    project, birds, tmp_path, run_prepare, run_script
):
    """Each class has min(10, half of its photos) test images: 10 x 4, 7, 3, 1. The unreadable file is named and left
    out."""
    outcome = run_prepare("own", "--from", birds, "--name", "birds", "--workers", 2)
    assert outcome.code == 0, outcome.err
    assert re.search(r"left out: .*great auk/photo 007\.jpg: not a readable image", outcome.out)
    assert (
        "test: 3 of 7 classes have fewer than 10 images in this list: at most half of a class is set aside\n"
        in outcome.out
    )
    assert "train with: accelerate launch train.py --data birds" in outcome.out
    dataset = load_dataset("birds")
    names = sorted(BIRDS)
    assert dataset.class_names == tuple(names)
    held_out = {"owl": 10, "tern": 7, "wren": 3, "zebra finch": 1}
    for c, name in enumerate(names):
        readable = BIRDS[name] - (name == "great auk")
        assert dataset.images_per_class[c] == readable - held_out.get(name, 10)
        assert (dataset.lists["test"].labels == c).sum() == held_out.get(name, 10)
    trained = run_script("train", "--data", "birds", *SMALL, "--output", tmp_path / "runs")
    assert trained.code == 0, trained.err
    assert "many / medium / few: 2 / 2 / 3 classes" in trained.out
    evaluated = run_script("evaluate", "--ckpt", tmp_path / "runs/birds-cifar_resnet20-reslt-seed0")
    assert evaluated.code == 0, evaluated.err
    table = evaluated.out.partition("accuracy per class")[2]
    by_training_images = ["house sparrow", "great auk", "Öre gull", "owl", "tern", "wren", "zebra finch"]
    assert re.search(".*".join(by_training_images), table, re.DOTALL), evaluated.out
    assert re.search(r"0 +great auk +129 +10 +\d+\.\d", table)
    assert run_prepare("check", "birds", "--decode", "--output", tmp_path / "out").code == 0


def test_a_small_dataset_starts_from_trained_weights_unless_its_info_yaml_says_otherwise(
    project, tmp_path, run_prepare, monkeypatch
):
    """Half of 12 and of 4 photos are test images, so that 8 are for training. The smallest batch is 2, with the learning
    rate 0.05 * 2 / 128."""
    photos, info = write_photos(tmp_path / "birds", {"auk": 12, "owl": 4}), project / "data_lists/birds/info.yaml"
    own = ("own", "--from", photos, "--no-decode")
    outcome = run_prepare(*own, "--name", "birds")
    assert (
        "few training images: pretrained true, tune full, branch bn, to start from trained weights (info.yaml"
        in outcome.out
    )
    fitted, fine_tuning = {"batch_size": 2, "lr": 0.00078125}, {"pretrained": True, "tune": "full", "branch": "bn"}
    assert yaml.safe_load(info.read_text())["defaults"] == fitted | fine_tuning
    assert resolve(["--data", "birds"]).config.model.pretrained
    written = info.read_text()
    for changed in ("pretrained: false", "epochs: 3"):  # a user's choice, or the file of an earlier version
        info.write_text(written.replace("pretrained: true", changed).replace("\n  tune: full\n  branch: bn", ""))
        stated = yaml.safe_load(info.read_text())["defaults"]
        assert run_prepare(*own, "--extend", "birds").code == 0
        assert yaml.safe_load(info.read_text())["defaults"] == stated
    info.write_text(written)
    (write_photos(tmp_path / "more", {"tern": 60}) / "tern").rename(photos / "tern")
    monkeypatch.setattr(advice, "PRETRAINED_BELOW", 50)  # with 50 more training images, 58 exceed it
    assert run_prepare(*own, "--extend", "birds").code == 0
    assert yaml.safe_load(info.read_text())["defaults"] == {"batch_size": 4, "lr": 0.0015625}


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (99_999, {"pretrained": True, "tune": "full", "branch": "bn"}),
        (100_000, {}),
        (500, {"pretrained": True, "tune": "full", "branch": "bn", "batch_size": 32, "lr": 0.0125}),
    ],
)
def test_defaults_follow_from_the_number_of_training_images(images, expected):
    assert defaults_for(images) == expected


def test_the_same_photos_and_seed_give_the_same_lists(project, birds, run_prepare):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        assert run_prepare("own", "--from", birds, "--name", name, "--seed", seed, "--no-decode").code == 0
    one, two, three = (splits(load_dataset(name)) for name in ("one", "two", "three"))
    assert one == two != three


def test_without_decoding_every_file_is_listed(project, birds, run_prepare):
    outcome = run_prepare("own", "--from", birds, "--name", "birds", "--no-decode", "--test-per-class", 0)
    assert outcome.code == 0
    assert "left out:" not in outcome.out
    assert "neither test.txt nor val.txt: training will print no table" in outcome.out
    assert load_dataset("birds").images_per_class.sum() == sum(BIRDS.values())


@given(st.integers(1, 40), st.integers(0, 15), st.integers(0, 15), st.integers(0, 2**70))
@settings(max_examples=200, deadline=None)
def test_a_split_loses_nothing_and_leaves_half_of_a_class_in_training(images, val, test, seed):
    digests = [bytes([i] * 16) for i in range(images)]
    sides = sides_of_new(digests, Counter(), {"val": val, "test": test}, seed)
    assert list(sides) == digests
    counts = Counter(sides.values())
    assert counts["train"] >= max(1, images - images // 2)
    if images // 2 >= val + test:
        assert (counts["val"], counts["test"]) == (val, test)
    else:
        assert counts["val"] + counts["test"] == images // 2
        assert counts["test"] >= min(test, counts["val"])  # they are filled in turn, the test list first


def test_folders_that_are_already_split_keep_their_splits(project, tmp_path, run_prepare):
    source = make_dataset(tmp_path / "made", counts=(12, 8, 4), splits=("val", "test"), test_images=2) / "images"
    outcome = run_prepare("own", "--from", source, "--name", "given", "--val-per-class", 3, "--test-per-class", 3)
    assert outcome.code == 0, outcome.err
    dataset = load_dataset("given")
    assert dataset.images_per_class.tolist() == [12, 8, 4]
    assert sizes(dataset) == {"train": 24, "val": 6, "test": 6}


def test_a_split_that_is_not_given_is_set_aside_from_training(project, tmp_path, run_prepare):
    source = make_dataset(tmp_path / "made", counts=(12, 8, 4), test_images=2) / "images"
    assert run_prepare("own", "--from", source, "--name", "given", "--val-per-class", 3).code == 0
    dataset = load_dataset("given")
    assert dataset.images_per_class.tolist() == [9, 5, 2]
    assert np.bincount(dataset.lists["val"].labels).tolist() == [3, 3, 2]
    assert len(dataset.lists["test"]) == 6


def test_a_class_named_train_does_not_turn_other_classes_into_splits(project, tmp_path, run_prepare):
    write_photos(tmp_path / "vehicles", {"car": 4, "train": 4})
    assert run_prepare("own", "--from", tmp_path / "vehicles", "--name", "vehicles").code == 0
    assert load_dataset("vehicles").class_names == ("car", "train")


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (1280, {}),
        (1279, {"batch_size": 64, "lr": 0.025}),
        (500, {"batch_size": 32, "lr": 0.0125}),
        (3, {"batch_size": 2, "lr": 0.00078125}),
    ],
)
def test_a_short_list_gets_a_batch_size_with_at_least_ten_steps_per_epoch(images, expected):
    """The batch is the largest power of two that is at most a tenth of the list, and at least 2. The learning rate is in
    proportion to the default of 0.05 for 128 images."""
    assert settings_for(images) == expected


@pytest.fixture
def table(tmp_path):
    """Return photos.csv, in the folder of its photos, with numbers as class names and a column that is not used."""
    write_photos(tmp_path / "photos", {"a": 6, "b": 4, "c": 3})
    rows = ["file,note,class"]
    for folder, label, count in (("a", 10, 6), ("b", 2, 4), ("c", 30, 3)):
        rows += [f'{folder}/photo {i:03d}.jpg,"x, y",{label}' for i in range(count)]
    (tmp_path / "photos/photos.csv").write_text("\n".join(rows) + "\n", encoding="utf-8-sig")
    return tmp_path / "photos/photos.csv"


def from_table(run_prepare, table, *more, name="tabled"):
    columns = ["--image-column", "file", "--label-column", "class"]
    return run_prepare("own", "--csv", table, *columns, "--name", name, *more)


def test_a_table_becomes_a_dataset_with_numeric_classes_in_numerical_order(project, table, run_prepare):
    outcome = from_table(run_prepare, table, "--test-per-class", 1)
    assert outcome.code == 0, outcome.err
    dataset = load_dataset("tabled")
    assert dataset.class_names == ("2", "10", "30")
    assert dataset.images_per_class.tolist() == [3, 5, 2]
    assert all((table.parent / path).is_file() for path in splits(dataset)["train"])


def test_a_table_may_be_in_another_folder_and_separated_by_tabs(project, table, tmp_path, run_prepare):
    elsewhere = tmp_path / "elsewhere.tsv"
    elsewhere.write_text("class\tfile\nauk\ta/photo 000.jpg\nauk\ta/photo 001.jpg\nÖre gull\tb\\photo 000.jpg\n")
    outcome = from_table(run_prepare, elsewhere, "--data-dir", table.parent, name="other")
    assert outcome.code == 0, outcome.err
    assert load_dataset("other").class_names == ("auk", "Öre gull")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.replace("class", "clas"),
            r"--label-column class: .* has no such column \(did you mean clas\?\); it has: file",
        ),
        (lambda text: text.replace(",10\n", ",\n", 1), r"photos\.csv: row 2: column class is empty"),
        (lambda text: text.replace("a/photo 001.jpg", "a/photo 000.jpg"), r"row 3: duplicate image a/photo 000\.jpg"),
        (
            lambda text: text.replace("a/photo 001.jpg", "a/none.jpg"),
            r"row 3: there is no image 'a/none\.jpg' below .* \(1 of 13 rows\); restore it, or remove the row from photos",
        ),
        (
            lambda text: text.replace("a/photo 001.jpg", "../photos/a/photo 001.jpg"),
            r"row 3: there is no image '\.\./photos",
        ),
        (lambda text: text.splitlines()[0] + "\na/photo 000.jpg,x,1\n", r"at least 2 classes, and there is only 1"),
        (lambda text: "", r"not readable as a table"),
        (lambda text: text + 'a,b,c,d,e\n"', r"not readable as a table"),
    ],
)
def test_an_error_in_a_table_is_reported_with_its_place_and_remedy(project, table, run_prepare, change, message):
    table.write_text(change(table.read_text(encoding="utf-8-sig")))
    outcome = from_table(run_prepare, table)
    assert outcome.code == 2
    assert re.search(message, outcome.err), outcome.err
    assert not (project / "data_lists/tabled").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "x"], "one of the arguments --from --csv --json is required"),
        (["--from", "nowhere", "--name", "x"], "--from nowhere: there is no such folder"),
        (["--from", "{empty}", "--name", "x"], "there are no class folders in it"),
        (["--from", "{birds}", "--name", "a/b"], "--name a/b: give a plain name"),
        (["--from", "{birds}", "--name", "digits_lt"], "exists; remove it or choose another name"),
        (["--from", "{birds}", "--name", "x", "--image-column", "f"], "--image-column belongs to --csv"),
        (["--csv", "t.csv", "--name", "x"], "--csv requires --image-column and --label-column"),
        (
            ["--csv", "t.csv", "--image-column", "a", "--label-column", "b", "--name", "x"],
            "t.csv: not readable as a table",
        ),
        (
            ["--from", "{birds}", "--name", "x", "--val-per-class", "-1"],
            "--val-per-class -1: give a whole number from 0",
        ),
    ],
)
def test_invalid_arguments_are_reported_and_write_nothing(project, tmp_path, run_prepare, arguments, message):
    write_photos(tmp_path / "birds", {"auk": 2, "owl": 2})
    (tmp_path / "empty").mkdir()
    places = {"birds": tmp_path / "birds", "empty": tmp_path / "empty"}
    outcome = run_prepare("own", *(argument.format(**places) for argument in arguments))
    assert outcome.code == 2
    assert message in outcome.err
    assert not (project / "data_lists/x").exists()


def test_a_class_without_a_readable_image_is_reported(project, tmp_path, run_prepare):
    root = write_photos(tmp_path / "birds", {"auk": 2, "owl": 1})
    (root / "owl/photo 000.jpg").write_bytes(b"no image")
    outcome = run_prepare("own", "--from", root, "--name", "x")
    assert outcome.code == 2
    assert "class 'owl' has no readable training image" in outcome.err
    (root / "owl/photo 000.jpg").unlink()
    outcome = run_prepare("own", "--from", root, "--name", "x")
    assert "owl: the class has no image; add some or remove its folder" in outcome.err


def test_a_file_name_that_no_list_can_contain_is_reported(project, tmp_path, run_prepare):
    root = write_photos(tmp_path / "birds", {"auk": 2, "owl": 2})
    (root / "owl/photo 000.jpg").rename(root / "owl/photo\n000.jpg")
    outcome = run_prepare("own", "--from", root, "--name", "x")
    assert outcome.code == 2
    assert "a list cannot contain this name" in outcome.err
    assert not (project / "data_lists/x").exists()


def test_a_group_without_classes_is_na_with_its_reason(project, tmp_path, run_prepare, run_script):
    """The classes have 20 and 4 training images, and none has more than 100."""
    write_photos(tmp_path / "birds", {"auk": 30, "owl": 8})
    assert run_prepare("own", "--from", tmp_path / "birds", "--name", "birds", "--workers", 1).code == 0
    outcome = run_script("train", "--data", "birds", *SMALL, "--output", tmp_path / "runs")
    assert outcome.code == 0, outcome.err
    assert re.search(r"reslt \(fused\) +n/a +\d+\.\d +\d+\.\d", outcome.out)
    assert (
        "many: n/a, the standard split (by count, many_above 100, few_below 20) leaves this group without a class"
        in outcome.out
    )
    assert yaml.safe_load((project / "data_lists/birds/info.yaml").read_text())["defaults"]["batch_size"] == 2


@pytest.mark.parametrize("validation", ["val", "valid", "Validation"])
def test_the_usual_folder_names_of_the_validation_split_are_recognized(project, tmp_path, run_prepare, validation):
    for split in ("train", validation, "test"):
        write_photos(tmp_path / "download" / split, {"auk": 6, "owl": 3})
    assert run_prepare("own", "--from", tmp_path / "download", "--name", "x").code == 0
    dataset = load_dataset("x")
    assert dataset.class_names == ("auk", "owl")
    assert sizes(dataset) == {"train": 9, "val": 9, "test": 9}


def test_a_test_folder_without_classes_is_not_a_test_list(project, tmp_path, run_prepare):
    write_photos(tmp_path / "contest/train", {"auk": 6, "owl": 3})
    write_photos(tmp_path / "contest", {"test": 2})
    outcome = run_prepare("own", "--from", tmp_path / "contest", "--name", "x")
    assert outcome.code == 0, outcome.err
    assert sizes(load_dataset("x")) == {"train": 5, "test": 4}


def test_splits_with_a_capital_letter_are_not_taken_for_classes(project, tmp_path, run_prepare):
    for split in ("Train", "Test"):
        write_photos(tmp_path / "download" / split, {"auk": 3, "owl": 2})
    outcome = run_prepare("own", "--from", tmp_path / "download", "--name", "x")
    assert outcome.code == 0, outcome.err
    dataset = load_dataset("x")
    assert dataset.class_names == ("auk", "owl")
    assert sizes(dataset) == {"train": 5, "test": 5}


def test_split_folders_mixed_with_other_folders_are_refused(project, tmp_path, run_prepare):
    for split in ("train", "test", "unlabeled"):
        write_photos(tmp_path / "download" / split, {"auk": 2, "owl": 2})
    outcome = run_prepare("own", "--from", tmp_path / "download", "--name", "x")
    assert outcome.code == 2
    assert "move unlabeled away" in outcome.err
    assert not (project / "data_lists/x").exists()


def test_linked_folders_are_followed_and_files_of_other_kinds_are_counted(project, tmp_path, run_prepare):
    root = write_photos(tmp_path / "birds", {"auk": 4, "owl": 3})
    write_photos(tmp_path / "more", {"owls": 2})
    (root / "owl/linked").symlink_to(tmp_path / "more/owls")
    (root / "owl/back").symlink_to(root / "owl")
    for name in ("owl/a.HEIC", "owl/b.heic", "auk/notes.txt", "auk/Thumbs.db", "auk/.hidden.jpg"):
        (root / name).write_bytes(b"x")
    outcome = run_prepare("own", "--from", root, "--name", "x", "--test-per-class", 0)
    assert outcome.code == 0, outcome.err
    assert load_dataset("x").images_per_class.tolist() == [4, 5]
    single = [line for line in outcome.out.splitlines() if line.startswith("left out: 1 ")]
    assert single == ["left out: 1 .txt file, not a supported image format"]
    assert "read once: folders linked to another folder here: owl/back" in outcome.out
    assert "images: 12 found = 9 taken + 2 left out (unreadable: 2) + 1 not looked at (hidden files: 1)" in outcome.out


def test_names_with_unusual_spaces_are_listed(project, tmp_path, run_prepare):
    """The names of macOS screenshots contain a narrow no-break space."""
    root = write_photos(tmp_path / "birds", {"auk": 2, "owl": 2})
    (root / "owl/photo 000.jpg").rename(root / "owl/Screenshot 9.41.00\u202fAM.jpg")
    assert run_prepare("own", "--from", root, "--name", "x", "--test-per-class", 0).code == 0
    assert "owl/Screenshot 9.41.00\u202fAM.jpg" in splits(load_dataset("x"))["train"]


def test_a_table_may_contain_absolute_paths(project, table, tmp_path, run_prepare):
    rows = [f"{table.parent}/{c}/photo {i:03d}.jpg,{c}" for c in "ab" for i in range(2)]
    (tmp_path / "absolute.csv").write_text("\n".join(["file,class", *rows]))
    outcome = from_table(run_prepare, tmp_path / "absolute.csv", "--data-dir", table.parent)
    assert outcome.code == 0, outcome.err
    assert load_dataset("tabled").class_names == ("a", "b")


def test_rows_with_more_cells_than_the_header_are_refused(project, table, run_prepare):
    """pandas alone would read the first column as an index and shift every other cell by one column."""
    table.write_text("file,class\njunk,a/photo 000.jpg,a\njunk,b/photo 000.jpg,b\n")
    outcome = from_table(run_prepare, table)
    assert outcome.code == 2
    assert "not readable as a table" in outcome.err
