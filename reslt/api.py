"""Entry points for other programs, with the flat settings of the command line; `import reslt` offers them."""

from __future__ import annotations

from torch import nn

from reslt.config.checks import build, raise_all
from reslt.config.command_line import key_values
from reslt.config.methods import METHODS
from reslt.config.model_arguments import model_source
from reslt.config.resolve import raise_for_unused
from reslt.deploy.trained_model import load_folded, load_run
from reslt.models import create
from reslt.models.freeze import freeze
from reslt.models.model_source import OF_IMAGES, read_source, to_start_from, with_source
from reslt.models.tuning import tune

__all__ = ["create_model", "load_folded", "load_run"]


def create_model(
    model: str, num_classes: int, method: str = "reslt", img_size: int | None = None, **settings
) -> nn.Module:
    """Return the network of a method on a timm model: (N, 3, H, W) normalized images -> (K, N, C) branch logits, or
    (E, K, N, C) with experts. The prediction is their sum over branches, averaged over experts.

    `model`: a timm name, hf-hub:ORG/NAME or local-dir:FOLDER; timm's `resolve_model_data_config(network.backbone)` returns
    how its images are prepared. `img_size`: pixels per side of the input, for models that are built for one size; None:
    their own. `settings`: flags of `train.py` by name, such as branches=3, branch="bn", experts=2, pretrained=True; an unset
    flag has the method's default, or else its own.

    Raises UserError for an unknown model or an invalid value, TypeError for an unknown setting."""
    defaults = METHODS[method].defaults if method in METHODS else {}
    values = dict(defaults) | settings | {"model": model, "method": method, "img_size": img_size}
    try:
        config, faults = build(values, dict.fromkeys(values, "create_model"))
    except KeyError as unknown:
        raise TypeError(f"create_model() got an unexpected setting {unknown}") from None
    if config.model.init_from is not None:
        faults.append("init_from: create_model does not load the weights of a run; load_run does")
    if config.model.teachers is not None:
        faults.append("teachers: only training has teachers; leave it out")
    raise_all(faults + key_values(config.model.model_kwargs)[1])
    raise_for_unused(settings, values)
    start, images = config.model, {}
    if model_source(config.model.model):
        images = read_source(config)
        config = with_source(config, images)
        start = to_start_from(config.model, model)
    network = create.create_model(start, config.method, num_classes, config.augment.img_size)
    size = {"input_size": (3, images["img_size"], images["img_size"])} if "img_size" in images else {}
    network.backbone.pretrained_cfg |= size | {name: images[name] for name in OF_IMAGES[1:] if name in images}
    tune(network, config.model)
    freeze(network, config.model.freeze)
    return network
