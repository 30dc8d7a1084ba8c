"""Entry points for other programs, with the flat settings of the command line; available from `import reslt`."""

from __future__ import annotations

from pathlib import Path

from timm.data import resolve_model_data_config
from torch import nn

from reslt.augment.settings import ImageSettings
from reslt.config.checks import build, raise_all
from reslt.config.command_line import key_values
from reslt.config.methods import METHODS
from reslt.config.resolve import raise_for_unused
from reslt.core.log import logger
from reslt.methods.predictors import fold_predictor, why_not_foldable
from reslt.models import create
from reslt.models.fold import fold
from reslt.models.freeze import freeze
from reslt.runs.calibration import stored_temperature
from reslt.runs.folder import find


def create_model(
    model: str, num_classes: int, method: str = "reslt", img_size: int | None = None, **settings
) -> nn.Module:
    """Return the network of a method on a timm model: (N, 3, H, W) images -> (K, N, C) branch logits, or (E, K, N, C).

    `settings`: flags of `train.py` by name, such as branches=3, branch="bn", experts=2, pretrained=True; unset, they are
    the method's own defaults, else those of the flags. The prediction
    is the sum over branches, averaged over experts. Raises UserError for an unknown model or an invalid value,
    TypeError for an unknown setting."""
    defaults = METHODS[method].defaults if method in METHODS else {}
    values = dict(defaults) | settings | {"model": model, "method": method, "img_size": img_size}
    try:
        config, faults = build(values, dict.fromkeys(values, "create_model"))
    except KeyError as unknown:
        raise TypeError(f"create_model() got an unexpected setting {unknown}") from None
    if config.model.init_from is not None:
        faults.append("init_from starts a training; load_run loads the weights of a run")
    raise_all(faults + key_values(config.model.model_kwargs)[1])
    raise_for_unused(settings, values)
    network = create.create_model(config.model, config.method, num_classes, config.augment.img_size)
    freeze(network, config.model.freeze)
    return network


def load_run(run: str | Path, which: str | None = None, model_kwargs: dict | None = None) -> tuple[nn.Module, dict]:
    """Load a trained run -> its module in evaluation mode, (N, 3, H, W) normalized images -> (N, C) logits, and its
    description: model, method, epoch, img_size, mean, std, interpolation, crop_pct, and of the classes that it was trained
    on num_classes, class_names, images_per_class (None if unknown), shot_splits and the digests of the lists; temperature, of
    softmax(logits / temperature), None: not calibrated.

    `run`: the folder of a run or of one of its checkpoints; `which`: "last" or "best", None: the best if a validation
    list chose one, else the last; `model_kwargs`: arguments that are not accepted from the run's files, as in training.
    Branches are folded as far as folding is exact, and so are `tau`, `prior_tau`, `tde` and the fusion `main`; a warning
    names predictors that the module lacks (`ncm`, `tta`, other fusions). A module that registers the run's model or
    method (`--import`) is imported by the caller before, never by this function. Raises UserError."""
    found = find(Path(run), which)
    config = found.config(model_kwargs=model_kwargs or {})
    model = create.create_model(config.model, config.method, found.classes.number, config.augment.img_size)
    found.load_evaluated(model)
    if reasons := why_not_foldable(config.method, model):
        logger.warning(f"{found.folder}: the module predicts without {', '.join(reasons)}")
    fold_predictor(config.method, model, found.classes.images_per_class)
    images = ImageSettings.of(config.augment, resolve_model_data_config(model.backbone))
    folded, _ = fold(model, images.size)
    described = {"model": config.model.model, "model_kwargs": config.model.model_kwargs, "method": config.method.method}
    described |= found.classes.stored() | {"not_folded": reasons}
    described |= {"epoch": found.epochs_done, "img_size": images.size, "mean": images.mean, "std": images.std}
    described["temperature"] = None if reasons else stored_temperature(found, config.method)
    return folded.eval(), described | {"interpolation": images.interpolation, "crop_pct": images.crop_pct}
