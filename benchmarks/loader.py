"""Training samples per second of one core, for each sampler, with and without --cache.

    python -m benchmarks.loader                    # photographs as 512 x 512 PNG, about 2 minutes
    python -m benchmarks.loader --data datasets/HGGT --steps-per-second 9.5

The baseline is the usual way: decode all five ground truths to float with Pillow, degrade the full
original with torch's convolution and interpolation, numpy's normal and Poisson numbers and Pillow's
JPEG, then crop. It runs twice (the baseline repeat shows the noise), and a third time with this
project's functions for all those operations. A first call, which does not count, reads the files,
so that the disk is not timed. Writes results/loader_cpu.csv.
"""

import argparse
import functools
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.common import abba, spread, write_results
from benchmarks.photos import write_sets
from models import degradations
from models.cache import PixelCache
from models.dataset import MultiGTDataset, StepBatchSampler
from models.degradations import apply_degradation, degrade_patch, draw_degradation
from models.distributed import clean_exit, keep_freed_memory, start_method, start_worker
from models.flags import integer, new_parser, number
from models.hggt import MultiGT, load_sets
from models.images import read_rgb
from models.quality import image_digest
from models.samplers import sampling_weights
from train_sr import PRESETS

SAMPLERS = ("upos", "sma", "amo")
SAMPLES, WORKER_SAMPLES = 24, 96  # per timed call
# ASSUMED: an H100 at 40 % of its rates, 989 (bf16) and 67 TFLOP/s (float32, for Q): with AMO at
# patch 256, 173 and 164 samples/s, 300,000 steps of the paper's batch in 15 h and in 25 h
STEPS_PER_SECOND = {"swinir": 5.4, "rrdb": 3.4}


def plain_read(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def to_planes(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def to_pixels(planes: Tensor) -> np.ndarray:
    return planes[0].permute(1, 2, 0).numpy()


def plain_blur(image: np.ndarray, blur: dict | None) -> np.ndarray:
    """degradations._blur as a convolution of three channels."""
    if blur is None:
        return image
    kernel = torch.from_numpy(degradations.blur_kernel(blur)).float().expand(3, 1, -1, -1)
    padded = F.pad(to_planes(image).contiguous(), (blur["size"] // 2,) * 4, mode="reflect")
    return to_pixels(F.conv2d(padded, kernel, groups=3))


def plain_resize(
    image: np.ndarray, mode: str, factor: float = 1.0, size: tuple[int, int] | None = None
) -> np.ndarray:
    """degradations._resize by torch."""
    if size is None and factor == 1:
        return image
    to = {"size": size} if size else {"scale_factor": factor}
    return to_pixels(F.interpolate(to_planes(image).contiguous(), mode=mode, **to))


def plain_noise(
    image: np.ndarray, noise: dict, rng: np.random.Generator, full: object
) -> np.ndarray:
    """degradations._add_noise by numpy, a normal number or a Poisson count for each value."""
    gray = noise["gray"]
    if noise["kind"] == "gaussian":
        shape = (*image.shape[:2], 1 if gray else 3)
        field = rng.standard_normal(shape, dtype=np.float32) * np.float32(noise["sigma"])
    else:
        signal = (image @ degradations.LUMA)[..., None] if gray else image
        signal = np.rint(signal).clip(0, 255)
        peak = 2 ** np.ceil(np.log2(len(np.unique(signal))))
        field = (rng.poisson(signal / 255 * peak) / peak * 255 - signal) * noise["scale"]
    return (image + field.astype(np.float32)).clip(0, 255)


def plain_jpeg(image: np.ndarray, quality: float) -> np.ndarray:
    """degradations._jpeg by Pillow."""
    pixels, file = np.rint(image).clip(0, 255).astype(np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=round(quality))
    return np.asarray(Image.open(file)).astype(np.float32)


PLAIN = {"_blur": plain_blur, "_resize": plain_resize, "_add_noise": plain_noise,
         "_jpeg": plain_jpeg}
OWN = {name: getattr(degradations, name) for name in PLAIN}


def baseline_sample(
    dataset: MultiGTDataset, setting: str, read: Callable, operations: dict, draw: int
) -> dict[str, torch.Tensor]:
    """A draw's sample with all five GTs; whole images are decoded and degraded, then cropped."""
    index, size = dataset.set_of(draw), dataset.patch_size
    rng = np.random.default_rng((dataset.seed, draw))
    decoded = [read(path) for path in dataset.sets.paths[index]]
    images = [image.astype(np.float32) / 255 for image in decoded]
    with mock.patch.multiple(degradations, **operations):
        full = apply_degradation(decoded[0], draw_degradation(rng, setting), rng)
    full = full.astype(np.float32) / 255
    height, width = dataset.sets.sizes[index]
    top, left = (int(rng.integers((n - size) // 4 + 1)) for n in (height, width))
    lq = full[top : top + size // 4, left : left + size // 4]
    gts = [x[4 * top : 4 * top + size, 4 * left : 4 * left + size] for x in images]
    if rng.random() < 0.5:
        lq, gts = lq[:, ::-1], [gt[:, ::-1] for gt in gts]
    return {"lq": torch.from_numpy(np.ascontiguousarray(lq.transpose(2, 0, 1))),
            "gts": torch.from_numpy(np.ascontiguousarray(np.stack(gts).transpose(0, 3, 1, 2)))}


def make_datasets(sets: MultiGT, pixels: PixelCache) -> dict[tuple[str, str, bool], MultiGTDataset]:
    """{(net, sampler, cached): dataset}; labels and qualities are random."""
    rng, shape = np.random.default_rng(0), (len(sets.names), len(sets.paths[0]))
    labels = np.where(np.arange(shape[1]) == 0, 0, rng.choice([1, 1, 0, -1], shape))
    labels[:, -1] = 1  # no set without a positive
    quality = rng.uniform(30, 70, shape)
    return {
        (net, sampler, cached): MultiGTDataset(
            sets, sampling_weights(sampler, labels, quality, 10.0, shape), 256, 0,
            functools.partial(degrade_patch, setting=PRESETS[net]["degradation"]),
            cache=pixels if cached else None)
        for net in STEPS_PER_SECOND for sampler in SAMPLERS for cached in (False, True)
    }


def load(dataset: MultiGTDataset, workers: int) -> None:
    """Load as in training; starting the workers is included."""
    for _ in DataLoader(dataset, batch_sampler=StepBatchSampler(1, WORKER_SAMPLES // 4, 4, 0, 1),
                        num_workers=workers, worker_init_fn=start_worker,
                        multiprocessing_context=start_method()):
        pass


def time_one_core(net: str, datasets: dict, repeats: int, wanted: float) -> list[list]:
    """Rows: the baseline and every sampler in this process; wanted: samples/s that a GPU takes."""
    setting = PRESETS[net]["degradation"]
    baseline = functools.partial(baseline_sample, datasets[net, "amo", False], setting)
    variants = {"baseline": functools.partial(baseline, plain_read, PLAIN),
                "baseline_repeat": functools.partial(baseline, plain_read, PLAIN),
                "own_operations": functools.partial(baseline, read_rgb, OWN)}
    for sampler in SAMPLERS:
        for cached in (False, True):
            variants[sampler + "_cache" * cached] = datasets[net, sampler, cached].__getitem__
    seconds = abba({name: lambda one=one: [one(draw) for draw in range(SAMPLES)]
                    for name, one in variants.items()}, repeats)
    base, rows = np.array(seconds["baseline"]), []
    for name, values in seconds.items():
        rate = SAMPLES / np.median(values)
        rows.append([setting, name, 0, *spread(np.array(values) / SAMPLES * 1000), f"{rate:.1f}",
                     f"{np.median(base / values):.2f}", f"{wanted / rate:.1f}"])
    return rows


def time_workers(datasets: dict, repeats: int) -> list[list]:
    """Rows: one and two workers of a DataLoader, in elapsed time."""
    variants = {(sampler + "_cache" * cached, workers):
                functools.partial(load, datasets["swinir", sampler, cached], workers)
                for sampler in ("upos", "amo") for cached in (False, True) for workers in (1, 2)}
    return [["one_round", name, workers, *spread(np.array(values) / WORKER_SAMPLES * 1000),
             f"{WORKER_SAMPLES / np.median(values):.1f}", "", ""]
            for (name, workers), values in abba(variants, repeats, "wall").items()]


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # this and the next line as in a DataLoader's worker
    keep_freed_memory()
    steps = {net: args.steps_per_second or usual for net, usual in STEPS_PER_SECOND.items()}
    with tempfile.TemporaryDirectory() as folder:
        root = args.data or folder + "/photos"
        if not args.data:
            write_sets(Path(root), 8)
        sets = load_sets(root)
        pixels = PixelCache(args.cache or folder, sets, image_digest(sets, Path(folder)))
        datasets, rows = make_datasets(sets, pixels), []
        for net, rate in steps.items():
            rows += time_one_core(net, datasets, args.repeats, rate * PRESETS[net]["batch_size"])
        rows += time_workers(datasets, max(1, args.repeats // 2))
    rates = "; ".join(f"{PRESETS[net]['degradation']}: {rate} steps/s of "
                      f"{PRESETS[net]['batch_size']}" for net, rate in steps.items())
    header = ["setting", "variant", "workers", "ms_per_sample", "min", "max", "samples_per_second",
              "times_baseline", "cores_for_gpu"]
    write_results("loader", header, rows, "cpu", [
        "512x512 PNG photographs" if not args.data else args.data,
        f"workers 0: CPU time of one core, {args.repeats} times {SAMPLES} samples: median, "
        f"minimum, maximum; else elapsed time of {WORKER_SAMPLES} samples by that many processes",
        "baseline: Pillow decodes five to float, the full original is degraded with torch's "
        "convolution and interpolation, numpy's noise and Pillow's JPEG, then cropped; "
        "baseline_repeat: baseline again; own_operations: the same with this project's functions",
        f"cores_for_gpu: cores that feed a GPU of {rates}"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", metavar="DIR", help="multi-GT folder (default: photographs of scikit-image)")
    add("--cache", metavar="DIR", help="folder, as train_sr.py --cache (default: a temporary one)")
    add("--repeats", type=integer(1), default=4,
        help="timed calls of each variant (default: %(default)s)")
    add("--steps-per-second", type=number(1e-6), metavar="N",
        help="training steps of the GPU (default: an estimate for an H100, 10.2 SwinIR, 6.0 RRDB)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("benchmarks.loader"):
        main(parse_args())
