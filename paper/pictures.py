"""Figures 2-6 and 8 and crops.png: pictures of the test images, and which of them to show."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from models.images import find_png, read_rgb
from paper.draw import (
    LINE,
    Cell,
    draw_grid,
    draw_point,
    finish_axes,
    label_points,
    plt,
    save,
    short,
    show,
)
from paper.noise import best_window, close_ups, high_pass, incoherent, window_sums
from paper.shown import TestSet, at_quantiles
from paper.tables import Means

POSITIVES, BASE, TUNED, NAIVE = "UPos", "AMO", "AMO+FT", "AMO+FT_full"
EQUAL = "AMO+FT_full_eq"  # NAIVE pulled back to TUNED's mean quality (paper/equal.py)
TOO_FEW = "too few rows or images"
DARKEST = 64  # of 255: difference to the original from which a map is black
Images = list[tuple[str, str]]  # (network, image) to show


# ------------------------------------------------------------------------- parts of figures


def scores_of(test: TestSet, model: str, name: str, metrics: Sequence[str]) -> list[str]:
    """["Q 42.7", "judge 36.0", "26.1 dB"]: the whole image's scores, as far as they exist."""
    scores = test.scores.get((model, name), {})
    return [f"{short(scores[m])} dB" if m == "psnr" else f"{show(m)} {short(scores[m])}"
            for m in dict.fromkeys(metrics) if m in scores]


def crop_size(image: np.ndarray, share: int, largest: int) -> int:
    """Side of a crop in pixels: 1 / share of the image's shorter side, a multiple of 4."""
    return max(4, min(largest, min(image.shape[:2]) // share) // 4 * 4)


def crop(image: np.ndarray, corner: tuple[int, int], size: int) -> np.ndarray:
    return image[corner[0] : corner[0] + size, corner[1] : corner[1] + size]


def enlarged(lq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """LQ at the size of the original: each pixel as 4 x 4, and bicubic."""
    size = (4 * lq.shape[1], 4 * lq.shape[0])
    bicubic = Image.fromarray(lq).resize(size, Image.Resampling.BICUBIC)
    return lq.repeat(4, 0).repeat(4, 1), np.asarray(bicubic)


def difference_map(image: np.ndarray, original: np.ndarray) -> Cell:
    """Mean absolute difference over RGB, white for 0, black for DARKEST; its mean in the corner."""
    difference = abs(image.astype(float) - original).mean(2)
    gray = 255 - 255 * (difference / DARKEST).clip(0, 1)
    return Cell(gray.round().astype(np.uint8)[..., None].repeat(3, 2), "",
                f"mean {difference.mean():.1f}")


# ------------------------------------------------------------------------- the figures


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


def crops_figure(test: TestSet, images: Images, metrics: Sequence[str], noisy: bool = False,
                 title: str = "") -> plt.Figure | None:
    """Figures 4, 6 and 8: for each image LQ, original, UPos, AMO and AMO+FT.

    metrics: of the titles, the quality first; the last line of the figure's title tells which PSNR.
    noisy: see `window_of`.
    """
    lines, labels = [], []
    for net, name in images:
        gt, (lq, _) = read_rgb(test.originals[name]), enlarged(read_rgb(find_png(test.lq, name)))
        corner, size = window_of(test, net, name, noisy)
        line = [Cell(crop(lq, corner, size), "LQ"), Cell(crop(gt, corner, size), "original")]
        for row in (POSITIVES, BASE, TUNED):
            first, *others = scores_of(test, f"{net}-{row}", name, metrics) or [""]
            text = f"{row}: {first}\n{', '.join(others)}".rstrip(": \n")
            line.append(Cell(crop(test.read_sr(f"{net}-{row}", name), corner, size), text))
        lines.append(line)
        change = test.gains(net, metrics[0], POSITIVES, TUNED).get(name)
        labels.append(f"{net}: {name}"
                      + ("" if change is None else f"\n{show(metrics[0])} {change:+.1f}"))
    note = "Scores of the whole image; PSNR to the positives; left: the change from UPos to AMO+FT"
    return draw_grid(lines, labels, f"{title}\n{note}".strip()) if lines else None


def window_of(test: TestSet, net: str, name: str, noisy: bool = False
              ) -> tuple[tuple[int, int], int]:
    """(top, left) and side of the window to show: where the original has most detail.

    noisy: where AMO+FT has most structured noise.
    """
    gt = read_rgb(test.originals[name])
    interest = abs(high_pass(gt))
    if noisy:
        interest = incoherent(high_pass(test.read_sr(f"{net}-{TUNED}", name)),
                              high_pass(test.read_reference(name)))
    size = crop_size(gt, 3, 128)
    return best_window(window_sums(interest, size)), size


def comparison_figure(test: TestSet, net: str, names: Sequence[str], rows: Sequence[str],
                      quality: str) -> plt.Figure | None:
    """crops.png: a row per image, LQ, bicubic, rows, original; under it the difference maps."""
    lines, labels = [], []
    for name in names:
        gt, (lq, bicubic) = read_rgb(test.originals[name]), enlarged(
            read_rgb(find_png(test.lq, name)))
        window = window_of(test, net, name)
        original = crop(gt, *window)
        shown = {"bicubic": crop(bicubic, *window)} | {
            row: crop(test.read_sr(f"{net}-{row}", name), *window) for row in rows}
        line = [Cell(crop(lq, *window), "LQ"), *(
            Cell(image, row, "".join(scores_of(test, f"{net}-{row}", name, [quality])))
            for row, image in shown.items()), Cell(original, "original")]
        lines.append([cell._replace(title="") for cell in line] if lines else line)
        lines.append([None, *(difference_map(image, original) for image in shown.values()), None])
        labels += [f"{net}: {name}", "difference"]
    title = ("Difference to the original: mean over RGB of the absolute difference, white 0, black "
             f"{DARKEST} of 255 or more")
    return draw_grid(lines, labels, title) if lines else None


def noise_figure(test: TestSet, images: Images, quality: str, means: Means) -> plt.Figure | None:
    """Figures 3 and 5: naive against LoRA with two close-ups each, and the noise as measured.

    means: {<Net>-<Row>: {"quality", "noise"}}
    """
    if not images:
        return None
    nets, below = list(dict.fromkeys(net for net, _ in images)), 2.3  # inches below, of a network
    first = {net: next(image for image in images if image[0] == net) for net in nets}.values()
    cells = [noise_cells(test, *image, quality, means if image in first else None)
             for image in images]
    fig = draw_grid(cells, [f"{net}: {name}" for net, name in images], extra=below * len(nets))
    height = fig.get_size_inches()[1]
    for i, net in enumerate(nets):
        bottom = below * (len(nets) - 1 - i)
        rows = {model.split("-", 1)[1]: values for model, values in means.items()
                if model.startswith(f"{net}-{BASE}")}
        ax = fig.add_axes([0.07, (bottom + 0.35) / height, 0.38, (below - 0.5) / height])
        draw_noise(ax, net, rows, f"structured noise, mean of {len(test.originals)} images",
                   f"{show(quality)} of {net}")
        note, table = noise_note(rows, naive_row(test, net), quality), noise_lines(rows, quality)
        top = bottom + below - 0.13
        fig.text(0.49, top / height, note, va="top", linespacing=1.25)
        top -= LINE * (note.count("\n") + 1.6)
        fig.text(0.49, top / height, table, va="top", family="monospace", linespacing=1.25)
    return fig


def naive_row(test: TestSet, net: str) -> str:
    """Naive fine-tuning at LoRA's quality, where it was made; else as it was trained."""
    return EQUAL if EQUAL in test.rows.get(net, ()) else NAIVE


def draw_noise(ax: plt.Axes, net: str, rows: Means, x: str, y: str) -> None:
    """Quality against noise, with a line to each row from the base, the first of the rows."""
    points = {row: (v["noise"], v["quality"]) for row, v in rows.items()}
    base = next(iter(points.values()))
    for row, point in points.items():
        ax.plot(*zip(base, point, strict=True), color="lightgray", zorder=0)
        draw_point(ax, *point, net, row)
    ax.margins(0.2)
    finish_axes(ax, x, y)
    label_points(ax, points)


def noise_cells(test: TestSet, net: str, name: str, quality: str, means: Means | None
                ) -> list[Cell]:
    """Naive and LoRA, each followed by two close-ups: the flattest area, and naive's noisiest.

    Titles name the image's quality, with means also the mean one.
    """
    reference, original = test.read_reference(name), read_rgb(test.originals[name])
    size, naive, cells = crop_size(reference, 6, 64), naive_row(test, net), []
    corners = close_ups(test.read_sr(f"{net}-{naive}", name), reference, original, size)
    windows = list(zip(corners, ("cyan", "yellow"), strict=True))
    for row, title in ((naive, "naive"), (TUNED, "LoRA")):
        model, titles = f"{net}-{row}", [""] * 3
        image = test.read_sr(model, name)
        if means:
            titles = [f"\n(mean {short(means[model]['quality'])})", "flattest", "naive's noisiest"]
        titles[0] = f"{title}: {''.join(scores_of(test, model, name, [quality]))}{titles[0]}"
        cells.append(Cell(image, titles[0], "",
                          [(*corner, size, colour) for corner, colour in windows]))
        cells += [Cell(crop(image, corner, size), text, frame=colour)
                  for (corner, colour), text in zip(windows, titles[1:], strict=True)]
    return cells


def noise_note(rows: Means, naive: str, quality: str) -> str:
    """Mean qualities, and whether they are equal: less noise says something only then."""
    base, lora, value = (rows[row]["quality"] for row in (BASE, TUNED, naive))
    equal = abs(value - lora) <= 0.1 * max(abs(value - base), abs(lora - base))
    scaled = f"\n_eq: its change from {BASE} is scaled to equal quality." if naive == EQUAL else ""
    return (f"Naive: {naive}, LoRA: {TUNED}.{scaled}\nMean {show(quality)} is {short(value)} for "
            f"naive, {short(lora)} for LoRA, {short(base)} for {BASE}:\n"
            + ("at about equal quality (within 10 % of the gain)." if equal else
               "NOT at equal quality. Less noise may mean less change.")
            + "\nNoise: high frequency that the reference does not explain,\n"
            "(1 - rho²) |HP(SR)|² / |HP(reference)|²")


def noise_lines(rows: Means, quality: str) -> str:
    """A small table of quality and noise."""
    table = [("row", show(quality)[:8], "noise")]
    table += [(row, short(v["quality"]), f"{v['noise']:.3f}") for row, v in rows.items()]
    return "\n".join(f"{a:<16}{b:>8}{c:>7}" for a, b, c in table)


# ------------------------------------------------------------------------- which images


def save_gain_figures(test: TestSet, args: argparse.Namespace) -> None:
    """Figures 4 and 6: UPos, AMO and AMO+FT, from small to large gains of AMO+FT over UPos."""
    given, metrics = args.images, (args.quality, args.held_out, "psnr")
    ranked = {net: at_quantiles(test.gains(net, args.quality, POSITIVES, TUNED), 5)
              for net in test.nets_with((POSITIVES, BASE, TUNED), "figures 4 and 6")}
    figure4 = [(net, n) for net in ranked for n in (given[:2] if given else ranked[net][1::2])]
    figure6 = [(net, n) for net in ranked for n in (given[2:] if given else ranked[net][::2])]
    for name, images in (("figure4.png", figure4), ("figure6.png", figure6)):
        save(crops_figure(test, images, metrics), args.results / name, TOO_FEW)


def save_worst_figure(test: TestSet, args: argparse.Namespace) -> None:
    """Figure 8: the images on which AMO+FT has the lowest held-out score."""
    images = []
    for net in test.nets_with((POSITIVES, BASE, TUNED), "figure8.png"):
        scores = test.values(f"{net}-{TUNED}", args.held_out)
        images += [(net, n) for n in (args.images or sorted(scores, key=scores.get))[:2]]
    title = "" if args.images else f"{TUNED}'s images with the lowest {show(args.held_out)} score"
    fig = crops_figure(test, images, (args.quality, args.held_out, "psnr"), True, title)
    save(fig, args.results / "figure8.png", TOO_FEW)


def save_comparison(test: TestSet, args: argparse.Namespace) -> None:
    """crops.png: three images, evenly spaced by name; one file per network."""
    names = args.images or at_quantiles(dict.fromkeys(test.originals, 0.0), 3)
    for net, rows in test.rows.items():
        shown = [row for row in (POSITIVES, BASE, TUNED) if row in rows]
        fig = comparison_figure(test, net, names, shown, args.quality)
        save(fig, args.results / ("crops.png" if len(test.rows) == 1 else f"crops_{net}.png"),
             TOO_FEW)


def save_noise_figures(test: TestSet, args: argparse.Namespace, means: Means) -> None:
    """Figures 3 and 5: naive against LoRA, from small to large differences in their noise."""
    given = args.images
    ranked = {net: at_quantiles(test.gains(net, "noise", TUNED, naive_row(test, net)), 3)
              for net in test.nets_with((BASE, TUNED, NAIVE), "figures 3 and 5")}
    figure3 = [(net, n) for net in ranked for n in (given[:1] if given else ranked[net][1:2])]
    figure5 = [(net, n) for net in ranked for n in (given[1:3] if given else ranked[net][::2])]
    for name, images in (("figure3.png", figure3), ("figure5.png", figure5)):
        save(noise_figure(test, images, args.quality, means), args.results / name, TOO_FEW)
