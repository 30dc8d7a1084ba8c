"""Signals that ask a run to stop."""

import os
import re
import signal
import time

from reslt.runs import folder as run_folder
from tests.chaos.ground import Findings, Ground, differences
from tests.chaos.trial import STOPPED_WITHIN, Trial, ended, watched


def signaled(ground: Ground, number: int, seed: int, plain: bool) -> Findings:
    """Send a run a signal that asks it to stop, at a random moment; then resume it."""
    name = signal.Signals(number).name
    with Trial(ground, f"{name}, started {'as users do' if plain else 'by fork'}", seed) as trial:
        counts = trial.findings.counts
        with watched(trial.start(plain=plain)) as process:
            if plain and seed % 4 == 3:
                wait = trial.random.uniform(0.2, ground.startup)
                ended(process, wait)
            else:
                wait = trial.random.uniform(0, ground.training * 0.9)
                trial.has_entered(process)
                ended(process, wait)
            if process.poll() is None:
                trial.history.append(f"{name} {wait:.3f} s in")
                counts["signals"] += 1
                os.kill(process.pid, number)
                sent = time.monotonic()
                is_fine = ended(process, STOPPED_WITHIN)
                if not is_fine:
                    trial.fault(f"alive {STOPPED_WITHIN:.0f} s after {name}")
                trial.history.append(f"ended {time.monotonic() - sent:.2f} s later with {process.returncode}")
                is_late = process.returncode in (0, -number) and not differences(trial.run, ground.reference)
                codes = {128 + number, -number}  # negative if the signal comes before or after our code runs
                if is_fine and not is_late and process.returncode not in codes:
                    is_fine = trial.fault(f"exit code {process.returncode}, expected {128 + number}")
                if is_fine and "Traceback" in trial.output:
                    is_fine = trial.fault("a traceback")
                if is_fine and not is_late and "\nmethod " in trial.output:
                    is_fine = is_orderly_stop(trial, name)
                counts["signals obeyed"] += is_fine
        trial.ends_well(counted="signaled runs")
        return trial.findings


def is_orderly_stop(trial: Trial, name: str) -> bool:
    """Return whether a process that began to train reports its stop, and has a checkpoint of the step that it reports."""
    report = re.search(
        rf"stopped by ({name}|Ctrl-C) (while evaluating|in epoch (\d+), \w+ step (\d+) of (\d+))", trial.output
    )
    if not report:
        return trial.fault(f"no line `stopped by {name} ...`")
    newest = run_folder.newest_first(trial.run)[0].name
    if report[3]:
        epoch, step, steps = map(int, report.groups()[2:])
        if not newest.endswith(f"-{(epoch - 1) * steps + step}"):
            return trial.fault(f"the newest checkpoint is {newest}")
    return True
