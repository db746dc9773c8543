"""Child processes: pools of workers, and a lock so that one process of this machine measures time at once."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from threading import Thread


def pool(workers: int) -> ProcessPoolExecutor:
    """A pool of fresh processes (nothing is inherited), which end with this one, however it ends."""
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_with_parent)


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other process of this machine is in such a block: two that are timed would slow each other down.

    The lock is on the folder of temporary files, which is there anyway, so that no file is left behind.
    """
    folder = os.open(tempfile.gettempdir(), os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _end_with_parent() -> None:
    # Killed, a parent cannot close its pool, and the workers would wait for work for ever.
    def watch() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()
