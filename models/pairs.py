"""Pairs of images that people compared: SBS180K, or your own, in a CSV manifest.

SBS180K's inner layout is not documented publicly, so a neutral manifest is read:
image1,image2,score[,model1,model2], with paths relative to its folder.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.checkpoint import parse_csv

COLUMNS = ("image1", "image2", "score", "model1", "model2")


class Pairs(NamedTuple):
    image1: np.ndarray  # (n,) paths
    image2: np.ndarray  # (n,)
    score: np.ndarray  # (n,) fraction of raters that prefer image2
    models: list[tuple[str, str]] | None = None  # n

    def take(self, rows: np.ndarray) -> "Pairs":
        return Pairs(self.image1[rows], self.image2[rows], self.score[rows])


def read_manifest(path: str, columns: dict[str, str]) -> list[dict[str, str | None]]:
    """Rows of a CSV image1,image2,score[,model1,model2], under these names.

    columns: the file's own names of those columns, where they differ
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such manifest; expected a CSV image1,image2,score")
    header, rows, _ = parse_csv(Path(path))
    names = {key: columns.get(key, key) for key in COLUMNS}
    if not {"model1", "model2"} & {*columns, *header}:
        del names["model1"], names["model2"]
    if absent := [name for name in names.values() if name not in header]:
        raise ValueError(f"{path}: no column {', '.join(absent)} in {','.join(header)}; "
                         "name the file's own with --columns image1=... image2=... score=...")
    if not rows:
        raise ValueError(f"{path}: no pairs below the header")
    return [{key: row[name] for key, name in names.items()} for row in rows]


def read_pairs(path: str, columns: dict[str, str]) -> Pairs:
    """The pairs of a manifest, see `read_manifest`.

    Raises ValueError naming the absent columns, or the first problems and their number.
    """
    rows, folder = read_manifest(path, columns), os.path.dirname(os.path.abspath(path))
    names = {row[side] for row in rows for side in ("image1", "image2")}
    images = {name: os.path.normpath(os.path.join(folder, name or "")) for name in names}
    absent = {name for name, image in images.items() if not os.path.isfile(image)}
    score, problems = [], []
    for number, row in enumerate(rows, 1):
        problems += [f"pair {number}: no image {name!r}"
                     for name in (row["image1"], row["image2"]) if name in absent]
        try:
            score.append(float(row["score"]))
            if not 0 <= score[-1] <= 1 or "_" in row["score"]:  # float takes 0_1
                raise ValueError
        except (ValueError, TypeError):
            problems.append(f"pair {number}: score {row['score']!r} is not in [0, 1]")
    if problems:
        raise ValueError(f"{path}: {len(problems)} problems: " + "; ".join(problems[:3])
                         + "; ..." * (len(problems) > 3))
    models = [(r["model1"], r["model2"]) for r in rows] if "model1" in rows[0] else None
    image1, image2 = (np.array([images[r[side]] for r in rows], object) for side in COLUMNS[:2])
    return Pairs(image1, image2, np.array(score), models)
