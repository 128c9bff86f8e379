"""What the demo makes of its tables and logs: orderings, tables over seeds, votes for the study.

demo/run.py calls these functions. The command writes the training logs that later runs are compared
with:

    python -m demo.report --logs runs/demo/swinir-seed0 --out results/reference/swinir-seed0.csv
"""

import argparse
import json
import platform
from pathlib import Path

import numpy as np

from demo.data import RATER_NOISE, rng_of, to_float, utilities
from models.checkpoint import read_csv, write_csv
from models.distributed import clean_exit
from models.flags import new_parser
from models.images import read_rgb
from paper.claims import ordering
from paper.report import GOLD
from paper.user_study import checksum, read_key

CHAIN = ("OrigsOnly", "Rand", "UPos", "SMA", "AMO")
# (name, column, rows from lowest to highest); held on 3 of 3 seeds of the prototype
ROBUST = [
    ("Q rises", "q", CHAIN),
    ("judge rises", "judge", CHAIN),
    ("PSNR to the original falls", "psnr_original", CHAIN[::-1]),
    ("PSNR to the positives falls from Rand on", "psnr", CHAIN[:0:-1]),
    ("AMO+FT has the highest Q", "q", ((*CHAIN, "SMP", "UPos+FT"), "AMO+FT")),
]
OPEN = [  # not robust there: printed as they come out
    ("SMP above UPos in Q", "q", ("UPos", "SMP")),
    ("OrigsOnly above Rand in PSNR to the positives", "psnr", ("Rand", "OrigsOnly")),
    ("UPos+FT above AMO in Q", "q", ("AMO", "UPos+FT")),
]


def row_means(per_image: list[dict[str, str]]) -> dict[str, dict[str, float]]:
    """{row without the network's name: {metric: mean over the images}} of a per-image table."""
    metrics = [k for k, v in per_image[0].items() if k not in ("model", "image") and v]
    values: dict[str, dict[str, list[float]]] = {}
    for row in per_image:
        name = row["model"].split("-", 1)[1] if "-" in row["model"] else row["model"]
        for metric in metrics:
            if row[metric]:
                values.setdefault(name, {}).setdefault(metric, []).append(float(row[metric]))
    return {name: {m: float(np.mean(v)) for m, v in d.items()} for name, d in values.items()}


def orderings(means: dict[str, dict[str, float]]) -> list[tuple[str, str, str, str]]:
    """(kind, ordering, outcome, the numbers) of each comparison above; see paper/claims.py."""
    return [(kind, name, *ordering({r: v[column] for r, v in means.items() if column in v}, rows))
            for kind, checks in (("robust", ROBUST), ("open", OPEN))
            for name, column, rows in checks]


def table_rows(results: Path) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Means of the rows of table5_per_image.csv, without the gold standard; its comment lines."""
    per_image, notes = read_csv(results / "table5_per_image.csv")
    return row_means([r for r in per_image if r["model"] != GOLD]), notes


def write_orderings(results: Path) -> None:
    """Write and print results/orderings.csv.

    An ordering that does not hold is a warning, not an error: on some seeds a toy experiment fails.
    """
    means, notes = table_rows(results)
    checks = orderings(means)
    write_csv(results / "orderings.csv", ["kind", "ordering", "outcome", "numbers"], checks, notes)
    for kind, name, outcome, numbers in checks:
        mark = "warning: " if kind == "robust" and outcome != "held" else ""
        print(f"  {mark}{name}: {outcome}{'' if kind == 'robust' else ' (not robust)'}: {numbers}")


def seeds_table(folders: dict[int, Path], out: Path) -> None:
    """Write two tables over the result folders of several seeds, {seed: folder}.

    out: how often each ordering held, with a column for each seed
    <out>_means.csv: mean and standard deviation over the seeds of each row's metrics
    """
    read = [read_csv(folder / "orderings.csv") for folder in folders.values()]
    tables, notes = zip(*read, strict=True)
    rows = []
    for lines in zip(*tables, strict=True):
        outcomes = [line["outcome"] for line in lines]
        rows.append([lines[0]["kind"], lines[0]["ordering"],
                     f"{outcomes.count('held')} of {len(outcomes)}", *outcomes])
    notes = [f"seed {s}: {line}" for s, lines in zip(folders, notes, strict=True) for line in lines]
    write_csv(out, ["kind", "ordering", "held", *(f"seed_{s}" for s in folders)], rows, notes)

    per_seed = [table_rows(folder)[0] for folder in folders.values()]
    metrics = ("q", "judge", "psnr", "psnr_original")
    header = ["row", *(f"{m}{end}" for m in metrics for end in ("", "_sd"))]
    means = []
    for row in per_seed[0]:
        values = [[seed[row][m] for seed in per_seed] for m in metrics]
        means.append([row, *(f"{f(v):.2f}" for v in values for f in (np.mean, np.std))])
    write_csv(out.with_name(f"{out.stem}_means.csv"), header, means, notes)
    for row in rows:
        print(f"  {row[1]}: held on {row[2]}")


def curve_figure(table: Path) -> None:
    """Plot Q, the judge and PSNR to the positives against the scale of the adapters.

    table: of evaluate.py, its rows named by the scales; the picture is written beside it, as .png.
    """
    from paper.draw import WIDTH, plt, save  # and matplotlib: tables alone do not need it

    rows = [row for row in read_csv(table, ("model", "q", "judge", "psnr"))[0]
            if row["model"] != GOLD]
    scales = [float(row["model"]) for row in rows]
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH, 2), layout="constrained")
    titles = {"q": "Q", "judge": "judge", "psnr": "PSNR to the positives, dB"}
    for ax, (column, title) in zip(axes, titles.items(), strict=True):
        ax.plot(scales, [float(row[column]) for row in rows], "o-")
        ax.set(title=title, xlabel="--lora-scale", xticks=scales)
        ax.axvline(1, color="0.8", zorder=0)
    save(fig, table.with_suffix(".png"), "")


def training_logs(runs: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of every log.csv below a folder, with the run's name in front of each row."""
    rows = [{"run": path.parent.name} | row for path in sorted(runs.glob("*/log.csv"))
            for row in read_csv(path, ("step", "l_pix"))[0]]
    if not rows:
        raise FileNotFoundError(f"{runs}: no */log.csv there (--logs)")
    header = list(max(rows, key=len))
    header += [key for key in dict.fromkeys(k for row in rows for k in row) if key not in header]
    return header, [[row.get(key, "") for key in header] for row in rows]


def compare_logs(runs: Path, reference: Path) -> None:
    """Print how the training logs differ from the reference.

    Another CPU or another version of torch rounds differently; the numbers are then similar.
    """
    logs: list[dict[str, list[dict[str, str]]]] = [{}, {}]
    header, rows = training_logs(runs)
    ours = [dict(zip(header, row, strict=True)) for row in rows]
    theirs = read_csv(reference, ("run", "step", "l_pix"))[0]
    for log, table in zip(logs, (ours, theirs), strict=True):
        for row in table:
            log.setdefault(row["run"], []).append(row)
    equal = 0
    for name, expected in logs[1].items():
        found = logs[0].get(name, [])
        if found == expected:
            equal += 1
        elif not found:
            print(f"  {name}: no log")
        else:
            steps = [b["step"] for a, b in zip(found, expected, strict=False) if a != b]
            print(f"  {name}: {f'differs from step {steps[0]} on' if steps else 'other length'}; "
                  f"last l_pix {found[-1]['l_pix']}, reference {expected[-1]['l_pix']}")
    print(f"  training logs: {equal} of {len(logs[1])} equal to {reference}")


def simulate_votes(study: Path, sr: Path, pristine: Path, out: Path) -> None:
    """Write a votes file for each rater of the user study, as demo/data.py simulates raters.

    study: folder that `paper.user_study make` wrote; sr: a folder of SR images for each model.
    It shows the analysis, and says nothing about what people see.
    """
    key = read_key(study / "key.json")
    out.mkdir(parents=True, exist_ok=True)
    for rater, plan in key["plan"].items():
        rng, votes = rng_of(key["study"], rater), []
        for pair in plan["pairs"]:
            a, b = (to_float(read_rgb(sr / key[m] / pair["image"])) for m in "ab")
            prefers_a = utilities([b, a], to_float(read_rgb(pristine / pair["image"])))[1]
            prefers_a += rng.normal(0, RATER_NOISE)
            choice = "left" if (prefers_a > 0) == (pair["left"] == "a") else "right"
            votes.append({"id": pair["id"], "choice": choice, "ms": 1000, "zoom": 100})
        record = {"study": key["study"], "rater": rater, "finished": True, "votes": votes,
                  "checksum": checksum(key["study"], rater, plan["token"], votes)}
        (out / f"votes_{key['study']}_{rater}.json").write_text(json.dumps(record))


def write_logs(runs: Path, out: Path) -> None:
    import torch

    write_csv(out, *training_logs(runs), [
        f"the log.csv of every run in {runs}, one thread on a CPU ({platform.machine()}), "
        f"torch {torch.__version__}, numpy {np.__version__}"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, "python -m demo.report")
    parser.add_argument("--logs", type=Path, required=True, help="folder of the run folders")
    parser.add_argument("--out", type=Path, required=True, help="table to write (.csv)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    write_logs(args.logs, args.out)


if __name__ == "__main__":
    with clean_exit("demo.report"):
        main(parse_args())
