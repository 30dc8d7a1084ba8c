"""Every benchmark but that of ten million lines, one after the other, each in a process of its own: `make bench`."""

import subprocess
import sys
import time

NAMES = ("step", "loader", "auto_augment", "inference", "end_to_end", "cifar_run")


def main() -> None:
    """Ends with the first one's exit code that is not 0."""
    start, failed = time.perf_counter(), 0
    for name in NAMES:
        print(f"--- python -m tests.benchmarks.{name}", flush=True)
        failed = failed or subprocess.run([sys.executable, "-m", f"tests.benchmarks.{name}"]).returncode
        print(flush=True)
    print(f"{len(NAMES)} benchmarks in {time.perf_counter() - start:.0f} s")
    sys.exit(failed)


if __name__ == "__main__":
    main()
