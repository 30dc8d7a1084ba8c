"""`python -m reslt.predict --ckpt RUN|FOLDED PHOTOS...`: predict the most probable classes of photos, as a table or a file.

Photos are files, folders including subfolders, or the lines of `--list FILE`. Worker processes decode them, and the model
predicts them in batches. If a file cannot be read, its row states the reason, and the others are predicted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from reslt.config.checks import raise_all
from reslt.config.command_line import add_execution_flags, add_import_flag, key_values, load_typed_imports
from reslt.core.command import Parser, entry_point
from reslt.core.cpu import available_cores, uncollected_imports
from reslt.core.errors import UserError
from reslt.core.log import logger, progress_bar
from reslt.core.ranks import launched_processes
from reslt.core.text import counted, one_line, printable, shown
from reslt.deploy.photo_list import PhotoList, photos_in, photos_of
from reslt.deploy.rows import Row, as_unicode, open_rows, require_writable

if TYPE_CHECKING:
    import torch

    from reslt.deploy.trained_model import TrainedModel
    from reslt.loading.photos import PhotoBatches
    from reslt.training.execution import Execution

PROG = "python -m reslt.predict"
PHOTOS_PER_WORKER = 32  # fewer photos are decoded before another process has started
LONGEST_PATH, LONGEST_NAME = 60, 24  # characters of the printed table


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog=PROG, description="Predict the classes of photos with a trained model.")
    parser.add_argument(
        "photos", nargs="*", metavar="PHOTOS", help="files and folders; folders are searched with their subfolders"
    )
    parser.add_argument(
        "--ckpt",
        required=True,
        type=Path,
        help="run folder, folder of one checkpoint, or file of evaluate.py --fold",
    )
    parser.add_argument(
        "--which",
        choices=("last", "best"),
        help="checkpoint of the run; unset: the best if validation chose one, else the last",
    )
    parser.add_argument("--list", type=Path, metavar="FILE", help="a text file of paths, or of lines `path label`")
    parser.add_argument(
        "--data-dir",
        help="folder that the paths of --list start from; unset: the image root of its dataset, else the list's folder",
    )
    parser.add_argument("--topk", type=int, default=5, help="classes per photo (default: 5)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write the predictions to a file, .csv, .jsonl or .parquet, instead of a table on standard output",
    )
    parser.add_argument(
        "--features", type=Path, metavar="OUT", help="also write the features that enter the classifier"
    )
    parser.add_argument("--logits", type=Path, metavar="OUT", help="also write the logits, before the temperature")
    parser.add_argument(
        "--batch-size", type=int, help="photos per batch; unset: chosen from the image size and the device"
    )
    parser.add_argument("--workers", type=int, help="processes that decode photos; unset: at most one per CPU core")
    parser.add_argument("--device", help="device, such as cpu, cuda, cuda:1 or mps; unset: a GPU if there is one")
    add_execution_flags(parser)
    parser.add_argument(
        "--model-kwargs",
        nargs="+",
        metavar="KEY=VALUE",
        default=[],
        help="arguments of the model that are not accepted from a file, with the values used in training",
    )
    add_import_flag(parser)
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line, and import the modules that it names. Raises UserError for flags that contradict each
    other."""
    load_typed_imports(sys.argv[1:] if arguments is None else arguments, PROG)
    given = create_parser().parse_args(arguments)
    given.model_kwargs, faults = key_values(given.model_kwargs)
    raise_all(faults)
    if given.torchcompile and given.features:
        raise UserError("--features cannot be recorded in a compiled model; drop --torchcompile")
    if bool(given.photos) == bool(given.list):
        not_both = "; not both" if given.list else ""
        raise UserError(f"give PHOTOS (files or folders), or --list FILE{not_both}")
    if given.data_dir and not given.list:
        raise UserError("--data-dir is the folder from which the paths of --list start; drop it, or give --list FILE")
    for name, least in (("topk", 1), ("batch_size", 1), ("workers", 0)):
        if (value := getattr(given, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: give a number from {least}")
    for flag, file in tensor_files(given).items():
        if file.suffix != ".safetensors" or file.is_dir():
            raise UserError(f"{flag} {file}: give a file name that ends in .safetensors")
    if given.features and given.logits and given.features.resolve() == given.logits.resolve():
        raise UserError(f"--features {given.features}: this is the file of --logits too; give each a file of its own")
    if launched_processes() > 1:
        raise UserError(
            "reslt.predict runs in one process: start it with python -m reslt.predict, once per GPU with a part of the photos"
        )
    if given.output:
        require_writable(given.output)
    return given


def tensor_files(given: argparse.Namespace) -> dict[str, Path]:
    """Return the requested files of tensors, by flag."""
    return {flag: file for flag, file in (("--features", given.features), ("--logits", given.logits)) if file}


@entry_point
def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    photos = photos_in(given.list, given.data_dir) if given.list else photos_of(given.photos)

    from reslt.data.classes import Classes

    with uncollected_imports():
        from reslt.deploy.trained_model import load_folded, read_run
    from reslt.loading.loaders import images_per_batch
    from reslt.loading.photos import PhotoBatches, PhotoFiles
    from reslt.models.fold import is_folded
    from reslt.runs.folder import require_outside_checkpoints, require_safe_outputs
    from reslt.training.execution import Execution

    files = tensor_files(given)
    if given.output:
        require_outside_checkpoints(given.output, "--output")
    require_safe_outputs(None, files=files)
    device = _device(given.device, given.mixed_precision)
    if is_folded(given.ckpt):
        if given.which:
            raise UserError(
                f"--which {given.which} chooses among the checkpoints of a run, but {given.ckpt} is a file; drop it"
            )
        model = load_folded(given.ckpt, given.model_kwargs)
    else:
        model = read_run(given.ckpt, given.which, given.model_kwargs, folds=not given.features)
        if model.lacks_ncm:
            logger.warning(
                f"{given.ckpt}: predicted by the classifier, without --ncm: checkpoints contain no class means"
            )
    model.to(device)
    size = model.image_settings.size
    execution = Execution.of(given, model.trained_with, device.type, len(photos.paths), size)
    execution = replace(execution, torchcompile=execution.torchcompile and not given.features)
    model.execute(execution)
    photos = photos.with_labels_of(Classes.read(model.description), given.ckpt)
    settings, topk = model.image_settings, min(given.topk, model.description["num_classes"])
    for line in (*_described(model, photos), execution.described(device)):
        _note(line)
    if model.description["class_names"] is None:
        logger.warning(f"{given.ckpt} has no class names: `name` is the number of the class, as in the training list")
    batch_size = given.batch_size or images_per_batch(32, settings.size, on_cpu=device.type == "cpu")
    workers = min(available_cores(), len(photos.paths) // PHOTOS_PER_WORKER) if given.workers is None else given.workers
    batches = PhotoBatches(PhotoFiles(photos.paths, photos.root, settings), settings, device, batch_size, workers)

    tensors: dict[str, torch.Tensor] = {}
    first_error, unreadable = None, 0
    with ExitStack() as opened:
        if given.output:
            write = opened.enter_context(open_rows(given.output, topk, photos.labels is not None)).write
        else:
            write = _printer(photos, model.class_names)
        bar = opened.enter_context(progress_bar(bool(given.output), "predicting", -(-len(photos.paths) // batch_size)))
        for batch in _predicted(model, batches, photos, given, tensors, execution):
            for row in batch:
                write(row)
                if row.error is not None:
                    first_error, unreadable = first_error or f"{_end_of(row.path)}: {row.error}", unreadable + 1
            bar.update()
        if unreadable == len(photos.paths):
            several = f"none of {counted(unreadable, 'photo')} could be read; the first is "
            raise UserError(f"{several if unreadable > 1 else ''}{first_error}{photos.looked_in}")
    if given.output:
        _note(f"{given.output}: {counted(len(photos.paths), 'row')}")
    for flag, file in files.items():
        _note(_write_tensors(file, flag.removeprefix("--"), tensors, photos, given, model))
    if unreadable:
        logger.warning(
            f"{unreadable:,} of {counted(len(photos.paths), 'photo')} could not be read; their rows state why; the first is "
            f"{first_error}{photos.looked_in}"
        )


def _note(line: str) -> None:
    """Print a line to standard error, since standard output contains only the table."""
    print(printable(line), file=sys.stderr, flush=True)


def _device(typed: str | None, mixed_precision: str) -> torch.device:
    """Return the device to predict on. Raises UserError if this machine lacks it."""
    import torch

    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(typed or best)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as fault:
        reason = str(fault).strip().splitlines()[0][:120]
        raise UserError(f"--device {typed}: not on this machine ({reason}); leave it out for {best}") from None
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("--mixed-precision fp16: it requires a GPU; use no or bf16")
    return device


def _described(model: TrainedModel, photos: PhotoList) -> Iterator[str]:
    """Yield the lines that precede the predictions."""
    yield f"{model!r}: {counted(len(photos.paths), 'photo')}"
    if model.temperature is None:
        yield "probabilities are not calibrated; evaluate.py --calibrate fits a temperature on a validation list"
    else:
        yield f"probabilities are calibrated (temperature {model.temperature:.3g})"


def _predicted(
    model: TrainedModel,
    batches: PhotoBatches,
    photos: PhotoList,
    given: argparse.Namespace,
    tensors: dict[str, torch.Tensor],
    execution: Execution,
) -> Iterator[list[Row]]:
    """Yield the rows of each batch, one per photo. Fill `tensors` with the requested logits and features, NaN for a photo
    that cannot be read. Raises UserError if logits are not finite."""
    import torch

    first, precision = 0, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(execution.mixed_precision)
    full = 0
    for images, reasons in batches:
        full = full or len(images)
        if execution.torchcompile and len(images) < full:  # the model is compiled for one size
            images = torch.cat([images, images.new_zeros(full - len(images), *images.shape[1:])])
        with torch.autocast(images.device.type, precision, enabled=precision is not None):
            if given.features:
                logits, features = model.logits_and_features(images)
            else:
                logits, features = model.logits(images), None
        is_read = torch.tensor([reason is None for reason in reasons])
        logits = logits[: len(reasons)].cpu()
        if bad := (~logits.isfinite().all(1) & is_read).nonzero().flatten().tolist():
            raise UserError(
                f"{_end_of(photos.paths[first + bad[0]])}: the model's logits are not finite; its weights have diverged, "
                "or half precision overflows (--mixed-precision no)"
            )
        for name, found in (("logits", logits if given.logits else None), ("features", features)):
            if found is not None:
                kept = tensors.setdefault(name, torch.full((len(photos.paths), found.shape[1]), torch.nan))
                kept[first : first + len(found)][is_read] = found.cpu()[is_read]
        rows = []
        for i, (prediction, reason) in enumerate(zip(model.ranked(logits, given.topk), reasons, strict=True), first):
            ranked = prediction.classes, prediction.names, prediction.probabilities
            label = photos.labels and photos.labels[i]
            rows.append(Row(photos.paths[i], label, *(map(tuple, ranked) if reason is None else ()), error=reason))
        first += len(reasons)
        yield rows


def _end_of(path: str) -> str:
    """Return a path for a message or the table; a long path without its beginning."""
    text = one_line(path)
    return text if len(text) <= LONGEST_PATH else f"...{text[3 - LONGEST_PATH :]}"


def _printer(photos: PhotoList, names: list[str]) -> Callable[[Row], None]:
    """Return a function that prints a row of a table with columns of fixed width."""
    of_path = max(len(_end_of(path)) for path in photos.paths)
    of_name = max(len(shown(name, LONGEST_NAME)) for name in names)

    def write(row: Row) -> None:
        path = _end_of(row.path)
        pairs = zip(row.names, row.probabilities, strict=True)
        cells = [f"{shown(name, LONGEST_NAME):<{of_name}} {100 * probability:5.1f} %" for name, probability in pairs]
        print(f"{path:<{of_path}}  {'  '.join(cells) if row.error is None else row.error}")

    return write


def _write_tensors(
    out: Path,
    kind: str,
    tensors: Mapping[str, torch.Tensor],
    photos: PhotoList,
    given: argparse.Namespace,
    model: TrainedModel,
) -> str:
    """Write (N, D) features or (N, C) logits (`kind`) in float32, and a file next to them with a line per photo, completely
    or not at all. Return a line that describes the files."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from reslt.core.files import atomic_file
    from reslt.evaluation.outputs import PREDICT_WRITER, lines_of

    described = {name: model.description.get(name) for name in ("model", "method", "epoch", "temperature")}
    metadata = {"format": "pt", "writer": PREDICT_WRITER, "ckpt": str(given.ckpt)}
    metadata |= {name: str(value) for name, value in described.items() if value is not None}
    content, lines = {kind: tensors[kind]}, lines_of(out)
    if photos.labels is not None:
        content["labels"] = torch.tensor(photos.labels, dtype=torch.int64)
    with atomic_file(lines) as of_lines, atomic_file(out) as of_tensors:  # both, or, on a full disk, neither
        of_lines.write_text("".join(f"{as_unicode(path)}\n" for path in photos.paths), encoding="utf-8")
        try:
            save_file(content, of_tensors, metadata=metadata)
        except SafetensorError as fault:
            raise UserError(f"{out}: the {kind} could not be written: {fault}") from None
    return f"{out}: {kind} {tuple(tensors[kind].shape)}; {lines}: the photos' paths"


if __name__ == "__main__":
    main()
