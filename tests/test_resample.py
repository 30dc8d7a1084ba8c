"""Crops of a batch on the device match those that PIL, timm and torchvision compute image by image."""

import random
from contextlib import nullcontext

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import functional

from reslt.augment.resample import BOX_COLUMNS, RESAMPLINGS, crops_at, draw_boxes, flipped, padded, resized_crops

PIL_RESAMPLINGS = [None, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS]
ROWS_FIRST_ALWAYS = (
    int(PIL.__version__.split(".")[0]) < 13
)  # before 13, PIL rounds another intermediate result of tall boxes
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def noise(generator, *shape) -> np.ndarray:
    """Return uint8 noise: black and white, which overshoots most, or all levels."""
    levels = (0, 255) if generator.random() < 0.5 else range(256)
    return generator.choice(np.array(levels, np.uint8), shape)


def random_boxes(generator, n: int, height: int, width: int) -> np.ndarray:
    heights = generator.integers(1, (min(height, width) if ROWS_FIRST_ALWAYS else height) + 1, n)
    widths = generator.integers(1, width + 1, n)
    if ROWS_FIRST_ALWAYS:
        widths = np.maximum(widths, heights)
    tops, lefts = generator.integers(0, height - heights + 1), generator.integers(0, width - widths + 1)
    return np.stack([tops, lefts, heights, widths], 1)


def by_pil(image: np.ndarray, box: np.ndarray, size: int, resampling: int) -> np.ndarray:
    top, left, height, width = box.tolist()
    crop = Image.fromarray(image.transpose(1, 2, 0)).crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, size), PIL_RESAMPLINGS[resampling])).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [1, 7, 32, 96])
def test_every_pixel_matches_pil_with_every_filter(size):
    generator = np.random.default_rng(size)
    assert sorted(RESAMPLINGS.values()) == [1, 2, 3]
    for _ in range(12):
        height, width = generator.integers(1, 260, 2)
        images, boxes = noise(generator, 3, 3, height, width), random_boxes(generator, 3, height, width)
        resampling = generator.integers(1, 4, 3)
        found = resized_crops(torch.from_numpy(images), boxes, size, resampling).numpy()
        for image, box, kind, crop in zip(images, boxes, resampling, found, strict=True):
            assert (crop == by_pil(image, box, size, kind)).all(), (image.shape, box, kind)


def test_one_filter_for_all_images_and_boxes_as_floats_in_a_tensor_are_accepted():
    generator = np.random.default_rng(0)
    images, boxes = noise(generator, 2, 3, 40, 50), random_boxes(generator, 2, 40, 50)
    found = resized_crops(torch.from_numpy(images), torch.from_numpy(boxes).float(), 16, RESAMPLINGS["bicubic"])
    assert (found.numpy() == np.stack([by_pil(*pair, 16, 2) for pair in zip(images, boxes, strict=True)])).all()


def test_pixels_outside_the_box_do_not_count():
    """A gray box in white noise stays gray: the filters' negative lobes would show the border."""
    images = torch.from_numpy(noise(np.random.default_rng(0), 3, 3, 64, 80))
    images[:, :, 10:40, 20:70] = 77
    boxes = np.array([[10, 20, 30, 50]] * 3)
    assert (resized_crops(images, boxes, 24, np.array([1, 2, 3])) == 77).all()


def test_blocks_that_bound_the_memory_do_not_change_the_result(monkeypatch):
    generator = np.random.default_rng(0)
    images, boxes = torch.from_numpy(noise(generator, 7, 3, 60, 60)), random_boxes(generator, 7, 60, 60)
    whole = resized_crops(images, boxes, 16, 3)
    sizes = []
    plain = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: sizes.append(len(a)) or plain(a, b))
    assert torch.equal(resized_crops(images, boxes, 16, 3, float_bytes=400_000), whole)
    assert max(sizes) in (
        2,
        3,
    )  # an image takes 4 (3 x 60 x 60 + 16 x 16 x 60) = 104,640 bytes; 400,000 have room for 3.8
    assert torch.equal(resized_crops(images, boxes, 16, 3, float_bytes=1), whole)


def test_tf32_and_autocast_change_nothing(monkeypatch):
    """TF32 keeps 10 of the 23 bits after a float32's leading one."""
    generator = np.random.default_rng(1)
    images, boxes = torch.from_numpy(noise(generator, 4, 3, 90, 70)), random_boxes(generator, 4, 90, 70)
    expected = resized_crops(images, boxes, 33, np.array([1, 2, 3, 3]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resized_crops(images, boxes, 33, np.array([1, 2, 3, 3])), expected)
    plain, factors = torch.bmm, []

    def tf32(factor: torch.Tensor) -> torch.Tensor:
        factors.append(factor)
        return (factor.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)

    monkeypatch.setattr(torch, "bmm", lambda a, b: plain(tf32(a), tf32(b)))
    assert torch.equal(resized_crops(images, boxes, 33, np.array([1, 2, 3, 3])), expected)
    assert all(torch.equal(tf32(factor), factor) for factor in list(factors))
    assert not torch.equal(tf32(torch.tensor([1 / 3])), torch.tensor([1 / 3]))


def test_no_operation_waits_for_the_device(monkeypatch):
    """Tensors on the meta device have no values: an operation that asks for one raises."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # autocast does not support the meta device
    images = torch.empty((5, 3, 40, 30), dtype=torch.uint8, device="meta")
    crops = resized_crops(images, np.array([[0, 0, 40, 10]] * 2 + [[3, 2, 20, 25]] * 3), 16, np.array([1, 2, 3, 1, 2]))
    assert crops.shape == (5, 3, 16, 16)
    places = torch.zeros(5, dtype=torch.int64, device="meta")
    assert crops_at(padded(images, 4), places, places, places, 32).shape == (5, 3, 32, 32)
    assert flipped(images, places.bool()).shape == images.shape
    with pytest.raises((RuntimeError, NotImplementedError)):
        places.max().item()


def measures(boxes: np.ndarray, height: int, width: int) -> dict[str, np.ndarray]:
    tops, lefts, heights, widths = boxes.T
    return {
        "area": heights * widths / (height * width),
        "ratio": widths / heights,
        "top": tops / np.maximum(height - heights, 1),
        "left": lefts / np.maximum(width - widths, 1),
    }


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [(375, 500, SCALE, RATIO), (500, 333, (0.25, 0.9), (0.5, 3.0)), (400, 130, SCALE, RATIO), (32, 32, SCALE, RATIO)],
)
def test_boxes_are_distributed_as_in_timm(height, width, scale, ratio):
    n = 8000
    random.seed(0)
    image = torch.empty(()).expand(height, width)
    timms = np.array([RandomResizedCropAndInterpolation.get_params(image, scale, ratio) for _ in range(n)])
    ours = draw_boxes(np.random.default_rng(0).random((n, BOX_COLUMNS)), height, width, scale, ratio)
    assert ours.dtype == np.int64
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    their_measures = measures(timms, height, width)
    for name, values in measures(ours, height, width).items():
        assert ks_2samp(values, their_measures[name]).pvalue > 0.01, name
        assert abs(values.mean() - their_measures[name].mean()) < 0.02, name


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [
        (1000, 10, (0.9, 1)),
        (7, 300, (0.5, 1)),
        (100, 131, (1.5, 2)),
        (90, 90, (1.5, 2)),
        (1, 50, (1, 1)),
        (133, 100, (9, 9)),
    ],
)
def test_if_no_attempt_fits_the_box_is_timms_central_one(height, width, scale):
    image = torch.empty(()).expand(height, width)
    expected = RandomResizedCropAndInterpolation.get_params(image, scale, RATIO)
    draws = np.random.default_rng(0).random((5, BOX_COLUMNS))
    assert draw_boxes(draws, height, width, scale, RATIO).tolist() == [list(expected)] * 5


def test_an_images_box_depends_on_its_own_row_alone():
    generator = np.random.default_rng(0)
    draws = generator.random((40, BOX_COLUMNS))
    heights, widths = generator.integers(1, 300, (2, 40))
    together = draw_boxes(draws, heights, widths, SCALE, RATIO)
    alone = [draw_boxes(draws[i : i + 1], int(heights[i]), int(widths[i]), SCALE, RATIO)[0] for i in range(40)]
    assert together.tolist() == np.array(alone).tolist()


def test_extreme_draws_give_boxes_inside_the_image():
    """All 0: 8 % of 300 x 400 at ratio 3/4 is 9,600 = 113 x 85 pixels, at the top left corner."""
    assert draw_boxes(np.zeros((1, BOX_COLUMNS)), 300, 400, SCALE, RATIO).tolist() == [[0, 0, 113, 85]]
    almost_one = np.full((1, BOX_COLUMNS), np.nextafter(1, 0))
    almost_one[:, : BOX_COLUMNS // 4] = 0
    ((top, left, height, width),) = draw_boxes(almost_one, 300, 400, SCALE, RATIO).tolist()
    assert (height, width) == (85, 113)
    assert (top + height, left + width) == (300, 400)
    assert (draw_boxes(np.zeros((1, BOX_COLUMNS)), 1, 1, SCALE, RATIO) == [[0, 0, 1, 1]]).all()  # 0.28 of a pixel


def test_crops_of_padded_images_match_torchvision():
    generator = np.random.default_rng(0)
    images = torch.from_numpy(noise(generator, 30, 3, 20, 24))
    tops, lefts = generator.integers(0, 20 + 8 - 16 + 1, 30), generator.integers(0, 24 + 8 - 16 + 1, 30)
    tops[:2], lefts[:2] = (0, 12), (0, 16)  # the corners
    chosen = torch.from_numpy(generator.permutation(30))
    found = crops_at(padded(images, 4), chosen, torch.from_numpy(tops), torch.from_numpy(lefts), 16)
    for image, top, left, crop in zip(images[chosen], tops, lefts, found, strict=True):
        assert torch.equal(crop, functional.crop(functional.pad(image, 4), int(top), int(left), 16, 16))


def test_only_the_selected_images_are_mirrored_left_to_right():
    images = torch.arange(2 * 3 * 2 * 2, dtype=torch.uint8).view(2, 3, 2, 2)
    found = flipped(images, torch.tensor([False, True]))
    assert torch.equal(found[0], images[0])
    assert found[1, 0].tolist() == [[13, 12], [15, 14]]
