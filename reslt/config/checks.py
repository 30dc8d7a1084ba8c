"""What a configuration's values must be: alone, and beside each other. Every fault with its remedy, before torch is loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import types
import typing
from pathlib import Path

from reslt.config.schema import FIELDS, HINTS, Config
from reslt.core.errors import UserError
from reslt.core.spelling import did_you_mean

AUTO_AUGMENT = {  # policies of --aa, and the options that may follow, each with a number: rand-m9-mstd0.5
    "cifar10": (),
    "3a": (),
    **dict.fromkeys(("v0", "v0r", "original", "originalr"), ("mstd",)),
    "rand": ("m", "n", "p", "mstd", "mmax", "inc"),
    "augmix": ("m", "w", "d", "a", "b", "mstd"),
}


def coerce(name: str, value: object) -> object:
    """A value from YAML or from the command line (strings) as field `name` wants it. Raises ValueError with the reason."""
    hint = HINTS[name]
    if value is None and not isinstance(hint, types.UnionType):
        raise ValueError("no value is given")
    if isinstance(hint, types.UnionType):
        unset = (None, "none", ["none"]) + ("equal", ["equal"]) * (name == "branch_sizes")
        if value in unset:
            return None
        hint = next(arm for arm in typing.get_args(hint) if arm is not types.NoneType)
    origin = typing.get_origin(hint)
    if origin is tuple:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_bounded(name, _scalar(typing.get_args(hint)[0], item)) for item in values)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{value!r} is not a mapping of names to values")
        return dict(value)
    return _bounded(name, _scalar(hint, value))


def _scalar(kind: type, value: object) -> object:
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise ValueError(f"{value!r} is not true or false")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{value!r} is not {'a text' if kind is str else 'a number'}")
    if kind is str:
        return str(value)
    try:
        number = kind(value)  # YAML reads 1e-4 as text; a flag's value is always text
        is_number = number == float(value) and math.isfinite(number)
    except (ValueError, OverflowError):
        is_number = False
    if not is_number:
        raise ValueError(f"{value!r} is not {'a whole number' if kind is int else 'a number'}")
    return number


def _bounded(name: str, value: object) -> object:
    m = FIELDS[name].metadata
    if m["choices"] and value not in m["choices"]:
        raise ValueError(f"{value!r} is not one of {', '.join(m['choices'])}")
    if m["low"] is not None and value < m["low"]:
        raise ValueError(f"{value} is below {m['low']}")
    if m["high"] is not None and value > m["high"]:
        raise ValueError(f"{value} is above {m['high']}")
    if m["above"] is not None and not value > m["above"]:
        raise ValueError(f"{value} is not above {m['above']}")
    return value


def consistency_faults(c: Config) -> list[str]:
    """What is wrong between the fields of a configuration, each with its remedy."""
    faults = []
    for name, f in FIELDS.items():
        lengths, value = f.metadata["length"], getattr(c, name)
        if lengths and value is not None and len(value) not in lengths:
            faults.append(f"{name}: {len(value)} values given; it takes {' or '.join(map(str, lengths))}")
    for name in ("scale", "ratio"):
        low_high = getattr(c, name)
        if len(low_high) == 2 and low_high[0] > low_high[1]:
            faults.append(f"{name}: {low_high[0]} > {low_high[1]}; give the smaller one first")
    if len(c.color_jitter) == 4 and c.color_jitter[3] > 0.5:
        faults.append(f"color_jitter: hue {c.color_jitter[3]} is above 0.5, half a turn of the colour circle")
    if c.aa is not None:
        faults += _auto_augment_faults(c.aa)
    if c.nesterov and c.sgd_variant is None:
        faults.append(f"nesterov: --opt {c.opt} has no such switch; drop it, or use sgd")
    plain = c.experiment is None or (c.experiment.isprintable() and not set(c.experiment) & set("/\\"))
    if not plain or c.experiment in ("", ".", ".."):
        faults.append(f"experiment: {c.experiment!r} is no plain name of a folder; choose its parent with --output")
    if Path(c.output).exists() and not Path(c.output).is_dir():
        faults.append(f"output: {c.output} is not a folder")
    if c.sched == "multistep" and not c.decay_milestones:
        faults.append("decay_milestones: multistep needs at least one, as in --decay-milestones 160 180")
    if list(c.decay_milestones) != sorted(set(c.decay_milestones)):
        faults.append(f"decay_milestones: {list(c.decay_milestones)} do not ascend; sort them")
    if c.branch_sizes is not None and c.has_branches:
        sizes = list(c.branch_sizes)
        if len(sizes) != c.branches - 1:
            faults.append(
                f"branch_sizes: {sizes} states {len(sizes)} nested sets beside the set of all classes, but branches is "
                f"{c.branches}; give {c.branches - 1}, or --branch-sizes equal to derive them"
            )
        if sizes != sorted(sizes, reverse=True):
            faults.append(
                f"branch_sizes: {sizes} do not descend; each set holds the next one, so give the larger first"
            )
    if c.pretrained_file and not Path(c.pretrained_file).is_file():
        faults.append(
            f"pretrained_file: there is no file {c.pretrained_file}; --pretrained-file FILE says where it is (a recipe's "
            "first lines, where it is from)"
        )
    if c.resume not in (None, "auto") and not (Path(c.resume) / "config.yaml").is_file():
        faults.append(f"resume: {c.resume} is not the folder of a run (it holds no config.yaml); give one, or auto")
    if c.log_with and importlib.util.find_spec(c.log_with) is None:
        faults.append(f"log_with: {c.log_with} is not installed; pip install {c.log_with}")
    if c.force_resume and not c.resume:
        faults.append("force_resume: it says how to resume; add --resume auto")
    if c.resume and c.overwrite:
        faults.append("resume: contradicts overwrite; drop one of the two")
    return faults


def _auto_augment_faults(spec: str) -> list[str]:
    """timm itself would pass over a section that it does not understand."""
    policy, *sections = spec.split("-")
    if policy not in AUTO_AUGMENT:
        hint = did_you_mean(policy, list(AUTO_AUGMENT))
        return [f"aa: {spec!r} is not a policy{hint}; it is one of {', '.join(AUTO_AUGMENT)}"]
    options = AUTO_AUGMENT[policy]
    known = "|".join(rf"{name}\d+(\.\d+)?" for name in options)
    known += r"|t\w+" * (policy == "rand")  # t and the name of a set of operations
    takes = f"it takes {', '.join(options)}, each with a number" if options else "it takes none"
    wrong = [section for section in sections if not known or not re.fullmatch(known, section)]
    return [f"aa: {spec!r}: {section!r} is not an option of {policy}; {takes}" for section in wrong]


def batch_faults(c: Config, processes: int) -> list[str]:
    """What is wrong with a global batch that `processes` processes share, each in `grad_accum_steps` passes."""
    parts, is_mixed = processes * c.grad_accum_steps, (c.mixup or c.cutmix) and c.mixup_prob
    unit = parts * 2 if is_mixed else parts
    if parts == 1 or (c.batch_size % unit == 0 and c.batch_size >= 2 * parts):
        return []
    below = c.batch_size // unit * unit
    nearest = sorted({str(max(size, 2 * parts)) for size in (below, below + unit)}, key=int)
    why = " (mixing pairs images, so each part holds whole pairs)" if is_mixed else ""
    return [
        f"batch_size: {c.batch_size} images are not dealt out evenly to {processes} process{'es' * (processes > 1)} x "
        f"{c.grad_accum_steps} --grad-accum-steps, with 2 images a part at least{why}; give {' or '.join(nearest)}"
    ]


def build(values: dict[str, object], where: dict[str, str]) -> tuple[Config, list[str]]:
    """Values of known fields -> a configuration and all its faults (a faulty field keeps its default).

    `where` names the source of each value, for messages."""
    faults, good = [], {}
    for name, value in values.items():
        try:
            good[name] = coerce(name, value)
        except ValueError as reason:
            faults.append(f"{name} ({where[name]}): {reason}")
    config = Config(**good)
    return config, faults + consistency_faults(config)


def as_plain(config: Config) -> dict:
    """A configuration as JSON and YAML hold it."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def raise_all(faults: list[str]) -> None:
    """Raise one UserError that tells every fault; return where there is none."""
    if len(faults) == 1:
        raise UserError(faults[0])
    if faults:
        lines = [f"  {i}. {fault}" for i, fault in enumerate(faults, 1)]
        raise UserError("\n".join([f"{len(faults)} faults in the configuration:", *lines]))
