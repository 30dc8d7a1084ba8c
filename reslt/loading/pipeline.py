"""The way of images from disk to batch: one decision per run, from facts that a test can write down."""

from __future__ import annotations

from dataclasses import dataclass

from reslt.core.errors import UserError

SMALL = 128  # pixels a side: the largest images that are resident by default
SHARE_OF_MEMORY = 1 / 5  # the largest share that images take by default

RESIDENT, HOST, DEVICE_DECODE, FEATURES = "resident", "host", "device decode", "features"
WHERE = {
    FEATURES: "features of {views} fixed view{s}, computed once",
    RESIDENT: "images resident on the {device}, augmented there in batches",
    HOST: "images decoded and augmented by worker processes",
    DEVICE_DECODE: "JPEGs decoded and augmented on the {device}",
}


@dataclass(frozen=True)
class Facts:
    """The facts that the decision depends on, apart from the flags."""

    device: str  # cpu, cuda, mps
    img_size: int  # pixels a side of the network's input
    images: int  # of all lists together
    memory: int  # total bytes of the GPU, or of the machine
    stored_size: tuple[int, int] | None  # height, width of all training images before augmentation; None: they differ
    unequal: str = ""  # where they differ
    host_only: str = ""  # why the augmentation has no batch form; "": it has one
    no_features: str | None = None  # why features cannot take the place of images; "": they can; None: not asked for
    views: int = 1  # of a training image, whose features are computed
    feature_bytes: int = 0  # of the features of all lists together


@dataclass(frozen=True)
class Pipeline:
    """How training images (RESIDENT, HOST, DEVICE_DECODE) and evaluated ones (RESIDENT, HOST) are loaded, and why; or
    features of fixed views in place of both (FEATURES)."""

    training: str
    evaluation: str
    reason: str
    device: str = "cpu"
    views: int = 1  # of a training image, whose features are computed

    @property
    def is_resident(self) -> bool:
        """Whether the training images, or their features, are resident."""
        return self.training in (RESIDENT, FEATURES)

    def __str__(self) -> str:
        device, s = self.device.upper().replace("CUDA", "GPU"), "s" * (self.views > 1)
        where = WHERE[self.training].format(device=device, views=self.views, s=s)
        return f"{where} ({self.reason})" if self.reason else where


def choose_pipeline(data_on_device: str, decode: str, facts: Facts) -> Pipeline:
    """`--data-on-device` auto, on or off, `--decode` host or device, facts -> the pipeline.

    Raises UserError if resident images are requested (`on`) but impossible."""
    if data_on_device == "on":
        if impossible := facts.host_only or facts.unequal:
            raise UserError(f"--data-on-device on: {impossible}; use auto or off")
        return Pipeline(RESIDENT, RESIDENT, "--data-on-device on", facts.device)
    if decode == "device":
        return Pipeline(DEVICE_DECODE, HOST, "--decode device", facts.device)
    if data_on_device == "off":
        return Pipeline(HOST, HOST, "--data-on-device off", facts.device)
    no_features = facts.no_features
    if no_features == "" and facts.feature_bytes > SHARE_OF_MEMORY * facts.memory:
        no_features = "they do not fit in a fifth of the memory"
    if no_features == "":
        return Pipeline(FEATURES, FEATURES, "--tune head", facts.device, facts.views)
    if reason := _too_large((facts.img_size, facts.img_size), facts):
        return Pipeline(HOST, HOST, _with_features(reason, no_features), facts.device)
    reason = facts.host_only or facts.unequal or _too_large(facts.stored_size, facts)
    return Pipeline(HOST if reason else RESIDENT, RESIDENT, _with_features(reason, no_features), facts.device)


def _with_features(reason: str, no_features: str | None) -> str:
    """Return the reason against resident images, with that against features if `--tune head` asks for them."""
    return "; ".join(
        filter(None, [reason, no_features and f"--tune head without features computed once: {no_features}"])
    )


def _too_large(size: tuple[int, int], facts: Facts) -> str:
    """Return the reason why images of this (height, width) are not resident by default; "" if they are."""
    height, width = size
    if max(size) > SMALL:
        return f"{width} x {height} pixels are not small"
    if 3 * height * width * facts.images > SHARE_OF_MEMORY * facts.memory:
        return "they do not fit in a fifth of the memory"
    return ""
