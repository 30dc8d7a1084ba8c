"""Operations on whole batches, compared byte by byte with PIL on single images."""

import platform

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from timm.data import auto_augment as timm_ops
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.functional import adjust_hue

from reslt.augment.batch_operations import TABLES, apply
from reslt.augment.host_transforms import posterize
from reslt.augment.policies import CODES, MAPPED, OPERATIONS, RESAMPLINGS, OperationPlan, effect, torchvision_numbers
from tests.benchmarks.auto_augment import Counted

SIZES = [(32, 32), (17, 23), (8, 8), (2, 5)]  # height, width
FILL = (128, 100, 3)
FACTORS = [
    -1.5,
    -0.3,
    0.0,
    0.1,
    0.4999,
    0.9999,
    1.0,
    1.0001,
    1.3,
    1.9,
    3.7,
    *np.random.default_rng(1).uniform(0, 2, 20),
]
IS_X86 = platform.machine() in ("x86_64", "AMD64")


def pictures(height: int, width: int) -> np.ndarray:
    """(n, height, width, 3): noise in the whole range and in narrow ones, a ramp, one value, the extremes, two values."""
    generator = np.random.default_rng(height * width)
    noise = [
        generator.integers(low, high, (height, width, 3)) for low, high in ((0, 256), (90, 140), (0, 25), (201, 256))
    ]
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([y * 255 // max(1, height - 1), x * 255 // max(1, width - 1), (3 * x + y) % 256], axis=-1)
    flat = [np.full((height, width, 3), value) for value in (0, 77, 255)]
    two = [np.where(generator.random((height, width, 3)) < 0.1, low, high) for low, high in ((0, 255), (20, 220))]
    return np.stack([*noise, ramp, *flat, *two]).astype(np.uint8)


def one_layer(operation: str, arguments, resampling: int, count: int) -> OperationPlan:
    """Return a plan of one layer that treats all `count` images alike."""
    row = np.zeros(6)
    row[: np.size(arguments)] = arguments
    return OperationPlan(
        np.full((count, 1), CODES[operation], np.int8),
        np.tile(row, (count, 1, 1)),
        np.full((count, 1), resampling, np.int8),
        FILL,
    )


def in_batch(images: np.ndarray, plan: OperationPlan, pixels_at_once: int | None = None) -> np.ndarray:
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    before = batch.clone()
    result = apply(batch, plan, pixels_at_once)
    assert torch.equal(batch, before), "the input was changed"
    return result.permute(0, 2, 3, 1).numpy()


def assert_same(images, operation, arguments, by_pil, resampling=0):
    result = in_batch(images, one_layer(operation, arguments, resampling, len(images)))
    for image, mine in zip(images, result, strict=True):
        expected = np.asarray(by_pil(Image.fromarray(image)))
        difference = np.abs(expected.astype(int) - mine).max()
        # PIL for other processors may be built with fused products, which round once where x86's round twice.
        assert difference <= (resampling > 0 and not IS_X86), (operation, arguments, difference)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("operation", "enhancer"),
    [
        ("color", ImageEnhance.Color),
        ("sharpness", ImageEnhance.Sharpness),
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
    ],
)
def test_enhancement_matches_pil_for_factors_inside_and_outside_0_to_1(operation, enhancer, size):
    for factor in FACTORS:
        assert_same(pictures(*size), operation, factor, lambda image, f=factor: enhancer(image).enhance(f))


def test_a_hue_shift_matches_torchvisions_on_pil_images():
    """Try every color whose channels are multiples of 5, or one more than a multiple of 15; a shift of 1 is a full turn."""
    values = np.sort(np.concatenate([np.arange(0, 256, 5), np.arange(1, 256, 15)])).astype(np.uint8)
    colors = np.stack(np.meshgrid(values, values, values), -1).reshape(1, len(values), -1, 3)
    for shift in (-0.5, -0.1, -0.003, 0.0, 0.07, 0.5):
        assert_same(colors, "hue", shift, lambda image, s=shift: adjust_hue(image, s))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("operation", "arguments", "by_pil"),
    [
        ("identity", [0], lambda image, _: image),
        ("posterize", range(9), posterize),
        ("solarize", [0, 1, 28, 28.333, 128, 141.67, 255, 256], timm_ops.solarize),
        ("solarize_add", [0, 1, 33, 110, 128], timm_ops.solarize_add),
        ("autocontrast", [0], lambda image, _: timm_ops.auto_contrast(image)),
        ("equalize", [0], lambda image, _: timm_ops.equalize(image)),
        ("invert", [0], lambda image, _: timm_ops.invert(image)),
    ],
)
def test_pixel_values_are_mapped_as_by_pil(operation, arguments, by_pil, size):
    for argument in arguments:
        assert_same(pictures(*size), operation, argument, lambda image, a=argument: by_pil(image, a))


@pytest.mark.parametrize("darkest", [0, 3, 100])
def test_autocontrast_rounds_as_pil_for_every_range_of_values(darkest):
    """255 / range * value - 255 / range * darkest in double precision: at some ranges the brightest becomes 254."""
    ranges = np.arange(256 - darkest)
    images = darkest + ranges[:, None, None, None] * np.array([0, 1, 2, 4]).reshape(1, 2, 2, 1) // 4
    images = np.repeat(images, 3, axis=3).astype(np.uint8)
    assert_same(images, "autocontrast", 0, timm_ops.auto_contrast)
    brightest = in_batch(images, one_layer("autocontrast", 0, 0, len(images))).max((1, 2, 3))
    assert darkest == 0 or 254 in brightest


MATRICES = [
    *[(1, f, 0, 0, 1, 0) for f in (0.3, -0.27, 0.1, 0.0333)],
    *[(1, 0, 0, f, 1, 0) for f in (0.3, -0.27, 0.25, 1e-9)],
    *[(1, 0, f, 0, 1, 0) for f in (13, -2, 0.5, 12.96, -1.5, 40, 2.499999)],
    *[(1, 0, 0, 0, 1, f) for f in (13, -2, 0.5, 12.96, -1.5, -40, 2.499999)],
    (1, 0, 2.3, 0, 1, -1.7),
    (1, 0, 0, 0, 1, 0),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resampling", range(3))
def test_shears_and_translations_match_pil(resampling, size):
    for matrix in MATRICES:

        def by_pil(image, matrix=matrix):
            method = Image.Transform.AFFINE
            return image.transform(image.size, method, matrix, RESAMPLINGS[resampling], fillcolor=FILL)

        assert_same(pictures(*size), "affine", matrix, by_pil, resampling)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resampling", range(3))
def test_rotations_match_pil_including_quarter_turns(resampling, size):
    for degrees in [0, 30, -30, 45, 90, 180, 270, -90, 360, 6.6666, 178.2961210495336, *np.linspace(-29, 31, 12)]:
        _, (matrix,) = effect("Rotate", np.array([float(degrees)]), *size)

        def by_pil(image, degrees=degrees):
            return image.rotate(degrees, RESAMPLINGS[resampling], fillcolor=FILL)

        assert_same(pictures(*size), "affine", matrix, by_pil, resampling)


@pytest.mark.parametrize("magnitude", [0.0, 0.1, -0.2667, 4.83, -13.05, 25.0])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_torchvisions_geometric_operations_match_pils_matrices(name, magnitude):
    """torchvision translates by whole pixels in the opposite direction, and shears by an angle."""
    if name.startswith("Shear"):
        magnitude /= 30
    for size in SIZES:
        _, (matrix,) = effect(name, torchvision_numbers(name, np.array([magnitude])), *size)
        assert_same(
            pictures(*size),
            "affine",
            matrix,
            lambda image: _apply_op(image, name, magnitude, InterpolationMode.NEAREST, list(FILL)),
        )


def random_plan(count: int, layers: int, size: tuple[int, int]) -> OperationPlan:
    """Return a plan with a random operation, and arguments that suit it, for every image and layer."""
    generator = np.random.default_rng(5)
    names = [
        "Identity",
        "Rotate",
        "ShearX",
        "ShearY",
        "TranslateX",
        "TranslateYRel",
        "Color",
        "Sharpness",
        "Brightness",
    ]
    names += ["Contrast", "Posterize", "Solarize", "SolarizeAdd", "AutoContrast", "Equalize", "Invert", "Hue"]
    largest = dict(Rotate=30, TranslateX=9, Posterize=8, Solarize=256, SolarizeAdd=110, ShearX=0.3, ShearY=0.3)
    operations, arguments = np.zeros((count, layers), np.int8), np.zeros((count, layers, 6))
    for place in np.ndindex(count, layers):
        name = str(generator.choice(names))
        number = generator.random() * largest.get(name, 1)
        number = np.floor(number) if name.startswith(("Poster", "Solar")) else number
        operations[place], (arguments[place],) = effect(name, np.array([number]), *size)
    resampling = np.where(operations == CODES["affine"], generator.integers(0, 3, operations.shape), 0)
    return OperationPlan(operations, arguments, resampling.astype(np.int8), FILL)


def test_an_image_passes_its_layers_in_order_whatever_the_others_get():
    """Compare each image alone, one layer after another, with the whole batch at once."""
    size = (12, 15)
    images = np.random.default_rng(0).integers(0, 256, (300, *size, 3), dtype=np.uint8)
    plan = random_plan(len(images), 3, size)
    assert set(np.unique(plan.operations)) == set(range(len(OPERATIONS)))
    together = in_batch(images, plan)
    for i in range(len(images)):
        image = images[i : i + 1]
        for layer in range(3):
            one = OperationPlan(*(part[i : i + 1, layer : layer + 1] for part in arrays_of(plan)), plan.fill)
            image = in_batch(image, one)
        assert np.array_equal(image[0], together[i]), i


def arrays_of(plan: OperationPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return plan.operations, plan.arguments, plan.resampling


def test_an_images_bytes_do_not_depend_on_its_place_or_on_the_block():
    size = (12, 15)
    images = np.random.default_rng(0).integers(0, 256, (200, *size, 3), dtype=np.uint8)
    plan = random_plan(len(images), 2, size)
    whole = in_batch(images, plan)
    order = np.random.default_rng(1).permutation(len(images))
    assert np.array_equal(in_batch(images[order], plan[order]), whole[order])
    assert np.array_equal(in_batch(images[50:120], plan[50:120]), whole[50:120])
    for pixels_at_once in (1, 7 * 12 * 15, 8 * 12 * 15 - 1, 200 * 12 * 15):
        assert np.array_equal(in_batch(images, plan, pixels_at_once), whole)


def test_linear_and_cubic_rotations_are_computed_in_pieces_of_any_size():
    """A piece is 16 images of 32 x 32 pixels; 19 and 32 are not multiples of each other."""
    generator, size = np.random.default_rng(2), (32, 32)
    for linear, cubic in ((19, 32), (32, 3), (1, 16), (0, 17), (16, 0)):
        count = linear + cubic
        images = generator.integers(0, 256, (count, *size, 3), dtype=np.uint8)
        _, matrices = effect("Rotate", generator.uniform(-30, 30, count), *size)
        resampling = generator.permutation(np.repeat([1, 2], [linear, cubic]))
        rotations = OperationPlan(
            np.full((count, 1), CODES["affine"], np.int8), matrices[:, None], resampling[:, None].astype(np.int8), FILL
        )
        together = in_batch(images, rotations)
        alone = [in_batch(images[i : i + 1], rotations[i : i + 1])[0] for i in range(count)]
        assert np.array_equal(together, np.stack(alone))


def test_a_block_takes_few_calls_however_many_images_it_has():
    """Each call starts a kernel on a GPU. A block has every operation in both layers: 17 names, 3 ways to resample."""
    calls = []
    for count in (400, 1600):
        images, plan = torch.zeros(count, 3, 8, 8, dtype=torch.uint8), random_plan(count, 2, (8, 8))
        with Counted() as counted:
            apply(images, plan)
        calls.append(counted.calls)
    assert calls[0] == calls[1] < 700


@pytest.mark.parametrize(("count", "layers"), [(0, 2), (3, 0), (1, 1)])
def test_empty_batches_and_plans_without_layers_are_accepted(count, layers):
    size = (8, 8)
    images = np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    result = in_batch(images, random_plan(count, layers, size))
    assert result.shape == images.shape
    assert layers or np.array_equal(result, images)


def test_images_of_any_memory_layout_are_accepted():
    images = torch.from_numpy(pictures(8, 8)).permute(0, 3, 1, 2)
    plan = random_plan(len(images), 2, (8, 8))
    assert torch.equal(apply(images, plan), apply(images.contiguous(), plan))


def test_no_operation_waits_for_the_device():
    """Fake tensors have no values: an operation that reads one back, or takes a shape from values, raises."""
    plan = random_plan(300, 2, (16, 16))
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.zeros(300, 3, 16, 16, dtype=torch.uint8)
        result = apply(images, plan)
        assert (result.shape, result.dtype) == (images.shape, torch.uint8)
        with pytest.raises(DataDependentOutputException):
            result.sum().item()


def test_every_mapped_operation_has_a_table_and_follows_the_others():
    assert tuple(TABLES) == MAPPED == OPERATIONS[-len(MAPPED) :]
