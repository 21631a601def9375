"""Aspect-ratio buckets: pictures of like shape share a size, so that none is stretched and little
is cut off."""

from collections.abc import Sequence
from math import log

Size = tuple[int, int]  # height, width


def bucket_sizes(resolution: int, step: int, smallest: int, largest: int) -> list[Size]:
    """The sizes whose sides are multiples of `step` between `smallest` and `largest` and whose area
    is at most `resolution` squared: for each height the widest, and for each width the highest."""
    sides = range(-(-smallest // step) * step, largest + 1, step)
    area = resolution * resolution
    fitting = [(h, w) for h in sides for w in sides if h * w <= area]
    widest = {h: max(w for other, w in fitting if other == h) for h, _ in fitting}
    highest = {w: max(h for h, other in fitting if other == w) for _, w in fitting}
    return sorted({*widest.items(), *((h, w) for w, h in highest.items())})


def bucket_of(picture: Size, sizes: Sequence[Size], step: int, no_upscale: bool = False) -> Size:
    """The size that a picture (height, width) is trained in: of the nearest aspect ratio and, among
    equals, the largest. With `no_upscale`, a picture smaller than that keeps its own size, rounded
    down to multiples of `step`."""
    shape = log(picture[0] / picture[1])
    best = min(sizes, key=lambda size: (abs(log(size[0] / size[1]) - shape), -size[0] * size[1]))
    if no_upscale and (picture[0] < best[0] or picture[1] < best[1]):
        height, width = (
            max(step, min(own, side) // step * step)
            for own, side in zip(picture, best, strict=True)
        )
        return height, width
    return best
