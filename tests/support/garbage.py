"""Garbage collection in processes that train many tiny models."""

import gc

__all__ = ["freeze"]


def freeze() -> None:
    """
    Leave out all present objects, such as imported modules, from later collections. Accelerate collects garbage in
    each training, and visiting all modules took half of the tests' time.
    """
    gc.collect()
    gc.freeze()
