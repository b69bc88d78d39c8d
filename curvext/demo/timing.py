"""Times of alternatives on a machine that is never quite quiet."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Within, Python's garbage collector does not run."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def alternate(
    functions: Mapping[str, Callable[[], object]],
    runs: int = 15,
    warmup: int = 3,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every function, ``runs`` times each.

    The functions take turns, every round starting with another one, so that what else the machine does, and who ran
    before, meets all of them alike. ``tick`` is called after every round.
    """
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    with no_collection():
        for turn in range(-warmup, runs):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                start = time.perf_counter()
                functions[name]()
                if turn >= 0:
                    times[name].append(time.perf_counter() - start)
            gc.collect(0)
            tick()
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return low, middle, high


def ratios(times: Mapping[str, Sequence[float]], base: str) -> dict[str, tuple[float, float, float]]:
    """Quartiles of each function's time as a multiple of ``base`` in the same round."""
    return {
        name: quartiles([own / plain for own, plain in zip(values, times[base], strict=True)])
        for name, values in times.items()
    }
