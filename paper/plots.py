"""Plots of the tables: each metric against PSNR; quality against PSNR, with the seeds' spread."""

import itertools
import math

from paper.draw import (
    DISPLAY,
    FILLS,
    OTHER_ROW,
    ROWS,
    WIDTH,
    draw_point,
    finish_axes,
    label_points,
    plt,
    show,
)
from paper.report import LOWER_BETTER
from paper.tables import Means

CHAIN = ("OrigsOnly", "Rand", "UPos", "SMA", "AMO")  # from the worst ground truths to the best
FAR = "AMO+FT_full"  # squeezes all other points
COLUMNS = 4  # panels to a line
Points = dict[str, tuple[float, float]]  # {row: PSNR, quality}


def plane_figure(ours: Means, paper: Means) -> plt.Figure | None:
    """Perception against distortion: a panel for each metric against PSNR, ours, then the paper's.

    They do not share panels: the paper's images, and in the demo its networks, are others.
    """
    blocks = [(title, means, panel_metrics(means)) for title, means in
              (("Ours", ours), ("The paper's", paper))]
    if not blocks[0][2]:
        return None
    blocks = [block for block in blocks if block[2]]
    lines = [math.ceil(len(metrics) / COLUMNS) for *_, metrics in blocks]
    models = [model for _, means, _ in blocks for model in means]
    handles = plane_legend(models)
    fig = plt.figure(layout="constrained", figsize=(
        WIDTH, 1.35 * sum(lines) + 0.25 * len(lines) + 0.15 * math.ceil(len(handles) / 5) + 0.1))
    parts = fig.subfigures(len(blocks), 1, squeeze=False, height_ratios=[n + 0.15 for n in lines])
    for part, n, (title, means, metrics) in zip(parts.flat, lines, blocks, strict=True):
        part.suptitle(f"{title}: up and to the right is better")
        axes = part.subplots(n, COLUMNS, squeeze=False).flat
        for ax, metric in itertools.zip_longest(axes, metrics):
            draw_plane(ax, metric, means) if metric else ax.axis("off")
    fig.legend(handles=handles, ncol=5, loc="outside lower center", columnspacing=1.2,
               handletextpad=0.2)
    return fig


def panel_metrics(means: Means) -> list[str]:
    """The metrics other than PSNR of the rows that have PSNR, in the tables' order."""
    measured = {m for values in means.values() if "psnr" in values for m in values}
    return [m for m in [*DISPLAY, *sorted(measured - {*DISPLAY})]
            if m in measured and not m.startswith("psnr")]


def draw_plane(ax: plt.Axes, metric: str, means: Means) -> None:
    """A metric of all models against their PSNR."""
    for model, values in means.items():
        if {"psnr", metric} <= values.keys():
            draw_point(ax, values["psnr"], values[metric], *model.split("-", 1))
    if metric in LOWER_BETTER:
        ax.invert_yaxis()
    ax.margins(0.1)
    ax.locator_params(nbins=4)
    finish_axes(ax, show("psnr"), show(metric) + " (reversed)" * (metric in LOWER_BETTER))


def plane_legend(models: list[str]) -> list[plt.Line2D]:
    """A colour and marker for each row; of several networks, how their markers are filled."""
    nets, rows = (list(dict.fromkeys(m.split("-", 1)[i] for m in models)) for i in (0, 1))
    rows.sort(key=lambda row: [*ROWS, row].index(row))
    styles = [(row, *ROWS.get(row, OTHER_ROW), "full") for row in rows]
    if len(nets) > 1:
        styles += [(net, "gray", "o", FILLS.get(net, "left")) for net in nets]
    return [plt.Line2D([], [], ls="", color=colour, marker=marker, fillstyle=fill, label=label)
            for label, colour, marker, fill in styles]


def tradeoff_figure(
    means: Means, quality: str, spreads: Means | None = None, seeds: int = 0
) -> plt.Figure | None:
    """Quality against PSNR, to the original and to the positives, a line of panels per network.

    spreads: standard deviations over `seeds` seeds, drawn as bars where a row has them.
    """
    columns = [m for m in ("psnr_original", "psnr") if any(m in v for v in means.values())]
    nets = list(dict.fromkeys(m.split("-")[0] for m, v in means.items() if quality in v))
    if not columns or not nets:
        return None
    fig, axes = plt.subplots(len(nets), len(columns), sharey="row", squeeze=False,
                             figsize=(WIDTH, 4.2 * len(nets) + 0.4))
    panels = []
    for ax, (net, column) in zip(axes.flat, itertools.product(nets, columns), strict=True):
        points = {m.split("-", 1)[1]: (v[column], v[quality]) for m, v in means.items()
                  if m.startswith(f"{net}-") and column in v and quality in v}
        bars = {row: (s[column], s[quality]) for row in points
                if {column, quality} <= (s := (spreads or {}).get(f"{net}-{row}", {})).keys()}
        finish_axes(ax, {"psnr": "PSNR to the positives (dB)"}.get(column, show(column)),
                    f"{show(quality)} of {net}" if column == columns[0] else "")
        panels += draw_tradeoff(ax, net, points, bars)
    fig.suptitle(tradeoff_title(seeds if spreads else 0, any(FAR in m for m in means)))
    fig.tight_layout()
    for panel in panels:  # once the layout is final
        label_points(*panel)
    return fig


def tradeoff_title(seeds: int, inset: bool) -> str:
    text = "The line follows better ground truths, from OrigsOnly to AMO."
    if seeds:
        text += f" Means of {seeds} seeds; bars: standard deviation over them."
    return text + f"\nInset: without {FAR}{' and bars' if seeds else ''}." * inset


def draw_tradeoff(ax: plt.Axes, net: str, points: Points, bars: Points
                  ) -> list[tuple[plt.Axes, Points]]:
    """A panel and, if FAR squeezes the others, an inset of those; returns what is yet to label."""
    close = {row: point for row, point in points.items() if row != FAR}
    draw_points(ax, net, points, bars)
    ax.margins(x=0.16, y=0.08)
    if len(close) in (0, len(points)):
        return [(ax, points)]
    x, y = points[FAR]
    y -= bars[FAR][1] if FAR in bars else 0
    ax.annotate(FAR, (x, y), (0, -6), textcoords="offset points", ha="center", va="top")
    inset = ax.inset_axes([0.44, 0.45, 0.46, 0.53])
    inset.yaxis.tick_right()
    draw_points(inset, net, close, {})
    inset.margins(x=0.22, y=0.1)
    finish_axes(inset, "", "")
    ax.indicate_inset_zoom(inset, edgecolor="gray")
    return [(inset, close)]


def draw_points(ax: plt.Axes, net: str, points: Points, bars: Points) -> None:
    chain = [points[row] for row in CHAIN if row in points]
    ax.plot([x for x, _ in chain], [y for _, y in chain], color="gray", alpha=0.6)
    for row, (x, y) in points.items():
        spread = dict(zip(("xerr", "yerr"), bars[row], strict=True)) if row in bars else {}
        draw_point(ax, x, y, net, row, **spread, elinewidth=0.5)
