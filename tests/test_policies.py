"""Policies drawn for many images: timm's and torchvision's own choices, numbers and frequencies."""

import random
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from builders import settings_of
from PIL import Image
from timm.data import auto_augment
from torchvision import transforms

from reslt.augment.batch_operations import apply
from reslt.augment.host_transforms import train_transform
from reslt.augment.policies import (
    AFFINE,
    BICUBIC,
    BILINEAR,
    CODES,
    LEVELS,
    NEAREST,
    OPERATIONS,
    HostOnly,
    OperationPlan,
    RandomOperations,
    create_policy,
    effect,
)
from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from reslt.core.errors import UserError

SIDE = 20
TIMMS = ["v0", "v0r", "original", "originalr", "v0-mstd0.5", "original-mstd1.5", "rand-m9-mstd0.5", "rand-m7-n3-p0.8"]
TIMMS += [
    "rand-m9-mstd0.5-inc1",
    "rand-m15-mstd2-mmax20-inc1-p1",
    "rand-m8-mstd101-p0.7",
    "rand-m9-n4-mstd0.5-tweights",
]


def settings(**changes) -> ImageSettings:
    values = dict(crop="pad", train_interpolation="random", img_size=SIDE) | changes
    data = dict(input_size=(3, 9, 9), mean=(0.5, 0.2, 0.9), std=(0.2,) * 3, interpolation="bicubic", crop_pct=1.0)
    return settings_of(Config.of(**values), data)


def hosts(s: ImageSettings):
    """What augments on the host: torchvision's or timm's own object."""
    augment = train_transform(s).transforms[1]
    return augment.transforms[0] if isinstance(augment, transforms.Compose) else augment


def pictures(count: int) -> np.ndarray:
    """(count, SIDE, SIDE, 3): ramps of random colors with noise."""
    generator = np.random.default_rng(3)
    low, high = generator.integers(0, 256, (2, count, 1, 1, 3))
    ramp = np.linspace(0, 1, SIDE).reshape(1, -1, 1, 1) * np.linspace(0.5, 1, SIDE).reshape(1, 1, -1, 1)
    noise = generator.integers(-20, 21, (count, SIDE, SIDE, 3))
    return np.clip(low + (high - low) * ramp + noise, 0, 255).astype(np.uint8)


def assert_same_bytes(policy, draws: np.ndarray, by_host) -> None:
    """`by_host(row, PIL image)` against the batch."""
    images = pictures(len(draws))
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    result = apply(batch, policy.plan(draws, SIDE, SIDE)).permute(0, 2, 3, 1).numpy()
    changed = 0
    for row, image, mine in zip(draws, images, result, strict=True):
        expected = np.asarray(by_host(row, Image.fromarray(image)))
        assert np.abs(expected.astype(int) - mine).max() <= 1  # 1: see the operations' own tests
        assert (expected != mine).mean() < 0.001
        changed += not np.array_equal(expected, image)
    assert changed > len(draws) / 3


class Script:
    """Stands in for the module `random` in timm's file, and hands out a row's numbers where timm draws."""

    def __init__(self):
        self.sub_policy, self.layers, self.op, self.is_gate = None, None, None, False

    def begin(self, op: auto_augment.AugmentOp) -> None:
        self.op, self.is_gate = op, op.prob < 1
        self.gate, self.magnitude, self.sign, self.resampling = next(self.layers)

    def choice(self, options):
        """Of a sub-policy, before the first operation; of an interpolation, in one."""
        return options[int((self.sub_policy if self.op is None else self.resampling) * len(options))]

    def random(self) -> float:
        was_gate, self.is_gate = self.is_gate, False
        return self.gate if was_gate else self.sign

    def gauss(self, mean: float, deviation: float) -> float:
        return NormalDist(mean, deviation).inv_cdf(self.magnitude)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.magnitude


@pytest.mark.parametrize("aa", TIMMS)
def test_with_the_same_numbers_timms_own_transform_gives_the_same_images(aa, monkeypatch):
    """A row's numbers are handed to timm in its own order: sub-policy; then whether, which magnitude, sign, interpolation."""
    s, script = settings(aa=aa), Script()
    policy, transform = create_policy(s), hosts(s)
    call = auto_augment.AugmentOp.__call__
    monkeypatch.setattr(auto_augment, "random", script)
    monkeypatch.setattr(auto_augment.AugmentOp, "__call__", lambda op, image: script.begin(op) or call(op, image))

    def by_timm(row, image):
        script.op, script.sub_policy = None, row[0]
        script.layers = iter(row[policy.choosing_columns :].reshape(-1, 4).tolist())
        if isinstance(policy, RandomOperations):
            (chosen,) = policy.chosen(row[None, : policy.choosing_columns])
            monkeypatch.setattr(np.random, "choice", lambda ops, *_, **__: [ops[i] for i in chosen])
        return transform(image)

    assert_same_bytes(policy, np.random.default_rng(0).random((250, policy.columns)), by_timm)


def test_with_the_same_numbers_torchvisions_own_transform_gives_the_same_images(monkeypatch):
    s = settings(aa="cifar10")
    policy, transform = create_policy(s), hosts(s)

    def by_torchvision(row, image):
        sub_policy, gate, sign, gate_2, sign_2 = row
        probabilities, signs = torch.tensor([gate, gate_2]), torch.tensor([sign < 0.5, sign_2 < 0.5]).int()
        monkeypatch.setattr(transform, "get_params", lambda count: (int(sub_policy * count), probabilities, signs))
        return transform(image)

    draws = np.random.default_rng(0).random((600, policy.columns))
    assert_same_bytes(policy, draws, by_torchvision)


@pytest.mark.parametrize(
    "amounts", [(0.4,), (0.4, 0.8, 0.2), (1.5, 0.0, 0.6), (0.0, 0.3, 0.0, 0.0), (0.4, 0.4, 0.4, 0.1)]
)
def test_with_the_same_numbers_torchvisions_color_jitter_gives_the_same_images(amounts, monkeypatch):
    """Factors, then the numbers whose ranks are the order, for those of brightness, contrast, saturation, hue that are on."""
    s = settings(color_jitter=amounts)
    policy, transform = create_policy(s), hosts(s)
    amounts = (*(amounts * 3 if len(amounts) == 1 else amounts), 0.0)[:4]
    used = [k for k in range(4) if amounts[k]]

    def by_torchvision(row, image):
        factors = [None] * 4
        for k, draw in zip(used, row, strict=False):
            low, high = (max(0, 1 - amounts[k]), 1 + amounts[k]) if k < 3 else (-amounts[k], amounts[k])
            factors[k] = low + (high - low) * draw
        order = [k for _, k in sorted(zip(row[len(used) :], used, strict=True))]
        monkeypatch.setattr(transform, "get_params", lambda *_: (torch.tensor(order), *factors))
        return transform(image)

    assert policy.columns == 2 * len(used)
    assert_same_bytes(policy, np.random.default_rng(0).random((200, policy.columns)), by_torchvision)


def test_further_views_jitter_four_of_five_images_and_grey_every_fifth():
    """With the row's first number above .8 the jitter is left out, with its last below .2 the image is grey: as by
    torchvision's RandomApply and RandomGrayscale, in that order."""
    s = replace(settings(), augment=settings().of_contrast.augment, jitter_prob=0.8, gray_prob=0.2)
    assert s == settings().of_contrast
    policy, host = create_policy(s), train_transform(s).transforms[1].transforms
    assert [type(one).__name__ for one in host] == ["RandomApply", "RandomGrayscale"]
    assert (host[0].p, host[1].p) == (0.8, 0.2)
    assert (policy.policies[0].probability, policy.policies[1].probability) == (0.8, 0.2)
    jitter = create_policy(settings(color_jitter=(0.4, 0.4, 0.4, 0.1)))
    images = torch.from_numpy(pictures(200)).permute(0, 3, 1, 2).contiguous()
    draws = np.random.default_rng(0).random((200, policy.columns))
    found = apply(images, policy.plan(draws, SIDE, SIDE))
    wanted = apply(images, jitter.plan(draws[:, 1:-1], SIDE, SIDE))
    wanted = torch.where(torch.from_numpy(draws[:, 0] < 0.8).view(-1, 1, 1, 1), wanted, images)
    grey = draws[:, -1] < 0.2
    assert torch.equal(found[~grey], wanted[~grey])
    for image, before in zip(found[grey], wanted[grey], strict=True):
        assert np.array_equal(
            image[0].numpy(), np.asarray(Image.fromarray(before.permute(1, 2, 0).numpy()).convert("L"))
        )
        assert torch.equal(image, image[:1].expand(3, -1, -1))


@pytest.mark.parametrize("degrees", [15.0, 180.0])
def test_with_the_same_angle_torchvisions_rotation_gives_the_same_images(degrees, monkeypatch):
    s = settings(rotate=degrees)
    policy, transform = create_policy(s), hosts(s)

    def by_torchvision(row, image):
        monkeypatch.setattr(transform, "get_params", lambda _: float(2 * degrees * row[0] - degrees))
        return transform(image)

    assert policy.columns == 1
    assert_same_bytes(policy, np.random.default_rng(0).random((200, 1)), by_torchvision)


@pytest.mark.parametrize("name", LEVELS)
def test_a_level_means_the_number_that_timms_function_gives(name, monkeypatch):
    """From 0 to 30 in steps of 0.05, to the last bit; timm negates where `random()` is above 0.5."""
    levels, hparams = np.arange(601) / 20, dict(translate_const=14, translate_pct=0.37)
    function = auto_augment.LEVEL_TO_ARG[name]
    for hp in (hparams, dict(translate_const=250)):
        for is_negative in (False, True):
            monkeypatch.setattr(random, "random", lambda n=is_negative: 0.9 if n else 0.1)
            mine = LEVELS[name](levels, np.full(len(levels), is_negative), hp)
            expected = [0.0 if function is None else function(level, hp)[0] for level in levels.tolist()]
            assert mine.tolist() == expected


class Recorded:
    """timm's own transform, of which each operation notes its name and numbers instead of working on an image."""

    def __init__(self, s: ImageSettings):
        self.transform = hosts(s)
        ops = getattr(self.transform, "ops", None) or [op for policy in self.transform.policy for op in policy]
        for op in ops:
            op.aug_fn = lambda noted, *numbers, op=op, **_: [*noted, (op.name, *numbers)]

    def draw(self, count: int) -> list[list[tuple]]:
        """Per image, the operations that it gets."""
        return [self.transform([]) for _ in range(count)]


def assert_same_frequencies(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Two samples of what an image gets: chi-square, whose variance is twice its mean, is within 5 deviations of the mean.

    What is so rare that fewer than 10 are expected in the smaller sample counts as one."""
    keys, place = np.unique(np.concatenate([ours, theirs]), return_inverse=True)
    counts = np.stack([np.bincount(part, minlength=len(keys)) for part in np.split(place, [len(ours)])]).astype(float)
    rare = counts.sum(0) * len(theirs) / (len(ours) + len(theirs)) < 10
    counts = np.concatenate([counts[:, ~rare], counts[:, rare].sum(1, keepdims=True)], axis=1)
    counts = counts[:, counts.sum(0) > 0]
    expected = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
    freedom = counts.shape[1] - 1
    assert freedom > 15
    assert abs(((counts - expected) ** 2 / expected).sum() - freedom) < 5 * (2 * freedom) ** 0.5


def kinds(plan: OperationPlan) -> np.ndarray:
    """(N,) a number for what an image gets, in order: the operations, what affine ones change, and which way."""
    slot = np.abs(plan.arguments - [1, 0, 0, 0, 1, 0]).argmax(-1)
    slot[(plan.arguments[..., 1] != 0) & (plan.arguments[..., 3] != 0)] = 1 + 6  # a rotation: the sine's sign
    number = np.take_along_axis(plan.arguments, slot[..., None] % 6, -1)[..., 0]
    affine = len(OPERATIONS) + 3 * slot + np.sign(number).astype(int)
    kind = np.where(plan.operations == AFFINE, affine, plan.operations.astype(int))
    sequence = np.zeros(len(kind), int)
    for layer in kind.T:
        sequence = np.where(layer > 0, 100 * sequence + layer, sequence)
    return sequence


@pytest.mark.parametrize("aa", ["v0", "originalr", "rand-m9-mstd0.5", "rand-m6-n3-p0.3-inc1", "rand-m9-p0.9-tweights"])
def test_operations_come_as_often_as_from_timms_own_transform(aa):
    """What an image gets, in order and with signs, in 200,000 drawn rows against 12,000 of timm's own draws."""
    s = settings(aa=aa)
    random.seed(0), np.random.seed(0)
    policy = create_policy(s)
    drawn = policy.plan(np.random.default_rng(0).random((200_000, policy.columns)), SIDE, SIDE)
    theirs = Recorded(s).draw(12_000)
    operations = np.zeros((len(theirs), max(map(len, theirs))), np.int8)
    noted = OperationPlan(operations, np.zeros((*operations.shape, 6)), np.zeros_like(operations), (0, 0, 0))
    for i, image in enumerate(theirs):
        for layer, (name, *numbers) in enumerate(image):
            operations[i, layer], noted.arguments[i, layer] = effect(
                name, np.array(numbers or [0.0], float), SIDE, SIDE
            )
    assert_same_frequencies(kinds(drawn), kinds(noted))


def test_operations_come_as_often_as_from_torchvisions_own_transform():
    """The sub-policies' own probabilities: an operation of a sub-policy is done in p / 25 of the images; signs are even."""
    s = settings(aa="cifar10")
    policy, sub_policies = create_policy(s), hosts(s).policies
    count = 200_000
    draws = np.random.default_rng(0).random((count, policy.columns))
    plan = policy.plan(draws, SIDE, SIDE)
    for layer in (0, 1):
        expected = np.zeros(len(OPERATIONS))
        for sub_policy in sub_policies:
            name, p, _ = sub_policy[layer]
            is_affine = name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
            expected[AFFINE if is_affine else CODES[name.lower()]] += p / len(sub_policies)
        expected[0] = 1 - expected.sum()
        seen = np.bincount(plan.operations[:, layer], minlength=len(OPERATIONS)) / count
        assert (np.abs(seen - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / count)).all()
    factors = plan.arguments[..., 0][plan.operations == CODES["brightness"]]
    assert abs((factors > 1).mean() - 0.5) < 4.5 * 0.5 / len(factors) ** 0.5
    assert set(np.round(factors, 6)) == {0.4, 1.6, 0.3, 1.7, 0.1, 1.9, 0.7, 1.3}  # 1 +- 0.1 * {6, 7, 9, 3}


@pytest.mark.parametrize("aa", ["rand-m5-mstd0.5-p1", "rand-m9-mstd3-p1-mmax12", "rand-m8-mstd101-p1", "v0-mstd1"])
def test_magnitudes_are_spread_as_timms_own(aa):
    """Kolmogorov's distance between the factors of one operation, ours and timm's: below 2.2 / sqrt(harmonic size), which
    chance exceeds in 1 of 8,000 cases."""
    s = settings(aa=aa)
    random.seed(0), np.random.seed(0)
    policy, name = create_policy(s), "Color"
    plan = policy.plan(np.random.default_rng(0).random((200_000, policy.columns)), SIDE, SIDE)
    ours = np.sort(plan.arguments[..., 0][plan.operations == CODES["color"]])
    theirs = np.sort([numbers[0] for image in Recorded(s).draw(12_000) for n, *numbers in image if n == name])
    grid = np.concatenate([ours, theirs])
    distance = np.abs(
        np.searchsorted(ours, grid, "right") / len(ours) - np.searchsorted(theirs, grid, "right") / len(theirs)
    ).max()
    assert distance < 2.2 * (1 / len(ours) + 1 / len(theirs)) ** 0.5


def test_weighted_operations_are_drawn_one_after_another_without_replacement():
    """Of weights w: first i with probability w_i, then j with w_j / (1 - w_i)."""
    policy = create_policy(settings(aa="rand-m9-tweights"))
    weights, count = policy.weights, 200_000
    chosen = policy.chosen(np.random.default_rng(0).random((count, policy.choosing_columns)))
    assert (chosen[:, 0] != chosen[:, 1]).all()
    pairs = np.bincount(chosen[:, 0] * len(weights) + chosen[:, 1], minlength=len(weights) ** 2) / count
    expected = weights[:, None] * weights / (1 - weights[:, None])
    np.fill_diagonal(expected, 0)
    expected = expected.ravel()
    assert abs(expected.sum() - 1) < 1e-12
    assert (np.abs(pairs - expected) <= 5 * np.sqrt(expected * (1 - expected) / count) + 5 / count).all()


def test_jitters_orders_and_factors_are_uniform():
    policy = create_policy(settings(color_jitter=(0.4, 2.0, 0.1)))
    count = 60_000
    plan = policy.plan(np.random.default_rng(0).random((count, policy.columns)), SIDE, SIDE)
    orders, seen = np.unique(plan.operations, axis=0, return_counts=True)
    assert len(orders) == 6
    assert np.abs(seen / count - 1 / 6).max() < 4.5 * (5 / 36 / count) ** 0.5
    for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.0, 3.0), ("color", 0.9, 1.1)):
        factors = plan.arguments[..., 0][plan.operations == CODES[name]]
        assert len(factors) == count
        assert low <= factors.min() < low + (high - low) / 1000
        assert high >= factors.max() > high - (high - low) / 1000
        assert abs(factors.mean() - (low + high) / 2) < 4.5 * (high - low) / (12 * count) ** 0.5


@pytest.mark.parametrize(
    "changes", [*({"aa": aa} for aa in ["cifar10", *TIMMS]), {"color_jitter": (0.4,)}, {"rotate": 15.0}]
)
def test_an_images_program_depends_on_its_row_alone(changes):
    policy = create_policy(settings(**changes))
    draws = np.random.default_rng(0).random((400, policy.columns))
    whole = policy.plan(draws, 16, 24)
    order = np.random.default_rng(1).permutation(len(draws))
    for rows in (order, slice(17, 18), slice(100, 300)):
        part, expected = policy.plan(draws[rows], 16, 24), whole[rows]
        assert part.operations.tolist() == expected.operations.tolist()
        assert part.arguments.tolist() == expected.arguments.tolist()
        assert part.resampling.tolist() == expected.resampling.tolist()
        assert part.fill == expected.fill


@pytest.mark.parametrize("edge", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize(
    "changes", [*({"aa": aa} for aa in ["cifar10", *TIMMS]), {"color_jitter": (0.4,)}, {"rotate": 15.0}]
)
def test_the_smallest_and_largest_numbers_that_are_drawn_have_a_meaning(changes, edge):
    policy = create_policy(settings(**changes))
    plan = policy.plan(np.full((2, policy.columns), edge), SIDE, SIDE)
    assert np.isfinite(plan.arguments).all()
    assert ((plan.operations >= 0) & (plan.operations < len(OPERATIONS))).all()


@pytest.mark.parametrize(
    ("interpolation", "expected"), [("bilinear", {BILINEAR}), ("bicubic", {BICUBIC}), ("random", {BILINEAR, BICUBIC})]
)
def test_timms_operations_resample_as_the_configuration_says_and_fill_with_the_mean(interpolation, expected):
    policy = create_policy(settings(aa="rand-m9", train_interpolation=interpolation))
    plan = policy.plan(np.random.default_rng(0).random((1000, policy.columns)), SIDE, SIDE)
    assert set(plan.resampling[plan.operations == AFFINE]) == expected
    assert plan.fill == (128, 51, 230)  # 255 * (0.5, 0.2, 0.9), rounded to even


FILLS = [("black", (0, 0, 0)), ("grey", (128, 128, 128)), ("mean", (128, 51, 230))]


@pytest.mark.parametrize("aa", ["cifar10", "v0", "rand-m9"])
@pytest.mark.parametrize(("fill", "expected"), FILLS)
def test_empty_pixels_have_the_chosen_color_on_the_host_and_in_a_batch(aa, fill, expected):
    """Of a white image, rotated by a quarter of a right angle, the corner is empty."""
    s = settings(aa=aa, aa_fill=fill)
    policy, transform = create_policy(s), hosts(s)
    matrix = np.zeros((1, 1, 6))
    matrix[0, 0] = effect("Rotate", np.array([22.5]), SIDE, SIDE)[1]
    plan = policy.plan(np.random.default_rng(0).random((1, policy.columns)), SIDE, SIDE)
    turned = OperationPlan(np.full((1, 1), AFFINE, np.int8), matrix, np.zeros((1, 1), np.int8), plan.fill)
    white = torch.full((1, 3, SIDE, SIDE), 255, dtype=torch.uint8)
    assert tuple(apply(white, turned)[0, :, 0, 0].tolist()) == expected
    if aa == "cifar10":
        assert tuple(transform.fill) == expected
    else:
        ops = transform.ops if aa == "rand-m9" else [op for sub_policy in transform.policy for op in sub_policy]
        assert {op.kwargs["fillcolor"] for op in ops} == {expected}


def test_the_host_fills_with_grey_what_a_white_image_leaves_empty():
    """Operations on a white image give white, black (solarized, inverted), or grey where they move it."""
    transform = hosts(settings(aa="cifar10", aa_fill="grey"))
    torch.manual_seed(0)
    white = Image.new("RGB", (SIDE, SIDE), (255,) * 3)
    values = {pixel for _ in range(60) for pixel in np.unique(np.asarray(transform(white))).tolist()}
    assert 128 in values


def test_unset_the_fill_is_each_policys_own():
    assert hosts(settings(aa="cifar10")).fill is None  # black
    assert hosts(settings(aa="v0")).policy[0][0].kwargs["fillcolor"] == (128, 51, 230)


def test_torchvisions_operations_take_the_nearest_pixel_and_leave_black():
    policy = create_policy(settings(aa="cifar10"))
    plan = policy.plan(np.random.default_rng(0).random((1000, policy.columns)), SIDE, SIDE)
    assert set(plan.resampling[plan.operations == AFFINE]) == {NEAREST}
    assert plan.fill == (0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"aa": "augmix-m5-w4"}, "AugMix"),
        ({"aa": "3a"}, "GaussianBlur"),
        ({"aa": "rand-m9-t3a"}, "GaussianBlur"),
        ({"aa": "rand-m9-t3aw"}, "GaussianBlur"),
        ({"aa": "v0", "train_interpolation": "lanczos"}, "lanczos"),
    ],
)
def test_what_has_no_form_for_a_batch_says_so_in_a_line(changes, reason):
    with pytest.raises(HostOnly, match=reason) as fault:
        create_policy(settings(**changes))
    assert "\n" not in str(fault.value)


def test_without_auto_augment_and_jitter_there_is_no_policy():
    assert create_policy(settings()) is None
    assert create_policy(settings(crop="rrc")) is None


def test_a_policy_that_timm_does_not_know_is_the_users_fault():
    with pytest.raises(UserError, match="nonsense"):
        create_policy(settings(aa="nonsense"))
