"""A typed wrapper of numba's compiler."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """Compile a function of numpy arrays with numba; it runs without the GIL and is cached on disk.

    numba's cache notices edits of the function's own file only. Therefore a compiled function may only call compiled
    functions of its own file. The cache needs a writable folder: NUMBA_CACHE_DIR, this package's or the user's. Without
    one, every process compiles again.
    """
    return _kept(function)


def inlined(function: F) -> F:
    """Like `compiled`, for the body of an inner loop: it becomes part of its callers.

    numba counts the references of every array argument in each call, which takes longer than a short body.
    """
    return _kept(function, inline="always")


def _kept(function: F, **options: Any) -> F:
    try:
        return cast("F", numba.njit(cache=True, nogil=True, **options)(function))
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return cast("F", numba.njit(nogil=True, **options)(function))
