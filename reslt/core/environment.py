"""Messages for faults of the machine that a command runs on, each with a remedy, in place of a library's traceback."""

from __future__ import annotations

import errno
import os
import re
import sys

SHARED_MEMORY = (
    "the workers that decode images lack shared memory: enlarge /dev/shm (docker run --shm-size=8g), or give "
    "--workers 0"
)
OPEN_FILES = "too many open files: raise the limit (`ulimit -n 65536`), or lower --workers"
MEMORY = "the machine's memory is used up: lower --workers or the batch size, or end other programs"
DEVICE_MEMORY = (
    "the device's memory is used up: in training, raise --grad-accum-steps (the same batch in smaller parts) or lower "
    "--batch-size; in evaluation, lower --batch-size; or end other programs on the device"
)
THREADS = "no further thread or process can be started: raise the limit (`ulimit -u`, docker run --pids-limit)"
WORKER_ENDED = f"a worker that decodes images ended; see its message. If there is none, {MEMORY}"
NO_HOME = (
    "this user has no home folder: set RESLT_CACHE to a folder for files that can be recreated, and HOME for other "
    "packages"
)

# (name of the exception's type or of one of its bases, pattern in its text, cause and remedy)
KNOWN = [
    ("OutOfMemoryError", "", DEVICE_MEMORY),  # torch's
    ("RuntimeError", r"DataLoader worker .*Bus error", SHARED_MEMORY),
    ("Exception", r"Too many open files|items of ancdata", OPEN_FILES),
    ("Exception", r"</torch_\d+|torch_shm_manager|shared memory\(shm\)", SHARED_MEMORY),
    ("RuntimeError", r"DataLoader worker .*(killed by signal|exited)", WORKER_ENDED),
    ("RuntimeError", r"DefaultCPUAllocator|alloc_cpu|[Cc]annot allocate memory", MEMORY),
    ("MemoryError", r"^$|Unable to allocate|bad_alloc", MEMORY),
    ("RuntimeError", r"can't start new thread", THREADS),
    ("OSError", r"Resource temporarily unavailable", THREADS),  # from starting a process
    ("RuntimeError", r"home directory", NO_HOME),
    ("Exception", r"No usable temporary directory", "there is no folder for temporary files: set TMPDIR to one"),
]
OF_SYSTEM = {
    errno.EMFILE: OPEN_FILES,
    errno.ENFILE: OPEN_FILES,
    errno.ENOMEM: MEMORY,
}


def explained(fault: BaseException) -> str | None:
    """Return a message for an error that the environment caused, such as a full disk. Return None for any other error: it
    may be a bug, and needs its traceback."""
    text = str(fault)
    bases = {kind.__name__ for kind in type(fault).__mro__}
    number = fault.errno if isinstance(fault, OSError) else None
    message = OF_SYSTEM.get(number) or next(
        (known for base, pattern, known in KNOWN if base in bases and re.search(pattern, text)), None
    )
    if message:
        return f"{message} ({_reason(text)})" if text else message
    if not isinstance(fault, OSError) or number is None:
        return None
    if fault.filename is not None:  # no such folder, no permission, disk full
        return f"{fault.filename}: {fault.strerror}"
    if number == errno.ENOSPC:
        return f"standard output, or another file, cannot be written: {fault.strerror}; free some space"
    if number == errno.ENOENT and not _has_current_folder():
        return "the current folder no longer exists; change to another one"
    return None


def _reason(text: str) -> str:
    """Return the line that states the error: the last one of a worker's traceback, else the first."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return (lines[-1] if "Traceback" in text else lines[0])[:200]


def _has_current_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def mend_standard_streams() -> None:
    """Make every text printable: escape characters that the streams' encoding lacks, and redirect streams that were closed
    before the start to the null device, so that no other file takes their place."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  for the rest of the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
