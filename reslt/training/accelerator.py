"""Setup of device and processes through Accelerate, with clear errors for its pitfalls."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import broadcast_object_list, gather_object

from reslt.config.schema import DEFAULTS
from reslt.core.cpu import available_cores
from reslt.core.errors import UserError
from reslt.core.log import logger, warn_once
from reslt.core.ranks import launched_processes, let_collectives_end, local_main_process_name
from reslt.core.waiting import PATIENCE_SECONDS, Wait

T = TypeVar("T")
DIVIDE_MODELS = {
    "ACCELERATE_USE_FSDP": "--use_fsdp",
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config",
}  # environment variables that `accelerate launch` sets for these flags
TIMEOUT_LEEWAY = (
    30  # seconds by which the backend's limit exceeds --ddp-timeout, so that our clearer message comes first
)

# Newer versions of torch call it forward_sync_buffers, which Accelerate cannot pass on yet.
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)


def create_accelerator(
    mixed_precision: str,
    log_with: str | None = None,
    project_dir: Path | None = None,
    *,
    ddp_timeout: int = DEFAULTS["ddp_timeout"],
    settings: Mapping[str, object] | None = None,
) -> Accelerator:
    """Set up device, precision and processes. `ddp_timeout`: seconds that a process waits for the others; `settings`:
    those that all processes must share.

    Raises UserError if the device does not support the precision, if Accelerate would divide the model or run other
    processes than those that were launched, and, on all processes, if their settings differ."""
    for variable, flag in DIVIDE_MODELS.items():
        if os.environ.get(variable, "").lower() == "true":
            raise UserError(
                f"accelerate launch {flag} ({variable}={os.environ[variable]}): checkpoints and moving averages need the "
                "whole model in each process, and this divides it; launch without it, or see docs/scale.md"
            )
    launched = launched_processes()
    if launched == 1 and os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ:
        raise UserError(
            "`accelerate launch --cpu` starts one process regardless of --num_processes; for several on CPUs: "
            "`accelerate launch --multi_gpu --num_processes 2 train.py ...`, without --cpu (for one: --num_processes 1, "
            "and MASTER_ADDR unset)"
        )
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", launched))
    if on_this_machine > 1 and torch.cuda.is_available() and on_this_machine > torch.cuda.device_count():
        raise UserError(
            f"{on_this_machine} processes were launched on a machine with {torch.cuda.device_count()} GPUs; "
            f"use `accelerate launch --num_processes {torch.cuda.device_count()} train.py ...` (one process per GPU)"
        )
    buffers = DistributedDataParallelKwargs(broadcast_buffers=False)  # each process keeps its own BatchNorm statistics
    cpu = launched > 1 and not torch.cuda.is_available()  # else Accelerate would not join the processes
    if launched > 1:
        _connect(launched, cpu, ddp_timeout)
    refuse_differences(settings or {}, "setting")
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=mixed_precision,
            log_with=log_with,
            project_dir=project_dir,
            kwargs_handlers=[buffers],
        )
    except (ValueError, RuntimeError) as fault:
        raise UserError(f"--mixed-precision {mixed_precision}: {fault}; use no or bf16") from None
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed-precision fp16: it requires a GPU, and this run is on the CPU; use no or bf16")
    if mixed_precision == "bf16" and accelerator.device.type == "cpu" and not _cpu_multiplies_bf16():
        logger.warning(
            "--mixed-precision bf16: this CPU has no bf16 arithmetic, so it will be slower than --mixed-precision no"
        )
    cores = available_cores()
    if (
        accelerator.device.type == "cpu"
        and torch.get_num_threads() == 1 < cores // on_this_machine
        and "ACCELERATE_MIXED_PRECISION" in os.environ
    ):
        logger.warning(
            f"`accelerate launch` limits torch to 1 of {cores} CPU cores per process; "
            f"`accelerate launch --num_cpu_threads_per_process {cores // on_this_machine} ...` uses all of them"
        )
    return accelerator


def _connect(launched: int, cpu: bool, ddp_timeout: int) -> None:
    """Connect the launched processes; Accelerate uses their connection. Raises UserError if it cannot."""
    Wait.limit_seconds = ddp_timeout
    remedy = f"launch with `accelerate launch --multi_gpu --num_processes {launched} train.py ...`"
    try:
        with Wait("the other processes to start"):
            state = PartialState(cpu=cpu, timeout=timedelta(seconds=ddp_timeout + TIMEOUT_LEEWAY))
    except (ValueError, RuntimeError) as fault:
        raise UserError(f"WORLD_SIZE is {launched}, but the processes cannot connect: {fault}; {remedy}") from None
    if state.num_processes != launched:
        raise UserError(f"WORLD_SIZE is {launched}, but Accelerate runs {state.num_processes}; {remedy}")


def refuse_differences(values: Mapping[str, object], kind: str) -> None:
    """Raise UserError, on all processes, if these named values differ between processes. `kind`: their noun."""
    if launched_processes() == 1:
        return
    with Wait(f"the other processes to compare {kind}s"):
        of_all = gather_object([dict(values)])
    faults = []
    for name in dict.fromkeys(name for of_one in of_all for name in of_one):
        texts = [repr(of_one[name]) if name in of_one else "unknown" for of_one in of_all]
        others = [rank for rank, text in enumerate(texts) if text != texts[0]]
        if others:
            more = f" and {len(others) - 1} more" * (len(others) > 1)
            faults.append(f"{name}: {texts[0]} in process 0, {texts[others[0]]} in process {others[0]}{more}")
    if faults:
        raise UserError(
            f"the processes of this run were started with different {kind}s ({'; '.join(faults)}); start all of them "
            "with the same ones"
        )


def on_every_process(find: Callable[[], T], what: str = "the dataset") -> T:
    """Run `find`, which reads `what`, on every process and return its result. If it raises UserError on any process, all
    processes raise the error of the first such process, so that none is left waiting."""
    if launched_processes() == 1:
        return find()
    found, text = None, None
    try:
        found = find()
    except UserError as fault:
        text = str(fault)
    with Wait(f"the other processes to read {what}"):
        texts = gather_object([text])
    if not any(texts):
        return found
    rank = next(rank for rank, text in enumerate(texts) if text)
    raise UserError(texts[rank] if len(set(texts)) == 1 else f"process {rank}: {texts[rank]}")


@contextmanager
def local_main_process_first(accelerator: Accelerator, doing: str) -> Iterator[None]:
    """Let the first process of each machine run the block before the others, which wait for it. `doing` describes the
    block in messages, for example 'decoding images'."""
    is_first = accelerator.is_local_main_process
    if not is_first:
        with Wait(f"{local_main_process_name()}, which is {doing}"):
            accelerator.wait_for_everyone()
    yield
    if is_first:
        wait_for_everyone(accelerator)


def wait_for_everyone(accelerator: Accelerator) -> None:
    """Wait until all processes have called this."""
    with Wait("the other processes"):
        accelerator.wait_for_everyone()


def broadcast_from_main(
    find: Callable[[], T],
    accelerator: Accelerator,
    doing: str = "preparing the run",
    patience: float = PATIENCE_SECONDS,
) -> T:
    """Run `find` on the main process and broadcast its result, UserError or OSError, so that no process is left waiting.
    `doing` describes it in messages, for example 'writing a checkpoint'. After a stop signal, the other processes wait
    `patience` seconds for it."""
    found, raised = None, None
    if accelerator.is_main_process:
        try:
            found = find()
        except (UserError, OSError) as fault:
            raised = fault
    with Wait(f"process 0, which is {doing}" if not accelerator.is_main_process else "the other processes", patience):
        found, text = broadcast_object_list([found, None if raised is None else str(raised)])
    if text is not None:
        raise raised or UserError(text)
    return found


def end_training(accelerator: Accelerator) -> None:
    """End the trackers and the process group. If a tracker fails (no network, a full disk), only its record suffers."""
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as fault:
            warn_once(
                "trackers", f"--log-with {tracker.name}: {type(fault).__name__}: {fault}; its record may lack values"
            )
    accelerator.trackers = []
    with Wait("the other processes to end"):
        let_collectives_end()
        accelerator.end_training()


def _cpu_multiplies_bf16() -> bool:
    """Return whether the CPU has bf16 arithmetic. Asks private functions of torch; True if torch no longer has them."""
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, question, lambda: True)() for question in questions)
