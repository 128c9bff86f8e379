"""Our tables beside the paper's: Table 7, the comparison, the means that the plots show."""

import math
from pathlib import Path

import numpy as np

from models.checkpoint import read_csv, write_csv

FULL_REFERENCE = ("psnr", "ssim", "lpips", "lpips_st", "dists", "psnr_original")
KEY = {n: "model" if n in (5, 7, 8) else "pyiqa_name" for n in range(1, 9)}  # names a table's rows
TABLE7 = ("model", "label", "nr_metric", "lambda_a", "no_human_labels")  # its first columns
SETTINGS = ("metric", "pyiqa_name", "image", *TABLE7)
SEEDS = {"swinir": "SwinIR", "rrdb": "RealESRGAN"}  # of the demo's tables over seeds
Means = dict[str, dict[str, float]]  # {<Net>-<Row>: {metric: mean over the images}}


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


def load_seeds(folder: Path) -> tuple[Means, Means, int]:
    """Means and standard deviations over seeds, {<Net>-<Row>: {metric: value}}, and the most seeds.

    From seeds_<net>_means.csv of the demo, as far as they exist.
    """
    means, spreads, count = {}, {}, 0
    for net, label in SEEDS.items():
        path = folder / f"seeds_{net}_means.csv"
        if path.is_file():
            rows, notes = read_csv(path, ["row"])
            count = max(count, len({n.split(":")[0] for n in notes if n.startswith("seed ")}))
            for row in rows:
                values = numbers(row)
                spread = {c.removesuffix("_sd"): v for c, v in values.items() if c.endswith("_sd")}
                means[f"{label}-{row['row']}"] = {c: values[c] for c in spread}
                spreads[f"{label}-{row['row']}"] = spread
    return means, spreads, count
