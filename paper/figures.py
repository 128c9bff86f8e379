"""Figures 2-6 and 8, Table 7, and the paper's numbers beside ours, from tables and SR images.

    python figures.py --results results/paper --sr results/paper/sr \
        --gt datasets/HGGT/Test/GT/Test-100 \
        --lq datasets/HGGT/Test/Blind_Degradation_Benchmark_LQ/Test-100/Blind_LR
    python figures.py --results results/paper       # without SR images: tables and plots

In:  --results with tables 1-4, 6 and figure2.csv of analyze_iqa.py, tables 5 and 8 of evaluate.py,
     all of them optional; rows <Net>-<Row>; SR images of evaluate.py --save-sr; --paper's tables.
Out: into --results: comparison.csv (ours, paper, difference), table7.csv, figure2.png to
     figure6.png, figure8.png, crops.png (crops_<Net>.png for two networks), structured_noise.csv,
     perception_distortion.png, tradeoff.png. What cannot be made is named, with the reason.

No picture is picked by hand. Figures 4 and 6: five images at evenly spaced quantiles of the gain in
quality from UPos to AMO+FT, 2nd and 4th in Fig. 4, the others in Fig. 6. Figures 3 and 5: three at
quantiles of the naive result's noise less LoRA's, the middle one in Fig. 3. Figure 8: lowest
held-out score. crops.png: evenly spaced names. Crops lie where the original has most detail; in
Fig. 8 where AMO+FT, and in Figures 3 and 5 where the naive result has most structured noise.
--images overrides the choice of images.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from scipy.ndimage import gaussian_filter

from models.checkpoint import read_csv, replacing, write_csv
from models.hggt import load_sets, png_size, read_rgb

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of backend)

FULL_REFERENCE = ("psnr", "ssim", "lpips", "lpips_st", "dists", "psnr_original")
LOWER_BETTER = ("lpips", "lpips_st", "dists")
DISPLAY = {
    "psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS", "lpips_st": "LPIPS-ST", "dists": "DISTS",
    "psnr_original": "PSNR to the original (dB)", "musiq": "MUSIQ", "nima": "NIMA", "q": "Q",
    "qalign": "Q-Align", "topiq": "TOPIQ",
}  # fmt: skip
KEY = {n: "model" if n in (5, 7, 8) else "pyiqa_name" for n in range(1, 9)}  # of a table's rows
SETTINGS = ("metric", "pyiqa_name", "model", "image", "nr_metric", "lambda_a", "no_human_labels")
COLOURS = {  # of rows; others are gray
    "OrigsOnly": "tab:blue", "Rand": "tab:orange", "UPos": "tab:green", "SMA": "tab:red",
    "SMP": "tab:purple", "AMO": "tab:brown", "UPos+FT": "lime", "AMO+FT": "black",
    "UPos+FT_HP": "tab:olive", "UPos+FT_IG": "tab:cyan", "UPos+FT_NNR,IGx2": "gold",
    "UPos+FT_NNR,IGx5": "navy", "UPos+FT_PaQ2PiQ": "magenta", "AMO+FT_full": "tab:pink",
    "AMO+FT_Q0": "peru",
}  # fmt: skip
MARKERS = {"SwinIR": "o", "RealESRGAN": "s"}
CHAIN = ("OrigsOnly", "Rand", "UPos", "SMA", "AMO")  # ever better ground truths
BASE, TUNED, NAIVE = "AMO", "AMO+FT", "AMO+FT_full"
WIDTH, DPI = 9.0, 120  # inches; a README shows it about 900 pixels wide
Means = dict[str, dict[str, float]]  # {row: {metric: mean over the images}}
Chosen = dict[str, list[str]]  # {network: images}


# ------------------------------------------------------------------------- what is computed


def number(text: str | None) -> float | None:
    """A table's cell as a number; None for an empty cell, text, or a value that is not finite."""
    try:
        return float(text) if math.isfinite(float(text)) else None
    except (TypeError, ValueError):
        return None


def numbers(row: dict[str, str]) -> dict[str, float]:
    """The cells of a row that are measured numbers."""
    return {c: v for c, t in row.items() if c not in SETTINGS and (v := number(t)) is not None}


def compare(ours: list[dict], paper: list[dict], key: str) -> list[tuple[str, str, str, str, str]]:
    """(row, column, ours, paper, ours - paper) for every cell that both tables have as a number."""
    mine = {row[key]: row for row in ours}
    return [(row[key], c, mine[row[key]][c], row[c], f"{numbers(mine[row[key]])[c] - value:+.4f}")
            for row in paper if row[key] in mine for c, value in numbers(row).items()
            if c in numbers(mine[row[key]])]


def table7(ours: list[dict], paper: list[dict]) -> list[dict[str, str]]:
    """Table 7: its rows and settings, the metric columns (and further ones) of our table 5."""
    mine = {row["model"]: row for row in ours}
    return [{c: text for c, text in row.items() if c in SETTINGS}
            | {c: text for c, text in mine[row["model"]].items() if c not in SETTINGS}
            for row in paper if row["model"] in mine]


def gain(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: after[name] - before[name] for name in before if name in after}


def at_quantiles(values: dict[str, float], count: int) -> list[str]:
    """Names at the quantiles (i + 1/2) / count of their values, lowest first, each only once."""
    ranked = sorted(values, key=lambda name: (values[name], name))
    count = min(count, len(ranked))
    return [ranked[(2 * i + 1) * len(ranked) // (2 * count)] for i in range(count)]


def high_pass(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) float64: luma less its Gaussian blur of sigma 1 pixel."""
    luma = image.astype(np.float64) @ (0.299, 0.587, 0.114)
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


def close_ups(sr: np.ndarray, reference: np.ndarray, size: int) -> list[tuple[int, int]]:
    """Two windows with most incoherent energy: in a flat area, and elsewhere, apart from it.

    sr, reference: (H, W) of `high_pass`. Flat: the tenth of the windows where the reference has
    least energy. Returns [(top, left), (top, left)].
    """
    noise, detail = window_sums(incoherent(sr, reference), size), window_sums(reference**2, size)
    flat = detail <= np.quantile(detail, 0.1)
    top, left = first = best_window(np.where(flat, noise, -1))
    rows, columns = 4 * np.indices(noise.shape)
    apart = np.maximum(abs(rows - top), abs(columns - left)) >= size
    return [first, best_window(np.where(~flat & apart, noise, np.where(apart, 0, -1)))]


def overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes (left, bottom, right, top) share an area."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def place_labels(points: np.ndarray, sizes: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """Centres of labels beside their points that cover no point, label, or line from one to it.

    points: (n, 2), sizes: (n, 2) width and height, box: left, bottom, right, top; all in pixels.
    Each label takes the first free place on circles that grow; the last one tried if none is.
    """
    angles = np.pi / 8 * np.array([0, 8, 1, 7, 15, 9, 2, 6, 14, 10, 4, 12])
    places = [(r, np.array([np.cos(a), np.sin(a)])) for r in range(9, 160, 6) for a in angles]
    dots, taken, centres = [(*(p - 6), *(p + 6)) for p in points], [], np.array(points, float)
    for i in np.argsort(points[:, 1], kind="stable"):
        for radius, way in places:
            centres[i] = points[i] + way * (radius + sizes[i] / 2)
            new = [(*(centres[i] - sizes[i] / 2), *(centres[i] + sizes[i] / 2))]
            inside = (new[0][0] >= box[0] and new[0][1] >= box[1]
                      and new[0][2] <= box[2] and new[0][3] <= box[3])
            line = [points[i] + t * (centres[i] - points[i]) for t in (0.2, 0.4, 0.6)]
            new += [(*(p - 1), *(p + 1)) for p in line if radius > 9]
            if (inside and not any(overlap(new[0], dot) for dot in dots)
                    and not any(overlap(a, b) for a in new for b in taken)):
                break
        taken += new
    return centres


# ------------------------------------------------------------------------- inputs


@dataclass
class Test:
    """The test images and all that was made of them."""

    originals: dict[str, str] = field(default_factory=dict)  # {image: path}
    lq: Path = Path()
    sr: Path = Path()
    reference: Path | None = None  # in place of the originals, for structured noise
    scores: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)  # of model, image
    rows: dict[str, list[str]] = field(default_factory=dict)  # {network: its rows with SR images}

    def read_sr(self, model: str, name: str) -> np.ndarray:
        return read_rgb(self.sr / model / f"{name}.png")

    def read_reference(self, name: str) -> np.ndarray:
        folder = self.reference
        return read_rgb(self.originals[name] if folder is None else folder / f"{name}.png")

    def read_lq(self, name: str) -> np.ndarray:
        """The LQ image, each pixel repeated to 4 x 4."""
        return read_rgb(self.lq / f"{name}.png").repeat(4, 0).repeat(4, 1)

    def values(self, model: str, metric: str) -> dict[str, float]:
        """{image: score} of one row."""
        return {n: s[metric] for (m, n), s in self.scores.items() if m == model and metric in s}


def check_size(path: Path, size: tuple[int, int], scale: int = 1) -> None:
    """Refuse an image that is absent, no PNG, or not a scale-th of `size` (height, width)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image")
    height, width = png_size(path)
    if (height * scale, width * scale) != size:
        raise ValueError(f"{path}: {width}x{height}, but the original is {size[1]}x{size[0]}; are "
                         "--sr, --gt, --lq and --reference of the same data?")


def load_test(args: argparse.Namespace, per_image: list[dict[str, str]]) -> Test:
    """The test images, every file checked; rows without SR images or scores are left out."""
    for flag, folder in (("--gt", args.gt), ("--lq", args.lq), ("--sr", args.sr),
                         ("--reference", args.reference)):
        if folder and not folder.is_dir():
            raise FileNotFoundError(f"{flag} {folder}: no such folder")
    sets = load_sets(args.gt)
    sizes = {n: tuple(size) for n, size in zip(sets.names, sets.sizes.tolist(), strict=True)}
    scores = {(row["model"], row["image"]): numbers(row) for row in per_image}
    names = list(dict.fromkeys(name for _, name in scores))
    for name in (*names, *args.images):
        if name not in sizes or name not in names:
            raise ValueError(f"image {name}: not both in table5_per_image.csv and in {args.gt}")
    rows: dict[str, list[str]] = {}
    for model in dict.fromkeys(model for model, _ in scores if model != "Gold Standard"):
        net, dash, row = model.partition("-")
        reason = ("its name is not <Net>-<Row>" if not dash else
                  f"no folder of that name in {args.sr}" if not (args.sr / model).is_dir() else
                  f"images without {args.quality}" if any(
                      args.quality not in scores.get((model, name), ()) for name in names) else "")
        if reason:
            print(f"{model}: in no picture, {reason}")
        else:
            rows.setdefault(net, []).append(row)
    for name in names:
        for model in (f"{net}-{row}" for net in rows for row in rows[net]):
            check_size(args.sr / model / f"{name}.png", sizes[name])
        check_size(args.lq / f"{name}.png", sizes[name], 4)
        if args.reference:
            check_size(args.reference / f"{name}.png", sizes[name])
    originals = dict(zip(sets.names, (p[0] for p in sets.paths), strict=True))
    return Test({n: originals[n] for n in names}, args.lq, args.sr, args.reference, scores, rows)


# ------------------------------------------------------------------------- pictures


class Cell(NamedTuple):
    """One picture of a grid."""

    pixels: np.ndarray  # (H, W, 3) uint8
    title: str = ""
    inset: str = ""
    boxes: Sequence[tuple[int, int, int, str]] = ()  # top, left, size, colour, drawn on it
    frame: str = "black"


def save(fig: plt.Figure | None, path: Path, otherwise: str) -> None:
    """Write a PNG, so that the path holds the old file or the whole new one; or say why not."""
    if fig is None:
        print(f"{path.name}: not made, {otherwise}")
        return
    with replacing(path) as temporary:
        fig.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
    plt.close(fig)
    print(f"{path.name}: written")


def draw_grid(
    rows: list[list[Cell]], labels: list[str], title: str = "", extra: float = 0.0
) -> plt.Figure:
    """Rows of pictures, a label left of each; `extra` inches stay empty below them."""
    left, top = (0.38 if any(labels) else 0.03), (0.28 if title else 0.03)
    side = (WIDTH - left) / max(map(len, rows))
    heads = [0.2 if any(c.title for c in row) else 0.0 for row in rows]
    y = height = top + sum(heads) + side * len(rows) + extra
    fig = plt.figure(figsize=(WIDTH, height))
    fig.text(0.5, 1 - 0.08 / height, title, ha="center", va="top", fontsize=9)
    y -= top
    for row, label, head in zip(rows, labels, heads, strict=True):
        y -= head + side
        fontsize, label_size = (min(8, 110 * side / max(map(len, [" " * 9, *texts]))) for texts in
                                ([c.title for c in row], label.split("\n")))
        fig.text(0.03 / WIDTH, (y + side / 2) / height, label, rotation=90, fontsize=label_size,
                 va="center", ha="left", multialignment="center", linespacing=1.3)
        for i, c in enumerate(row):
            ax = fig.add_axes([(left + i * side) / WIDTH, (y + 0.03) / height,
                               (side - 0.04) / WIDTH, (side - 0.04) / height])
            ax.imshow(c.pixels, interpolation="nearest" if max(c.pixels.shape) < 200 else "auto")
            ax.set(xticks=[], yticks=[])
            ax.set_title(c.title, fontsize=fontsize, pad=2.5)
            ax.spines[:].set(color=c.frame, linewidth=0.8 if c.frame == "black" else 2)
            for box_top, box_left, size, colour in c.boxes:
                ax.add_patch(plt.Rectangle((box_left, box_top), size, size, fill=False,
                                           edgecolor=colour, linewidth=1.5))
            if c.inset:
                ax.text(0.97, 0.035, c.inset, transform=ax.transAxes, ha="right", fontsize=7.5,
                        color="white", linespacing=1.2,
                        bbox={"facecolor": "black", "alpha": 0.65, "pad": 1.5, "lw": 0})
    return fig


def show(metric: str) -> str:
    return DISPLAY.get(metric, metric)


def short(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def inset(test: Test, model: str, name: str, *metrics: str) -> str:
    """The whole image's scores, a line each."""
    found = test.scores.get((model, name), {})
    return "\n".join(f"{show(m)} {short(found[m])}" for m in metrics if m in found)


def side_of(image: np.ndarray, share: int, largest: int) -> int:
    """Side of a crop in pixels: a share of the image's shorter side, a multiple of 4."""
    return max(4, min(largest, min(image.shape[:2]) // share) // 4 * 4)


def cut(image: np.ndarray, corner: tuple[int, int], size: int) -> np.ndarray:
    return image[corner[0] : corner[0] + size, corner[1] : corner[1] + size]


def crops_figure(
    test: Test, chosen: Chosen, shown: Chosen, metrics: Sequence[str], noisy: bool = False,
    title: str = "",
) -> plt.Figure | None:
    """Figures 4, 6, 8 and crops.png: for each image LQ, original and rows, at most 9 to a line.

    shown: {network: rows}. metrics: of the insets, the quality first. The crop lies where the
    original has most detail or, if `noisy`, where AMO+FT has most structured noise.
    """
    rows, labels = [], []
    for net, name in ((net, name) for net, names in chosen.items() for name in names):
        gt = read_rgb(test.originals[name])
        where = abs(high_pass(gt))
        if noisy:
            where = incoherent(high_pass(test.read_sr(f"{net}-{TUNED}", name)),
                               high_pass(test.read_reference(name)))
        size = side_of(gt, 3, 128)
        corner = best_window(window_sums(where, size))
        cells = [("LQ", test.read_lq(name), ""), ("original (GT)", gt, "")]
        cells += [(row, test.read_sr(f"{net}-{row}", name),
                   inset(test, f"{net}-{row}", name, *metrics)) for row in shown[net]]
        several = len(cells) > 9  # lines
        line = [Cell(cut(image, corner, size), text if several or not rows else "", scores)
                for text, image, scores in cells]
        width = math.ceil(len(line) / math.ceil(len(line) / 9))
        rows += [line[i : i + width] for i in range(0, len(line), width)]
        change = gain(test.values(f"{net}-UPos", metrics[0]),
                      test.values(f"{net}-{TUNED}", metrics[0])).get(name)
        labels.append(f"{net}: {name}" + ("" if change is None or several else
                      f"\n{show(metrics[0])} {change:+.1f}, UPos to {TUNED}"))
        labels += [""] * (len(rows) - len(labels))
    return draw_grid(rows, labels, title) if rows else None


def noise_figure(test: Test, chosen: Chosen, quality: str, noise: Means) -> plt.Figure | None:
    """Figures 3 and 5: naive against LoRA with two close-ups each, and the noise as measured."""
    rows, labels, extra = [], [], 2.5  # inches below the pictures, for each network
    for net, name in ((net, name) for net, names in chosen.items() for name in names):
        reference, row = high_pass(test.read_reference(name)), []
        size = side_of(reference, 6, 64)
        corners = close_ups(high_pass(test.read_sr(f"{net}-{NAIVE}", name)), reference, size)
        for model, title in ((NAIVE, "naive"), (TUNED, "LoRA")):
            image = test.read_sr(f"{net}-{model}", name)
            titles = [f"{title} ({model})", "flat area", "elsewhere"] if not rows else [""] * 3
            windows = list(zip(corners, ("cyan", "yellow"), strict=True))
            row.append(Cell(image, titles[0], inset(test, f"{net}-{model}", name, quality),
                            [(*corner, size, colour) for corner, colour in windows]))
            row += [Cell(cut(image, corner, size), text, frame=colour)
                    for (corner, colour), text in zip(windows, titles[1:], strict=True)]
        rows.append(row)
        labels.append(f"{net}: {name}")
    if not rows:
        return None
    fig = draw_grid(rows, labels, extra=extra * len(chosen))
    height = fig.get_size_inches()[1]
    for i, net in enumerate(chosen):
        bottom = extra * (len(chosen) - 1 - i)
        lines = {model.split("-", 1)[1]: values for model, values in noise.items()
                 if model.startswith(f"{net}-{BASE}")}
        points = [(v["noise"], v["quality"]) for v in lines.values()]
        ax = fig.add_axes([0.07, (bottom + 0.42) / height, 0.42, (extra - 0.55) / height])
        for row, point in zip(lines, points, strict=True):
            ax.plot(*zip(points[0], point, strict=True), color="lightgray", lw=1, zorder=0)
            ax.scatter(*point, s=36, color=COLOURS.get(row, "gray"), zorder=2)
        ax.margins(0.18)
        finish_axes(ax, f"structured noise, mean of {len(test.originals)} images",
                    f"{show(quality)} of {net}")
        label_points(ax, points, list(lines))
        base, lora, naive = (lines[row]["quality"] for row in (BASE, TUNED, NAIVE))
        same = abs(naive - lora) <= 0.1 * max(abs(naive - base), abs(lora - base))
        top = (bottom + extra - 0.13) / height
        fig.text(0.53, top, va="top", fontsize=7.5, linespacing=1.4, s=(
            f"Mean {show(quality)} is {short(naive)} for naive, {short(lora)} for LoRA, "
            f"{short(base)} for their base {BASE}:\n"
            + ("at about equal quality (apart by 10 % of the gain at most)." if same else
               "NOT at equal quality. Less noise may just mean less change.")
            + "\nNoise: high frequency that the reference does not explain,\n"
            "(1 - rho²) |HP(SR)|² / |HP(reference)|². Boxes: where naive has most."))
        table = [("row", show(quality)[:8], "noise")]
        table += [(row, short(v["quality"]), f"{v['noise']:.3f}") for row, v in lines.items()]
        fig.text(0.53, top - 0.72 / height, va="top", fontsize=7.5, family="monospace",
                 linespacing=1.4,
                 s="\n".join(f"{a:<14}{b:>9}{c:>8}" for a, b, c in table))
    return fig


def pairs_figure(pairs: list[dict[str, str]], metric: str) -> plt.Figure | None:
    """Figure 2: pairs of Positives, two to a line, the better one on the right."""
    cells = []
    for pair in pairs:
        sides = [(float(pair[f"quality{i}"]), Path(pair[f"image{i}"])) for i in (1, 2)]
        cells += [Cell(read_rgb(path), f"{pair['set']}: {path.parent.name}",
                       f"{show(metric)} {short(value)}") for value, path in sorted(sides)]
    rows = [cells[i : i + 4] for i in range(0, len(cells), 4)]
    title = f"Pairs that people call equally positive and {show(metric)} tells apart"
    return draw_grid(rows, [""] * len(rows), title) if rows else None


# ------------------------------------------------------------------------- plots


def finish_axes(ax: plt.Axes, x: str, y: str, fontsize: float = 8) -> None:
    ax.set_xlabel(x, fontsize=fontsize)
    ax.set_ylabel(y, fontsize=fontsize, labelpad=2)
    ax.tick_params(labelsize=fontsize - 1)
    ax.grid(alpha=0.3)


def label_points(ax: plt.Axes, points: list[tuple[float, float]], names: list[str]) -> None:
    """Write each point's name beside it, with a line to it where it had to move away."""
    ax.figure.canvas.draw()  # fixes the axes' limits
    texts = [ax.text(*p, name, fontsize=7.5, ha="center", va="center")
             for p, name in zip(points, names, strict=True)]
    sizes = np.array([text.get_window_extent().size for text in texts])
    pixels = ax.transData.transform(points)
    centres = place_labels(pixels, sizes, ax.bbox.extents)
    for text, centre, size, pixel, p in zip(texts, centres, sizes, pixels, points, strict=True):
        text.set_position(ax.transData.inverted().transform(centre))
        if np.hypot(*np.maximum(abs(centre - pixel) - size / 2, 0)) > 12:
            ax.plot(*zip(p, text.get_position(), strict=True), color="gray", lw=0.5, zorder=1)
            text.set_bbox({"facecolor": "white", "pad": 0.5, "lw": 0})


def plane_figure(ours: Means, paper: Means) -> plt.Figure | None:
    """Perception against distortion: a panel for each full-reference and no-reference metric."""
    has, theirs = ({m for values in means.values() for m in values} for means in (ours, paper))
    quality = [m for m in [*DISPLAY, *sorted(has - {*DISPLAY})] if m not in FULL_REFERENCE]
    quality = [m for m in quality if m in has] + [m for m in quality if m in theirs - has]
    panels = [(x, y) for x in FULL_REFERENCE if x in has for y in quality
              if any({x, y} <= values.keys() for values in (*ours.values(), *paper.values()))]
    if not panels:
        return None
    columns = 4 if len(quality) % 4 == 0 else min(3, len(quality))
    lines = math.ceil(len(panels) / columns)
    height = 1.9 * lines + 1.1
    fig, axes = plt.subplots(lines, columns, figsize=(WIDTH, height), squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, (x, y) in zip(axes.flat, panels, strict=False):
        for model, values, filled in [*((m, v, True) for m, v in ours.items()),
                                      *((m, v, False) for m, v in paper.items())]:
            net, row = model.split("-", 1)
            colour = COLOURS.get(row, "gray")
            if x in values and y in values:
                ax.scatter(values[x], values[y], s=24, marker=MARKERS.get(net, "^"), linewidth=1.1,
                           edgecolor=colour, facecolor=colour if filled else "none")
        if x in LOWER_BETTER:
            ax.invert_xaxis()
        ax.locator_params(nbins=5)
        finish_axes(ax, show(x) + (" ↓, axis reversed" if x in LOWER_BETTER else ""),
                    show(y) + ("" if y in has else ", paper only"), 7.5)
    models = list(dict.fromkeys([*ours, *paper]))
    rows = sorted({m.split("-", 1)[1] for m in models}, key=[*COLOURS, *models].index)
    handles = [plt.Line2D([], [], ls="", marker="o", color=COLOURS.get(row, "gray"), label=row)
               for row in rows]
    handles += [plt.Line2D([], [], ls="", marker=MARKERS.get(net, "^"), color="gray",
                           markerfacecolor=face, label=f"{net}, {name}")
                for net in dict.fromkeys(m.split("-")[0] for m in models)
                for name, face in (("ours", "gray"), ("the paper's", "none"))]
    fig.legend(handles=handles, ncol=5, fontsize=7.5, loc="lower center", frameon=False,
               columnspacing=1.2, handletextpad=0.2)
    fig.suptitle("Up and to the right is better", fontsize=9, y=1 - 0.05 / height)
    fig.tight_layout(rect=(0, 0.85 / height, 1, 1))
    return fig


def tradeoff_figure(means: Means, quality: str) -> plt.Figure | None:
    """Quality against PSNR, to the original and to the positives, a line of panels per network."""
    columns = [m for m in ("psnr_original", "psnr") if any(m in v for v in means.values())]
    nets = list(dict.fromkeys(m.split("-")[0] for m, v in means.items() if quality in v))
    if not columns or not nets:
        return None
    fig, axes = plt.subplots(len(nets), len(columns), sharey="row", squeeze=False,
                             figsize=(WIDTH, 4.6 * len(nets)))
    panels = []
    for (net, column), ax in zip(((n, c) for n in nets for c in columns), axes.flat, strict=True):
        points = {m.split("-", 1)[1]: (v[column], v[quality]) for m, v in means.items()
                  if m.startswith(f"{net}-") and column in v and quality in v}
        panels.append((ax, list(points.values()), list(points)))
        chain = [points[row] for row in CHAIN if row in points]
        ax.plot([x for x, _ in chain], [y for _, y in chain], color="tab:blue", lw=0.8, alpha=0.5)
        for row, point in points.items():
            ax.scatter(*point, s=36, zorder=3, marker="^" if "+FT" in row else "o",
                       color="tab:orange" if "+FT" in row else "tab:blue")
        ax.margins(x=0.16, y=0.08)
        finish_axes(ax, {"psnr": "PSNR to the positives (dB)"}.get(column, show(column)),
                    f"{show(quality)} of {net}" if column == columns[0] else "", 9)
    fig.suptitle("Samplers (circles, the line follows better ground truths) and fine-tuning "
                 "(triangles)", fontsize=9)
    fig.tight_layout()
    for panel in panels:  # once the layout is final
        label_points(*panel)
    return fig


# ------------------------------------------------------------------------- main


def noise_table(test: Test, metrics: dict[str, str]) -> tuple[Means, Means]:
    """Structured noise of fine-tuned rows and their bases.

    metrics: {column: metric}, whose means are in the table as well; d_* is the difference to the
    row's base. Returns {row: columns}, each base before its rows, and {row: {image: noise}}.
    """
    bases: dict[str, str] = {}  # {row: its base}; a base's own is itself
    for net, rows in test.rows.items():
        for row in (row for row in rows if "+FT" in row):
            base = row.partition("+FT")[0]
            if base in rows:
                bases |= {f"{net}-{base}": f"{net}-{base}", f"{net}-{row}": f"{net}-{base}"}
            else:
                print(f"structured_noise.csv: without {net}-{row}, {base} has no SR images")
    noise: Means = {model: {} for model in sorted(bases, key=lambda m: (bases[m], m != bases[m]))}
    for name in test.originals if bases else ():
        reference = high_pass(test.read_reference(name))
        for model in bases:
            noise[model][name] = structured_noise(high_pass(test.read_sr(model, name)), reference)
    table: Means = {}
    for model, base in ((model, bases[model]) for model in noise):
        values = {column: test.values(model, metric) for column, metric in metrics.items()}
        table[model] = {c: float(np.mean(list(v.values())))
                        for c, v in (values | {"noise": noise[model]}).items() if v}
        if model != base:
            table[model] |= {f"d_{c}": d for c, d in gain(table[base], table[model]).items()}
    return table, noise


def write_rows(path: Path, rows: list[dict], comments: list[str]) -> None:
    header = list(dict.fromkeys(column for row in rows for column in row))
    lines = [[row.get(column, "") for column in header] for row in rows]
    write_csv(path, header, [[f"{v:.4f}" if isinstance(v, float) else v for v in line]
                             for line in lines], comments)
    print(f"{path.name}: written")


def print_comparison(table: int, found: list[tuple[str, str, str, str, str]]) -> None:
    print(f"  Table {table}: " + ("ours (paper, difference)" if found else
                                  "nothing of ours is in the paper's table"))
    lines: dict[str, str] = {}
    for row, column, ours, paper, difference in found:
        digits = len(paper.partition(".")[2])  # as the paper rounds it
        lines[row] = lines.get(row, f"{row:<28}") + (
            f"  {column} {float(ours):.{digits}f} ({paper}, {float(difference):+.{digits}f})")
    for line in lines.values():
        print(f"    {line}")


def main(args: argparse.Namespace) -> None:
    quality, held_out, results = args.quality, args.held_out, args.results

    # Inputs: everything is checked before anything is written
    if not results.is_dir():
        raise FileNotFoundError(f"--results {results}: no such folder")
    paper = {n: read_csv(args.paper / f"table{n}.csv", [KEY[n]])[0] for n in KEY}
    tables = {n: read_csv(results / f"table{n}.csv", [KEY[n]]) for n in KEY
              if n != 7 and (results / f"table{n}.csv").is_file()}
    if not tables:
        raise FileNotFoundError(f"--results {results}: no table1.csv to table8.csv; run "
                                "analyze_iqa.py or evaluate.py with this folder")
    per_image, scored_with = [], []
    if args.sr or (results / "table5_per_image.csv").is_file():
        per_image, scored_with = read_csv(results / "table5_per_image.csv", ["model", "image"])
        scored = {c for row in per_image for c in numbers(row)} - {*FULL_REFERENCE}
        for flag, column in (("--quality", quality), ("--held-out", held_out)):
            if args.sr and column not in scored:
                raise ValueError(f"{flag} {column}: no scores in table5_per_image.csv; name one of "
                                 f"its columns {', '.join(sorted(scored))}")
    pairs, comments, figure2 = [], [], results / "figure2.csv"
    if figure2.is_file():
        columns = ("set", "image1", "image2", "quality1", "quality2")
        pairs, comments = read_csv(figure2, columns)
    for pair, i in ((pair, i) for pair in pairs[:4] for i in (1, 2)):
        if not Path(pair[f"image{i}"]).is_file() or number(pair[f"quality{i}"]) is None:
            raise ValueError(f"{figure2}: {pair[f'image{i}']}: no such image here, or no quality; "
                             "run analyze_iqa.py again")
    test = load_test(args, per_image) if args.sr else Test()

    # The paper's numbers beside ours; Table 7
    if 5 in tables:
        rows, notes = tables[5]
        tables[7] = table7(rows, paper[7]), notes
        absent = [r["model"] for r in paper[7] if r["model"] not in {m["model"] for m in rows}]
        print(f"table7.csv: without {', '.join(absent)}" if absent else "table7.csv: all rows")
        write_rows(results / "table7.csv", tables[7][0], [
            "Table 7, rows of table5.csv", *notes,
            f"nr_metric, lambda_a: the paper's settings of these rows; our Q is {quality}"])
    print("\nThe paper's numbers are of SBS180K, HGGT and RealSR v3")
    cells = {n: compare(tables[n][0], paper[n], KEY[n]) for n in sorted(tables)}
    for n in KEY:
        if n in cells:
            print_comparison(n, cells[n])
        else:
            print(f"  Table {n}: not compared, no table{5 if n == 7 else n}.csv in {results}")
    write_csv(results / "comparison.csv",
              ["table", "row", "column", "ours", "paper", "difference"],
              [[n, *cell] for n, found in cells.items() for cell in found],
              ["difference: ours less the paper's, whose numbers are of SBS180K, HGGT, RealSR v3",
               *(f"ours, table {n}: {' / '.join(tables[n][1])}" for n in cells)])
    print("\ncomparison.csv: written")

    # Plots of the tables
    means = {r["model"]: numbers(r) for r in tables.get(5, ([],))[0] if "-" in r["model"]}
    for model in means:
        values = [numbers(r).get("psnr_original") for r in per_image if r["model"] == model]
        if values and None not in values:
            means[model]["psnr_original"] = float(np.mean(values))
    nets = {model.split("-")[0] for model in means}
    theirs = {r["model"]: numbers(r) for r in (*paper[5], *paper[7])
              if r["model"].split("-")[0] in nets}
    save(plane_figure(means, theirs), results / "perception_distortion.png",
         "table5.csv has no full-reference metric of rows <Net>-<Row>")
    save(tradeoff_figure(means, quality), results / "tradeoff.png",
         f"table5.csv has no PSNR with {quality} of rows <Net>-<Row>")

    # Figure 2, and pictures of the test images
    metric = next((c.split()[1] for c in comments if c.startswith("quality: ")), quality)
    save(pairs_figure(pairs[:4], metric), results / "figure2.png", "figure2.csv has no pairs")
    if not test.rows:
        print("figures 3-6 and 8, crops.png, structured_noise.csv: not made, "
              + ("no row has SR images" if args.sr else "no --sr, --gt and --lq"))
        return

    def whole(figure: str, *needed: str) -> list[str]:
        """The networks that have these rows; says which have not."""
        absent = {net: [r for r in needed if r not in rows] for net, rows in test.rows.items()}
        for net in (net for net in absent if absent[net]):
            print(f"{figure}: without {net}, it has no SR images of {', '.join(absent[net])}")
        return [net for net in absent if not absent[net]]

    def part(chosen: Chosen, ruled: slice, named: slice) -> Chosen:
        """The images for one of two figures: those found by rule, or those of --images."""
        return {net: args.images[named] if args.images else n[ruled] for net, n in chosen.items()}

    few, triple = "too few rows or images", ("UPos", BASE, TUNED)
    shown = {net: list(triple) for net in test.rows}
    chosen = {net: at_quantiles(gain(test.values(f"{net}-UPos", quality),
                                     test.values(f"{net}-{TUNED}", quality)), 5)
              for net in whole("figures 4 and 6", *triple)}
    for name, images in (("figure4", part(chosen, slice(1, 5, 2), slice(2))),
                         ("figure6", part(chosen, slice(0, 5, 2), slice(2, 5)))):
        save(crops_figure(test, images, shown, [quality]), results / f"{name}.png", few)

    chosen = {net: list(test.values(f"{net}-{TUNED}", held_out)) for net in
              whole("figure8.png", *triple)}
    for net in chosen:
        chosen[net].sort(key=test.values(f"{net}-{TUNED}", held_out).get)
    save(crops_figure(test, part(chosen, slice(2), slice(2)), shown, [quality, held_out], True,
                      f"{TUNED}'s images with the lowest {show(held_out)} score"
                      if not args.images else ""), results / "figure8.png", few)

    for net in test.rows:
        name = "crops.png" if len(test.rows) == 1 else f"crops_{net}.png"
        chosen = {net: at_quantiles(dict.fromkeys(test.originals, 0.0), 4)}  # spaced by name
        images = part(chosen, slice(None), slice(None))
        save(crops_figure(test, images, test.rows, [quality]), results / name, few)

    metrics = {"quality": quality, "held_out": held_out, "psnr": "psnr",
               "psnr_original": "psnr_original"}
    table, noise = noise_table(test, metrics)
    if table:
        write_rows(results / "structured_noise.csv", [{"row": m} | v for m, v in table.items()], [
            "structured noise: (1 - rho^2) |HP(SR)|^2 / |HP(reference)|^2 of luma, reference: "
            f"{args.reference or 'the originals'}; mean of {len(test.originals)} images",
            "the rows are not at equal quality; d_*: less the row's base",
            f"quality: {quality}; held_out: {held_out}; noise: whole images, no border cropped",
            *scored_with])
    else:
        print("structured_noise.csv: not made, no fine-tuned row with its base")
    chosen = {net: at_quantiles(gain(noise[f"{net}-{TUNED}"], noise[f"{net}-{NAIVE}"]), 3)
              for net in whole("figures 3 and 5", BASE, TUNED, NAIVE)}
    for name, images in (("figure3", part(chosen, slice(1, 2), slice(1))),
                         ("figure5", part(chosen, slice(0, 3, 2), slice(1, 3)))):
        save(noise_figure(test, images, quality, table), results / f"{name}.png", few)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--results", required=True, type=Path, metavar="DIR",
        help="folder of the tables; figures go there as well")
    add("--sr", type=Path, metavar="DIR", help="SR images, DIR/<Net>-<Row>/<NAME>.png")
    add("--gt", type=Path, metavar="DIR", help="the test set that they were scored on")
    add("--lq", type=Path, metavar="DIR", help="its low-quality images, NAME.png")
    add("--quality", default="musiq", metavar="COLUMN",
        help="the metric that was optimised, a column of table5.csv (default: %(default)s)")
    add("--held-out", default="topiq", metavar="COLUMN",
        help="one that was not, for Fig. 8's worst cases (default: %(default)s)")
    add("--reference", type=Path, metavar="DIR",
        help="clean images NAME.png to measure structured noise against (default: the originals)")
    add("--paper", type=Path, default=Path(__file__).resolve().parent / "paper", metavar="DIR",
        help="the paper's table1.csv to table8.csv (default: paper/ beside this script)")
    add("--images", nargs="+", default=[], metavar="NAME",
        help="show these test images, five at most, in place of those chosen by rule")
    args = parser.parse_args(argv)
    if not bool(args.sr) == bool(args.gt) == bool(args.lq):
        parser.error("give --sr, --gt and --lq together, or none of them")
    if (args.images or args.reference) and not args.sr:
        parser.error("--images and --reference need --sr")
    if len(args.images) > 5:
        parser.error("--images: five at most")
    return args


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:  # bad input: one line that names file or flag
        if os.environ.get("DEBUG"):
            raise
        print(f"figures.py: {error}", file=sys.stderr)
        sys.exit(2)
