"""Progress of a long loop: tqdm's bar on a terminal, a line a minute elsewhere.

    for path in progress(paths, "hash", unit="file"): ...
    with progress(desc="cache", total=len(paths)) as bar: bar.update(3)

A bar would fill a log file with control characters.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from tqdm import tqdm

INTERVAL = 60.0  # seconds between lines

T = TypeVar("T")


def progress(
    items: Iterable[T] | None = None, desc: str = "", total: int | None = None, unit: str = "it",
    disable: bool = False, **options: Any,
) -> "tqdm | Lines":
    """The arguments are tqdm's. Returns an iterable and context manager with update(n)."""
    if disable or sys.stderr.isatty():
        return tqdm(items, desc, total, unit=unit, disable=disable, **options)
    return Lines(items, desc, total, unit, options.get("initial", 0))


class Lines:
    """`progress` off a terminal; a loop shorter than a minute prints nothing."""

    def __init__(self, items: Iterable | None, desc: str, total: int | None, unit: str,
                 initial: int):
        self.items, self.desc, self.unit, self.n, self.initial = items, desc, unit, initial, initial
        self.total = len(items) if total is None and hasattr(items, "__len__") else total
        self.start = self.last = time.monotonic()

    def __iter__(self) -> Iterator:
        for item in self.items:
            yield item
            self.update()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        self.n += n
        now = time.monotonic()
        if now - self.last < INTERVAL:
            return
        self.last, text = now, f"{self.desc}: {self.n} {self.unit}s"
        if self.total and self.n > self.initial:
            left = (now - self.start) / (self.n - self.initial) * (self.total - self.n)
            text = f"{self.desc}: {self.n} of {self.total} {self.unit}s, about " \
                   f"{timedelta(seconds=round(left))} left"
        print(text, file=sys.stderr, flush=True)
