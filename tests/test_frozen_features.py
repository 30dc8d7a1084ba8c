"""`--tune head`: a frozen part in evaluation mode, whose features are computed once and replace the images."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import CPU, model_of
from conftest import ALONE, TINY_FLAGS, last_checkpoint, make_dataset, train_until
from safetensors.torch import load_file

from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from reslt.config.stages import stages_of
from reslt.core.batch_shard import BatchShard
from reslt.core.errors import UserError
from reslt.data.datasets import load_dataset
from reslt.loading import features
from reslt.loading.features import FeatureLoader, FrozenPart, why_views_change
from reslt.loading.loaders import Loading
from reslt.loading.pipeline import FEATURES, RESIDENT
from reslt.models.tuning import held_modules, tune
from reslt.training.frozen import why_no_pooled_features
from reslt.training.step import TrainStep

MODEL = {"model": "cifar_resnet20", "model_kwargs": {"channels": (8, 16, 32)}, "img_size": 16}
BASE = Config.of(**MODEL, tune="head", crop="center", branch="bn", branch_at="pooled", batch_size=8, workers=0, seed=3)
WIDTH = 6  # of the features that `corners` computes; they identify an image and its mirror image
CROP = TINY_FLAGS.index("--crop")
FLAGS = [*TINY_FLAGS[:CROP], *TINY_FLAGS[CROP + 4 :], "--tune", "head"]  # which sets a crop of its own
FLAGS += ["--mean", ".5", ".5", ".5", "--std", ".2", ".2", ".2"]
pytestmark = pytest.mark.usefixtures("own_cache")


def corners(images: torch.Tensor) -> torch.Tensor:
    """Return the RGB values of the upper left and upper right pixels; they are exchanged in a mirror image."""
    return torch.cat([images[:, :, 0, 0], images[:, :, 0, -1]], 1)


def loading(folder: Path, frozen: FrozenPart | None = None, shard: BatchShard | None = None, **changes) -> Loading:
    config = BASE.changed(**changes)
    image_settings = ImageSettings(
        config.augment.img_size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.2), "bilinear", 1.0, config.augment
    )
    shard = shard or BatchShard(config.optim.batch_size)
    return Loading(load_dataset(str(folder)), image_settings, config.data, CPU, shard, config.run.seed, frozen)


def frozen_corners(digest: str = "weights") -> FrozenPart:
    return FrozenPart(corners, WIDTH, "corners", digest)


def batches(loader, epoch: int = 0, first_step: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (inputs, labels) of all micro-batches of an epoch, as a step sees them."""
    return [(loader.normalize(x), y) for window in loader.windows(epoch, first_step) for x, y in window]


@pytest.mark.parametrize(
    "changes",
    [{}, {"hflip": 0.0}, {"hflip": 0.2, "limit_train": 17}, {"limit_train": 9}],
    ids=["two views", "one view", "limited", "one step"],
)
@pytest.mark.parametrize("shard", [BatchShard(8), BatchShard(8, 1, 2, 2)], ids=["whole batch", "shard"])
def test_features_come_in_the_order_and_with_the_flips_of_resident_images(tiny, changes, shard):
    with_features, with_images = (
        loading(tiny, frozen_corners(), shard, **changes),
        loading(tiny, None, shard, **changes),
    )
    pipelines = with_features.pipeline(), with_images.pipeline()
    assert [p.training for p in pipelines] == [FEATURES, RESIDENT]
    found, wanted = with_features.training(pipelines[0]), with_images.training(pipelines[1])
    assert isinstance(found, FeatureLoader)
    for epoch, first_step in ((0, 0), (1, 0), (1, len(wanted) - 1)):
        pairs = list(zip(batches(found, epoch, first_step), batches(wanted, epoch, first_step), strict=True))
        assert pairs
        for (seen, labels), (images, own_labels) in pairs:
            assert torch.equal(seen, corners(images))
            assert torch.equal(labels, own_labels)
    for split in ("test", "train"):  # evaluated lists: images without a flip
        found, wanted = with_features.evaluation(split, pipelines[0]), with_images.evaluation(split, pipelines[1])
        of_each = [[torch.cat(part) for part in zip(*loader.epoch(0), strict=True)] for loader in (found, wanted)]
        assert torch.equal(of_each[0][0], corners(of_each[1][0]))
        assert torch.equal(of_each[0][1], of_each[1][1])


def test_an_image_drawn_several_times_in_an_epoch_is_flipped_by_chance_each_time(tiny):
    """A balanced sampler may draw an image several times."""

    class Repeated:
        def order(self, seed: int, epoch: int) -> np.ndarray:
            return np.arange(28) % 3

    seen = []
    for frozen in (frozen_corners(), None):
        own = loading(tiny, frozen)
        loader = own.training(own.pipeline())
        loader.batches.sampler = Repeated()
        inputs = torch.cat([x if frozen else corners(x) for x, _ in batches(loader)])
        seen.append(inputs)
    assert torch.equal(*seen)
    assert 3 < len(seen[0].unique(dim=0)) <= 6  # both views of some of the three images


class TestCache:
    """Features on disk."""

    def record_computations(self, monkeypatch) -> list[str]:
        computed, compute = [], features._computed

        def count(images, frozen, views, name):
            computed.append(f"{name} {views}")
            return compute(images, frozen, views, name)

        monkeypatch.setattr(features, "_computed", count)
        return computed

    def load(self, folder, digest="weights", **changes) -> None:
        own = loading(folder, frozen_corners(digest), **changes)
        own.training(own.pipeline())
        own.evaluation("test", own.pipeline())

    def test_features_are_computed_once_for_the_same_images_weights_and_views(self, tiny, monkeypatch):
        computed = self.record_computations(monkeypatch)
        self.load(tiny)
        assert computed == ["train 2", "test 1"]
        self.load(tiny, batch_size=4, hflip=0.9)
        assert len(computed) == 2
        for changes in ({"digest": "others"}, {"hflip": 0.0}, {"img_size": 12}, {"limit_train": 20}):
            computed.clear()
            self.load(tiny, **changes)
            assert "train 1" in computed or "train 2" in computed
        computed.clear()
        image = tiny / "images/test/1/2.png"
        shutil.copy(tiny / "images/test/0/0.png", image)
        self.load(tiny, limit_train=20)
        assert computed == ["test 1"]

    def test_features_of_other_weights_replace_those_before(self, tiny, tmp_path):
        for digest in ("one", "two", "three"):
            self.load(tiny, digest)
        assert (
            len(list((tmp_path / "cache").glob("*.features"))) == 2
        )  # one for the training list, one for the test list

    def test_damaged_features_are_computed_again(self, tiny, tmp_path, monkeypatch):
        self.load(tiny)
        (file,) = (tmp_path / "cache").glob("*-train-*.features")
        whole = file.read_bytes()
        computed = self.record_computations(monkeypatch)
        for damaged in (whole[:-4], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
            file.write_bytes(damaged)
            self.load(tiny)
            assert file.read_bytes() == whole
        assert computed == ["train 2"] * 3

    def test_features_stay_in_memory_if_the_cache_folder_cannot_be_written(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setenv("RESLT_CACHE", str(tmp_path / "tiny/train.txt/cache"))
        computed = self.record_computations(monkeypatch)
        self.load(tiny)
        assert computed == ["train 2", "test 1"]

    def test_an_image_that_cannot_be_read_is_named_and_nothing_is_stored(self, tiny, tmp_path):
        (tiny / "images/train/1/2.png").write_bytes(b"broken")
        with pytest.raises(UserError, match=r"train\.txt:19: .*train/1/2\.png"):
            self.load(tiny)
        assert not list((tmp_path / "cache").glob("*.features"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"hflip": 0.0, "sampler": "balanced", "method": "ce"}, ""),
        ({"crop": "pad"}, "--crop pad draws a new view in each epoch, --crop center does not"),
        ({"aa": "cifar10", "reprob": 0.1}, "--aa changes images at random; --reprob changes images at random"),
        ({"color_jitter": (0.4,)}, "--color-jitter changes images at random"),
        ({"rotate": 10.0}, "--rotate changes images at random"),
        ({"cutout": 4}, "--cutout changes images at random"),
        ({"mixup": 0.2}, "--mixup and --cutmix mix images"),
        ({"tta": "flip"}, "--tta flip evaluates mirror images (give it to evaluate.py instead)"),
        ({"method": "ce", "stages": ({"start": 0.5, "cutmix": 1.0},)}, "--mixup and --cutmix mix images"),
    ],
)
def test_settings_that_change_an_images_view_rule_out_features(changes, reason):
    stages = stages_of(BASE.changed(**changes))
    assert why_views_change((stage.config.augment, stage.config.method) for stage in stages) == reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"method": "ce"}, ""),
        ({"head": "cosine", "branch": "conv"}, ""),
        ({"model": "test_vit.r160_in1k", "model_kwargs": {}, "img_size": 32}, ""),
        ({"model": "test_efficientnet.r160_in1k", "model_kwargs": {}, "img_size": 32}, ""),
        ({"branch_at": "map"}, "the branches are on the feature map (--branch-at pooled)"),
        ({"eval_branch_at": "map"}, "the branches are on the feature map (--branch-at pooled)"),
        ({"experts": 2}, "the network has several last stages or exits (--experts, --network bbn or exits)"),
        ({"method": "bbn"}, "the network has several last stages or exits (--experts, --network bbn or exits)"),
        (
            {"model": "deit_tiny_distilled_patch16_224", "model_kwargs": {"depth": 1, "img_size": 32}, "method": "ce"},
            "VisionTransformerDistilled has no single linear classifier",
        ),
    ],
)
def test_the_reason_why_a_networks_features_cannot_be_computed_once_is_stated(changes, reason):
    model = model_of(BASE.changed(**changes), 5)
    assert why_no_pooled_features(model, BASE.changed(**changes).augment.img_size) == reason
    assert model.training


def test_a_network_that_adds_to_the_logits_of_its_classifier_has_no_features():
    model = model_of(BASE.changed(method="ce"), 5)
    plain = model.backbone.forward_head
    model.backbone.forward_head = lambda x, pre_logits=False: plain(x, pre_logits=pre_logits) + (0 if pre_logits else 9)
    assert (
        why_no_pooled_features(model, 16)
        == "the logits of CifarResNet are not those of one classifier on pooled features"
    )


@pytest.mark.parametrize("changes", [{}, {"method": "bbn"}, {"experts": 2}, {"head": "deconfounded", "method": "ce"}])
def test_the_frozen_part_stays_in_evaluation_mode_and_the_rest_trains(changes):
    config = BASE.changed(**changes)
    model = model_of(config, 5)
    tune(model, config.model)
    step = TrainStep(model, None, None, ALONE, None, None, 0, held=held_modules(model, config.model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    step.train_mode()
    model(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert model.training
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_head = re.compile(r"(experts\.\d\.)?(backbone\.fc\.|branches\.(bn|weight|bias))")
    assert all(of_head.match(name) for name in changed | trained)
    assert {name for name, _ in model.named_parameters() if of_head.match(name)} == trained
    assert any("running_mean" in name for name in changed) == (changes not in ({"method": "bbn"},))
    assert all(head.training for head in model.classifiers)


# Whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("frozen") / "tiny", splits=("test", "val"))


def trained(run_script, data: Path, name: str, *more) -> Path:
    """Return the folder of a run with the settings `name`, trained by the first test that needs it."""
    run = data.parent / f"runs/{name}{''.join(more)}"
    if not run.exists():
        where = ["--data", data, "--output", run.parent, "--experiment", run.name]
        outcome = run_script("train", *FLAGS, *SETTINGS[name], *more, *where)
        assert outcome.code == 0, outcome.err
    return run


def weights(run: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(last_checkpoint(run) / f"{name}.safetensors")


SETTINGS = {
    "reslt": ("--branch", "bn", "--model-ema", "--model-ema-decay", "0.5"),
    "adjusted": ("--method", "ce", "--logit-adjust", "1", "--sampler", "balanced", "--grad-accum-steps", "2"),
    "two_stages": ("--method", "crt", "--ncm", "l2", "--stage2-epochs", "1"),
    "class_means": ("--method", "ce", "--head", "cosine", "--head-init", "class_means"),
    "cosine": ("--method", "ce", "--head", "cosine", "--limit-train", "20", "--hflip", "0"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_training_on_features_ends_like_training_on_images(data, run_script, name):
    on_features = trained(run_script, data, name)
    on_images = trained(run_script, data, name, "--data-on-device", "on")
    found, wanted = weights(on_features), weights(on_images)
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-5, atol=1e-6)
    tables = [(run / "per_class.csv").read_text() for run in (on_features, on_images)]
    assert tables[0] == tables[1]
    logs = [(run / "train.log").read_text() for run in (on_features, on_images)]
    views = "1 fixed view" if name == "cosine" else "2 fixed views"
    assert (
        f"center crop{', flip 0.5' * (name != 'cosine')}; features of {views}, computed once (--tune head)" in logs[0]
    )
    assert "images resident on the CPU" in logs[1]


def test_frozen_weights_and_statistics_never_change(data, run_script):
    run = trained(run_script, data, "reslt")
    first = load_file(run / "checkpoints/1-3/model.safetensors")
    for name, value in weights(run).items():
        assert torch.equal(value, first[name]) == (not name.startswith(("branches", "backbone.fc"))), name


def test_evaluation_on_images_repeats_the_table_of_training_on_features(data, tmp_path, run_script):
    run = trained(run_script, data, "reslt")
    again = run_script("evaluate", "--ckpt", run, "--output", tmp_path / "again")
    assert again.code == 0, again.err
    assert (tmp_path / "again/per_class.csv").read_text() == (run / "per_class.csv").read_text()


@pytest.mark.parametrize("more", [(), ("--init-from",)], ids=["from scratch", "init_from"])
def test_a_run_on_features_resumes_mid_epoch_on_features(data, tmp_path, run_script, monkeypatch, more):
    """The run that started with --init-from resumes after those weights have been deleted."""
    source, flags = tmp_path / "source", [*FLAGS, *SETTINGS["reslt"], "--data", data]
    if more:
        shutil.copytree(trained(run_script, data, "reslt", "--seed", "5"), source)
        flags += [*more, source]
    whole = ["train", *flags, "--output", tmp_path, "--experiment", "whole"]
    assert run_script(*whole).code == 0
    train_until(run_script, monkeypatch, 4, *flags, "--output", tmp_path, "--experiment", "part")
    state = json.loads(next((tmp_path / "part/checkpoints").glob("*-5/state.json")).read_text())
    assert (state["config"]["data_on_device"], state["config"]["on_features"]) == ("on", True)
    shutil.rmtree(source, ignore_errors=True)
    rest = run_script("train", *flags, "--output", tmp_path, "--experiment", "part", "--resume", "auto")
    assert rest.code == 0, rest.err
    assert "features of 2 fixed views, computed once (as when the run began)" in rest.out
    for part in ("model", "ema"):
        found, wanted = weights(tmp_path / "part", part), weights(tmp_path / "whole", part)
        assert all(torch.equal(value, found[name]) for name, value in wanted.items())


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one(data, tmp_path, run_script):
    """The network has no branches, since their BatchNorm sees only the images of its process. The second process reads
    the features that the first has stored."""
    whole = trained(run_script, data, "adjusted")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    command += [*FLAGS, *SETTINGS["adjusted"], "--data", data, "--output", tmp_path, "--experiment", "two"]
    project = Path(__file__).resolve().parents[1]
    launched = subprocess.run(list(map(str, command)), cwd=project, capture_output=True, text=True, timeout=120)
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count("features of 2 fixed views, computed once") == 1
    assert len(list((tmp_path / "cache").glob("*.features"))) == 3  # one per list
    found, wanted = weights(tmp_path / "two"), weights(whole)
    assert all(torch.allclose(found[name], value, rtol=1e-4, atol=1e-6) for name, value in wanted.items())


def test_a_run_that_began_on_images_resumes_on_images(tiny):
    began = {
        recorded: loading(tiny, frozen_corners()).pipeline(recorded).training for recorded in ("on", "off", "features")
    }
    assert began == {"on": RESIDENT, "off": "host", "features": FEATURES}
    changed = FrozenPart(corners, WIDTH, "", "", "--aa changes images at random")  # --force-resume accepts it
    assert loading(tiny, changed).pipeline("features").training == RESIDENT


def test_head_tuning_without_features_prints_the_reason(data, tmp_path, run_script):
    flags = [*TINY_FLAGS, "--data", data, "--tune", "head", "--output", tmp_path, "--epochs", "1", "--branch-at", "map"]
    outcome = run_script("train", *flags)  # with --crop pad, as typed
    assert outcome.code == 0, outcome.err
    assert "(--tune head computes no features once: the branches are on the feature map" in outcome.out
