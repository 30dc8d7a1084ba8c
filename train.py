"""Train ResLT on a long-tailed dataset: `accelerate launch train.py [--recipe NAME|FILE] [flags]`.

accelerate launch train.py                                             # the embedded digits
accelerate launch train.py --recipe cifar100_lt_0.01/resnet32          # a row of the paper
accelerate launch train.py --model resnext50_32x4d --data imagenet_lt  # any timm model on any lists
"""

import sys
from dataclasses import replace

from reslt.config.imports import naming_imports, recorded_imports
from reslt.config.model_arguments import model_source
from reslt.config.resolve import resolve
from reslt.config.stages import Stage, stage_at, stages_of
from reslt.core.command import entry_point
from reslt.core.cpu import uncollected_imports
from reslt.core.phases import BOOKKEEPING, Phases


def train(arguments: list[str], is_only_run: bool = True) -> None:
    """Train a run with these flags. Raises UserError, and Stopped after a signal. `is_only_run`: whether this process
    trains no other run, so that --profile counts from its start."""
    # Configuration: every error that can be found without torch is reported before torch is imported
    resolved = resolve(arguments)
    config = resolved.config
    phases = Phases(is_only_run, keeps_spans=config.run.profile_trace is not None)

    with uncollected_imports():
        import numpy  # noqa: F401  before torch, which would swallow what a signal raises during numpy's import
        import torch
        from timm.data import resolve_model_data_config

    from reslt.augment.mixing import create_mixing
    from reslt.augment.settings import ImageSettings
    from reslt.core.batch_shard import BatchShard
    from reslt.core.log import logger
    from reslt.core.signals import StopRequests
    from reslt.data.datasets import load_dataset
    from reslt.evaluation.evaluate import evaluate, predictors_of, set_centroids, start_at_class_means
    from reslt.evaluation.outputs import Outputs
    from reslt.evaluation.tables import Evaluation
    from reslt.loading.batches import steps_per_epoch
    from reslt.loading.loaders import Loading
    from reslt.methods.pairs import create_pairing
    from reslt.methods.registry import create_loss, create_sampler, create_second_sampler
    from reslt.models.create import check_forward, check_model_name, create_model
    from reslt.models.freeze import freeze
    from reslt.models.model_source import read_source, to_start_from, with_source
    from reslt.models.tuning import held_modules, tune
    from reslt.prepare.subsets import make_if_embedded
    from reslt.runs import console
    from reslt.runs.calibration import Calibration
    from reslt.runs.folder import open_run
    from reslt.runs.profile import profile_reported, require_place_of_trace
    from reslt.runs.resume import shared_settings
    from reslt.runs.run import Run
    from reslt.training.accelerator import (
        broadcast_from_main,
        create_accelerator,
        end_training,
        local_main_process_first,
        on_every_process,
        refuse_differences,
    )
    from reslt.training.epoch import Pace, train_epoch
    from reslt.training.frozen import frozen_part
    from reslt.training.placement import place
    from reslt.training.setup import Training
    from reslt.training.trained_parts import check_parts
    from reslt.training.watch import Watch

    # Device and processes, name of the model
    phases.begin("data")
    accelerator = create_accelerator(
        config.run.mixed_precision,
        config.run.log_with,
        config.run_folder,
        ddp_timeout=config.run.ddp_timeout,
        settings=shared_settings(config.flat()),
    )
    resumed = config.run_folder if config.run.resume else None
    with naming_imports(recorded_imports(resumed)):
        source = config.model.model if model_source(config.model.model) else None  # a repository or folder
        if source:
            described = broadcast_from_main(lambda: read_source(config, resumed), accelerator, f"reading {source}")
            config = with_source(config, described)
        check_model_name(config.model.model)

    # Data: lists, class counts, images on disk
    with local_main_process_first(accelerator, "creating the embedded dataset"):
        make_if_embedded(config.data.data)
    dataset = on_every_process(
        lambda: load_dataset(
            config.data.data,
            config.data.data_dir,
            bad_images=config.data.bad_images,
            val_from_train=config.data.val_from_train,
            seed=config.run.seed,
            only_shots=config.data.only_shots,
        )
    )
    refuse_differences({f"{name}.txt": digest[:12] for name, digest in dataset.digests.items()}, "list")
    splits, final_split = dataset.eval_splits(config.data.eval_split), dataset.final_split(config.data.final_split)
    remarks = dataset.check_for_training(config.data.bad_images)

    # The run's folder, and the checkpoint to resume from
    description = {"config": config.stored(), "recipe": resolved.recipe, "paper": resolved.paper}
    description |= {"model_source": source} if source else {}
    steps = steps_per_epoch(len(dataset.lists["train"]), config.data.limit_train, config.optim.batch_size)
    stages = stages_of(config)
    run = Run(
        config.run_folder, accelerator, description, dataset, steps, stages, config.run.checkpoint_hist, phases=phases
    )
    broadcast_from_main(lambda: require_place_of_trace(config.run.profile_trace), accelerator)
    profiled = profile_reported(phases, config.run, accelerator)
    with open_run(run.path, description, config.run.overwrite, accelerator), profiled, run.writer:
        for warning in resolved.warnings + remarks:
            logger.warning(warning)
        if config.run.resume:
            run.find_checkpoint(config.run.force_resume)

        # Model: pretrained, or, if the run resumes, with the checkpoint's weights; teachers
        phases.begin("model")
        if run.checkpoint is None:
            start = on_every_process(lambda: to_start_from(config.model, source), "the pretrained weights")
        else:
            start = replace(config.model, pretrained=False, pretrained_file=None)
        torch.manual_seed(config.run.seed)
        model = create_model(start, config.method, dataset.num_classes, config.augment.img_size)
        tune(model, config.model)
        freeze(model, config.model.freeze)
        check_parts(model, stages)
        from_means = config.method.head_init == "class_means" and run.checkpoint is None
        random_rows = [head.weight.detach().clone() for head in model.classifiers] if from_means else []
        run.initialize(model, config.model.init_from)
        settings = ImageSettings.of(config.augment, resolve_model_data_config(model.backbone))
        model = place(model, config.run.sync_bn, config.run.channels_last, accelerator)
        teachers = run.read_teachers(config.model.teachers, settings)
        if teachers is not None:
            teachers = place(teachers, False, config.run.channels_last, accelerator)
        complexities = check_forward(model, settings.size, dataset.num_classes)

        # Loaders: for training, evaluated lists, and lists with averaged features
        phases.begin("data")
        shard = BatchShard(
            batch_size=config.optim.batch_size,
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
            micro_batches=config.optim.grad_accum_steps,
            paired=any(stage.config.augment.mixes for stage in stages),
        )
        frozen = frozen_part(model, config.model, stages, settings.size, accelerator)
        seed, views = config.run.seed, config.method.views_in_training
        loading = Loading(dataset, settings, config.data, accelerator.device, shard, seed, frozen, views)
        pipeline = broadcast_from_main(lambda: loading.pipeline(run.recorded), accelerator, "reading image sizes")
        run.record(pipeline)
        averages_features = config.method.ncm or from_means or any("centroids" in stage.reinit for stage in stages)
        unused = {"test"} - {*splits, final_split} | (set() if averages_features else {"train"})
        with local_main_process_first(accelerator, "decoding images"):  # it caches resident images, or their features
            loader = loading.training(pipeline)
            eval_loaders = {
                split: loading.evaluation(split, pipeline) for split in dataset.lists if split not in unused
            }
        phases.begin("model")
        if from_means:
            start_at_class_means(model, random_rows, eval_loaders["train"], accelerator)
        if teachers is not None:
            teachers.measure(eval_loaders["val"], accelerator)
            logger.info(console.opening(teachers=console.describe_teachers(config.model, teachers.accuracies)))

        # Stages: each has its own loss, mixing and order of images, and, unless it continues the previous ones, its own
        # optimizer and schedule
        training = Training(
            model=model,
            optim=config.optim,
            run=config.run,
            accelerator=accelerator,
            shard=shard,
            normalize=loader.normalize,
            is_resident=pipeline.is_resident,
            held=held_modules(model, config.model),
            teachers=teachers,
        )

        def enter(stage: Stage, is_resumed: bool = False) -> None:
            """Begin a stage, or resume in it."""
            if "centroids" in stage.reinit and not is_resumed:
                with training.state.averaged_statistics(accelerator.num_processes):
                    set_centroids(model, eval_loaders["train"], accelerator)
            loss_fn = create_loss(
                stage.config.method, dataset.images_per_class, config.model.experts, stage.trains_router, model
            )
            pairing = create_pairing(stage, dataset.num_classes, steps)  # excludes mixing
            mixing = pairing or create_mixing(stage.config.augment, dataset.num_classes, config.run.seed)
            loader.batches.sampler = create_sampler(stage, loader.ordered_labels, dataset.num_classes)
            loader.batches.second_sampler = create_second_sampler(stage, loader.ordered_labels, dataset.num_classes)
            training.enter(stage, loss_fn, mixing, is_resumed)

        enter(stage_at(stages, run.first_epoch), is_resumed=run.checkpoint is not None)
        state, progress = training.state, run.begin(training.state)
        logger.info(
            console.opening(
                data=console.describe_data(dataset, config.data.limit_train),
                augment=f"{console.describe_augmentation(config.augment)}; {pipeline}",
                model=console.describe_model(
                    config.model, settings.size, complexities, accelerator, shard, training.trained
                ),
                method=console.describe_method(config.method, dataset.images_per_class, config.optim.sam),
                **console.describe_stages(stages),
                run=console.describe_run(run.path, progress, run.epochs),
            )
        )
        if config.run.log_with:
            accelerator.init_trackers(config.run.experiment)

        # Epochs. From here on, a signal requests a checkpoint before the run stops.
        with StopRequests() as requests:
            watch = Watch(
                accelerator,
                requests,
                config.run.checkpoint_minutes,
                config.run.checkpoint_seconds,
                has_failed=lambda: run.writer.has_failed,
            )
            pace = Pace(run.epochs * len(loader))

            def measure(
                split: str, epochs_done: int, calibration: Calibration | None = None, is_collected: bool = False
            ) -> Evaluation:
                """Evaluate a list with the present weights. See `reslt.runs.run.Measure`."""
                title, temperature = f"{split} after epoch {epochs_done}", calibration and calibration.temperature
                with state.for_evaluation(accelerator.num_processes) as evaluated:
                    counts, averaged = dataset.images_per_class, eval_loaders.get("train")
                    [predictor] = predictors_of([config.method], evaluated, counts, averaged, accelerator, requests)
                    outputs = Outputs(evaluated, dataset.num_classes, predictor, of_rows=True) if is_collected else None
                    accuracies = evaluate(
                        evaluated,
                        eval_loaders[split],
                        accelerator,
                        dataset.num_classes,
                        title,
                        requests,
                        predictor,
                        outputs,
                        temperature,
                    )
                return Evaluation.of(
                    accuracies,
                    dataset,
                    split,
                    config.method,
                    epochs_done,
                    run.named,
                    calibrated_on=calibration and calibration.list,
                    calibration_images=calibration and calibration.images,
                    outputs=outputs and outputs.gathered(accelerator),
                )

            results = {}
            for epoch in range(progress.epoch, run.epochs):
                phases.begin(BOOKKEEPING)
                if stage_at(stages, epoch) is not training.stage:
                    enter(stage_at(stages, epoch))
                training.schedule(epoch)
                if teachers is not None:
                    latest = broadcast_from_main(lambda: run.summary.latest("val"), accelerator)
                    teachers.begin_epoch(epoch, config.optim.epochs, latest)
                stats = train_epoch(
                    training.step, loader, progress, watch, pace, ema=state.ema, save=run.save, phases=phases
                )
                is_due = (epoch + 1) % config.run.eval_every == 0 or epoch + 1 == run.epochs
                results = run.evaluate(measure, splits, progress) if is_due else {}
                progress = run.end_epoch(progress, training.step.learning_rate, stats, results)

            # Final tables: the last epoch, and the best on the validation list if there is one
            run.conclude(results, measure)
            for finished in (loader, *eval_loaders.values()):
                finished.end()  # within the block: a signal after it would interrupt this
        end_training(accelerator)


@entry_point
def main() -> None:
    train(sys.argv[1:])


if __name__ == "__main__":
    main()
