"""Runs of two processes, of which one or all are killed."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import psutil

from reslt.runs import folder as run_folder
from tests.chaos.ground import Findings, Ground
from tests.chaos.trial import LONGEST, TERM, Process, Trial, ended, kill, launch


def two_processes(launcher: str) -> list[str]:
    """Return the start of a command that trains with two processes on the CPU."""
    if launcher == "torchrun":
        return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--num_cpu_threads_per_process", "1",
    ]  # fmt: skip


class TwoProcesses(Trial):
    """A trial whose run is one of two processes."""

    launcher = "torchrun"

    def start(self, *more: str, plain: bool = True, first: Callable[[], None] = lambda: None) -> Process:
        """Start a launcher in a new process; it starts the two that train."""
        self.lives += 1
        self.log = self.folder / f"log-{self.lives}"
        arguments = ["train.py", *self.ground.flags, "--output", str(self.run.parent), *more]
        return launch([*two_processes(self.launcher), *arguments], self.log)

    def ranks(self, process: Process) -> list[psutil.Process]:
        """Return the processes that train."""
        try:
            children = psutil.Process(process.pid).children()
            return [child for child in children if any(part.endswith("train.py") for part in child.cmdline())]
        except psutil.Error:
            return []

    def has_entered(self, process: Process, timeout: float = LONGEST) -> bool:
        """Wait until both ranks train, which a new checkpoint shows; return False if the launcher ends first."""
        before, end = run_folder.newest_first(self.run), time.monotonic() + timeout
        while time.monotonic() < end and process.poll() is None:
            if run_folder.newest_first(self.run) != before and len(self.ranks(process)) == 2:
                return True
            time.sleep(0.01)
        return False


@contextmanager
def watched_tree(process: Process) -> Iterator[Process]:
    """Kill a launcher and all that it started at the end of the block; ranks have process groups of their own."""
    try:
        yield process
    finally:
        end_tree(process)


def end_tree(process: Process) -> None:
    """SIGKILL a process and all its descendants."""
    try:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.Error:
        tree = []
    for member in tree:
        if_alive(member.kill)
    kill(process)
    psutil.wait_procs(tree, timeout=LONGEST)


def if_alive(act: Callable[[], None]) -> None:
    """Do something to a process that may have ended."""
    try:
        act()
    except psutil.Error:
        return


def disturbed_pair(ground: Ground, how: str, launcher: str, seed: int) -> Findings:
    """Kill one or all of two processes, or send their launcher a SIGTERM; then resume the run."""
    with TwoProcesses(ground, f"two processes ({launcher}), {how}", seed) as trial:
        trial.launcher = launcher
        trial.findings.counts["pairs"] += 1
        with watched_tree(trial.start()) as process:
            if not trial.has_entered(process):
                trial.fault(f"no training: exit code {process.poll()}")
                return trial.findings
            ended(process, trial.random.uniform(0, ground.training / 2))
            ranks = trial.ranks(process)
            if how == "SIGTERM of the launcher":
                os.kill(process.pid, TERM)
            elif how == "SIGKILL of one":
                if_alive(trial.random.choice(ranks).kill)
            else:
                for rank in ranks:
                    if_alive(rank.kill)
            is_ended = ended(process, 60)
            trial.history.append(f"{how}: the launcher ended with {process.returncode}")
        if not is_ended:
            trial.fault("the launcher did not end within 60 s")
        if how.startswith("SIGTERM") and process.returncode and "stopped by SIGTERM" not in trial.output:
            is_ended = trial.fault("no process reports an orderly stop")
        with watched_tree(trial.start()) as process:
            is_equal = trial.has_ended_well(process, counted="paired runs")
        trial.findings.counts["pairs survived"] += is_equal and is_ended
        return trial.findings


def with_two_processes(ground: Ground, seed: int, say: Callable[[str], None]) -> Findings:
    """Train with two processes, undisturbed and then disturbed, one run after the other, since each takes two cores."""
    findings = Findings()
    ground = replace(ground, reference=ground.work / "reference of two")
    with TwoProcesses(ground, "two processes, undisturbed", seed) as trial, watched_tree(trial.start()) as process:
        trial.has_entered(process)
        entered = time.monotonic()
        if not ended(process, LONGEST) or process.returncode:
            trial.fault(f"exit code {process.returncode}")
            return trial.findings
        ground = replace(ground, training=time.monotonic() - entered)
        trial.run.rename(ground.reference)
    for i, how in enumerate(("SIGKILL of one", "SIGTERM of the launcher", "SIGKILL of all") * 2):
        findings += disturbed_pair(ground, how, ("torchrun", "accelerate launch")[i % 2], seed + i)
        say(f"two processes: {findings.counts['pairs survived']} of {findings.counts['pairs']}")
    return findings
