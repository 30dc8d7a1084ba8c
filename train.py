"""Train ResLT on a long-tailed dataset: `accelerate launch train.py [--recipe NAME|FILE] [flags]`.

accelerate launch train.py                                             # the embedded digits
accelerate launch train.py --recipe cifar100_lt_0.01/resnet32          # a row of the paper
accelerate launch train.py --model resnext50_32x4d --data imagenet_lt  # any timm model on any lists
"""

import sys

from reslt.errors import entry_point
from reslt.sources import resolve


@entry_point
def main() -> None:
    # Configuration: every fault that can be known without torch is told before torch is loaded.
    resolved = resolve(sys.argv[1:])
    config = resolved.config

    import torch
    from timm.data import resolve_model_data_config

    from reslt import checkpoint, report
    from reslt.datasets import check_images, load_dataset
    from reslt.device import create_accelerator, say
    from reslt.engine import evaluate, train_epoch
    from reslt.images import ImageSettings
    from reslt.loader import eval_loader, train_loader
    from reslt.losses import create_loss
    from reslt.mixing import create_mixing
    from reslt.models.cost import cost, cost_without_branches
    from reslt.models.create import check_forward, check_model_name, create_model
    from reslt.optim import create_ema, create_optimizer, create_scheduler
    from reslt.prepare.subsets import make_if_embedded
    from reslt.tables import Evaluation
    from reslt.train_state import TrainState

    for warning in resolved.warnings:
        say(warning)

    # Device, model name
    accelerator = create_accelerator(config.mixed_precision, config.log_with, config.run_folder)
    device = accelerator.device

    check_model_name(config.model)

    # Data: lists, class counts, images on disk
    make_if_embedded(config.data)
    dataset = load_dataset(config.data, config.data_dir)
    splits = dataset.eval_splits(config.eval_split)
    check_images(dataset, list(dataset.lists))
    if not splits:
        say(f"{dataset.folder} has neither val.txt nor test.txt: nothing is evaluated, there will be no table")
    elif "val" not in dataset.lists:
        say(f"{dataset.name} has no validation list, so no best epoch is chosen: the last one counts")

    # Model
    torch.manual_seed(config.seed)
    model = create_model(config, dataset.num_classes)
    images = ImageSettings.of(config, resolve_model_data_config(model.backbone))
    check_forward(model, images.size, dataset.num_classes)
    costs = cost(model, images.size), cost_without_branches(model, images.size)
    model.to(device=device, memory_format=torch.channels_last if config.channels_last else torch.preserve_format)

    # Loaders, mixing, loss, optimizer, schedule
    loader = train_loader(dataset, images, device)
    eval_loaders = {split: eval_loader(dataset, split, images, device) for split in dataset.lists if split != "train"}
    mixing = create_mixing(config, dataset.num_classes)
    loss_fn = create_loss(config, dataset.images_per_class).to(device)
    optimizer = create_optimizer(config, model)
    scheduler = create_scheduler(config, optimizer)
    ema = create_ema(config, model)
    if config.torchcompile:
        model.compile()
    prepared, optimizer = accelerator.prepare(model, optimizer)
    state = TrainState(model, ema, optimizer, accelerator.scaler, dataset.num_classes)

    def measure(split: str, epochs_done: int) -> Evaluation:
        with state.evaluated.normalized_classifier(config.tau):
            accuracies = evaluate(state.evaluated, eval_loaders[split], accelerator, dataset.num_classes, split)
        settings = {"epoch": epochs_done, "tau": config.tau, "eval_branch_at": config.eval_branch_at}
        return Evaluation(accuracies, dataset, split, config, settings)

    with checkpoint.open_run(config, resolved.recipe, resolved.paper) as run:
        # Where to start: at epoch 0, or behind the newest checkpoint that verifies
        start = 0
        if config.resume:
            found, skipped = checkpoint.to_resume(run, config, dataset.num_classes)
            for reason in skipped:
                say(f"skipped: {reason}")
            start = state.restore(found) if found else 0
        summary = report.Summary(run, start)
        print(report.opening(run, dataset, config, costs, images.size, device, start))
        if config.log_with:
            accelerator.init_trackers(config.experiment)

        # Epochs
        results = {}
        for epoch in range(start, config.epochs):
            scheduler.step(epoch)
            stats = train_epoch(
                prepared,
                loader,
                loss_fn,
                optimizer,
                accelerator,
                epoch=epoch,
                seed=config.seed,
                mixing=mixing,
                clip_grad=config.clip_grad,
                ema=ema,
                title=f"epoch {epoch + 1}/{config.epochs}",
            )
            is_due = (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs
            results = {split: measure(split, epoch + 1) for split in splits if is_due}
            print(summary.add(epoch, optimizer.param_groups[0]["lr"], stats, results), flush=True)
            accelerator.log(summary.rows[-1], step=epoch)
            checkpoint.save(
                run,
                state,
                config,
                epochs_done=epoch + 1,
                steps_done=(epoch + 1) * len(loader),
                is_best=summary.last_is_best("val_all"),
            )
            checkpoint.prune(run, config.checkpoint_hist)

        # Final tables: the last epoch, and the best on the validation list where there is one
        final = next((split for split in ("test", "val") if split in eval_loaders), None)
        if final:
            outcomes = [results.get(final) or measure(final, config.epochs)]
            best = checkpoint.find(run)
            if best.epochs_done < config.epochs:
                best.load_evaluated(state.evaluated)
                outcomes.append(measure(final, best.epochs_done))
            print(report.conclude(run, outcomes, summary, resolved.paper))
        accelerator.end_training()


if __name__ == "__main__":
    main()
