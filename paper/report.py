"""One self-contained page of a run: its tables, plots, and sliders between its images.

    python -m paper.report --results results/paper --sr results/paper/sr \\
        --gt datasets/HGGT/Test/GT/Test-100 \\
        --lq datasets/HGGT/Test/Blind_Degradation_Benchmark_LQ/Test-100/Blind_LR

In:  --results with table5_per_image.csv; its other tables and PNG plots are shown if they exist.
     --sr is what evaluate.py --save-sr wrote, --paper the folder of the paper's tables.
Out: --results/report.html, which needs no network and no other file. Images are lossless WebP;
     each is stored once, even if several models made it.

A browser cannot open a page with all images of a large test set. --images sets how many are on it;
they are evenly spaced by name, and the page lists the others.
"""

import argparse
import base64
import io
import re
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from models.checkpoint import read_csv, replacing
from models.distributed import clean_exit
from models.flags import integer, new_parser
from models.hggt import LABEL_VALUES, MultiGT, load_sets
from models.images import find_png, read_rgb
from paper.page import fill

GOLD = "Gold Standard"
LOWER_BETTER = ("lpips", "lpips_st", "dists")
SCORES = ("table5_per_image.csv", "photos_per_image.csv")  # evaluate.py's, tools/tune.py's
MAX_PIXELS = 40e6  # of all images by default; 1.5 to 2 bytes of the page per pixel
# In the order of the page; other files of the folder are not on it
TABLES = ("table5.csv", "photos.csv", "table[78].csv", "claims.csv", "orderings.csv", "seeds_*.csv",
          "table[12346].csv", "structured_noise.csv", "user_study*.csv", "comparison.csv")
PLOTS = ("strip.png", "perception_distortion.png", "tradeoff.png", "crops*.png", "figure[2-8].png")


# ------------------------------------------------------------------------- tables and plots


def title_of(path: Path) -> str:
    """table5.csv: Table 5; seeds_swinir.csv: Seeds swinir"""
    words = re.sub(r"(?<=[a-z])(?=[0-9])", " ", path.stem).replace("_", " ")
    return words[0].upper() + words[1:]


def notes_html(lines: list[str]) -> str:
    """The first line as it is, the others to unfold."""
    first, others = ([escape(line) for line in part] for part in (lines[:1], lines[1:]))
    html = "".join(f'<p class="soft">{line}</p>' for line in first)
    if others:
        items = "".join(f"<li>{line}" for line in others)
        html += f'<details class="notes"><summary>Notes</summary><ul>{items}</ul></details>'
    return html


def scroll_html(title: str, content: str) -> str:
    """A region that scrolls by itself; title: escaped, for screen readers."""
    region = f'<div class="scroll" tabindex="0" role="region" aria-label="{title}">'
    return f"{region}{content}</div>"


def cell_html(column: str, ours: str | None, paper: str, tag: str) -> str:
    """Our number and, small, the paper's; a setting once, the paper's where ours (None) is absent.

    An empty setting of ours is unknown, and stays empty.
    """
    is_number = bool(re.fullmatch(r"[-+]?[\d.]+%?", ours or paper))
    if not is_number or column == "lambda_a":  # a setting
        ours, paper = paper if ours is None else ours, ""
    ours = ours or ""
    kind = "" if is_number else " class=text" if len(ours) < 40 else ' class="text long"'
    small = f" <small>{escape(paper)}</small>" if paper else ""
    return f"<{tag}{kind if tag == 'td' else ''}>{escape(ours)}{small}</{tag}>"


def table_html(path: Path, paper: Path) -> str:
    """A CSV as HTML, with the paper's numbers beside ours, then the rows that only the paper has.

    paper: the paper's CSV; it may be absent. Columns without any value are left out. Comment lines
    of the CSV become notes. If ours begins with rows of the paper, its further rows come last,
    below a line.
    """
    ours, notes = read_csv(path)
    theirs = read_csv(paper)[0] if paper.is_file() else []
    key = next((k for k in ("model", "pyiqa_name") if theirs and k in theirs[0]), "")
    by_name = {row[key]: row for row in theirs}
    names = {row.get(key) for row in ours}
    listed = [row.get(key) in by_name for row in ours]
    line = sum(listed) if listed == sorted(listed, reverse=True) else 0
    line = line or len(ours)  # above this row of ours
    pairs = [(row, by_name.get(row.get(key), {}), '<tr class="further">' if i == line else "<tr>")
             for i, row in enumerate(ours)]
    pairs[line:line] = [({}, by_name[name], '<tr class="soft">')
                        for name in by_name if name not in names]
    columns = dict.fromkeys(c for row in (*ours, *theirs) for c in row)
    columns = [c for c in columns if any(row.get(c) for row in (*ours, *theirs))]
    lines = ["<tr>" + "".join(f"<th>{escape(c.replace('_', ' '))}</th>" for c in columns)]
    for row, printed, tr in pairs:
        lines.append(tr + "".join(
            cell_html(c, row.get(c), printed.get(c, ""), "td" if i else "th")
            for i, c in enumerate(columns)))
    title, shown = escape(title_of(path)), " open" if path.name.startswith("table") else ""
    table = scroll_html(title, f"<table>{'</tr>'.join(lines)}</tr></table>")
    return f"<details{shown}><summary>{title}</summary>{notes_html(notes)}{table}</details>"


def plot_html(path: Path) -> str:
    title, data = escape(title_of(path)), base64.b64encode(path.read_bytes()).decode()
    image = scroll_html(title, f'<img alt="{title}" src="data:image/png;base64,{data}">')
    return f"<figure><figcaption>{title}</figcaption>{image}</figure>"


# ------------------------------------------------------------------------- images


class Scores(NamedTuple):
    """table5_per_image.csv"""

    rows: list[str]  # models, the gold standard among them
    names: list[str]  # of images
    metrics: list[str]
    cells: dict[tuple[str, str], dict[str, str]]  # of a row and an image: {metric: text}


def read_scores(path: Path) -> Scores:
    table, _ = read_csv(path, ["model", "image"])
    rows, names = (list(dict.fromkeys(row[c] for row in table)) for c in ("model", "image"))
    # Metrics without reference come first: those alone are in the gold standard's rows, the first
    metrics = list(dict.fromkeys(c for row in table for c in row
                                 if c not in ("model", "image") and row[c]))
    if not metrics:
        raise ValueError(f"{path}: no scores; run evaluate.py")
    return Scores(rows, names, metrics, {(row["model"], row["image"]): row for row in table})


def choose_models(rows: list[str], args: argparse.Namespace) -> list[str]:
    """The models of --models, or all, in the tables' order."""
    models = [row for row in rows if row != GOLD]
    for name in args.models or ():
        if name not in models:
            raise ValueError(f"--models {name}: no row of {args.results / 'table5.csv'}; use "
                             + " ".join(models))
    return [row for row in models if row in (args.models or models)]


def evenly_spaced(names: list[str], count: int) -> list[str]:
    """`count` of the names, at the quantiles (i + 1/2) / count of their order, each only once."""
    count = min(count, len(names))
    return [names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)]


def choose_images(names: list[str], count: int) -> tuple[list[str], list[str]]:
    """The images on the page, and lines that say so."""
    shown = evenly_spaced(sorted(names), count)
    omitted = [name for name in sorted(names) if name not in shown]
    rule = ", evenly spaced by name; --images N sets how many." if omitted else ", none left out."
    lines = [f"{len(shown)} of {len(names)} test images{rule}"]
    return shown, lines + ([f"Left out: {', '.join(omitted)}"] if omitted else [])


def read_sources(args: argparse.Namespace, models: list[str], sets: MultiGT, i: int
                 ) -> list[np.ndarray]:
    """Test image i in the order of the page's sources: models, ground truths, LQ, bicubic LQ."""
    height, width = sets.sizes[i].tolist()
    name, images = sets.names[i], []
    paths = [*(find_png(args.sr / model, name) for model in models), *map(Path, sets.paths[i])]
    for path, scale in (*((path, 1) for path in paths), (find_png(args.lq, name), 4)):
        image = read_rgb(path)
        if (image.shape[0] * scale, image.shape[1] * scale) != (height, width):
            raise ValueError(f"{path}: {image.shape[1]}x{image.shape[0]}, but the original is "
                             f"{width}x{height}; are --sr, --gt and --lq of the same data?")
        images.append(image)
    bicubic = Image.fromarray(images[-1]).resize((width, height), Image.Resampling.BICUBIC)
    return [*images, np.asarray(bicubic)]


def webp_url(image: np.ndarray) -> str:
    buffer = io.BytesIO()  # of WebP's settings the fastest within 4 % of the smallest file
    Image.fromarray(image).save(buffer, "WEBP", lossless=True, quality=50, method=2)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def gather_images(args: argparse.Namespace) -> tuple[dict, list[str]]:
    """The data of the page's script, and lines that say which images it has.

    Data: images [{name, width, height, files: index into files per source, labels per source,
    scores: rows x metrics, text of the CSV}], sources, rows, metrics, lower (better), files (URLs).
    """
    # Inputs
    files_of_scores = [args.results / name for name in SCORES if (args.results / name).is_file()]
    scores = read_scores(files_of_scores[0] if files_of_scores else args.results / SCORES[0])
    for flag, folder in (("--sr", args.sr), ("--gt", args.gt), ("--lq", args.lq)):
        if not folder.is_dir():
            raise FileNotFoundError(f"{flag} {folder}: no such folder")
    sets, models = load_sets(args.gt), choose_models(scores.rows, args)
    index = {name: i for i, name in enumerate(sets.names)}
    if absent := [name for name in scores.names if name not in index]:
        raise ValueError(f"image {absent[0]}: in table5_per_image.csv, but not in {args.gt}")
    members = [f"GT {Path(path).parent.name}" for path in sets.paths[0]]
    sources = [*models, *members, "LQ, nearest", "LQ, bicubic"]
    pixels = int(np.prod(sets.sizes[index[scores.names[0]]])) * len(sources)  # of one test image
    shown, lines = choose_images(scores.names, args.images or max(1, int(MAX_PIXELS // pixels)))
    for path in (find_png(args.sr / model, name) for model in models for name in shown):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such image; run evaluate.py with --save-sr")

    # Pixels, labels and scores of each image
    files: dict[str, int] = {}  # equal pixels are stored once
    label_of, images = {value: label for label, value in LABEL_VALUES.items()}, []
    for name, i in ((name, index[name]) for name in shown):
        height, width = sets.sizes[i].tolist()
        votes = [] if sets.labels is None else sets.labels[i].tolist()[1:]
        cells = [scores.cells.get((row, name), {}) for row in scores.rows]
        images.append({
            "name": name, "width": width, "height": height,
            "files": [files.setdefault(webp_url(image), len(files))
                      for image in read_sources(args, models, sets, i)],
            "labels": ["" for _ in models] + [""] + [label_of[vote] for vote in votes],
            "scores": [[cell.get(metric, "") for metric in scores.metrics] for cell in cells],
        })  # fmt: skip
    return {"images": images, "sources": sources, "rows": scores.rows, "metrics": scores.metrics,
            "lower": LOWER_BETTER, "files": list(files)}, lines


# ------------------------------------------------------------------------- main


def main(args: argparse.Namespace) -> None:
    for flag, folder in (("--results", args.results), ("--paper", args.paper)):
        if not folder.is_dir():
            raise FileNotFoundError(f"{flag} {folder}: no such folder")
    data, lines = gather_images(args)
    tables = [table_html(path, args.paper / path.name)
              for pattern in TABLES for path in sorted(args.results.glob(pattern))]
    plots = [plot_html(path)
             for pattern in PLOTS for path in sorted(args.results.glob(pattern))]
    none = "<p>None in this folder.</p>"
    page = fill("report.html", data, TITLE=escape(f"Report: {args.results.resolve().name}"),
                CHOICE=notes_html(lines), PLOTS="".join(plots) or none,
                TABLES="".join(tables) or none)
    out = args.results / "report.html"
    with replacing(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {len(tables)} tables, {len(plots)} plots",
          *lines, sep="\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--results", required=True, type=Path, metavar="DIR",
        help="folder of the tables and plots; report.html goes there as well")
    add("--sr", required=True, type=Path, metavar="DIR", help="SR images, DIR/MODEL/NAME.png")
    add("--gt", required=True, type=Path, metavar="DIR", help="the test set they were scored on")
    add("--lq", required=True, type=Path, metavar="DIR", help="its low-quality images, NAME.png")
    add("--paper", type=Path, default=Path(__file__).resolve().parent, metavar="DIR",
        help="the paper's table1.csv to table8.csv (default: this script's folder)")
    add("--images", type=integer(1), metavar="N",
        help="test images on the page, evenly spaced by name (default: as many as keep it below "
        "about 80 MB)")
    add("--models", nargs="+", metavar="NAME",
        help="models whose images are on the page (default: all); the tables show all rows")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("report.py"):
        main(parse_args())
