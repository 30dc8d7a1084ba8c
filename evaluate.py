"""Evaluate a checkpoint: `python evaluate.py --ckpt RUN_DIR [--split val|test] [--tau TAU] [--sweep tau=0:2:0.1] [...]`.

Prints the many / medium / few / all table, with a row for the fused prediction and one per branch. Writes result.json and
per_class.csv, or, if settings, list or checkpoint are not those of the run's own evaluation, files named after the
differences. On request, it also

- fits a temperature on the validation list (`--calibrate`),
- writes features or logits of every image (`--features OUT.safetensors`, `--logits OUT.safetensors`),
- writes the predictions that reports read (`--save-predictions`),
- writes the weights folded for inference (`--fold OUT.safetensors`).

Checkpoints of the authors' code: `--ckpt FILE.pth.tar --format released --model NAME --data NAME`.
"""

from dataclasses import replace

from reslt.config.command_line import files_of_evaluation, parse_evaluation
from reslt.config.schema import PREDICTION, MethodSettings
from reslt.core.command import entry_point
from reslt.core.cpu import uncollected_imports
from reslt.core.errors import UserError

CHANGEABLE = (  # settings of the run that flags of the same names change
    *PREDICTION,
    "data",
    "data_dir",
    "bad_images",
    "eval_branch_at",
    "batch_size",
    "workers",
    "model_kwargs",
    "ddp_timeout",
)


@entry_point
def main() -> None:
    arguments = parse_evaluation()

    with uncollected_imports():
        import numpy  # noqa: F401  before torch, which would swallow what a signal raises during numpy's import
        from timm.data import resolve_model_data_config

    from reslt.augment.settings import ImageSettings
    from reslt.core.batch_shard import BatchShard
    from reslt.core.log import logger
    from reslt.data.evaluated import load_averaged, load_for_evaluation
    from reslt.evaluation.curve import Curve
    from reslt.evaluation.evaluate import evaluate, evaluate_each, predictors_of
    from reslt.evaluation.metrics import ClassAccuracies
    from reslt.evaluation.outputs import Outputs, write_outputs
    from reslt.evaluation.tables import Evaluation
    from reslt.loading.loaders import Loading
    from reslt.methods.predictors import fold_predictor, why_not_foldable
    from reslt.models.create import create_model
    from reslt.models.digest import weights_digest
    from reslt.models.fold import fold, save_folded
    from reslt.runs.calibration import Calibration, fit_calibration, read_calibration, write_calibration
    from reslt.runs.folder import find, require_safe_outputs
    from reslt.runs.released import ReleasedCheckpoint
    from reslt.runs.results import changed_evaluation, is_other_dataset, write_curve, write_evaluation
    from reslt.runs.resume import shared_settings
    from reslt.training.accelerator import (
        broadcast_from_main,
        create_accelerator,
        end_training,
        local_main_process_first,
        on_every_process,
        refuse_differences,
    )
    from reslt.training.compiled import compile_model
    from reslt.training.execution import Execution, is_on_cpu
    from reslt.training.placement import place

    # The checkpoint, and its configuration with the changes of the command line
    if arguments.format == "released":
        checkpoint = ReleasedCheckpoint.read(arguments.ckpt, arguments)
    else:
        checkpoint = find(arguments.ckpt, arguments.which)
    typed = {name: value for name in CHANGEABLE if (value := getattr(arguments, name)) is not None}
    if arguments.data and not arguments.data_dir:
        typed["data_dir"] = None  # another dataset has its own image root
    config = checkpoint.config(**{**typed, "data_on_device": "auto"})
    as_trained = checkpoint.config(**({"model_kwargs": arguments.model_kwargs} if arguments.model_kwargs else {}))
    trained_with = config.run
    execution = Execution.of(arguments, trained_with, "cpu" if is_on_cpu() else "gpu")
    config = config.changed(mixed_precision=execution.mixed_precision, channels_last=execution.channels_last)
    if sweep := arguments.sweep:
        checkpoint.config(**{**typed, sweep.key: sweep.values[0]})  # raises UserError if the run has no such setting
    require_safe_outputs(arguments.output, checkpoint.run, files_of_evaluation(arguments))
    experts = arguments.use_experts
    if experts is not None and not 1 <= experts <= config.model.experts:
        raise UserError(f"--use-experts {experts}: give 1 to {config.model.experts}, the model's number of experts")

    # Device and data, in the order of the model's classes
    by_index = arguments.classes_by_index
    shared = shared_settings(config.flat()) | {"split": arguments.split, "use_experts": experts}
    shared |= {"classes_by_index": by_index, "sweep": str(sweep)}
    accelerator = create_accelerator(config.run.mixed_precision, ddp_timeout=config.run.ddp_timeout, settings=shared)
    is_other = is_other_dataset(arguments.data, as_trained.data.data)
    dataset, split = on_every_process(
        lambda: load_for_evaluation(
            config.data,
            arguments.split,
            checkpoint.classes,
            checkpoint.folder,
            is_other,
            by_index,
            config.run.seed,
            also=("val",) if sweep or arguments.calibrate else (),
        )
    )
    if arguments.calibrate and "val" not in dataset.lists:
        raise UserError(
            f"--calibrate: {dataset.folder} has no validation list to fit a temperature on; add a val.txt, or train with "
            "--val-from-train 0.1, which sets images aside"
        )
    swept_list = "val" if "val" in dataset.lists else split
    averaged = None  # the dataset of the training images, with --ncm
    if config.method.ncm:
        averaged = on_every_process(
            lambda: load_averaged(
                as_trained.data, dataset, checkpoint.classes, checkpoint.folder, is_other, by_index, as_trained.run.seed
            )
        )
    refuse_differences({f"{name}.txt": digest[:12] for name, digest in dataset.digests.items()}, "list")
    if config.data.bad_images == "skip":
        logger.warning(dataset.left_out_text)

    # Model
    model = create_model(config.model, config.method, dataset.num_classes, config.augment.img_size)
    checkpoint.load_evaluated(model)
    if config.model.experts > 1 and experts:
        model.use(experts)
    values = sweep.values if sweep else ()
    methods = [config.method, *(replace(config.method, **{sweep.key: value}) for value in values)]
    if arguments.fold and (reasons := why_not_foldable(methods[-1], model)):
        remedy = "turn it off with none (a router: with --use-experts 1)"
        raise UserError(f"--fold: the folded weights would predict without {', '.join(reasons)}; {remedy}")
    if accelerator.num_processes > 1:
        refuse_differences({"weights": weights_digest(model.state_dict())[:12]}, "checkpoint")
    settings = ImageSettings.of(config.augment, resolve_model_data_config(model.backbone))
    model = place(model, False, config.run.channels_last, accelerator)

    # Loaders: for the evaluated list, the lists of sweep and calibration, and the training images of --ncm
    micro_batches = 1 if arguments.batch_size else config.optim.grad_accum_steps
    shard = BatchShard(config.optim.batch_size, accelerator.process_index, accelerator.num_processes, micro_batches)
    loading = Loading(dataset, settings, config.data, accelerator.device, shard, config.run.seed)
    own_batch = -(-shard.batch_size // shard.parts) if arguments.batch_size else None
    with local_main_process_first(accelerator, "decoding images"):  # it caches resident images
        pipeline = loading.pipeline(trains=False)
        lists = {split, *([swept_list] if sweep else []), *(["val"] if arguments.calibrate else [])}
        loaders = {name: loading.evaluation(name, pipeline, own_batch) for name in sorted(lists)}
        images = sum(len(dataset.lists[name]) for name in lists)
        training_images = averaged and replace(loading, dataset=averaged).evaluation("train", pipeline, own_batch)
    execution = Execution.of(arguments, trained_with, accelerator.device.type, images, settings.size)
    if execution.torchcompile:
        compile_model(model)

    # Predictors; a sweep evaluates one per value, and chooses the one to use on the validation list
    run = {"model": config.model.model, "seed": config.run.seed, "train_digest": checkpoint.classes.lists.get("train")}
    run |= {"which": "best"} if checkpoint.is_best else {}

    def described(accuracies: ClassAccuracies, name: str, method: MethodSettings, **settings) -> Evaluation:
        """Return the accuracies on a list as an evaluation of this checkpoint with `method`."""
        settings |= checkpoint.steps_of_the_next | {"use_experts": experts}
        return Evaluation.of(accuracies, dataset, name, method, checkpoint.epochs_done, run, **settings)

    predictors = predictors_of(methods, model, dataset.images_per_class, training_images, accelerator)
    curve, used, chosen = None, 0, {}  # `used`: the place of the predictor to use; `chosen`: the list that chose it
    if sweep:
        each = evaluate_each(model, loaders[swept_list], accelerator, dataset.num_classes, predictors, swept_list)
        curve = Curve(
            sweep.key, sweep.values, [described(a, swept_list, m) for a, m in zip(each, methods, strict=True)][1:]
        )
        if curve.chosen is not None:
            used, chosen = 1 + sweep.values.index(curve.chosen), {"chosen_on": {sweep.key: swept_list}}

    def measured(name: str, outputs: Outputs | None, calibration: Calibration | None = None) -> Evaluation:
        """Evaluate a list with the predictor that is used."""
        accuracies = evaluate(
            model,
            loaders[name],
            accelerator,
            dataset.num_classes,
            name,
            None,
            predictors[used],
            outputs,
            calibration and calibration.temperature,
        )
        evaluation = described(accuracies, name, methods[used], **chosen)
        if calibration:
            on = calibration.list_for(evaluation)
            evaluation = replace(evaluation, calibrated_on=on, calibration_images=calibration.images)
        return replace(evaluation, outputs=outputs.gathered(accelerator) if outputs else {})

    # The temperature, fitted on the validation list or read from the run, and the table
    calibrated = ""
    if arguments.calibrate:
        fitted = measured("val", Outputs(model, dataset.num_classes, predictors[used]))

        def fit() -> tuple[Calibration | None, str]:
            calibration = fit_calibration(checkpoint, fitted)
            return calibration, write_calibration(checkpoint.run, calibration) if calibration else ""

        calibration, calibrated = broadcast_from_main(fit, accelerator, "fitting the temperature")
    else:
        calibration = broadcast_from_main(lambda: read_calibration(checkpoint, methods[used], experts), accelerator)
    files = {kind: out for kind, out in (("features", arguments.features), ("logits", arguments.logits)) if out}
    outputs = None
    if files or arguments.save_predictions:
        parts = {"of_branches": "logits" in files, "of_features": "features" in files}
        outputs = Outputs(model, dataset.num_classes, predictors[used], **parts, of_rows=arguments.save_predictions)
    if sweep and swept_list == split and not outputs and not calibration:
        evaluation = described(each[used], split, methods[used], **chosen)
    else:
        evaluation = measured(split, outputs, calibration)
    end_training(accelerator)
    if not accelerator.is_main_process:
        return

    # Printed results and files, on the main process
    if curve:
        print(f"{curve.text()}\n")
    if calibrated:
        print(f"{calibrated}\n")
    print(f"{evaluation.text()}\n\n{evaluation.classes_text()}\n\n{execution.described(accelerator.device)}")
    unchanged = as_trained
    if arguments.mixed_precision is None:  # then the device decides, and the evaluation is the run's own
        unchanged = as_trained.changed(mixed_precision=config.run.mixed_precision)
    changes = changed_evaluation(unchanged, config, dataset, experts, by_index)
    named_by = (is_other, arguments.which, arguments.output)
    if curve:
        print(f"\n{write_curve(checkpoint, curve, changes, *named_by)}")
    changes |= {sweep.key: curve.chosen} if chosen else {}
    print(f"\n{write_evaluation(checkpoint, evaluation, changes, *named_by, arguments.save_predictions)}")
    of_list = {"data": dataset.name, "split": split, "list_digest": evaluation.list_digest, "run": checkpoint.run}
    stated = {name: value for name, value in evaluation.settings.items() if value is not None}
    for kind, out in files.items():
        print(write_outputs(evaluation.outputs, kind, dataset.lists[split], of_list | stated, out))
    if arguments.fold:
        fold_predictor(methods[used], model.cpu(), dataset.images_per_class)
        folded, how = fold(model, settings.size)
        classes = checkpoint.classes if is_other else checkpoint.classes.completed_by(dataset.classes)
        imports = dict.fromkeys([*as_trained.run.imports, *(arguments.imports or ())])
        temperature = calibration and calibration.temperature
        save_folded(folded, config.model, methods[used], settings, classes, arguments.fold, tuple(imports), temperature)
        print(f"{arguments.fold}: {how}")


if __name__ == "__main__":
    main()
