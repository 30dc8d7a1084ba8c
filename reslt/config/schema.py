"""The configuration of a run: one typed, frozen object, and what it may hold.

A field of `Config` is a flag of `train.py`, a key of a recipe and a key of `defaults:` in a dataset's info.yaml, with
the same name and the same checks (`validation.py`). How the four sources are laid over each other stands in `sources.py`.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Method:
    """What a method asks of the rest; its loss stands under the same name in `losses.LOSSES`."""

    described: str
    has_branches: bool


METHODS = {
    "reslt": Method("the paper's", has_branches=True),
    "ce": Method("plain cross-entropy on the plain model", has_branches=False),
}


def option(default, help: str, *, choices=None, low=None, high=None, above=None, length=None, metavar=None):
    """A field with its flag's help text and bounds: `low <= value <= high`, `value > above`, `length` values."""
    bounds = dict(help=help, choices=choices, low=low, high=high, above=above, length=length, metavar=metavar)
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=bounds)
    return field(default=default, metadata=bounds)


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Defaults are the released code's large-scale settings where it has one."""

    # data
    data: str = option("digits_lt", "name of a folder under data_lists/, or a folder that holds train.txt")
    data_dir: str | None = option(None, "image root; else RESLT_DATA/<name>, else what the dataset's folder says")
    data_on_device: str = option(
        "auto",
        "keep the images on the device and augment them there: small images of one size; auto: on a GPU, where they fit "
        "in a fifth of its memory and every augmentation has a device form",
        choices=("auto", "on", "off"),
    )
    decode: str = option(
        "host",
        "device: training's JPEGs are decoded, cropped, resized and augmented on the GPU",
        choices=("host", "device"),
    )
    workers: int = option(4, "processes that decode images, at most one per CPU core; 0: none", low=0)
    img_size: int | None = option(None, "side of the square input in pixels; unset: the model's own", low=1)
    mean: tuple[float, ...] | None = option(None, "channel means in [0, 1]; unset: the model's own", length=(3,))
    std: tuple[float, ...] | None = option(
        None, "channel deviations in [0, 1]; unset: the model's", above=0, length=(3,)
    )
    crop: str = option("rrc", "rrc: random resized crop; pad: zero-pad, then random crop", choices=("rrc", "pad"))
    crop_padding: int = option(4, "pixels added on each side by --crop pad", low=0)
    hflip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    scale: tuple[float, ...] = option(
        (0.08, 1.0), "area range of the random resized crop", above=0, high=1, length=(2,)
    )
    ratio: tuple[float, ...] = option((3 / 4, 4 / 3), "aspect range of the random resized crop", above=0, length=(2,))
    train_interpolation: str = option(
        "bilinear", "resampling in training", choices=("bilinear", "bicubic", "lanczos", "random")
    )
    interpolation: str | None = option(
        None, "resampling in evaluation; unset: the model's own", choices=("bilinear", "bicubic", "lanczos")
    )
    crop_pct: float | None = option(None, "share kept by evaluation's centre crop; unset: the model's", above=0, high=1)
    color_jitter: tuple[float, ...] = option(
        (0.0,), "brightness contrast saturation [hue], or one number for the first three", low=0, length=(1, 3, 4)
    )
    aa: str | None = option(
        None,
        "AutoAugment: cifar10 (torchvision's policy), or timm's v0, original, 3a, rand-m9-mstd0.5, augmix-m5-w4, ...",
    )
    reprob: float = option(0.0, "probability of random erasing", low=0, high=1)
    remode: str = option(
        "pixel", "erase with noise per pixel, one random colour, or the mean", choices=("pixel", "rand", "const")
    )
    mixup: float = option(0.0, "alpha of mixup's Beta(alpha, alpha); 0: off", low=0)
    cutmix: float = option(0.0, "alpha of CutMix's Beta(alpha, alpha); 0: off", low=0)
    mixup_prob: float = option(1.0, "probability that a batch (pair, element) is mixed", low=0, high=1)
    mixup_switch_prob: float = option(0.5, "probability of CutMix rather than mixup where both are on", low=0, high=1)
    mixup_mode: str = option("batch", "one draw per batch, pair or element", choices=("batch", "pair", "elem"))
    bad_images: str = option(
        "stop",
        "stop: an image that cannot be read ends the run; skip: leave out those that `prepare check --decode` recorded",
        choices=("stop", "skip"),
    )
    limit_train: int | None = option(None, "train on N images spread evenly over the list (smoke runs)", low=1)
    eval_split: str | None = option(
        None,
        "lists evaluated while training; unset: val where there is one, else test",
        choices=("val", "test", "both"),
    )
    # model
    model: str = option("resnet50", "any timm model, or cifar_resnet20, 32, 44, 56")
    model_kwargs: dict[str, object] = option({}, "arguments of the model's constructor", metavar="KEY=VALUE")
    pretrained: bool = option(False, "start from timm's pretrained weights")
    pretrained_file: str | None = option(None, "a file of such weights, for machines without network")
    drop: float | None = option(None, "dropout rate before the classifier", low=0, high=1)
    drop_path: float | None = option(None, "stochastic depth rate", low=0, high=1)
    experts: int = option(1, "experts with late stages, branches and a classifier of their own (ResNets)", low=1)
    expert_width: float = option(0.75, "width of their stages against the plain model's", above=0, high=1)
    # method
    method: str = option(
        "reslt", "; ".join(f"{name}: {m.described}" for name, m in METHODS.items()), choices=tuple(METHODS)
    )
    alpha: float = option(0.9, "weight of the branch loss against the fusion loss, Eq. (3)", low=0, high=1)
    branches: int = option(3, "number of branches K", low=1)
    branch: str = option("conv", "conv: 1x1 convolution, BN, ReLU; bn: BN alone (CIFAR)", choices=("conv", "bn"))
    branch_at: str = option("map", "branches on the feature map or on the pooled features", choices=("map", "pooled"))
    eval_branch_at: str | None = option(None, "the same for evaluation; unset: as trained", choices=("map", "pooled"))
    tau: float | None = option(
        None, "evaluate with classifier rows divided by their norm^TAU and without bias, 0 too; none: as trained"
    )
    branch_loss: str = option(
        "pooled",
        "pooled: one mean over all members of all branches; mean: a mean per branch",
        choices=("pooled", "mean"),
    )
    branch_sizes: tuple[int, ...] | None = option(
        None, "classes in the nested sets 2..K, or `equal`: groups of equal imbalance factor", low=1
    )
    logit_adjust: float = option(0.0, "TAU: training sees logits + TAU log(class frequency)", low=0, metavar="TAU")
    smoothing: float = option(0.0, "label smoothing", low=0, high=1)
    # optimisation
    epochs: int = option(100, "passes over the training list", low=1)
    batch_size: int = option(128, "GLOBAL batch size: the same run on any number of processes", low=2)
    grad_accum_steps: int = option(1, "passes that share a global batch, one update behind the last", low=1)
    opt: str = option("sgd", "any of timm's optimizers")
    lr: float = option(0.05, "peak learning rate", above=0)
    momentum: float = option(0.9, "momentum", low=0, high=1)
    nesterov: bool = option(False, "Nesterov momentum")
    weight_decay: float = option(5e-4, "weight decay on ALL parameters, BN and bias included", low=0)
    sched: str = option("cosine", "schedule of the learning rate", choices=("cosine", "multistep"))
    decay_milestones: tuple[int, ...] = option((), "epochs (from 0) at which multistep decays", low=1)
    decay_rate: float = option(0.1, "factor of each decay", above=0, high=1)
    warmup_epochs: int = option(5, "epochs of linear warm-up; the last one is at the peak", low=0)
    warmup_lr: float = option(0.0, "rate that the warm-up's line starts from, one epoch before epoch 0", low=0)
    min_lr: float = option(0.0, "rate that the cosine ends at", low=0)
    clip_grad: float | None = option(None, "largest norm of the gradient", above=0)
    model_ema: bool = option(False, "evaluate an exponential moving average of the weights")
    model_ema_decay: float = option(0.9998, "its decay per step", low=0, high=1)
    # run
    mixed_precision: str | None = option(
        None, "unset: as `accelerate launch` was told, else no", choices=("no", "bf16", "fp16")
    )
    channels_last: bool = option(False, "channels-last memory layout (faster convolutions on GPUs)")
    torchcompile: bool = option(False, "compile the model with torch.compile")
    cuda_graph: str = option(
        "auto",
        "the training step as one CUDA graph; auto: where the images are on the device",
        choices=("auto", "on", "off"),
    )
    sync_bn: bool = option(False, "BatchNorm over the images of all processes (GPUs)")
    seed: int = option(0, "seed of everything random", low=0, high=2**32 - 1)
    output: str = option("output", "folder of run folders")
    experiment: str | None = option(
        None, "name of the run's folder; unset: recipe, or data, model and method, and seed"
    )
    resume: str | None = option(None, "auto: go on with this run where it stopped; or the folder of a run")
    force_resume: bool = option(False, "resume although the configuration or a list has changed")
    overwrite: bool = option(False, "replace a run of the same name")
    checkpoint_minutes: float | None = option(
        20.0, "also write a checkpoint within an epoch, this long after the last one; none: only behind epochs", above=0
    )
    checkpoint_hist: int = option(2, "checkpoints kept beside the best", low=1)
    eval_every: int = option(1, "epochs between evaluations; the last epoch is always evaluated", low=1)
    log_with: str | None = option(None, "also log to (needs its package)", choices=("tensorboard", "wandb"))

    @property
    def run_folder(self) -> Path:
        """The folder of `--resume DIR`, else <output>/<experiment>."""
        return Path(self.resume) if self.resume not in (None, "auto") else Path(self.output) / str(self.experiment)

    @property
    def has_branches(self) -> bool:
        """Whether the method trains branches."""
        return METHODS[self.method].has_branches

    @property
    def sgd_variant(self) -> str | None:
        """`opt` without timm's wrappers where it is SGD, which alone has a Nesterov switch; else None."""
        name = self.opt.lower().removeprefix("lookahead_")
        return name if name in ("sgd", "sgdw") else None


HINTS = typing.get_type_hints(Config)
FIELDS = {f.name: f for f in dataclasses.fields(Config)}
