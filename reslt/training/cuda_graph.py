"""The training step as one CUDA graph: recorded once, then launched as a whole, so that the host launches one graph per
step instead of several hundred kernels.

It pays for small networks on small images, whose kernels the GPU runs faster than the host can launch them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from accelerate import Accelerator

from reslt.core.log import logger
from reslt.training.step import StepInputs, TrainStep, Window, has_drawn, seed_dropout

REHEARSALS = 3  # ordinary steps before the recording: kernels are chosen and compiled, momentum buffers created

Outputs = tuple[torch.Tensor, torch.Tensor]  # of `TrainStep.gradients`


class Recorder(Protocol):
    """Captures GPU work and replays it. A capture executes nothing."""

    def rehearse(self, run: Callable[[], Outputs]) -> Outputs: ...

    def record(self, run: Callable[[], Outputs]) -> Outputs: ...

    def replay(self) -> None: ...


class CudaRecorder:
    """A recorder that uses torch.cuda.CUDAGraph."""

    def __init__(self):
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def rehearse(self, run: Callable[[], Outputs]) -> Outputs:
        """Run on the stream that the recording will use."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = run()
        current.wait_stream(self.stream)
        return outputs

    def record(self, run: Callable[[], Outputs]) -> Outputs:
        before = torch.cuda.current_stream()
        try:
            # Other threads (the loader's, which pins memory) may continue to do what a capture forbids.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                return run()
        except BaseException:  # torch itself neither restores the stream nor frees the graph's memory
            torch.cuda.set_stream(before)
            self.graph.reset()
            raise

    def replay(self) -> None:
        self.graph.replay()


@dataclass
class Recording:
    """The memory that a recorded step reads and writes."""

    inputs: StepInputs  # the same memory at each step; its seeds are not used
    rates: list[torch.Tensor]  # learning rates, one per parameter group
    outputs: Outputs


@dataclass
class GraphedStep(TrainStep):
    """A step that is recorded after a few ordinary steps. Its weights are those of ordinary steps, up to rounding.

    If the recording fails, the reason is logged and all steps stay ordinary. The combination of `sam` and dropout is never
    recorded, since the two passes of a recorded step would draw different dropout."""

    recorder: Recorder = field(default_factory=CudaRecorder)
    rehearsals: int = REHEARSALS  # left to do
    recording: Recording | None = None
    is_recording: bool = False
    has_failed: bool = False
    repeats_dropout: bool = False  # with `sam`; known after a rehearsal

    def update(self, window: Window, step: int) -> Outputs:
        """Update as `TrainStep.update` does. The next step overwrites the outputs."""
        inputs = self.inputs(window, step)
        if self.rehearsals:
            self.rehearsals -= 1
            outputs = self.recorder.rehearse(lambda: self.compute(inputs))
            self.repeats_dropout = bool(self.sam) and has_drawn(inputs.seeds[-1], self.accelerator.device)
            return outputs
        if self.recording is None and not self.has_failed:
            self._record(inputs)
        if self.has_failed:
            return self.compute(inputs)
        for kept, new in zip(_tensors(self.recording.inputs), _tensors(inputs), strict=True):
            kept.copy_(new)
        for rate, group in zip(self.recording.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        seed_dropout(inputs.seeds[0], self.accelerator.device)
        self.recorder.replay()
        return self.recording.outputs

    def seed_pass(self, seed: int) -> None:
        """Seed, except while recording, when no generator can be seeded. A replay uses the seed set before it."""
        if not self.is_recording:
            super().seed_pass(seed)

    def _record(self, inputs: StepInputs) -> None:
        if self.repeats_dropout:
            return self._fail(
                "--sam repeats the dropout of the first pass, and a recorded generator cannot be seeded again"
            )
        window = [tuple(part.clone() for part in micro_batch) for micro_batch in inputs.window]
        mixes = None if inputs.mixes is None else [m.clone() for m in inputs.mixes]
        uniform = None if inputs.uniform is None else [u.clone() for u in inputs.uniform]
        kept, groups = StepInputs(window, mixes, uniform, inputs.seeds), self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        device = self.accelerator.device
        on_device = [torch.tensor(rate, dtype=torch.float32, device=device) for rate in rates]
        self.is_recording = True
        try:
            for group, rate in zip(groups, on_device, strict=True):
                group["lr"] = rate
            self.recording = Recording(kept, on_device, self.recorder.record(lambda: self.compute(kept)))
        except RuntimeError as fault:
            # Ending a failed recording raises another error, with the cause as its context.
            self._fail(" ".join(str(fault.__context__ or fault).split())[:200])
        finally:
            self.is_recording = False
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def _fail(self, reason: str) -> None:
        self.has_failed = True
        logger.warning(f"--cuda-graph: the step cannot be recorded ({reason}); continuing without it")


def _tensors(inputs: StepInputs) -> list[torch.Tensor]:
    return (
        [part for micro_batch in inputs.window for part in micro_batch] + (inputs.mixes or []) + (inputs.uniform or [])
    )


def why_not_graphable(accelerator: Accelerator, optimizer: torch.optim.Optimizer, micro_batches: int = 1) -> str | None:
    """Return the reason why a run's step cannot be one CUDA graph; None if it can."""
    plain = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
    if accelerator.device.type != "cuda":
        return "there is no CUDA device"
    if accelerator.num_processes > 1:
        return "several processes train together"
    if micro_batches > 1:
        return "--grad-accum-steps seeds dropout for each micro-batch"
    if accelerator.mixed_precision == "fp16":
        return "fp16's loss scaler inspects each step's gradients; bf16 has none"
    if type(plain) is not torch.optim.SGD or not plain.param_groups[0]["fused"]:
        return f"{type(plain).__name__} does not read its learning rate from the device, as --opt sgd does"
    return None


def step_kind(
    cuda_graph: str,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    micro_batches: int = 1,
    is_resident: bool = False,
) -> type[TrainStep]:
    """Return the kind of step for `--cuda-graph` auto, on or off. auto: a graph if it helps, that is, for resident images."""
    if cuda_graph == "off" or (cuda_graph == "auto" and not is_resident):
        return TrainStep
    reason = why_not_graphable(accelerator, optimizer, micro_batches)
    if reason and (cuda_graph == "on" or accelerator.device.type == "cuda"):
        logger.warning(f"--cuda-graph {cuda_graph}: not used, {reason}")
    return TrainStep if reason else GraphedStep
