"""Small data in the real layouts, for the tests."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

LABELS = ("Positive", "Similar", "Negative")


def smooth_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A smooth random RGB image, uint8 (H, W, 3)."""
    small = Image.fromarray(rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def write_votes(folder: Path, name: str, votes: list[str]) -> None:
    """One annotator's JSON of HGGT: four labels for the members 01-04."""
    pictures = {"Picture_1": {"Name": f"{name}.png", "File": "original", "Label": None}}
    for k, label in enumerate(votes, start=1):
        pictures[f"Picture_{k + 1}"] = {"Name": f"{name}_0{k}.png", "File": f"0{k}", "Label": label}
    pictures["Time_cost"] = {"seconds": 1.0}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(pictures))


def make_hggt(root: Path, n: int = 4, size: int = 64, seed: int = 0, range_name: str = "0-4",
              original: str = "original", test: bool = False) -> np.ndarray:
    """Write n quintuplets (Train layout, or Test-100's); returns the final labels (n, 5).

    Member 01 is positive in every set, 02-04 follow a fixed cycle; member k is the original with
    contrast raised by 5 k %.
    """
    rng = np.random.default_rng(seed)
    images = root / "images" if test else root / "Train" / "images" / range_name
    labels = root / "labels" if test else root / "Train" / "labels" / range_name
    final = np.zeros((n, 5), np.int8)
    for i in range(n):
        name, base = f"img{i:02d}", smooth_image(rng, size, size).astype(np.float64)
        members = [0, (i + 1) % 3, (i + 2) % 3, i % 3]  # indices into LABELS
        final[i, 1:] = [1 - m for m in members]
        for annotator in "ABC":
            write_votes(labels / annotator, name, [LABELS[m] for m in members])
        for k, folder in enumerate((original, "01", "02", "03", "04")):
            (images / folder).mkdir(parents=True, exist_ok=True)
            image = np.clip((base - 128) * (1 + 0.05 * k) + 128, 0, 255).round().astype(np.uint8)
            suffix = f"_{folder}" if k else ""
            Image.fromarray(image).save(images / folder / f"{name}{suffix}.png")
    return final
