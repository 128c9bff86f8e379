"""What the figures share: one style, the rows' colours and markers, picture grids, labels, files.

For print: 6.9 inches wide (the text width of two columns), text of 7.5 points, PNG at 300 dpi and a
PDF beside it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.checkpoint import replacing

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError as error:
    raise SystemExit(f"figures need matplotlib ({error}): pip install -r demo/requirements.txt"
                     ) from error

WIDTH, DPI, POINTS = 6.9, 300, 7.5  # inches, dots per inch of a PNG, size of the text
LINE = 1.25 * POINTS / 72  # inches from one line of text to the next
STYLE = {
    "font.size": POINTS, "axes.titlesize": POINTS, "axes.labelsize": POINTS,
    "xtick.labelsize": POINTS, "ytick.labelsize": POINTS, "legend.fontsize": POINTS,
    "figure.titlesize": POINTS, "axes.linewidth": 0.6, "xtick.major.width": 0.6,
    "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5,
    "axes.labelpad": 2, "grid.alpha": 0.3, "grid.linewidth": 0.6, "lines.linewidth": 0.8,
    "lines.markersize": 4.5, "legend.frameon": False, "savefig.dpi": DPI,
    "pdf.fonttype": 42,  # TrueType: publishers refuse matplotlib's default, Type 3
}  # fmt: skip
plt.rcParams.update(STYLE)

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
# Colour and marker of each row. People with deuteranopia tell apart all rows of one marker: the
# colours are those of Okabe and Ito (2008).
ROWS = {
    "OrigsOnly": (BLACK, "o"), "Rand": (ORANGE, "o"), "UPos": (BLUE, "o"),
    "SMA": (SKY, "s"), "SMP": (PURPLE, "s"), "AMO": (VERMILION, "s"),
    "UPos+FT": (BLUE, "^"), "UPos+FT_HP": (ORANGE, "^"), "UPos+FT_IG": (GREEN, "^"),
    "UPos+FT_NNR,IGx2": (SKY, "^"), "UPos+FT_NNR,IGx5": (BLACK, "^"),
    "UPos+FT_PaQ2PiQ": (PURPLE, "^"),
    "AMO+FT": (VERMILION, "D"), "AMO+FT_full": (BLACK, "D"), "AMO+FT_Q0": (SKY, "D"),
    "AMO+FT_full_eq": (BLUE, "D"),
}  # fmt: skip
OTHER_ROW = ("gray", "X")
FILLS = {"SwinIR": "full", "RealESRGAN": "none"}  # of the markers; other networks: the left half


DISPLAY = {
    "psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS", "lpips_st": "LPIPS-ST", "dists": "DISTS",
    "psnr_original": "PSNR to the original (dB)", "musiq": "MUSIQ", "nima": "NIMA", "q": "Q",
    "qalign": "Q-Align", "topiq": "TOPIQ",
}  # fmt: skip


class Cell(NamedTuple):
    """One picture of a grid."""

    pixels: np.ndarray  # (H, W, 3) uint8
    title: str = ""
    inset: str = ""
    boxes: Sequence[tuple[int, int, int, str]] = ()  # top, left, size, colour, drawn on it
    frame: str = "black"


def show(metric: str) -> str:
    return DISPLAY.get(metric, metric)


def short(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def save(fig: plt.Figure | None, path: Path, reason: str) -> None:
    """Write a PNG and a PDF beside it; for None, print the reason why there is no figure."""
    if fig is None:
        print(f"{path.name}: not made, {reason}")
        return
    # Equal figures are equal files: without the name and the time of who made them
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        with replacing(path.with_suffix(f".{kind}")) as temporary:
            fig.savefig(temporary, format=kind, metadata=metadata)
    plt.close(fig)
    print(f"{path.name}: written, with a PDF")


def picture_figure(pixels: np.ndarray) -> plt.Figure:
    """One picture, (H, W, 3) uint8, as wide as the page."""
    fig = plt.figure(figsize=(WIDTH, WIDTH * pixels.shape[0] / pixels.shape[1]))
    ax = fig.add_axes([0, 0, 1, 1])
    ax.imshow(pixels, interpolation="none")
    ax.axis("off")
    return fig


def draw_point(ax: plt.Axes, x: float, y: float, net: str, row: str, **more: object) -> None:
    """A row's marker at (x, y); more: of errorbar, as xerr and yerr."""
    colour, marker = ROWS.get(row, OTHER_ROW)
    ax.errorbar(x, y, color=colour, marker=marker, fillstyle=FILLS.get(net, "left"),
                ls="", zorder=3, **more)


def draw_grid(
    rows: Sequence[Sequence[Cell | None]], labels: Sequence[str], title: str = "",
    extra: float = 0.0,
) -> plt.Figure:
    """Rows of pictures, a label left of each; None: no picture there.

    extra: inches that stay empty below them. A label "NET: NAME" takes two lines where it is long.
    """
    columns = max(map(len, rows))
    labels = [label if font_size([label], 0.95 * WIDTH / columns) == POINTS
              else label.replace(": ", ":\n") for label in labels]
    left = 0.06 + LINE * max(label.count("\n") + 1 if label else 0 for label in labels)
    top = 0.04 + LINE * (title.count("\n") + 1 if title else 0)
    side = (WIDTH - left) / columns
    heads = [0.04 + LINE * max(c.title.count("\n") + 1 if c and c.title else 0 for c in row)
             for row in rows]
    y = height = top + sum(heads) + side * len(rows) + extra
    fig = plt.figure(figsize=(WIDTH, height))
    fig.text(0.5, 1 - 0.03 / height, title, ha="center", va="top", linespacing=1.25)
    y -= top
    for row, label, head in zip(rows, labels, heads, strict=True):
        y -= head + side
        fig.text(0.03 / WIDTH, (y + side / 2) / height, label, rotation=90, va="center", ha="left",
                 fontsize=font_size([label], side), multialignment="center", linespacing=1.25)
        for i, cell in enumerate(row):
            if cell:
                ax = fig.add_axes([(left + i * side) / WIDTH, (y + 0.02) / height,
                                   (side - 0.04) / WIDTH, (side - 0.04) / height])
                draw_cell(ax, cell, font_size([c.title for c in row if c], side))
    return fig


def font_size(texts: Sequence[str], inches: float) -> float:
    """POINTS, or the size at which the longest line of the texts fits the inches."""
    longest = max((len(line) for text in texts for line in text.split("\n")), default=0)
    return min(POINTS, 72 * inches / (0.58 * max(1, longest)))  # a letter is 0.58 of its size wide


def draw_cell(ax: plt.Axes, cell: Cell, fontsize: float) -> None:
    pixels = cell.pixels
    ax.imshow(pixels, interpolation="nearest" if max(pixels.shape) < 200 else "auto")
    ax.set(xticks=[], yticks=[])
    ax.set_title(cell.title, fontsize=fontsize, pad=2, linespacing=1.2)
    ax.spines[:].set(color=cell.frame, linewidth=0.6 if cell.frame == "black" else 1.5)
    for top, left, size, colour in cell.boxes:
        ax.add_patch(plt.Rectangle((left, top), size, size, fill=False, edgecolor=colour,
                                   linewidth=1.2))
    if cell.inset:
        ax.text(0.97, 0.035, cell.inset, transform=ax.transAxes, ha="right", color="white",
                linespacing=1.2, bbox={"facecolor": "black", "alpha": 0.65, "pad": 1.5, "lw": 0})


def box_around(centre: np.ndarray, half: np.ndarray | float) -> tuple[float, ...]:
    """(left, bottom, right, top)"""
    return (*(centre - half), *(centre + half))


def overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes (left, bottom, right, top) share an area."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def place_labels(points: np.ndarray, sizes: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """Centres of labels beside their points that cover no point, label, or line from one to it.

    points: (n, 2), sizes: (n, 2) width and height, box: left, bottom, right, top; all in pixels.
    Each label takes the first free place on growing circles, or the last one if none is free.
    """
    angles = np.pi / 8 * np.array([0, 8, 1, 7, 15, 9, 2, 6, 14, 10, 4, 12])
    places = [(r, np.array([np.cos(a), np.sin(a)])) for r in range(9, 160, 6) for a in angles]
    dots, taken, centres = [box_around(p, 6) for p in points], [], np.array(points, float)
    for i in np.argsort(points[:, 1], kind="stable"):
        for radius, direction in places:
            centres[i] = points[i] + direction * (radius + sizes[i] / 2)
            label = box_around(centres[i], sizes[i] / 2)
            line = [box_around(points[i] + t * (centres[i] - points[i]), 1)
                    for t in (0.2, 0.4, 0.6) if radius > 9]
            covered = [dot for j, dot in enumerate(dots) if any(
                overlap(a, dot) for a in (label, *(line if j != i else ())))]
            if (not covered and box[0] <= label[0] and box[1] <= label[1] and label[2] <= box[2]
                    and label[3] <= box[3]
                    and not any(overlap(a, b) for a in (label, *line) for b in taken)):
                break
        taken += [label, *line]
    return centres


def finish_axes(ax: plt.Axes, x: str, y: str) -> None:
    ax.set(xlabel=x, ylabel=y)
    ax.grid()


def label_points(ax: plt.Axes, points: dict[str, tuple[float, float]]) -> None:
    """Write each point's name beside it, with a line to it if the name is far away."""
    ax.figure.canvas.draw()  # fixes the axes' limits
    texts = [ax.text(*p, name, ha="center", va="center") for name, p in points.items()]
    sizes = np.array([text.get_window_extent().size for text in texts])
    pixels = ax.transData.transform(list(points.values()))
    centres = place_labels(pixels, sizes, ax.bbox.extents)
    for text, centre, size, pixel, p in zip(texts, centres, sizes, pixels, points.values(),
                                            strict=True):
        text.set_position(ax.transData.inverted().transform(centre))
        if np.hypot(*np.maximum(abs(centre - pixel) - size / 2, 0)) > 12:
            ax.plot(*zip(p, text.get_position(), strict=True), color="gray", lw=0.5, zorder=1)
            text.set_bbox({"facecolor": "white", "pad": 0.5, "lw": 0})
