"""Settings for turning an image file into a network's input."""

from __future__ import annotations

from dataclasses import dataclass, replace

from reslt.config.schema import AugmentSettings

GRAY = 128  # of fills: the gray of the CIFAR-10 policy that most long-tail repositories share


@dataclass(frozen=True)
class ImageSettings:
    """The section `augment`, with unset values taken from the model."""

    size: int  # pixels, the side of the square input
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    augment: AugmentSettings
    jitter_prob: float | None = None  # probability of color jitter; None: always
    gray_prob: float = 0.0  # probability that an image loses its color

    @property
    def of_contrast(self) -> ImageSettings:
        """The settings of the further views of an image, for a contrastive loss: SimCLR's without blur. They keep
        only scale, ratio, interpolation and flip of the run's own augmentation."""
        own = self.augment
        augment = AugmentSettings(
            crop="rrc",
            scale=own.scale,
            ratio=own.ratio,
            train_interpolation=own.train_interpolation,
            hflip=own.hflip,
            color_jitter=(0.4, 0.4, 0.4, 0.1),
        )
        return replace(self, augment=augment, jitter_prob=0.8, gray_prob=0.2)

    @classmethod
    def of(cls, augment: AugmentSettings, model_data: dict) -> ImageSettings:
        """Return the settings of a section; `model_data` is timm's `resolve_model_data_config(model)`."""

        def first(stated, own):
            return own if stated is None else stated

        return cls(
            size=first(augment.img_size, max(model_data["input_size"][1:])),
            mean=first(augment.mean, tuple(model_data["mean"])),
            std=first(augment.std, tuple(model_data["std"])),
            interpolation=first(augment.interpolation, model_data["interpolation"]),
            crop_pct=first(augment.crop_pct, model_data["crop_pct"]),
            augment=augment,
        )
