"""Every benchmark but that of ten million lines, one after the other, each in a process of its own: `make bench`. At the end
one table of their ratios and bars."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.rows import command_line, read_rows, summary, write_rows

PROJECT = Path(__file__).resolve().parents[2]
NAMES = (
    "step",
    "loader",
    "chain",
    "predict",
    "auto_augment",
    "inference",
    "end_to_end",
    "epoch_parts",
    "cifar_run",
    "streams",
)


def main(arguments: list[str] | None = None) -> None:
    """Ends with the exit code of the first one that failed; a bar that is not met is no failure."""
    given = command_line(__doc__).parse_args(arguments)
    start, failed, found = time.perf_counter(), 0, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            print(f"--- python -m tests.benchmarks.{name}", flush=True)
            file, begun = Path(folder) / f"{name}.json", time.perf_counter()
            command = [sys.executable, "-m", f"tests.benchmarks.{name}", "--json", str(file)]
            code = subprocess.run(command, cwd=PROJECT).returncode
            failed = failed or code
            messages = f"{name} (ended with {code})" if code else name
            found[messages] = [] if code else read_rows(file)
            print(f"({time.perf_counter() - begun:.0f} s)\n", flush=True)
    for line in summary(found):
        print(line)
    print(f"{len(NAMES)} benchmarks in {time.perf_counter() - start:.0f} s")
    write_rows([row for rows in found.values() for row in rows], given.json)
    sys.exit(failed)


if __name__ == "__main__":
    main()
