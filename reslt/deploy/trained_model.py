"""A trained model: its module, its description, and its predictions for photos."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import nn

from reslt.augment.decode import UnsupportedImage, decode_or_reason, upright_rgb
from reslt.augment.host_transforms import eval_transform
from reslt.augment.settings import ImageSettings
from reslt.config.checks import build, raise_all
from reslt.config.schema import AugmentSettings, RunSettings
from reslt.core.errors import UserError
from reslt.core.log import logger
from reslt.core.text import shown
from reslt.loading.batches import Normalize
from reslt.loading.loaders import images_per_batch
from reslt.methods.predictors import (
    Predictions,
    Predictor,
    create_predictor,
    fold_predictor,
    why_not_foldable,
)
from reslt.models import fold, folding
from reslt.models.create import create_model
from reslt.models.experts import Network
from reslt.models.fusion import fused_logits
from reslt.runs.calibration import stored_temperature
from reslt.runs.folder import find
from reslt.training.compiled import compile_model
from reslt.training.execution import Execution

SAME = 1e-2  # of the largest logit: more than half precision rounds
PREPROCESSING = ("img_size", "mean", "std", "interpolation", "crop_pct")
Photo = str | Path | Image.Image | np.ndarray


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one photo, in descending order."""

    names: list[str]  # the numbers of the classes if the model has no names
    classes: list[int]  # positions among the model's outputs
    probabilities: list[float]  # those of all classes add up to 1

    def __str__(self) -> str:
        pairs = zip(self.names, self.probabilities, strict=True)
        return ", ".join(f"{shown(name)} {100 * probability:.1f} %" for name, probability in pairs)

    def __repr__(self) -> str:
        return f"Prediction({self})"


@dataclass(eq=False, repr=False)
class TrainedModel:
    """A module in evaluation mode, (N, 3, H, W) normalized images -> (N, C) logits, and its description: unpack it as
    `module, description`. It predicts photos with `predict`, on the device that `to` chooses."""

    module: nn.Module
    description: dict
    network: AsEvaluated | None = None  # predicts instead of the module, if folding is not exact
    lacking: Sequence[str] = ()  # parts of the run's predictor that the module lacks
    lacks_ncm: bool = False  # whether `predict` lacks the run's `ncm`
    trained_with: RunSettings | None = None  # None: not stated

    def __iter__(self) -> Iterator[nn.Module | dict]:
        return iter((self.module, self.description))

    def __getitem__(self, index: int) -> nn.Module | dict:
        return (self.module, self.description)[index]

    def __len__(self) -> int:
        return 2

    def predict(self, photos: Photo | Iterable[Photo], topk: int = 5) -> Prediction | list[Prediction]:
        """Predict one photo, and return a `Prediction`, or several in batches, and return a list of these.

        `photos`: a path, a PIL image or an (H, W, 3) uint8 RGB array; an iterable of these; or an (N, H, W, 3) array. They
        are decoded, turned upright, resized and cropped as in evaluation. Probabilities are the softmax of the fused logits,
        divided by the temperature if the description states one. `topk`: classes per photo, at most all of them.

        Raises UserError for a photo that cannot be read, and if logits are not finite."""
        if topk < 1:
            raise UserError(f"topk {topk}: give a number from 1")
        is_one = isinstance(photos, (str, os.PathLike, Image.Image)) or (
            isinstance(photos, np.ndarray) and photos.ndim != 4
        )
        if not is_one and (not isinstance(photos, Iterable) or isinstance(photos, (bytes, bytearray))):
            raise _no_photo(photos)
        settings = self.image_settings
        transform = eval_transform(settings)
        inputs = (transform(_rgb(photo)) for photo in ([photos] if is_one else photos))
        normalize = Normalize(settings.mean, settings.std).to(self.device)
        size = images_per_batch(32, settings.size, on_cpu=self.device.type == "cpu")
        predicted: list[Prediction] = []
        while batch := list(itertools.islice(inputs, size)):
            logits = self.logits(normalize(torch.stack(batch).to(self.device)))
            if bad := (~logits.isfinite().all(1)).nonzero().flatten().tolist():
                raise UserError(f"photo {len(predicted) + bad[0] + 1}: the model's logits are not finite")
            predicted += self.ranked(logits, topk)
        return predicted[0] if is_one else predicted

    def to(self, device: str | torch.device) -> TrainedModel:
        """Move the model to a device, and return it."""
        self.module.to(device)
        if self.network is not None:
            self.network.to(device)
        return self

    def execute(self, execution: Execution) -> TrainedModel:
        """Apply the memory layout and, if requested, the compilation that `execution` states, and return the model. A compiled
        model expects batches of one size."""
        if execution.channels_last:
            (self.network or self.module).to(memory_format=torch.channels_last)
        if execution.torchcompile:
            compile_model(self.module if self.network is None else self.network.network)
        return self

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return next((self.network or self.module).parameters()).device

    @property
    def image_settings(self) -> ImageSettings:
        """The preprocessing that the description states. Raises UserError if it is incomplete or invalid, for example in a
        file from a stranger."""
        values = {name: self.description.get(name) for name in PREPROCESSING}
        if missing := [name for name, value in values.items() if value is None]:
            raise UserError(f"the model's description lacks {missing[0]}; write it again with evaluate.py --fold")
        values |= {name: list(values[name]) for name in ("mean", "std") if isinstance(values[name], tuple)}
        config, faults = build(values, dict.fromkeys(values, "the model's description"))
        raise_all(faults)
        stated: AugmentSettings = config.augment
        return ImageSettings(
            stated.img_size, stated.mean, stated.std, stated.interpolation, stated.crop_pct, augment=stated
        )

    def require_preprocessing(self) -> None:
        """Raise UserError if the description does not state valid preprocessing."""
        _ = self.image_settings

    @property
    def class_names(self) -> list[str]:
        """The names of the classes; their numbers if the model has none."""
        return self.description["class_names"] or [str(i) for i in range(self.description["num_classes"])]

    @property
    def temperature(self) -> float | None:
        """The temperature that calibrates probabilities; None: they are not calibrated."""
        return self.description.get("temperature")

    @torch.inference_mode()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) normalized images -> (N, C) float32 logits, fused as the predictor of the run ranks classes."""
        return (self.network or self.module).eval()(images).float()

    @torch.inference_mode()
    def logits_and_features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 3, H, W) normalized images -> (N, C) float32 logits, and the (N, E D) float32 inputs of the classifiers, summed
        over branches and concatenated over experts. Raises UserError if the logits of the model are not those of its
        classifiers."""
        if self.network is not None:
            logits, features = self.network.with_features(images)
            return logits.float(), features
        return _recorded(self.module, images)

    def ranked(self, logits: torch.Tensor, topk: int) -> list[Prediction]:
        """(N, C) logits -> N predictions of `topk` classes."""
        probable = (logits.float() / (self.temperature or 1.0)).softmax(1).topk(min(topk, logits.shape[1]))
        names = self.class_names
        return [
            Prediction([names[k] for k in classes], classes, probabilities)
            for classes, probabilities in zip(probable.indices.tolist(), probable.values.tolist(), strict=True)
        ]

    def __repr__(self) -> str:
        described = self.description
        state = "not calibrated" if self.temperature is None else f"temperature {self.temperature:.3g}"
        return (
            f"TrainedModel({described.get('model')}, {described.get('method')}, {described['num_classes']:,} classes, "
            f"{described['img_size']} px, {state}, on {self.device})"
        )


class AsEvaluated(nn.Module):
    """A network with the predictor of its run, applied as in `evaluate.py`: (N, 3, H, W) -> (N, C) fused logits."""

    def __init__(self, network: Network, predictor: Predictor):
        super().__init__()
        self.network, self.flips, self.fusion = network, predictor.flips, predictor.fusion
        self.heads = nn.ModuleList(predictor.heads or ())  # so that `to` moves them
        self.register_buffer("prior", predictor.prior, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._predicted(images, keep_features=False)[0]

    @torch.inference_mode()
    def with_features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits, and the (N, E D) float32 features of the images, not flipped."""
        logits, features = self._predicted(images, keep_features=True)
        return logits, _added_over_branches(features, len(images))

    def _predicted(self, images: torch.Tensor, keep_features: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        predictor = Predictor(tuple(self.heads) or None, self.prior, self.flips, self.fusion)
        with Predictions(self.network, [predictor], keep_features) as predictions:
            (branch_logits,) = predictions(images)
        logits = fused_logits(branch_logits, self.fusion)
        return logits if self.prior is None else logits - self.prior, predictions.features


def load_run(run: str | Path, which: str | None = None, model_kwargs: dict | None = None) -> TrainedModel:
    """Load a trained run: its module in evaluation mode, (N, 3, H, W) normalized images -> (N, C) logits, and its description.
    `predict` of the result predicts photos.

    The description contains model, model_kwargs, method, epoch, img_size, mean, std, interpolation and crop_pct; of the
    classes of training num_classes, class_names, images_per_class (None: unknown), shot_splits and the digests of the lists;
    and temperature, for softmax(logits / temperature) (None: not calibrated).

    `run`: the folder of a run or of one of its checkpoints; `which`: "last", "best", or None for the best if a validation
    list chose one, else the last; `model_kwargs`: arguments of the model that are not accepted from a file, as in training.

    Branches are folded if folding is exact, as are `tau`, `prior_tau`, `tde` and the fusion `main`. A warning names the
    predictors that the module lacks (`ncm`, `tta`, other fusions, a router); `predict` lacks only `ncm`. If a module
    registers the run's model or method (`--import`), import it before: this function never does. Raises UserError."""
    loaded = read_run(Path(run), which, model_kwargs)
    if loaded.lacking:
        only_the_module = "" if loaded.lacks_ncm else " (`predict` has it)"
        logger.warning(f"{run}: the module predicts without {', '.join(loaded.lacking)}{only_the_module}")
    return loaded


def read_run(run: Path, which: str | None, model_kwargs: dict | None, folds: bool = True) -> TrainedModel:
    """Load a trained run as `load_run` does, without warnings. `folds` False: `predict` uses the network as trained, even if
    folding is exact."""
    if not run.exists():
        raise UserError(f"{run}: there is no such file or folder; give a run folder (output/NAME) or a folded file")
    found = find(run, which)
    config = found.config(model_kwargs=model_kwargs or {})
    model = create_model(config.model, config.method, found.classes.number, config.augment.img_size)
    found.load_evaluated(model)
    network, method = None, config.method
    # Checkpoints contain no class means, so the classifier predicts instead of `ncm`, without settings that belong to `ncm`.
    own = method if method.ncm is None else replace(method, ncm=None, tau=None, tde=None, prior_tau=None)
    lacking = why_not_foldable(method, model)
    if not folds or why_not_foldable(own, model):
        network = AsEvaluated(model, create_predictor(own, model, found.classes.images_per_class)).eval()
        model = copy.deepcopy(model)  # the next line changes it
    fold_predictor(method, model, found.classes.images_per_class)
    images = ImageSettings.of(config.augment, resolve_model_data_config(model.backbone))
    folded, _ = folding.fold(model, images.size)
    described = {"model": config.model.model, "model_kwargs": config.model.model_kwargs, "method": method.method}
    described |= found.classes.stored()
    described |= {"epoch": found.epochs_done, "img_size": images.size, "mean": images.mean, "std": images.std}
    described |= {"interpolation": images.interpolation, "crop_pct": images.crop_pct}
    described["temperature"] = None if method.ncm is not None else stored_temperature(found, method)
    return TrainedModel(folded.eval(), described, network, lacking, method.ncm is not None, config.run)


def load_folded(file: str | Path, model_kwargs: dict | None = None) -> TrainedModel:
    """Load a file of `evaluate.py --fold` as a model with `predict`; see `reslt.models.fold.load_folded`. Raises UserError."""
    return TrainedModel(*fold.load_folded(Path(file), model_kwargs))


def _rgb(photo: object) -> Image.Image:
    """Return a photo, of any kind that `predict` accepts, as an upright RGB image. Raises UserError."""
    if isinstance(photo, (str, os.PathLike)):
        image, reason = decode_or_reason(Path(photo))
        if reason:
            raise UserError(f"{photo}: {reason}")
        return image
    if isinstance(photo, Image.Image):
        try:
            return upright_rgb(photo)
        except (UnsupportedImage, OSError) as reason:
            raise UserError(f"a PIL image: {reason}") from None
    if isinstance(photo, np.ndarray):
        if photo.ndim != 3 or photo.shape[-1] != 3 or photo.dtype != np.uint8 or 0 in photo.shape:
            raise UserError(
                f"an array of shape {photo.shape} and type {photo.dtype}: give (H, W, 3) or (N, H, W, 3) of uint8, in RGB"
            )
        return Image.fromarray(np.ascontiguousarray(photo))
    raise _no_photo(photo)


def _no_photo(given: object) -> UserError:
    kind = type(given).__name__
    return UserError(
        f"a photo cannot be of type {kind}; give a path (str or Path), a PIL image, an array of uint8, or several"
    )


def _recorded(module: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the float32 logits of a folded module, and the (N, E D) float32 features that enter its classifiers."""
    heads, features = list(_classifiers(module)), []
    hooks = [head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0])) for head in heads]
    try:
        logits = module(images)
    finally:
        for hook in hooks:
            hook.remove()
    if len(features) == len(heads) and all(seen.ndim == 2 and len(seen) % len(images) == 0 for seen in features):
        own = [head(seen).unflatten(0, (-1, len(images))).sum(0) for head, seen in zip(heads, features, strict=True)]
        if not (torch.stack(own).mean(0) - logits).abs().max() > SAME * logits.abs().max():
            return logits.float(), _added_over_branches(features, len(images))
    raise UserError("--features: the logits of this model are not those of a classifier on features; leave it out")


def _classifiers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the classifiers of a folded module, one per expert."""
    if isinstance(module, folding.FoldedExperts):
        for expert in module.experts:
            yield from _classifiers(expert)
    elif isinstance(module, (folding.Fused, folding.FoldedExits)):
        yield from module.model.classifiers
    else:
        backbone = module.backbone if isinstance(module, folding.FoldedResLT) else module
        head = backbone.get_classifier()
        yield from head if isinstance(head, (tuple, list, nn.ModuleList)) else [head]


def _added_over_branches(features: list[torch.Tensor], images: int) -> torch.Tensor:
    """Per expert (K N, D) features -> (N, E D) float32."""
    return torch.cat([seen.float().unflatten(0, (-1, images)).sum(0) for seen in features], 1)
