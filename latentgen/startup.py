"""Start quickly: Python looks for no garbage meanwhile.

While libraries are imported and models read there are ever more objects and hardly any garbage, and
looking for it among all of them, again and again, is a quarter of the time that it takes. What is
there at the end stays until the program ends, so it is not looked at later either: in a server,
each look would stop all answers for a third of a second.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["begin", "end", "importing"]


def begin() -> None:
    """For our programs; their imports and models come next."""
    gc.disable()


def end() -> None:
    """All that is needed is there. Without this, cycles of garbage stay until the program ends."""
    gc.freeze()
    gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """For the library: its caller's collector is afterwards as it was before."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
