"""The settings of a run, in six sections: a field is a flag, a recipe key and a `defaults:` key, all of the same name.

For users the settings are flat; `Config.of` and `Config.flat` convert. Code below the entry points takes values or one
section. `checks.py` checks the values; `resolve.py` combines their sources."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from reslt.config.methods import METHODS, PARTS_OF_A_METHOD, Method, unused_settings
from reslt.config.parts import (
    CLASS_WEIGHTS,
    COSTS,
    FEATURE_LOSSES,
    HEADS,
    MUTUAL,
    NETWORKS,
    PRIORS,
    SAMPLERS,
    Part,
    described,
)

PREDICTION = ("tau", "prior_tau", "ncm", "tde", "tta", "fusion")  # settings of predictors


def option(
    default,
    help: str | Callable[[], str],
    *,
    choices: Collection[str] | None = None,
    low=None,
    high=None,
    above=None,
    below=None,
    length=None,
    metavar=None,
    flag: str | None = None,
    is_flag: bool = True,
):
    """Return a field with its flag's help text and bounds: `low <= value <= high`, `above < value < below`, `length`
    values.

    `choices` may be a registry (a mapping by name), and `help` a function: both are read when a value is checked or help
    is printed, since a user's module may register more. `flag`: the name of a flag that differs from the setting's; it is
    repeated for several values. `is_flag`: False for a setting that only files can state."""
    bounds = dict(help=help, choices=choices, low=low, high=high, above=above, below=below, length=length)
    bounds |= dict(metavar=metavar, flag=flag, is_flag=is_flag)
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=bounds)
    return field(default=default, metadata=bounds)


@dataclass(frozen=True)
class DataSettings:
    """The lists and images, and the way they are read."""

    data: str = option("digits_lt", "name of a folder under data_lists/, or a folder that contains train.txt")
    data_dir: str | None = option(
        None,
        "folder that the lists' paths start from (image root); unset: a folder in RESLT_DATA, else the one that the dataset's "
        "local.yaml or info.yaml states",
    )
    data_on_device: str = option(
        "auto",
        "keep images of one size in the device's memory and augment them there in batches; auto: if they are small, "
        "take at most a fifth of the memory, and every augmentation has a batch form",
        choices=("auto", "on", "off"),
    )
    decode: str = option(
        "host",
        "device: decode, crop, resize and augment training JPEGs on the GPU",
        choices=("host", "device"),
    )
    workers: int = option(4, "processes that decode images, at most one per CPU core; 0: none", low=0)
    bad_images: str = option(
        "stop",
        "stop: an unreadable image ends the run; skip: leave out those that `prepare check --decode` recorded",
        choices=("stop", "skip"),
    )
    limit_train: int | None = option(None, "train on N images spread evenly over the list (smoke runs)", low=1)
    eval_split: str | None = option(
        None,
        "lists that are evaluated during training; unset: val if it exists, else test",
        choices=("val", "test", "both"),
    )
    final_split: str | None = option(
        None, "list of the final tables; unset: test if it exists, else val", choices=("val", "test")
    )
    val_from_train: float | None = option(
        None,
        "without a val.txt: set aside this share of each class of the training list, drawn by --seed, as validation list; a "
        "class with fewer than three images keeps all of them, and any other gives at least one and keeps at least two",
        above=0,
        below=1,
        metavar="SHARE",
    )
    only_shots: str | None = option(
        None,
        "train and evaluate only on the classes of one shot group, for example to make one of the --teachers; the network keeps the "
        "outputs of all classes",
        choices=("many", "medium", "few"),
    )


@dataclass(frozen=True)
class AugmentSettings:
    """Preprocessing of all images, and augmentation of training images."""

    img_size: int | None = option(None, "side of the square input in pixels; unset: the model's own", low=1)
    mean: tuple[float, ...] | None = option(None, "channel means in [0, 1]; unset: the model's own", length=(3,))
    std: tuple[float, ...] | None = option(
        None, "channel standard deviations in [0, 1]; unset: the model's own", above=0, length=(3,)
    )
    crop: str = option(
        "rrc",
        "rrc: random resized crop; pad: zero-pad, then random crop; center: evaluation's resize and center crop",
        choices=("rrc", "pad", "center"),
    )
    crop_padding: int = option(4, "pixels added on each side by --crop pad", low=0)
    hflip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    scale: tuple[float, ...] = option(
        (0.08, 1.0), "range of the random resized crop's share of the image area", above=0, high=1, length=(2,)
    )
    ratio: tuple[float, ...] = option(
        (3 / 4, 4 / 3), "range of the random resized crop's aspect ratio", above=0, length=(2,)
    )
    train_interpolation: str = option(
        "bilinear", "resampling filter in training", choices=("bilinear", "bicubic", "lanczos", "random")
    )
    interpolation: str | None = option(
        None, "resampling filter in evaluation; unset: the model's own", choices=("bilinear", "bicubic", "lanczos")
    )
    crop_pct: float | None = option(
        None, "share of the short side that evaluation's center crop keeps; unset: the model's own", above=0, high=1
    )
    color_jitter: tuple[float, ...] = option(
        (0.0,),
        "strengths of random changes: brightness, contrast, saturation and, if given, hue; one number sets the first three",
        low=0,
        length=(1, 3, 4),
    )
    aa: str | None = option(
        None,
        "AutoAugment: cifar10 (torchvision's policy), or timm's v0, original, 3a, rand-m9-mstd0.5, augmix-m5-w4, ...",
    )
    aa_fill: str | None = option(
        None,
        "color of pixels that --aa's rotations, shears and translations leave empty: black, grey (128) or the image mean; "
        "unset: black for cifar10, the mean for timm's policies",
        choices=("black", "grey", "mean"),
    )
    rotate: float = option(
        0.0,
        "rotate by up to this many degrees after crop and flip, in place of AutoAugment or color jitter; pixels left empty "
        "are black",
        low=0,
        high=180,
    )
    reprob: float = option(0.0, "probability of random erasing", low=0, high=1)
    remode: str = option(
        "pixel",
        "random erasing fills with noise per pixel, one random color, or the mean",
        choices=("pixel", "rand", "const"),
    )
    cutout: int = option(
        0,
        "Cutout: cover a square of this side length in pixels, centered anywhere in the image, in every training image, after "
        "all other augmentation except mixing; 0: off",
        low=0,
        metavar="PX",
    )
    cutout_fill: str = option(
        "black", "color of --cutout's square: black, grey (128) or the image mean", choices=("black", "grey", "mean")
    )
    mixup: float = option(0.0, "alpha of mixup's Beta(alpha, alpha); 0: off", low=0)
    cutmix: float = option(0.0, "alpha of CutMix's Beta(alpha, alpha); 0: off", low=0)
    mixup_prob: float = option(1.0, "probability that a batch (pair, element) is mixed", low=0, high=1)
    mixup_switch_prob: float = option(0.5, "probability of CutMix rather than mixup if both are on", low=0, high=1)
    mixup_mode: str = option(
        "batch", "draw the mixing once per batch, per pair or per element", choices=("batch", "pair", "elem")
    )

    @property
    def mixes(self) -> bool:
        """Whether training mixes images."""
        return bool((self.mixup or self.cutmix) and self.mixup_prob)


@dataclass(frozen=True)
class ModelSettings:
    """The timm model, its weights, and the number of experts that share it."""

    model: str = option(
        "resnet50",
        "any timm model, or cifar_resnet20, 32, 44, 56; as a flag also hf-hub:ORG/NAME or local-dir:FOLDER: the model that "
        "config.json there names, with its mean, std, interpolation, crop_pct and img_size",
    )
    model_kwargs: dict[str, object] = option({}, "arguments for the model's constructor", metavar="KEY=VALUE")
    pretrained: bool = option(
        False, "start from timm's pretrained weights, or from those of the hub or folder that --model names"
    )
    pretrained_file: str | None = option(None, "file of pretrained weights, for machines without network access")
    init_from: str | None = option(
        None,
        "start from trained weights: a run folder, the folder of one of its checkpoints, a file in it, a folded file, or "
        "timm's weights",
        metavar="RUN|FILE",
    )
    teachers: tuple[str, ...] | None = option(
        None,
        "also learn from networks trained on the many, the medium and the few classes, in this order (LFME): folders of runs "
        "with --only-shots, or folded files",
        length=(3,),
        metavar="RUN|FILE",
    )
    drop: float | None = option(None, "dropout rate before the classifier", low=0, high=1)
    drop_path: float | None = option(None, "stochastic depth rate", low=0, high=1)
    experts: int = option(
        1, "number of experts, each with its own late stages, branches and classifier (ResNets only)", low=1
    )
    expert_width: float = option(0.75, "width of the experts' stages relative to the plain model's", above=0, high=1)
    expert_stages: int = option(2, "number of late stages that each expert has for itself; at most all of them", low=1)
    expert_gates: bool = option(
        False,
        "each expert multiplies its last map by a gate: strided convolutions on the map of an early stage; the experts use "
        "these stages in turn (SHIKE)",
    )
    freeze: tuple[str, ...] | None = option(
        None,
        "do not train these parameters of the timm model, given by names or patterns, such as layer1 'layer4.[01]' "
        "'*.bn1.*'; BatchNorm's statistics there keep following the images; none: train all",
        metavar="PATTERN",
    )
    tune: str = option(
        "full",
        "the part of the timm model that trains, in addition to its classifier and the branches. full: all; head: none, with "
        "--crop center and --branch-at pooled, so that the features of each image and its mirror image are computed only "
        "once; norm: normalization layers; lora: low-rank updates of linear layers (requires peft); adapter: bottlenecks beside the MLPs "
        "of transformer blocks (AdaptFormer)",
        choices=("full", "head", "norm", "lora", "adapter"),
    )
    lora_rank: int = option(8, "rank of --tune lora's updates", low=1)
    lora_alpha: float = option(16.0, "--tune lora: updates are scaled by LORA_ALPHA / LORA_RANK", above=0)
    adapter_dim: int | None = option(
        None,
        "width of --tune adapter's bottlenecks; unset: a power of two computed from the numbers of classes and blocks, as in LIFT",
        low=1,
    )


@dataclass(frozen=True)
class MethodSettings:
    """The training objective, and the prediction."""

    method: str = option(
        "reslt", lambda: "; ".join(f"{name}: {m.described}" for name, m in METHODS.items()), choices=METHODS
    )
    cost: str | None = option(None, described(COSTS), choices=COSTS)
    class_weights: str | None = option(None, described(CLASS_WEIGHTS), choices=CLASS_WEIGHTS)
    sampler: str | None = option(None, described(SAMPLERS), choices=SAMPLERS)
    head: str | None = option(None, described(HEADS), choices=HEADS)
    network: str | None = option(None, described(NETWORKS), choices=NETWORKS)
    mutual: str | None = option(None, described(MUTUAL), choices=MUTUAL)
    feature_loss: str | None = option(None, described(FEATURE_LOSSES), choices=FEATURE_LOSSES)
    stages: tuple[dict[str, object], ...] | None = option(None, "stages after the first", is_flag=False)
    stage2_epochs: int | None = option(None, "epochs of the second stage; unset: the method's", low=1)
    stage2_lr: float | None = option(None, "learning rate of the second stage; unset: the method's", above=0)
    focal_gamma: float = option(1.0, "exponent of the focal losses", low=0)
    ldam_margin: float = option(0.5, "LDAM: the rarest class's margin", low=0)
    vs_gamma: float = option(0.2, "VS, CDT: logits are divided by (n_max / n_c)^GAMMA", low=0)
    seql_gamma: float = option(
        0.9, "SEQL: probability that a rare class is left out of another class's loss", low=0, high=1
    )
    seql_threshold: float = option(0.005, "SEQL: frequency below which a class is rare", low=0, high=1)
    smoothing_head: float = option(0.4, "label-aware cost: smoothing of the most frequent class", low=0, high=1)
    smoothing_tail: float = option(0.1, "label-aware cost: smoothing of the rarest class", low=0, high=1)
    class_weight_beta: float = option(0.9999, "beta of effective class weights", low=0, high=1)
    sampler_beta: float = option(0.9999, "beta of the effective sampler", low=0, high=1)
    head_scale: float | None = option(
        None, "scale of cosine, deconfounded and meta_embedding heads; unset: 30, 16 and 16", above=0
    )
    head_init: str = option(
        "random",
        "cosine head: initialize rows at random, or with the class means of the training images' normalized features (one "
        "pass over these images at the start)",
        choices=("random", "class_means"),
    )
    head_groups: int = option(2, "deconfounded head: number of groups that the features are divided into", low=1)
    head_gamma: float = option(1 / 32, "deconfounded head: constant that is added to the norm of a class vector", low=0)
    head_momentum: float = option(
        0.9, "deconfounded head: momentum of the mean direction of the features", low=0, high=1
    )
    feature_loss_weight: float = option(1.0, "weight of the feature loss; the loss of the logits has weight 1", above=0)
    lifted_margin: float = option(
        1.0, "lifted loss: margin (Song et al. 2016; the margin of the paper's rows is not published)", low=0
    )
    range_alpha: float = option(5e-5, "range loss: weight within classes (Zhang et al. 2017)", low=0)
    range_beta: float = option(1e-4, "range loss: weight between classes (Zhang et al. 2017)", low=0)
    range_margin: float = option(
        5.0,
        "range loss: squared distance up to which class means repel each other (our value; none is published)",
        low=0,
    )
    range_k: int = option(
        2, "range loss: number of largest distances within a class that count (Zhang et al. 2017)", low=1
    )
    feature_temperature: float = option(0.1, "contrastive feature loss: temperature of the embeddings", above=0)
    views: int = option(
        3,
        "contrastive feature loss: views of each training image in a batch; the first, for the classifier, has the run's "
        "augmentation; the others, for the contrast, have random resized crop, flip, color jitter and grayscale",
        low=2,
    )
    mutual_weight: float = option(0.6, "weight of the term between experts; a negative weight drives them apart")
    mutual_hard_classes: int | None = option(
        None,
        "balanced_kl: add a term over this many classes per image, those with the largest logits; none: only the term over all "
        "classes",
        low=2,
    )
    hard_classes: int = option(
        30,
        "cost ce_hard: number of classes in its second term, which are the label and those with the largest logits",
        low=2,
    )
    temperature_factor: float = option(
        0.05, "tempered diversity: how much lower the temperature of rare classes is", low=0, below=1
    )
    router_topk: int | None = option(
        None,
        "add a router, which decides from this many of the largest logits (at most all) whether to ask the next expert; none: "
        "no router",
        low=1,
    )
    second_sampler: str | None = option(
        None,
        "network bbn: train on pairs of images, whose second image this sampler draws; none: on single images",
        choices=SAMPLERS,
    )
    cumulative_epochs: int | None = option(
        None, "pairs: number of epochs after which only the second image would count; unset: --epochs", low=1
    )
    exit_confidence: float = option(
        0.9,
        "network exits: an image leaves at the first exit whose largest probability exceeds this value; in training, the "
        "probability of its label must exceed it too; the default is not that of ELF's authors",
        low=0,
        high=1,
    )
    expert_loss: str = option(
        "sum", "loss of several experts: the sum or the mean of their losses", choices=("sum", "mean")
    )
    part_kwargs: dict[str, object] = option(
        {}, "arguments for parts that an --import module registers", metavar="KEY=VALUE"
    )
    alpha: float = option(
        0.9, "weight of the branch loss; the fusion loss has weight 1 - ALPHA, Eq. (3)", low=0, high=1
    )
    branches: int = option(3, "number of branches K", low=1)
    branch: str = option("conv", "conv: 1x1 convolution, BN, ReLU; bn: BN alone (CIFAR)", choices=("conv", "bn"))
    branch_init_branches: int | None = option(
        None, "conv branches: number of branches that the fan-out counts at initialization; unset: K", low=1
    )
    branch_at: str = option(
        "map", "apply the branches to the feature map or to the pooled features", choices=("map", "pooled")
    )
    eval_branch_at: str | None = option(
        None, "--branch-at for evaluation; unset: as trained", choices=("map", "pooled")
    )
    tau: float | None = option(
        None,
        "evaluate with classifier rows divided by their norm^TAU and without bias (even if TAU is 0); none: as trained",
    )
    prior_tau: float | None = option(
        None, "evaluate with classes ranked by logits - PRIOR_TAU log(class frequency); none: as trained"
    )
    ncm: str | None = option(
        None,
        "evaluate with the nearest class mean of the training images' features, centered and normalized, normalized, or raw; "
        "costs one or two passes over these images in every evaluation",
        choices=("cl2", "l2", "raw"),
    )
    tde: float | None = option(
        None, "deconfounded head: evaluate with the total direct effect, with this alpha; none: as trained", low=0
    )
    tta: str | None = option(
        None, "evaluate with the mean of the logits of the image and its mirror image", choices=("flip",)
    )
    branch_loss: str = option(
        "pooled",
        "pooled: one mean over all pairs of an image and a branch; mean: the sum of the branches' means",
        choices=("pooled", "mean"),
    )
    branch_sizes: tuple[int, ...] | None = option(
        None, "numbers of classes in the nested sets 2 to K, or `equal`: groups of equal imbalance factor", low=1
    )
    branch_sets: str = option(
        "nested",
        "classes of the branches. nested: all, medium and tail, tail; separate: all, medium, tail; disjoint: head, medium, "
        "tail",
        choices=("nested", "separate", "disjoint"),
    )
    tied_branches: bool = option(False, "share the weights of the branches, so that their outputs are equal")
    fusion: str | None = option(
        None,
        "evaluate with the maximum of the branches' logits, the sum of their softmax, or the main branch alone; none: the "
        "sum of logits",
        choices=("max", "softmax", "main"),
    )
    logit_adjust: float | tuple[float, ...] = option(
        0.0, "train with logits + TAU log(class frequency); several numbers: one per expert", metavar="TAU"
    )
    logit_adjust_reversed: float | tuple[float, ...] = option(
        0.0,
        "train with logits - TAU log(reversed frequency), in which the rarest class has the frequency of the most frequent "
        "one, and so on (SADE); several numbers: one per expert",
        metavar="TAU",
    )
    logit_adjust_on: str = option(
        "all",
        "branches: the losses that see the adjusted logits. all: the fusion loss and the branch loss; fusion: only the fusion "
        "loss",
        choices=("all", "fusion"),
    )
    smoothing: float = option(0.0, "label smoothing", low=0, high=1)

    def __post_init__(self) -> None:
        """Set the parts that are unset to the method's."""
        bundle = METHODS.get(self.method) if isinstance(self.method, str) else None  # a damaged file may state a list
        for name in PARTS_OF_A_METHOD:
            if bundle is not None and getattr(self, name) is None:
                object.__setattr__(self, name, getattr(bundle, name))

    @property
    def described(self) -> Method:
        """The named method's entry in `METHODS`."""
        return METHODS[self.method]

    @property
    def has_branches(self) -> bool:
        """Whether the network has branches."""
        return self.network == "reslt"

    @property
    def trains_on_pairs(self) -> bool:
        """Whether each training image has a partner from a second sampler."""
        return self.network == "bbn" and self.second_sampler is not None

    @property
    def has_prior(self) -> bool:
        """Whether the loss of any stage sees adjusted logits."""
        taus = [getattr(self, name) for name in PRIORS]
        taus += [stage.get(name) for stage in self.stages or () for name in PRIORS]
        return any(tau not in (None, 0) for tau in taus)

    def of_expert(self, expert: int) -> MethodSettings:
        """Return the settings of one expert (from 0), with its own number of each prior that has one per expert."""
        own = {name: taus[expert] for name in PRIORS if isinstance(taus := getattr(self, name), tuple)}
        return dataclasses.replace(self, **own)

    @property
    def views_in_training(self) -> int:
        """The views of each training image."""
        return self.views if self.feature_loss == "proco" else 1

    @property
    def prediction(self) -> dict[str, object]:
        """The settings of predictors that are set."""
        return {name: value for name in PREDICTION if (value := getattr(self, name)) is not None}

    def arguments_of(self, part: Part) -> dict[str, object]:
        """Return the arguments of a registered part, with the values of `part_kwargs`."""
        return {name: self.part_kwargs.get(name, default) for name, default in part.arguments.items()}


@dataclass(frozen=True)
class OptimSettings:
    """Epochs, batches, optimizer and schedule."""

    epochs: int = option(100, "passes over the training list, in the first stage", low=0)
    batch_size: int = option(128, "GLOBAL batch size: the same for any number of processes", low=2)
    grad_accum_steps: int = option(
        1, "number of micro-batches that the global batch is divided into; one optimizer step for all of them", low=1
    )
    opt: str = option("sgd", "optimizer: any of timm's")
    lr: float = option(0.05, "peak learning rate", above=0)
    momentum: float = option(0.9, "momentum", low=0, high=1)
    nesterov: bool = option(False, "Nesterov momentum")
    weight_decay: float = option(5e-4, "weight decay on ALL parameters, BN and bias included", low=0)
    weight_decay_filter: bool = option(
        False, "no weight decay on biases, norms, and what the timm model excludes, such as position embeddings"
    )
    layer_decay: float | None = option(
        None,
        "multiply the learning rate by this factor from each layer group of the timm model to the group before it, as timm "
        "does; unset: 1",
        above=0,
        high=1,
    )
    sched: str = option("cosine", "schedule of the learning rate", choices=("cosine", "multistep"))
    decay_milestones: tuple[int, ...] = option((), "epochs (from 0) at which the multistep schedule decays", low=1)
    decay_rate: float = option(0.1, "factor of each decay", above=0, high=1)
    warmup_epochs: int = option(5, "epochs of linear warm-up; the last one is at the peak", low=0)
    warmup_lr: float = option(0.0, "learning rate at which the warm-up starts, one epoch before epoch 0", low=0)
    min_lr: float = option(0.0, "learning rate at which the cosine schedule ends", low=0)
    clip_grad: float | None = option(None, "maximum norm of the gradient", above=0)
    sam: float = option(
        0.0,
        "sharpness-aware minimization (SAM): each step uses the gradient at weights moved by RHO along the gradient, at twice "
        "the cost; 0: off",
        low=0,
        metavar="RHO",
    )
    model_ema: bool = option(False, "evaluate an exponential moving average of the weights")
    model_ema_decay: float = option(0.9998, "decay per step of --model-ema", low=0, high=1)

    @property
    def sgd_variant(self) -> str | None:
        """`opt` without timm's wrappers if it is SGD, the only one with a Nesterov switch; else None."""
        name = self.opt.lower().removeprefix("lookahead_")
        return name if name in ("sgd", "sgdw") else None


@dataclass(frozen=True)
class RunSettings:
    """Execution of the run, its folder, checkpoints and logs."""

    mixed_precision: str | None = option(
        None, "precision of training; unset: as given to `accelerate launch`, else no", choices=("no", "bf16", "fp16")
    )
    channels_last: bool = option(False, "channels-last memory layout (faster convolutions on GPUs)")
    torchcompile: bool = option(False, "compile the model with torch.compile")
    cuda_graph: str = option(
        "auto",
        "run the training step as one CUDA graph; auto: if the images are resident on the GPU",
        choices=("auto", "on", "off"),
    )
    sync_bn: bool = option(False, "BatchNorm normalizes over the images of all processes (GPUs only)")
    seed: int = option(0, "seed of all random numbers", low=0, high=2**32 - 1)
    output: str = option("output", "parent folder of run folders")
    experiment: str | None = option(
        None, "name of the run folder; unset: made from the recipe, or from data, model and method, and from the seed"
    )
    resume: str | None = option(
        None, "auto: resume the run of this name, or start it if there is none; or the run folder to resume"
    )
    force_resume: bool = option(False, "resume even if the configuration or a list has changed")
    overwrite: bool = option(False, "replace an existing run of the same name")
    checkpoint_minutes: float | None = option(
        20.0,
        "also write a checkpoint mid-epoch, this many minutes after the last one; none: only at the end of epochs",
        above=0,
    )
    checkpoint_seconds: float = option(
        5.0,
        "write a checkpoint at the end of an epoch if the last one is at least this old; the last epoch, a new best one and a "
        "stop signal always write one; 0: at the end of every epoch",
        low=0,
    )
    checkpoint_hist: int = option(2, "number of newest checkpoints to keep, in addition to the best one", low=1)
    ddp_timeout: int = option(
        1800, "longest time in seconds that a process waits for the others before the run ends", low=1, high=10**9
    )
    eval_every: int = option(1, "number of epochs between evaluations; the last epoch is always evaluated", low=1)
    log_with: str | None = option(
        None, "also log to this tracker (requires its package)", choices=("tensorboard", "wandb")
    )
    profile: bool = option(False, "print the time of each phase at the end of the run")
    profile_trace: str | None = option(
        None,
        "write the phases to this file, as a trace that a browser displays (chrome://tracing, ui.perfetto.dev)",
        metavar="FILE",
    )
    imports: tuple[str, ...] = option(
        (),
        "module of your own, or a file FILE.py, that registers methods, timm models, ...; repeat the flag for several",
        flag="--import",
        metavar="MODULE",
    )


@dataclass(frozen=True)
class Config:
    """All settings of a run. Defaults are the released code's large-scale settings, if it has them."""

    data: DataSettings = field(default_factory=DataSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    method: MethodSettings = field(default_factory=MethodSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    run: RunSettings = field(default_factory=RunSettings)

    @classmethod
    def of(cls, **values) -> Config:
        """Return a configuration with these flat settings; the others keep their defaults. The values are not checked."""
        return cls().changed(**values)

    def changed(self, **values) -> Config:
        """Return the configuration with some flat settings replaced. Raises KeyError for an unknown one."""
        if values.get("method", self.method.method) != self.method.method:
            values = dict.fromkeys(PARTS_OF_A_METHOD) | values  # the new method sets its own parts
        by_section: dict[str, dict[str, object]] = {}
        for name, value in values.items():
            by_section.setdefault(SECTION_OF[name], {})[name] = value
        replaced = {section: dataclasses.replace(getattr(self, section), **new) for section, new in by_section.items()}
        return dataclasses.replace(self, **replaced)

    def flat(self) -> dict[str, object]:
        """Return {setting: value} of all sections."""
        return {name: getattr(getattr(self, section), name) for name, section in SECTION_OF.items()}

    def __getitem__(self, name: str) -> object:
        """Return the value of a setting by its flat name."""
        return getattr(getattr(self, SECTION_OF[name]), name)

    @property
    def unused(self) -> frozenset[str]:
        """The settings that the chosen method with its parts does not use, or that have no effect next to the others."""
        return unused_settings(dataclasses.asdict(self.method)) | self.without_effect.keys()

    @property
    def without_effect(self) -> dict[str, str]:
        """{setting: why it has no effect}, for settings that depend on others than the method."""
        aa, reasons = self.augment.aa, {}
        if aa is None:
            reasons["aa_fill"] = "without --aa, there is nothing to fill"
        elif "3a" in aa:
            reasons["aa_fill"] = f"--aa {aa} rotates, shears and translates nothing"
        if not self.augment.cutout:
            reasons["cutout_fill"] = "without --cutout, there is no square to fill"
        if self.augment.crop == "center":
            for name in ("crop_padding", "scale", "ratio", "train_interpolation"):
                reasons[name] = (
                    "--crop center transforms training images as in evaluation (--interpolation, --crop-pct)"
                )
        if self.model.tune == "head":
            for name in ("drop", "drop_path"):
                reasons[name] = "--tune head keeps the timm model in evaluation mode, without dropout"
        if self.method.has_branches and self.method.branch != "conv":
            reasons["branch_init_branches"] = f"--branch {self.method.branch} has no convolution to initialize"
        if self.method.network == "bbn" and not self.method.trains_on_pairs:
            reasons["cumulative_epochs"] = "there are no pairs without --second-sampler"
        for name, tune in (("lora_rank", "lora"), ("lora_alpha", "lora"), ("adapter_dim", "adapter")):
            if self.model.tune != tune:
                reasons[name] = f"it is a setting of --tune {tune}"
        if self.method.has_branches and not self.method.has_prior:
            reasons["logit_adjust_on"] = "all losses see plain logits without --logit-adjust"
        if self.model.experts == 1:
            reasons["expert_loss"] = "it combines the losses of several experts (--experts 2 or more)"
            for name in ("expert_stages", "expert_gates"):
                reasons[name] = "it is a setting of several experts (--experts 2 or more)"
        return reasons

    def stored(self) -> dict[str, object]:
        """Return the flat settings that are used, with lists instead of tuples, as in config.yaml and state.json."""
        unused = self.unused
        values = {name: value for name, value in self.flat().items() if name not in unused}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def run_folder(self) -> Path:
        """The folder of `--resume DIR`, else <output>/<experiment>."""
        run = self.run
        return Path(run.resume) if run.resume not in (None, "auto") else Path(run.output) / str(run.experiment)


# Defaults that a choice of --tune brings, between a method's own and those of a dataset.
TUNE_DEFAULTS = {"head": {"crop": "center", "branch_at": "pooled"}}
SECTIONS = {f.name: typing.get_type_hints(Config)[f.name] for f in dataclasses.fields(Config)}
FIELDS = {f.name: f for section in SECTIONS.values() for f in dataclasses.fields(section)}
HINTS = {name: hint for section in SECTIONS.values() for name, hint in typing.get_type_hints(section).items()}
SECTION_OF = {f.name: name for name, section in SECTIONS.items() for f in dataclasses.fields(section)}
DEFAULTS = Config().flat()


def flag_of(name: str) -> str:
    """Return the flag of a setting: batch_size -> --batch-size."""
    return FIELDS[name].metadata["flag"] or "--" + name.replace("_", "-")


SETTING_OF_FLAG = {flag_of(name): name for name in FIELDS}
