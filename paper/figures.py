"""Figures 2-6 and 8, Table 7, and the paper's numbers beside ours, from tables and SR images.

    python -m paper.figures --results results/paper --sr results/paper/sr \
        --gt datasets/HGGT/Test/GT/Test-100 \
        --lq datasets/HGGT/Test/Blind_Degradation_Benchmark_LQ/Test-100/Blind_LR
    python -m paper.figures --results results/paper       # no SR images: tables and plots

In:  --results with tables 1-4, 6 and figure2.csv of analyze_iqa.py, tables 5 and 8 of evaluate.py.
     Each of them is optional. Rows are named <Net>-<Row>. --sr is what evaluate.py --save-sr wrote.
Out: into --results: comparison.csv (ours, paper, difference), table7.csv, figure2.png to
     figure6.png, figure8.png, crops.png (crops_<Net>.png for two networks), structured_noise.csv,
     perception_distortion.png, tradeoff.png. What cannot be made is named, with the reason.

No picture is picked by hand; --images overrides the choice of images.
  Figures 4, 6  five images at evenly spaced quantiles of the gain in quality from UPos to AMO+FT:
                the 2nd and 4th in Figure 4, the others in Figure 6
  Figures 3, 5  three images at quantiles of the naive result's noise less LoRA's: the middle one in
                Figure 3
  Figure 8      the two images with AMO+FT's lowest held-out scores
  crops.png     four images, evenly spaced by name
Crops show the window where the original has most detail, in Figure 8 where AMO+FT has most
structured noise, and in Figures 3 and 5 where the naive result has most.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from models.checkpoint import read_csv, write_csv
from models.distributed import clean_exit
from models.flags import new_parser
from models.hggt import load_sets
from models.images import find_png, png_size, read_rgb
from paper.draw import WIDTH, Cell, draw_grid, finish_axes, label_points, plt, save
from paper.report import GOLD, LOWER_BETTER, evenly_spaced

FULL_REFERENCE = ("psnr", "ssim", "lpips", "lpips_st", "dists", "psnr_original")
DISPLAY = {
    "psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS", "lpips_st": "LPIPS-ST", "dists": "DISTS",
    "psnr_original": "PSNR to the original (dB)", "musiq": "MUSIQ", "nima": "NIMA", "q": "Q",
    "qalign": "Q-Align", "topiq": "TOPIQ",
}  # fmt: skip
KEY = {n: "model" if n in (5, 7, 8) else "pyiqa_name" for n in range(1, 9)}  # names a table's rows
TABLE7 = ("model", "label", "nr_metric", "lambda_a", "no_human_labels")  # its first columns
SETTINGS = ("metric", "pyiqa_name", "image", *TABLE7)
COLOURS = {  # of rows; all others are gray
    "OrigsOnly": "tab:blue", "Rand": "tab:orange", "UPos": "tab:green", "SMA": "tab:red",
    "SMP": "tab:purple", "AMO": "tab:brown", "UPos+FT": "lime", "AMO+FT": "black",
    "UPos+FT_HP": "tab:olive", "UPos+FT_IG": "tab:cyan", "UPos+FT_NNR,IGx2": "gold",
    "UPos+FT_NNR,IGx5": "navy", "UPos+FT_PaQ2PiQ": "magenta", "AMO+FT_full": "tab:pink",
    "AMO+FT_Q0": "peru",
}  # fmt: skip
MARKERS = {"SwinIR": "o", "RealESRGAN": "s"}
CHAIN = ("OrigsOnly", "Rand", "UPos", "SMA", "AMO")  # from the worst ground truths to the best
POSITIVES, BASE, TUNED, NAIVE = "UPos", "AMO", "AMO+FT", "AMO+FT_full"
TOO_FEW = "too few rows or images"
Means = dict[str, dict[str, float]]  # {<Net>-<Row>: {metric: mean over the images}}
Images = list[tuple[str, str]]  # (network, image) to show


# ------------------------------------------------------------------------- the maths


def number(text: str | None) -> float | None:
    """A table's cell as a number; None for an empty cell, text, or a value that is not finite."""
    try:
        return float(text) if math.isfinite(float(text)) else None
    except (TypeError, ValueError):
        return None


def numbers(row: dict[str, str]) -> dict[str, float]:
    """The measured numbers among the cells of a row."""
    return {c: v for c, t in row.items() if c not in SETTINGS and (v := number(t)) is not None}


def compare(ours: list[dict], paper: list[dict], key: str) -> list[tuple[str, str, str, str, str]]:
    """(row, column, ours, paper, ours - paper) for every cell that is a number in both tables."""
    by_name, cells = {row[key]: row for row in ours}, []
    for row in paper:
        our_row = by_name.get(row[key], {})
        measured = numbers(our_row)
        cells += [(row[key], c, our_row[c], row[c], f"{measured[c] - value:+.4f}")
                  for c, value in numbers(row).items() if c in measured]
    return cells


def table7(ours: list[dict], paper: list[dict]) -> list[dict[str, str]]:
    """Rows of our table 5: the paper's Table 7 in its order, then our further fine-tunings.

    Only their labels come from the paper. Further rows are those whose run recorded a lambda_a.
    """
    by_name = {row["model"]: row for row in ours}
    labels = {row["model"]: row["label"] for row in paper}
    further = [model for model, row in by_name.items()
               if model not in labels and number(row.get("lambda_a")) is not None]
    return [dict.fromkeys(TABLE7, "") | by_name[model] | {"label": labels.get(model, model)}
            for model in (*labels, *further) if model in by_name]


def gain(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: after[name] - before[name] for name in before if name in after}


def at_quantiles(values: dict[str, float], count: int) -> list[str]:
    """Names at the quantiles (i + 1/2) / count of their values, lowest first, each only once."""
    return evenly_spaced(sorted(values, key=lambda name: (values[name], name)), count)


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


def steepness(image: np.ndarray) -> np.ndarray:
    """Squared differences of the luma to the next pixels, (H, W, 3) -> (H, W)."""
    luma = image.astype(np.float64) @ (0.299, 0.587, 0.114)
    return (np.diff(luma, axis=0, append=luma[-1:]) ** 2
            + np.diff(luma, axis=1, append=luma[:, -1:]) ** 2)


def close_ups(sr: np.ndarray, reference: np.ndarray, size: int) -> list[tuple[int, int]]:
    """Two windows with most incoherent energy: in a flat area, and elsewhere, apart from it.

    sr, reference: (H, W, 3) images. Flat: the fiftieth of the windows where the reference is least
    steep. Returns [(top, left), (top, left)].
    """
    noise = window_sums(incoherent(high_pass(sr), high_pass(reference)), size)
    steep = window_sums(steepness(reference), size)
    flat = steep <= np.quantile(steep, 0.02)
    top, left = first = best_window(np.where(flat, noise, -1))
    rows, columns = 4 * np.indices(noise.shape)
    apart = np.maximum(abs(rows - top), abs(columns - left)) >= size
    return [first, best_window(np.where(~flat & apart, noise, np.where(apart, 0, -1)))]


# ------------------------------------------------------------------------- inputs


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


def load_tables(results: Path, paper: Path) -> tuple[dict[int, tuple], dict[int, list[dict]]]:
    """Our tables {n: (rows, comments)}, as far as they exist, and all of the paper's {n: rows}."""
    if not results.is_dir():
        raise FileNotFoundError(f"--results {results}: no such folder")
    printed = {n: read_csv(paper / f"table{n}.csv",
                           [KEY[n], *["label"] * (KEY[n] == "model")])[0] for n in KEY}
    tables = {n: read_csv(results / f"table{n}.csv", [KEY[n]]) for n in KEY
              if n != 7 and (results / f"table{n}.csv").is_file()}  # 7 is made of 5
    if not tables:
        raise FileNotFoundError(f"--results {results}: no table1.csv to table8.csv; run "
                                "analyze_iqa.py or evaluate.py with this folder")
    return tables, printed


def load_scores(args: argparse.Namespace) -> tuple[list[dict[str, str]], list[str]]:
    """Rows and comments of table5_per_image.csv, which only --sr requires."""
    path = args.results / "table5_per_image.csv"
    if not args.sr and not path.is_file():
        return [], []
    rows, comments = read_csv(path, ["model", "image"])
    scored = {c for row in rows for c in numbers(row)} - {*FULL_REFERENCE}
    for flag, column in (("--quality", args.quality), ("--held-out", args.held_out)):
        if args.sr and column not in scored:
            raise ValueError(f"{flag} {column}: no scores in {path.name}; use one of its columns "
                             + ", ".join(sorted(scored)))
    return rows, comments


def load_pairs(path: Path, quality: str) -> tuple[list[dict[str, str]], str]:
    """The first four pairs of figure2.csv, if it exists, and the metric of their scores."""
    if not path.is_file():
        return [], quality
    pairs, comments = read_csv(path, ("set", "image1", "image2", "quality1", "quality2"))
    for pair, i in ((pair, i) for pair in pairs[:4] for i in (1, 2)):
        if not Path(pair[f"image{i}"]).is_file() or number(pair[f"quality{i}"]) is None:
            raise ValueError(f"{path}: {pair[f'image{i}']}: no such image, or no quality; run "
                             "analyze_iqa.py again")
    metrics = (line.split()[1] for line in comments if line.startswith("quality: "))
    return pairs[:4], next(metrics, quality)


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


# ------------------------------------------------------------------------- tables


def write_table(path: Path, rows: list[dict], comments: list[str]) -> None:
    """Write rows of different columns: absent cells stay empty, floats get four digits."""
    header = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[row.get(column, "") for column in header] for row in rows]
    write_csv(path, header, [[f"{v:.4f}" if isinstance(v, float) else v for v in line]
                             for line in cells], comments)
    print(f"{path.name}: written")


def write_table7(path: Path, ours: tuple[list[dict], list[str]], paper: list[dict]
                 ) -> tuple[list[dict], list[str]]:
    """Write table7.csv from our table 5, and return it with that table's comments."""
    rows, comments = ours
    made, printed = table7(rows, paper), [row["model"] for row in paper]
    names = [row["model"] for row in made]
    absent = [model for model in printed if model not in names]
    further = [model for model in names if model not in printed]
    print(f"table7.csv: without {', '.join(absent)}" if absent else "table7.csv: all rows")
    write_table(path, made, [
        "Table 7, rows of table5.csv", *comments,
        *[f"rows that the paper's Table 7 does not have: {', '.join(further)}"] * bool(further)])
    return made, comments


def write_comparison(path: Path, tables: dict[int, tuple], paper: dict[int, list[dict]]) -> None:
    """comparison.csv, and the same on the screen: ours, the paper's, the difference."""
    cells = {n: compare(tables[n][0], paper[n], KEY[n]) for n in sorted(tables)}
    print("\nThe paper's numbers are of SBS180K, HGGT and RealSR v3")
    for n in KEY:
        if n in cells:
            print_comparison(n, cells[n])
        else:
            print(f"  Table {n}: not compared, no table{5 if n == 7 else n}.csv in {path.parent}")
    write_csv(path, ["table", "row", "column", "ours", "paper", "difference"],
              [[n, *cell] for n, table in cells.items() for cell in table],
              ["difference: ours less the paper's, whose numbers are of SBS180K, HGGT, RealSR v3",
               *(f"ours, table {n}: {' / '.join(tables[n][1])}" for n in cells)])
    print(f"\n{path.name}: written")


def print_comparison(table: int, cells: list[tuple[str, str, str, str, str]]) -> None:
    print(f"  Table {table}: " + ("ours (paper, difference)" if cells else
                                  "nothing of ours is in the paper's table"))
    lines: dict[str, str] = {}
    for row, column, ours, paper, difference in cells:
        digits = len(paper.partition(".")[2])  # as the paper rounds it
        lines[row] = lines.get(row, f"{row:<28}") + (
            f"  {column} {float(ours):.{digits}f} ({paper}, {float(difference):+.{digits}f})")
    for line in lines.values():
        print(f"    {line}")


def load_means(table5: list[dict], per_image: list[dict]) -> Means:
    """The means of table 5, and that of the per-image table's PSNR to the original."""
    means = {row["model"]: numbers(row) for row in table5 if "-" in row["model"]}
    for model in means:
        values = [numbers(r).get("psnr_original") for r in per_image if r["model"] == model]
        if values and None not in values:
            means[model]["psnr_original"] = float(np.mean(values))
    return means


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
        "the rows are not at equal quality; d_*: less the row's base",
        f"quality: {args.quality}; held_out: {args.held_out}; noise: whole images, no border "
        "cropped", *comments])
    return means


# ------------------------------------------------------------------------- parts of figures


def show(metric: str) -> str:
    return DISPLAY.get(metric, metric)


def short(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def inset(test: TestSet, model: str, name: str, *metrics: str) -> str:
    """The whole image's scores, a line each."""
    scores = test.scores.get((model, name), {})
    return "\n".join(f"{show(m)} {short(scores[m])}" for m in metrics if m in scores)


def crop_size(image: np.ndarray, share: int, largest: int) -> int:
    """Side of a crop in pixels: 1 / share of the image's shorter side, a multiple of 4."""
    return max(4, min(largest, min(image.shape[:2]) // share) // 4 * 4)


def crop(image: np.ndarray, corner: tuple[int, int], size: int) -> np.ndarray:
    return image[corner[0] : corner[0] + size, corner[1] : corner[1] + size]


# ------------------------------------------------------------------------- perception, distortion


def plane_figure(ours: Means, paper: Means) -> plt.Figure | None:
    """Perception against distortion: a panel for each full-reference and no-reference metric."""
    measured, printed = ({m for v in means.values() for m in v} for means in (ours, paper))
    quality = [m for m in [*DISPLAY, *sorted(measured - {*DISPLAY})] if m not in FULL_REFERENCE]
    quality = ([m for m in quality if m in measured]
               + [m for m in quality if m in printed - measured])
    panels = [(x, y) for x in FULL_REFERENCE if x in measured for y in quality
              if any({x, y} <= values.keys() for values in (*ours.values(), *paper.values()))]
    if not panels:
        return None
    columns = 4 if len(quality) % 4 == 0 else min(3, len(quality))
    lines = math.ceil(len(panels) / columns)
    height = 1.9 * lines + 1.1
    fig, axes = plt.subplots(lines, columns, figsize=(WIDTH, height), squeeze=False)
    for ax, (x, y) in zip(axes.flat, panels, strict=False):
        draw_plane(ax, x, y, ours, paper)
        finish_axes(ax, show(x) + (" ↓, axis reversed" if x in LOWER_BETTER else ""),
                    show(y) + ("" if y in measured else ", paper only"), 7.5)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    fig.legend(handles=plane_legend([*ours, *paper]), ncol=5, fontsize=7.5, loc="lower center",
               frameon=False, columnspacing=1.2, handletextpad=0.2)
    fig.suptitle("Up and to the right is better", fontsize=9, y=1 - 0.05 / height)
    fig.tight_layout(rect=(0, 0.85 / height, 1, 1))
    return fig


def draw_plane(ax: plt.Axes, x: str, y: str, ours: Means, paper: Means) -> None:
    """Two metrics of all models: ours filled, the paper's hollow."""
    for means, filled in ((ours, True), (paper, False)):
        for model, values in means.items():
            net, row = model.split("-", 1)
            colour = COLOURS.get(row, "gray")
            if x in values and y in values:
                ax.scatter(values[x], values[y], s=24, marker=MARKERS.get(net, "^"), linewidth=1.1,
                           edgecolor=colour, facecolor=colour if filled else "none")
    if x in LOWER_BETTER:
        ax.invert_xaxis()
    ax.locator_params(nbins=5)


def plane_legend(models: list[str]) -> list[plt.Line2D]:
    """A colour for each row, then a filled and a hollow marker for each network."""
    nets, rows = (list(dict.fromkeys(m.split("-", 1)[i] for m in models)) for i in (0, 1))
    rows.sort(key=lambda row: [*COLOURS, row].index(row))
    handles = [plt.Line2D([], [], ls="", marker="o", color=COLOURS.get(row, "gray"), label=row)
               for row in rows]
    return handles + [plt.Line2D([], [], ls="", marker=MARKERS.get(net, "^"), color="gray",
                                 markerfacecolor=face, label=f"{net}, {name}")
                      for net in nets
                      for name, face in (("ours", "gray"), ("the paper's", "none"))]


def tradeoff_figure(means: Means, quality: str) -> plt.Figure | None:
    """Quality against PSNR, to the original and to the positives, a line of panels per network."""
    columns = [m for m in ("psnr_original", "psnr") if any(m in v for v in means.values())]
    nets = list(dict.fromkeys(m.split("-")[0] for m, v in means.items() if quality in v))
    if not columns or not nets:
        return None
    fig, axes = plt.subplots(len(nets), len(columns), sharey="row", squeeze=False,
                             figsize=(WIDTH, 4.6 * len(nets)))
    panels = []
    for ax, (net, column) in zip(axes.flat, itertools.product(nets, columns), strict=True):
        points = {m.split("-", 1)[1]: (v[column], v[quality]) for m, v in means.items()
                  if m.startswith(f"{net}-") and column in v and quality in v}
        draw_tradeoff(ax, points)
        finish_axes(ax, {"psnr": "PSNR to the positives (dB)"}.get(column, show(column)),
                    f"{show(quality)} of {net}" if column == columns[0] else "", 9)
        panels.append((ax, points))
    fig.suptitle("Samplers (circles, the line follows better ground truths) and fine-tuning "
                 "(triangles)", fontsize=9)
    fig.tight_layout()
    for ax, points in panels:  # once the layout is final
        label_points(ax, points)
    return fig


def draw_tradeoff(ax: plt.Axes, points: dict[str, tuple[float, float]]) -> None:
    chain = [points[row] for row in CHAIN if row in points]
    ax.plot([x for x, _ in chain], [y for _, y in chain], color="tab:blue", lw=0.8, alpha=0.5)
    for row, point in points.items():
        ax.scatter(*point, s=36, zorder=3, marker="^" if "+FT" in row else "o",
                   color="tab:orange" if "+FT" in row else "tab:blue")
    ax.margins(x=0.16, y=0.08)


# ------------------------------------------------------------------------- pictures


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


def crops_figure(test: TestSet, images: Images, rows: Sequence[str], metrics: Sequence[str],
                 noisy: bool = False, title: str = "") -> plt.Figure | None:
    """Figures 4, 6, 8 and crops.png: for each image LQ, original and rows, at most 9 to a line.

    metrics: of the insets, the quality first. noisy: see `crop_cells`.
    """
    lines, labels = [], []
    for net, name in images:
        cells = crop_cells(test, net, name, rows, metrics, noisy)
        several = len(cells) > 9  # lines
        if lines and not several:
            cells = [cell._replace(title="") for cell in cells]
        width = math.ceil(len(cells) / math.ceil(len(cells) / 9))
        lines += [cells[i : i + width] for i in range(0, len(cells), width)]
        change = test.gains(net, metrics[0], POSITIVES, TUNED).get(name)
        labels.append(f"{net}: {name}" + ("" if change is None or several else
                      f"\n{show(metrics[0])} {change:+.1f}, {POSITIVES} to {TUNED}"))
        labels += [""] * (len(lines) - len(labels))
    return draw_grid(lines, labels, title) if lines else None


def crop_cells(test: TestSet, net: str, name: str, rows: Sequence[str], metrics: Sequence[str],
               noisy: bool) -> list[Cell]:
    """The same crop of LQ, original and rows.

    It lies where the original has most detail or, if noisy, where AMO+FT has most structured noise.
    """
    gt = read_rgb(test.originals[name])
    size, interest = crop_size(gt, 3, 128), abs(high_pass(gt))
    if noisy:
        interest = incoherent(high_pass(test.read_sr(f"{net}-{TUNED}", name)),
                              high_pass(test.read_reference(name)))
    corner = best_window(window_sums(interest, size))
    lq = read_rgb(find_png(test.lq, name)).repeat(4, 0).repeat(4, 1)  # each pixel as 4 x 4
    cells = [Cell(crop(lq, corner, size), "LQ"), Cell(crop(gt, corner, size), "original (GT)")]
    for row in rows:
        sr = crop(test.read_sr(f"{net}-{row}", name), corner, size)
        cells.append(Cell(sr, row, inset(test, f"{net}-{row}", name, *metrics)))
    return cells


def noise_figure(test: TestSet, images: Images, quality: str, means: Means) -> plt.Figure | None:
    """Figures 3 and 5: naive against LoRA with two close-ups each, and the noise as measured."""
    if not images:
        return None
    nets, below = list(dict.fromkeys(net for net, _ in images)), 2.5  # inches below, of a network
    cells = [noise_cells(test, *image, quality, titled=image == images[0]) for image in images]
    fig = draw_grid(cells, [f"{net}: {name}" for net, name in images], extra=below * len(nets))
    height = fig.get_size_inches()[1]
    for i, net in enumerate(nets):
        bottom = below * (len(nets) - 1 - i)
        rows = {model.split("-", 1)[1]: values for model, values in means.items()
                if model.startswith(f"{net}-{BASE}")}
        ax = fig.add_axes([0.07, (bottom + 0.42) / height, 0.42, (below - 0.55) / height])
        points = {row: (v["noise"], v["quality"]) for row, v in rows.items()}
        for row, point in points.items():  # with a line from the base, the first row
            base = next(iter(points.values()))
            ax.plot(*zip(base, point, strict=True), color="lightgray", lw=1, zorder=0)
            ax.scatter(*point, s=36, color=COLOURS.get(row, "gray"), zorder=2)
        ax.margins(0.18)
        finish_axes(ax, f"structured noise, mean of {len(test.originals)} images",
                    f"{show(quality)} of {net}")
        label_points(ax, points)
        top = (bottom + below - 0.13) / height
        fig.text(0.53, top, noise_note(rows, quality), va="top", fontsize=7.5, linespacing=1.4)
        fig.text(0.53, top - 0.72 / height, noise_lines(rows, quality), va="top", fontsize=7.5,
                 family="monospace", linespacing=1.4)
    return fig


def noise_cells(test: TestSet, net: str, name: str, quality: str, titled: bool) -> list[Cell]:
    """Naive and LoRA, each followed by its two close-ups, which lie where naive has most noise."""
    reference, cells = test.read_reference(name), []
    size = crop_size(reference, 6, 64)
    corners = close_ups(test.read_sr(f"{net}-{NAIVE}", name), reference, size)
    windows = list(zip(corners, ("cyan", "yellow"), strict=True))
    for row, title in ((NAIVE, "naive"), (TUNED, "LoRA")):
        image = test.read_sr(f"{net}-{row}", name)
        titles = [f"{title} ({row})", "flat area", "elsewhere"] if titled else [""] * 3
        cells.append(Cell(image, titles[0], inset(test, f"{net}-{row}", name, quality),
                          [(*corner, size, colour) for corner, colour in windows]))
        cells += [Cell(crop(image, corner, size), text, frame=colour)
                  for (corner, colour), text in zip(windows, titles[1:], strict=True)]
    return cells


def noise_note(rows: Means, quality: str) -> str:
    """Mean qualities, and whether they are equal: less noise says something only then."""
    base, lora, naive = (rows[row]["quality"] for row in (BASE, TUNED, NAIVE))
    equal = abs(naive - lora) <= 0.1 * max(abs(naive - base), abs(lora - base))
    return (f"Mean {show(quality)} is {short(naive)} for naive, {short(lora)} for LoRA, "
            f"{short(base)} for their base {BASE}:\n"
            + ("at about equal quality (apart by 10 % of the gain at most)." if equal else
               "NOT at equal quality. Less noise may just mean less change.")
            + "\nNoise: high frequency that the reference does not explain,\n"
            "(1 - rho²) |HP(SR)|² / |HP(reference)|². Boxes: where naive has most.")


def noise_lines(rows: Means, quality: str) -> str:
    """A small table of quality and noise."""
    table = [("row", show(quality)[:8], "noise")]
    table += [(row, short(v["quality"]), f"{v['noise']:.3f}") for row, v in rows.items()]
    return "\n".join(f"{a:<14}{b:>9}{c:>8}" for a, b, c in table)


# ------------------------------------------------------------------------- which images


def save_gain_figures(test: TestSet, args: argparse.Namespace) -> None:
    """Figures 4 and 6: UPos, AMO and AMO+FT, from small to large gains of AMO+FT over UPos."""
    rows, given = (POSITIVES, BASE, TUNED), args.images
    ranked = {net: at_quantiles(test.gains(net, args.quality, POSITIVES, TUNED), 5)
              for net in test.nets_with(rows, "figures 4 and 6")}
    figure4 = [(net, n) for net in ranked for n in (given[:2] if given else ranked[net][1::2])]
    figure6 = [(net, n) for net in ranked for n in (given[2:] if given else ranked[net][::2])]
    for name, images in (("figure4.png", figure4), ("figure6.png", figure6)):
        save(crops_figure(test, images, rows, [args.quality]), args.results / name, TOO_FEW)


def save_worst_figure(test: TestSet, args: argparse.Namespace) -> None:
    """Figure 8: the images on which AMO+FT has the lowest held-out score."""
    rows, images = (POSITIVES, BASE, TUNED), []
    for net in test.nets_with(rows, "figure8.png"):
        scores = test.values(f"{net}-{TUNED}", args.held_out)
        images += [(net, n) for n in (args.images or sorted(scores, key=scores.get))[:2]]
    title = "" if args.images else f"{TUNED}'s images with the lowest {show(args.held_out)} score"
    fig = crops_figure(test, images, rows, [args.quality, args.held_out], True, title)
    save(fig, args.results / "figure8.png", TOO_FEW)


def save_all_rows(test: TestSet, args: argparse.Namespace) -> None:
    """crops.png: four images of all rows, evenly spaced by name; one file per network."""
    names = args.images or at_quantiles(dict.fromkeys(test.originals, 0.0), 4)
    for net, rows in test.rows.items():
        fig = crops_figure(test, [(net, name) for name in names], rows, [args.quality])
        save(fig, args.results / ("crops.png" if len(test.rows) == 1 else f"crops_{net}.png"),
             TOO_FEW)


def save_noise_figures(test: TestSet, args: argparse.Namespace, means: Means) -> None:
    """Figures 3 and 5: naive against LoRA, from small to large differences in their noise."""
    given = args.images
    ranked = {net: at_quantiles(test.gains(net, "noise", TUNED, NAIVE), 3)
              for net in test.nets_with((BASE, TUNED, NAIVE), "figures 3 and 5")}
    figure3 = [(net, n) for net in ranked for n in (given[:1] if given else ranked[net][1:2])]
    figure5 = [(net, n) for net in ranked for n in (given[1:3] if given else ranked[net][::2])]
    for name, images in (("figure3.png", figure3), ("figure5.png", figure5)):
        save(noise_figure(test, images, args.quality, means), args.results / name, TOO_FEW)


# ------------------------------------------------------------------------- main


def main(args: argparse.Namespace) -> None:
    quality, results = args.quality, args.results

    # Inputs: all of them are checked before anything is written
    tables, paper = load_tables(results, args.paper)
    per_image, scored_with = load_scores(args)
    pairs, pairs_metric = load_pairs(results / "figure2.csv", quality)
    test = load_test(args, per_image) if args.sr else None

    # Table 7, and all tables beside the paper's
    if 5 in tables:
        tables[7] = write_table7(results / "table7.csv", tables[5], paper[7])
    write_comparison(results / "comparison.csv", tables, paper)

    # Plots of the tables
    ours = load_means(tables[5][0] if 5 in tables else [], per_image)
    nets = {model.split("-")[0] for model in ours}
    theirs = {row["model"]: numbers(row) for row in (*paper[5], *paper[7])
              if row["model"].split("-")[0] in nets}
    save(plane_figure(ours, theirs), results / "perception_distortion.png",
         "table5.csv has no full-reference metric of rows <Net>-<Row>")
    save(tradeoff_figure(ours, quality), results / "tradeoff.png",
         f"table5.csv has no PSNR with {quality} of rows <Net>-<Row>")

    # Pictures
    save(pairs_figure(pairs, pairs_metric), results / "figure2.png", "figure2.csv has no pairs")
    if not test or not test.rows:
        print("figures 3-6 and 8, crops.png, structured_noise.csv: not made, "
              + ("no row has SR images" if test else "no --sr, --gt and --lq"))
        return
    save_gain_figures(test, args)
    save_worst_figure(test, args)
    save_all_rows(test, args)
    noise = write_noise_table(test, args, scored_with)
    save_noise_figures(test, args, noise)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
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
    add("--paper", type=Path, default=Path(__file__).resolve().parent, metavar="DIR",
        help="the paper's table1.csv to table8.csv (default: this script's folder)")
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
    with clean_exit("figures.py"):
        main(parse_args())
