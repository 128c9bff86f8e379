"""Figures, orderings and seed table of the demo, from evaluate.py's CSVs and SR images.

    python -m demo.report --results results/demo --sr runs/demo/swinir-seed0/sr \
        --data datasets/demo/swinir-seed0
    python -m demo.report --seeds results/demo-swinir-seed{1,2,3,4,5} --out results/demo/seeds.csv

Writes crops.png, tradeoff.png, orderings.csv and finetuning.csv into --results. An ordering that is
not held is a warning: a toy experiment has seeds on which it fails.
"""

import argparse
import csv
import sys
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from models.checkpoint import write_csv

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of backend)

CHAIN = ("OrigsOnly", "Rand", "UPos", "SMA", "AMO")
SAMPLERS = (*CHAIN, "SMP")
# (name, column, rows from lowest to highest); held on 3 of 3 seeds of the prototype
ROBUST = [
    ("Q rises", "q", CHAIN),
    ("judge rises", "judge", CHAIN),
    ("PSNR to the original falls", "psnr_original", CHAIN[::-1]),
    ("PSNR to the positives falls from Rand on", "psnr", CHAIN[:0:-1]),
]
OPEN = [  # not robust there: printed as they come out
    ("SMP above UPos in Q", "q", ("UPos", "SMP")),
    ("OrigsOnly above Rand in PSNR to the positives", "psnr", ("Rand", "OrigsOnly")),
    ("UPos+FT above AMO in Q", "q", ("AMO", "UPos+FT")),
]


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV whose comment lines begin with '#'."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; run evaluate.py first")
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


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
    """(kind, ordering, "held" or "not held", the numbers) for every comparison of DEMO's list."""
    result = []
    for kind, checks in (("robust", ROBUST), ("open", OPEN)):
        for name, column, chain in checks:
            values = [means[row][column] for row in chain]
            held = all(a < b for a, b in zip(values, values[1:], strict=False))
            numbers = " < ".join(f"{r} {v:.2f}" for r, v in zip(chain, values, strict=True))
            result.append((kind, name, "held" if held else "not held", numbers))
        if kind == "robust":
            others = {row: means[row]["q"] for row in (*SAMPLERS, "UPos+FT")}
            best = max(others, key=others.get)
            top = means["AMO+FT"]["q"]
            result.append((kind, "AMO+FT has the highest Q", "held" if top > others[best]
                           else "not held", f"{best} {others[best]:.2f} < AMO+FT {top:.2f}"))
    return result


def incoherent_energy(sr: np.ndarray, pristine: np.ndarray) -> float:
    """High frequency of the SR that the pristine image does not explain (structured noise).

    (1 - rho^2) |HP(sr)|^2 / |HP(pristine)|^2 on luma, rho the correlation of the two high-passed
    images. Sharpness that is right does not count; grids, stripes and noise do.
    """
    high = []
    for image in (sr, pristine):
        luma = image.astype(np.float64) @ (0.299, 0.587, 0.114)
        high.append(luma - gaussian_filter(luma, 1.0))
    a, b = high
    rho2 = (a * b).sum() ** 2 / ((a * a).sum() * (b * b).sum())
    return float((1 - rho2) * (a * a).sum() / (b * b).sum())


def finetuning(
    means: dict[str, dict[str, float]], label: str, sr: Path, pristine: Path
) -> list[list[str]]:
    """Change of each fine-tuned row against its base: Q, judge, PSNR, structured noise."""
    names = sorted(p.stem for p in pristine.glob("*.png"))

    def noise(row: str) -> float:
        return float(np.mean([incoherent_energy(load(sr / f"{label}-{row}" / f"{n}.png"),
                                                load(pristine / f"{n}.png")) for n in names
                              if (sr / f"{label}-{row}" / f"{n}.png").is_file()]))

    rows = []
    for row in means:
        if "+FT" in row:
            base = row.split("+")[0]
            change = [means[row][m] - means[base][m] for m in ("q", "judge", "psnr")]
            rows.append([row, *(f"{c:+.2f}" for c in change), f"{noise(base):.3f}",
                         f"{noise(row):.3f}"])
    return rows


def load(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def crops_figure(
    per_image: list[dict], label: str, data: Path, sr: Path, path: Path, size: int = 56
) -> None:
    """SR crops, a row per test image and a column per model, with each image's Q inset."""
    gt_dir = data / "HGGT/Test/GT/Test-100/images/original"
    lq_dir = data / "HGGT/Test/Blind_Degradation_Benchmark_LQ/Test-100/Blind_LR"
    scores = {(r["model"], r["image"]): float(r["q"]) for r in per_image if r["q"]}
    rows = list(dict.fromkeys(r["model"].split("-", 1)[1] for r in per_image))
    images = sorted(p.stem for p in gt_dir.glob("*.png"))
    photos = {n.rstrip("0123456789"): n for n in images[::-1]}  # one image of each
    images = [n for k, n in sorted(photos.items()) if k not in ("leaves", "mixed", "letters")][:5]
    titles = ["LQ", "original", *rows]
    fig, axes = plt.subplots(len(images), len(titles),
                             figsize=(1.3 * len(titles), 1.37 * len(images)), squeeze=False)
    for row, (name, line) in enumerate(zip(images, axes, strict=True)):
        original = load(gt_dir / f"{name}.png")
        height, width = original.shape[:2]
        detail = np.abs(np.diff(original.astype(float).mean(2), axis=1))
        detail = gaussian_filter(detail, size / 4)[size // 2 : height - size // 2,
                                                   size // 2 : width - size // 2]
        top, left = (int(i) // 4 * 4 for i in np.unravel_index(detail.argmax(), detail.shape))
        lq = Image.fromarray(load(lq_dir / f"{name}.png")).resize((width, height), 0)
        shown = [np.asarray(lq), original, *(load(sr / f"{label}-{r}" / f"{name}.png")
                                             for r in rows)]
        for ax, image, title in zip(line, shown, titles, strict=True):
            ax.imshow(image[top : top + size, left : left + size], interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            score = scores.get((f"{label}-{title}", name))
            if score is not None:
                ax.text(0.97, 0.04, f"Q {score:.1f}", transform=ax.transAxes, ha="right",
                        fontsize=9, color="white",
                        bbox={"facecolor": "black", "alpha": 0.65, "pad": 1.5, "lw": 0})
            if row == 0:
                ax.set_title(title, fontsize=9)
    fig.subplots_adjust(left=0.005, right=0.995, top=0.94, bottom=0.005, wspace=0.03, hspace=0.03)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def tradeoff_figure(means: dict[str, dict[str, float]], label: str, path: Path) -> None:
    """Q against PSNR, to the original and to the positives: one point per row."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 5.2), sharey=True)
    panels = (("psnr_original", "PSNR to the original (dB)"),
              ("psnr", "PSNR to the positives (dB)"))
    for ax, (column, title) in zip(axes, panels, strict=True):
        for i, (row, values) in enumerate(sorted(means.items(), key=lambda m: m[1]["q"])):
            tuned, left = "+FT" in row, i % 2 == 0  # names to alternating sides, as points crowd
            ax.scatter(values[column], values["q"], s=34, zorder=3,
                       marker="^" if tuned else "o", color="tab:orange" if tuned else "tab:blue")
            ax.annotate(row, (values[column], values["q"]), fontsize=8, va="center",
                        ha="right" if left else "left", xytext=(-7 if left else 7, 0),
                        textcoords="offset points")
        chain = [(means[r][column], means[r]["q"]) for r in CHAIN]
        ax.plot(*zip(*chain, strict=True), color="tab:blue", lw=0.8, alpha=0.5)
        ax.set_xlabel(title)
        ax.grid(alpha=0.3)
        ax.margins(x=0.14, y=0.08)
    axes[0].set_ylabel("Q (tiny NR-IQA, 0-100)")
    fig.suptitle(f"{label} demo: samplers (circles) and fine-tuning (triangles)", fontsize=11)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def report(results: Path, sr: Path, data: Path) -> None:
    per_image = read_csv(results / "table5_per_image.csv")
    per_image = [r for r in per_image if r["model"] != "Gold Standard"]
    label = per_image[0]["model"].split("-", 1)[0]
    means = row_means(per_image)
    crops_figure(per_image, label, data, sr, results / "crops.png")
    tradeoff_figure(means, label, results / "tradeoff.png")

    print("\nFine-tuning, change against its base, and structured noise before and after. The rows "
          "differ\nin learning rate and in what Q gained: their noise is not compared at equal Q")
    header = ["row", "d_q", "d_judge", "d_psnr", "noise_base", "noise_tuned"]
    rows = finetuning(means, label, sr, data / "pristine/test")
    write_csv(results / "finetuning.csv", header, rows)
    for row in [header, *rows]:
        print("  " + " ".join(f"{cell:>12}" for cell in row))

    print("\nOrderings")
    checks = orderings(means)
    write_csv(results / "orderings.csv", ["kind", "ordering", "outcome", "numbers"], checks)
    for kind, name, outcome, numbers in checks:
        mark = "warning: " if kind == "robust" and outcome != "held" else ""
        print(f"  {mark}{name}: {outcome}{'' if kind == 'robust' else ' (not robust)'}: {numbers}")


def seeds_table(folders: list[Path], out: Path) -> None:
    """One row per ordering, one column per seed, and how often it held."""
    tables = [read_csv(folder / "orderings.csv") for folder in folders]
    seeds = [folder.name.rsplit("seed", 1)[1] for folder in folders]
    header = ["kind", "ordering", "held", *(f"seed_{s}" for s in seeds)]
    rows = []
    for lines in zip(*tables, strict=True):
        outcomes = [line["outcome"] for line in lines]
        rows.append([lines[0]["kind"], lines[0]["ordering"],
                     f"{outcomes.count('held')} of {len(outcomes)}", *outcomes])
    per_seed = [row_means([r for r in read_csv(f / "table5_per_image.csv")
                           if r["model"] != "Gold Standard"]) for f in folders]
    write_csv(out, header, rows)
    metrics = ("q", "judge", "psnr", "psnr_original")
    write_csv(out.with_name(f"{out.stem}_means.csv"),
              ["row", *(f"{m}{s}" for m in metrics for s in ("", "_sd"))],
              [[row, *(f"{f([p[row][m] for p in per_seed]):.2f}" for m in metrics
                       for f in (np.mean, np.std))] for row in per_seed[0]])
    for row in rows:
        print(f"  {row[1]}: held on {row[2]}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--results", type=Path, help="folder of table5.csv; figures go there")
    parser.add_argument("--sr", type=Path, help="folder of SR images, one subfolder per model")
    parser.add_argument("--data", type=Path, help="the demo data")
    parser.add_argument("--seeds", type=Path, nargs="+", help="result folders of several seeds")
    parser.add_argument("--out", type=Path, help="table over the seeds, a CSV")
    args = parser.parse_args(argv)
    if not (args.seeds and args.out) and not (args.results and args.sr and args.data):
        parser.error("give --results, --sr and --data; or --seeds and --out")
    return args


def main(args: argparse.Namespace) -> None:
    if args.seeds:
        seeds_table(args.seeds, args.out)
    else:
        report(args.results, args.sr, args.data)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        print(f"demo.report: {error}", file=sys.stderr)
        sys.exit(2)
