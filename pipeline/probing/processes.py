"""Child processes: pools of workers, and a lock that lets only one process of this machine measure time."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from threading import Thread


def pool(workers: int) -> ProcessPoolExecutor:
    """A pool of fresh processes that inherit nothing. They end with this process, even if it is killed."""
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_with_parent)


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other process of this machine is in such a block, since timed processes slow each other down.

    The lock is on the folder of temporary files. That folder always exists, so no lock file is left behind.
    """
    folder = os.open(tempfile.gettempdir(), os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _end_with_parent() -> None:
    # A killed parent cannot close its pool. Its workers would then wait for work forever.
    def watch() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()
