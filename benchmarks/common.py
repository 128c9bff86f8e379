"""Shared by the benchmarks: variants timed in turn, and CSV files that say how they were made."""

import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from models.checkpoint import write_csv

RESULTS = Path(__file__).parent / "results"


def abba(
    variants: dict[str, Callable[[], object]], repeats: int, clock: str = "cpu", calls: int = 1
) -> dict[str, list[float]]:
    """Seconds of a call of each variant, `repeats` times, after one call that does not count.

    The variants take turns, forwards in even rounds and backwards in odd ones (A B B A), so that a
    slower phase of the machine affects all of them alike. Give the baseline twice, under two names:
    the difference of this baseline repeat is the noise of the comparison.

    calls: back to back in each timing, of which the mean counts
    clock: "cpu", CPU time of this process over all threads, without child processes; "wall",
    elapsed time; "cuda", time between two events on the current GPU, waiting for the CPU included
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    for turn in range(repeats):
        for name in list(variants)[:: -1 if turn % 2 else 1]:
            if clock == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                start.record()
                for _ in range(calls):
                    variants[name]()
                end.record()
                torch.cuda.synchronize()
                seconds[name].append(start.elapsed_time(end) / 1000 / calls)
            else:
                now = {"cpu": time.process_time, "wall": time.perf_counter}[clock]
                before = now()
                for _ in range(calls):
                    variants[name]()
                seconds[name].append((now() - before) / calls)
    return seconds


def spread(values: Sequence[float], digits: int = 4) -> list[str]:
    """Median, minimum and maximum, as cells of a table."""
    return [f"{f(values):.{digits}g}" for f in (statistics.median, min, max)]


def write_results(
    name: str, header: Sequence[str], rows: Sequence[Sequence], device: torch.device | str,
    notes: Sequence[str] = (),
) -> Path:
    """Print the table and write results/NAME_DEVICE.csv; its comments say how it was made.

    device: "cpu", or a GPU, whose name becomes part of the file name
    """
    if torch.device(device).type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
        processor = next((x.split(": ")[1] for x in lines if x.startswith("model name")),
                         platform.processor())
    file = re.sub(r"\W+", "_", processor.lower()) if "cuda" in str(device) else "cpu"
    path = RESULTS / f"{name}_{file}.csv"
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    made = ", ".join(f"{p} {version(p)}" for p in ("torch", "numpy", "pillow", "pyiqa"))
    comments = [f"{processor}, {cores} CPU cores, load {load:.1f} at the end; "
                f"Python {platform.python_version()}, {made}",
                f"python -m benchmarks.{name} {shlex.join(sys.argv[1:])}".rstrip(), *notes]
    write_csv(path, header, rows, comments)
    print(path.read_text(), end="")
    return path
