"""Augmentation policies of timm and torchvision, whose operations are drawn on the host for many images at once.

An image's operations are a pure function of its row of uniform numbers. The policies themselves (choices,
probabilities, magnitudes, fill and resampling) are read from the transform that `host_transforms.train_transform`
builds; this file contains only the number that a level stands for, and the matrices of the geometric operations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from torchvision import transforms

from reslt.augment.host_transforms import train_transform
from reslt.augment.settings import ImageSettings

MAPPED = ("posterize", "solarize", "solarize_add", "autocontrast", "equalize", "invert", "brightness", "contrast")
OPERATIONS = ("identity", "affine", "color", "sharpness", "hue", *MAPPED)  # those in MAPPED use a table of values
CODES = {name: code for code, name in enumerate(OPERATIONS)}
AFFINE = CODES["affine"]
RESAMPLINGS = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
NEAREST, BILINEAR, BICUBIC = range(3)
FACTORS = ("Color", "Contrast", "Brightness", "Sharpness")  # operations with a factor; timm's and torchvision's names


class HostOnly(ValueError):
    """The error for an augmentation that runs only on the host; its text is the reason, in one line."""


@dataclass(frozen=True)
class OperationPlan:
    """The operations on N images, in L layers. Indexed with an array of image numbers, it is the plan of those images.

    An affine operation's arguments are PIL's matrix a..f (output pixel -> input pixel) of a shear, translation or
    rotation. The other operations use only the first argument: the number of bits kept, the threshold, the summand, the
    shift of the hue (1: once around the color circle) or the factor (1: unchanged)."""

    operations: np.ndarray  # (N, L) int8, index into OPERATIONS
    arguments: np.ndarray  # (N, L, 6) float64
    resampling: np.ndarray  # (N, L) int8, for affine operations: NEAREST, BILINEAR or BICUBIC
    fill: tuple[int, int, int]  # RGB of pixels that an affine operation leaves empty

    def __getitem__(self, images: np.ndarray | slice) -> OperationPlan:
        return OperationPlan(self.operations[images], self.arguments[images], self.resampling[images], self.fill)


class Policy(ABC):
    """A policy that plans of operations are drawn from."""

    columns: int  # uniform numbers per image

    @abstractmethod
    def plan(self, draws: np.ndarray, height: int, width: int) -> OperationPlan:
        """(N, columns) float64 in [0, 1) -> the plan of N images of height x width pixels, each drawn from its own row."""


def create_policy(settings: ImageSettings) -> Policy | None:
    """Return the configured AutoAugment policy, color jitter or rotation, with the random transforms after it; None if
    nothing is configured.

    Raises HostOnly if it runs only on the host, UserError for a policy that timm does not know."""
    augment = train_transform(settings).transforms[1]
    found = [policy_of(transform) for transform in getattr(augment, "transforms", [augment])]  # timm's are in a list
    return InTurn(found) if len(found) > 1 else found[0] if found else None


def policy_of(transform: object) -> Policy:
    """Return the policy of one transform. Raises HostOnly if it runs only on the host."""
    if type(transform) not in POLICIES:
        raise HostOnly(f"{type(transform).__name__} runs only on the host")
    return POLICIES[type(transform)](transform)


def _choice(draws: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) -> uniform integers below `count`."""
    return (draws * count).astype(np.intp)


def rotations(degrees: np.ndarray, height: int, width: int) -> np.ndarray:
    """(n,) degrees, counterclockwise about the center -> (n, 6) matrices of PIL's `Image.rotate`."""
    radians = -np.radians(np.mod(degrees, 360.0))
    cos, sin = _to_15_digits(np.cos(radians)), _to_15_digits(np.sin(radians))  # so that quarter turns are exact
    x, y = width / 2, height / 2
    return np.stack([cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y], axis=1)


def _to_15_digits(values: np.ndarray) -> np.ndarray:
    """Round as Python's `round(value, 15)` does. NumPy's rounding differs in the last digit if the product with 1e15 is
    rounded to a half: here the product's exact remainder (Dekker's product of halves) decides."""
    product = values * 1e15
    (high, low), (scale_high, scale_low) = _halves(values), _halves(np.float64(1e15))
    error = (high * scale_high - product) + high * scale_low + low * scale_high + low * scale_low
    whole = np.rint(product)
    rest = (product - whole) + error
    return (whole + (rest > 0.5) - (rest < -0.5)) / 1e15


def _halves(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split each value into two numbers of 26 bits that add up to it."""
    shifted = values * (2.0**27 + 1)
    high = shifted - (shifted - values)
    return high, values - high


# Operation -> the entry of PIL's matrix that its number sets
ENTRIES = {"ShearX": 1, "ShearY": 3, "TranslateX": 2, "TranslateY": 5, "TranslateXRel": 2, "TranslateYRel": 5}


def effect(name: str, numbers: np.ndarray, height: int, width: int) -> tuple[int, np.ndarray]:
    """Return the code and the (n, 6) arguments of an operation by its name in timm or torchvision, for (n,) numbers."""
    if name == "Rotate":
        return AFFINE, rotations(numbers, height, width)
    if name in ENTRIES:
        matrices = np.tile([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], (len(numbers), 1))
        matrices[:, ENTRIES[name]] = numbers * {"TranslateXRel": width, "TranslateYRel": height}.get(name, 1)
        return AFFINE, matrices
    arguments = np.zeros((len(numbers), 6))
    arguments[:, 0] = numbers
    plain = name.removesuffix("Increasing").removesuffix("Original")
    return CODES["solarize_add" if plain == "SolarizeAdd" else plain.lower()], arguments


def _signed(most: Callable) -> Callable:
    """Return a level function with a random sign; `most(hparams)` is the number at level 10."""
    return lambda level, negative, hparams: np.where(negative, -1.0, 1.0) * (level / 10.0 * most(hparams))


def _increasing(level: np.ndarray, negative: np.ndarray, hparams: dict) -> np.ndarray:
    change = level / 10.0 * 0.9
    return np.maximum(0.1, 1.0 + np.where(negative, -change, change))


def _bits(level: np.ndarray) -> np.ndarray:
    return np.trunc(level / 10.0 * 4)


def _threshold(level: np.ndarray) -> np.ndarray:
    return np.minimum(256, np.trunc(level / 10.0 * 256))


# Operation -> timm's function of its level: (level, is_negative, hparams) -> number, for (n,) levels from 0 to 10 or
# --aa's mmax
LEVELS: dict[str, Callable] = {
    **dict.fromkeys(("AutoContrast", "Equalize", "Invert"), lambda level, *_: np.zeros_like(level)),
    **dict.fromkeys(FACTORS, lambda level, *_: level / 10.0 * 1.8 + 0.1),
    **dict.fromkeys((f"{name}Increasing" for name in FACTORS), _increasing),
    "Posterize": lambda level, *_: _bits(level),
    "PosterizeIncreasing": lambda level, *_: 4 - _bits(level),
    "PosterizeOriginal": lambda level, *_: 4 + _bits(level),
    "Solarize": lambda level, *_: _threshold(level),
    "SolarizeIncreasing": lambda level, *_: 256 - _threshold(level),
    "SolarizeAdd": lambda level, *_: np.minimum(128, np.trunc(level / 10.0 * 110)),
    "Rotate": _signed(lambda _: 30.0),
    **dict.fromkeys(("ShearX", "ShearY"), _signed(lambda _: 0.3)),
    **dict.fromkeys(("TranslateX", "TranslateY"), _signed(lambda hparams: float(hparams["translate_const"]))),
    **dict.fromkeys(("TranslateXRel", "TranslateYRel"), _signed(lambda hparams: hparams.get("translate_pct", 0.45))),
}
GATE, MAGNITUDE, SIGN, RESAMPLING = range(4)  # the uniform numbers of a layer


class TimmPolicy(Policy):
    """Layers of timm's operations; a subclass chooses the operations."""

    def __init__(self, ops: list[AugmentOp], layers: int, choosing_columns: int):
        self.ops, self.layers, self.choosing_columns = ops, layers, choosing_columns
        self.columns = choosing_columns + 4 * layers
        if unknown := sorted({op.name for op in ops} - set(LEVELS)):
            raise HostOnly(f"timm's {', '.join(unknown)} runs only on the host")
        pairs = [op.kwargs["resample"] for op in ops]  # of a pair, one is drawn for each image
        pairs = [pair if isinstance(pair, tuple) else (pair, pair) for pair in pairs]
        if unknown := {resampling for pair in pairs for resampling in pair} - set(RESAMPLINGS):
            names = ", ".join(Image.Resampling(resampling).name.lower() for resampling in unknown)
            raise HostOnly(f"PIL cannot rotate or shear with {names} resampling")
        self.resampling = np.array([[RESAMPLINGS.index(resampling) for resampling in pair] for pair in pairs], np.int8)
        _, first, kinds = np.unique([op.name for op in ops], return_index=True, return_inverse=True)
        self.of_name = [ops[i] for i in first]  # one operation of each name
        self.kinds = kinds.astype(np.uint8)  # of each operation: its name's index in `of_name`
        self.probability, self.magnitude, self.magnitude_std, self.most = np.array(
            [(op.prob, op.magnitude, op.magnitude_std, op.magnitude_max or 10.0) for op in ops], np.float64
        ).T

    @abstractmethod
    def chosen(self, draws: np.ndarray) -> np.ndarray:
        """(N, choosing_columns) -> (N, layers) indices into `ops`."""

    def plan(self, draws: np.ndarray, height: int, width: int) -> OperationPlan:
        chosen = self.chosen(draws[:, : self.choosing_columns])
        layers = draws[:, self.choosing_columns : self.columns].reshape(len(draws), self.layers, 4)
        is_done = layers[..., GATE] < self.probability[chosen]
        level = self._level(chosen, layers[..., MAGNITUDE]).ravel()
        is_negative = layers[..., SIGN].ravel() >= 0.5
        operations, arguments = np.zeros(chosen.size, np.int8), np.zeros((chosen.size, 6))
        kinds = np.where(is_done, self.kinds[chosen], len(self.of_name)).ravel()
        ends = np.cumsum(np.bincount(kinds, minlength=len(self.of_name)))
        ordered = np.argsort(kinds, kind="stable")
        for op, where in zip(self.of_name, np.split(ordered, ends), strict=False):  # the last part: not done
            numbers = LEVELS[op.name](level[where], is_negative[where], op.hparams)
            operations[where], arguments[where] = effect(op.name, numbers, height, width)
        operations, arguments = operations.reshape(chosen.shape), arguments.reshape(*chosen.shape, 6)
        resampling = self.resampling[chosen, _choice(layers[..., RESAMPLING], 2)]
        resampling[operations != AFFINE] = NEAREST
        return OperationPlan(operations, arguments, resampling, tuple(self.ops[0].kwargs["fillcolor"]))

    def _level(self, chosen: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Return the magnitude, or a draw around it (uniform below it if the standard deviation is inf), clipped."""
        level, std = self.magnitude[chosen], self.magnitude_std[chosen]
        if self.magnitude_std.any():
            finite_std = np.where(np.isinf(std), 0.0, std)
            normal = torch.special.ndtri(torch.from_numpy(np.maximum(draws, 2.0**-60))).numpy()
            level = np.where(np.isinf(std), level * draws, level + finite_std * normal)
        return np.clip(level, 0.0, self.most[chosen])


class SubPolicies(TimmPolicy):
    """timm's AutoAugment: one of its sub-policies, each a sequence of operations."""

    def __init__(self, transform: AutoAugment):
        (layers,) = {len(sub_policy) for sub_policy in transform.policy}
        super().__init__([op for sub_policy in transform.policy for op in sub_policy], layers, choosing_columns=1)

    def chosen(self, draws: np.ndarray) -> np.ndarray:
        return _choice(draws, len(self.ops) // self.layers) * self.layers + np.arange(self.layers)


class RandomOperations(TimmPolicy):
    """timm's RandAugment: operations drawn with replacement, or without it if they have weights."""

    def __init__(self, transform: RandAugment):
        self.weights = transform.choice_weights
        ops, layers = list(transform.ops), transform.num_layers
        super().__init__(ops, layers, layers if self.weights is None else len(ops))

    def chosen(self, draws: np.ndarray) -> np.ndarray:
        if self.weights is None:
            return _choice(draws, len(self.ops))
        # Each operation waits an exponential time, with its weight as the rate: the order in which they arrive is that
        # of draws without replacement
        return np.argsort(-np.log1p(-draws) / self.weights, axis=1, kind="stable")[:, : self.layers]


class TorchvisionPolicy(Policy):
    """torchvision's AutoAugment, with its policy and magnitudes."""

    def __init__(self, transform: transforms.AutoAugment):
        self.transform, self.layers = transform, 2
        self.columns = 1 + 2 * self.layers  # the sub-policy; then, per layer, whether it is applied and its sign

    def plan(self, draws: np.ndarray, height: int, width: int) -> OperationPlan:
        sub_policies = self.transform.policies
        space = self.transform._augmentation_space(10, (height, width))
        shape = len(sub_policies), self.layers
        operations, probability, arguments = np.zeros(shape, np.int8), np.zeros(shape), np.zeros((*shape, 2, 6))  # +, -
        for i, sub_policy in enumerate(sub_policies):
            for layer, (name, p, magnitude) in enumerate(sub_policy):
                magnitudes, is_signed = space[name]
                value = 0.0 if magnitude is None else float(magnitudes[magnitude])
                numbers = torchvision_numbers(name, np.array([value, -value if is_signed else value]))
                operations[i, layer], arguments[i, layer] = effect(name, numbers, height, width)
                probability[i, layer] = p
        chosen = _choice(draws[:, 0], len(sub_policies))
        layers = draws[:, 1:].reshape(len(draws), self.layers, 2)
        is_done, is_negative = layers[..., 0] < probability[chosen], layers[..., 1] >= 0.5
        drawn = np.where(is_done, operations[chosen], 0).astype(np.int8)
        return OperationPlan(
            drawn,
            arguments[chosen[:, None], np.arange(self.layers), is_negative.astype(np.intp)],
            np.full(drawn.shape, RESAMPLINGS.index(Image.Resampling[self.transform.interpolation.name]), np.int8),
            (0, 0, 0) if self.transform.fill is None else tuple(self.transform.fill),
        )


def torchvision_numbers(name: str, magnitudes: np.ndarray) -> np.ndarray:
    """Convert torchvision's magnitudes of an operation to the numbers with which timm's operation does the same."""
    if name in ("TranslateX", "TranslateY"):
        return -np.trunc(magnitudes)
    if name in ("ShearX", "ShearY"):
        return np.tan(np.arctan(magnitudes))
    return magnitudes + 1.0 if name in FACTORS else magnitudes


class Jitter(Policy):
    """torchvision's ColorJitter: uniform factors of brightness, contrast and saturation, and a uniform shift of the hue,
    in random order."""

    def __init__(self, transform: transforms.ColorJitter):
        ranges = dict(brightness=transform.brightness, contrast=transform.contrast, color=transform.saturation)
        ranges["hue"] = transform.hue
        self.ranges = {CODES[name]: bounds for name, bounds in ranges.items() if bounds is not None}
        self.columns = 2 * len(self.ranges)  # the factors; then a number for each, by which they are ordered

    def plan(self, draws: np.ndarray, height: int, width: int) -> OperationPlan:
        low, high = np.array(list(self.ranges.values())).T
        factors = low + (high - low) * draws[:, : len(low)]
        order = np.argsort(draws[:, len(low) : self.columns], axis=1, kind="stable")
        arguments = np.zeros((*order.shape, 6))
        arguments[..., 0] = np.take_along_axis(factors, order, axis=1)
        operations = np.array(list(self.ranges), np.int8)[order]
        return OperationPlan(operations, arguments, np.zeros(order.shape, np.int8), (0, 0, 0))


class Rotation(Policy):
    """torchvision's RandomRotation: a rotation by a uniform angle, without interpolation."""

    columns = 1

    def __init__(self, transform: transforms.RandomRotation):
        self.low, self.high = transform.degrees

    def plan(self, draws: np.ndarray, height: int, width: int) -> OperationPlan:
        degrees = self.low + (self.high - self.low) * draws[:, 0]
        code, arguments = effect("Rotate", degrees, height, width)
        operations = np.full((len(draws), 1), code, np.int8)
        return OperationPlan(operations, arguments[:, None], np.full_like(operations, NEAREST), (0, 0, 0))


class AtRandom(Policy):
    """torchvision's RandomApply of one transform: with some probability all of its operations, else none."""

    def __init__(self, transform: transforms.RandomApply):
        [of_all] = transform.transforms
        self.policy, self.probability = policy_of(of_all), transform.p
        self.columns = 1 + self.policy.columns

    def plan(self, draws: np.ndarray, height: int, width: int) -> OperationPlan:
        plan = self.policy.plan(draws[:, 1:], height, width)
        is_done = draws[:, :1] < self.probability
        return replace(plan, operations=np.where(is_done, plan.operations, 0).astype(np.int8))


class Grayscale(Policy):
    """torchvision's RandomGrayscale: the luminance in all channels, that is, the operation `color` with factor 0."""

    columns = 1

    def __init__(self, transform: transforms.RandomGrayscale):
        self.probability = transform.p

    def plan(self, draws: np.ndarray, height: int, width: int) -> OperationPlan:
        operations = np.where(draws[:, :1] < self.probability, CODES["color"], 0).astype(np.int8)
        return OperationPlan(operations, np.zeros((*operations.shape, 6)), np.zeros_like(operations), (0, 0, 0))


class InTurn(Policy):
    """Policies applied one after another. At most the first fills pixels."""

    def __init__(self, policies: list[Policy]):
        self.policies, self.columns = policies, sum(policy.columns for policy in policies)

    def plan(self, draws: np.ndarray, height: int, width: int) -> OperationPlan:
        ends = np.cumsum([policy.columns for policy in self.policies])[:-1]
        parts = np.split(draws[:, : self.columns], ends, axis=1)
        plans = [policy.plan(part, height, width) for policy, part in zip(self.policies, parts, strict=True)]
        layers = zip(*((plan.operations, plan.arguments, plan.resampling) for plan in plans), strict=True)
        return OperationPlan(*(np.concatenate(of_each, axis=1) for of_each in layers), plans[0].fill)


POLICIES = {
    transforms.AutoAugment: TorchvisionPolicy,
    AutoAugment: SubPolicies,
    RandAugment: RandomOperations,
    transforms.ColorJitter: Jitter,
    transforms.RandomApply: AtRandom,
    transforms.RandomGrayscale: Grayscale,
    transforms.RandomRotation: Rotation,
}
