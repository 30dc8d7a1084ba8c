"""Datasets read from a folder of lists, and the errors that such a folder can contain."""

import re
import time

import numpy as np
import pytest
import yaml
from conftest import make_dataset

from reslt.config.places import DESCRIPTIONS, PROJECT
from reslt.core.errors import UserError
from reslt.data.datasets import INFO_KEYS, check_images, load_dataset, read_info
from reslt.data.lists import ImageList
from reslt.data.paths import find_image_root


def test_counts_classes_and_groups_are_derived_from_the_lists(tmp_path):
    dataset = load_dataset(str(make_dataset(tmp_path / "d", counts=(30, 20, 3))))
    assert dataset.num_classes == 3
    assert dataset.images_per_class.tolist() == [30, 20, 3]
    assert dataset.class_names is None
    groups = dataset.shot_groups["standard"]
    assert [groups[s].tolist() for s in ("many", "medium", "few")] == [[0, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_info_yaml_is_optional(tiny):
    (tiny / "info.yaml").unlink()
    assert load_dataset(str(tiny), str(tiny / "images")).num_classes == 3


def test_the_page_about_datasets_describes_every_key_of_info_yaml():
    page = (PROJECT / "docs/datasets.md").read_text(encoding="utf-8")
    table = page.partition("## `info.yaml`")[2].partition("\n### ")[0]
    keys = re.findall(r"`(\w+)", " ".join(re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)))
    assert sorted(keys) == sorted({*INFO_KEYS})


def test_a_paper_split_comes_beside_the_standard_one(tiny):
    info = {"image_root": "images", "paper_split": {"by": "rank", "many": 1, "medium": 1, "few": 1}}
    (tiny / "info.yaml").write_text(yaml.safe_dump(info))
    groups = load_dataset(str(tiny)).shot_groups
    assert list(groups) == ["standard", "paper"]
    assert groups["paper"]["few"].tolist() == [False, False, True]


def write(folder, name, text):
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "train.txt").unlink(), r"train\.txt does not exist; .*reslt\.prepare"),
        (lambda d: write(d, "test.txt", "test/0/0.png 3\n"), r"test\.txt:1: label 3 is outside 0\.\.2"),
        (lambda d: write(d, "train.txt", "train/0/0.png 0\ntrain/2/0.png 2\n"), r"class 1 has no training image"),
        (lambda d: write(d, "train.txt", "train/0/0.png 0\ntrain\n"), r"train\.txt:2: no label: 'train'"),
        (lambda d: write(d, "info.yaml", "image_root: nowhere"), r"image root .*nowhere.* is not a folder.*--data-dir"),
        (lambda d: write(d, "info.yaml", "image_rot: images"), r"info\.yaml: unknown key 'image_rot'; known"),
        (
            lambda d: write(d, "train.txt", "train/0/0.png 0\ntrain/2/0.png 999999999\n"),
            r"class 1 has no training image",
        ),
        (
            lambda d: write(d, "train.txt", "train/0/0.png 1\ntrain/2/0.png 2\n"),
            r"class 0 has no training image \(1 such",
        ),
        (lambda d: write(d, "train.txt", "train/0/0.png 0\n"), r"at least 2 classes"),
        (lambda d: write(d, "info.yaml", "num_classes: true"), r"at least 2 classes.*True"),
        (lambda d: write(d, "info.yaml", "class_names: [a, no, b]"), r"class_names must be a list of distinct strings"),
        (lambda d: write(d, "info.yaml", "images: [a]"), r"images must be the name of a folder"),
        (lambda d: write(d, "info.yaml", "num_classes: 3\nnum_classes: 4"), r"duplicate key 'num_classes'"),
        (lambda d: write(d, "info.yaml", "num_classes: 4"), r"class 3 has no training image"),
        (lambda d: write(d, "info.yaml", "num_classes: 2"), r"label 2 is outside 0\.\.1"),
        (lambda d: write(d, "info.yaml", "class_names: [a, b, a]"), r"class_names must be a list of distinct strings"),
        (
            lambda d: write(d, "info.yaml", "num_classes: 3\nclass_names: [a, b]"),
            r"num_classes is 3, but class_names has 2",
        ),
        (
            lambda d: write(d, "info.yaml", "shot_split: {by: rank, many: 9, medium: 0, few: 0}"),
            r"info\.yaml: shot_split: .*add up to 9, but .* 3",
        ),
        (
            lambda d: write(d, "info.yaml", "shot_split: 3"),
            r"info\.yaml: shot_split: shot split 3: it must be \{by: count",
        ),
        (lambda d: write(d, "local.yaml", "root: x"), r"local\.yaml: unknown key 'root'"),
    ],
)
def test_an_error_names_place_value_and_remedy(tiny, damage, message):
    damage(tiny)
    with pytest.raises(UserError, match=message):
        load_dataset(
            str(tiny), None if (tiny / "info.yaml").read_text() == "image_root: nowhere" else str(tiny / "images")
        )


def test_images_of_the_projects_datasets_are_looked_for_beside_its_lists_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RESLT_LISTS", str(tmp_path / "data_lists"))
    monkeypatch.delenv("RESLT_DATA", raising=False)
    assert find_image_root(DESCRIPTIONS / "digits_lt", {}, None).folder == DESCRIPTIONS.parent / "data/digits_lt"
    assert find_image_root(tmp_path / "data_lists/mine", {}, None).folder == tmp_path / "data/mine"


def test_the_image_root_is_looked_for_in_a_fixed_order(tiny, tmp_path, monkeypatch):
    for name in ("flag", "all/pictures", "local"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.delenv("RESLT_DATA", raising=False)
    info = {"image_root": "images", "images": "pictures"}
    write(tiny, "info.yaml", yaml.safe_dump(info))
    assert load_dataset(str(tiny)).image_root.folder == tiny / "images"
    write(tiny, "local.yaml", yaml.safe_dump({"image_root": str(tmp_path / "local")}))
    assert load_dataset(str(tiny)).image_root.folder == tmp_path / "local"
    monkeypatch.setenv("RESLT_DATA", str(tmp_path / "all"))
    assert load_dataset(str(tiny)).image_root.folder == tmp_path / "all/pictures"
    assert load_dataset(str(tiny), str(tmp_path / "flag")).image_root.folder == tmp_path / "flag"


def test_an_image_that_a_list_names_and_the_folder_lacks_is_reported_early(tiny):
    dataset = load_dataset(str(tiny))
    check_images(dataset, ["train", "test"])
    (dataset.image_root.folder / "train/1/5.png").unlink()
    with pytest.raises(UserError, match=r"train\.txt:22: there is no image .*train/1/5\.png.*--data-dir"):
        check_images(dataset, ["test", "train"])


def test_evaluation_uses_the_lists_that_exist_unless_one_is_named(tmp_path):
    both = load_dataset(str(make_dataset(tmp_path / "both", splits=("val", "test"))))
    test_only = load_dataset(str(make_dataset(tmp_path / "test_only")))
    neither = load_dataset(str(make_dataset(tmp_path / "neither", splits=())))
    assert both.eval_splits(None) == ["val"]
    assert both.eval_splits("both") == ["val", "test"]
    assert test_only.eval_splits(None) == ["test"]
    assert neither.eval_splits(None) == []
    with pytest.raises(UserError, match=r"--eval-split val: .*val\.txt does not exist"):
        test_only.eval_splits("val")
    assert [dataset.final_split(None) for dataset in (both, test_only, neither)] == ["test", "test", None]
    assert (both.final_split("val"), both.final_split("test")) == ("val", "test")
    with pytest.raises(UserError, match=r"--final-split val: .*val\.txt does not exist; --val-from-train"):
        test_only.final_split("val")


def test_labels_are_stored_in_four_bytes_each(tiny):
    assert load_dataset(str(tiny)).lists["train"].labels.dtype == np.int32


@pytest.mark.parametrize(("name", "most"), [("cifar10", 5000), ("cifar100", 500)])
@pytest.mark.parametrize("factor", [0.01, 0.02, 0.1])
def test_the_number_of_training_images_in_info_yaml_follows_from_the_imbalance_factor(name, most, factor):
    """Class c of C keeps int(most x factor^(c / (C - 1))) images (Cui et al. 2019)."""
    classes = int(name.removeprefix("cifar"))
    info = read_info(DESCRIPTIONS / f"{name}_lt_{factor}")
    assert info["training_images"] == sum(int(most * factor ** (c / (classes - 1))) for c in range(classes))


@pytest.fixture
def record(run_prepare, tmp_path):
    """record(folder) -> Outcome of `check --decode`, which writes the dataset's bad_images.csv."""
    return lambda folder: run_prepare("check", folder, "--decode", "--workers", 0, "--output", tmp_path / "checked")


def test_recorded_bad_images_are_left_out_before_anything_is_derived(tmp_path, record):
    """Class 0 has 20 images and loses a truncated and a missing one, which makes it few-shot (below 20). Class 1 has 8 and
    loses an empty one."""
    folder = make_dataset(tmp_path / "d", counts=(20, 8, 4))
    lines = (folder / "train.txt").read_text().splitlines(keepends=True)
    (folder / "train.txt").write_text("".join(["\n", *lines[:5], "\n", *lines[5:]]))
    truncated, empty = folder / "images/train/0/2.png", folder / "images/train/1/0.png"
    truncated.write_bytes(truncated.read_bytes()[:200])
    empty.write_bytes(b"")
    (folder / "images/train/0/5.png").unlink()
    (folder / "images/test/2/4.png").unlink()
    outcome = record(folder)
    assert outcome.code == 1
    assert [row.split(",")[:3] for row in (folder / "bad_images.csv").read_text().splitlines()[1:]] == [
        ["train.txt", "4", "train/0/2.png"],
        ["train.txt", "8", "train/0/5.png"],
        ["train.txt", "23", "train/1/0.png"],
        ["test.txt", "15", "test/2/4.png"],
    ]
    reasons = [row.split(",", 3)[3] for row in (folder / "bad_images.csv").read_text().splitlines()[2:]]
    assert reasons == ["there is no such image", "the file is empty", "there is no such image"]

    whole, dataset = load_dataset(str(folder)), load_dataset(str(folder), bad_images="skip")
    assert whole.images_per_class.tolist() == [20, 8, 4]
    assert whole.left_out == {}
    assert dataset.images_per_class.tolist() == [18, 7, 4]
    assert [whole.shot_groups["standard"][shot][0] for shot in ("medium", "few")] == [True, False]
    assert [dataset.shot_groups["standard"][shot][0] for shot in ("medium", "few")] == [False, True]
    assert dataset.left_out == {
        "train": ("train/0/2.png", "train/0/5.png", "train/1/0.png"),
        "test": ("test/2/4.png",),
    }
    assert dataset.left_out_text == (
        "--bad-images skip: 3 images left out of train.txt (train/0/2.png, train/0/5.png, train/1/0.png) and 1 of test.txt "
        "(test/2/4.png)"
    )
    check_images(dataset, ["train", "test"])
    train, before = dataset.lists["train"], whole.lists["train"]
    file_lines = (folder / "train.txt").read_text().split("\n")
    assert len(train) == 29
    for i in range(29):
        assert file_lines[train.line(i) - 1] == f"{train.path(i)} {train.labels[i]}"
        assert before.path(before.at_line(train.line(i))) == train.path(i)
    assert train.line(np.arange(29)).tolist() == [train.line(i) for i in range(29)]
    assert {line for line in range(-2, 40) if train.at_line(line) is None} == {
        -2,
        -1,
        0,
        1,
        4,
        7,
        8,
        23,
        *range(35, 40),
    }
    (folder / "images/train/2/3.png").unlink()
    with pytest.raises(UserError, match=r"train\.txt:34: there is no image .*train/2/3\.png"):
        check_images(dataset, ["train"])


def test_leaving_out_nothing_changes_nothing(tiny):
    images = load_dataset(str(tiny)).lists["train"]
    same = images.without([])
    assert [same.path(i) for i in range(len(same))] == [images.path(i) for i in range(len(images))]
    assert same.line(27) == 28


def test_without_a_record_nothing_is_left_out_and_the_command_to_write_one_is_named(tiny, record):
    assert record(tiny).code == 0
    dataset = load_dataset(str(tiny), bad_images="skip")
    assert dataset.images_per_class.tolist() == [16, 8, 4]
    assert dataset.left_out_text == (
        f"--bad-images skip: no bad images of {tiny} are recorded, so none is left out; record them with: "
        f"python -m reslt.prepare check {tiny} --decode"
    )
    elsewhere = load_dataset(str(tiny), tiny / "images", bad_images="skip")
    assert elsewhere.left_out_text.endswith(f"check {tiny} --decode --data-dir {tiny / 'images'}")


def test_only_ten_of_many_images_left_out_are_named(tiny):
    rows = [f"train.txt,{i + 1},train/0/{i}.png,x\n" for i in range(13)]
    write(tiny, "bad_images.csv", "list,line,path,reason\n" + "".join(rows))
    text = load_dataset(str(tiny), bad_images="skip").left_out_text
    assert text.startswith("--bad-images skip: 13 images left out of train.txt (train/0/0.png, ")
    assert text.endswith(f"train/0/9.png, and 3 more, all in {tiny / 'bad_images.csv'})")


HEAD = "list,line,path,reason\n"
CLASS_2 = "".join(f"train.txt,{25 + i},train/2/{i}.png,x\n" for i in range(4))
TEST = "".join(f"test.txt,{1 + 5 * c + i},test/{c}/{i}.png,x\n" for c in range(3) for i in range(5))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            HEAD + "train.txt,1,train/0/1.png,x\n",
            r"'train/0/1\.png' is not the image at .*train\.txt:1; the list has ch",
        ),
        (HEAD + "train.txt,29,train/2/3.png,x\n", r"not the image at .*train\.txt:29; .* check .*tiny --decode"),
        (HEAD + "train.txt,0,train/0/0.png,x\n", r"not the image at .*train\.txt:0;"),
        (HEAD + "val.txt,1,val/0/0.png,x\n", r"not the image at .*val\.txt:1;"),
        (
            HEAD + "train.txt,1,train/0/0.png\n",
            r"bad_images\.csv:2: 'train\.txt,1,train/0/0\.png' is not a list, a line",
        ),
        (HEAD + "train.txt,1,train/0/0.png,x\n\n", r"bad_images\.csv:3: '' is not"),
        (HEAD + "train.txt,one,train/0/0.png,x\n", r"bad_images\.csv:2: .* rewrite it with: python -m reslt"),
        (HEAD + "train.txt,-1,train/0/0.png,x\n", r"bad_images\.csv:2: "),
        (HEAD + f"train.txt,{'9' * 30},train/0/0.png,x\n", r"bad_images\.csv:2: "),
        (HEAD + "info.yaml,1,train/0/0.png,x\n", r"bad_images\.csv:2: "),
        (HEAD + '"train.txt,1', r"bad_images\.csv: unexpected end of data; rewrite it"),
        (HEAD + "train.txt,1,train/0/\0.png,x\n", r"bad_images\.csv: "),
        ("", r"bad_images\.csv:1: the columns are not list,line,path,reason"),
        ("path,line\n", r"bad_images\.csv:1: the columns are not"),
        (HEAD.encode("utf-16"), r"bad_images\.csv: .*can't decode byte .*; rewrite it"),
        (
            HEAD + CLASS_2,
            r"train\.txt: class 2 has no training image left; --bad-images skip: 4 images left out of train",
        ),
        (
            HEAD + TEST,
            r"test\.txt: no image is left; --bad-images skip: 15 images left out of test\.txt \(.*and 5 more",
        ),
    ],
)
def test_a_record_that_is_invalid_or_does_not_match_the_lists_is_refused(tiny, content, message):
    (tiny / "bad_images.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    load_dataset(str(tiny))
    with pytest.raises(UserError, match=message):
        load_dataset(str(tiny), bad_images="skip")


def test_images_are_left_out_of_a_long_list_without_a_loop_over_its_lines(tmp_path):
    """Half of a million lines are left out; the others keep their order and their line numbers."""
    lines = 1_000_000
    images = ImageList(
        tmp_path / "train.txt",
        np.tile(np.frombuffer(b"ab", np.uint8), lines),
        np.arange(2, 2 * lines + 1, 2),
        np.arange(lines, dtype=np.int32),
        np.empty(0, np.int64),
    )
    start = time.process_time()
    rest = images.without(np.arange(0, lines, 2))
    assert time.process_time() - start < 2  # a loop over the lines takes longer than 5
    assert rest.labels[:3].tolist() == [1, 3, 5]
    assert rest.line(np.array([0, 1, lines // 2 - 1])).tolist() == [2, 4, lines]
    assert rest.path(lines // 2 - 1) == "ab"
