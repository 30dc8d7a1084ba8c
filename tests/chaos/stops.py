"""Signals that ask a run to stop."""

import os
import re
import signal
import time

from reslt.runs import folder as run_folder
from tests.chaos.ground import Findings, Ground, differences
from tests.chaos.trial import STOPPED_WITHIN, Trial, ended, watched


def signalled(ground: Ground, number: int, seed: int, plain: bool) -> Findings:
    """A signal that asks a run to stop, at a random moment; then the run is resumed."""
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
                trial.messages.append(f"{name} {wait:.3f} s in")
                counts["signals"] += 1
                os.kill(process.pid, number)
                sent = time.monotonic()
                is_fine = ended(process, STOPPED_WITHIN)
                if not is_fine:
                    trial.fault(f"alive {STOPPED_WITHIN:.0f} s after {name}")
                trial.messages.append(f"ended {time.monotonic() - sent:.2f} s later with {process.returncode}")
                is_late = process.returncode in (0, -number) and not differences(trial.run, ground.reference)
                as_shells_say = {128 + number, -number}  # the latter before Python runs our code, and after
                if is_fine and not is_late and process.returncode not in as_shells_say:
                    is_fine = trial.fault(f"exit code {process.returncode}, expected {128 + number}")
                if is_fine and "Traceback" in trial.output:
                    is_fine = trial.fault("a traceback")
                if is_fine and not is_late and "\nmethod " in trial.output:
                    is_fine = stopped_in_order(trial, name)
                counts["signals obeyed"] += is_fine
        trial.ends_well(counted="signalled runs")
        return trial.findings


def stopped_in_order(trial: Trial, name: str) -> bool:
    """Whether a process that had begun to train says that it stopped, and wrote a checkpoint where it says that it stopped."""
    said = re.search(
        rf"stopped by ({name}|Ctrl-C) (while evaluating|in epoch (\d+), \w+ step (\d+) of (\d+))", trial.output
    )
    if not said:
        return trial.fault(f"no line `stopped by {name} ...`")
    newest = run_folder.newest_first(trial.run)[0].name
    if said[3]:
        epoch, step, steps = map(int, said.groups()[2:])
        if not newest.endswith(f"-{(epoch - 1) * steps + step}"):
            return trial.fault(f"the newest checkpoint is {newest}")
    return True
