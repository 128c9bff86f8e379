"""Tune a public x4 network on your own photos, in one command (paper Sec. 4.3, Eq. 5).

    bash run_all.sh photos                         # the photos in demo/photos
    bash run_all.sh photos DIR                     # yours, twelve or more
    Q=demo.photo_quality:q PERCEPTUAL=laplacian bash run_all.sh photos   # without MUSIQ and VGG19
    COMPARE=1 bash run_all.sh photos DIR           # full fine-tuning and lambda_Q = 0 as well
    python -m tools.tune DIR --init FILE --steps 500 --out DIR2          # all settings by hand

In:  a folder of PNG, JPEG, WebP, TIFF; --init, an x4 network (default: RealESRGAN_x4plus, which is
     downloaded). No second ground truth and no labels are needed.
Out: --out (default results/photos): tuned.pth, tuned.safetensors, lora.pt, config.json, card.md;
     photos.csv, photos_per_image.csv, val.csv, strip.png, report.html; JPEG crops of two test
     photos, and captions.csv with the authors if there is a SOURCES.csv beside the photos. Runs and
     data are in runs/photos. Rerun the same command to resume.

The photos are split by their content's hash: a fifth, four at least, to test, as many to validate,
the rest to train. Test photos are read once, for the last table. Q is what the reward raises, so it
judges nothing: the guard is fidelity on the validation photos (models/validation.py), and it also
chooses the adapters' scale, the largest of 0.5, 1 and 1.5 that passes.
"""

import argparse
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from models.checkpoint import one_line, read_csv, replacing, sha256, write_csv
from models.degradations import apply_degradation, degrade_patch, draw_degradation
from models.distributed import clean_exit
from models.export import write_weights
from models.flags import SEED, integer, new_parser, number, refuse
from models.images import PHOTOS, describe_folder, list_images, read_rgb, write_png
from models.metrics import as_image, as_tensor, load_metrics, to_8bit
from models.photos import LUMA, photo_size, read_srgb
from models.rrdb import RRDBNet
from models.swinir import SwinIR
from models.validation import FIDELITY, Validation
from models.weights import load_net, vgg19_state
from tools.prefetch import fetch_network
from tools.upscale import apply_lora, bicubic

ROOT = Path(__file__).resolve().parent.parent
CROP = 256  # pixels of the crops of test and validation
WHOLE = 768  # pixels per side, at most, of the two test photos that the page shows whole, at 100 %
SCALES = (0.5, 1.0, 1.5)  # of the adapters, besides 0
DEGRADATIONS = {SwinIR: "one_round", RRDBNet: "two_round"}
STAND_IN = "Q=demo.photo_quality:q PERCEPTUAL=laplacian bash run_all.sh photos"
# ASSUMED: short runs, on a CPU with a larger learning rate, as a prototype with the stand-in for Q
# did well on other photos; the paper has 20,000 steps at 5e-5.
CPU = {"steps": 120, "batch_size": 2, "patch_size": 128, "lr": 1e-4, "ema_decay": 0.8, "every": 20}
GPU = {"steps": 2000, "batch_size": 16, "patch_size": 256, "lr": 5e-5, "ema_decay": 0.99,
       "every": 200}  # fmt: skip


# ------------------------------------------------------------------------- the photos


def split_photos(files: Iterable[Path]) -> dict[str, list[Path]]:
    """{"test", "val", "train": files}, by the hash of their content; equal files count once.

    A fifth each, four at least, to test and to validate. Raises ValueError for fewer than twelve.
    """
    by_hash = dict(sorted((sha256(file), file) for file in files))
    ordered, n = list(by_hash.values()), max(4, len(by_hash) // 5)
    if len(ordered) < 12:
        raise ValueError(f"{len(ordered)} different photos that can be used; at least 12 are "
                         "needed: 4 to test, 4 to validate, 4 to train")
    return {"test": ordered[:n], "val": ordered[n : 2 * n], "train": ordered[2 * n :]}


def usable_photos(folder: Path, patch_size: int) -> list[Path]:
    """The photos that are large enough; lines tell of the others. ValueError names broken ones."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of photos")
    files, others = list_images(folder, PHOTOS)
    sizes = {file: photo_size(file) for file in files}
    side = max(CROP, patch_size)
    large = [file for file in files if min(sizes[file]) >= side]
    small = len(files) - len(large)
    print(describe_folder(folder, files, others)
          + (f"; {small} smaller than {side} pixels, left out" if small else ""), flush=True)
    return large


def detailed_corners(image: np.ndarray, count: int = 2) -> list[tuple[int, int]]:
    """(top, left) of the `count` crops with most detail that do not overlap, multiples of 4."""
    from paper.figures import window_sums  # and matplotlib

    luma = image.astype(np.float64) @ LUMA
    edges = np.abs(np.diff(luma, axis=0, append=luma[-1:])) + np.abs(
        np.diff(luma, axis=1, append=luma[:, -1:]))
    step = 32  # pixels
    found = [(value, y * step, x * step)
             for (y, x), value in np.ndenumerate(window_sums(edges, CROP, step))]
    corners: list[tuple[int, int]] = []
    for _, top, left in sorted(found, reverse=True):
        if len(corners) < count and all(abs(top - t) >= CROP or abs(left - x) >= CROP
                                        for t, x in corners):
            corners.append((top, left))
    return corners


def write_crops(files: list[Path], folder: Path, degradation: str) -> None:
    """gt/NAME.png and lq/NAME.png of each photo's crops; what is there is kept."""
    for k, file in enumerate(tqdm(files, folder.name, unit="photo")):
        names = [(folder / "gt" / f"{file.stem}_{i}.png", folder / "lq" / f"{file.stem}_{i}.png")
                 for i in range(2)]
        if all(name.is_file() for pair in names for name in pair):
            continue
        image = read_srgb(file)
        for i, (top, left) in enumerate(detailed_corners(image)):
            gt_file, lq_file = names[i]
            write_png(gt_file, image[top : top + CROP, left : left + CROP])
            rng = np.random.default_rng((k, i))
            write_png(lq_file, degrade_patch(image, top, left, CROP, rng, degradation))


def write_whole(files: list[Path], folder: Path, degradation: str) -> None:
    """gt/NAME_whole.png and lq/NAME_whole.png of each photo, reduced if it is larger than WHOLE."""
    for k, file in enumerate(files):
        gt_file, lq_file = (folder / kind / f"{file.stem}_whole.png" for kind in ("gt", "lq"))
        if gt_file.is_file() and lq_file.is_file():
            continue
        image = Image.fromarray(read_srgb(file))
        image.thumbnail((WHOLE, WHOLE), Image.Resampling.LANCZOS)  # never enlarges
        gt = np.asarray(image)[: image.height // 4 * 4, : image.width // 4 * 4]
        rng = np.random.default_rng((k, 2))  # the crops have 0 and 1
        write_png(gt_file, gt)
        write_png(lq_file, apply_degradation(gt, draw_degradation(rng, degradation), rng))


def make_data(parts: dict[str, list[Path]], work: Path, degradation: str) -> None:
    """work/train with the photos, work/val and work/test with crops."""
    listing = {name: [f"{file.name} {sha256(file)}" for file in part]
               for name, part in parts.items()} | {"degradation": degradation}
    record = work / "split.json"
    if record.is_file() and json.loads(record.read_text()) != listing:
        raise ValueError(f"{work}: made of other photos; delete it, or give another --work")
    (work / "train").mkdir(parents=True, exist_ok=True)
    for file in parts["train"]:
        if not (work / "train" / file.name).is_file():
            with replacing(work / "train" / file.name) as temporary:
                shutil.copyfile(file, temporary)
    for part in ("val", "test"):
        write_crops(parts[part], work / part, degradation)
    write_whole(parts["test"][:2], work / "test", degradation)
    with replacing(record) as temporary:
        temporary.write_text(json.dumps(listing, indent=1))


# ------------------------------------------------------------------------- tuning


def tune(args: argparse.Namespace, out: Path, *flags: str) -> None:
    """Fine-tune into `out`, unless it is finished. ValueError if it fails."""
    if (out / "net_g_ema.pt").is_file():
        print(f"{out}: finished")
        return
    val = [str(args.work / "val" / kind) for kind in ("lq", "gt")]
    command = [
        sys.executable, "finetune_lora.py", "--data", str(args.work / "train"), "--init",
        str(args.init), "--sampler", "origs_only", "--iqa", args.q, "--perceptual", args.perceptual,
        "--steps", args.steps, "--batch-size", args.batch_size, "--patch-size", args.patch_size,
        "--lr", args.lr, "--milestones", args.steps, "--lambda-q", args.lambda_q, "--ema-decay",
        args.ema_decay, "--val", *val, "--val-every", args.every, "--guard", args.guard,
        "--log-every", 10, "--save-every", args.every, "--sample-every", args.every, "--cache",
        str(args.work / "cache"), "--seed", args.seed, "--out", str(out), *flags,
    ]
    print(shlex.join(map(str, command[1:])), flush=True)
    if subprocess.run([str(word) for word in command], cwd=ROOT).returncode or not (
            out / "net_g_ema.pt").is_file():
        raise ValueError(f"{out}: the fine-tuning did not finish, see above; rerun the same "
                         "command to resume")


def choose_scale(args: argparse.Namespace, nets: Callable[[float], nn.Module], device: torch.device
                 ) -> tuple[float, list[str]]:
    """The largest scale of the adapters that passes the guard, and a line for each scale."""
    validation = Validation(str(args.work / "val/lq"), str(args.work / "val/gt"), None, device)
    base, chosen, lines = validation(nets(0.0)), 0.0, []
    for scale in SCALES:
        scores = validation(nets(scale))
        passed = not args.guard or validation.passes(scores, base, args.guard)
        chosen = scale if passed else chosen
        lines.append(f"scale {scale:g}: PSNR {scores[0]:.2f} dB, base {base[0]:.2f}; "
                     + ("passes" if passed else "does not pass"))
    return chosen, lines


# ------------------------------------------------------------------------- the table


def list_crops(work: Path) -> list[Path]:
    """LQ files of the test crops, without the whole photos."""
    return sorted((work / "test/lq").glob("*_[01].png"))


def enlarge_to(sr_file: Path, enlarge: Callable[[Tensor], Tensor], lq: Tensor) -> Tensor:
    """Write the enlarged image and return it, (1, 3, H, W) in [0, 1], as the file has it."""
    with torch.no_grad():
        sr = to_8bit(enlarge(lq).float()).float() / 255
    write_png(sr_file, as_image(sr))
    return sr


def score_rows(args: argparse.Namespace, rows: dict[str, Callable[[Tensor], Tensor]],
               device: torch.device) -> tuple[list[str], dict[str, list[list[float]]]]:
    """Columns, and {row: scores of each test crop}; the SR images go to work/sr/ROW/NAME.png."""
    specs = FIDELITY | {"q": args.q, "piqe": "piqe"}
    metrics, unavailable, problems = load_metrics(specs, device)
    refuse(problems)
    for column, reason in unavailable.items():
        print(f"column {column} is skipped: {reason}", file=sys.stderr)
    files = list_crops(args.work)
    table: dict[str, list[list[float]]] = {}
    for row, enlarge in rows.items():
        table[row] = []
        for file in tqdm(files, row, unit="crop"):
            lq, gt = (as_tensor(read_rgb(f), device)
                      for f in (file, args.work / "test/gt" / file.name))
            sr = enlarge_to(args.work / "sr" / row / file.name, enlarge, lq)
            table[row].append([
                (metric(sr, gt) if kind == "fr" else metric(sr)).item()
                for kind, metric in metrics.values()])
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


def write_pictures(args: argparse.Namespace, photos: list[Path], best: str) -> None:
    """A JPEG crop of each photo, by base, tuned and as photographed; captions.csv with the authors.

    The captions are for NAME_0 and its crops, NAME_1, NAME_whole and strip.png.
    """
    credits, sources = [], args.photos / "SOURCES.csv"
    known = {row["file"]: row for row in read_csv(sources, ["file", "author", "licence"])[0]
             } if sources.is_file() else {}
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


def write_card(args: argparse.Namespace, facts: dict[str, str]) -> None:
    text = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    with replacing(args.out / "card.md") as temporary:
        temporary.write_text(text.format(**facts), encoding="utf-8")


# ------------------------------------------------------------------------- main


def check_metrics(args: argparse.Namespace, device: torch.device) -> None:
    """Refuse, before anything takes long, what the fine-tuning would lack."""
    _, unavailable, problems = load_metrics({"q": args.q}, device)
    problems += unavailable.values()
    if args.perceptual == "vgg19":
        try:
            vgg19_state()
        except (OSError, ValueError) as error:
            problems.append(one_line(error))
    if problems:
        raise ValueError("\n".join([*problems, f"or go on without them: {STAND_IN}"]))


def main(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for key, value in (GPU if device.type == "cuda" else CPU).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.lambda_q is None:  # ASSUMED: Eq. 5's for MUSIQ; the stand-in's gradient is larger
        args.lambda_q = 0.05 if args.q == "musiq" else 0.003

    # Inputs: all are checked before anything is written
    photos = usable_photos(args.photos, args.patch_size)
    parts = split_photos(photos)
    args.init = args.init or fetch_network("realesrgan_x4plus")
    kind = type(load_net(args.init))
    check_metrics(args, device)
    print(f"{len(parts['train'])} photos to train, {len(parts['val'])} to validate, "
          f"{len(parts['test'])} to test; {kind.__name__} of {args.init}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    make_data(parts, args.work, DEGRADATIONS.get(kind, "two_round"))

    # Fine-tuning, and with --compare what it is compared with
    lora = args.work / "lora"
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
    for name in ("full", "no-reward") if args.compare else ():
        rows[name] = load_net(args.work / name / "net_g_ema.pt").to(device)
    columns, table = score_rows(args, rows, device)
    val, _ = read_csv(lora / "val.csv")
    kept = [row["step"] for row in val if row["passed"] == "1"][-1]
    notes = [
        f"{args.photos}: {len(parts['test'])} test photos, two crops of {CROP} pixels each, "
        f"degraded as {DEGRADATIONS.get(kind, 'two_round')}; RGB, 8 bit, 4-pixel border cropped "
        "for full reference",
        f"base: {Path(args.init).name} sha256 {sha256(args.init)[:12]}; tuned xS: its adapters "
        f"times S; Q: {args.q}, which the reward raises, so it judges nothing",
        f"trained for {val[-1]['step']} steps, of which the guard kept {kept} (val.csv); lr "
        f"{args.lr:g}, lambda_Q {args.lambda_q:g}, seed {args.seed}; guard {args.guard:g} dB; "
        f"chosen: scale {chosen:g}", *lines,
    ]
    write_table(args, columns, table, notes)

    # What other programs load, and what people look at
    tuned = at(chosen)
    for name in ("tuned.pth", "tuned.safetensors"):
        write_weights(tuned, args.out / name)
    for name in ("lora.pt", "config.json", "val.csv"):
        shutil.copyfile(lora / name, args.out / name)
    best = f"tuned x{chosen:g}" if chosen else "base"
    first = f"{parts['test'][0].stem}_0.png"  # by hash, not by hand
    shown = list(dict.fromkeys(["bicubic", "base", best]))
    write_strip(args, first, shown)
    for file in sorted((args.work / "test/lq").glob("*_whole.png")):
        for row in tqdm(shown, file.stem):
            lq = as_tensor(read_rgb(file), device)
            enlarge_to(args.work / "sr" / row / file.name, rows[row], lq)
    write_pictures(args, parts["test"], best)
    write_card(args, {
        "base": Path(args.init).name, "q": args.q, "scale": f"{chosen:g}", "steps": kept,
        "photos": str(len(parts["train"])), "table": "\n".join(
            f"| {row} | " + " | ".join(cell(v, 3) for v in np.mean(s, 0)) + " |"
            for row, s in table.items()),
        "columns": " | ".join(columns), "line": "|".join(["---"] * (len(columns) + 1)),
        "licence": "PyTorch Toolbox for Image Quality Assessment (pyiqa): PolyForm Noncommercial"
        if ":" not in args.q else f"that of {args.q} and of its training data",
        "choice": "\n".join(f"- {line}" for line in lines)})
    report = [sys.executable, "-m", "paper.report", "--results", args.out, "--sr",
              args.work / "sr", "--gt", args.work / "test/gt", "--lq", args.work / "test/lq",
              "--open", *shown[-2:]]
    subprocess.run([str(word) for word in report], cwd=ROOT, check=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, "python -m tools.tune")
    add = parser.add_argument
    add("photos", type=Path, metavar="DIR", help="photos: PNG, JPEG, WebP, TIFF")
    add("--init", metavar="FILE", help="x4 network to start from (default: RealESRGAN_x4plus)")
    add("--out", type=Path, default=Path("results/photos"), metavar="DIR", help="for the results")
    add("--work", type=Path, default=Path("runs/photos"), metavar="DIR", help="for data and runs")
    add("--q", default=os.environ.get("Q", "musiq"), metavar="NAME[@FILE]",
        help="quality model to raise (default: Q=, else musiq)")
    add("--perceptual", choices=("vgg19", "laplacian"),
        default=os.environ.get("PERCEPTUAL", "vgg19"),
        help="perceptual loss (default: PERCEPTUAL=, else vgg19)")
    add("--compare", action="store_true", default=bool(os.environ.get("COMPARE")),
        help="full fine-tuning and lambda_Q = 0 as well (also COMPARE=1)")
    add("--steps", type=integer(1), help="optimiser steps (default: 2,000; on a CPU 120)")
    add("--batch-size", type=integer(1), help="samples per step (default: 16; on a CPU 2)")
    add("--patch-size", type=integer(16), help="GT patch in pixels (default: 256; on a CPU 128)")
    add("--lr", type=number(1e-12, 1), help="learning rate (default: 5e-5; on a CPU 1e-4)")
    add("--lambda-q", type=number(0), help="weight of Q (default: 0.05 for musiq, else 0.003)")
    add("--ema-decay", type=number(0, 0.999999), help="of the average (default: 0.99; CPU 0.8)")
    add("--every", type=integer(1), help="steps between validations (default: 200; on a CPU 20)")
    add("--guard", type=number(0, 100), default=0.3,
        help="dB of PSNR that may be lost on the validation photos (default: 0.3); 0: any")
    add("--seed", type=SEED, default=0, help="seed (default: 0)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("tune.py"):
        main(parse_args())
