"""Checks of a configuration: of single values, and of values together. Every fault names its remedy."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

from reslt.config.model_arguments import foreign_arguments, model_source
from reslt.config.parts import PARTS, PRIORS
from reslt.config.schema import (
    FIELDS,
    SETTING_OF_FLAG,
    AugmentSettings,
    Config,
    MethodSettings,
    ModelSettings,
    OptimSettings,
    RunSettings,
    flag_of,
)
from reslt.config.stages import Stage, stage_faults, stages_of
from reslt.config.values import coerce
from reslt.core.errors import UserError
from reslt.core.spelling import did_you_mean
from reslt.core.text import listed, shown

MOST_FAULTS, LONGEST_FAULT = 20, 2000
AUTO_AUGMENT = {  # policies of --aa, and the options that may follow, each with a number: rand-m9-mstd0.5
    "cifar10": (),
    "3a": (),
    **dict.fromkeys(("v0", "v0r", "original", "originalr"), ("mstd",)),
    "rand": ("m", "n", "p", "mstd", "mmax", "inc"),
    "augmix": ("m", "w", "d", "a", "b", "mstd"),
}


# A file may come from a stranger. It must not choose what a run replaces, writes, resumes or starts from, where its images
# are, where its logs are sent, or which code is executed. A dataset must not choose a dataset or a file of weights either.
NOT_IN_A_RECIPE = {
    "output",
    "experiment",
    "overwrite",
    "resume",
    "force_resume",
    "init_from",
    "teachers",
    "log_with",
    "profile_trace",
    "data_dir",
    "imports",
}
NOT_IN_A_DATASET = NOT_IN_A_RECIPE | {"data", "pretrained_file"}


def file_faults(settings: dict, path: Path, refused: Iterable[str]) -> list[str]:
    """Return a fault for each key of a file that is not a setting or is `refused` there, and for each argument of a model
    that a file may not state."""
    faults = []
    for key in settings:
        name = SETTING_OF_FLAG.get(f"--{key}", key)  # `import` sets `imports`
        if name in refused:
            faults.append(f"{path}: {key}: a file cannot set it; give it as a flag, {flag_of(name)}")
        elif key not in FIELDS:
            faults.append(f"{path}: unknown key {key!r}{did_you_mean(str(key), list(FIELDS))}")
        elif key == "model" and model_source(str(settings[key])):
            faults.append(
                f"{path}: model: a file can name only timm's models; give the flag --model {shown(str(settings[key]))}"
            )
    return faults + foreign_arguments(settings.get("model_kwargs"), path)


def consistency_faults(config: Config) -> list[str]:
    """Return the faults of values that do not fit together, each with its remedy."""
    faults = []
    for name, f in FIELDS.items():
        lengths, value = f.metadata["length"], config[name]
        if lengths and value is not None and len(value) not in lengths:
            faults.append(f"{name}: {len(value)} values given; it takes {' or '.join(map(str, lengths))}")
    faults += _augment_faults(config.augment) + _optim_faults(config.optim) + _run_faults(config.run)
    faults += stage_faults(config) or _pair_faults(config) + _feature_loss_faults(config) + _prior_faults(config)
    faults += _prediction_faults(config.method) + _argument_faults(config.method) + _exit_faults(config)
    if config.model.experts == 1:
        faults += _expert_faults(config.method)
    elif config.method.router_topk is not None and config.method.network not in ("plain", "reslt"):
        faults.append(f"router_topk: network {config.method.network} has no router; use network plain or reslt")
    if config.model.experts > 1 and config.model.expert_gates and config.method.network == "bbn":
        faults.append(
            "expert_gates: network bbn has two last maps; drop it (--no-expert-gates), or use another network"
        )
    if config.method.has_branches and config.method.branch_sizes is not None:
        faults += _branch_size_faults(list(config.method.branch_sizes), config.method.branches)
    if config.model.pretrained_file and not Path(config.model.pretrained_file).is_file():
        faults.append(
            f"pretrained_file: there is no file {config.model.pretrained_file}; give its path with --pretrained-file FILE "
            "(the first lines of a recipe name its source)"
        )
    if config.model.tune == "lora" and importlib.util.find_spec("peft") is None:
        faults.append("tune: lora requires peft, which is not installed; pip install peft")
    return faults + _init_faults(config) + _group_faults(config) + _teacher_faults(config)


def _expert_faults(method: MethodSettings) -> list[str]:
    """Return the faults of a method for several experts if there is only one network."""
    faults, remedy = [], "give --experts 2 or more"
    terms = [method.mutual, *(stage.get("mutual", "off") for stage in method.stages or ())]
    if named := [term for term in terms if term not in ("off", False)]:
        faults.append(f"mutual: {named[0]} is a term between experts; {remedy}")
    if method.router_topk is not None:
        faults.append(f"router_topk: a router chooses among experts; {remedy}, or --router-topk none")
    return faults


def _init_faults(config: Config) -> list[str]:
    model, faults = config.model, []
    if model.init_from and (model.pretrained or model.pretrained_file):
        other = "--pretrained-file" if model.pretrained_file else "--pretrained"
        faults.append(f"init_from: contradicts {other}, which names other weights to start from; drop one of the two")
    if not config.run.resume:  # a resumed run reads nothing from there
        faults += missing_init_faults(model)
    return faults


def _group_faults(config: Config) -> list[str]:
    """Return a fault for each use of class means if only one shot group has images."""
    if config.data.only_shots is None:
        return []
    remedy = f"only the {config.data.only_shots} classes have images to average; drop it"
    faults = [f"ncm: {remedy} (--ncm none)"] * (config.method.ncm is not None)
    return faults + [f"head_init: {remedy} (--head-init random)"] * (config.method.head_init == "class_means")


def _teacher_faults(config: Config) -> list[str]:
    """Return a fault for each teacher that does not exist, and for settings that teachers cannot be combined with. (A
    resumed run reads its teachers again.)"""
    teachers, method = config.model.teachers, config.method
    if teachers is None:
        return []
    faults = [
        f"teachers: there is no file or folder {place}; give the folder of a run, or a folded file"
        for place in teachers
        if not Path(place).exists()
    ]
    if config.data.eval_split == "test":
        faults.append(
            "teachers: their weights follow the accuracy on the validation list; give --eval-split val, or both"
        )
    if config.data.only_shots is not None:
        faults.append("teachers: they teach all classes; drop --only-shots, or give --teachers none")
    if method.network == "exits":
        faults.append("teachers: their weights of images are not defined at early exits; drop --network exits")
    if method.trains_on_pairs:
        faults.append("teachers: they see single images, not pairs; drop them, or give --second-sampler none")
    if method.router_topk is not None:
        faults.append("teachers: a router has a loss of its own; drop it (--router-topk none)")
    if method.feature_loss not in (None, "off"):
        faults.append(
            f"teachers: feature_loss {method.feature_loss} compares images by their labels, which teachers weight; drop "
            "one of the two"
        )
    if config.model.tune == "head":
        faults.append("teachers: they see images, and --tune head trains on features; drop one of the two")
    return faults


def _argument_faults(method: MethodSettings) -> list[str]:
    """Return a fault for each of `part_kwargs` that none of the chosen parts, including those of the stages, takes. (If no
    part takes any, the setting itself is reported as unused.)"""
    takes = set()
    for kind, known in PARTS.items():
        names = [getattr(method, kind), *(stage.get(kind) for stage in method.stages or ())]
        names += [method.second_sampler] if kind == "sampler" else []
        takes |= {
            argument for name in names if isinstance(name, str) and name in known for argument in known[name].arguments
        }
    return [
        f"part_kwargs: no chosen part takes {name!r}{did_you_mean(str(name), sorted(takes))}; they take "
        f"{listed(sorted(takes))}"
        for name in method.part_kwargs
        if takes and name not in takes
    ]


def missing_init_faults(model: ModelSettings) -> list[str]:
    """Return a fault if the place of the weights to start from does not exist."""
    if model.init_from is None or Path(model.init_from).exists():
        return []
    return [f"init_from: there is no file or folder {model.init_from}; give the folder of a run, or a file of weights"]


def _augment_faults(augment: AugmentSettings) -> list[str]:
    faults = []
    for name in ("scale", "ratio"):
        low_high = getattr(augment, name)
        if len(low_high) == 2 and low_high[0] > low_high[1]:
            faults.append(f"{name}: {low_high[0]} > {low_high[1]}; give the smaller one first")
    if len(augment.color_jitter) == 4 and augment.color_jitter[3] > 0.5:
        faults.append(f"color_jitter: hue {augment.color_jitter[3]} is above 0.5, half of the color circle; lower it")
    if augment.rotate and (augment.aa is not None or any(augment.color_jitter)):
        other = "color_jitter" if augment.aa is None else "aa"
        faults.append(f"rotate: it replaces {other}; drop one of the two")
    return faults + (_auto_augment_faults(augment.aa) if augment.aa is not None else [])


def _auto_augment_faults(spec: str) -> list[str]:
    """Return the faults of an --aa policy. (timm itself ignores unknown sections.)"""
    policy, *sections = spec.split("-")
    if policy not in AUTO_AUGMENT:
        hint = did_you_mean(policy, list(AUTO_AUGMENT))
        return [f"aa: {spec!r} is not a policy{hint}; it is one of {', '.join(AUTO_AUGMENT)}"]
    options = AUTO_AUGMENT[policy]
    known = "|".join(rf"{name}\d+(\.\d+)?" for name in options)
    known += r"|t\w+" * (policy == "rand")  # `t` before the name of a set of operations
    takes = f"it takes {', '.join(options)}, each with a number" if options else "it takes none"
    wrong = [section for section in sections if not known or not re.fullmatch(known, section)]
    return [f"aa: {spec!r}: {section!r} is not an option of {policy}; {takes}" for section in wrong]


def _optim_faults(optim: OptimSettings) -> list[str]:
    faults = []
    if optim.nesterov and optim.sgd_variant is None:
        faults.append(f"nesterov: --opt {optim.opt} has no Nesterov switch; drop it, or use sgd")
    if optim.sched == "multistep" and not optim.decay_milestones:
        faults.append("decay_milestones: multistep requires at least one, as in --decay-milestones 160 180")
    if list(optim.decay_milestones) != sorted(set(optim.decay_milestones)):
        faults.append(f"decay_milestones: {list(optim.decay_milestones)} are not in ascending order; sort them")
    return faults


def _run_faults(run: RunSettings) -> list[str]:
    faults, name = [], run.experiment
    is_plain = name is None or (name.isprintable() and not set(name) & set("/\\") and name not in ("", ".", ".."))
    if not is_plain:
        faults.append(f"experiment: {name!r} is not a plain folder name; choose its parent folder with --output")
    if Path(run.output).exists() and not Path(run.output).is_dir():
        faults.append(f"output: {run.output} is not a folder; give another --output")
    if run.resume not in (None, "auto") and not (Path(run.resume) / "config.yaml").is_file():
        faults.append(f"resume: {run.resume} is not the folder of a run (no config.yaml in it); give one, or auto")
    if run.log_with and importlib.util.find_spec(run.log_with) is None:
        faults.append(f"log_with: {run.log_with} is not installed; pip install {run.log_with}")
    if run.force_resume and not run.resume:
        faults.append("force_resume: it requires --resume; add --resume auto")
    if run.resume and run.overwrite:
        faults.append("resume: contradicts overwrite; drop one of the two")
    return faults


def _prediction_faults(method: MethodSettings) -> list[str]:
    """Return the contradictions between predictors. (`tde` without a deconfounded head is reported as unused.)"""
    faults = []
    if method.tau is not None and method.head in ("cosine", "deconfounded"):
        faults.append(f"tau: the rows of a {method.head} head are normalized already; drop it (--tau none)")
    if method.ncm is not None:
        for name in ("tau", "tde"):
            if getattr(method, name) is not None and (name == "tau" or method.head == "deconfounded"):
                faults.append(
                    f"{name}: it scales the classifier, which ncm replaces by class means; drop one (--{name} none, or "
                    "--ncm none)"
                )
    return faults


def _pair_faults(config: Config) -> list[str]:
    """Return a fault if a stage would mix the images of pairs. Requires that `stage_faults` finds none."""
    if not (config.method.trains_on_pairs and any(stage.config.augment.mixes for stage in stages_of(config))):
        return []
    return [
        "second_sampler: the images of pairs are not mixed; drop mixup and cutmix (--mixup 0 --cutmix 0), or train on "
        "single images (--second-sampler none)"
    ]


def _feature_loss_faults(config: Config) -> list[str]:
    """Return a fault for each setting that a feature loss cannot be combined with. Requires that `stage_faults` finds
    none."""
    stages, faults = stages_of(config), []
    users = [stage for stage in stages if stage.config.method.feature_loss not in (None, "off")]
    for name in dict.fromkeys(stage.config.method.feature_loss for stage in users):
        of_loss = [stage for stage in users if stage.config.method.feature_loss == name]
        faults += _one_feature_loss_faults(name, of_loss, config)
    first = next((stage for stage in users if stage.config.method.feature_loss == "centroids"), None)
    if first is not None and not any("centroids" in stage.reinit for stage in stages[: first.number]):
        faults.append(
            f"feature_loss: centroids: no stage up to stage {first.number} sets them; state reinit: [centroids] there, as "
            "--method oltr does"
        )
    return faults


def _one_feature_loss_faults(loss: str, users: list[Stage], config: Config) -> list[str]:
    """Return the faults of one feature loss; `users`: the stages that use it."""
    faults, name = [], f"feature_loss: {loss}"
    if any(stage.config.augment.mixes for stage in users):
        faults.append(f"{name} compares images by their labels; drop mixup and cutmix (--mixup 0 --cutmix 0)")
    if config.optim.grad_accum_steps > 1:
        faults.append(f"{name} sees the whole batch at once; drop grad_accum_steps (--grad-accum-steps 1)")
    if config.method.network == "bbn":
        faults.append(f"{name} needs features of single images, and --network bbn has those of two blocks; drop one")
    if config.method.network == "exits":
        faults.append(f"{name} needs features of one layer, and --network exits has those of every stage; drop one")
    if config.method.router_topk is not None:
        faults.append(f"{name}: a router has a loss of its own; drop it (--router-topk none)")
    if loss == "centroids" and config.method.head != "meta_embedding":
        faults.append(f"{name}: head {config.method.head} has none; use --head meta_embedding")
    if loss == "centroids" and (config.model.experts > 1 or config.method.has_branches):
        faults.append(f"{name}: they require one network without branches; drop --experts and --network reslt")
    return faults + (_view_faults(config, name) if loss == "proco" else [])


def _view_faults(config: Config, name: str) -> list[str]:
    """Return a fault for each setting that several views of an image cannot be combined with."""
    faults = []
    if any(stage.config.method.feature_loss != "proco" for stage in stages_of(config)):
        faults.append(f"{name} applies to all stages, since all batches contain several views; drop feature_loss there")
    if config.model.experts > 1:
        faults.append(f"{name} uses the embeddings of one network; drop the experts (--experts 1)")
    if config.model.tune == "head":
        faults.append(f"{name} trains the features, which --tune head does not change; use another --tune")
    if config.data.decode == "device":
        faults.append(f"{name} sees several views of an image, which --decode device does not make; use --decode host")
    return faults


def _exit_faults(config: Config) -> list[str]:
    """Return a fault for each setting that early exits cannot be combined with."""
    if config.method.network != "exits":
        return []
    faults, name = [], "network: exits"
    if config.model.experts > 1:
        faults.append(f"{name} are outputs of one network; drop experts (--experts 1)")
    if not stage_faults(config) and any(stage.config.augment.mixes for stage in stages_of(config)):
        faults.append(
            f"{name}: a prediction for a mixed image is neither right nor wrong; drop mixup and cutmix (--mixup 0 --cutmix 0)"
        )
    if config.method.ncm is not None or config.method.head_init == "class_means":
        setting = "ncm" if config.method.ncm is not None else "head_init"
        faults.append(f"{name} have features of different widths, whose class means are not supported; drop {setting}")
    return faults


def _prior_faults(config: Config) -> list[str]:
    """Return a fault for each prior whose number of values is not that of the experts, and for a prior that no loss would
    see. Requires that `stage_faults` finds none."""
    experts, faults = config.model.experts, []
    for stage in stages_of(config):
        for name in PRIORS:
            taus = stage.config[name]
            if isinstance(taus, tuple) and len(taus) != experts:
                each = f", or one for each of {experts} experts" * (experts > 1)
                faults.append(f"{name}: {len(taus)} numbers given; give one{each}, or --experts {len(taus)}")
        method = stage.config.method
        if method.has_branches and method.alpha == 1 and method.has_prior and method.logit_adjust_on == "fusion":
            faults.append(
                "logit_adjust_on: fusion leaves the prior to the fusion loss, which --alpha 1 leaves out; give "
                "--logit-adjust-on all, or another --alpha"
            )
    return list(dict.fromkeys(faults))


def _branch_size_faults(sizes: list[int], branches: int) -> list[str]:
    faults = []
    if len(sizes) != branches - 1:
        faults.append(
            f"branch_sizes: {sizes} states {len(sizes)} nested sets in addition to that of all classes, but branches "
            f"is {branches}; give {branches - 1}, or --branch-sizes equal to derive them"
        )
    if sizes != sorted(sizes, reverse=True):
        faults.append(f"branch_sizes: {sizes} are not in descending order; each set contains the next one")
    return faults


def batch_faults(config: Config, processes: int) -> list[str]:
    """Return the faults of a global batch that `processes` processes divide into `grad_accum_steps` micro-batches each.
    Requires a configuration without other faults."""
    batch_size, steps = config.optim.batch_size, config.optim.grad_accum_steps
    parts = processes * steps
    mixes = any(stage.config.augment.mixes for stage in stages_of(config))
    unit = parts * 2 if mixes else parts
    if parts == 1 or (batch_size % unit == 0 and batch_size >= 2 * parts):
        return []
    below = batch_size // unit * unit
    nearest = sorted({str(max(size, 2 * parts)) for size in (below, below + unit)}, key=int)
    why = " (mixing pairs images, so each part needs whole pairs)" if mixes else ""
    return [
        f"batch_size: {batch_size} images cannot be divided evenly among {processes} process{'es' * (processes > 1)} x "
        f"{steps} --grad-accum-steps, with at least 2 images each{why}; give {' or '.join(nearest)}"
    ]


def build(values: dict[str, object], where: dict[str, str]) -> tuple[Config, list[str]]:
    """Return the configuration of these values of known fields, with defaults in place of invalid ones, and all its faults.

    `where` names the source of each value, for messages."""
    faults, good = [], {}
    for name, value in values.items():
        try:
            good[name] = coerce(name, value)
        except ValueError as reason:
            faults.append(f"{name} ({where[name]}): {reason}")
    config = Config.of(**good)
    return config, faults + consistency_faults(config)


def raise_all(faults: list[str]) -> None:
    """Raise one UserError that lists the faults, if there are any: up to MOST_FAULTS, each cut to LONGEST_FAULT characters,
    since a file may contain any amount of text."""
    texts = [
        fault if len(fault) <= LONGEST_FAULT else fault[: LONGEST_FAULT - 3] + "..." for fault in faults[:MOST_FAULTS]
    ]
    if len(texts) == 1:
        raise UserError(texts[0])
    if texts:
        lines = [f"  {i}. {text}" for i, text in enumerate(texts, 1)]
        lines += [f"  and {len(faults) - MOST_FAULTS:,} more"] * (len(faults) > MOST_FAULTS)
        raise UserError("\n".join([f"{len(faults):,} errors in the configuration:", *lines]))
