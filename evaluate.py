"""Score super-resolution networks on a test set: Table 5 (HGGT Test-100) and Table 8 (RealSR).

    python evaluate.py --models SwinIR-AMO=runs/swinir-amo/net_g_ema.pt SwinIR-UPos=... \\
        --gt datasets/HGGT/Test/GT/Test-100 \\
        --lq datasets/HGGT/Test/Blind_Degradation_Benchmark_LQ/Test-100/Blind_LR \\
        --out results/test100/table5.csv                               # CPU or one GPU
    python evaluate.py --models SwinIR-AMO=... --realsr "datasets/RealSR(V3)" --out results/t8.csv
    torchrun --nproc_per_node=4 evaluate.py ...                        # four processes
    ... --metrics psnr ssim --extra q=demo.quality:q@runs/q.pt         # needs no download

In:  checkpoints of x4 networks (of train_sr.py or public; besides SwinIR and RRDBNet those that
     spandrel reads); GT as models/hggt.py reads it, LQ as NAME.png; or RealSR v3 with its *_HR.png
     and *_LR4.png.
Out: --out, one row per model below comment lines that state the protocol; beside it
     <out>_per_image.csv, one row per model and image, with the PSNR against the original as well.
     Rows of the paper's table (paper/) have its order and its names, in column label; others follow
     below. no_human_labels and, of fine-tuning, nr_metric (Q) and lambda_a are what the checkpoint
     records ("-": none), and empty where it records nothing, as public files do.
     Both are rewritten after every model. scores/ beside them keeps every score (models/scores.py),
     so that a rerun computes only what is missing: new rows, new columns, and what depends on a
     changed file. A stopped run (SIGTERM, Ctrl-C: exit code 0; or kill -9) loses at most one image:
     rerun the same command to resume, on any number of processes. After a change to the code of
     your own metric, delete its file in scores/.
     Images are processed one by one. Batches of 4 to 8 took 0.81 to 1.12 times as long on a CPU and
     moved SR pixels by a level, so a resumed table would differ from an undisturbed one.

Protocol (paper Sec. 5; HGGT's scripts): whole images, SR rounded to 8 bit before every metric. Full
reference: RGB, 4-pixel border cropped, mean over an image's Positive GTs (the original if there is
none, or no labels), then over images. No reference: whole SR. "Gold Standard": the best
no-reference value among the GTs of a set, mean over the sets.
"""

import argparse
import contextlib
import functools
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from models.checkpoint import file_digest, read_csv, read_settings, write_csv
from models.distributed import (
    agree,
    check_shared,
    clean_exit,
    cleanup,
    init_distributed,
    rank_and_world,
    rank_zero_first,
)
from models.flags import new_parser, refuse
from models.hggt import MultiGT
from models.images import read_rgb, write_png
from models.metrics import (
    CROP_BORDER,
    METRICS,
    as_image,
    as_tensor,
    load_metric,
    load_metrics,
    pyiqa_name,
    rounded,
    smallest_side,
    split_pairs,
)
from models.progress import progress
from models.samplers import SAMPLERS
from models.scores import (
    ScoreCache,
    compared_key,
    file_hashes,
    file_key,
    output_key,
    pyiqa_version,
)
from models.testset import find_hggt_test, find_realsr
from models.weights import load_net

GOLD = "Gold Standard"
HEAD = ["model", "label", "nr_metric", "lambda_a", "no_human_labels"]  # the table's first columns
DECIMALS = {"ssim": 3, "lpips": 3, "lpips_st": 3, "dists": 3}  # of the printed table; else 2


class TestImage(NamedTuple):
    name: str
    lq: str  # file
    gts: list[str]  # files of the set, the original first
    references: dict[str, list[str]]  # of them, those that a column of each kind compares with


class Column(NamedTuple):
    kind: str  # "nr" (no reference), "fr" (the Positives) or "original" (the original alone)
    function: Callable  # a metric: (sr) or (sr, gts), each (N, 3, H, W) in [0, 1] -> (N,)
    cache: ScoreCache


# ------------------------------------------------------------------------- the protocol


def references(gts: list[str], labels: np.ndarray | None) -> dict[str, list[str]]:
    """The GTs of a set, (K,), that a column of each kind compares with; labels: +1 is positive."""
    positives = [] if labels is None else [gts[k] for k in np.flatnonzero(labels > 0)]
    return {"nr": [], "fr": positives or gts[:1], "original": gts[:1]}


def setting_cells(settings: dict) -> list[str]:
    """nr_metric, lambda_a and no_human_labels of a row, from what its checkpoint records.

    The first two are of fine-tuning, "-" where there was none (paper Table 7); all are empty where
    nothing is recorded.
    """
    sampler = settings.get("sampler")
    if sampler not in SAMPLERS:
        return ["", "", ""]
    no_human_labels = "no" if sampler in ("upos", "smp") else "yes"
    if "lambda_q" not in settings:
        return ["-", "-", no_human_labels]
    iqa = settings["iqa"] if settings["lambda_q"] else ["-"]
    iqa = [iqa] if isinstance(iqa, str) else iqa  # in a last.pt
    names = [name.partition("@")[0].rpartition(":")[2] for name in iqa]  # module:q@FILE -> q
    return ["+".join(names), f"{settings['lambda_a']:g}", no_human_labels]


@torch.no_grad()
def super_resolve(net: nn.Module, lq: Tensor, name: str) -> Tensor:
    """(1, 3, H, W) in [0, 1] -> (1, 3, 4H, 4W) as the saved PNG would be: clipped, 8-bit levels.

    Raises ValueError, beginning with `name`, if the network's output is not finite.
    """
    sr = net(lq)
    if not sr.isfinite().all():
        raise ValueError(f"{name}: the network's output is not finite")
    return rounded(sr)


def gold_standard(
    images: list[TestImage], columns: dict[str, Column], sha256: dict[str, str],
    device: torch.device,
) -> list[dict[str, float]]:
    """{no-reference column: best score among the GTs} of each image."""
    rank, world = rank_and_world()
    columns = {name: column for name, column in columns.items() if column.kind == "nr"}
    keys = [[file_key(sha256[gt]) for gt in image.gts] for image in images]
    todo = [i for i in range(rank, len(images), world)
            if any(key not in column.cache for column in columns.values() for key in keys[i])]
    for i in progress(todo, desc=GOLD, unit="image", disable=rank > 0 or not todo):
        for key, gt in zip(keys[i], images[i].gts, strict=True):
            x = to_tensor(gt, device)
            for column in columns.values():
                if key not in column.cache:  # one by one, as analyze_iqa.py does on a CPU
                    column.cache.score(column.function, {key: gt}, x)
    for column in columns.values():
        column.cache.share()
    return [{name: max(column.cache.known[key].score for key in of_set)
             for name, column in columns.items()} for of_set in keys]


def score_model(
    row: str, checkpoint: str, images: list[TestImage], columns: dict[str, Column],
    sha256: dict[str, str], save_sr: str | None, device: torch.device,
) -> list[dict[str, float]]:
    """{column: score} of each image; only what the caches lack is computed.

    sha256: hash of each file. save_sr: folder for the SR images, as <row>/<NAME>.png.
    """
    rank, world = rank_and_world()
    made_by = [output_key(sha256[checkpoint], sha256[image.lq]) for image in images]
    hashes = [{kind: [sha256[gt] for gt in gts] for kind, gts in image.references.items()}
              for image in images]
    keys = [{name: compared_key(key, gts[column.kind], CROP_BORDER)
             for name, column in columns.items()}
            for key, gts in zip(made_by, hashes, strict=True)]
    saved = [Path(save_sr or "", row, f"{image.name}.png") for image in images]
    # Of this process's share, every world-th image
    todo = [i for i in range(rank, len(images), world)
            if any(keys[i][name] not in column.cache for name, column in columns.items())
            or (save_sr and not is_saved(saved[i], made_by[i]))]
    net = load_net(checkpoint).to(device) if todo else None
    for i in progress(todo, desc=row, unit="image", disable=rank > 0 or not todo):
        sr = super_resolve(net, to_tensor(images[i].lq, device), f"{row}/{images[i].name}")
        if save_sr:
            save_png(saved[i], sr, made_by[i])
        score_sr(row, sr, images[i], columns, keys[i])
    for column in columns.values():
        column.cache.share()
    return [{name: column.cache.known[of_image[name]].score for name, column in columns.items()}
            for of_image in keys]


def score_sr(
    row: str, sr: Tensor, image: TestImage, columns: dict[str, Column], keys: dict[str, str]
) -> None:
    """Score one SR image, (1, 3, H, W) in [0, 1], in the columns whose caches lack its key."""
    decoded = functools.cache(lambda path: to_tensor(path, sr.device))
    for name, column in columns.items():
        if keys[name] not in column.cache:
            gts = [decoded(path) for path in image.references[column.kind]]
            column.cache.score(column.function, {keys[name]: f"{row}/{image.name}"}, sr,
                               torch.cat(gts) if gts else None)


# ------------------------------------------------------------------------- inputs


def read_test_set(args: argparse.Namespace) -> tuple[MultiGT, list[TestImage], list[str]]:
    """The sets of --gt or --realsr, the same as images, and a line for each problem."""
    if args.realsr:
        sets, lq_files, problems = rank_zero_first(lambda: find_realsr(args.realsr))
    else:
        sets, lq_files, problems = rank_zero_first(lambda: find_hggt_test(args.gt, args.lq))
    labels = [None] * len(sets.names) if sets.labels is None else sets.labels
    images = [TestImage(name, lq, gts, references(gts, of_set)) for name, lq, gts, of_set
              in zip(sets.names, lq_files, sets.paths, labels, strict=True)]
    return sets, images, problems


def read_columns(args: argparse.Namespace, sets: MultiGT) -> tuple[dict[str, str], list[str]]:
    """--metrics and --extra as {column: NAME or NAME@FILE}, and a line for all that is wrong."""
    specs = {metric.partition("@")[0]: metric for metric in args.metrics}
    extra = split_pairs(args.extra, "--extra")
    taken = {*specs, *HEAD, "image", "psnr_original"}
    problems = [f"--extra {name}: is a column already" for name in extra if name in taken]
    specs, smallest = specs | extra, int(sets.sizes.min()) if len(sets.sizes) else 0
    return specs, problems + [
        f"metric {c}: needs GTs of {smallest_side(m)} px, the smallest has {smallest}"
        for c, m in specs.items() if smallest < smallest_side(m)]


def open_columns(
    metrics: dict[str, tuple[str, Callable]], specs: dict[str, str], folder: Path,
    device: torch.device,
) -> dict[str, Column]:
    """The per-image table's columns that are scored; those of the same metric share a cache."""
    specs = {c: pyiqa_name(specs[c]) for c in metrics} | {"psnr_original": "psnr"}
    caches = {name: ScoreCache(name, folder) for name in dict.fromkeys(specs.values())}
    metrics = metrics | {"psnr_original": ("original", load_metric("psnr", device)[1])}
    return {c: Column(*metrics[c], caches[name]) for c, name in specs.items()}


def read_labels(table: int) -> dict[str, str]:
    """{row: the name that the paper prints} of the paper's Table 5 or 8, in its order."""
    path = Path(__file__).resolve().parent / "paper" / f"table{table}.csv"
    return {row["model"]: row["label"] for row in read_csv(path, ["model", "label"])[0]}


def check_models(paths: list[str]) -> list[str]:
    """A line for each checkpoint that cannot be loaded."""
    problems = []
    for path in paths:
        try:
            load_net(path)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return problems


def to_tensor(path: str, device: torch.device) -> Tensor:
    """An image file as (1, 3, H, W) float in [0, 1]."""
    return as_tensor(read_rgb(path), device)


# ------------------------------------------------------------------------- outputs


def protocol(
    args: argparse.Namespace, sets: MultiGT, specs: dict[str, str], functions: dict[str, Callable],
    device: torch.device,
) -> list[str]:
    """Comment lines of the tables: data, protocol, metrics with their weights, versions.

    functions: of the available columns
    """
    against = "the original (no labels)"
    if sets.labels is not None:
        against = (f"the mean of the Positive GTs; {without_positive(sets)} images without one "
                   "against the original")
    files = {c: m.partition("@") for c, m in specs.items() if "@" in m}
    weights = {c: getattr(f, "weights", "") for c, f in functions.items() if c not in files}
    return [
        f"{args.realsr or args.gt}: {len(sets.names)} images, SR rounded to 8 bit",
        f"full reference: RGB, {CROP_BORDER}-pixel border cropped; PSNR in dB (inf: equal images), "
        "SSIM 11x11 Gaussian of sigma 1.5 in float64, LPIPS AlexNet",
        f"full reference against {against}",
        "no reference: whole SR, up = better (a lower-better score is negated)",
        f"metrics: {' '.join(specs)}",
        *(f"column {c}: empty, its weights are unavailable" for c in specs if c not in functions),
        f"Python {platform.python_version()}, torch {torch.__version__}, pyiqa {pyiqa_version()}, "
        f"on {device.type}",
        *(f"column {c}: {name}, weights sha256 {file_digest(file)}"
          for c, (name, _, file) in files.items()),
        *(f"column {c}: weights {names}" for c, names in weights.items() if names),
    ]


def without_positive(sets: MultiGT) -> int:
    """Number of labelled sets without a Positive GT."""
    return 0 if sets.labels is None else int((sets.labels <= 0).all(1).sum())


def write_tables(
    out: Path, columns: list[str], names: list[str], rows: dict[str, list[dict[str, float]]],
    heads: dict[str, list[str]], comments: list[str],
) -> list[dict[str, str]]:
    """Write --out, whose rows are returned, and <out>_per_image.csv.

    rows: {row: {column: score} of each image}; heads: {row: cells of HEAD}
    """
    table, per_image, every = [], [], [*columns, "psnr_original"]
    for row, scores in rows.items():
        scores = [{c: round(s, 6) for c, s in of_image.items()} for of_image in scores]
        means = {c: float(np.mean([s[c] for s in scores])) for c in scores[0]}
        table.append([*heads[row], *(f"{means[c]:.4f}" if c in means else "" for c in columns)])
        for name, s in zip(names, scores, strict=True):
            per_image.append([row, name, *(f"{s[c]:.6f}" if c in s else "" for c in every)])
    write_csv(out, [*HEAD, *columns], table, comments)
    write_csv(out.with_name(f"{out.stem}_per_image.csv"), ["model", "image", *every], per_image,
              comments)
    return [dict(zip([*HEAD, *columns], row, strict=True)) for row in table]


def print_table(table: list[dict[str, str]], filled: list[str], further: list[str]) -> None:
    """The filled columns, aligned, with the paper's decimals; an empty line above `further`."""
    shown = [["model", "no_human_labels", *filled]]
    for row in table:
        shown.append([row["label"], row["no_human_labels"] or "-", *(
            f"{float(row[c]):.{DECIMALS.get(c, 2)}f}" if row[c] else "-" for c in filled)])
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        if row[0] in further[:1]:
            print()
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))


def save_png(path: Path, sr: Tensor, made_by: str) -> None:
    """Write (1, 3, H, W) in [0, 1] as a PNG that notes what made it."""
    note = PngInfo()
    note.add_text("made_by", made_by)
    write_png(path, as_image(sr), pnginfo=note)


def is_saved(path: Path, made_by: str) -> bool:
    """Whether a file is what `save_png` wrote for this checkpoint and LQ."""
    with contextlib.suppress(Exception), Image.open(path) as image:  # a broken file raises anything
        return image.info.get("made_by") == made_by
    return False


# ------------------------------------------------------------------------- main


def main(args: argparse.Namespace) -> None:
    rank, _, device = init_distributed()

    # Inputs, all of them checked before the first image is made
    models = split_pairs(args.models, "--models")
    sets, images, problems = read_test_set(args)
    specs, column_problems = read_columns(args, sets)
    refuse([*problems, *column_problems, *check_models(list(models.values()))])

    # Rows: the paper's in its order and with its names, then others
    paper_table = 8 if args.realsr else 5
    labels = read_labels(paper_table)
    listed = [row for row in labels if row in models]
    further = [row for row in models if row not in labels]
    heads = {GOLD: [GOLD, GOLD, "-", "-", "no"]}
    for row in (*listed, *further):
        heads[row] = [row, labels.get(row, row), *setting_cells(read_settings(models[row]))]

    # Metrics: the column of an unavailable one stays empty
    torch.backends.cudnn.allow_tf32 = False  # in the networks it moves scores in the third digit
    metrics, unavailable, problems = load_metrics(specs, device)
    refuse([*problems, *(unavailable.values() if args.require_all else ())])
    if rank == 0:
        for column, reason in unavailable.items():
            print(f"evaluate.py: column {column} stays empty: {reason}", file=sys.stderr)
        if count := without_positive(sets):
            print(f"evaluate.py: {count} images have no Positive GT; they are compared with their "
                  "original", file=sys.stderr)

    # Earlier scores, which hold where the files have the same content
    out = Path(args.out)
    folder = out.with_name("scores")
    files = [path for image in images for path in (image.lq, *image.gts)]
    sha256 = file_hashes([*models.values(), *files], folder)
    refuse([f"{path}: {e.strerror}" for path, e in sha256.items() if isinstance(e, OSError)])
    compared = [[sha256[gt] for gts in image.references.values() for gt in gts] for image in images]
    agree("--models and the test images",
          [compared, *(sha256[path] for path in (*models.values(), *files))])
    if args.save_sr:
        check_shared(args.save_sr, "--save-sr")
    columns = open_columns(metrics, specs, folder, device)

    # Row by row, one network in memory at a time
    notes = protocol(args, sets, specs, {c: f for c, (_, f) in metrics.items()}, device)
    names, rows = list(dict.fromkeys([*METRICS, *specs])), {}  # Table 5's columns, then others
    if listed and further:
        notes.append(f"rows that the paper's Table {paper_table} does not have: "
                     + ", ".join(further))
    with_gold = len(images[0].gts) > 1 and any(kind == "nr" for kind, _ in metrics.values())
    for row in [*[GOLD] * with_gold, *listed, *further]:
        if row == GOLD:
            rows[row] = gold_standard(images, columns, sha256, device)
        else:
            rows[row] = score_model(row, models[row], images, columns, sha256, args.save_sr, device)
            config = Path(models[row]).with_name("config.json")
            notes.append(f"row {row}: weights sha256 {sha256[models[row]][:12]}")
            if config.is_file() and read_settings(models[row]):  # those of the run
                notes[-1] += f", settings in {config.as_posix()}"
        if rank == 0:
            table = write_tables(out, names, sets.names, rows, heads, notes)
    cleanup()
    if rank == 0:
        print_table(table, [c for c in names if c in metrics], further if listed else [])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="NAME=FILE",
        help="row name and checkpoint; names as in Table 5, e.g. SwinIR-AMO+FT")
    add("--gt", help="multi-GT test set: folder with images/ and labels/, or one without labels")
    add("--lq", help="folder of its low-quality images, NAME.png, a quarter of the GT's size")
    add("--realsr", help="RealSR v3 folder, instead of --gt and --lq")
    add("--out", required=True, help="table to write (.csv)")
    add("--metrics", nargs="*", default=METRICS, metavar="METRIC",
        help=f"columns, out of {' '.join(METRICS)} and every pyiqa no-reference metric; NAME@FILE "
             "takes its weights from a file (default: Table 5's)")
    add("--extra", nargs="+", default=[], metavar="COLUMN=METRIC",
        help="more no-reference columns, e.g. q=demo.quality:q@runs/q.pt")
    add("--require-all", action="store_true",
        help="fail if a metric's weights are unavailable, instead of leaving its column empty")
    add("--save-sr", metavar="DIR", help="save the SR images as DIR/<model>/<NAME>.png")
    args = parser.parse_args(argv)
    if bool(args.realsr) == bool(args.gt) or bool(args.gt) != bool(args.lq):
        parser.error("give --gt with --lq, or --realsr alone")
    return args


if __name__ == "__main__":
    with clean_exit("evaluate.py"):
        main(parse_args())
