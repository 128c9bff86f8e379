"""What figures.py draws with: pictures in a grid, names beside the points of a plot, PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from models.checkpoint import replacing

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)

WIDTH, DPI = 9.0, 120  # inches; a README shows it about 900 pixels wide


class Cell(NamedTuple):
    """One picture of a grid."""

    pixels: np.ndarray  # (H, W, 3) uint8
    title: str = ""
    inset: str = ""
    boxes: Sequence[tuple[int, int, int, str]] = ()  # top, left, size, colour, drawn on it
    frame: str = "black"


def save(fig: plt.Figure | None, path: Path, reason: str) -> None:
    """Write a PNG; for None, print the reason why there is no figure."""
    if fig is None:
        print(f"{path.name}: not made, {reason}")
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
        fig.text(0.03 / WIDTH, (y + side / 2) / height, label, rotation=90, va="center", ha="left",
                 fontsize=font_size(label.split("\n"), side), multialignment="center",
                 linespacing=1.3)
        for i, cell in enumerate(row):
            ax = fig.add_axes([(left + i * side) / WIDTH, (y + 0.03) / height,
                               (side - 0.04) / WIDTH, (side - 0.04) / height])
            draw_cell(ax, cell, font_size([c.title for c in row], side))
    return fig


def font_size(texts: list[str], inches: float) -> float:
    """Font size at which the longest of the texts, or nine letters, fit the inches; 8 at most."""
    return min(8, 110 * inches / max(9, *map(len, texts)))


def draw_cell(ax: plt.Axes, cell: Cell, fontsize: float) -> None:
    pixels = cell.pixels
    ax.imshow(pixels, interpolation="nearest" if max(pixels.shape) < 200 else "auto")
    ax.set(xticks=[], yticks=[])
    ax.set_title(cell.title, fontsize=fontsize, pad=2.5)
    ax.spines[:].set(color=cell.frame, linewidth=0.8 if cell.frame == "black" else 2)
    for top, left, size, colour in cell.boxes:
        ax.add_patch(plt.Rectangle((left, top), size, size, fill=False, edgecolor=colour,
                                   linewidth=1.5))
    if cell.inset:
        ax.text(0.97, 0.035, cell.inset, transform=ax.transAxes, ha="right", fontsize=7.5,
                color="white", linespacing=1.2,
                bbox={"facecolor": "black", "alpha": 0.65, "pad": 1.5, "lw": 0})


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
            if (box[0] <= label[0] and box[1] <= label[1] and label[2] <= box[2]
                    and label[3] <= box[3] and not any(overlap(label, dot) for dot in dots)
                    and not any(overlap(a, b) for a in (label, *line) for b in taken)):
                break
        taken += [label, *line]
    return centres


def finish_axes(ax: plt.Axes, x: str, y: str, fontsize: float = 8) -> None:
    ax.set_xlabel(x, fontsize=fontsize)
    ax.set_ylabel(y, fontsize=fontsize, labelpad=2)
    ax.tick_params(labelsize=fontsize - 1)
    ax.grid(alpha=0.3)


def label_points(ax: plt.Axes, points: dict[str, tuple[float, float]]) -> None:
    """Write each point's name beside it, with a line to it if the name is far away."""
    ax.figure.canvas.draw()  # fixes the axes' limits
    texts = [ax.text(*p, name, fontsize=7.5, ha="center", va="center")
             for name, p in points.items()]
    sizes = np.array([text.get_window_extent().size for text in texts])
    pixels = ax.transData.transform(list(points.values()))
    centres = place_labels(pixels, sizes, ax.bbox.extents)
    for text, centre, size, pixel, p in zip(texts, centres, sizes, pixels, points.values(),
                                            strict=True):
        text.set_position(ax.transData.inverted().transform(centre))
        if np.hypot(*np.maximum(abs(centre - pixel) - size / 2, 0)) > 12:
            ax.plot(*zip(p, text.get_position(), strict=True), color="gray", lw=0.5, zorder=1)
            text.set_bbox({"facecolor": "white", "pad": 0.5, "lw": 0})
