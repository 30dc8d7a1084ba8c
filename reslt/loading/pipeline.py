"""The decision how images get from disk into batches: one per run, from facts that a test can write down."""

from __future__ import annotations

from dataclasses import dataclass

from reslt.core.errors import UserError

SMALL = 128  # pixels a side: the largest images that are resident by default
SHARE_OF_MEMORY = 1 / 5  # the largest share of memory that images take by default

RESIDENT, HOST, DEVICE_DECODE, FEATURES = "resident", "host", "device decode", "features"
DESCRIPTIONS = {
    FEATURES: "features of {views} fixed view{s}, computed once",
    RESIDENT: "images resident on the {device}, augmented there in batches",
    HOST: "images decoded and augmented by worker processes",
    DEVICE_DECODE: "JPEGs decoded and augmented on the {device}",
}


@dataclass(frozen=True)
class Facts:
    """The facts that the decision depends on, apart from the flags."""

    device: str  # cpu, cuda, mps
    img_size: int  # pixels per side of the network's input
    images: int  # of all lists together
    memory: int  # total bytes of the GPU's memory, or of the machine's
    stored_size: tuple[int, int] | None  # height, width of all training images before augmentation; None: they differ
    unequal: str = ""  # the first difference in size
    host_only: str = ""  # why the augmentation runs only on the host; "": it does not
    no_features: str | None = None  # why features cannot replace images; "": they can; None: without --tune head
    views: int = 1  # fixed views of a training image, for features
    feature_bytes: int = 0  # size of the features of all lists together


@dataclass(frozen=True)
class Pipeline:
    """The ways in which training images and evaluated images are loaded, and the reason for them."""

    training: str  # RESIDENT, HOST, DEVICE_DECODE or FEATURES
    evaluation: str  # RESIDENT, HOST or, together with training, FEATURES
    reason: str
    device: str = "cpu"
    views: int = 1  # fixed views of a training image, for features

    @property
    def is_resident(self) -> bool:
        """Whether the training images, or their features, are resident."""
        return self.training in (RESIDENT, FEATURES)

    def __str__(self) -> str:
        device, s = self.device.upper().replace("CUDA", "GPU"), "s" * (self.views > 1)
        description = DESCRIPTIONS[self.training].format(device=device, views=self.views, s=s)
        return f"{description} ({self.reason})" if self.reason else description


def choose_pipeline(data_on_device: str, decode: str, facts: Facts) -> Pipeline:
    """Choose the pipeline by --data-on-device (auto, on or off), --decode (host or device) and the facts.

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
    """Return the reason against resident images, with the one against features if `--tune head` calls for them."""
    return "; ".join(filter(None, [reason, no_features and f"--tune head computes no features once: {no_features}"]))


def _too_large(size: tuple[int, int], facts: Facts) -> str:
    """Return the reason why images of this (height, width) are not resident by default; "" if they are."""
    height, width = size
    if max(size) > SMALL:
        return f"{width} x {height} pixels are not small"
    if 3 * height * width * facts.images > SHARE_OF_MEMORY * facts.memory:
        return "they do not fit in a fifth of the memory"
    return ""
