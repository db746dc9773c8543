"""A typed wrapper of numba's compiler."""

from collections.abc import Callable
from typing import TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """Compile a function of numpy arrays with numba; it runs without the GIL and is cached on disk.

    numba's cache notices edits of the function's own file only. Therefore a compiled function may only call compiled
    functions of its own file. The cache needs a writable folder: NUMBA_CACHE_DIR, this package's or the user's. Without
    one, every process compiles again.
    """
    try:
        return cast("F", numba.njit(cache=True, nogil=True)(function))
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return cast("F", numba.njit(nogil=True)(function))
