"""One typed door to numba."""

from collections.abc import Callable
from typing import TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """Compile a function of numpy arrays with numba, released from the GIL and cached on disk.

    numba's cache notices edits of the function's own file only, so a compiled function calls compiled functions of its
    own file and of no other. Where no folder can take the cache (NUMBA_CACHE_DIR, this package, the user's), every process
    compiles anew.
    """
    try:
        return cast("F", numba.njit(cache=True, nogil=True)(function))
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return cast("F", numba.njit(nogil=True)(function))
