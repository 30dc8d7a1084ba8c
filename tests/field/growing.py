"""Datasets that grow, copies of images, and the advice that commands print."""

from __future__ import annotations

import random
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import make_dataset
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from reslt.config.resolve import resolve
from reslt.core.locks import locked
from reslt.data.datasets import load_dataset
from reslt.prepare.check import check
from reslt.prepare.own import make_own
from reslt.prepare.photos import Photos

# ---- Datasets that grow ----


def write_scans(root: Path, classes: dict[str, int], first: int = 0) -> Path:
    """Add files 0.png, 1.png, ... to each class folder: scans of different digits, starting with number `first`."""
    scans = iter(load_digits().images[first:])
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        have = len(list((root / name).iterdir()))
        for i in range(have, have + count):
            Image.fromarray((next(scans) * 15).astype(np.uint8)).resize((16, 16)).save(root / name / f"{i}.png")
    return root


def sides_by_content(name: str) -> dict[bytes, str]:
    """Return {content of a listed image: its list}, read through the dataset."""
    dataset, sides = load_dataset(name), {}
    for split, images in dataset.lists.items():
        for i in range(len(images)):
            content = dataset.image_root.file(images.path(i)).read_bytes()
            assert content not in sides
            sides[content] = split
    return sides


def test_photos_and_a_class_added_later_leave_every_image_on_its_side(project, tmp_path, run_prepare):
    """There are 20, 15 and 10 photos, of which min(10, half) are set aside: 10, 7 and 5. Then come 6 more photos of `ape`,
    of which none is set aside since 10 already are, and 6 of the new class `ant`, of which 3 are. The index of `ant`
    follows the others although its name sorts first."""
    photos = write_scans(tmp_path / "photos", {"ape": 20, "bat": 15, "cow": 10})
    assert run_prepare("own", "--from", photos, "--name", "zoo", "--workers", 0).code == 0
    before = sides_by_content("zoo")
    info = project / "data_lists/zoo/info.yaml"
    info.write_text("# ours\n" + info.read_text().replace("defaults:", "shot_split: {by: rank, many: 1, medium: 1, few: 1}"
                    " # three\ndefaults:"))  # fmt: skip
    write_scans(photos, {"ape": 6, "ant": 6}, first=100)

    refused = run_prepare("own", "--from", photos, "--extend", "zoo", "--workers", 0)
    assert refused.code == 2
    assert f"{info}: shot_split: " in refused.err
    assert "the sizes add up to 3, but there are 4 classes" in refused.err
    assert sides_by_content("zoo") == before
    info.write_text(info.read_text().replace("few: 1", "few: 2"))

    outcome = run_prepare("own", "--from", photos, "--extend", "zoo", "--workers", 0)
    assert outcome.code == 0, outcome.err
    assert "45 known images, each on its side as before; 12 new: train 9, test 3" in outcome.out
    assert "new classes, numbered after the others: 1, first 'ant'" in outcome.out
    assert "images: 57 found = 57 taken + 0 left out + 0 not looked at" in outcome.out
    after = sides_by_content("zoo")
    assert {content: after[content] for content in before} == before
    dataset = load_dataset("zoo")
    assert dataset.class_names == ("ape", "bat", "cow", "ant")
    assert np.bincount(dataset.lists["test"].labels).tolist() == [10, 7, 5, 3]
    assert dataset.images_per_class.tolist() == [16, 8, 5, 3]
    assert info.read_text().startswith("# ours\ndescription: train 32, test 25 images of 4 classes\n")
    assert "\nshot_split: {by: rank, many: 1, medium: 1, few: 2} # three\n" in info.read_text()


def photos_in(root: Path) -> Photos:
    names = sorted(p.name for p in root.iterdir())
    files = [[f.relative_to(root).as_posix() for f in sorted((root / name).iterdir())] for name in names]
    return Photos(root, names, {"train": files})


@pytest.mark.parametrize("seed", range(2))
def test_no_image_changes_side_in_20_rounds_of_changes(project, tmp_path, seed):
    """Each round adds, removes, restores, renames and relabels images, and some rounds add a class. Contents are random
    bytes, listed without decoding. Every image is listed once, and the index of a class never changes."""
    draw, root, gone, ever = random.Random(seed), tmp_path / "photos", [], {}

    def add(content: bytes, to: str) -> None:
        (root / to).mkdir(parents=True, exist_ok=True)
        (root / to / f"{draw.randrange(10**9)}.png").write_bytes(content)

    for name in ("m", "n", "o"):
        for _ in range(draw.randrange(4, 12)):
            add(draw.randbytes(20), name)
    held_out, names = {"test": 4, "val": 2}, ()
    make_own(photos_in(root), "zoo", held_out, seed, decode=False, workers=0)
    for turn in range(20):
        sides = sides_by_content("zoo")
        assert sorted(sides) == sorted(file.read_bytes() for file in root.rglob("*.png"))
        assert {content: ever.get(content, side) for content, side in sides.items()} == sides
        ever |= sides
        dataset = load_dataset("zoo")
        assert dataset.class_names[: len(names)] == names
        names = dataset.class_names

        classes = [p.name for p in root.iterdir()]
        for _ in range(draw.randrange(6)):
            add(draw.randbytes(20), draw.choice(classes))
        for content in draw.sample(gone, len(gone) // 2):
            gone.remove(content)
            add(content, draw.choice(classes))
        if turn % 4 == 0:
            for _ in range(draw.randrange(2, 9)):
                add(draw.randbytes(20), f"{draw.choice('az')}{turn}")
        if turn % 5 == 0:
            renamed = sorted((root / draw.choice(classes)).iterdir())  # the images of a class exchange their names
            contents = [file.read_bytes() for file in renamed]
            draw.shuffle(contents)
            for file, content in zip(renamed, contents, strict=True):
                file.write_bytes(content)
        for name in classes:
            files = [file for file in sorted((root / name).iterdir()) if ever.get(file.read_bytes()) != "train"]
            kept = [file for file in sorted((root / name).iterdir()) if ever.get(file.read_bytes()) == "train"]
            for file in draw.sample(files, len(files) // 4) + draw.sample(kept, (len(kept) - 1) // 3):
                gone.append(file.read_bytes())
                file.unlink()
        existing = "extend" if turn % 7 else "overwrite"
        if existing == "overwrite":
            names = ()
        make_own(photos_in(root), "zoo", dict.fromkeys(held_out), None, decode=False, workers=0, existing=existing)
    assert len(ever) > 80
    assert set(ever.values()) == {"train", "val", "test"}


def test_a_dataset_without_sides_csv_takes_the_sides_from_its_lists(project, tmp_path, run_prepare):
    photos = write_scans(tmp_path / "photos", {"ape": 20, "bat": 15})
    assert run_prepare("own", "--from", photos, "--name", "zoo", "--no-decode").code == 0
    before = sides_by_content("zoo")
    (project / "data_lists/zoo/sides.csv").unlink()
    shutil.copytree(photos, tmp_path / "moved")
    for file in (tmp_path / "moved").rglob("*.png"):
        file.rename(file.with_name(f"x{file.name}"))
    outcome = run_prepare("own", "--from", tmp_path / "moved", "--extend", "zoo", "--no-decode")
    assert outcome.code == 0, outcome.err
    assert f"local.yaml: the image root is now {tmp_path / 'moved'}" in outcome.out
    assert sides_by_content("zoo") == before


@pytest.mark.parametrize(
    ("classes", "stated"),
    [({"ape": 30, "bat": 9, "cow": 4}, "val 3, test 6"), ({"ape": 8, "bat": 6}, "val 2, test 10")],
)
def test_the_numbers_set_aside_by_an_earlier_version_are_read_from_its_lists(
    project, tmp_path, run_prepare, classes, stated
):
    """3 and 6 images per class were set aside, which only the 30 images of `ape` show. Of 8 images, half are set aside, so
    larger numbers may have been meant."""
    photos = write_scans(tmp_path / "photos", classes)
    arguments = ["--val-per-class", 3, "--test-per-class", 6, "--no-decode"]
    assert run_prepare("own", "--from", photos, "--name", "zoo", *arguments).code == 0
    folder = project / "data_lists/zoo"
    (folder / "sides.csv").unlink()
    info = yaml.safe_load((folder / "info.yaml").read_text())
    del info["held_out"]
    (folder / "info.yaml").write_text(yaml.safe_dump(info))
    before = sides_by_content("zoo")
    write_scans(photos, {"bat": 20}, first=200)
    outcome = run_prepare("own", "--from", photos, "--extend", "zoo", "--no-decode")
    assert outcome.code == 0, outcome.err
    assert f"how many images per class are set aside; from now on: {stated} (other numbers" in outcome.out
    assert before.items() <= sides_by_content("zoo").items()
    again = run_prepare("own", "--from", photos, "--extend", "zoo", "--no-decode")
    assert "from now on" not in again.out


def test_images_of_another_class_than_before_are_counted(project, tmp_path, run_prepare):
    photos = write_scans(tmp_path / "photos", {"images": 8})
    table = [f"images/{i}.png,{'ape' if i < 4 else 'bat'}" for i in range(8)]
    source = ["--csv", photos / "t.csv", "--image-column", "file", "--label-column", "label", "--no-decode"]
    (photos / "t.csv").write_text("\n".join(["file,label", *table]))
    assert run_prepare("own", *source, "--name", "zoo").code == 0
    (photos / "t.csv").write_text("\n".join(["file,label", "images/0.png,bat", *table[1:]]))
    outcome = run_prepare("own", *source, "--extend", "zoo")
    assert outcome.code == 0, outcome.err
    assert "images of another class than before: 1, first 'images/0.png': ape, now bat" in outcome.out


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (
            lambda p: (p.parent / "project/data_lists/zoo/sides.csv").unlink(),  # a dataset of an earlier version
            ["--name", "zoo"],
            "already exists; add images to it with --extend zoo",
        ),
        (lambda p: None, ["--extend", "../zoo"], r"--extend \.\./zoo: give a plain name"),
        (
            lambda p: shutil.rmtree(p / "bat"),
            ["--extend", "zoo"],
            "class 'bat' has no readable training image; put some",
        ),
        (lambda p: None, ["--extend", "zoos"], r"--extend zoos: .*zoos does not exist; create it with --name zoos"),
        (lambda p: None, ["--name", "zoo"], "already exists; add images to it with --extend zoo"),
        (lambda p: None, ["--extend", "zoo", "--overwrite"], "--overwrite belongs to --name"),
        (lambda p: None, ["--name", "by_hand", "--overwrite"], "by_hand was not made by `own`; move it away"),
        (lambda p: None, ["--extend", "by_hand"], r"by_hand/info\.yaml states no class_names"),
        (
            lambda p: (shutil.rmtree(p), write_scans(p, {"ape": 5, "bat": 5}, first=300)),
            ["--extend", "zoo"],
            r"none of the 20 images that it lists is below .*--name zoo --overwrite",
        ),
        (
            lambda p: (p.parent / "project/data_lists/zoo/sides.csv").write_text("digest,split\n00,train\n"),
            ["--extend", "zoo"],
            r"sides\.csv:2: not the digest of one more image and its split; restore the file",
        ),
    ],
)
def test_a_dataset_that_cannot_be_extended_or_replaced_stays_as_it_is(
    project, tmp_path, run_prepare, change, arguments, message
):
    photos = write_scans(tmp_path / "photos", {"ape": 8, "bat": 8, "cow": 4})
    assert run_prepare("own", "--from", photos, "--name", "zoo", "--no-decode").code == 0
    make_dataset(project / "data_lists/by_hand", counts=(2, 2), test_images=1)
    change(photos)
    if message.startswith("none of"):
        for file in photos.rglob("*.png"):
            file.rename(file.with_name(f"x{file.name}"))
    lists = {file: file.read_bytes() for file in (project / "data_lists").rglob("*.*") if file.is_file()}
    outcome = run_prepare("own", "--from", photos, *arguments, "--no-decode")
    assert outcome.code == 2
    assert re.search(message, outcome.err), outcome.err
    assert {file: file.read_bytes() for file in lists} == lists
    assert not list((project / "data_lists").rglob(".new"))


def test_own_takes_one_of_several_copies_and_none_with_two_labels(project, tmp_path, run_prepare):
    """12, 8 and 6 training photos and 3, 2 and 2 test photos. An ape of the test folder is also in the training folder, a
    bat is in the training folder three times, and one photo is both a bat and a cow."""
    root = tmp_path / "photos"
    write_scans(root / "train", {"ape": 12, "bat": 8, "cow": 6})
    write_scans(root / "test", {"ape": 3, "bat": 2, "cow": 2}, first=200)
    shutil.copy(root / "test/ape/1.png", root / "train/ape/same.png")
    for copy in ("4a.png", "4b.png"):
        shutil.copy(root / "train/bat/4.png", root / "train/bat" / copy)
    shutil.copy(root / "train/bat/7.png", root / "train/cow/wrong.png")
    outcome = run_prepare("own", "--from", root, "--name", "zoo", "--workers", 0)
    assert outcome.code == 0, outcome.err
    assert (
        "left out: copies of other images of the same class: 3, first 'train/ape/same.png', with the same content as "
        "'test/ape/1.png'" in outcome.out
    )
    assert (
        "left out: files with the same content as a file of another class: 2, first 'train/bat/7.png' (bat) and "
        "'train/cow/wrong.png' (cow)" in outcome.out
    )
    assert "images: 37 found = 32 taken + 5 left out" in outcome.out
    dataset = load_dataset("zoo")
    assert dataset.images_per_class.tolist() == [12, 7, 6]
    assert np.bincount(dataset.lists["test"].labels).tolist() == [3, 2, 2]
    outcome = run_prepare("check", "zoo", "--decode", "--near-copies", "--workers", 0, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.out


def test_a_listed_image_that_moves_to_another_splits_folder_keeps_its_side(project, tmp_path, run_prepare):
    root = tmp_path / "photos"
    write_scans(root / "train", {"ape": 6, "bat": 6})
    write_scans(root / "test", {"ape": 2, "bat": 2}, first=200)
    assert run_prepare("own", "--from", root, "--name", "zoo", "--no-decode").code == 0
    before = sides_by_content("zoo")
    (root / "train/ape/3.png").rename(root / "test/ape/moved.png")
    outcome = run_prepare("own", "--from", root, "--extend", "zoo", "--no-decode")
    assert outcome.code == 0, outcome.err
    assert re.search(r"keep the side .*: 1, first 'test/ape/moved\.png', which stays in train\n", outcome.out)
    assert sides_by_content("zoo") == before


def recompress(image: Image.Image, file: Path) -> None:
    image.save(file, "JPEG", quality=60)


def shrink(image: Image.Image, file: Path) -> None:
    image.resize((image.width // 2, image.height // 2)).save(file, "PNG")


@pytest.mark.parametrize(
    ("copy", "near", "place", "expected"),
    [
        (None, False, "test/0/1.png", [("PROBLEM", "copies in train.txt and test.txt: 1")]),
        (None, False, "train/0/1.png", [("note    ", "copies within train.txt: 1")]),
        (None, False, "train/1/1.png", [("PROBLEM", "copies with two labels: 1")]),
        (
            None,
            False,
            "test/1/1.png",
            [("PROBLEM", "copies in train.txt and test.txt: 1"), ("PROBLEM", "copies with two labels: 1")],
        ),
        (recompress, False, "test/0/1.png", []),
        (recompress, True, "test/0/1.png", [("PROBLEM", "near-copies in train.txt and test.txt: 1")]),
        (shrink, True, "test/0/1.png", [("PROBLEM", "near-copies in train.txt and test.txt: 1")]),
        (shrink, True, "train/1/1.png", [("PROBLEM", "near-copies with two labels: 1")]),
        (shrink, True, "train/0/1.png", [("note    ", "near-copies within train.txt: 1")]),
    ],
)
def test_check_finds_copies_by_content(tmp_path, run_prepare, copy, near, place, expected):
    """The images are crops of two photos. Only train/0/0.png has a copy, under another name."""
    folder = make_dataset(tmp_path / "d", counts=(3, 2), test_images=2)
    images = folder / "images"
    for n, file in enumerate(sorted(images.rglob("*.png"))):
        pixels = load_sample_images().images[n % 2][(n // 2) * 90 % 300 :, n * 47 % 300 :][:120, :160]
        Image.fromarray(pixels).save(file)
    if copy:
        with Image.open(images / "train/0/0.png") as original:
            copy(original, images / place)
    else:
        shutil.copy(images / "train/0/0.png", images / place)
    flags = ["--decode", "--workers", 0, "--output", tmp_path / "out", *["--near-copies"] * near]
    outcome = run_prepare("check", folder, *flags)
    relation = "looks the same as" if copy else "has the same content as"
    found = re.findall(
        rf"(?m)^(\S+ +)\S+/t\w+\.txt:\d: '{place}' {relation} 'train/0/0\.png' at .*\((.*)\)", outcome.out
    )
    assert [(kind.strip(), group) for kind, group in found] == [(kind.strip(), group) for kind, group in expected]
    assert len(re.findall("copies (?:in|with)", outcome.out)) == len(expected), outcome.out
    assert outcome.code == any(kind == "PROBLEM" for kind, _ in expected)


def test_a_file_that_is_listed_twice_is_not_also_reported_as_a_copy(tiny, tmp_path, run_prepare):
    with open(tiny / "test.txt", "a") as handle:
        handle.write("train/0/0.png 0\n")
    outcome = run_prepare("check", tiny, "--decode", "--near-copies", "--workers", 0, "--output", tmp_path / "out")
    assert "(duplicates in two lists: 1)" in outcome.out
    assert "copies in" not in outcome.out


def test_a_dataset_that_another_process_is_writing_is_refused(project, tmp_path, run_prepare):
    photos = write_scans(tmp_path / "photos", {"ape": 4, "bat": 4})
    folder = project / "data_lists/zoo"
    with locked(folder):
        outcome = run_prepare("own", "--from", photos, "--name", "zoo", "--no-decode")
    assert outcome.code == 2
    assert f"another process is using {folder}" in outcome.err
    assert not folder.exists()


def test_different_scans_of_the_same_digit_are_not_near_copies(tmp_path, run_prepare, project):
    photos = write_scans(tmp_path / "photos", {"a": 200, "b": 100})
    assert run_prepare("own", "--from", photos, "--name", "digits", "--no-decode").code == 0
    flags = ["--decode", "--near-copies", "--workers", 0, "--output", tmp_path / "out"]
    assert "copies" not in run_prepare("check", "digits", *flags).out


def test_images_that_take_long_to_decode_are_named_slowest_first(tiny, tmp_path):
    """With a limit of 0 s, every image is slow."""
    (tiny / "images/train/1/0.png").unlink()
    Image.effect_noise((1500, 1500), 50).save(tiny / "images/train/1/0.png")
    found = check(str(tiny), None, True, False, 0, tmp_path / "out", slow_seconds=0)
    assert re.search(
        r"\n?43 images took more than 0 s to decode, the slowest: \S+train\.txt:17 train/1/0\.png \(\d+\.\d s\), ",
        "\n".join(found.remarks),
    )
    assert not any("to decode" in remark for remark in check(str(tiny), None, True, False, 0, tmp_path / "o").remarks)


def test_findings_are_printed_even_if_no_file_can_be_written(tiny, tmp_path, run_prepare):
    """A folder has the name of bad_images.csv; then a file also has that of the output folder."""
    (tiny / "images/train/0/5.png").write_bytes(b"no image")
    (tiny / "bad_images.csv/x").mkdir(parents=True)
    outcome = run_prepare("check", tiny, "--decode", "--workers", 0, "--output", tmp_path / "out")
    assert outcome.code == 1
    assert "train/0/5.png: not an image" in outcome.out
    recorded = tmp_path / "out/tiny-bad_images.csv"
    assert recorded.read_text().splitlines()[1].startswith("train.txt,6,train/0/5.png,")
    assert outcome.err.count("cannot be written") == 1
    assert f"the bad images are in {recorded}" in outcome.err
    (tmp_path / "file").write_text("")
    outcome = run_prepare("check", tiny, "--decode", "--workers", 0, "--output", tmp_path / "file")
    assert outcome.code == 1
    assert "train/0/5.png: not an image" in outcome.out
    assert f"nor can {tmp_path / 'file/tiny-bad_images.csv'}" in outcome.err
    assert "the plot and counts per class are not written" in outcome.err


def test_own_and_shrink_report_a_folder_of_lists_that_cannot_be_written_before_the_work(
    project, tmp_path, tiny, run_prepare, monkeypatch
):
    photos = write_scans(tmp_path / "photos", {"ape": 4, "bat": 4})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RESLT_LISTS", str(tmp_path / "file/data_lists"))
    for arguments in (
        ["own", "--from", photos, "--name", "zoo"],
        ["shrink", tiny, "--size", 8, "--output", tmp_path / "s"],
    ):
        outcome = run_prepare(*arguments, "--workers", 0)
        assert outcome.code == 2
        assert f"{tmp_path}/file/" in outcome.err
        assert "Traceback" not in outcome.err
    assert not (tmp_path / "s").exists()


def test_the_command_that_own_prints_has_settings_that_suit_the_data(project, tmp_path, run_prepare):
    """The classes have 60 and 4 scans; 10 and 2 are for testing, so 50 and 2 remain, 25 to 1. The batch size 4 is the power
    of two below a tenth of 52, and the learning rate is 0.05 * 4 / 128. Two classes allow only two different class sets
    of branches."""
    photos = write_scans(tmp_path / "photos", {"ape": 60, "bat": 4})
    outcome = run_prepare("own", "--from", photos, "--name", "two words", "--no-decode")
    assert outcome.code == 0, outcome.err
    command = outcome.out.splitlines()[-1]
    flags = "--data 'two words' --recipe own_finetune --model resnet50 --batch-size 4 --lr 0.0015625 --branches 2 --logit-adjust 1 --alpha 0.5"
    assert command == f"train with: accelerate launch train.py {flags}"
    config = resolve(shlex.split(flags)).config
    assert (config.model.model, config.model.pretrained, config.optim.batch_size) == ("resnet50", True, 4)
    assert (config.method.branches, config.method.logit_adjust, config.method.alpha) == (2, 1.0, 0.5)
    assert "3 branches, more than the 2 classes: class sets of branches coincide" in outcome.out
    assert "classes tested on fewer than 5 images: 1 of 2, first 'bat' on 2" in outcome.out
    assert yaml.safe_load((project / "data_lists/two words/info.yaml").read_text())["defaults"]["batch_size"] == 4
