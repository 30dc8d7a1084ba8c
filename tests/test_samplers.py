"""Orders of training images: their frequencies, their dependence on seed and epoch, and their path through the loaders."""

import numpy as np
import pytest
import torch
from builders import settings_of, train_loader_of
from conftest import make_dataset
from scipy.stats import chi2

from reslt.config.parts import SAMPLERS
from reslt.config.schema import Config
from reslt.config.stages import stages_of
from reslt.core.batch_shard import BatchShard
from reslt.data.datasets import load_dataset
from reslt.loading.batches import ShuffledBatches
from reslt.methods.registry import create_sampler

COUNTS = np.array([60, 20, 0, 6, 2])  # class 2 has no image
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), COUNTS))
IMAGES, EPOCHS = len(LABELS), 200
DRAWN = [name for name in SAMPLERS if name != "instance"]


def sampler_of(name: str, labels: np.ndarray = LABELS, classes: int = 5, **settings):
    return create_sampler(stages_of(Config.of(method="ce", sampler=name, **settings))[0], labels, classes)


def in_proportion(weights: list[float]) -> np.ndarray:
    return np.array(weights) / sum(weights)


def effective_number(n: int, beta: float) -> float:
    return sum(beta**i for i in range(n))


SHARES = {  # of the classes with 60, 20, 6 and 2 images
    "balanced": in_proportion([1, 1, 1, 1]),
    "balanced4": in_proportion([1, 1, 1, 1]),
    "sqrt": in_proportion([60**0.5, 20**0.5, 6**0.5, 2**0.5]),
    "effective": in_proportion([n / effective_number(n, 0.9) for n in (60, 20, 6, 2)]),
    "reversed": in_proportion([1 / 60, 1 / 20, 1 / 6, 1 / 2]),
    "progressive": (in_proportion([60, 20, 6, 2]) + 1 / 4) / 2,  # on average over its epochs
}


@pytest.mark.parametrize("name", DRAWN)
def test_classes_and_images_are_drawn_with_the_stated_probabilities(name):
    """Over 200 epochs, by chi-square: a correct sampler exceeds the bounds once in 10,000 seeds. (Four in a row varies less
    than independent draws.)"""
    sampler = sampler_of(name, sampler_beta=0.9, epochs=EPOCHS)
    orders = np.stack([sampler.order(7, epoch) for epoch in range(EPOCHS)])
    assert orders.shape == (EPOCHS, IMAGES)
    per_image = np.bincount(orders.ravel(), minlength=IMAGES)
    per_class = np.bincount(LABELS[orders.ravel()], minlength=5)
    assert per_class[2] == 0
    expected = SHARES[name] * orders.size
    assert ((per_class[COUNTS > 0] - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-4, 3)
    for c in (0, 1, 3, 4):
        of_class = per_image[c == LABELS]
        statistic = ((of_class - of_class.mean()) ** 2 / of_class.mean()).sum()
        assert statistic < chi2.ppf(1 - 1e-4, COUNTS[c] - 1)


@pytest.mark.parametrize("name", DRAWN)
def test_an_order_is_a_pure_function_of_seed_and_epoch(name):
    order = sampler_of(name).order(3, 5)
    other = sampler_of(name)
    other.order(3, 0)
    assert np.array_equal(other.order(3, 5), order)
    assert not np.array_equal(other.order(3, 6), order)
    assert not np.array_equal(other.order(4, 5), order)


def test_the_instance_order_is_the_loaders_own():
    assert sampler_of("instance") is None


def test_four_of_a_class_follow_each_other_and_classes_take_turns():
    sampler = sampler_of("balanced4")
    for epoch in range(20):
        order = sampler.order(0, epoch)
        visits = LABELS[order].reshape(-1, 4)  # 88 images are 22 visits
        assert (visits == visits[:, :1]).all()
        times = np.bincount(visits[:, 0], minlength=5)[[0, 1, 3, 4]]
        assert times.max() - times.min() <= 1
        assert all(
            set(cycle) == {0, 1, 3, 4} for cycle in visits[:20, 0].reshape(5, 4)
        )  # each turn is a shuffle of all
        for c in (0, 1, 3, 4):
            drawn = order[LABELS[order] == c]
            for turn in range(0, len(drawn), COUNTS[c]):  # all images of a class before one repeats
                part = drawn[turn : turn + COUNTS[c]]
                assert len(set(part)) == len(part)


def test_four_in_a_row_of_a_class_with_two_images_repeats_each_and_an_incomplete_visit_ends_the_epoch():
    labels = np.array([0, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    for epoch in range(10):
        order = sampler_of("balanced4", labels, 2).order(0, epoch)
        assert len(order) == 10
        visits = np.split(order, [4, 8])
        for visit in visits[:2]:
            assert len(set(visit)) == (2 if visit[0] < 2 else 4)
        assert len(set(labels[visits[2]])) == 1


def test_progressive_moves_from_the_lists_frequencies_to_equal_ones_over_its_schedule():
    by_image, equal = COUNTS / COUNTS.sum(), (COUNTS > 0) / 4
    config = Config.of(method="ce", sampler="progressive", epochs=11)
    sampler = create_sampler(stages_of(config)[0], LABELS, 5)
    for epoch, t in ((0, 0.0), (4, 0.4), (10, 1.0)):
        assert sampler.probabilities(epoch) == pytest.approx((1 - t) * by_image + t * equal)
    for stages, epoch, t in (
        (({"start": 0.5, "class_weights": "inverse"},), 8, 0.8),  # a stage that continues the schedule
        (({"epochs": 5, "lr": 0.1},), 11, 0.0),  # a stage with its own schedule
        (({"epochs": 5, "lr": 0.1},), 15, 1.0),
    ):
        sampler = create_sampler(stages_of(config.changed(stages=stages))[1], LABELS, 5)
        assert sampler.probabilities(epoch) == pytest.approx((1 - t) * by_image + t * equal)


@pytest.mark.parametrize("name", DRAWN)
def test_several_processes_and_micro_batches_divide_each_global_batch(name):
    whole = ShuffledBatches(np.arange(IMAGES), BatchShard(16), 0, sampler_of(name))
    whole.epoch = 3
    indices, draws = (part[:, 0] for part in whole.parts())
    assert indices.shape == (IMAGES // 16, 16)
    assert np.array_equal(draws.ravel(), np.arange(IMAGES // 16 * 16))
    for processes, micro_batches in ((2, 1), (2, 2), (4, 1)):
        shards = [BatchShard(16, rank, processes, micro_batches) for rank in range(processes)]
        parts = [ShuffledBatches(np.arange(IMAGES), shard, 0, sampler_of(name)) for shard in shards]
        for part in parts:
            part.epoch = 3
        for i, expected in enumerate((indices, draws)):
            joined = np.concatenate([part.parts()[i].reshape(len(expected), -1) for part in parts], axis=1)
            assert np.array_equal(joined, expected)


def test_a_sampler_orders_the_images_that_limit_train_keeps(tmp_path):
    loader = loader_of(make_dataset(tmp_path / "d"), "off", "reversed", limit_train=14)
    kept = set(loader.batches.indices.tolist())
    assert len(kept) == len(loader.ordered_labels) == 14
    drawn = {i for epoch in range(20) for i in loader.batches.order(epoch).ravel().tolist()}
    assert drawn == kept  # the sampler's positions are those of the kept images


def loader_of(data, on_device: str, sampler: str, **more):
    config = Config.of(
        model="cifar_resnet20", img_size=16, crop="pad", crop_padding=2, batch_size=4, workers=0, hflip=0.5,
        data_on_device=on_device, method="ce", sampler=sampler, **more,
    )  # fmt: skip
    model_data = {
        "input_size": (3, 16, 16),
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "interpolation": "bilinear",
        "crop_pct": 1,
    }
    loader = train_loader_of(load_dataset(str(data)), config, settings_of(config, model_data))
    loader.batches.sampler = create_sampler(stages_of(config)[0], loader.ordered_labels, 3)
    return loader


@pytest.mark.parametrize("on_device", ["on", "off"])
def test_repeated_draws_of_an_image_are_augmented_differently_and_reproducibly(tmp_path, on_device):
    """The rarest of three classes has 4 images and about 9 of 28 draws. A crop has 25 places, and is mirrored or not: two
    draws in 50 agree."""
    loader = loader_of(make_dataset(tmp_path / "d"), on_device, "balanced")
    images = torch.cat([window[0][0] for window in loader.windows(1)])
    again = torch.cat([window[0][0] for window in loader.windows(1)])
    assert torch.equal(images, again)
    indices = loader.batches.order(1).ravel()
    pairs = [(i, j) for i in range(28) for j in range(i) if indices[i] == indices[j]]
    differ = [not torch.equal(images[i], images[j]) for i, j in pairs]
    assert len(pairs) > 8
    assert np.mean(differ) > 0.7


@pytest.mark.parametrize("on_device", ["on", "off"])
@pytest.mark.parametrize("sampler", ["balanced4", "reversed"])
def test_an_epoch_of_a_sampler_resumes_midway_with_the_same_windows(tmp_path, sampler, on_device):
    loader = loader_of(make_dataset(tmp_path / "d"), on_device, sampler, grad_accum_steps=1)
    whole = list(loader.windows(2))
    rest = list(loader_of(tmp_path / "d", on_device, sampler).windows(2, first_step=3))
    assert (len(whole), len(rest)) == (7, 4)
    for a, b in zip(whole[3:], rest, strict=True):
        assert torch.equal(a[0][0], b[0][0])
        assert torch.equal(a[0][1], b[0][1])
    labels = torch.cat([window[0][1] for window in whole]).numpy()
    assert np.array_equal(labels, loader.images.labels.numpy()[loader.batches.order(2).ravel()])
