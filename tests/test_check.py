"""`prepare check`: the problems that it finds, the lines that it prints, and the path rules that it fits."""

import os
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import TINY_FLAGS, make_dataset
from PIL import Image

from reslt.config.places import DESCRIPTIONS
from reslt.core.errors import UserError
from reslt.data.datasets import check_images, load_dataset
from reslt.data.paths import ImageRoot, PathRule


@pytest.fixture
def check(run_prepare, tmp_path):
    return lambda *arguments: run_prepare("check", *arguments, "--output", tmp_path / "output", "--workers", 2)


def test_a_valid_dataset_passes_with_table_and_plot(check, tmp_path):
    folder = make_dataset(tmp_path / "d", counts=(120, 30, 2), splits=("val", "test"))
    outcome = check(folder, "--decode")
    assert outcome.code == 0, outcome.out
    assert re.search(r"train +152 +3 +0 +0\n", outcome.out)
    assert re.search(r"test +15 +3 +0 +0\n", outcome.out)
    assert "no problems" in outcome.out
    with Image.open(tmp_path / "output/d-images_per_class.png") as plot:
        assert plot.format == "PNG"
    counts = pd.read_csv(tmp_path / "output/d-images_per_class.csv")
    assert counts["train_images"].tolist() == [120, 30, 2]
    assert counts["val_images"].tolist() == [5, 5, 5]
    assert not (folder / "local.yaml").exists()
    assert not (folder / "bad_images.csv").exists()


def edit(file: Path, change) -> None:
    file.write_text(change(file.read_text()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: (d / "images/train/1/3.png").unlink(),
            r"train\.txt:20: there is no image .*train/1/3\.png \(1 of 28 lines\)",
        ),
        (lambda d: (d / "images/test/2/4.png").write_bytes(b""), r"test\.txt:15: the file is empty: .*test/2/4\.png"),
        (
            lambda d: edit(d / "train.txt", lambda t: t + "train/0/3.png 0\n"),
            r"train\.txt:29: 'train/0/3\.png' is already listed at .*train\.txt:4 \(duplicates within one list: 1\)",
        ),
        (
            lambda d: edit(d / "train.txt", lambda t: t + "train/0/3.png 2\n"),
            r"train\.txt:29: .* already .*, with label 0 there and 2 here \(duplicates within one list",
        ),
        (
            lambda d: edit(d / "test.txt", lambda t: t + "train/0/0.png 0\ntrain/0/1.png 0\n"),
            r"test\.txt:16: 'train/0/0\.png' is already listed at .*train\.txt:1 \(duplicates in two lists: 2\)",
        ),
        (
            lambda d: (d / "info.yaml").write_text("image_root: images\nnum_classes: 2\n"),
            r"train\.txt:25: label 2 is outside 0\.\.1 \(4 such lines\); is the line wrong, or num_classes",
        ),
        (
            lambda d: (d / "info.yaml").write_text("image_root: images\nnum_classes: 5\n"),
            r"train\.txt: 2 of 5 classes have no image, first class 3; number the classes",
        ),
        (lambda d: edit(d / "train.txt", lambda t: t + "oops\n"), r"train\.txt:29: no label: 'oops'"),
        (
            lambda d: edit(d / "train.txt", lambda t: t + "train/0/x.png 999999999\n"),
            r"train\.txt: 999,999,996 of 1,000,000,000 classes have no image, first class 3",
        ),
    ],
)
def test_each_fault_is_reported_with_its_place_and_exit_code_1(check, tiny, damage, message):
    damage(tiny)
    outcome = check(tiny)
    assert outcome.code == 1
    assert re.search(r"(?m)^PROBLEM  .*" + message, outcome.out), outcome.out


def test_an_invalid_list_is_reported_even_if_nothing_else_can_be_checked(check, tiny):
    (tiny / "train.txt").write_text("train/0/0.png 0\n/etc/x.png 1\n")
    (tiny / "test.txt").write_text("test/0/0.png 0\n")
    outcome = check(tiny)
    assert outcome.code == 1
    assert "train.txt:2: the path leaves the image root" in outcome.out


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (
            "paper_split: {by: rank, many: 5, medium: 1, few: 1}",
            r"info\.yaml: paper_split: .*add up to 7, but there are 3",
        ),
        ("shot_split: 7", r"info\.yaml: shot_split: "),
        ("defaults: {foo: 1}", r"info\.yaml: unknown key 'foo'"),
    ],
)
def test_a_description_that_training_would_refuse_is_a_problem(check, tiny, info, message):
    (tiny / "info.yaml").write_text(f"image_root: images\n{info}\n")
    outcome = check(tiny)
    assert outcome.code == 1
    assert re.search(r"PROBLEM  .*" + message, outcome.out), outcome.out


def test_one_file_under_two_spellings_is_found(check, tiny):
    edit(tiny / "test.txt", lambda t: t + "./train//0/0.png 0\n")
    outcome = check(tiny)
    assert outcome.code == 1
    assert "'./train//0/0.png' is the same file as 'train/0/0.png'" in outcome.out


def test_unreadable_images_are_found_by_decoding_and_recorded(check, tiny):
    truncated = tiny / "images/train/0/5.png"
    truncated.write_bytes(truncated.read_bytes()[:200])
    Image.new("RGB", (101, 1)).save(tiny / "images/test/1/2.png")
    assert check(tiny).code == 0  # without decoding they look like any file
    outcome = check(tiny, "--decode")
    assert outcome.code == 1
    assert re.search(r"PROBLEM  .*train\.txt:6: .*train/0/5\.png: not a readable image", outcome.out)
    assert re.search(
        r"PROBLEM  .*test\.txt:8: .*test/1/2\.png: 101 x 1 pixels, more than 100 times as long as wide", outcome.out
    )
    recorded = pd.read_csv(tiny / "bad_images.csv")
    assert recorded[["list", "line", "path"]].to_numpy().tolist() == [
        ["train.txt", 6, "train/0/5.png"],
        ["test.txt", 8, "test/1/2.png"],
    ]
    Image.new("RGB", (16, 16)).save(truncated)
    Image.new("RGB", (16, 16), "red").save(tiny / "images/test/1/2.png")
    assert check(tiny, "--decode").code == 0
    assert not (tiny / "bad_images.csv").exists()


def test_only_the_first_of_many_unreadable_images_are_printed(check, tiny):
    for i in range(9):
        (tiny / f"images/train/0/{i}.png").write_bytes(b"no image")
    outcome = check(tiny, "--decode")
    assert outcome.out.count("not an image of a supported format") == 5
    assert "and 4 more; all are in" in outcome.out
    assert len(pd.read_csv(tiny / "bad_images.csv")) == 9


def test_empty_and_missing_images_are_recorded_and_reported_once(check, tiny):
    (tiny / "images/train/0/1.png").write_bytes(b"")
    (tiny / "images/train/0/2.png").unlink()
    (tiny / "images/train/0/3.png").unlink()
    (tiny / "images/train/0/3.png").mkdir()
    outcome = check(tiny, "--decode")
    assert outcome.code == 1
    assert re.search(r"train +28 +3 +3 +0\n", outcome.out)
    assert outcome.out.count("PROBLEM") == 2
    assert pd.read_csv(tiny / "bad_images.csv")[["line", "reason"]].to_numpy().tolist() == [
        [2, "the file is empty"],
        [3, "there is no such image"],
        [4, "not a file but a folder, pipe or device"],
    ]


def test_missing_images_are_not_recorded_if_they_are_most_of_a_list(check, tiny):
    """15 of 28 training images are missing: the image root is probably wrong. 7 of 15 test images are: these are recorded."""
    for i in range(15):
        (tiny / f"images/train/0/{i}.png").unlink()
    (tiny / "images/train/0/15.png").write_bytes(b"")
    for path in sorted((tiny / "images/test").glob("*/*.png"))[:7]:
        path.unlink()
    outcome = check(tiny, "--decode")
    assert outcome.code == 1
    assert re.search(
        r"note .*train\.txt: more than half of the images are missing, so they are not recorded", outcome.out
    )
    recorded = pd.read_csv(tiny / "bad_images.csv")
    assert recorded["list"].tolist() == ["train.txt"] + ["test.txt"] * 7
    assert recorded["line"].tolist() == [16, *range(1, 8)]


def test_classes_that_a_test_list_lacks_are_a_note_and_not_a_problem(check, tiny):
    edit(tiny / "test.txt", lambda t: "".join(line for line in t.splitlines(True) if line.endswith(" 0\n")))
    outcome = check(tiny)
    assert outcome.code == 0
    assert "test.txt: 2 of 3 classes have no image, first class 1; their accuracy will be n/a" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "'nowhere' is neither a folder nor a dataset"),
        (["places_lt"], "make the lists of places_lt with: python -m reslt.prepare places_lt"),
        (["{tiny}", "--data-dir", "/no/such"], "image root /no/such (from --data-dir) is not a folder"),
        (["{tiny}", "--decodes"], "unrecognized arguments: --decodes"),
    ],
)
def test_a_mistake_on_the_command_line_exits_with_code_2(project, run_prepare, tiny, arguments, message):
    outcome = run_prepare("check", *(a.format(tiny=tiny) for a in arguments))
    assert outcome.code == 2
    assert message in outcome.err


PLACES = [f"train/{name}/{i:08d}.jpg" for name in ("airfield", "arena-hockey", "bar", "zen_garden") for i in range(3)]
PLACES += [f"val/{name}/Places365_val_{i:08d}.jpg" for i, name in enumerate(("airfield", "arena-hockey", "bar"))]
IMAGENET = [f"train/n0{i}/n0{i}_{j}.JPEG" for i in range(4) for j in range(3)]
IMAGENET += [f"val/n0{i}/ILSVRC2012_val_0{i}{j}.JPEG" for i in range(4) for j in range(2)]
INATURALIST = [
    f"train_val2018/{kind}/{c}/{c:08x}{i}.jpg" for kind, c in (("Plantae", 7), ("Aves", 12)) for i in range(4)
]


def data_256(path: str) -> str:
    """train/arena-hockey/x.jpg -> data_256/a/arena/hockey/x.jpg; val/airfield/x.jpg -> val_256/x.jpg"""
    split, name, file = path.split("/")
    return f"val_256/{file}" if split == "val" else f"data_256/{name[0]}/{name.replace('-', '/')}/{file}"


def prefixed(prefix: str):
    return lambda path: prefix + path


LAYOUTS = [
    ("places_lt", PLACES, data_256),
    ("places_lt", PLACES, lambda p: data_256(p).replace("_256", "_large")),
    ("places_lt", PLACES, lambda p: p if p.startswith("train") else "val/" + p.split("/")[2]),
    ("imagenet_lt", IMAGENET, lambda p: p if p.startswith("train") else "val/" + p.split("/")[2]),
    ("imagenet_lt", IMAGENET, prefixed("ILSVRC/Data/CLS-LOC/")),
    ("places_lt", PLACES, lambda p: data_256(p).replace("data_256", "data_256_standard")),
    ("imagenet_lt", IMAGENET, lambda p: "ILSVRC/Data/CLS-LOC/" + (p if p[0] == "t" else "val/" + p.split("/")[2])),
    ("inaturalist2018", INATURALIST, lambda p: p.replace("train_val2018", "2018")),
    ("inaturalist2018", INATURALIST, lambda p: p.partition("/")[2]),
]  # fmt: skip


def make_layout(folder: Path, root: Path, paths: list[str], place, photo: Path) -> None:
    """Write the lists of the paths to `folder`, those below val/ as the test list, and a photo at place(path) below `root`
    for each path. Every file has its own content: bytes after a JPEG's end are not decoded."""
    folder.mkdir(exist_ok=True)
    classes = sorted({p.split("/")[-2] for p in paths})
    (folder / "info.yaml").write_text(f"num_classes: {max(2, len(classes))}\n")
    lines = {"train": [], "test": []}
    for path in paths:
        lines["test" if path.startswith("val/") else "train"].append(f"{path} {classes.index(path.split('/')[-2])}\n")
        (root / place(path)).parent.mkdir(parents=True, exist_ok=True)
        (root / place(path)).write_bytes(photo.read_bytes() + path.encode())
    for split, rows in lines.items():
        if rows:
            (folder / f"{split}.txt").write_text("".join(rows))


@pytest.mark.parametrize(("name", "paths", "place"), LAYOUTS)
def test_stated_rules_that_fit_the_disk_are_reported_written_and_used(
    project, check, tmp_path, photo, name, paths, place
):
    """Images are at place(path). Without --fix-paths this is a problem and nothing is written; with it the lists are
    valid, for `check` and for the loader, and the image root is recorded too."""
    folder, root = project / "data_lists" / name, tmp_path / "disk"
    make_layout(folder, root, paths, place, photo)
    info = yaml.safe_load((DESCRIPTIONS / name / "info.yaml").read_text())
    (folder / "info.yaml").write_text(yaml.safe_dump({"path_variants": info["path_variants"]}))

    first = check(name, "--data-dir", root)
    assert first.code == 1
    assert "paths do not match the disk" in first.out
    assert "(100% then); write them to" in first.out
    assert not (folder / "local.yaml").exists()
    fixed = check(name, "--data-dir", root, "--fix-paths", "--decode")
    assert fixed.code == 0, fixed.out
    again = check(name)  # local.yaml names the image root too
    assert again.code == 0, again.out
    assert "paths do not match" not in again.out
    dataset = load_dataset(name)
    check_images(dataset, list(dataset.lists))
    assert dataset.image_root.file(paths[0]) == root / place(paths[0])
    assert len(dataset.image_root.rules) <= 3


@pytest.mark.parametrize(
    ("paths", "place", "rule"),
    [
        (IMAGENET[:12], prefixed("images (1)/"), {"match": "^", "replace": "images (1)/"}),
        (IMAGENET, lambda p: p.replace("train/", "training/"), {"match": "^train/", "replace": "training/"}),
        (INATURALIST[:4], lambda p: "all/" + p.rpartition("/")[2], {"match": "^train_val2018/Plantae/7/", "replace": "all/"}),
        (PLACES[:3], lambda p: p.replace("train/", "data/a/"), {"match": "^train/", "replace": "data/a/"}),
    ],
)  # fmt: skip
def test_if_no_stated_rule_fits_a_rule_to_write_by_hand_is_printed(project, check, tmp_path, photo, paths, place, rule):
    """The rule leads the first missing image to the file of its name; written to local.yaml, it makes the dataset valid."""
    folder, root = project / "data_lists/unknown", tmp_path / "disk"
    make_layout(folder, root, paths, place, photo)
    outcome = check("unknown", "--data-dir", root, "--fix-paths")
    assert outcome.code == 1
    assert f"no stated rule leads to {paths[0]!r}; below {root} it is at {place(paths[0])!r}" in outcome.out
    printed = re.search(r"(?m)^path_rules:\n- .*$", outcome.out)[0]
    assert yaml.safe_load(printed) == {"path_rules": [rule]}
    (folder / "local.yaml").write_text(printed)
    assert "there is no image" not in check("unknown", "--data-dir", root).out


def test_if_several_files_have_the_name_of_a_missing_image_the_folder_is_left_open(project, check, tmp_path, photo):
    make_layout(project / "data_lists/unknown", tmp_path, ["a/1.jpg"], lambda path: "x/1.jpg", photo)
    (tmp_path / "y").mkdir()
    os.link(photo, tmp_path / "y/1.jpg")
    outcome = check("unknown", "--data-dir", tmp_path, "--fix-paths")
    assert "may be any of 2 files" in outcome.out
    assert "- {match: ^a/, replace: FOLDER/}" in outcome.out


def test_paths_that_match_already_are_left_alone(check, tiny):
    outcome = check(tiny, "--fix-paths")
    assert outcome.code == 0
    assert not (tiny / "local.yaml").exists()


def test_a_folder_without_the_images_suggests_nothing(check, tiny, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    outcome = check(tiny, "--data-dir", tmp_path / "elsewhere", "--fix-paths")
    assert outcome.code == 1
    assert "rule" not in outcome.out
    assert "28 of 28 lines" in outcome.out


def test_a_link_to_a_parent_folder_does_not_make_the_search_endless(project, check, tmp_path, photo):
    """root/a contains the image; root/a/loop is a link to root."""
    root = tmp_path / "root"
    make_layout(project / "data_lists/unknown", root, ["b/x.jpg"], lambda path: "a/x.jpg", photo)
    (root / "a/loop").symlink_to(root)
    assert "- {match: ^b/, replace: a/}" in check("unknown", "--data-dir", root, "--fix-paths").out


def test_the_first_rule_that_matches_applies(tmp_path):
    root = ImageRoot(
        tmp_path, (PathRule("^val/[^/]+/", "val/"), PathRule("^val/", "never/"), PathRule("^t(.)", r"T\1\1"))
    )
    assert root.file("val/n01/x.jpg") == tmp_path / "val/x.jpg"
    assert root.file("train/x.jpg") == tmp_path / "Trrain/x.jpg"
    assert root.file("other/x.jpg") == tmp_path / "other/x.jpg"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("[{match: '^val/'}]", r"local\.yaml: path_rules: rule 1 is \{'match': '\^val/'\}; write it as"),
        ("[{match: '^(val', replace: x}]", r"rule 1, .*: missing \), unterminated subpattern"),
        ("[{match: '^val', replace: '\\1'}]", r"rule 1, .*: invalid group reference 1"),
        ("[{match: '^(?P<a>val)', replace: '\\g<b>'}]", r"rule 1, .*unknown group name 'b'"),
        ("[{match: 1, replace: x}]", r"rule 1 is"),
        ("text", r"rule 1 is 'text'"),
    ],
)
def test_a_malformed_rule_is_reported(tiny, rules, message):
    (tiny / "local.yaml").write_text(f"path_rules: {rules}")
    with pytest.raises(UserError, match=message):
        load_dataset(str(tiny))


def test_training_reads_the_files_that_the_rules_lead_to(tiny, run_script, tmp_path):
    (tiny / "images/train").rename(tiny / "images/training")
    failed = run_script("train", "--data", tiny, *TINY_FLAGS, "--output", tmp_path)
    assert failed.code == 2
    assert "prepare check" in failed.err
    assert "--fix-paths tries other layouts" in failed.err
    (tiny / "local.yaml").write_text("path_rules: [{match: '^train/', replace: training/}]")
    outcome = run_script("train", "--data", tiny, *TINY_FLAGS, "--output", tmp_path)
    assert outcome.code == 0, outcome.err


def test_images_that_no_stated_rule_leads_to_stay_missing(project, check, tmp_path, photo):
    """Every class has a 00000000.jpg. The rule leads to a/airfield/; arena-hockey is at a/arena/hockey/."""
    folder, root = project / "data_lists/unknown", tmp_path / "disk"
    make_layout(folder, root, PLACES[:12], data_256, photo)
    (folder / "info.yaml").write_text("path_variants: [{match: '^train/(\\w)', replace: 'data_256/\\1/\\1'}]")
    outcome = check("unknown", "--data-dir", root, "--fix-paths")
    assert outcome.code == 1
    assert "train.txt:4: there is no image" in outcome.out
    dataset = load_dataset("unknown")
    for path in PLACES[:12]:
        assert dataset.image_root.file(path).is_file() == ("-" not in path)


def test_rules_that_lead_two_paths_to_one_file_are_a_problem(check, tiny):
    (tiny / "local.yaml").write_text("path_rules: [{match: '^train/[01]/', replace: train/1/}]")
    outcome = check(tiny)
    assert outcome.code == 1
    assert re.search(r"'train/1/\d\.png' is the same file as 'train/0/\d\.png' at ", outcome.out)


def test_rules_that_lead_two_classes_to_one_file_are_not_written(project, check, tmp_path, photo):
    folder = project / "data_lists/unknown"
    make_layout(folder, tmp_path, ["a/1.jpg"], lambda path: "flat/1.jpg", photo)
    (folder / "train.txt").write_text("a/1.jpg 0\nb/1.jpg 1\n")
    (folder / "info.yaml").write_text("path_variants: [{match: '^[ab]/', replace: flat/}]")
    outcome = check("unknown", "--data-dir", tmp_path, "--fix-paths")
    assert outcome.code == 1
    assert not (folder / "local.yaml").exists()


def test_an_image_root_without_the_images_is_not_recorded(check, tiny, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tiny / "local.yaml").write_text(f"image_root: {tiny / 'images'}\n")
    outcome = check(tiny, "--data-dir", tmp_path / "elsewhere", "--fix-paths")
    assert outcome.code == 1
    assert "nothing is written to" in outcome.out
    assert load_dataset(str(tiny)).image_root.folder == tiny / "images"
