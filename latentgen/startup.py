"""A program starts quickly: Python looks for no garbage meanwhile.

While libraries are imported and models read there are ever more objects and hardly any garbage, and
looking for it among all of them, again and again, is a sixth of the time that it takes. What is
there at the end stays until the program ends, so it is not looked at later either: in a server,
each look would stop all answers for a third of a second.
"""

from __future__ import annotations

import gc

__all__ = ["begin", "end"]


def begin() -> None:
    """For programs only: a library leaves its caller's collector alone."""
    gc.disable()


def end() -> None:
    """All that is needed is there. Without this, cycles of garbage stay until the program ends."""
    gc.freeze()
    gc.enable()
