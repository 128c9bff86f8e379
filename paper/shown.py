"""The test images of the figures, with the scores and SR images of each model."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from models.checkpoint import read_csv
from models.hggt import load_sets
from models.images import find_png, png_size, read_rgb
from paper.report import GOLD, evenly_spaced
from paper.tables import FULL_REFERENCE, numbers


def gain(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: after[name] - before[name] for name in before if name in after}


def at_quantiles(values: dict[str, float], count: int) -> list[str]:
    """Names at the quantiles (i + 1/2) / count of their values, lowest first, each only once."""
    return evenly_spaced(sorted(values, key=lambda name: (values[name], name)), count)


@dataclass
class TestSet:
    """The test images, and the scores and SR images of each model."""

    originals: dict[str, str]  # {image: path}
    lq: Path
    sr: Path
    reference: Path | None = None  # clean images for structured noise; None: the originals
    scores: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)  # (model, image)
    rows: dict[str, list[str]] = field(default_factory=dict)  # {network: rows with SR images}

    def read_sr(self, model: str, name: str) -> np.ndarray:
        return read_rgb(find_png(self.sr / model, name))

    def read_reference(self, name: str) -> np.ndarray:
        folder = self.reference
        return read_rgb(find_png(folder, name) if folder else self.originals[name])

    def values(self, model: str, metric: str) -> dict[str, float]:
        """{image: score} of one model."""
        return {n: s[metric] for (m, n), s in self.scores.items() if m == model and metric in s}

    def gains(self, net: str, metric: str, before: str, after: str) -> dict[str, float]:
        """{image: score of row `after` less that of row `before`}"""
        return gain(self.values(f"{net}-{before}", metric), self.values(f"{net}-{after}", metric))

    def nets_with(self, needed: Sequence[str], figure: str) -> list[str]:
        """The networks that have these rows; prints which network lacks which."""
        nets = []
        for net, rows in self.rows.items():
            if absent := [row for row in needed if row not in rows]:
                print(f"{figure}: without {net}, it has no SR images of {', '.join(absent)}")
            else:
                nets.append(net)
        return nets


def load_scores(args: argparse.Namespace) -> tuple[list[dict[str, str]], list[str]]:
    """Rows and comments of table5_per_image.csv, which only --sr requires.

    The rows of equal_per_image.csv, whose pictures Figures 3 and 5 show, follow if it exists.
    """
    path = args.results / "table5_per_image.csv"
    if not args.sr and not path.is_file():
        return [], []
    rows, comments = read_csv(path, ["model", "image"])
    scored = {c for row in rows for c in numbers(row)} - {*FULL_REFERENCE}
    for flag, column in (("--quality", args.quality), ("--held-out", args.held_out)):
        if args.sr and column not in scored:
            raise ValueError(f"{flag} {column}: no scores in {path.name}; use one of its columns "
                             + ", ".join(sorted(scored)))
    equal = args.results / "equal_per_image.csv"
    further = read_csv(equal, ["model", "image"])[0] if args.sr and equal.is_file() else []
    return rows + [row for row in further if row["model"] != GOLD], comments


def load_test(args: argparse.Namespace, per_image: list[dict[str, str]]) -> TestSet:
    """The test images, every file checked; rows without SR images or scores are skipped."""
    for flag in ("gt", "lq", "sr", "reference"):
        folder = getattr(args, flag)
        if folder and not folder.is_dir():
            raise FileNotFoundError(f"--{flag} {folder}: no such folder")
    sets = load_sets(args.gt)
    sizes = {n: tuple(size) for n, size in zip(sets.names, sets.sizes.tolist(), strict=True)}
    scores = {(row["model"], row["image"]): numbers(row) for row in per_image}
    names = list(dict.fromkeys(name for _, name in scores))
    for name in (*names, *args.images):
        if name not in sizes or name not in names:
            raise ValueError(f"image {name}: not in both table5_per_image.csv and {args.gt}")
    rows = rows_to_show(scores, names, args)
    folders = [args.sr / f"{net}-{row}" for net in rows for row in rows[net]]
    for name in names:
        for folder in (*folders, *([args.reference] if args.reference else [])):
            check_size(find_png(folder, name), sizes[name])
        check_size(find_png(args.lq, name), sizes[name], 4)
    paths = dict(zip(sets.names, (p[0] for p in sets.paths), strict=True))
    return TestSet({n: paths[n] for n in names}, args.lq, args.sr, args.reference, scores, rows)


def rows_to_show(scores: dict[tuple[str, str], dict[str, float]], names: list[str],
                 args: argparse.Namespace) -> dict[str, list[str]]:
    """{network: rows with SR images and all quality scores}; prints why others are skipped."""
    rows: dict[str, list[str]] = {}
    for model in dict.fromkeys(model for model, _ in scores if model != GOLD):
        net, dash, row = model.partition("-")
        if not dash:
            print(f"{model}: in no picture, its name is not <Net>-<Row>")
        elif not (args.sr / model).is_dir():
            print(f"{model}: in no picture, no folder of that name in {args.sr}")
        elif any(args.quality not in scores.get((model, name), ()) for name in names):
            print(f"{model}: in no picture, images without {args.quality}")
        else:
            rows.setdefault(net, []).append(row)
    return rows


def check_size(path: Path, size: tuple[int, int], scale: int = 1) -> None:
    """Refuse an image that is absent, no PNG, or not 1 / scale of `size` (height, width)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image")
    height, width = png_size(path)
    if (height * scale, width * scale) != size:
        raise ValueError(f"{path}: {width}x{height}, but the original is {size[1]}x{size[0]}; are "
                         "--sr, --gt, --lq and --reference of the same data?")
