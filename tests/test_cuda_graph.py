"""The training step as one recorded graph. No GPU is needed: a recorder that captures every torch operation and replays it
into the same memory obeys the rules of a CUDA graph (values that the host computes while recording stay fixed)."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from builders import loss_of, mixing_of, model_of, optimizer_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from reslt.config.schema import Config
from reslt.config.stages import stages_of
from reslt.core.batch_shard import BatchShard
from reslt.core.log import log_to_console
from reslt.methods.losses import LossWithFeatures
from reslt.training import cuda_graph
from reslt.training.cuda_graph import REHEARSALS, GraphedStep, step_kind, why_not_graphable
from reslt.training.step import TrainStep

COUNTS = np.array([9, 5, 2])
BASE = Config.of(
    model="cifar_resnet20", model_kwargs={"channels": (8, 16, 32)}, branch="bn", batch_size=8, lr=0.1, nesterov=True
)


@pytest.fixture(autouse=True)
def console() -> None:
    """Warnings are printed, as in a command."""
    log_to_console()


class Tape(TorchDispatchMode):
    """A recorder of torch's operations: `record` runs and captures them, `replay` runs them again."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, out))
        return out

    def rehearse(self, run):
        return run()

    def record(self, run):
        with self:
            return run()

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():
            for operation, args, kwargs, out in self.calls:
                given = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if is_tensor(t)}
                made = [t for t in tree_flatten(out)[0] if is_tensor(t) and t.untyped_storage().data_ptr() not in given]
                if not made and not operation._schema.is_mutable:
                    continue  # a view of memory that is kept
                again = [t for t in tree_flatten(operation(*args, **kwargs))[0] if is_tensor(t)]
                for old, new in zip([t for t in tree_flatten(out)[0] if is_tensor(t)], again, strict=True):
                    if any(old is t for t in made):
                        old.copy_(new)


class RestoringTape(Tape):
    """A tape whose recording changes nothing, like a CUDA graph's: it restores the model and the optimizer."""

    def __init__(self, model, optimizer):
        super().__init__()
        self.model, self.optimizer = model, optimizer

    def record(self, run):
        changed = [*self.model.state_dict().values()]
        changed += [state["momentum_buffer"] for state in self.optimizer.state.values() if state]
        before = [t.clone() for t in changed]
        try:
            return super().record(run)
        finally:
            with torch.no_grad():
                for tensor, value in zip(changed, before, strict=True):
                    tensor.copy_(value)


def is_tensor(value) -> bool:
    return isinstance(value, torch.Tensor)


def step_of(kind: type[TrainStep], config: Config) -> tuple[TrainStep, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = model_of(config, 3).train()
    mixing = mixing_of(config, 3)
    optimizer = optimizer_of(config, model)
    optimizer.param_groups[0]["fused"], optimizer.param_groups[0]["foreach"] = True, False
    shard = BatchShard(config.optim.batch_size, paired=mixing is not None)
    loss, alone = loss_of(config, COUNTS, model), Accelerator(cpu=True)
    model.gives_features = isinstance(loss, LossWithFeatures)
    step = kind(
        model,
        loss,
        optimizer,
        alone,
        shard,
        lambda x: x.float() / 64 - 2,
        5,
        mixing,
        config.optim.clip_grad,
        sam=config.optim.sam,
    )
    return step, optimizer


def batch(number: int, views: int = 1) -> list:
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (8 * views, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return [(images, torch.randint(0, 3, (8,), generator=generator))]


def graphed(config: Config) -> tuple[GraphedStep, torch.optim.Optimizer]:
    cuda_recorder = cuda_graph.GraphedStep.__dataclass_fields__["recorder"]
    assert cuda_recorder.default_factory is cuda_graph.CudaRecorder
    step, optimizer = step_of(lambda *values, sam: GraphedStep(*values, sam=sam, recorder=Tape()), config)
    step.recorder = RestoringTape(step.model, optimizer)
    return step, optimizer


CASES = {
    "reslt": BASE,
    "mixup and CutMix by element": BASE.changed(mixup=0.4, cutmix=1.0, mixup_mode="elem"),
    "mixup by batch, clipped, smoothed": BASE.changed(mixup=1.0, clip_grad=0.5, smoothing=0.1),
    "cross-entropy, no momentum": BASE.changed(method="ce", momentum=0.0, nesterov=False),
    "conv branches": BASE.changed(branch="conv"),
    "experts": BASE.changed(experts=2),
    "diversity, weights": BASE.changed(
        method="ride", stages=(), experts=2, mutual="tempered_diversity", mutual_weight=-0.5, class_weights="effective"
    ),
    "pairs": BASE.changed(method="bbn", second_sampler="reversed", batch_size=4),
    "sharpness-aware": BASE.changed(sam=0.3, mixup=0.4, clip_grad=0.5),
    "views, estimates of epochs of five steps": BASE.changed(method="proco", lr=0.01),
}


@pytest.mark.parametrize("case", CASES)
def test_recorded_steps_end_with_the_weights_of_ordinary_steps(case):
    """Each step has its own images, labels, mixing and learning rate; losses and hits are compared step by step."""
    config = CASES[case]
    (ordinary, by_hand), (recorded, optimizer), windows = step_of(TrainStep, config), graphed(config), []
    for number in range(REHEARSALS + 4):
        for group in (*by_hand.param_groups, *optimizer.param_groups):
            group["lr"] = 0.1 / (1 + number)
        if number % 5 == 0:
            ordinary.begin_epoch(), recorded.begin_epoch()
        given, same = (batch(number, config.method.views_in_training) for _ in range(2))
        expected, outputs = ordinary.update(same, number), recorded.update(given, number)
        torch.testing.assert_close(outputs[0], expected[0], rtol=1e-5, atol=1e-6)
        assert outputs[1] == expected[1]
        rates = [group["lr"] for group in optimizer.param_groups]
        assert (rates, type(rates[0])) == ([0.1 / (1 + number)], float)  # not the graph's tensor
        windows.append((given, same))
    for (given,), (same,) in windows:  # they may be views of a block of batches, so nothing may be written into them
        assert all(torch.equal(a, b) for a, b in zip(given, same, strict=True))
    assert recorded.recording is not None
    assert len(recorded.recorder.calls) > 300
    for (name, value), other in zip(
        ordinary.model.state_dict().items(), recorded.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_step_that_the_host_reads_from_is_not_recorded_and_training_continues(capsys):
    """An optimizer step that is not fused reads the learning rate back: the recording fails and ordinary
    steps follow; one line reports why."""
    (ordinary, by_hand), (recorded, optimizer) = step_of(TrainStep, BASE), graphed(BASE)
    for group in (*by_hand.param_groups, *optimizer.param_groups):
        group["fused"], group["foreach"] = False, True
    for number in range(REHEARSALS + 3):
        expected, outputs = ordinary.update(batch(number), number), recorded.update(batch(number), number)
        assert torch.equal(outputs[0], expected[0])
    assert recorded.has_failed
    assert recorded.recording is None
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]
    (warning,) = capsys.readouterr().err.splitlines()
    assert "--cuda-graph: the step cannot be recorded (operation not permitted when stream is capturing)" in warning


def test_a_recorded_step_uses_the_dropout_seed_of_its_own_step(monkeypatch):
    """A CUDA graph reads the generator's seed at its launch, so each replay sets it as an ordinary step does."""
    seeds = {"ordinary": [], "recorded": []}
    for kind, (step, _) in {"ordinary": step_of(TrainStep, BASE), "recorded": graphed(BASE)}.items():
        for module in ("reslt.training.step", "reslt.training.cuda_graph"):
            monkeypatch.setattr(f"{module}.seed_dropout", lambda seed, device, kind=kind: seeds[kind].append(seed))
        for number in range(REHEARSALS + 3):
            step.update(batch(number), number)
    assert len(set(seeds["ordinary"])) == REHEARSALS + 3
    assert seeds["recorded"] == seeds["ordinary"]


def test_dropout_that_both_passes_of_a_sharpness_aware_step_share_rules_out_a_recording(capsys):
    """A graph reads one seed, at its launch, but the second pass repeats the first one's dropout."""
    config = BASE.changed(sam=0.3, drop=0.5)
    (ordinary, _), (recorded, _) = step_of(TrainStep, config), graphed(config)
    for number in range(REHEARSALS + 2):
        expected, outputs = ordinary.update(batch(number), number), recorded.update(batch(number), number)
        assert torch.equal(outputs[0], expected[0])
    assert recorded.recording is None
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 1
    assert "--sam repeats the dropout of the first pass" in warned[0]


def accelerator_on(device: str, processes: int = 1, mixed_precision: str = "no") -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device), num_processes=processes, mixed_precision=mixed_precision)


ON_GPU, ON_TWO_GPUS, ON_CPU = accelerator_on("cuda"), accelerator_on("cuda", 2), accelerator_on("cpu")


def sgd(**settings) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, **settings)


@pytest.mark.parametrize(
    ("accelerator", "optimizer", "micro_batches", "reason"),
    [
        (ON_GPU, sgd(fused=True), 1, None),
        (accelerator_on("cuda", mixed_precision="bf16"), sgd(fused=True), 1, None),
        (ON_CPU, sgd(), 1, "there is no CUDA device"),
        (ON_TWO_GPUS, sgd(fused=True), 1, "several processes"),
        (ON_GPU, sgd(fused=True), 2, "--grad-accum-steps"),
        (accelerator_on("cuda", mixed_precision="fp16"), sgd(fused=True), 1, "loss scaler"),
        (ON_GPU, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]), 1, "AdamW does not read"),
        (ON_GPU, sgd(), 1, "SGD does not read"),
    ],
)
def test_what_rules_out_a_graph_is_named(accelerator, optimizer, micro_batches, reason):
    found = why_not_graphable(accelerator, optimizer, micro_batches)
    assert found == reason if reason is None else reason in found


def test_auto_takes_a_graph_if_the_images_are_on_the_device_and_on_says_why_not(capsys):
    optimizer = sgd(fused=True)
    assert step_kind("auto", ON_GPU, optimizer, is_resident=True) is GraphedStep
    assert step_kind("auto", ON_GPU, optimizer, is_resident=False) is TrainStep
    assert step_kind("auto", ON_CPU, optimizer, is_resident=True) is TrainStep
    assert capsys.readouterr().err == ""
    assert step_kind("auto", ON_TWO_GPUS, optimizer, is_resident=True) is TrainStep
    assert "--cuda-graph auto: not used, several processes" in capsys.readouterr().err
    assert step_kind("on", ON_GPU, optimizer, is_resident=False) is GraphedStep
    assert step_kind("on", ON_TWO_GPUS, optimizer, is_resident=True) is TrainStep
    assert "--cuda-graph on: not used, several processes" in capsys.readouterr().err
    assert step_kind("on", ON_GPU, optimizer, micro_batches=2) is TrainStep
    assert "--cuda-graph on: not used, --grad-accum-steps" in capsys.readouterr().err
    assert step_kind("off", ON_GPU, optimizer, is_resident=True) is TrainStep


def test_a_recording_that_fails_leaves_the_stream_and_the_memory_as_they_were(monkeypatch, capsys):
    """After a failed recording the exit of torch.cuda.graph raises too. The error before it is the reason to report, the
    recording's stream must not stay current, and the graph's memory must be released."""
    outputs = []

    @contextmanager
    def graph(recorded, stream, capture_error_mode):
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    cuda = SimpleNamespace(
        CUDAGraph=lambda: SimpleNamespace(reset=lambda: outputs.append("reset")),
        Stream=lambda: "of the recording",
        current_stream=lambda: "current",
        set_stream=outputs.append,
        graph=graph,
    )
    step, _ = step_of(lambda *values, sam: GraphedStep(*values, recorder=Tape(), rehearsals=0), BASE)
    monkeypatch.setattr(cuda_graph.torch, "cuda", cuda)
    step.recorder = cuda_graph.CudaRecorder()
    step.optimizer.step = lambda: (_ for _ in ()).throw(RuntimeError("operation not permitted"))
    with monkeypatch.context() as patched:
        patched.setattr(step, "compute", lambda inputs: step.optimizer.step())
        step._record(step.inputs(batch(0), 0))
    assert outputs == ["current", "reset"]
    assert step.has_failed
    assert "the step cannot be recorded (operation not permitted); continuing without it" in capsys.readouterr().err


@pytest.mark.parametrize("is_resident", [True, False])
def test_whether_images_are_resident_reaches_the_choice_of_the_step(monkeypatch, is_resident):
    """Without a GPU every step is an ordinary one, so the test reads the arguments of the choice."""
    from reslt.training import setup

    asked = []
    monkeypatch.setattr(setup, "step_kind", lambda *arguments: asked.append(arguments) or TrainStep)
    optim, run = Config.of(grad_accum_steps=2).optim, Config.of(cuda_graph="auto").run
    model, alone, shard = torch.nn.Linear(2, 2), Accelerator(cpu=True), BatchShard(4, micro_batches=2)
    training = setup.Training(model, optim, run, alone, shard, lambda x: x, is_resident=is_resident)
    training.enter(stages_of(Config())[0], torch.nn.Identity())
    ((cuda_graph, *_, micro_batches, resident),) = asked
    assert (cuda_graph, micro_batches, resident) == ("auto", 2, is_resident)
