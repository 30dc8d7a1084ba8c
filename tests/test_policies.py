"""Policies drawn for a batch of images make the choices of timm and torchvision, with their numbers and frequencies."""

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


def host_transform(image_settings: ImageSettings):
    """Return the object of torchvision or timm that augments on the host."""
    augment = train_transform(image_settings).transforms[1]
    return augment.transforms[0] if isinstance(augment, transforms.Compose) else augment


def pictures(count: int) -> np.ndarray:
    """Return (count, SIDE, SIDE, 3) ramps of random colors with noise."""
    generator = np.random.default_rng(3)
    low, high = generator.integers(0, 256, (2, count, 1, 1, 3))
    ramp = np.linspace(0, 1, SIDE).reshape(1, -1, 1, 1) * np.linspace(0.5, 1, SIDE).reshape(1, 1, -1, 1)
    noise = generator.integers(-20, 21, (count, SIDE, SIDE, 3))
    return np.clip(low + (high - low) * ramp + noise, 0, 255).astype(np.uint8)


def assert_same_bytes(policy, draws: np.ndarray, by_host) -> None:
    """Compare each image of an augmented batch with `by_host(row, PIL image)`."""
    images = pictures(len(draws))
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    result = apply(batch, policy.plan(draws, SIDE, SIDE)).permute(0, 2, 3, 1).numpy()
    changed = 0
    for row, image, found in zip(draws, images, result, strict=True):
        expected = np.asarray(by_host(row, Image.fromarray(image)))
        assert np.abs(expected.astype(int) - found).max() <= 1  # why 1: see the tests of the operations
        assert (expected != found).mean() < 0.001
        changed += not np.array_equal(expected, image)
    assert changed > len(draws) / 3


class Script:
    """A replacement for the module `random` in timm's file that returns a row's numbers when timm draws."""

    def __init__(self):
        self.sub_policy, self.layers, self.op, self.is_gate = None, None, None, False

    def begin(self, op: auto_augment.AugmentOp) -> None:
        self.op, self.is_gate = op, op.prob < 1
        self.gate, self.magnitude, self.sign, self.resampling = next(self.layers)

    def choice(self, options):
        """Choose a sub-policy before the first operation, or an interpolation within one."""
        return options[int((self.sub_policy if self.op is None else self.resampling) * len(options))]

    def random(self) -> float:
        was_gate, self.is_gate = self.is_gate, False
        return self.gate if was_gate else self.sign

    def gauss(self, mean: float, std: float) -> float:
        return NormalDist(mean, std).inv_cdf(self.magnitude)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.magnitude


@pytest.mark.parametrize("aa", TIMMS)
def test_with_the_same_numbers_timms_own_transform_gives_the_same_images(aa, monkeypatch):
    """timm gets a row's numbers in its own order: the sub-policy, then for each operation whether it is applied, its
    magnitude, sign and interpolation."""
    image_settings, script = settings(aa=aa), Script()
    policy, transform = create_policy(image_settings), host_transform(image_settings)
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
    image_settings = settings(aa="cifar10")
    policy, transform = create_policy(image_settings), host_transform(image_settings)

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
    """A row has factors and then numbers whose ranks are the order, for each of brightness, contrast, saturation and hue
    that is used."""
    image_settings = settings(color_jitter=amounts)
    policy, transform = create_policy(image_settings), host_transform(image_settings)
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


def test_contrast_views_jitter_four_of_five_images_and_turn_every_fifth_gray():
    """If the row's first number is above .8, there is no jitter; if its last is below .2, the image is gray. This equals
    torchvision's RandomApply and RandomGrayscale, in that order."""
    image_settings = replace(settings(), augment=settings().of_contrast.augment, jitter_prob=0.8, gray_prob=0.2)
    assert image_settings == settings().of_contrast
    policy, host = create_policy(image_settings), train_transform(image_settings).transforms[1].transforms
    assert [type(transform).__name__ for transform in host] == ["RandomApply", "RandomGrayscale"]
    assert (host[0].p, host[1].p) == (0.8, 0.2)
    assert (policy.policies[0].probability, policy.policies[1].probability) == (0.8, 0.2)
    jitter = create_policy(settings(color_jitter=(0.4, 0.4, 0.4, 0.1)))
    images = torch.from_numpy(pictures(200)).permute(0, 3, 1, 2).contiguous()
    draws = np.random.default_rng(0).random((200, policy.columns))
    found = apply(images, policy.plan(draws, SIDE, SIDE))
    expected = apply(images, jitter.plan(draws[:, 1:-1], SIDE, SIDE))
    expected = torch.where(torch.from_numpy(draws[:, 0] < 0.8).view(-1, 1, 1, 1), expected, images)
    is_gray = draws[:, -1] < 0.2
    assert torch.equal(found[~is_gray], expected[~is_gray])
    for image, before in zip(found[is_gray], expected[is_gray], strict=True):
        assert np.array_equal(
            image[0].numpy(), np.asarray(Image.fromarray(before.permute(1, 2, 0).numpy()).convert("L"))
        )
        assert torch.equal(image, image[:1].expand(3, -1, -1))


@pytest.mark.parametrize("degrees", [15.0, 180.0])
def test_with_the_same_angle_torchvisions_rotation_gives_the_same_images(degrees, monkeypatch):
    image_settings = settings(rotate=degrees)
    policy, transform = create_policy(image_settings), host_transform(image_settings)

    def by_torchvision(row, image):
        monkeypatch.setattr(transform, "get_params", lambda _: float(2 * degrees * row[0] - degrees))
        return transform(image)

    assert policy.columns == 1
    assert_same_bytes(policy, np.random.default_rng(0).random((200, 1)), by_torchvision)


@pytest.mark.parametrize("name", LEVELS)
def test_a_level_becomes_the_number_that_timms_function_returns(name, monkeypatch):
    """Levels from 0 to 30 in steps of 0.05 are compared to the last bit. timm negates if `random()` is above 0.5."""
    levels, hparams = np.arange(601) / 20, dict(translate_const=14, translate_pct=0.37)
    function = auto_augment.LEVEL_TO_ARG[name]
    for hp in (hparams, dict(translate_const=250)):
        for is_negative in (False, True):
            monkeypatch.setattr(random, "random", lambda n=is_negative: 0.9 if n else 0.1)
            found = LEVELS[name](levels, np.full(len(levels), is_negative), hp)
            expected = [0.0 if function is None else function(level, hp)[0] for level in levels.tolist()]
            assert found.tolist() == expected


class Recorded:
    """timm's own transform with operations that record their names and numbers instead of changing an image."""

    def __init__(self, image_settings: ImageSettings):
        self.transform = host_transform(image_settings)
        ops = getattr(self.transform, "ops", None) or [op for policy in self.transform.policy for op in policy]
        for op in ops:
            op.aug_fn = lambda recorded, *numbers, op=op, **_: [*recorded, (op.name, *numbers)]

    def draw(self, count: int) -> list[list[tuple]]:
        """Return the operations that each of `count` images gets."""
        return [self.transform([]) for _ in range(count)]


def assert_same_frequencies(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Compare two samples of operations by chi-square: it has the variance 2 x its mean, and must be within 5 standard
    deviations of the mean.

    Operations of which fewer than 10 are expected in the smaller sample are counted together."""
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
    """Return an (N,) number for each image's operations in order, what the affine ones change, and in which direction."""
    slot = np.abs(plan.arguments - [1, 0, 0, 0, 1, 0]).argmax(-1)
    slot[(plan.arguments[..., 1] != 0) & (plan.arguments[..., 3] != 0)] = 1 + 6  # a rotation has the sign of its sine
    number = np.take_along_axis(plan.arguments, slot[..., None] % 6, -1)[..., 0]
    affine = len(OPERATIONS) + 3 * slot + np.sign(number).astype(int)
    kind = np.where(plan.operations == AFFINE, affine, plan.operations.astype(int))
    sequence = np.zeros(len(kind), int)
    for layer in kind.T:
        sequence = np.where(layer > 0, 100 * sequence + layer, sequence)
    return sequence


@pytest.mark.parametrize("aa", ["v0", "originalr", "rand-m9-mstd0.5", "rand-m6-n3-p0.3-inc1", "rand-m9-p0.9-tweights"])
def test_operations_are_as_frequent_as_those_of_timms_own_transform(aa):
    """The operations of an image, in order and with signs, are compared in 200,000 drawn rows and 12,000 draws of timm."""
    image_settings = settings(aa=aa)
    random.seed(0), np.random.seed(0)
    policy = create_policy(image_settings)
    drawn = policy.plan(np.random.default_rng(0).random((200_000, policy.columns)), SIDE, SIDE)
    theirs = Recorded(image_settings).draw(12_000)
    operations = np.zeros((len(theirs), max(map(len, theirs))), np.int8)
    recorded = OperationPlan(operations, np.zeros((*operations.shape, 6)), np.zeros_like(operations), (0, 0, 0))
    for i, image in enumerate(theirs):
        for layer, (name, *numbers) in enumerate(image):
            operations[i, layer], recorded.arguments[i, layer] = effect(
                name, np.array(numbers or [0.0], float), SIDE, SIDE
            )
    assert_same_frequencies(kinds(drawn), kinds(recorded))


def test_operations_are_as_frequent_as_those_of_torchvisions_own_transform():
    """An operation with probability p in one of the 25 sub-policies is applied to p / 25 of the images. Both signs are
    equally frequent."""
    image_settings = settings(aa="cifar10")
    policy, sub_policies = create_policy(image_settings), host_transform(image_settings).policies
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
def test_magnitudes_are_distributed_as_timms_own(aa):
    """Kolmogorov's distance between our factors of one operation and timm's is below 2.2 / sqrt(harmonic size), which
    chance exceeds in 1 of 8,000 cases."""
    image_settings = settings(aa=aa)
    random.seed(0), np.random.seed(0)
    policy, name = create_policy(image_settings), "Color"
    plan = policy.plan(np.random.default_rng(0).random((200_000, policy.columns)), SIDE, SIDE)
    ours = np.sort(plan.arguments[..., 0][plan.operations == CODES["color"]])
    theirs = np.sort(
        [numbers[0] for image in Recorded(image_settings).draw(12_000) for n, *numbers in image if n == name]
    )
    grid = np.concatenate([ours, theirs])
    distance = np.abs(
        np.searchsorted(ours, grid, "right") / len(ours) - np.searchsorted(theirs, grid, "right") / len(theirs)
    ).max()
    assert distance < 2.2 * (1 / len(ours) + 1 / len(theirs)) ** 0.5


def test_weighted_operations_are_drawn_one_after_another_without_replacement():
    """With weights w, the first operation is i with probability w_i, and the second is j with w_j / (1 - w_i)."""
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


def test_the_order_and_the_factors_of_color_jitter_are_uniform():
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
def test_the_plan_of_an_image_depends_only_on_its_row(changes):
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
def test_the_smallest_and_the_largest_random_numbers_give_valid_plans(changes, edge):
    policy = create_policy(settings(**changes))
    plan = policy.plan(np.full((2, policy.columns), edge), SIDE, SIDE)
    assert np.isfinite(plan.arguments).all()
    assert ((plan.operations >= 0) & (plan.operations < len(OPERATIONS))).all()


@pytest.mark.parametrize(
    ("interpolation", "expected"), [("bilinear", {BILINEAR}), ("bicubic", {BICUBIC}), ("random", {BILINEAR, BICUBIC})]
)
def test_timms_operations_resample_as_configured_and_fill_with_the_mean(interpolation, expected):
    policy = create_policy(settings(aa="rand-m9", train_interpolation=interpolation))
    plan = policy.plan(np.random.default_rng(0).random((1000, policy.columns)), SIDE, SIDE)
    assert set(plan.resampling[plan.operations == AFFINE]) == expected
    assert plan.fill == (128, 51, 230)  # 255 * (0.5, 0.2, 0.9), rounded to even


FILLS = [("black", (0, 0, 0)), ("grey", (128, 128, 128)), ("mean", (128, 51, 230))]


@pytest.mark.parametrize("aa", ["cifar10", "v0", "rand-m9"])
@pytest.mark.parametrize(("fill", "expected"), FILLS)
def test_empty_pixels_have_the_chosen_color_on_the_host_and_in_a_batch(aa, fill, expected):
    """If a white image is rotated by 22.5 degrees, its corner is empty."""
    image_settings = settings(aa=aa, aa_fill=fill)
    policy, transform = create_policy(image_settings), host_transform(image_settings)
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


def test_the_host_fills_empty_pixels_with_the_chosen_gray():
    """The operations leave a white image white, turn it black (solarize, invert), or move it and fill with gray."""
    transform = host_transform(settings(aa="cifar10", aa_fill="grey"))
    torch.manual_seed(0)
    white = Image.new("RGB", (SIDE, SIDE), (255,) * 3)
    values = {pixel for _ in range(60) for pixel in np.unique(np.asarray(transform(white))).tolist()}
    assert 128 in values


def test_without_a_chosen_fill_each_policy_has_its_own():
    assert host_transform(settings(aa="cifar10")).fill is None  # black
    assert host_transform(settings(aa="v0")).policy[0][0].kwargs["fillcolor"] == (128, 51, 230)


def test_torchvisions_operations_take_the_nearest_pixel_and_fill_with_black():
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
def test_a_policy_without_an_implementation_for_batches_is_refused_in_one_line(changes, reason):
    with pytest.raises(HostOnly, match=reason) as raised:
        create_policy(settings(**changes))
    assert "\n" not in str(raised.value)


def test_without_auto_augment_and_jitter_there_is_no_policy():
    assert create_policy(settings()) is None
    assert create_policy(settings(crop="rrc")) is None


def test_a_policy_that_timm_does_not_know_is_a_users_error():
    with pytest.raises(UserError, match="nonsense"):
        create_policy(settings(aa="nonsense"))
