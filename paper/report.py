"""One self-contained page of a run: its tables, plots, and sliders between its images.

    python -m paper.report --results results/paper --sr results/paper/sr \\
        --gt datasets/HGGT/Test/GT/Test-100 \\
        --lq datasets/HGGT/Test/Blind_Degradation_Benchmark_LQ/Test-100/Blind_LR

In:  --results with table5_per_image.csv; its other tables and PNG plots are shown if they exist.
     --sr is what evaluate.py --save-sr wrote, --paper the folder of the paper's tables. Images of
     --lq that no table scores are shown as well if a model has enlarged them. Without --gt there
     are neither originals nor labels, and the page also does without a table.
Out: --results/report.html, which needs no network and no other file. Images are lossless WebP;
     each is stored once, even if several models made it.

The header's facts are from records: the data from the table's first note, seed and commit from the
config.json of the runs. If a README.txt beside or above --gt says that the labels are simulated, so
does the header, and the paper's numbers are off until they are switched on.

A browser cannot open a page with all images of a large test set. --images sets how many are on it;
they are evenly spaced by name, and the page lists the others.
"""

import argparse
import base64
import io
import json
import re
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from models.checkpoint import read_csv, read_text, replacing
from models.distributed import clean_exit
from models.flags import integer, new_parser
from models.hggt import LABEL_VALUES, MultiGT, load_sets
from models.images import find_png, list_images, naming, open_image, png_size, read_rgb
from paper.page import fill

GOLD = "Gold Standard"
LOWER_BETTER = ("lpips", "lpips_st", "dists")
SCORES = ("table5_per_image.csv", "photos_per_image.csv")  # evaluate.py's, tools/tune.py's
CAPTIONS = "captions.csv"  # of the results: author and licence of each image
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


def is_number(text: str) -> bool:
    return bool(re.fullmatch(r"[-+]?[\d.]+%?", text))


def cell_html(text: str, tag: str, paper: bool = False) -> str:
    """A table's cell; paper: of a column that only the paper's numbers fill."""
    kinds = ["paper"] * paper
    if tag == "td" and not is_number(text):
        kinds += ["text"] + ["long"] * (len(text) >= 40)
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    return f"<{tag}{kind}>{escape(text)}</{tag}>"


def pair_rows(ours: list[dict[str, str]], theirs: list[dict[str, str]]
              ) -> list[tuple[str, dict[str, str], dict[str, str]]]:
    """(class, our row, the paper's row) of each row of a table; {} where one of them has none.

    If ours begins with rows of the paper, our further rows come last, below a line.
    """
    key = next((k for k in ("model", "pyiqa_name") if theirs and k in theirs[0]), "")
    by_name = {row[key]: row for row in theirs}
    names = {row.get(key) for row in ours}
    listed = [row.get(key) in by_name for row in ours]
    line = sum(listed) if listed == sorted(listed, reverse=True) else 0
    line = line or len(ours)  # above this row of ours
    rows = [("further" if i == line else "", row, by_name.get(row.get(key), {}))
            for i, row in enumerate(ours)]
    rows[line:line] = [("paper", {}, by_name[name]) for name in by_name if name not in names]
    return rows


def table_html(path: Path, paper: Path) -> str:
    """A CSV as HTML: our numbers, the paper's in columns of their own, the rows of the paper alone.

    paper: the paper's CSV; it may be absent. Columns without any value are left out, comment lines
    of the CSV become notes. A setting has one column; it is the paper's where ours is unknown.
    """
    ours, notes = read_csv(path)
    theirs = read_csv(paper)[0] if paper.is_file() else []
    columns: list[tuple[str, bool]] = []  # name, and whether the paper's numbers are in it
    for c in dict.fromkeys(c for row in (*ours, *theirs) for c in row):
        printed = [row[c] for row in theirs if row.get(c)]
        numbers = bool(printed) and c != "lambda_a" and all(map(is_number, printed))
        if any(row.get(c) for row in ours) or printed and not numbers:
            columns.append((c, False))
        if numbers:
            columns.append((c, True))
    lines = ["<tr>" + "".join(
        cell_html(c.replace("_", " ") + " (paper)" * is_paper, "th", is_paper)
        for c, is_paper in columns)]
    numeric = {c for c, is_paper in columns if is_paper}
    for kind, row, printed in pair_rows(ours, theirs):
        texts = [printed.get(c, "") if is_paper or c not in row and c not in numeric else
                 row.get(c, "") for c, is_paper in columns]
        lines.append((f'<tr class="{kind}">' if kind else "<tr>") + "".join(
            cell_html(text, "td" if i else "th", is_paper)
            for i, (text, (_, is_paper)) in enumerate(zip(texts, columns, strict=True))))
    title, shown = escape(title_of(path)), " open" if path.name.startswith("table") else ""
    if path.name == "comparison.csv":  # with the paper's numbers alone
        shown = ' class="paper"'
    table = scroll_html(title, f"<table>{'</tr>'.join(lines)}</tr></table>")
    return f"<details{shown}><summary>{title}</summary>{notes_html(notes)}{table}</details>"


def is_plot(path: Path) -> bool:
    """Whether a picture is mostly white paper, as plots are and grids of photographs are not."""
    with naming(path), open_image(path) as image:
        return bool((np.asarray(image.convert("RGB")) >= 250).all(2).mean() > 0.3)


def plot_html(path: Path, captions: dict[str, str]) -> str:
    title, data = escape(title_of(path)), base64.b64encode(path.read_bytes()).decode()
    kind = ' class="plot"' if is_plot(path) else ""
    image = scroll_html(title, f'<img alt="{title}" src="data:image/png;base64,{data}">')
    caption = escape(". ".join([title_of(path), *filter(None, [captions.get(path.stem)])]))
    return f"<figure{kind}><figcaption>{caption}</figcaption>{image}</figure>"


# ------------------------------------------------------------------------- images


class Scores(NamedTuple):
    """table5_per_image.csv"""

    rows: list[str]  # models, the gold standard among them
    names: list[str]  # of images
    metrics: list[str]
    cells: dict[tuple[str, str], dict[str, str]]  # of a row and an image: {metric: text}
    notes: list[str]


def read_scores(path: Path) -> Scores:
    table, notes = read_csv(path, ["model", "image"])
    rows, names = (list(dict.fromkeys(row[c] for row in table)) for c in ("model", "image"))
    # Metrics without reference come first: those alone are in the gold standard's rows, the first
    metrics = list(dict.fromkeys(c for row in table for c in row
                                 if c not in ("model", "image") and row[c]))
    if not metrics:
        raise ValueError(f"{path}: no scores; run evaluate.py")
    return Scores(rows, names, metrics, {(row["model"], row["image"]): row for row in table}, notes)


def find_scores(args: argparse.Namespace) -> Scores:
    """The results' table; without --gt there may be none, and the folders tell rows and images."""
    paths = [args.results / name for name in SCORES if (args.results / name).is_file()]
    if paths or args.gt:
        return read_scores(paths[0] if paths else args.results / SCORES[0])
    return Scores(sorted(folder.name for folder in args.sr.iterdir() if folder.is_dir()),
                  [file.stem for file in list_images(args.lq)[0]], [], {}, [])


def choose_models(rows: list[str], args: argparse.Namespace) -> list[str]:
    """The models of --models, or all, in the tables' order."""
    models = [row for row in rows if row != GOLD]
    for flag, names in (("--models", args.models), ("--open", args.open)):
        for name in names or ():
            if name not in models:
                raise ValueError(f"{flag} {name}: no row of {args.results / 'table5.csv'}; use "
                                 + " ".join(models))
    return [row for row in models if row in (args.models or models) or row in (args.open or ())]


def opening_pair(models: list[str], asked: list[str] | None) -> list[str]:
    """The models on the left and on the right when the page opens.

    asked: of --open. By default UPos against AMO+FT of one network, as in the paper's user study;
    for tuned photos the base against the tuned one; else the first model against the last.
    """
    pairs = [[m, f"{m.removesuffix('UPos')}AMO+FT"] for m in models if m.endswith("UPos")]
    pairs += [["base", m] for m in models if m.startswith("tuned")]
    known = [pair for pair in pairs if set(pair) <= set(models)]
    return asked or [*known, [models[0], models[-1]]][0]


def read_captions(results: Path) -> dict[str, str]:
    """{name of an image: its credit}, of the results' captions.csv if there is one."""
    if not (results / CAPTIONS).is_file():
        return {}
    rows, _ = read_csv(results / CAPTIONS, ["image", "author", "licence"])
    return {row["image"]: f"Photo: {row['author']}, {row['licence']}" for row in rows}


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


class Sources(NamedTuple):
    """Where the images of the page are."""

    args: argparse.Namespace
    models: list[str]
    sets: MultiGT | None  # None: there is no ground truth
    index: dict[str, int]  # of each name in the sets

    def titles(self) -> list[str]:
        """Of the page's sources: models, ground truths, LQ, bicubic LQ."""
        members = [Path(path).parent.name for path in self.sets.paths[0]] if self.sets else []
        if self.sets and self.sets.is_flat:
            members = ["original"]
        return [*self.models, *(f"GT {m}" for m in members), "LQ, nearest", "LQ, bicubic"]

    def size(self, name: str) -> tuple[int, int]:
        """(height, width) of an enlarged image."""
        if self.sets:
            return tuple(self.sets.sizes[self.index[name]].tolist())
        return tuple(4 * side for side in png_size(find_png(self.args.lq, name)))

    def labels(self, name: str) -> list[str]:
        """Of each model and ground truth; empty where there is none."""
        label_of = {value: label for label, value in LABEL_VALUES.items()}
        votes = [] if self.sets is None or self.sets.labels is None else self.sets.labels[
            self.index[name]].tolist()[1:]
        return ["" for _ in self.models] + [""] + [label_of[vote] for vote in votes]

    def read(self, name: str, complete: bool) -> list[np.ndarray | None]:
        """An image in the order of the titles; None where a model has none, unless `complete`."""
        height, width = self.size(name)
        paths = [find_png(self.args.sr / model, name) for model in self.models]
        if missing := [path for path in paths if complete and not path.is_file()]:
            raise FileNotFoundError(f"{missing[0]}: no such image; run evaluate.py with --save-sr")
        paths += map(Path, self.sets.paths[self.index[name]] if self.sets else ())
        lq, images = find_png(self.args.lq, name), []
        for path, scale in (*((path, 1) for path in paths), (lq, 4)):
            image = read_rgb(path) if path.is_file() or path == lq else None
            if image is not None and (image.shape[0] * scale, image.shape[1] * scale) != (
                    height, width):
                raise ValueError(
                    f"{path}: {image.shape[1]}x{image.shape[0]}, but the original is "
                    f"{width}x{height}; are --sr, --gt and --lq of the same data?")
            images.append(image)
        bicubic = Image.fromarray(images[-1]).resize((width, height), Image.Resampling.BICUBIC)
        return [*images, np.asarray(bicubic)]


def webp_url(image: np.ndarray) -> str:
    buffer = io.BytesIO()  # of WebP's settings the fastest within 4 % of the smallest file
    Image.fromarray(image).save(buffer, "WEBP", lossless=True, quality=50, method=2)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def find_sources(args: argparse.Namespace, scores: Scores) -> Sources:
    sets = load_sets(args.gt) if args.gt else None
    index = {name: i for i, name in enumerate(sets.names)} if sets else {}
    if absent := [name for name in scores.names if sets and name not in index]:
        raise ValueError(f"image {absent[0]}: in table5_per_image.csv, but not in {args.gt}")
    models = choose_models(scores.rows, args)
    if not models or not scores.names:
        raise ValueError(f"{args.sr}, {args.lq}: no folders of models, or no PNG images")
    return Sources(args, models, sets, index)


def unscored(scores: Scores, sources: Sources) -> list[str]:
    """Images of --lq that no table knows and some model has enlarged, such as whole photos."""
    names = [file.stem for file in list_images(sources.args.lq)[0]]
    return [name for name in names if name not in scores.names
            and (sources.sets is None or name in sources.index)
            and any(find_png(sources.args.sr / model, name).is_file() for model in sources.models)]


def gather_images(args: argparse.Namespace, scores: Scores, captions: dict[str, str]
                  ) -> tuple[dict, list[str]]:
    """The data of the page's script, and lines that say which images it has.

    Data: images [{name, width, height, caption, files: index into files per source or None, labels
    per source, scores: rows x metrics, text of the CSV}], sources, open: the indices of two,
    rows, metrics, lower (better), files (URLs). Images without scores come first.
    """
    sources = find_sources(args, scores)
    titles, more = sources.titles(), unscored(scores, sources)
    pixels = int(np.prod(sources.size(scores.names[0]))) * len(titles)  # of one test image
    chosen, lines = choose_images(scores.names, args.images or max(1, int(MAX_PIXELS // pixels)))
    if more:
        lines[0] = (f"{len(more) + len(chosen)} images: first {len(more)} without scores, then "
                    f"{lines[0]}")
    files: dict[str, int] = {}  # equal pixels are stored once
    images = []
    for name in (*more, *chosen):
        height, width = sources.size(name)
        cells = [scores.cells.get((row, name), {}) for row in scores.rows]
        images.append({
            "name": name, "width": width, "height": height, "caption": captions.get(name, ""),
            "files": [None if image is None else files.setdefault(webp_url(image), len(files))
                      for image in sources.read(name, complete=name in chosen)],
            "labels": sources.labels(name),
            "scores": [[cell.get(metric, "") for metric in scores.metrics] for cell in cells],
        })  # fmt: skip
    pair = [titles.index(model) for model in opening_pair(sources.models, args.open)]
    return {"images": images, "sources": titles, "open": pair, "rows": scores.rows,
            "metrics": scores.metrics, "lower": LOWER_BETTER, "files": list(files)}, lines


# ------------------------------------------------------------------------- the header


def are_simulated(gt: Path | None) -> bool:
    """Whether a README.txt in --gt, or in a folder above, says that the labels are simulated."""
    folders = (gt.resolve(), *gt.resolve().parents) if gt else ()
    notes = (folder / "README.txt" for folder in folders)
    return any("labels are simulated" in read_text(note) for note in notes if note.is_file())


def header_facts(args: argparse.Namespace, scores: Scores) -> list[str]:
    """Data, seed and commit, each as the records tell it; what no record tells is left out."""
    runs = args.runs or args.sr.parent
    names = dict.fromkeys(n for row in scores.rows for n in (row, row.partition("-")[2]) if n)
    known: dict[str, dict[str, None]] = {"seed": {}, "commit": {}}
    for path in (args.results / "config.json", *(runs / name / "config.json" for name in names)):
        if not path.is_file():
            continue
        try:
            record = json.loads(read_text(path))
            values = record["flags"]["seed"], record["commit"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not the config.json of a run, or damaged") from error
        for of, value in zip(known.values(), values, strict=True):
            of |= {str(value): None} if value else {}
    facts = ["data: " + (scores.notes[0] if scores.notes else str(args.gt or args.lq))]
    return facts + [f"{word}: {', '.join(of)}" for word, of in known.items() if of]


# ------------------------------------------------------------------------- main


def main(args: argparse.Namespace) -> None:
    for flag in ("results", "paper", "sr", "gt", "lq"):
        folder = getattr(args, flag)
        if folder and not folder.is_dir():
            raise FileNotFoundError(f"--{flag} {folder}: no such folder")
    scores, captions = find_scores(args), read_captions(args.results)
    simulated = are_simulated(args.gt)
    facts = header_facts(args, scores) + ["labels are simulated"] * simulated
    data, lines = gather_images(args, scores, captions)
    tables = [table_html(path, args.paper / path.name)
              for pattern in TABLES for path in sorted(args.results.glob(pattern))]
    plots = [plot_html(path, captions)
             for pattern in PLOTS for path in sorted(args.results.glob(pattern))]
    none = "<p>None in this folder.</p>"
    page = fill("report.html", data, TITLE=escape(f"Report: {args.results.resolve().name}"),
                FACTS="".join(f"<li>{escape(fact)}" for fact in facts), CHOICE=notes_html(lines),
                PLOTS="".join(plots) or none, TABLES="".join(tables) or none,
                SWITCH="" if any('class="paper' in table for table in tables) else "hidden",
                CHECKED="" if simulated else "checked")
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
    add("--gt", type=Path, metavar="DIR", help="the test set they were scored on, if there is one")
    add("--lq", required=True, type=Path, metavar="DIR", help="its low-quality images, NAME.png")
    add("--paper", type=Path, default=Path(__file__).resolve().parent, metavar="DIR",
        help="the paper's table1.csv to table8.csv (default: this script's folder)")
    add("--runs", type=Path, metavar="DIR",
        help="runs of the rows, DIR/ROW/config.json, for the header (default: the folder of --sr)")
    add("--images", type=integer(1), metavar="N",
        help="test images on the page, evenly spaced by name (default: as many as keep it below "
        "about 80 MB)")
    add("--models", nargs="+", metavar="NAME",
        help="models whose images are on the page (default: all); the tables show all rows")
    add("--open", nargs=2, metavar=("LEFT", "RIGHT"),
        help="models that the page opens on (default: UPos and AMO+FT, or base and tuned)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("report.py"):
        main(parse_args())
