"""Cutout covers one square per image, the same on the host, on resident images and after decoding on the device."""

import numpy as np
import pytest
import torch
from builders import settings_of, train_loader_of
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from reslt.augment.cutout import Cutout
from reslt.augment.host_transforms import seed_generators, train_transform
from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from reslt.core.errors import UserError
from reslt.data.datasets import load_dataset
from reslt.loading.loaders import HostLoader
from reslt.loading.resident import Augmentation, ResidentLoader, random_table

MODEL_DATA = dict(
    input_size=(3, 16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1), interpolation="bilinear", crop_pct=1.0
)
PLAIN = dict(crop="pad", crop_padding=0, hflip=0.0, img_size=16, batch_size=8, workers=0)


pytestmark = pytest.mark.usefixtures("own_cache")


def settings(**changes) -> ImageSettings:
    return settings_of(Config.of(**PLAIN | changes), MODEL_DATA)


def covered_by_hand(image: torch.Tensor, row: int, column: int, side: int, color: tuple) -> torch.Tensor:
    """Return a (3, H, W) uint8 image with a square around a center, filled pixel by pixel."""
    image = image.clone()
    for y in range(row - side // 2, row - side // 2 + side):
        for x in range(column - side // 2, column - side // 2 + side):
            if 0 <= y < image.shape[1] and 0 <= x < image.shape[2]:
                image[:, y, x] = torch.tensor(color, dtype=torch.uint8)
    return image


@pytest.mark.parametrize(
    ("side", "fill", "color"),
    [(6, "black", (0, 0, 0)), (5, "grey", (128, 128, 128)), (1, "mean", (128, 102, 76)), (99, "black", (0, 0, 0))],
)
def test_a_square_around_the_center_is_filled_and_cut_at_the_border(side, fill, color):
    """The mean color is 255 x (0.5, 0.4, 0.3), rounded half to even: 127.5 to 128, 76.5 to 76."""
    images = torch.randint(0, 256, (5, 3, 8, 12), dtype=torch.uint8)
    centers = [(0, 0), (7, 11), (4, 6), (0, 11), (3, 1)]
    found = Cutout(settings(cutout=side, cutout_fill=fill))(images, torch.tensor(centers))
    for image, filled, center in zip(images, found, centers, strict=True):
        assert torch.equal(filled, covered_by_hand(image, *center, side, color))


def test_a_square_larger_than_the_images_is_refused():
    assert Cutout.of(settings(cutout=16)).side == 16
    with pytest.raises(
        UserError,
        match=r"^--cutout 17: the square is larger than the images of 16 pixels; choose a smaller side, such as 8$",
    ):
        Cutout.of(settings(cutout=17))


def test_the_host_draws_the_center_with_the_next_two_numbers_of_its_generator():
    """Cutout is applied last, after erasing, so that no earlier draw changes."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for changes in ({}, {"aa": "cifar10", "reprob": 0.5}, {"crop": "rrc"}, {"crop": "center"}):
        for seed in range(8):
            seed_generators(seed)
            without = train_transform(settings(**changes))(picture)
            row, column = (int(16 * u) for u in torch.rand(2, dtype=torch.float64))
            seed_generators(seed)
            found = train_transform(settings(cutout=6, **changes))(picture)
            assert torch.equal(found, covered_by_hand(without, row, column, 6, (0, 0, 0)))


@pytest.mark.parametrize("changes", [{}, {"aa": "cifar10", "hflip": 0.5}, {"crop": "rrc", "color_jitter": (0.4,)}])
def test_resident_images_are_covered_by_the_last_two_columns_of_their_table(changes):
    """All other columns mean the same as without Cutout."""
    plain, augmentation = (Augmentation(settings(**changes, **more)) for more in ({}, {"cutout": 6}))
    assert augmentation.columns == plain.columns + 2
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    rows = random_table(0, 0, 12, augmentation.columns)
    without = plain(images, rows[:, :-2])
    for image, filled, (u, v) in zip(without, augmentation(images, rows), rows[:, -2:], strict=True):
        assert torch.equal(filled, covered_by_hand(image, int(16 * u), int(16 * v), 6, (0, 0, 0)))


@pytest.mark.parametrize(
    ("changes", "columns"),
    [({}, 3), ({"aa": "cifar10"}, 8), ({"crop": "rrc", "color_jitter": (0.4,)}, 48), ({"crop": "center"}, 1)],
)
def test_without_cutout_the_random_table_is_that_of_earlier_versions(changes, columns):
    """The numbers of columns and the draws were recorded before Cutout existed."""
    assert Augmentation(settings(**changes)).columns == columns
    assert random_table(5, 2, 2, 3).tolist() == [
        [0.9517592599948158, 0.6674311594685157, 0.02863178090428664],
        [0.08282732768935508, 0.629528329767703, 0.046048870960968435],
    ]


def test_covering_a_block_does_not_wait_for_the_device():
    """Fake tensors have no values, so that reading one back, which waits for a GPU, would raise."""
    augmentation = Augmentation(settings(cutout=6, cutout_fill="mean"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = augmentation(torch.zeros(12, 3, 16, 16, dtype=torch.uint8), random_table(0, 0, 12, 5))
    assert images.shape == (12, 3, 16, 16)


@pytest.mark.parametrize("on_device", ["off", "on"])
def test_centers_are_uniform_over_the_image_on_host_and_device(tiny, on_device):
    """In each of 60 epochs, 24 images get a square of one pixel, which is the center itself. Of the 1,440 centers, each
    row and column has a sixteenth: 90, within 4.5 standard deviations of 9.2."""
    dataset, config = load_dataset(str(tiny)), Config.of(**PLAIN, cutout=1, data_on_device=on_device)
    loader = train_loader_of(dataset, config, settings(cutout=1))
    plain = train_loader_of(dataset, Config.of(**PLAIN, data_on_device=on_device), settings())
    assert isinstance(loader, HostLoader if on_device == "off" else ResidentLoader)
    centers = torch.zeros(16, 16)
    for epoch in range(60):
        for (images, _), (others, _) in zip(loader.epoch(epoch), plain.epoch(epoch), strict=True):
            centers += (images != others).any(1).sum(0)
    assert centers.sum() > 1400  # a pixel that is black already shows no difference
    for counts in (centers.sum(0), centers.sum(1)):
        assert (counts - 90).abs().max() < 4.5 * 9.2
