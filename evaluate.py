"""Score super-resolution networks on a test set: Table 5 (HGGT Test-100) and Table 8 (RealSR).

    python evaluate.py --models SwinIR-AMO=runs/swinir-amo/net_g_ema.pt SwinIR-UPos=... \\
        --gt datasets/HGGT/Test/GT/Test-100 \\
        --lq datasets/HGGT/Test/Blind_Degradation_Benchmark_LQ/Test-100/Blind_LR \\
        --out results/test100/table5.csv
    python evaluate.py --models SwinIR-AMO=... --realsr "datasets/RealSR(V3)" --out results/t8.csv
    torchrun --nproc_per_node=4 evaluate.py ...                        # images shared among four
    ... --metrics psnr ssim --extra q=demo.quality:q@runs/q.pt         # needs no download
    python evaluate.py --ckpt net_g_ema.pt --lq photos/ --out sr/      # sr/NAME, sr/scores.csv
    python evaluate.py --ckpt net_g_ema.pt --export net.safetensors    # or .pth, .onnx
    ... --ckpt INIT --lora lora.pt --lora-scale 0.5                    # half of a fine-tuning

In:  checkpoints of SwinIR or RRDBNet (x4; train_sr.py's or public ones); GT as models/hggt.py reads
     it, LQ as NAME.png; or RealSR v3 with its *_HR.png and *_LR4.png.
Out: --out, one row per model under comment lines that state the protocol; beside it
     <out>_per_image.csv, one row per model and image, with the PSNR against the original as well.
     Both are written anew after every model. scores/ beside them takes each image's scores at
     once, a line per model and image: stopped at any moment (SIGTERM, Ctrl-C: exit code 0; or
     kill -9), the same command goes on with the next image, on any number of processes, where
     protocol and weights are the same. After a change to the code of one's own metric, delete it.
     Images go one by one: batches of 4 to 8 took 0.81 to 1.12 times as long on a CPU and moved SR
     pixels by a level, so that a resumed table would not equal an undisturbed one.

Protocol (paper Sec. 5; HGGT's scripts): whole images, SR rounded to 8 bit before every metric. Full
reference: RGB, 4-pixel border cropped, mean over an image's Positive GTs (the original where there
is none, or no labels), then over images. No reference: whole SR. "Gold Standard": the best
no-reference value among the GTs of a set, mean over the sets.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from tqdm import tqdm

from models.checkpoint import file_digest, read_csv, read_state, replacing, write_csv
from models.distributed import clean_exit, cleanup, gather, init_distributed, rank_zero_first
from models.export import export
from models.hggt import MultiGT, index_sets, png_size, read_rgb
from models.iqa import MetricUnavailable, load_fr, load_iqa, min_side
from models.lora import apply_lora
from models.photos import find_photos, upscale_photos
from models.rrdb import RRDBNet
from models.swinir import SwinIR
from models.tiles import limit_memory, tile_size, upscale

SCALE = 4
GOLD = "Gold Standard"
CROP_BORDER = 4  # pixels, of the full-reference metrics (HGGT)
METRICS = ["psnr", "ssim", "lpips", "lpips_st", "dists", "musiq", "nima", "qalign", "topiq"]
PHOTO_METRICS = ["musiq", "topiq"]
FULL_REFERENCE = {"lpips": "lpips", "lpips_st": "stlpips", "dists": "dists"}  # pyiqa's names
NO_REFERENCE = {"topiq": "topiq_nr"}  # all others are called as in pyiqa
DECIMALS = {"ssim": 3, "lpips": 3, "lpips_st": 3, "dists": 3}  # of the printed table; else 2


# ------------------------------------------------------------------------- the protocol


def to_8bit(x: Tensor) -> Tensor:
    """(..., H, W) in [0, 1] -> float64 whole numbers 0..255; values outside are clipped."""
    return x.double().clamp(0, 1).mul(255).round()


def crop(x: Tensor, border: int) -> Tensor:
    return x[..., border : x.shape[-2] - border, border : x.shape[-1] - border]


def psnr(sr: Tensor, gt: Tensor, crop_border: int) -> Tensor:
    """Peak signal-to-noise ratio in dB over RGB, as HGGT's script computes it.

    sr, gt: (N, 3, H, W) float in [0, 1], rounded to 8 bit here; crop_border: pixels per side.
    Returns (N,) float64; inf for images that are equal at 8 bit.
    """
    error = crop(to_8bit(sr) - to_8bit(gt), crop_border)
    return 10 * torch.log10(255**2 / error.square().mean((1, 2, 3)))


def ssim(sr: Tensor, gt: Tensor, crop_border: int) -> Tensor:
    """Structural similarity, mean of the RGB channels, as HGGT's script computes it.

    11x11 Gaussian window of sigma 1.5, whole windows only, float64 (pyiqa's clamps negative
    structure and differs). sr, gt: (N, 3, H, W) float in [0, 1], rounded to 8 bit here, at least
    11 pixels a side once cropped. Returns (N,) float64.
    """
    x, y = (crop(to_8bit(image), crop_border) for image in (sr, gt))
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"ssim: {x.shape[-1]}x{x.shape[-2]} pixels are left, it needs 11x11")
    window = [math.exp(-(i**2) / (2 * 1.5**2)) for i in range(-5, 6)]

    def blur(image: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, 3, H - 10, W - 10)
        for dim in (-1, -2):  # sums of shifts: float64 convolutions take ten times as long
            size = image.shape[dim] - 10
            shifts = [image.narrow(dim, i, size) for i in range(11)]
            image = shifts[0] * (window[0] / sum(window))
            for shift, weight in zip(shifts[1:], window[1:], strict=True):
                image.add_(shift, alpha=weight / sum(window))
        return image

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mu_x, mu_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mu_x**2, blur(y * y) - mu_y**2
    cov = blur(x * y) - mu_x * mu_y
    luminance = (2 * mu_x * mu_y + c1) / (mu_x**2 + mu_y**2 + c1)
    return (luminance * (2 * cov + c2) / (var_x + var_y + c2)).mean((1, 2, 3))


def reference_members(labels: np.ndarray | None, index: int) -> list[int]:
    """The GTs of a set that full-reference metrics compare with: Positives, or the original."""
    positives = [] if labels is None else np.flatnonzero(labels[index] > 0).tolist()
    return positives or [0]


def needs_human_labels(model: str) -> bool:
    """Whether a row of Table 5 rests on human labels, told by its name."""
    return model == GOLD or "UPos" in model or "SMP" in model


@torch.no_grad()
def super_resolve(net: nn.Module, lq: Tensor) -> Tensor:
    """(1, 3, H, W) in [0, 1] -> (1, 3, 4H, 4W) as the saved PNG would be: clipped, 8-bit levels."""
    return to_8bit(net(lq)).float() / 255


def score_sr(
    sr: Tensor, paths: list[str], members: list[int], metrics: dict[str, tuple[str, Callable]]
) -> dict[str, float]:
    """{column: score} of one SR image, (1, 3, H, W) in [0, 1], and its PSNR against the original.

    paths: of the set's GTs, the original first; members: those that full-reference metrics take.
    """
    images = {k: to_tensor(paths[k], sr.device) for k in {0, *members}}
    gts = torch.cat([images[k] for k in members])  # (K, 3, H, W)
    scores = {column: function(sr.expand_as(gts), gts) if kind == "fr" else function(sr)
              for column, (kind, function) in metrics.items()}
    scores["psnr_original"] = psnr(sr, images[0], CROP_BORDER)
    return {column: values.double().mean().item() for column, values in scores.items()}


# ------------------------------------------------------------------------- inputs


def find_realsr(root: str) -> tuple[MultiGT, list[str]]:
    """RealSR v3's x4 pairs below a folder: the HR images as sets of one GT, and their LQ files.

    Only folders that hold *_LR4.png count; below a whole RealSR, with Train/ and Test/, only Test/.
    An image is named by its path below the folder. Raises FileNotFoundError where there is none.
    """
    # ASSUMED: whole images under Test-100's protocol, the HR image as the one GT, both cameras in
    # one mean. The paper names the set and its 100 images, not the border, tiles or the mean.
    folders = {f.parent for f in Path(root).rglob("*_LR4.png")}
    folders = [f for f in folders if "Test" in f.relative_to(root).parts] or folders
    gts = sorted(gt for folder in folders for gt in folder.glob("*_HR.png"))
    if not gts:
        raise FileNotFoundError(f"{root}: no *_HR.png with *_LR4.png found; give the folder of "
                                "RealSR(V3) (--realsr)")
    stems = [str(gt).removesuffix("_HR.png") for gt in gts]
    names = [os.path.relpath(stem, root) for stem in stems]
    sizes = np.array([png_size(gt) for gt in gts])
    return MultiGT(root, names, [[str(gt)] for gt in gts], None, sizes), [
        f"{stem}_LR4.png" for stem in stems
    ]


def check_pairs(sets: MultiGT, lq_files: list[str], realsr: bool) -> list[str]:
    """A line for each LQ image that is missing, unreadable or not a quarter of its GT."""
    problems = []
    for (height, width), file in zip(sets.sizes.tolist(), lq_files, strict=True):
        try:
            h, w = read_rgb(file).shape[:2]
        except (ValueError, OSError) as error:
            missing = isinstance(error, FileNotFoundError)
            problems.append(f"{file}: no such LQ image" if missing else str(error))
            continue
        if (h, w) == (height, width) and realsr:
            problems.append(f"{file}: as large as its HR image, as in RealSR V1 and V2; get V3")
        elif (h * SCALE, w * SCALE) != (height, width):
            problems.append(f"{file}: {w}x{h}, but its GT is {width}x{height}; the GT must be "
                            f"{SCALE} times as large")
    return problems


def load_net(path: str) -> nn.Module:
    """The network of a checkpoint, told by its keys, on the CPU. ValueError names the file."""
    state = read_state(path)
    kind = next((cls for cls in (SwinIR, RRDBNet) if cls.matches(state)), None)
    if kind is None:
        raise ValueError(f"{path}: neither a SwinIR nor an RRDBNet checkpoint ({len(state)} "
                         f"weights, the first {next(iter(state))})")
    try:
        net = kind.from_state(state).eval().requires_grad_(False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    side = super_resolve(net, torch.zeros(1, 3, 16, 16)).shape[-1]
    if side != 16 * SCALE:
        raise ValueError(f"{path}: enlarges {side / 16:g} times; {SCALE} times is needed")
    return net


def to_tensor(path: str, device: torch.device) -> Tensor:
    """An image file as (1, 3, H, W) float in [0, 1]."""
    image = torch.from_numpy(read_rgb(path).copy()).to(device)
    return image.permute(2, 0, 1)[None].float() / 255


def split_pairs(pairs: list[str], flag: str) -> dict[str, str]:
    """["NAME=VALUE", ...] -> {NAME: VALUE}."""
    names = [pair.partition("=")[0] for pair in pairs]
    for pair, name in zip(pairs, names, strict=True):
        if (name in ("", ".", "..") or "=" not in pair or names.count(name) > 1
                or set(name) & set("/\\\n")):
            raise ValueError(f"{flag} {pair}: write NAME=VALUE, each NAME once, without a slash")
    return dict(pair.split("=", 1) for pair in pairs)


def load_metric(spec: str, device: torch.device) -> tuple[str, Callable]:
    """("fr", f(sr, gts) -> (N,)) or ("nr", f(images) -> (N,)) for a column of the table."""
    name, at, file = spec.partition("@")
    if name in ("psnr", "ssim"):
        function = {"psnr": psnr, "ssim": ssim}[name]
        return "fr", lambda sr, gt: function(sr, gt, CROP_BORDER)
    if name in FULL_REFERENCE:
        net = load_fr(FULL_REFERENCE[name] + at + file, device)

        def compare(sr: Tensor, gt: Tensor) -> Tensor:
            return net(crop(sr, CROP_BORDER), crop(gt, CROP_BORDER))

        compare.weights = net.weights
        return "fr", compare
    return "nr", load_iqa(NO_REFERENCE.get(name, name) + at + file, device)


def load_metrics(
    specs: dict[str, str], device: torch.device
) -> tuple[dict[str, tuple[str, Callable]], dict[str, str], list[str]]:
    """The columns' metrics, why a column has none on some rank, and what is wrong with others."""
    torch.backends.cudnn.allow_tf32 = False  # it moves scores in the third digit
    metrics, unavailable, problems = {}, {}, []

    def load() -> None:
        for column, spec in specs.items():
            try:
                metrics[column] = load_metric(spec, device)
            except MetricUnavailable as error:
                unavailable[column] = str(error)
            except (ValueError, OSError) as error:
                problems.append(str(error))

    rank_zero_first(load)  # rank 0 may download their weights
    for absent in gather(dict(unavailable)):
        unavailable |= absent
    return {c: m for c, m in metrics.items() if c not in unavailable}, unavailable, problems


def smallest_side(spec: str) -> int:
    """Smallest GT side in pixels that a metric can score, its cropped border included."""
    name = spec.partition("@")[0]
    if name in ("psnr", "ssim"):
        return 2 * CROP_BORDER + {"psnr": 1, "ssim": 11}[name]
    if name in FULL_REFERENCE:
        return 2 * CROP_BORDER + min_side(FULL_REFERENCE[name])
    return min_side(NO_REFERENCE.get(name, name))


def read_scores(folder: Path, stem: str, keys: dict[str, str]) -> dict[str, dict]:
    """What earlier runs have scored, {row: {image: {column: score}}}, from all their processes.

    keys: {row of the table: key of its lines [key, image, scores]}; lines of other keys and one
    that a kill cut short are passed over.
    """
    known: dict[str, dict] = {row: {} for row in keys}
    rows = {key: row for row, key in keys.items()}
    for path in sorted(p for p in folder.iterdir() if p.name.startswith(f"{stem}.rank")):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError, KeyError):
                key, image, scores = json.loads(line)
                known[rows[key]][image] = scores
    return known


def append_line(path: Path, line: str) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"\n{line}")  # the newline ends a line that a kill cut short
    except OSError as error:  # one of a write does not name the file
        raise OSError(f"{path}: {error.strerror}") from error


def refuse(problems: list[str], shown: int = 20) -> None:
    if problems:
        more = [f"and {len(problems) - shown} more problems"] if len(problems) > shown else []
        raise ValueError("\n".join(problems[:shown] + more))


# ------------------------------------------------------------------------- own photos, export


def use_checkpoint(args: argparse.Namespace) -> int:
    """Enlarge and score the photos of --lq, or write --export. Returns the number of failures."""
    rank, world, device = init_distributed()
    net = load_net(args.ckpt)
    if args.lora:
        apply_lora(net, args.lora, args.ckpt, args.lora_scale)
    if args.export:
        if rank == 0:
            print(export(net, args.export, args.onnx_size))
        cleanup()
        return 0
    files, tile = find_photos(args.lq, args.out), tile_size(args.tile)
    chosen = PHOTO_METRICS if args.metrics is METRICS else args.metrics
    specs = {s.partition("@")[0]: s for s in chosen} | split_pairs(args.extra, "--extra")
    loaded, unavailable, problems = load_metrics(specs, device)
    problems += [f"--metrics {c}: needs a ground truth, which photos have not"
                 for c, (kind, _) in loaded.items() if kind == "fr"]
    refuse(problems)
    metrics = {c: lambda x, f=f: f(x.to(device)) for c, (_, f) in loaded.items()}
    if rank == 0:
        for column, reason in unavailable.items():
            print(f"evaluate.py: column {column} is left out: {reason}", file=sys.stderr)

    # This process takes every world-th photo of those that rank 0 has found
    files, out = gather(files)[0], Path(args.out)
    net.to(device)
    if device.type == "cpu":
        super_resolve(net, torch.zeros(1, 3, 64, 64))  # oneDNN has to start with memory at hand
        limit_memory(0.9 / world)  # so that --tile auto gets to know
    header, rows = upscale_photos(
        files[rank::world], out, lambda lq: upscale(net, lq.to(device), tile, SCALE, rank > 0),
        metrics, args.overwrite, SCALE, rank > 0)
    parts = gather(rows)
    rows = [parts[i % world][i // world] for i in range(len(files))]
    failed, kept = ([row[1] for row in rows].count(status) for status in ("failed", "kept"))
    if rank == 0:
        comments = [f"{f}: sha256 {file_digest(f)}" for f in (args.ckpt, args.lora) if f]
        if args.lora:
            comments.append(f"--lora-scale {args.lora_scale:g}")
        if kept:
            comments.append("status kept: made earlier, by whichever network; only scored now")
            print(f"{out}: {kept} existing files kept, whichever network made them (--overwrite "
                  "makes them anew)", file=sys.stderr)
        if failed:
            print(f"{out}: {failed} of {len(files)} photos failed", file=sys.stderr)
        if earlier := other_photos(out / "scores.csv", header, {row[0] for row in rows}):
            comments.append("photos that are not in --lq: from earlier calls")
        write_csv(out / "scores.csv", header, sorted(rows + earlier), comments)
    gather()  # torchrun stops rank 0 where another ends with 1
    cleanup()
    return failed


def other_photos(table: Path, header: list[str], names: set[str]) -> list[list[str]]:
    """Rows of an earlier call's scores.csv about other photos, whose results are still there."""
    try:
        rows = read_csv(table, ["file"])[0] if table.is_file() else []
    except ValueError:  # damaged, or somebody else's
        return []
    return [[row.get(column) or "" for column in header] for row in rows
            if row["file"] not in names and (table.parent / row["file"]).is_file()]


# ------------------------------------------------------------------------- main


def main(args: argparse.Namespace) -> None:
    rank, world, device = init_distributed()

    # Inputs: everything is checked before the first image is made
    models, extras = split_pairs(args.models, "--models"), split_pairs(args.extra, "--extra")
    specs = {spec.partition("@")[0]: spec for spec in args.metrics}
    problems = [f"--extra {name}: is a column already" for name in extras
                if name in (*specs, "model", "image", "no_human_labels", "psnr_original")]
    specs |= extras
    if args.realsr:
        sets, lq_files = find_realsr(args.realsr)
    else:
        sets, wrong = rank_zero_first(lambda: index_sets(args.gt))
        lq_files = [os.path.join(args.lq, f"{name}.png") for name in sets.names]
        problems += wrong
    problems += check_pairs(sets, lq_files, bool(args.realsr))
    smallest = int(sets.sizes.min()) if len(sets.sizes) else 0
    problems += [f"metric {c}: needs GTs of {smallest_side(s)} px, the smallest has {smallest}"
                 for c, s in specs.items() if smallest < smallest_side(s)]
    for path in models.values():
        try:
            load_net(path)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    refuse(problems)

    # Metrics: one whose weights cannot be had leaves its column empty
    metrics, unavailable, wrong = load_metrics(specs, device)
    problems += wrong
    if args.require_all:
        problems += unavailable.values()
    refuse(problems)
    without = 0 if sets.labels is None else int((sets.labels <= 0).all(1).sum())
    if rank == 0:
        for column, reason in unavailable.items():
            print(f"evaluate.py: column {column} stays empty: {reason}", file=sys.stderr)
        if without:
            print(f"evaluate.py: {without} images have no Positive GT; compared with their "
                  "original", file=sys.stderr)

    protocol = [
        f"{args.realsr or args.gt}: {len(sets.names)} images, SR rounded to 8 bit",
        f"full reference: RGB, {CROP_BORDER}-pixel border cropped; PSNR in dB (inf: equal images), "
        "SSIM 11x11 Gaussian of sigma 1.5 in float64, LPIPS AlexNet",
        "full reference against " + (
            "the original (no labels)" if sets.labels is None else
            f"the mean of the Positive GTs; {without} images without one against the original"),
        "no reference: whole SR, up = better (a lower-better score is negated)",
        f"metrics: {' '.join(specs)}",
        *(f"column {column}: empty, its weights could not be had" for column in unavailable),
        f"Python {platform.python_version()}, torch {torch.__version__}, pyiqa {pyiqa_version()}, "
        f"on {device.type}",
        *(f"column {c}: {name}, weights sha256 {file_digest(file)}"
          for c, (name, at, file) in ((c, s.partition("@")) for c, s in specs.items()) if at),
        *(f"column {c}: weights {f.weights}" for c, (_, f) in metrics.items()
          if "@" not in specs[c] and getattr(f, "weights", "")),
    ]
    files = {m: f"row {m}: weights sha256 {file_digest(path)}" for m, path in models.items()}

    # What earlier runs have scored, as rank 0 reads it before any rank goes on
    out = Path(args.out)
    no_reference = {c: f for c, (kind, f) in metrics.items() if kind == "nr"}
    rows = [GOLD] * bool(no_reference and len(sets.paths[0]) > 1) + list(models)
    lq_data = [file_digest(file) for file in lq_files]
    gt_data = [file_digest(path) for paths in sets.paths for path in paths]
    labels = None if sets.labels is None else sets.labels.tolist()
    functions = [(c, spec.partition("@")[0]) for c, spec in specs.items()]
    keys = {row: text_digest(row, files.get(row), lq_data, gt_data, labels, functions, *protocol)
            for row in rows}
    folder = out.with_name("scores")
    folder.mkdir(parents=True, exist_ok=True)
    known = gather(read_scores(folder, out.stem, keys) if rank == 0 else None)[0]

    # Row by row, one network in memory at a time; this process takes every world-th image
    columns = list(dict.fromkeys([*METRICS, *specs]))  # Table 5's, asked for or not, then others
    table, per_image = [], []
    for row in rows:
        made_by = text_digest(lq_data, files.get(row))
        saved = [Path(args.save_sr or "") / row / f"{name}.png" for name in sets.names]
        mine = [i for i in range(rank, len(sets.names), world) if sets.names[i] not in known[row]
                or (args.save_sr and row != GOLD and not is_saved(saved[i], made_by))]
        net = load_net(models[row]).to(device) if mine and row != GOLD else None
        new = {}
        for i in tqdm(mine, desc=row, unit="image", disable=rank > 0 or not mine):
            if row == GOLD:
                gts = torch.cat([to_tensor(path, device) for path in sets.paths[i]])
                scores = {c: f(gts).max().item() for c, f in no_reference.items()}
            else:
                sr = super_resolve(net, to_tensor(lq_files[i], device))
                if args.save_sr:
                    save_png(saved[i], sr, made_by)
                scores = score_sr(sr, sets.paths[i], reference_members(sets.labels, i), metrics)
            new[sets.names[i]] = {c: round(v, 6) for c, v in scores.items()}  # as in the tables
            append_line(folder / f"{out.stem}.rank{rank}.jsonl",
                        json.dumps([keys[row], sets.names[i], new[sets.names[i]]]))
        for part in gather(new):
            known[row] |= part
        if rank == 0:  # both tables, written anew
            scores = [known[row][name] for name in sets.names]
            means = {c: float(np.mean([s[c] for s in scores])) for c in scores[0]}
            human = "no" if needs_human_labels(row) else "yes"
            table.append([row, human, *(f"{means[c]:.4f}" if c in means else "" for c in columns)])
            every = [*columns, "psnr_original"]
            for name, s in zip(sets.names, scores, strict=True):
                per_image.append([row, name, *(f"{s[c]:.6f}" if c in s else "" for c in every)])
            comments = [*protocol, *(files[r[0]] for r in table if r[0] in files)]
            write_csv(out, ["model", "no_human_labels", *columns], table, comments)
            write_csv(out.with_name(f"{out.stem}_per_image.csv"), ["model", "image", *every],
                      per_image, comments)
    cleanup()
    if rank > 0:
        return

    # The table, as the paper rounds it
    filled = [c for c in columns if c in metrics]
    shown = [["model", "no_human_labels", *filled]]
    for row in table:
        values = dict(zip(columns, row[2:], strict=True))
        shown.append([*row[:2], *(f"{float(values[c]):.{DECIMALS.get(c, 2)}f}" if values[c] else "-"
                                  for c in filled)])
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))


def save_png(path: Path, sr: Tensor, made_by: str) -> None:
    """Write (1, 3, H, W) in [0, 1]; the path holds the old file or the whole new one."""
    image = Image.fromarray(to_8bit(sr[0]).byte().permute(1, 2, 0).cpu().numpy())
    note = PngInfo()
    note.add_text("made_by", made_by)
    with replacing(path) as temporary:
        image.save(temporary, "PNG", pnginfo=note)


def is_saved(path: Path, made_by: str) -> bool:
    """Whether a file is what `save_png` wrote for these weights and this LQ."""
    with contextlib.suppress(OSError), Image.open(path) as image:
        return image.info.get("made_by") == made_by
    return False


def text_digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def pyiqa_version() -> str:
    try:
        return importlib.metadata.version("pyiqa")
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--models", nargs="+", metavar="NAME=FILE",
        help="row name and checkpoint; names as in Table 5, e.g. SwinIR-AMO+FT")
    add("--gt", help="multi-GT test set: folder with images/ and labels/, or one without labels")
    add("--lq", help="folder of its low-quality images, NAME.png, a quarter of the GT's size; or "
        "own photos")
    add("--realsr", help="RealSR v3 folder, in place of --gt and --lq")
    add("--out", help="table to write (.csv); with --ckpt: folder for the results")
    add("--metrics", nargs="*", default=METRICS, metavar="METRIC",
        help=f"columns, out of {' '.join(METRICS)} and every pyiqa no-reference metric; NAME@FILE "
             "takes its weights from a file (default: Table 5's; of photos musiq and topiq)")
    add("--extra", nargs="+", default=[], metavar="COLUMN=METRIC",
        help="more no-reference columns, e.g. q=demo.quality:q@runs/q.pt")
    add("--require-all", action="store_true",
        help="fail where a metric's weights cannot be had, instead of leaving its column empty")
    add("--save-sr", metavar="DIR", help="save the SR images as DIR/<model>/<NAME>.png")
    add("--ckpt", metavar="FILE", help="not a table: enlarge the photos of --lq, or --export")
    add("--lora", metavar="FILE", help="lora.pt of a fine-tuning that started from --ckpt")
    add("--lora-scale", type=float, metavar="X",
        help="share of its adapters: 0 is --ckpt, 1 the fine-tuned network (default: 1)")
    add("--tile", metavar="auto|N",
        help="side of the tiles in LQ pixels; 0: whole photos; auto (the default): whole unless "
        "memory runs out")
    add("--overwrite", action="store_true", help="make photos anew that exist in --out")
    add("--export", metavar="FILE", help="write --ckpt as .pth, .pt, .safetensors or .onnx")
    add("--onnx-size", type=int, nargs=2, metavar=("H", "W"), help="the .onnx's only LQ size")
    args = parser.parse_args(argv)
    if args.ckpt:
        table = args.models or args.gt or args.realsr or args.save_sr or args.require_all
        if table or bool(args.export) == bool(args.lq) or bool(args.lq) != bool(args.out):
            parser.error("with --ckpt, give --lq with --out, or --export alone")
        if args.lora_scale is not None and not args.lora:
            parser.error("--lora-scale: give the adapters, --lora")
        if args.export and (args.tile or args.overwrite):
            parser.error("--tile and --overwrite are for photos, not for --export")
        if args.onnx_size and not (args.export or "").endswith(".onnx"):
            parser.error("--onnx-size: give --export FILE.onnx")
        args.lora_scale = 1.0 if args.lora_scale is None else args.lora_scale
        args.tile = args.tile or "auto"
        return args
    for flag in ("lora", "lora_scale", "export", "tile", "overwrite", "onnx_size"):
        value = getattr(args, flag)
        if value is not None and value is not False:  # 0 was given
            parser.error(f"--{flag.replace('_', '-')}: goes with --ckpt, not with tables")
    if not (args.models and args.out):
        parser.error("give --models and --out, or --ckpt")
    if bool(args.realsr) == bool(args.gt) or bool(args.gt) != bool(args.lq):
        parser.error("give --gt with --lq, or --realsr alone")
    return args


if __name__ == "__main__":
    with clean_exit("evaluate.py"):
        args = parse_args()
        if args.ckpt:
            sys.exit(bool(use_checkpoint(args)))
        main(args)
