"""The stages of a run: the same loop, with some settings replaced from an epoch on. Loads no torch.

`stages:` of a method or a recipe lists those after the first, each a mapping:

    start: 0.8            begins after this share of --epochs; or
    epochs: 10            is appended, with as many epochs of its own
    train: [classifier]   trains only these parts: all, classifier, scales, branches, attention, centroids;
                          {classifier: 0.2, scales: 1} also states a factor of the learning rate for each; router: with its
                          own loss, and alone
    reinit: [classifier]  initializes these parts again; centroids: at class means of the training images' features
    bn: eval              BatchNorm uses its running statistics and keeps them; train (default): those of the batch
    ema: restart          the moving average of the weights restarts with the stage; continue: it does not
    sampler, class_weights, cost, mutual, logit_adjust, smoothing, mixup, sam, lr, sched, ...   replace these settings

A stage starts with a fresh optimizer, a new moving average and a schedule over its own epochs if it is appended, or if it
states any of train, reinit, lr, sched, warmup_epochs, decay_milestones or weight_decay. Unless stated, that schedule is
cosine from --lr, without warm-up. Any other stage continues those of the stage before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from reslt.config.parts import PARTS, PRIORS, settings_of_parts
from reslt.config.schema import Config
from reslt.config.values import coerce
from reslt.core.spelling import did_you_mean

PARTS_OF_A_MODEL = ("all", "classifier", "scales", "branches", "attention", "centroids", "router")
MOST_STAGES = 20  # after the first
REINITIALIZED = ("classifier", "centroids")
OWNERS = {  # part of a model -> the kind of part that adds it, and the names of those that do
    "scales": ("head", ("scaled",)),
    "branches": ("network", ("reslt", "bbn")),
    "attention": ("network", ("attention",)),
    "centroids": ("head", ("meta_embedding",)),
}
OF_OPTIMIZATION = (
    "lr",
    "warmup_epochs",
    "warmup_lr",
    "sched",
    "decay_milestones",
    "decay_rate",
    "weight_decay",
    "min_lr",
)
OF_LEARNING = (
    "sampler",
    "sampler_beta",
    "cost",
    "mutual",
    "feature_loss",
    "feature_loss_weight",
    "class_weights",
    "class_weight_beta",
    "mutual_weight",
    *PRIORS,
    "logit_adjust_on",
    "smoothing",
    "smoothing_head",
    "smoothing_tail",
    "focal_gamma",
    "ldam_margin",
    "vs_gamma",
    "mixup",
    "cutmix",
)
OF_STEPS = ("sam",)  # change what a step does; its optimizer continues
OF_IMAGES = ("sampler", "sampler_beta", "mixup", "cutmix")  # of OF_LEARNING, those that do not change the loss
SETTINGS = (*OF_LEARNING, *OF_STEPS, *OF_OPTIMIZATION)
CHOICES = {"bn": ("train", "eval"), "ema": ("restart", "continue")}
KEYS = ("start", "epochs", "train", "reinit", *CHOICES, *SETTINGS)
OWN_SCHEDULE = {"sched": "cosine", "warmup_epochs": 0, "warmup_lr": 0.0, "decay_milestones": ()}


@dataclass(frozen=True)
class Stage:
    """A stage of a run. `config`: the run's, with this stage's settings; its `optim.epochs` are those of its schedule."""

    number: int  # from 1
    config: Config
    begin: int  # first epoch, from 0
    end: int  # the epoch after its last one
    schedule_begin: int  # the epoch with which its schedule begins: an earlier stage's, if it continues that
    train: Mapping[str, float] = field(default_factory=lambda: {"all": 1.0})  # part -> factor of the learning rate
    reinit: tuple[str, ...] = ()
    bn: str = "train"
    ema: str = "restart"
    is_fresh: bool = True  # it begins with a new optimizer and schedule

    @property
    def trains_router(self) -> bool:
        """Whether it trains the router of experts, by a loss of its own."""
        return "router" in self.train


def stages_of(config: Config) -> tuple[Stage, ...]:
    """Return the stages of a configuration: the first, and those of its method. Requires that `stage_faults` finds none."""
    epochs = config.optim.epochs
    stages, end = [Stage(1, config, 0, epochs, 0)], epochs
    for number, stated in enumerate(_stated(config), 2):
        before = stages[-1]
        own = {name: coerce(name, stated[name]) for name in SETTINGS if name in stated}
        is_fresh = bool({"epochs", "train", "reinit", *OF_OPTIMIZATION} & stated.keys())
        if "epochs" in stated:
            begin, end = end, end + int(stated["epochs"])
        else:
            begin = round(float(stated["start"]) * epochs)
            stages[-1] = replace(before, end=begin)  # its schedule does not change
        if is_fresh:
            own = OWN_SCHEDULE | own | {"epochs": end - begin}
        train, reinit = stated.get("train"), tuple(_names(stated.get("reinit", ())))
        stages.append(
            Stage(
                number=number,
                config=(config if is_fresh else before.config).changed(**own),
                begin=begin,
                end=end,
                schedule_begin=begin if is_fresh else before.schedule_begin,
                train=before.train if train is None and not is_fresh else _factors(train or ["all"]),
                reinit=reinit,
                bn=stated.get("bn", "train" if is_fresh else before.bn),
                ema=stated.get("ema", "restart" if is_fresh else "continue"),
                is_fresh=is_fresh,
            )
        )
    return tuple(stages)


def stage_at(stages: tuple[Stage, ...], epoch: int) -> Stage:
    """Return the stage of an epoch (from 0); for an epoch after the end, the last stage."""
    return next((stage for stage in stages if stage.begin <= epoch < stage.end), stages[-1])


def total_epochs(config: Config) -> int:
    """Return the epochs of all stages: `--epochs`, and those of appended stages."""
    return config.optim.epochs + sum(int(stated["epochs"]) for stated in _stated(config) if "epochs" in stated)


def stage_faults(config: Config) -> list[str]:
    """Return the faults of `stages`, each with its remedy."""
    faults, before = [], 0.0
    stages = config.method.stages or ()
    if len(stages) > MOST_STAGES:
        return [f"stages: {len(stages):,} are stated; at most {MOST_STAGES} can follow the first"]
    for number, stated in enumerate(stages, 2):
        found = [f"unknown key {key!r}{did_you_mean(str(key), list(KEYS))}" for key in stated if key not in KEYS]
        found += _span_faults(stated, before, any("epochs" in earlier for earlier in stages[: number - 2]))
        before = stated.get("start", before) if not found else before
        invalid = _setting_faults(stated)
        found += _part_faults(stated, config) + _router_faults(stated, config) + invalid
        found += _schedule_faults(stated, is_valid=not invalid)
        faults += [f"stages: stage {number}: {fault}" for fault in found]
    own, is_share = config.method.stage2_epochs, bool(stages) and "start" in stages[0]
    if own is not None and is_share and own >= config.optim.epochs > 0:
        faults.append(f"stage2_epochs: {own} are not fewer than the {config.optim.epochs} --epochs, which contain them")
    if own is not None and is_share and any("start" in stated for stated in stages[1:]):
        faults.append("stage2_epochs: a third stage begins within --epochs too; state the start of both in a recipe")
    if config.method.head == "scaled" and not any("scales" in _names(stated.get("train")) for stated in stages):
        faults.append(
            "head: no stage trains the scales of a scaled head; use --method lws, or a recipe with such a stage"
        )
    if config.method.router_topk is not None and not any("router" in _names(stated.get("train")) for stated in stages):
        faults.append(
            "router_topk: no stage trains the router; use --method ride_router, or a recipe with a stage of train: [router]"
        )
    # With zero epochs, the weights to start from may have completed such stages; the run would still enter the last one.
    if config.optim.epochs == 0 and any("start" in stated and "reinit" in stated for stated in stages):
        faults.append(
            "epochs: 0 leaves no epochs for a stage that initializes a part again after a share of them; give more epochs"
        )
    return faults or _unused_faults(config)


def _router_faults(stated: Mapping, config: Config) -> list[str]:
    """Return the faults of a stage that trains the router."""
    train = _names(stated.get("train"))
    if "router" not in train:
        return []
    if config.method.router_topk is None:
        return ["train: router: the model has none without --router-topk; give it, or name another part"]
    faults = ["train: router: it has a loss of its own; train other parts in another stage"] * (len(train) > 1)
    return faults + [
        f"{name}: the router's loss does not use it; leave it out"
        for name in OF_LEARNING
        if name in stated and name not in OF_IMAGES
    ]


def _unused_faults(config: Config) -> list[str]:
    """Return a fault for each stated setting of a part that no part of the stage uses, for the moving average of a run
    without one, for centroids without their loss, and for a router trained on mixed images. Requires stages without other
    faults."""
    faults, of_parts = [], settings_of_parts()
    for stage, stated in zip(stages_of(config)[1:], config.method.stages or (), strict=True):
        parts = [PARTS[kind].get(getattr(stage.config.method, kind)) for kind in PARTS]
        if None in parts:  # an unknown one, which its own check reports
            continue
        unused = (of_parts & stated.keys()).difference(*(part.settings for part in parts))
        faults += [
            f"stages: stage {stage.number}: {name}: no part of this stage uses it; leave it out" for name in unused
        ]
        if "ema" in stated and not config.optim.model_ema:
            faults.append(
                f"stages: stage {stage.number}: ema: there is no moving average without model_ema (--model-ema); state it "
                "beside the stages, or leave ema out"
            )
        if "centroids" in stage.train and stage.config.method.feature_loss != "centroids":
            faults.append(
                f"stages: stage {stage.number}: train: centroids: no other loss has a gradient for them; state "
                "feature_loss: centroids in this stage"
            )
        if stage.trains_router and stage.config.augment.mixes:
            faults.append(
                f"stages: stage {stage.number}: train: router: a prediction for a mixed image is neither right nor wrong; "
                "state mixup: 0 and cutmix: 0 in this stage"
            )
    return faults


def _stated(config: Config) -> list[dict]:
    """Return the mappings of the stages after the first, with --stage2-epochs and --stage2-lr applied."""
    stated = [dict(stage) for stage in config.method.stages or ()]
    if stated and config.method.stage2_epochs is not None:
        if "start" in stated[0]:
            stated[0]["start"] = 1 - config.method.stage2_epochs / max(config.optim.epochs, 1)
        else:
            stated[0]["epochs"] = config.method.stage2_epochs
    if stated and config.method.stage2_lr is not None:
        stated[0]["lr"] = config.method.stage2_lr
    return stated


def _names(train: object) -> list[str]:
    return [str(name) for name in train] if isinstance(train, (list, tuple, Mapping)) else [str(train)]


def _factors(train: object) -> dict[str, float]:
    """['classifier'] or {'classifier': 0.2} -> {part: factor of the learning rate}"""
    return {name: float(train[name]) if isinstance(train, Mapping) else 1.0 for name in _names(train)}


def _span_faults(stated: Mapping, before: float, follows_appended: bool) -> list[str]:
    faults = []
    if ("start" in stated) == ("epochs" in stated):
        faults.append("give either start, a share of --epochs, or epochs, which are appended")
    if "start" in stated:
        start = stated["start"]
        is_share = isinstance(start, (int, float)) and not isinstance(start, bool) and 0 < start < 1
        if not is_share:
            faults.append(f"start: {start!r} is not a share of the epochs between 0 and 1")
        elif start <= before or follows_appended:
            faults.append(f"start: {start:g} is not after the start of the stage before it; sort the stages")
    if "epochs" in stated:
        epochs = stated["epochs"]
        if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
            faults.append(f"epochs: {epochs!r} is not a whole number from 1")
    return faults


def _part_faults(stated: Mapping, config: Config) -> list[str]:
    """Return the faults of the parts that a stage trains or initializes again, and of `bn` and `ema`."""
    faults = []
    for key, known in (("train", PARTS_OF_A_MODEL), ("reinit", REINITIALIZED)):
        if key in stated and (wrong := [name for name in _names(stated[key]) if name not in known]):
            faults.append(f"{key}: {wrong[0]!r} is not one of {', '.join(known)}{did_you_mean(wrong[0], list(known))}")
    train = stated.get("train")
    if train is not None and not _names(train):
        faults.append("train: no part is named; leave it out to train all")
    factors = train.values() if isinstance(train, Mapping) else ()
    if not all(isinstance(factor, (int, float)) and 0 < factor < math.inf for factor in factors):
        faults.append("train: each part's factor of the learning rate must be a number above 0")
    for key, known in CHOICES.items():
        if key in stated and stated[key] not in known:
            faults.append(f"{key}: {stated[key]!r} is not one of {', '.join(known)}")
    for part, (kind, names) in OWNERS.items():
        for key, known in (("train", PARTS_OF_A_MODEL), ("reinit", REINITIALIZED)):
            if part in known and part in _names(stated.get(key)) and getattr(config.method, kind) not in names:
                having = f"--{kind} {' or '.join(names)}"
                faults.append(f"{key}: {part}: the model has none without {having}; choose it, or another part")
    return faults


def _setting_faults(stated: Mapping) -> list[str]:
    """Return a fault for each setting of a stage with an invalid value."""
    faults = []
    for name in SETTINGS:
        if name in stated:
            try:
                if coerce(name, stated[name]) is None:
                    raise ValueError("no value given")
            except ValueError as fault:
                faults.append(f"{name}: {fault}")
    return faults


def _schedule_faults(stated: Mapping, is_valid: bool) -> list[str]:
    """Return the faults of a stage's schedule. `is_valid`: whether each value alone is valid."""
    faults = []
    if stated.get("sched") == "multistep" and not stated.get("decay_milestones"):
        faults.append("sched: multistep requires decay_milestones, counted from the stage's first epoch")
    if "decay_milestones" in stated and is_valid:
        milestones = list(coerce("decay_milestones", stated["decay_milestones"]))
        if milestones != sorted(set(milestones)):
            faults.append(f"decay_milestones: {milestones} are not in ascending order; sort them")
    if "decay_milestones" in stated and stated.get("sched") != "multistep":
        faults.append("decay_milestones: they require sched: multistep; state it too")
    return faults
