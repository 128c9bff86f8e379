"""Enlarge your own photos with a trained network, or export the network for other programs.

    python -m tools.upscale --ckpt net_g_ema.pt --lq photos/ --out sr/    # sr/NAME, sr/scores.csv
    torchrun --nproc_per_node=4 -m tools.upscale ...                      # four processes
    python -m tools.upscale --ckpt net_g_ema.pt --export net.safetensors  # or .pth, .onnx
    ... --ckpt INIT --lora lora.pt --lora-scale 0.5                       # half of a fine-tuning

In:  a checkpoint of an x4 network (train_sr.py's or a public one); a photo or a folder of
     PNG, JPEG, WebP and TIFF files (models/photos.py says which, and what is kept of them).
Out: --out/NAME, four times a side, in the format of the photo; --out/scores.csv, a row per photo:
     status made, kept or failed; size and tile in LQ pixels, tile 0: whole; no-reference scores of
     the photo (_lq), of the photo enlarged bicubically (_bicubic: the baseline, of the same size as
     the result) and of the result (_sr). Rerun the same command to resume: existing results are
     kept, and scored. A photo that fails is reported, and the others are done; the exit code is
     then 1.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models.checkpoint import (
    check_finite,
    file_digest,
    load_file,
    one_line,
    printable,
    read_csv,
    sha256,
    write_csv,
)
from models.distributed import (
    agree,
    check_shared,
    clean_exit,
    cleanup,
    gather,
    init_distributed,
    rank_and_world,
)
from models.export import export, read_adapter
from models.flags import integer, new_parser, number
from models.images import PHOTOS, describe_folder, list_images
from models.lora import add_lora, load_lora, lora_state, merge_lora
from models.metrics import load_metrics, split_pairs
from models.photos import LARGEST_SIDE, Photo, read_photo, write_photo
from models.progress import progress
from models.tiles import limit_memory, tile_size, upscale
from models.weights import load_net

SCALE = 4
ERROR_LENGTH = 200  # characters; torch's messages may be pages long

Metrics = dict[str, Callable[[Tensor], Tensor]]  # column: (1, 3, H, W) in [0, 1] -> (1,)


# ------------------------------------------------------------------------- inputs


def apply_lora(net: nn.Module, path: str, base: str, scale: float = 1.0) -> nn.Module:
    """Merge a saved fine-tuning, times `scale`, into the network that it started from; in place.

    path:  {"lora": lora_state(), "rank", "alpha", "targets", "base_sha256"}, or PEFT's .safetensors
    base:  the file that `net` was read from; scale: 0 is `net`, 1 the fine-tuned network
    Raises ValueError for a file without adapters, for adapters of another base, and if they or the
    merged weights are not finite.
    """
    data = read_adapter(path) if path.endswith(".safetensors") else load_file(path)
    kinds = {"lora": dict, "rank": int, "alpha": float, "targets": list, "base_sha256": str}
    if {key: type(data.get(key)) for key in kinds} != kinds or data["rank"] < 1 \
            or not all(type(target) is str for target in data["targets"]):
        raise ValueError(f"{path}: not the lora.pt of a fine-tuning; give the one beside its "
                         "net_g_ema.pt")
    expected, digest = data["base_sha256"], sha256(base)
    if expected and digest != expected:  # other programs name none
        raise ValueError(f"{path}: was trained on weights of sha256 {expected[:12]}; {base} is "
                         f"{digest[:12]}; give the file that the fine-tuning started from (--init)")
    try:
        add_lora(net, data["targets"], data["rank"], data["alpha"] * scale)
        load_lora(net, data["lora"])
    except (ValueError, AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    check_finite(lora_state(net), path)
    check_finite(merge_lora(net).state_dict(), f"{path}, merged with --lora-scale {scale:g}")
    return net.requires_grad_(False)


def find_photos(lq: str | Path, out: str | Path) -> list[Path]:
    """The image files of a folder (not of folders in it), or the one file; one line counts them.

    Raises ValueError if `out` would mix results with photos, FileNotFoundError without photos.
    """
    lq, out = Path(lq), Path(out)
    folder = lq if lq.is_dir() else lq.parent
    if out.is_file() or out.suffix.lower() in PHOTOS:
        raise ValueError(f"--out {out}: give a folder; the photos keep their names in it")
    if out.resolve() == folder.resolve():
        raise ValueError(f"--out {out}: holds the photos themselves; give another folder")
    if lq.is_file():
        return [lq]
    if not lq.exists():
        raise FileNotFoundError(f"{lq}: no such photo or folder (--lq)")
    photos, others = list_images(folder, PHOTOS)
    line = describe_folder(lq, photos, others)
    if not photos:
        raise FileNotFoundError(f"{line}; give {' '.join(PHOTOS)} files (--lq)")
    if rank_and_world()[0] == 0:
        print(line)
    return photos


def load_photo_metrics(
    metrics: list[str], extra: list[str], rank: int, device: torch.device
) -> Metrics:
    """Those of --metrics and --extra; unavailable ones are skipped with a line on stderr.

    Raises ValueError with a line for each metric that cannot score a photo.
    """
    specs = {spec.partition("@")[0]: spec for spec in metrics} | split_pairs(extra, "--extra")
    loaded, unavailable, problems = load_metrics(specs, device)
    problems += [f"--metrics {column}: needs a ground truth, which photos do not have"
                 for column, (kind, _) in loaded.items() if kind == "fr"]
    if problems:
        raise ValueError("\n".join(problems))
    for column, reason in unavailable.items() if rank == 0 else ():
        print(f"upscale.py: column {column} is skipped: {reason}", file=sys.stderr)
    return {column: lambda x, metric=metric: metric(x.to(device))
            for column, (_, metric) in loaded.items()}


# ------------------------------------------------------------------------- photos


def upscale_photos(
    files: list[Path],
    out: Path,
    enlarge: Callable[[Tensor], tuple[Tensor, int]],
    metrics: Metrics,
    overwrite: bool = False,
    quiet: bool = False,
) -> list[dict[str, str]]:
    """Enlarge photos into a folder under their own names and score both; a row for each photo.

    enlarge: (1, 3, H, W) in [0, 1] -> (output, side of its tiles or 0); quiet: no progress bar
    What exists in `out` is kept unless overwrite. An error is a line on stderr, and concerns its
    photo alone.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for path in progress(files, desc=out.name, unit="photo", disable=quiet):
        row, target = {"file": path.name}, out / path.name
        try:
            photo = upscale_photo(path, target, enlarge, overwrite, row)
            if metrics:
                row |= scores(photo.rgb, path, "lq", metrics)
                row |= scores(photo.rgb, path, "bicubic", metrics, bicubic)
                row |= scores(target, target, "sr", metrics, lambda file: read_photo(file).rgb)
        except Exception as error:  # the other photos are made all the same
            row["status"] = "failed"
            say(path, one_line(error, ERROR_LENGTH))
        rows.append(row)
    return rows


def upscale_photo(
    path: Path,
    target: Path,
    enlarge: Callable[[Tensor], tuple[Tensor, int]],
    overwrite: bool,
    row: dict[str, str],
) -> Photo:
    """Read a photo, and write the result unless it exists; fills in the row."""
    photo = read_photo(path)
    h, w = photo.rgb.shape[2:]
    row |= {"width": str(w), "height": str(h)}
    if photo.note:
        say(path, photo.note)
    if target.exists() and not overwrite:
        row["status"] = "kept"
        return photo
    if SCALE * max(h, w) > LARGEST_SIDE.get(photo.format, 2**31):
        raise ValueError(f"{path}: too large for {photo.format} once enlarged; convert it to PNG")
    sr, tile = enlarge(photo.rgb)
    row["tile"] = str(tile)
    if not sr.isfinite().all():
        raise ValueError(f"{path}: the network's output is not finite")
    write_photo(photo, sr, target)
    row["status"] = "made"
    return photo


def bicubic(rgb: Tensor) -> Tensor:
    """The photo (1, 3, H, W) in [0, 1], enlarged without a network, in 8-bit levels."""
    enlarged = F.interpolate(rgb, scale_factor=SCALE, mode="bicubic")
    return enlarged.clamp_(0, 1).mul_(255).round_().div_(255)  # in place: it may be large


def scores(
    source: object, path: Path, side: str, metrics: Metrics,
    image_of: Callable[..., Tensor] = lambda rgb: rgb,
) -> dict[str, str]:
    """Scores of image_of(source), (1, 3, H, W) in [0, 1], as columns <metric>_<side>.

    A metric that fails gives none, and neither does an image that memory does not hold.
    """
    row = {}
    try:
        rgb = image_of(source)
    except Exception as error:
        say(path, f"no scores ({one_line(error, ERROR_LENGTH)})")
        return row
    for column, metric in metrics.items():
        try:
            score = metric(rgb).item()
            if not math.isfinite(score):
                raise ValueError(f"{column} gave {score}")
            row[f"{column}_{side}"] = f"{score:.6f}"
        except Exception as error:  # too small, too large, or whatever a foreign metric raises
            say(path, f"no score ({one_line(error, ERROR_LENGTH)})")
    return row


def say(path: Path, text: str) -> None:
    text = text if text.startswith(str(path)) else f"{path}: {text}"
    tqdm.write(printable(text), file=sys.stderr)


# ------------------------------------------------------------------------- main


def write_scores(rows: list[dict[str, str]], metrics: Metrics, args: argparse.Namespace) -> None:
    """Write scores.csv: these photos, and those of earlier calls whose results are still there."""
    table = Path(args.out, "scores.csv")
    header = ["file", "status", "width", "height", "tile",
              *(f"{column}_{side}" for column in metrics for side in ("lq", "bicubic", "sr"))]
    comments = [f"{f}: sha256 {file_digest(f)}" for f in (args.ckpt, args.lora) if f]
    if args.lora:
        comments.append(f"--lora-scale {args.lora_scale:g}")
    if any(row["status"] == "kept" for row in rows):
        comments.append("status kept: made earlier, by whichever network; only scored now")
    names = {row["file"] for row in rows}
    try:
        earlier = read_csv(table, ["file"])[0] if table.is_file() else []
    except ValueError:  # damaged, or somebody else's
        earlier = []
    earlier = [row for row in earlier
               if row["file"] not in names and (table.parent / row["file"]).is_file()]
    if earlier:
        comments.append("photos that are not in --lq: from earlier calls")
    lines = [[row.get(column, "") for column in header] for row in rows + earlier]
    write_csv(table, header, sorted(lines), comments)


def main(args: argparse.Namespace) -> bool:
    """Returns whether a photo failed."""
    rank, world, device = init_distributed()
    net = load_net(args.ckpt)
    if args.lora:
        apply_lora(net, args.lora, args.ckpt, args.lora_scale)
    if args.export:
        if rank == 0:
            print(export(net, args.export, args.onnx_size))
        cleanup()
        return False

    # Inputs: everything is checked before the first photo
    files, tile = find_photos(args.lq, args.out), tile_size(args.tile)
    metrics = load_photo_metrics(args.metrics, args.extra, rank, device)

    # Photos: each process takes every world-th
    agree("the photos of --lq", [file.name for file in files])
    check_shared(args.out, "--out")
    out = Path(args.out)
    net.to(device)
    if device.type == "cpu":
        net(torch.zeros(1, 3, 64, 64))  # oneDNN needs memory for its start, before the limit
        limit_memory(0.9 / world)  # so that --tile auto notices where memory runs out
    rows = upscale_photos(
        files[rank::world], out,
        lambda lq: upscale(net, lq.to(device), tile, SCALE, quiet=rank > 0),
        metrics, args.overwrite, quiet=rank > 0)

    # Table
    parts = gather(rows)
    rows = [parts[i % world][i // world] for i in range(len(files))]
    failed, kept = ([row["status"] for row in rows].count(s) for s in ("failed", "kept"))
    if rank == 0:
        if kept:
            print(f"{out}: {kept} existing files kept, whichever network made them (--overwrite "
                  "makes them anew)", file=sys.stderr)
        if failed:
            print(f"{out}: {failed} of {len(files)} photos failed", file=sys.stderr)
        write_scores(rows, metrics, args)
    cleanup()
    return failed > 0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--ckpt", metavar="FILE", required=True, help="checkpoint of the network")
    add("--lq", metavar="PATH", help="photo, or folder of photos, to enlarge")
    add("--out", metavar="DIR", help="folder for the results of --lq")
    add("--export", metavar="FILE",
        help="write the network as .pth, .pt, .safetensors or .onnx, in place of --lq and --out")
    add("--lora", metavar="FILE", help="lora.pt of a fine-tuning that started from --ckpt, or "
        "PEFT's adapter_model.safetensors or its folder")
    add("--lora-scale", type=number(-10, 10), metavar="X",
        help="share of its adapters: 0 is --ckpt, 1 the fine-tuned network (default: 1)")
    add("--tile", metavar="auto|N",
        help="side of the tiles in LQ pixels; 0: whole photos; auto (the default): whole, or tiles "
        "if memory runs out")
    add("--overwrite", action="store_true", help="make results anew that exist in --out")
    add("--metrics", nargs="*", default=["musiq", "topiq"], metavar="METRIC",
        help="pyiqa's no-reference metrics to score with; NAME@FILE takes its weights from a file "
        "(default: musiq topiq)")
    add("--extra", nargs="+", default=[], metavar="COLUMN=METRIC",
        help="more no-reference columns, e.g. q=demo.quality:q@runs/q.pt")
    add("--onnx-size", type=integer(1), nargs=2, metavar=("H", "W"),
        help="the .onnx's only LQ size")
    args = parser.parse_args(argv)
    if bool(args.export) == bool(args.lq) or bool(args.lq) != bool(args.out):
        parser.error("give --lq with --out, or --export alone")
    if args.lora_scale is not None and not args.lora:
        parser.error("--lora-scale: give the adapters, --lora")
    if args.export and (args.tile or args.overwrite):
        parser.error("--tile and --overwrite are for photos, not for --export")
    if args.onnx_size and not (args.export or "").endswith(".onnx"):
        parser.error("--onnx-size: give --export FILE.onnx")
    if args.lora and Path(args.lora).is_dir():
        args.lora = str(Path(args.lora, "adapter_model.safetensors"))
    args.lora_scale = 1.0 if args.lora_scale is None else args.lora_scale
    args.tile = args.tile or "auto"
    return args


if __name__ == "__main__":
    with clean_exit("upscale.py"):
        sys.exit(main(parse_args()))
