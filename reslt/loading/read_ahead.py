"""Reading of a pack's shards into the system's page cache while training begins: a network disk delivers long pieces in
order many times as fast as single images in shuffled order."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import psutil
from filelock import FileLock

from reslt.core.log import logger
from reslt.data.shards import Pack

SHARE = 0.5  # the share of the free memory that shards may fill
PIECE = 16 << 20  # bytes


def read_ahead(pack: Pack, free: int | None = None) -> threading.Thread | None:
    """Start a thread that reads all shards once, in order, and return it. Return None if another process of this machine is
    reading them or, with a message, if they would fill more than SHARE of the free memory (`free` bytes; None: measured)."""
    free = psutil.virtual_memory().available if free is None else free
    sizes = [status.st_size if (status := pack.status(shard)) else 0 for shard in range(len(pack.shards))]
    if sum(sizes) > SHARE * free:
        logger.info(
            f"{pack.folder}: the shards ({sum(sizes) / 1e9:.1f} GB) are not read ahead, since they exceed {SHARE:.0%} of the "
            f"free memory ({free / 1e9:.1f} GB): every epoch reads them from the disk, image by image"
        )
        return None
    place = hashlib.sha256(os.fsencode(pack.folder.resolve())).hexdigest()[:16]
    # In the machine's own folder: beside the shards, on a network disk, the lock would be one for all machines
    user = os.getuid() if hasattr(os, "getuid") else 0
    lock = FileLock(Path(tempfile.gettempdir()) / f"reslt-{user}-{place}.lock", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except (OSError, NotImplementedError):  # Timeout is an OSError
        return None
    thread = threading.Thread(target=_read, args=(pack, sizes, lock), name="read ahead", daemon=True)
    thread.start()
    return thread


def _read(pack: Pack, sizes: list[int], lock: FileLock) -> None:
    try:
        with suppress(OSError):  # loading the image reports it
            for shard, size in enumerate(sizes):
                for offset in range(0, size, PIECE):
                    pack.read(shard, offset, min(PIECE, size - offset))
    finally:
        lock.release()
