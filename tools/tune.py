"""Tune a public x4 network on your own photos, in one command (paper Sec. 4.3, Eq. 5).

    bash run_all.sh photos                         # the photos in demo/photos
    bash run_all.sh photos DIR                     # yours, twelve or more
    Q=demo.photo_quality:q PERCEPTUAL=laplacian bash run_all.sh photos   # without MUSIQ and VGG19
    COMPARE=1 bash run_all.sh photos DIR           # full fine-tuning and lambda_Q = 0 as well
    python -m tools.tune DIR --init FILE --steps 500 --out DIR2          # all settings by hand

In:  a folder of PNG, JPEG, WebP, TIFF; --init, an x4 network (default: RealESRGAN_x4plus, which is
     downloaded). No second ground truth and no labels are needed.
Out: --out (default results/photos-DIR): tuned.pth, tuned.safetensors, lora.pt, adapter/,
     config.json, card.md; photos.csv, photos_per_image.csv, log.csv, strip.png, report.html; JPEG
     crops of two test photos, and captions.csv with the authors if there is a SOURCES.csv beside
     the photos.
     Runs and data are in runs/photos-DIR (of demo/photos: results/photos, runs/photos). Rerun the
     same command to resume.

The photos are split by their content's hash: a fifth, four at least, to test, as many to validate,
the rest to train. Test photos are read once, for the last table. Q is what the reward raises, so it
judges nothing: the guard is fidelity on the validation photos (models/validation.py), and it also
chooses the adapters' scale, the largest of 0.5, 1 and 1.5 that passes.
"""

import argparse
import copy
import functools
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.checkpoint import (
    name_and_digest,
    one_line,
    read_csv,
    read_settings,
    replacing,
    write_csv,
)
from models.distributed import clean_exit
from models.export import metadata, write_card, write_weights
from models.flags import PATCH_SIZE, SEED, integer, new_parser, number, perceptual, refuse
from models.images import read_rgb, write_png
from models.metrics import as_image, as_tensor, load_metrics, rounded, score_pair
from models.progress import progress
from models.rrdb import RRDBNet
from models.swinir import SwinIR
from models.validation import (
    FIDELITY,
    SECOND,
    Validation,
    kept_step,
    passes,
    read_pairs,
    validations,
)
from models.weights import load_net, vgg19_state
from tools.prefetch import fetch_network
from tools.tune_data import CROP, list_crops, make_data, split_photos, usable_photos
from tools.upscale import apply_lora, bicubic

ROOT = Path(__file__).resolve().parent.parent
SCALES = (0.5, 1.0, 1.5)  # of the adapters, besides 0
DEGRADATIONS = {SwinIR: "one_round", RRDBNet: "two_round"}
STAND_IN = "demo.photo_quality:q"
STAND_IN_NOTE = "Q is a stand-in for MUSIQ that has seen no human rating"
WITHOUT_WEIGHTS = f"Q={STAND_IN} PERCEPTUAL=laplacian bash run_all.sh photos"
# ASSUMED: short runs, on a CPU with a larger learning rate, as a prototype with the stand-in for Q
# did well on other photos; the paper has 20,000 steps at 5e-5.
CPU = {"steps": 120, "batch_size": 2, "patch_size": 128, "lr": 1e-4, "ema_decay": 0.8, "every": 20}
GPU = {"steps": 2000, "batch_size": 16, "patch_size": 256, "lr": 5e-5, "ema_decay": 0.99,
       "every": 200}  # fmt: skip


# ------------------------------------------------------------------------- tuning


def estimate(args: argparse.Namespace, net: nn.Module, device: torch.device) -> str:
    """About how long the fine-tuning takes, from two steps of the network alone."""
    side, runs = args.patch_size // 4, 3 if args.compare else 1
    x = torch.rand(args.batch_size, 3, side, side, device=device)
    net = copy.deepcopy(net).to(device).requires_grad_(True)
    for _ in range(2):  # the first one does not count
        begin = time.monotonic()
        net(x).mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - begin
    # Q, losses, data and validation take about half as much again
    minutes = 1.5 * seconds * args.steps * runs / 60
    return f"{runs} x {args.steps} steps, about {max(1, round(minutes))} minutes in all"


def tune(args: argparse.Namespace, out: Path, *flags: str) -> None:
    """Fine-tune into `out`, or resume. ValueError if it fails, or was run with other settings."""
    val = [str(args.work / "val" / kind) for kind in ("lq", "gt")]
    command = [
        sys.executable, "finetune_lora.py", "--data", str(args.work / "train"), "--shrink",
        args.shrink, "--init", str(args.init), "--sampler", "origs_only", "--iqa", args.q,
        "--perceptual", args.perceptual, "--steps", args.steps, "--batch-size", args.batch_size,
        "--patch-size", args.patch_size, "--lr", args.lr, "--lambda-q", args.lambda_q,
        "--ema-decay", args.ema_decay, "--val", *val, "--val-every", args.every, "--guard",
        args.guard, "--log-every", 10, "--save-every", args.every, "--sample-every", args.every,
        "--cache", str(args.work / "cache"), "--seed", args.seed, "--out", str(out), *flags,
    ]
    print(shlex.join(map(str, command[1:])), flush=True)
    code = run_to_end([str(word) for word in command])
    if code == 2:
        raise ValueError(f"{out}: refused, see above; if {args.work} was begun with other flags, "
                         "give those again, or another --work")
    if code or not (out / "net_g_ema.pt").is_file():
        raise ValueError(f"{out}: the fine-tuning did not finish, see above; rerun the same "
                         "command to resume")


def run_to_end(command: list[str]) -> int:
    """Run a command in ROOT; returns its exit code. A signal to this process lets it save."""
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise


def choose_scale(args: argparse.Namespace, nets: Callable[[float], nn.Module], device: torch.device
                 ) -> tuple[float, list[str]]:
    """The largest scale of the adapters that passes the guard, and a line for each scale."""
    if not args.guard:
        return 1.0, ["scale 1, as --guard is 0"]
    pairs = read_pairs(str(args.work / "val/lq"), str(args.work / "val/gt"))
    validation = Validation(pairs, None, args.q, device)
    base, *rows = (dict(zip(validation.columns, validation(nets(scale)), strict=True))
                   for scale in (0.0, *SCALES))
    chosen, lines = 0.0, []
    for scale, scores in zip(SCALES, rows, strict=True):
        passed = passes(scores, base, args.guard)
        chosen = scale if passed else chosen
        lines.append(f"scale {scale:g}: PSNR {scores['psnr']:.2f} dB, base {base['psnr']:.2f}; "
                     + ("passes" if passed else "does not pass"))
    return chosen, lines


# ------------------------------------------------------------------------- the table


def enlarge_to(sr_file: Path, enlarge: Callable[[Tensor], Tensor], lq: Tensor) -> Tensor:
    """Write the enlarged image and return it, (1, 3, H, W) in [0, 1], as the file has it."""
    with torch.no_grad():
        sr = rounded(enlarge(lq))
    write_png(sr_file, as_image(sr))
    return sr


def score_rows(args: argparse.Namespace, rows: dict[str, Callable[[Tensor], Tensor]],
               device: torch.device) -> tuple[list[str], dict[str, list[list[float]]]]:
    """Columns, and {row: scores of each test crop}; the SR images go to work/sr/ROW/NAME.png."""
    specs = FIDELITY | {"q": args.q, "piqe": "piqe"} | SECOND | {"nima": "nima"}
    metrics, unavailable, problems = load_metrics(specs, device)
    refuse(problems)
    for column, reason in unavailable.items():
        print(f"column {column} is skipped: {reason}", file=sys.stderr)
    files = list_crops(args.work)
    table: dict[str, list[list[float]]] = {}
    for row, enlarge in rows.items():
        table[row] = []
        for file in progress(files, row, unit="crop"):
            lq, gt = (as_tensor(read_rgb(f), device)
                      for f in (file, args.work / "test/gt" / file.name))
            sr = enlarge_to(args.work / "sr" / row / file.name, enlarge, lq)
            table[row].append(score_pair(metrics, sr, gt))
    return list(metrics), table


def cell(value: float, digits: int) -> str:
    """A score as text; empty where a metric gave none, as piqe on images without texture."""
    return f"{value:.{digits}f}" if np.isfinite(value) else ""


def write_table(args: argparse.Namespace, columns: list[str],
                table: dict[str, list[list[float]]], notes: list[str]) -> None:
    names = [file.stem for file in list_crops(args.work)]
    means = {row: np.mean(scores, 0) for row, scores in table.items()}
    write_csv(args.out / "photos.csv", ["model", *columns],
              [[row, *(cell(value, 4) for value in mean)] for row, mean in means.items()], notes)
    write_csv(args.out / "photos_per_image.csv", ["model", "image", *columns],
              [[row, name, *(cell(v, 6) for v in scores)] for row, crops in table.items()
               for name, scores in zip(names, crops, strict=True)], notes)
    print("\n" + "  ".join([f"{'model':<12}", *(f"{column:>8}" for column in columns)]))
    for row, mean in means.items():
        print("  ".join([f"{row:<12}", *(f"{cell(value, 3):>8}" for value in mean)]))


def write_strip(args: argparse.Namespace, name: str, rows: list[str]) -> None:
    """strip.png: a test crop as LQ, in each row, and as photographed."""
    from paper.draw import Cell, draw_grid, save

    lq = read_rgb(args.work / "test/lq" / name).repeat(4, 0).repeat(4, 1)
    cells = [Cell(lq, "LQ")]
    cells += [Cell(read_rgb(args.work / "sr" / row / name), row) for row in rows]
    cells.append(Cell(read_rgb(args.work / "test/gt" / name), "photo"))
    save(draw_grid([cells], [""]), args.out / "strip.png", "")


def read_sources(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """{file: its row of the photos' SOURCES.csv}; empty without one."""
    file = args.photos / "SOURCES.csv"
    rows = read_csv(file, ["file", "author", "licence"])[0] if file.is_file() else []
    return {row["file"]: row for row in rows}


def photo_licences(args: argparse.Namespace) -> str:
    return ", ".join(sorted({row["licence"] for row in read_sources(args).values()}))


def write_pictures(args: argparse.Namespace, photos: list[Path], best: str) -> None:
    """A JPEG crop of each photo, by base, tuned and as photographed; captions.csv with the authors.

    The captions are for NAME_0 and its crops, NAME_1, NAME_whole and strip.png.
    """
    credits, known = [], read_sources(args)
    for what in ("base", "tuned", "photo"):  # of other photos
        for old in args.out.glob(f"*_0_{what}.jpg"):
            old.unlink()
    for file in photos[:2]:
        shown = {"base": args.work / "sr/base", "tuned": args.work / "sr" / best,
                 "photo": args.work / "test/gt"}
        for what, folder in shown.items():
            with replacing(args.out / f"{file.stem}_0_{what}.jpg") as temporary:
                image = Image.fromarray(read_rgb(folder / f"{file.stem}_0.png"))
                image.save(temporary, "JPEG", quality=90)
    for k, file in enumerate(photos):
        if row := known.get(file.name):
            names = [f"{file.stem}_{end}" for end in ("0", "1", "whole")] + ["strip"] * (k == 0)
            credits += [[name, row["author"], row["licence"]] for name in names]
    captions = args.out / "captions.csv"
    captions.unlink(missing_ok=True)  # of other photos
    if credits:
        write_csv(captions, ["image", "author", "licence"], credits, [
            f"crops and reduced copies of photos in {args.photos}; degraded and enlarged, but for "
            "NAME_0_photo.jpg", "NAME_0 stands for NAME_0_*.jpg (quality 90) as well"])


def write_tuned_card(args: argparse.Namespace, kind: str, about: dict[str, str], chosen: float,
                     lines: list[str], columns: list[str], table: dict[str, list[list[float]]]
                     ) -> None:
    """card.md, with the choice of the scale and the table."""
    scores = "\n".join(f"| {row} | " + " | ".join(cell(v, 3) for v in np.mean(s, 0)) + " |"
                       for row, s in table.items())
    choice = "\n".join(f"- {line}" for line in lines)
    why = ", the largest that keeps fidelity on the validation photos" if args.guard else ""
    write_card(
        args.out / "card.md", f"{Path(args.init).name}, tuned on photos", kind,
        "`tuned.pth` and `tuned.safetensors` load wherever the base network loads; `lora.pt` and "
        "`adapter/` hold the adapters at scale 1.",
        read_settings(args.work / "lora/net_g_ema.pt"), about,
        f"Adapters' scale: {chosen:g}{why}:\n\n{choice}\n\n| model | {' | '.join(columns)} |\n"
        f"|{'---|' * (len(columns) + 1)}\n{scores}\n\nMean of the test photos' crops; PSNR in dB.")


def write_weights_and_page(
    args: argparse.Namespace, photos: list[Path],
    rows: dict[str, nn.Module | Callable[[Tensor], Tensor]], best: str, about: dict[str, str],
    device: torch.device,
) -> None:
    """What other programs load, and what people look at.

    best: the chosen row of `rows`; about: the weights' metadata
    """
    lora = args.work / "lora"
    for name in ("tuned.pth", "tuned.safetensors"):
        write_weights(rows[best], args.out / name, args.init, about)
    for name in ("lora.pt", "config.json", "log.csv"):
        shutil.copyfile(lora / name, args.out / name)
    if (lora / "adapter").is_dir():
        shutil.copytree(lora / "adapter", args.out / "adapter", dirs_exist_ok=True)
    shown = list(dict.fromkeys(["bicubic", "base", best]))
    write_strip(args, f"{photos[0].stem}_0.png", shown)  # by hash, not by hand
    for file in sorted((args.work / "test/lq").glob("*_whole.png")):
        for row in progress(shown, file.stem, unit="row"):
            lq = as_tensor(read_rgb(file), device)
            enlarge_to(args.work / "sr" / row / file.name, rows[row], lq)
    write_pictures(args, photos, best)
    report = [sys.executable, "-m", "paper.report", "--results", args.out, "--sr",
              args.work / "sr", "--gt", args.work / "test/gt", "--lq", args.work / "test/lq",
              "--open", *shown[-2:]]
    subprocess.run([str(word) for word in report], cwd=ROOT, check=True)


# ------------------------------------------------------------------------- main


def check_metrics(args: argparse.Namespace, device: torch.device) -> None:
    """Refuse, before anything takes long, what the fine-tuning would lack."""
    _, unavailable, problems = load_metrics({"q": args.q}, device)
    problems += unavailable.values()
    name, _, file = args.perceptual.partition("@")
    if name == "vgg19":
        try:
            vgg19_state(file)
        except (OSError, ValueError) as error:
            problems.append(one_line(error))
    if problems:
        way = f"or go on without them: {WITHOUT_WEIGHTS} {args.photos}"
        raise ValueError("; ".join([*problems, way]))


def main(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # in the networks it moves scores in the third digit
    for key, value in (GPU if device.type == "cuda" else CPU).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.lambda_q is None:  # ASSUMED: Eq. 5's for MUSIQ; the stand-in's gradient is larger
        args.lambda_q = 0.05 if args.q == "musiq" else 0.003

    folder = args.photos.resolve()
    name = "photos" if folder == ROOT / "demo/photos" else f"photos-{folder.name}"
    args.out, args.work = args.out or Path("results", name), args.work or Path("runs", name)

    # Inputs: all are checked before anything is written
    for flag, path in (("--out", args.out), ("--work", args.work)):
        if path.resolve() == folder or path.exists() and not path.is_dir():
            raise ValueError(f"{flag} {path}: {'has the photos' if path.is_dir() else 'a file'}; "
                             "give another folder")
    read_sources(args)  # needed at the end alone
    photos = usable_photos(args.photos, args.patch_size, args.shrink)
    parts = split_photos(photos)
    args.init = args.init or fetch_network("realesrgan_x4plus")
    net = load_net(args.init)
    kind = type(net)
    check_metrics(args, device)
    print(f"{len(parts['train'])} photos to train, {len(parts['val'])} to validate, "
          f"{len(parts['test'])} to test; {kind.__name__} of {args.init}", flush=True)
    make_data(parts, args.work, DEGRADATIONS.get(kind, "two_round"), args.shrink)
    args.out.mkdir(parents=True, exist_ok=True)

    # Fine-tuning, and with --compare what it is compared with
    lora = args.work / "lora"
    print(estimate(args, net, device), flush=True)
    tune(args, lora)
    if args.compare:
        tune(args, args.work / "full", "--full", "--lr", str(args.lr / 10))
        tune(args, args.work / "no-reward", "--lambda-q", "0")

    @functools.cache  # to choose the scale, for the table, and as the result
    def at(scale: float) -> nn.Module:
        net = load_net(args.init)
        return apply_lora(net, str(lora / "lora.pt"), str(args.init), scale).to(device)

    chosen, lines = choose_scale(args, at, device)
    print("\n".join([*lines, f"chosen: scale {chosen:g}"]))

    # The test photos, read once
    rows: dict[str, Callable[[Tensor], Tensor]] = {"bicubic": bicubic, "base": at(0.0)}
    rows |= {f"tuned x{scale:g}": at(scale) for scale in SCALES}
    others = {"full": f"all weights at lr {args.lr / 10:g}",
              "no-reward": "adapters at scale 1 with lambda_Q 0"} if args.compare else {}
    for name in others:
        rows[name] = load_net(args.work / name / "net_g_ema.pt").to(device)
    columns, table = score_rows(args, rows, device)
    last, kept = validations(lora)[-1]["step"], kept_step(lora, args.steps)
    base = name_and_digest(args.init)
    crops = len(list_crops(args.work))
    notes = [
        f"{args.photos}: {len(parts['test'])} test photos, {crops} crops of {CROP} pixels, "
        f"degraded as {DEGRADATIONS.get(kind, 'two_round')}; RGB, 8 bit, 4-pixel border cropped "
        "for full reference",
        f"base: {base}; tuned xS: its adapters times S; Q: {args.q}, which the reward raises, so "
        f"it judges nothing; perceptual loss: {args.perceptual.partition('@')[0]}",
        *[STAND_IN_NOTE] * (args.q == STAND_IN),
        f"adapters: trained for {last} steps, of which the guard kept {kept} (log.csv), with the "
        f"settings in config.json; lr {args.lr:g}, lambda_Q {args.lambda_q:g}, seed {args.seed}; "
        f"guard {args.guard:g} dB; chosen: scale {chosen:g}", *lines,
        *(f"{name}: {what}; step {kept_step(args.work / name, args.steps)}"
          for name, what in others.items()),
    ]
    write_table(args, columns, table, notes)

    about = {"base": base, "steps": str(kept), "data": f"{len(parts['train'])} photos",
             "licences": photo_licences(args)}
    write_tuned_card(args, kind.__name__, about, chosen, lines, columns, table)
    about = metadata(read_settings(lora / "net_g_ema.pt"), about) | {"lora_scale": f"{chosen:g}"}
    write_weights_and_page(args, parts["test"], rows, f"tuned x{chosen:g}" if chosen else "base",
                           about, device)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, "python -m tools.tune")
    add = parser.add_argument
    add("photos", type=Path, nargs="?", default=Path("demo/photos"), metavar="DIR",
        help="photos: PNG, JPEG, WebP, TIFF")
    add("--init", metavar="FILE", help="x4 network to start from (default: RealESRGAN_x4plus)")
    add("--out", type=Path, metavar="DIR", help="for the results (default: results/photos-DIR)")
    add("--work", type=Path, metavar="DIR", help="for data and runs (default: runs/photos-DIR)")
    add("--shrink", type=integer(1, 16), default=1, metavar="N",
        help="use the photos at 1/N of their sides, which hides JPEG's artefacts")
    add("--q", default=os.environ.get("Q") or "musiq", metavar="NAME[@FILE]",
        help="quality model to raise (default: Q=, else musiq)")
    add("--perceptual", type=perceptual, metavar="vgg19[@FILE]|laplacian",
        default=os.environ.get("PERCEPTUAL") or "vgg19",
        help="perceptual loss (default: PERCEPTUAL=, else vgg19)")
    add("--compare", action="store_true", default=bool(os.environ.get("COMPARE")),
        help="full fine-tuning and lambda_Q = 0 as well (also COMPARE=1)")
    add("--steps", type=integer(1), help="optimiser steps (default: 2,000; on a CPU 120)")
    add("--batch-size", type=integer(1), help="samples per step (default: 16; on a CPU 2)")
    add("--patch-size", type=PATCH_SIZE, help="GT patch in pixels (default: 256; on a CPU 128)")
    add("--lr", type=number(1e-12, 1), help="learning rate (default: 5e-5; on a CPU 1e-4)")
    add("--lambda-q", type=number(0), help="weight of Q (default: 0.05 for musiq, else 0.003)")
    add("--ema-decay", type=number(0, 0.999999), help="of the average (default: 0.99; CPU 0.8)")
    add("--every", type=integer(1), help="steps between validations (default: 200; on a CPU 20)")
    add("--guard", type=number(0, 100), default=0.3,
        help="dB of PSNR that may be lost on the validation photos (default: 0.3); 0: any")
    add("--seed", type=SEED, default=0, help="seed (default: 0)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("tune.py", stopped=130):
        main(parse_args())
