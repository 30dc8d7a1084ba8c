"""The numbers that turn a file into a network's input."""

from __future__ import annotations

from dataclasses import dataclass

from reslt.config.schema import Config


@dataclass(frozen=True)
class ImageSettings:
    """How files become inputs: the configuration's settings, and the model's own where it leaves them open."""

    size: int  # pixels, the side of the square input
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    config: Config

    @classmethod
    def of(cls, config: Config, model_data: dict) -> ImageSettings:
        """`model_data` is timm's `resolve_model_data_config(model)`."""

        def first(stated, own):
            return own if stated is None else stated

        return cls(
            size=first(config.img_size, max(model_data["input_size"][1:])),
            mean=first(config.mean, tuple(model_data["mean"])),
            std=first(config.std, tuple(model_data["std"])),
            interpolation=first(config.interpolation, model_data["interpolation"]),
            crop_pct=first(config.crop_pct, model_data["crop_pct"]),
            config=config,
        )
