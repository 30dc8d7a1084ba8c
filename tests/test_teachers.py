"""Teachers of the many, medium and few classes: their term, their weights, and runs that learn from them."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from builders import ONE
from conftest import make_dataset, train_until
from torch import nn

from reslt.config.resolve import resolve
from reslt.core.batch_shard import BatchShard
from reslt.core.errors import UserError
from reslt.data.datasets import load_dataset
from reslt.data.groups import SHOTS
from reslt.methods.losses import FusionLoss
from reslt.reproduce.first_stage import rows_of_required, share_first_stages, with_teachers
from reslt.reproduce.plan import TrainingList
from reslt.reproduce.rows import of_recipes
from reslt.reproduce.table_state import TableState
from reslt.runs.summary import Summary
from reslt.training.step import TrainStep
from reslt.training.teachers import Teachers, group_weight

GROUPS = {  # five classes, not in the order of their indices
    "many": np.array([False, True, False, False, True]),
    "medium": np.array([True, False, False, False, False]),
    "few": np.array([False, False, True, True, False]),
}
MEMBERS = ([1, 4], [0], [2, 3])
COUNTS = (8, 8, 6, 6, 4, 4)
SPLIT = "shot_split: {by: class_index, many: 2, medium: 2, few: 2}\n"


class Fixed(nn.Module):
    """A network that returns the same (N, C) logits for any images."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, images):
        return self.logits[: len(images)]


def softmax(logits, temperature=1.0) -> list[float]:
    powers = [math.exp(value / temperature) for value in logits]
    return [power / sum(powers) for power in powers]


def fixed_teachers(images: int) -> tuple[Teachers, list]:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(3, images, 5)).astype(np.float32).tolist()
    return Teachers([Fixed(teacher_logits) for teacher_logits in logits], GROUPS), logits


def test_the_term_is_the_weighted_divergence_within_each_group_at_temperature_2():
    teachers, logits = fixed_teachers(2)
    teachers.accuracies = {"many": 80.0, "medium": 80.0, "few": 80.0}
    teachers.begin_epoch(3, 10, {"many": 10.0, "medium": 52.0, "few": 90.0})
    student = np.random.default_rng(1).normal(size=(2, 5)).astype(np.float32)
    expected = 0.0
    for weight, teacher_logits, members in zip((1, 0.5, 0), logits, MEMBERS, strict=True):  # (80 - 52) / 80 / 0.7 = 0.5
        for i in range(2):
            p = softmax([teacher_logits[i][c] for c in members], 2)
            q = softmax([student[i][c] for c in members], 2)
            expected += weight * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    found = teachers.divergence(teachers(torch.zeros(2, 1)), torch.from_numpy(student))
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("accuracy", "weight"), [(0, 1), (17.9, 1), (18, 1), (39, 0.5), (60, 0), (75, 0), (18.6, 1 - 0.6 / 42)]
)
def test_a_teacher_of_60_percent_teaches_fully_below_18_and_not_at_all_from_60_on(accuracy, weight):
    assert group_weight(accuracy, 60) == pytest.approx(weight)
    assert group_weight(accuracy / 100, 0.6) == pytest.approx(weight)
    assert group_weight(0, 0) == 0


@pytest.mark.parametrize(("epoch", "pace"), [(0, 0), (2, 0.4), (5, 1), (9, 1)])
def test_the_weight_of_an_image_grows_from_its_teachers_probability_of_the_label_to_1(epoch, pace):
    """The teacher of an image with label 3 compares the few classes 2 and 3. A mixed image of labels 3 and 1 has the mixture
    of both probabilities."""
    teachers, logits = fixed_teachers(2)
    teachers.begin_epoch(epoch, 10, None)
    few, many = softmax([logits[2][0][c] for c in (2, 3)])[1], softmax([logits[0][1][c] for c in (1, 4)])[0]
    taught = teachers(torch.zeros(2, 1))
    found = teachers.weighted(taught, torch.tensor([3, 1]))
    expected = torch.zeros(2, 5)
    expected[0, 3], expected[1, 1] = few + (1 - few) * pace, many + (1 - many) * pace
    torch.testing.assert_close(found, expected)
    mixed = torch.tensor([[0, 0.25, 0, 0.75, 0], [0, 1.0, 0, 0, 0]])
    many_of_first = softmax([logits[0][0][c] for c in (1, 4)])[0]
    known = 0.75 * few + 0.25 * many_of_first
    torch.testing.assert_close(teachers.weighted(taught, mixed)[0], mixed[0] * (known + (1 - known) * pace))


class Flat(nn.Module):
    """A model that maps (N, 1, 2, 2) images to (1, N, 5) branch logits."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(4, 5)

    def forward(self, images):
        return self.linear(images.flatten(1))[None]


def gradient(images, labels, micro_batches: int, **loss) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient and the loss of a step with teachers; `loss` are arguments of FusionLoss."""
    accelerator = SimpleNamespace(**vars(ONE), no_sync=lambda _: nullcontext(), backward=lambda loss: loss.backward())
    model, teachers = Flat(0), Teachers([Flat(1), Flat(2), Flat(3)], GROUPS)
    step = TrainStep(
        model,
        FusionLoss(**loss),
        torch.optim.SGD(model.parameters(), 0.1),
        accelerator,
        BatchShard(len(images), micro_batches=micro_batches),
        normalize=lambda images: images,
        seed=0,
        teachers=teachers,
    )
    window = list(zip(images.chunk(micro_batches), labels.chunk(micro_batches), strict=True))
    found, _ = step.gradients(step.inputs(window, 0))
    assert all(parameter.grad is None for parameter in teachers.parameters())
    return model.linear.weight.grad.clone(), found


def test_the_shares_of_two_micro_batches_add_up_to_the_step_of_the_whole_batch():
    """The loss is the mean over the 8 images of the weighted cross-entropy and the three divergences."""
    torch.manual_seed(5)
    images, labels = torch.randn(8, 1, 2, 2), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    (whole_gradient, loss), (parts_gradient, sum_of_losses) = gradient(images, labels, 1), gradient(images, labels, 2)
    torch.testing.assert_close(parts_gradient, whole_gradient)
    torch.testing.assert_close(sum_of_losses, loss)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])  # the total weight of the images does not depend on teachers
    whole, parts = (gradient(images, labels, number, class_weights=weights) for number in (1, 2))
    torch.testing.assert_close(parts, whole)
    student, networks, expected = Flat(0)(images)[0].tolist(), [Flat(seed)(images)[0].tolist() for seed in (1, 2, 3)], 0
    for i, label in enumerate(labels.tolist()):
        for logits, members in zip(networks, MEMBERS, strict=True):
            p, q = (softmax([network[i][c] for c in members], 2) for network in (logits, student))
            expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            if label in members:
                known = softmax([logits[i][c] for c in members])[members.index(label)]
                expected -= known * math.log(softmax(student[i])[label])
    assert loss.item() == pytest.approx(expected / 8, rel=1e-5)


class TestOnlyShots:
    @pytest.fixture
    def data(self, tmp_path):
        folder = make_dataset(tmp_path / "d", counts=(6, 5, 4, 3), splits=("val", "test"))
        (folder / "info.yaml").write_text(
            "image_root: images\nshot_split: {by: class_index, many: 1, medium: 1, few: 2}\n"
        )
        return folder

    def test_lists_have_only_the_images_of_the_group_and_counts_are_those_of_all_classes(self, data):
        whole, few = load_dataset(str(data)), load_dataset(str(data), only_shots="few")
        for split in ("train", "val", "test"):
            images = few.lists[split]
            expected = [whole.lists[split].path(i) for i, c in enumerate(whole.lists[split].labels) if c in (2, 3)]
            assert [images.path(i) for i in range(len(images))] == expected
            assert few.digests[split] != whole.digests[split]
        assert few.images_per_class.tolist() == [6, 5, 4, 3]
        assert few.num_classes == 4
        assert few.classes.images_per_class.tolist() == [6, 5, 4, 3]
        assert TrainingList(str(data)).images(only_shots="few") == 7
        assert TrainingList(str(data)).images(0.5, "many") == 3

    def test_a_list_without_an_image_of_the_group_is_an_error(self, data):
        (data / "val.txt").write_text("val/0/0.png 0\n")
        with pytest.raises(UserError, match=r"--only-shots few: \S*val.txt has no image of these classes"):
            load_dataset(str(data), only_shots="few")
        (data / "info.yaml").write_text("image_root: images\nshot_split: {by: count, many_above: 9, few_below: 4}\n")
        with pytest.raises(UserError, match=r"--only-shots many: \S*train.txt has no image of these classes"):
            load_dataset(str(data), only_shots="many")
        (data / "train.txt").unlink()
        with pytest.raises(UserError, match=r"derived from \S*train.txt, which must exist"):
            load_dataset(str(data), only_shots="few", model_classes=4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "lfme"], "--method lfme: give its teachers with --teachers MANY MEDIUM FEW, three runs of"),
        (["--method", "lfme", "--teachers", "a", "."], "teachers: 2 values given; it takes 3"),
        (["--method", "lfme", "--teachers", "nowhere", ".", "."], "there is no file or folder nowhere"),
        (["--method", "ce", "--teachers", ".", ".", ".", "--only-shots", "few"], "they teach all classes"),
        (["--method", "bbn", "--teachers", ".", ".", "."], "they see single images, not pairs"),
        (["--method", "elf_ldam_drw", "--teachers", ".", ".", "."], "are not defined at early exits"),
        (["--method", "ride_router", "--teachers", ".", ".", "."], "a router has a loss of its own"),
        (["--method", "ce", "--teachers", ".", ".", ".", "--tune", "head"], "--tune head trains on features"),
        (["--method", "ce", "--teachers", ".", ".", ".", "--eval-split", "test"], "give --eval-split val, or both"),
        (["--method", "ncm", "--only-shots", "few"], "ncm: only the few classes have images"),
    ],
)
def test_settings_that_contradict_teachers_are_errors(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        resolve(["--data", "digits_lt", "--model", "cifar_resnet20", *flags])
    assert message in str(raised.value)


def test_a_recipe_cannot_name_teachers(tmp_path):
    (tmp_path / "r.yaml").write_text("data: digits_lt\nmethod: lfme\nteachers: [., ., .]\n")
    with pytest.raises(UserError, match="teachers: a file cannot set it; give it as a flag, --teachers"):
        resolve(["--recipe", str(tmp_path / "r.yaml")])


SMALL = {
    "method": "lfme", "model": "cifar_resnet20", "model_kwargs": {"channels": [4, 8, 16]}, "crop": "pad", "img_size": 16,
    "epochs": 2, "batch_size": 8, "warmup_epochs": 0, "lr": 0.05, "workers": 0, "checkpoint_hist": 9,
}  # fmt: skip
STEPS = sum(COUNTS) // 8


class TestRuns:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        return tmp_path_factory.mktemp("teachers")

    @pytest.fixture
    def planned(self, folder):
        """Return the rows of the student's recipe, with its three teachers."""
        recipe = folder / "student.yaml"
        if not recipe.exists():
            data = make_dataset(folder / "d", counts=COUNTS, splits=("val", "test"))
            (data / "info.yaml").write_text(f"image_root: images\n{SPLIT}")
            recipe.write_text(yaml.safe_dump({"data": str(data)} | SMALL))
        rows, _ = of_recipes([str(recipe)]).rows([3], str(folder / "out"), ["--lr", "0.04"], {})
        return share_first_stages(with_teachers(rows), str(folder / "out"), [])

    @pytest.fixture
    def student(self, planned, run_script):
        """Return the folder of the finished run, and its arguments."""
        [run] = planned[0].runs
        for required in (*run.requires, run):
            if not (required.config.run_folder / "result.json").exists():
                outcome = run_script("train", *required.arguments)
                assert outcome.code == 0, outcome.err
        return run.config.run_folder, list(run.arguments)

    def test_a_plan_has_the_teachers_first_with_the_settings_of_the_run(self, planned):
        [run] = planned[0].runs
        assert [teacher.config.data.only_shots for teacher in run.teachers] == ["many", "medium", "few"]
        assert run.config.model.teachers == tuple(str(teacher.config.run_folder) for teacher in run.teachers)
        for teacher in run.teachers:
            settings = teacher.config.flat()
            changed = {name for name, value in run.config.flat().items() if value != settings[name]}
            assert changed == {"method", "sampler", "only_shots", "teachers", "experiment"}
            assert (teacher.config.method.method, teacher.config.optim.lr) == ("ce", 0.04)
        assert [row.label for row in rows_of_required(planned)] == ["teacher of other rows"] * 3
        table = TableState("recipes", planned, Path("nowhere"))
        assert table.to_do == [*run.teachers, run]
        assert table.shared == [
            f"{teacher.config.run.experiment} is a teacher of {run.config.run.experiment}" for teacher in run.teachers
        ]

    def test_a_teacher_is_evaluated_only_on_its_group(self, planned, student, run_script):
        teacher = planned[0].runs[0].teachers[2].config.run_folder
        result = json.loads((teacher / "result.json").read_text())
        assert (result["images"], result["tables"]["standard"]["ce"]["many"]) == (10, None)
        again = run_script("evaluate", "--ckpt", teacher)
        assert again.code == 0, again.err
        assert json.loads((teacher / "result.json").read_text())["all"] == result["all"]

    def test_a_run_stopped_within_an_epoch_and_resumed_ends_with_the_same_weights(
        self, student, tmp_path, run_script, monkeypatch
    ):
        """The stopped and the resumed run begin the second epoch with the accuracies of the first, which weight the
        teachers. A teacher of another group is refused."""
        whole, arguments = student
        arguments += ["--output", str(tmp_path)]
        begin, begun = Teachers.begin_epoch, []
        monkeypatch.setattr(Teachers, "begin_epoch", lambda self, *given: begun.append(given) or begin(self, *given))
        train_until(run_script, monkeypatch, STEPS + 2, *arguments)
        first = arguments.index("--teachers") + 1
        same_teachers = arguments[:first] + [arguments[first]] * 3 + arguments[first + 3 :]
        refused = run_script("train", *same_teachers)
        assert refused.code == 2
        assert "it was trained with --only-shots many, but is the teacher of the medium classes" in refused.err
        resumed = run_script("train", *arguments)
        assert resumed.code == 0, resumed.err
        assert "teachers many: " in resumed.out
        row = pd.read_csv(whole / "summary.csv").iloc[0]
        assert begun == [(0, 2, None), *[(1, 2, pytest.approx({shot: row[f"val_{shot}"] for shot in SHOTS}))] * 2]
        name = f"checkpoints/2-{2 * STEPS}/model.safetensors"
        assert (whole / name).read_bytes() == (tmp_path / whole.name / name).read_bytes()

    def test_the_teachers_digests_are_recorded_and_teachers_with_others_are_refused(
        self, student, run_script, tmp_path
    ):
        whole, arguments = student
        digests = json.loads((whole / "result.json").read_text())["teacher_digests"]
        assert len(set(digests)) == 3
        assert yaml.safe_load((whole / "config.yaml").read_text())["teacher_digests"] == digests
        state = json.loads((whole / f"checkpoints/2-{2 * STEPS}/state.json").read_text())
        assert state["config"]["teacher_digests"] == digests
        first = arguments.index("--teachers") + 1
        many, folded = Path(arguments[first]), tmp_path / "many.safetensors"
        assert run_script("evaluate", "--ckpt", many, "--fold", folded).code == 0
        arguments[first] = str(folded)  # the same weights in another file
        accepted = run_script("train", *arguments)
        assert accepted.code == 0, accepted.err
        best = (many / "checkpoints/best").read_text().strip()
        arguments[first] = str(next(path for path in (many / "checkpoints").glob("*-*") if path.name != best))
        refused = run_script("train", *arguments)
        assert refused.code == 2
        assert "was started with other teachers, or without any" in refused.err

    def test_a_run_with_teachers_but_without_a_validation_list_is_refused(self, student, run_script, tmp_path):
        _, arguments = student
        data = make_dataset(tmp_path / "without", counts=(9, 9, 9))
        (data / "info.yaml").write_text(
            "image_root: images\nshot_split: {by: class_index, many: 1, medium: 1, few: 1}\n"
        )
        refused = run_script("train", *arguments, "--data", data, "--output", tmp_path)
        assert refused.code == 2
        assert "set a part of the training list aside with --val-from-train 0.1" in refused.err

    def test_teachers_that_were_trained_on_validation_images_are_a_warning(self, student, run_script, tmp_path):
        """The run sets other images aside than its teachers did, so that their weights depend on images that they know."""
        whole, arguments = student
        data = yaml.safe_load((whole / "config.yaml").read_text())["config"]["data"]
        (Path(data) / "val.txt").rename(tmp_path / "val.txt")
        try:
            more = ("--val-from-train", 0.2, "--epochs", 1, "--output", tmp_path)
            warned = run_script("train", *arguments, *more)
        finally:
            (tmp_path / "val.txt").rename(Path(data) / "val.txt")
        assert warned.code == 0, warned.err
        assert warned.err.count("may have been trained on this run's validation images") == 3
        assert "it was trained with --val-from-train None --seed" in warned.err


def test_the_accuracies_that_weight_the_teachers_are_those_of_the_last_evaluated_epoch(tmp_path):
    summary = Summary(tmp_path)
    assert summary.latest("val") is None
    row = {"epoch": 1, "val_many": 1.0, "val_medium": 2.0, "val_few": 3.0, "val_all": 2.0}
    later = {"epoch": 2, "val_many": 4.0, "val_medium": 5.0, "val_few": 6.0, "val_all": 5.0}
    summary.rows = [row, later, {"epoch": 3}]
    assert summary.latest("val") == {"many": 4.0, "medium": 5.0, "few": 6.0}
