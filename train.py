"""Train ResLT on a long-tailed dataset: `accelerate launch train.py [--recipe NAME|FILE] [flags]`.

accelerate launch train.py                                             # the embedded digits
accelerate launch train.py --recipe cifar100_lt_0.01/resnet32          # a row of the paper
accelerate launch train.py --model resnext50_32x4d --data imagenet_lt  # any timm model on any lists
"""

import sys
from dataclasses import replace

from reslt.config.resolve import resolve
from reslt.core.command import entry_point


@entry_point
def main() -> None:
    # Configuration: every fault that can be known without torch is told before torch is loaded.
    resolved = resolve(sys.argv[1:])
    config = resolved.config

    import numpy  # noqa: F401  before torch, which would swallow what a signal raises while numpy is imported
    import torch
    from timm.data import resolve_model_data_config

    from reslt.augment.mixing import create_mixing
    from reslt.augment.settings import ImageSettings
    from reslt.core.batch_shard import BatchShard
    from reslt.core.log import say
    from reslt.core.signals import StopRequests
    from reslt.data.datasets import check_images, load_dataset
    from reslt.evaluation.evaluate import evaluate
    from reslt.evaluation.tables import Evaluation
    from reslt.loading.loaders import eval_loader, train_loader
    from reslt.loading.resident import ResidentLoader
    from reslt.methods.losses import create_loss
    from reslt.models.complexity import cost_without_branches
    from reslt.models.create import check_forward, check_model_name, create_model
    from reslt.prepare.subsets import make_if_embedded
    from reslt.runs import console, resume
    from reslt.runs import folder as run_folder
    from reslt.runs.summary import Summary
    from reslt.training.accelerator import broadcast_from_main, create_accelerator
    from reslt.training.cuda_graph import step_kind
    from reslt.training.epoch import train_epoch
    from reslt.training.optim import create_ema, create_optimizer, create_scheduler
    from reslt.training.placement import compile_model, synchronize_batch_norm
    from reslt.training.state import Progress, TrainState
    from reslt.training.watch import Watch

    for warning in resolved.warnings:
        say(warning)

    # Device and processes, model name
    accelerator = create_accelerator(config.mixed_precision, config.log_with, config.run_folder)
    device, is_main = accelerator.device, accelerator.is_main_process
    check_model_name(config.model)
    if config.decode == "device" and device.type == "cpu":
        say("--decode device: a CPU is many times slower that way than with --decode host")

    # Data: lists, class counts, images on disk
    with accelerator.local_main_process_first():
        make_if_embedded(config.data)
    dataset = load_dataset(config.data, config.data_dir, bad_images=config.bad_images)
    splits = dataset.eval_splits(config.eval_split)
    check_images(dataset, list(dataset.lists))
    if config.bad_images == "skip":
        say(dataset.left_out_text)
    if not splits:
        say(f"{dataset.folder} has neither val.txt nor test.txt: nothing is evaluated, there will be no table")
    elif "val" not in dataset.lists:
        say(f"{dataset.name} has no validation list, so no best epoch is chosen: the last one counts")

    # Model
    torch.manual_seed(config.seed)
    model = create_model(config, dataset.num_classes)
    images = ImageSettings.of(config, resolve_model_data_config(model.backbone))
    model.to(device)
    costs = check_forward(model, images.size, dataset.num_classes), cost_without_branches(model, images.size)
    if config.sync_bn:
        model = synchronize_batch_norm(model, accelerator)
    model.to(memory_format=torch.channels_last if config.channels_last else torch.preserve_format)

    # Loaders, mixing, loss, optimizer, schedule
    mixing = create_mixing(config, dataset.num_classes)
    shard = BatchShard(
        batch_size=config.batch_size,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        micro_batches=config.grad_accum_steps,
        paired=mixing is not None,
    )
    with accelerator.local_main_process_first():  # which decodes what is kept on the device, for all
        loader = train_loader(dataset, images, device, shard)
        eval_loaders = {s: eval_loader(dataset, s, images, device, shard) for s in dataset.lists if s != "train"}
    is_resident = isinstance(loader, ResidentLoader)
    loss_fn = create_loss(config, dataset.images_per_class).to(device)
    optimizer = create_optimizer(config, model)
    scheduler = create_scheduler(config, optimizer)
    ema = create_ema(config, model)
    if config.torchcompile:
        compile_model(model)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    state = TrainState(model, ema, optimizer, accelerator.scaler, dataset.num_classes)
    train_step = step_kind(config, accelerator, optimizer, is_resident)(
        model=prepared,
        loss_fn=loss_fn,
        optimizer=optimizer,
        accelerator=accelerator,
        shard=shard,
        normalize=loader.normalize,
        seed=config.seed,
        mixing=mixing,
        clip_grad=config.clip_grad,
    )

    def measure(split: str, epochs_done: int) -> Evaluation:
        model, loader = state.evaluated, eval_loaders[split]
        with state.averaged_statistics(accelerator.num_processes), model.normalized_classifier(config.tau):
            accuracies = evaluate(model, loader, accelerator, dataset.num_classes, split, requests)
        settings = {"epoch": epochs_done, "tau": config.tau, "eval_branch_at": config.eval_branch_at}
        return Evaluation(accuracies, dataset, split, config, settings)

    digests = {split: images.digest for split, images in dataset.lists.items()}
    effective_config = replace(config, data_on_device="on" if is_resident else "off")  # whose draws are others

    def save(progress: Progress) -> None:
        run_folder.save(run, state, effective_config, accelerator, progress, len(loader), digests)

    with (
        run_folder.open_run(config, resolved.recipe, resolved.paper, accelerator) as run,
        StopRequests() as requests,  # from here on a signal means: write a checkpoint, then stop
    ):
        # Where to start: at the beginning, or behind the newest checkpoint that verifies
        progress = Progress()
        found = None
        if config.resume:
            found, messages = broadcast_from_main(
                lambda: resume.to_resume(run, effective_config, dataset.num_classes, digests), accelerator
            )
            for line in messages:
                say(line)
        if found:
            state.restore(found, accelerator)
            progress = found.progress_in(len(loader))
        summary = Summary(run, found.epochs_done if found else 0, is_main)
        if found and found.steps_per_epoch not in (None, len(loader)):  # forced: another batch size, or list
            accelerator.wait_for_everyone()  # all have read it
            if is_main:
                resume.recount(run, found.folder, len(loader))
        if found and is_main:
            if config.force_resume:
                run_folder.describe(run, config, resolved.recipe, resolved.paper)
            run_folder.choose_best(run, summary.column("val_all"), len(loader), verify=True)
        if progress.steps == len(loader) and summary.has(progress.epoch + 1):
            progress = Progress(progress.epoch + 1)
        if is_main:
            print(console.opening(run, dataset, config, costs, images.size, loader.where, accelerator, progress))
        if config.log_with:
            accelerator.init_trackers(config.experiment)
        watch = Watch(accelerator, requests, config.checkpoint_minutes)

        # Epochs
        results = {}
        for epoch in range(progress.epoch, config.epochs):
            scheduler.step(epoch)
            title = f"epoch {epoch + 1}/{config.epochs}"
            stats = train_epoch(train_step, loader, progress, watch, ema=ema, save=save, title=title)
            is_due = (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs
            results = {split: measure(split, epoch + 1) for split in splits if is_due}
            line = summary.add(epoch, optimizer.param_groups[0]["lr"], stats, results)
            if is_main:
                print(line, flush=True)
                run_folder.choose_best(run, summary.column("val_all"), len(loader))
                run_folder.prune(run, config.checkpoint_hist)
            accelerator.log(summary.rows[-1], step=epoch)
            progress = Progress(epoch + 1)

        # Final tables: the last epoch, and the best on the validation list where there is one
        final = next((split for split in ("test", "val") if split in eval_loaders), None)
        if final:
            outcomes = [results.get(final) or measure(final, config.epochs)]
            best = broadcast_from_main(lambda: run_folder.find(run), accelerator)
            if best.epochs_done < config.epochs:
                best.load_evaluated(state.evaluated)
                outcomes.append(measure(final, best.epochs_done))
            if is_main:
                print(console.conclude(run, outcomes, summary, resolved.paper))
        accelerator.end_training()


if __name__ == "__main__":
    main()
