"""Classes of runs and of datasets: how they are recorded, validated and matched."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import model_of
from conftest import make_dataset

from reslt.config.schema import Config, DataSettings
from reslt.core.errors import UserError
from reslt.data.classes import Classes, fault_of, match_classes
from reslt.data.datasets import load_dataset
from reslt.data.evaluated import load_for_evaluation
from reslt.runs import checkpoint
from reslt.runs.convert import convert
from reslt.runs.released import ReleasedCheckpoint

RULE = {"by": "count", "many_above": 9, "few_below": 3}
RUN = Classes(3, ("auk", "gull", "tern"), np.array([30, 6, 2]), {"standard": RULE}, {"train": "abc"})
RUN_FOLDER, DATA_FOLDER = Path("output/run"), Path("data_lists/birds")


def match(model: Classes, names: tuple[str, ...] | None, number: int | None = None, by_index: bool = False):
    return match_classes(model, Classes(number or len(names), names), RUN_FOLDER, DATA_FOLDER, by_index)


def test_a_record_of_classes_is_read_back_and_an_older_one_may_lack_fields():
    read = Classes.read(json.loads(json.dumps(RUN.stored())))
    assert (read.number, read.names, read.lists, read.shot_splits) == (3, RUN.names, RUN.lists, RUN.shot_splits)
    assert read.images_per_class.tolist() == [30, 6, 2]
    assert fault_of(RUN.stored()) is None
    older = Classes.read({"num_classes": 3})
    assert (older.number, older.names, older.images_per_class, older.lists) == (3, None, None, {})
    assert fault_of({"num_classes": 3}) is None


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"num_classes": -1}, "num_classes is '-1', not a whole number from 0"),
        ({"num_classes": 4}, "class_names is not a list of 4 strings"),
        ({"class_names": "abc"}, "class_names is not a list of 3 strings"),
        ({"class_names": ["a", "b", 3]}, "class_names is not a list of 3 strings"),
        ({"class_names": ["a", "b", "a"]}, "class_names contains a name twice"),
        ({"class_names": ["a", "b", "\ud800"]}, "class_names contains a name that is not text"),
        ({"images_per_class": {"a": 1}}, "images_per_class is not a list of 3 numbers"),
        ({"images_per_class": [1, 2]}, "images_per_class is not a list of 3 numbers"),
        ({"images_per_class": [1, 0, 2]}, "images_per_class contains a value that is not a whole number from 1"),
        ({"images_per_class": [1, True, 2]}, "images_per_class contains a value that is not a whole number from 1"),
        ({"images_per_class": [1, 2**70, 2]}, "images_per_class contains a value that is not a whole number from 1"),
        ({"shot_splits": {"other": RULE}}, "shot_splits does not map standard"),
        ({"shot_splits": {"standard": {"by": ["count"]}}}, "shot split {'by': ['count']}: it must be"),
        ({"shot_splits": {"standard": {"by": "rank", "many": 1, "medium": 1, "few": 2**70}}}, "shot split"),
        ({"images_per_class": None}, "shot_splits does not map standard"),
        ({"lists": ["train"]}, "lists is not a mapping of digests"),
        ({"lists": {"train": 3}}, "lists is not a mapping of digests"),
    ],
)
def test_an_invalid_record_of_classes_is_refused_in_one_line(tmp_path, changes, fault):
    assert fault_of(RUN.stored() | changes).startswith(fault)
    state = {"epochs_done": 1, "steps_done": 5, "config": {}, "optimizer": {"state": {}, "param_groups": []}}
    checkpoint.write(tmp_path / "1-5", {"model": {}}, state | {"scaler": None} | RUN.stored() | changes)
    with pytest.raises(UserError, match=r"the checkpoint is damaged: state\.json: ") as refused:
        checkpoint.load(tmp_path / "1-5")
    assert len(str(refused.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "model_class", "note"),
    [
        (("auk", "gull", "tern"), [0, 1, 2], ""),
        (("tern", "auk", "gull"), [2, 0, 1], "classes matched by name"),
        (("auk", "gull"), [0, 1], "2 of the model's 3 classes"),
        (("tern",), [2], "1 of the model's 3 classes, classes matched by name"),
    ],
)
def test_classes_are_matched_by_name(names, model_class, note):
    found = match(RUN, names)
    assert (found.model_class.tolist(), found.how, found.note) == (model_class, "by name", note)
    assert found.is_identity == (model_class == list(range(len(model_class))))


def test_a_name_matches_however_its_accents_are_encoded():
    """macOS decomposes the letters of folder names: ö becomes o and a diaeresis."""
    model = Classes(2, ("M\u00f6we", "Alk"))
    assert match(model, ("Alk", "Mo\u0308we")).model_class.tolist() == [1, 0]
    both = Classes(3, ("M\u00f6we", "Mo\u0308we", "Alk"))  # a dataset that distinguishes them: matched exactly
    assert match(both, ("Alk", "Mo\u0308we")).model_class.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("names", "number", "by_index", "message"),
    [
        (("auk", "gull", "owl"), 3, False, r"which has 'owl', and lacks 'tern'; .*--classes-by-index"),
        (("auk", "gull", "tern", "owl"), 4, False, r"which has 'owl'; .*in its info\.yaml$"),
        (None, 4, False, r"was trained on 3 classes, but data_lists/birds has 4"),
        (("auk", "gull"), 2, True, r"was trained on 3 classes, but data_lists/birds has 2"),
    ],
)
def test_classes_that_the_model_lacks_are_refused(names, number, by_index, message):
    with pytest.raises(UserError, match=message):
        match(RUN, names, number, by_index)


def evaluated(model: Classes, folder: Path, is_other: bool = True, **settings):
    return load_for_evaluation(DataSettings(data=str(folder), **settings), None, model, RUN_FOLDER, is_other)[0]


def test_the_runs_counts_and_rule_define_the_groups_of_another_dataset(tmp_path):
    """The run has 30, 6 and 2 training images: more than 9, between, fewer than 3. By the other dataset's own counts and
    rule, every class is few-shot."""
    data = make_dataset(tmp_path / "d", counts=(4, 3, 2))
    (data / "info.yaml").write_text("image_root: images\nclass_names: [tern, auk, gull]\n")
    dataset = evaluated(RUN, data)
    groups = dataset.shot_groups["standard"]
    assert [groups[shot].tolist() for shot in ("many", "medium", "few")] == [
        [True, False, False], [False, True, False], [False, False, True]
    ]  # fmt: skip
    assert np.bincount(dataset.lists["train"].labels).tolist() == [3, 2, 4]
    assert load_dataset(str(data)).shot_groups["standard"]["few"].all()


def test_a_rule_edited_after_training_applies_to_the_runs_own_dataset_only(tmp_path):
    data = make_dataset(tmp_path / "d", counts=(4, 3, 2))
    rule = "shot_split: {by: class_index, many: 1, medium: 1, few: 1}\n"
    (data / "info.yaml").write_text(f"image_root: images\nclass_names: [auk, gull, tern]\n{rule}")
    assert evaluated(RUN, data, is_other=False).splits["standard"]["by"] == "class_index"
    assert evaluated(RUN, data, is_other=True).splits["standard"] == RULE


def test_without_train_txt_an_older_run_has_no_groups(tmp_path):
    data = make_dataset(tmp_path / "d")
    (data / "train.txt").unlink()
    assert evaluated(RUN, data).num_classes == 3
    with pytest.raises(
        UserError, match=r"train.txt does not exist, and output/run does not record its training counts"
    ):
        evaluated(Classes(3), data)
    with pytest.raises(UserError, match=r"train.txt does not exist; write it"):
        load_dataset(str(data))


def test_names_that_several_classes_share_are_not_recorded(tmp_path):
    data = make_dataset(tmp_path / "d")  # paths: train/<class>/<number>.png
    for part, names in ((1, ("0", "1", "2")), (0, None)):
        (data / "info.yaml").write_text(f"image_root: images\nclass_names_from_path: {part}\n")
        assert load_dataset(str(data)).classes.names == names


def test_a_run_without_names_takes_them_only_from_its_own_training_list():
    older = Classes(3, lists={"train": "abc"})
    assert older.completed_by(RUN) is RUN
    assert older.completed_by(replace(RUN, lists={"train": "def"})) is older
    assert Classes(3).completed_by(replace(RUN, lists={})).names is None
    named = replace(RUN, names=("x", "y", "z"))
    assert named.completed_by(RUN) is named


def test_a_released_checkpoint_takes_the_classes_of_the_named_dataset(tmp_path):
    data = make_dataset(tmp_path / "d")
    (data / "info.yaml").write_text("image_root: images\nclass_names: [auk, gull, tern]\n")
    torch.save({"state_dict": {"fc.weight": torch.zeros(3, 8)}}, tmp_path / "best.pth.tar")
    given = argparse.Namespace(model="resnet18", data=str(data), model_kwargs=None, class_order=None)
    found = ReleasedCheckpoint.read(tmp_path / "best.pth.tar", given)
    assert (found.classes.names, found.classes.images_per_class.tolist()) == (("auk", "gull", "tern"), [16, 8, 4])
    model = model_of(Config.of(model="cifar_resnet20", method="ce"), 3)
    convert(found, model, tmp_path / "converted")
    assert checkpoint.load(tmp_path / "converted").classes.names == ("auk", "gull", "tern")
