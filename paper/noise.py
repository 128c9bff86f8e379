"""Structured noise of an SR image (Figures 3 and 5), and the windows that the figures show.

The measure is this project's own; the paper shows the noise in pictures alone (Sec. 4.3, 10.2).
"""

import argparse

import numpy as np
from scipy.ndimage import gaussian_filter

from models.images import LUMA
from paper.shown import TestSet, gain
from paper.tables import Means, write_table


def high_pass(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) float64: luma less its Gaussian blur of sigma 1 pixel."""
    luma = image.astype(np.float64) @ LUMA
    return luma - gaussian_filter(luma, 1.0)


def incoherent(sr: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Per pixel, the energy in the SR's high frequency that the reference's does not explain.

    sr, reference: (H, W) of `high_pass`. Squared residual of regressing one on the other: its sum
    is (1 - rho^2) |sr|^2, rho their correlation. Sharpness at the right places does not count.
    """
    slope = (sr * reference).sum() / max((reference**2).sum(), 1e-12)
    return (sr - slope * reference) ** 2


def structured_noise(sr: np.ndarray, reference: np.ndarray) -> float:
    """(1 - rho^2) |sr|^2 / |reference|^2 of two high-passed images: grids, stripes and noise."""
    return float(incoherent(sr, reference).sum() / max((reference**2).sum(), 1e-12))


def window_sums(values: np.ndarray, size: int, step: int = 4) -> np.ndarray:
    """Sums over the size x size windows that begin at multiples of step: (H, W) -> (h, w)."""
    total = np.pad(values.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = total[size:, size:] - total[:-size, size:] - total[size:, :-size]
    return (sums + total[:-size, :-size])[::step, ::step]


def best_window(sums: np.ndarray, step: int = 4) -> tuple[int, int]:
    """(top, left) in pixels of the window with the largest of `window_sums`."""
    row, column = np.unravel_index(sums.argmax(), sums.shape)
    return int(row) * step, int(column) * step


def gradient(image: np.ndarray) -> np.ndarray:
    """Length of the luma's gradient, from differences to the next pixels, (H, W, 3) -> (H, W)."""
    luma = image.astype(np.float64) @ LUMA
    return np.hypot(np.diff(luma, axis=0, append=luma[-1:]),
                    np.diff(luma, axis=1, append=luma[:, -1:]))


def close_ups(
    sr: np.ndarray, reference: np.ndarray, original: np.ndarray, size: int
) -> list[tuple[int, int]]:
    """(top, left) of two windows: the flattest one, and the noisiest one apart from it.

    sr, reference, original: (H, W, 3) images. Flattest: the smallest mean gradient of the original.
    Noisiest: most of the SR's `incoherent` energy.
    """
    top, left = flattest = best_window(-window_sums(gradient(original), size))
    noise = window_sums(incoherent(high_pass(sr), high_pass(reference)), size)
    rows, columns = 4 * np.indices(noise.shape)
    apart = np.maximum(abs(rows - top), abs(columns - left)) >= size
    return [flattest, best_window(np.where(apart, noise, -1))]


def bases_of(test: TestSet) -> dict[str, str]:
    """{model: the model it was fine-tuned from}; a base comes before its rows, as its own base."""
    bases: dict[str, str] = {}
    for net, names in test.rows.items():
        for row in (row for row in names if "+FT" in row):
            base = row.partition("+FT")[0]
            if base in names:
                bases |= {f"{net}-{base}": f"{net}-{base}", f"{net}-{row}": f"{net}-{base}"}
            else:
                print(f"structured_noise.csv: without {net}-{row}, {base} has no SR images")
    return dict(sorted(bases.items(), key=lambda item: (item[1], item[0] != item[1])))


def measure_noise(test: TestSet, bases: dict[str, str], metrics: dict[str, str]) -> Means:
    """Mean structured noise and scores of fine-tuned rows and their bases; d_*: less the base's.

    metrics: {column: metric}. Each image's noise is added to test.scores, as metric "noise".
    """
    for name in test.originals if bases else ():
        reference = high_pass(test.read_reference(name))
        for model in bases:
            sr = high_pass(test.read_sr(model, name))
            test.scores[model, name]["noise"] = structured_noise(sr, reference)
    means: Means = {}
    for model, base in bases.items():
        values = {c: list(test.values(model, metric).values()) for c, metric in metrics.items()}
        means[model] = {c: float(np.mean(v)) for c, v in values.items() if v}
        if model != base:
            means[model] |= {f"d_{c}": d for c, d in gain(means[base], means[model]).items()}
    return means


def write_noise_table(test: TestSet, args: argparse.Namespace, comments: list[str]) -> Means:
    """structured_noise.csv: its rows are returned."""
    metrics = {"quality": args.quality, "held_out": args.held_out, "psnr": "psnr",
               "psnr_original": "psnr_original", "noise": "noise"}
    means = measure_noise(test, bases_of(test), metrics)
    if not means:
        print("structured_noise.csv: not made, no fine-tuned row with its base")
        return {}
    rows = [{"row": model} | values for model, values in means.items()]
    write_table(args.results / "structured_noise.csv", rows, [
        "structured noise: (1 - rho^2) |HP(SR)|^2 / |HP(reference)|^2 of luma, reference: "
        f"{args.reference or 'the originals'}; mean of {len(test.originals)} images",
        "AMO+FT_full_eq: AMO+FT_full pulled back to AMO+FT's quality (paper/equal.py); the other "
        "rows are not at equal quality; d_*: less the row's base",
        f"quality: {args.quality}; held_out: {args.held_out}; noise: whole images, no border "
        "cropped", *comments])
    return means
