"""Evaluate a checkpoint: `python evaluate.py --ckpt RUN_DIR [--split val|test] [--tau GAMMA] [--fold OUT]`.

Prints the many / medium / few / all table, a row for the fused prediction and one per branch; writes result.json and
per_class.csv. Branches are folded as far as that is exact, so that evaluating costs little more than the plain model;
`--no-fold` evaluates them one by one, as training does.

Checkpoints of the authors' code: `--ckpt FILE.pth.tar --format released --model NAME --data NAME`.
"""

import argparse
from pathlib import Path

from reslt.config.command_line import add_foreign_flags
from reslt.core.command import Parser, entry_point
from reslt.core.errors import UserError


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Evaluate a checkpoint of a run.")
    parser.add_argument(
        "--ckpt", type=Path, required=True, help="folder of a run or of one checkpoint, or a file in it"
    )
    parser.add_argument("--which", choices=("last", "best"), help="unset: the best where a validation list chose one")
    parser.add_argument("--format", choices=("reslt", "released"), default="reslt", help="released: the authors' files")
    add_foreign_flags(parser)
    parser.add_argument("--data-dir", help="image root")
    parser.add_argument("--bad-images", choices=("stop", "skip"), help="unset: as trained")
    parser.add_argument("--split", choices=("val", "test"), help="unset: test where there is one")
    parser.add_argument(
        "--tau",
        help="divide each classifier row by its norm^TAU and drop the bias, 0 too; none: neither; unset: as trained",
    )
    parser.add_argument("--eval-branch-at", choices=("map", "pooled"), help="unset: as trained")
    parser.add_argument(
        "--use-experts", type=int, metavar="N", help="predict with the first N experts; unset: with all"
    )
    parser.add_argument(
        "--batch-size", type=int, help="of all processes; unset: chosen by image size and the training batch"
    )
    parser.add_argument("--workers", type=int)
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), help="unset: as trained")
    parser.add_argument("--output", type=Path, help="folder for result.json and per_class.csv; unset: the run's")
    parser.add_argument("--fold", type=Path, metavar="OUT", help="also write the weights folded for inference")
    parser.add_argument("--no-fold", action="store_true", help="evaluate all branches one by one, as in training")
    given = parser.parse_args()
    if given.format == "reslt" and (given.model or given.model_kwargs or given.class_order):
        raise UserError("--model, --model-kwargs and --class-order belong to --format released; a run says its own")
    if given.format == "released" and given.which:
        raise UserError("--which chooses among the checkpoints of a run; drop it with --format released")
    if given.fold and (given.fold.suffix != ".safetensors" or given.fold.is_dir()):
        raise UserError(f"--fold {given.fold}: give the name of a file that ends in .safetensors")
    if given.output and given.output.exists() and not given.output.is_dir():
        raise UserError(f"--output {given.output}: it is not a folder")
    return given


@entry_point
def main() -> None:
    arguments = parse_arguments()

    import numpy  # noqa: F401  before torch, which would swallow what a signal raises while numpy is imported
    import torch
    from timm.data import resolve_model_data_config

    from reslt.augment.settings import ImageSettings
    from reslt.core.batch_shard import BatchShard
    from reslt.core.log import say
    from reslt.data.datasets import check_images, load_dataset
    from reslt.evaluation.evaluate import evaluate
    from reslt.evaluation.tables import Evaluation, write_results
    from reslt.loading.loaders import eval_loader
    from reslt.models.create import create_model
    from reslt.models.fold import fold, fold_branches, save_folded
    from reslt.runs import folder as run_folder
    from reslt.runs.released import ReleasedCheckpoint
    from reslt.training.accelerator import create_accelerator

    # The checkpoint and its configuration, with what the command line says differently
    if arguments.format == "released":
        found = ReleasedCheckpoint.read(arguments.ckpt, arguments)
    else:
        found = run_folder.find(arguments.ckpt, arguments.which)
    names = ("data", "data_dir", "bad_images", "tau", "eval_branch_at", "batch_size", "workers", "mixed_precision")
    said = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.data and not arguments.data_dir:
        said["data_dir"] = None  # another dataset has an image root of its own
    said["data_on_device"] = "auto"  # a checkpoint says how its run was carried out
    config = found.config(**said)
    if arguments.use_experts is not None and not 1 <= arguments.use_experts <= config.experts:
        raise UserError(f"--use-experts {arguments.use_experts}: the model has {config.experts}; give 1 to that many")

    # Device and data
    accelerator = create_accelerator(config.mixed_precision)
    try:
        dataset = load_dataset(config.data, config.data_dir, bad_images=config.bad_images)
    except UserError as fault:
        if arguments.data:
            raise
        raise UserError(f"{fault} ({found.folder} was trained with --data {config.data}; another: --data)") from None
    if dataset.num_classes != found.num_classes:
        raise UserError(
            f"--ckpt {found.folder} was trained on {found.num_classes} classes, but {dataset.folder} has "
            f"{dataset.num_classes}; give the dataset of its classes with --data"
        )
    if config.bad_images == "skip":
        say(dataset.left_out_text)
    split = arguments.split or next((s for s in ("test", "val") if s in dataset.lists), None)
    if split not in dataset.lists:
        missing = f"no {split}.txt" if split else "neither test.txt nor val.txt"
        raise UserError(f"{dataset.folder} has {missing}: there is nothing to evaluate")
    check_images(dataset, [split])

    # Model
    model = create_model(config, dataset.num_classes)
    found.load_evaluated(model)
    if config.tau is not None:
        model.normalize_classifier(config.tau)
    if config.experts > 1 and arguments.use_experts:
        model.use(arguments.use_experts)
    images = ImageSettings.of(config, resolve_model_data_config(model.backbone))
    evaluated, how = (model, None) if arguments.no_fold else fold_branches(model, images.size)

    # Table and files
    micro_batches = 1 if arguments.batch_size else config.grad_accum_steps
    shard = BatchShard(config.batch_size, accelerator.process_index, accelerator.num_processes, micro_batches)
    with accelerator.local_main_process_first():  # which decodes what is kept on the device, for all
        loader = eval_loader(dataset, split, images, accelerator.device, shard, is_literal=bool(arguments.batch_size))
    evaluated.to(
        device=accelerator.device, memory_format=torch.channels_last if config.channels_last else torch.preserve_format
    )
    accuracies = evaluate(evaluated, loader, accelerator, dataset.num_classes, split)
    settings = {"epoch": found.epochs_done, "tau": config.tau, "eval_branch_at": config.eval_branch_at}
    settings["use_experts"] = arguments.use_experts
    if not found.ended_an_epoch:
        settings["steps_of_the_next"] = found.state["progress"]["steps"]
    is_main = accelerator.is_main_process
    accelerator.end_training()  # what several processes have in common is done
    if not is_main:
        return
    evaluation = Evaluation(accuracies, dataset, split, config, settings)
    if how and config.has_branches:
        print(f"branches: {how} (--no-fold: as trained)")
    print(f"{evaluation.text()}\n\n{evaluation.classes_text()}")
    folder = arguments.output or found.run
    write_results(folder, evaluation)
    print(f"\nresult.json and per_class.csv are in {folder}")
    if arguments.fold:
        folded, how = fold(model.cpu(), images.size)
        save_folded(folded, images, dataset.num_classes, dataset.class_names, arguments.fold)
        print(f"{arguments.fold}: {how}")


if __name__ == "__main__":
    main()
