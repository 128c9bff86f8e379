"""Write the demo's data: multi-GT sets of photographs and drawings, with simulated labels.

    python -m demo.data --out datasets/demo/swinir-seed0 --seed 0 --setting light
    python -m demo.data --out datasets/demo/rrdb-seed0 --seed 0 --setting two_round

Takes under 20 seconds on one core and downloads nothing: the photographs ship inside scikit-image.
Everything is a pure function of the seed, the split and the image's name. Writes, in the real
layouts:

    HGGT/Train/{images,labels}/0-40/...         training sets: original, 01 .. 04; raters A, B, C
    HGGT/Test/GT/Test-100/{images,labels}/...   test sets, of other photographs
    HGGT/Test/Blind_Degradation_Benchmark_LQ/Test-100/Blind_LR/NAME.png
    HGGT-val/Test/...                           as HGGT/Test, for tuning only: further crops of the
                                                training photographs, and other drawings
    SBS180K/{train,test}.csv                    image1,image2,score,model1,model2
    RealSR(V3)/{Canon,Nikon}/Test/4/            NAME_HR.png, NAME_LR4.png
    pristine/{train,val,test}/NAME.png          HIDDEN

The originals are made from the pristine images, and the simulated raters compare with them. In
practice nobody has them: only the training of Q and the judge, and figures, may read them.
"""

import argparse
import csv
import functools
import importlib.util
import io
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from models.distributed import clean_exit
from models.flags import SEED, new_parser

SIZE = 192  # side of every GT, pixels
MODELS = ("original", "01", "02", "03", "04")
RATERS = ("A", "B", "C")
WORDS = {1: "Positive", 0: "Similar", -1: "Negative"}

# Photograph: factor on its size that makes it crisp, crops for train, further crops for val.
TRAIN_PHOTOS = {
    "astronaut": (0.6, 3, 1), "motorcycle_left": (0.6, 3, 1), "motorcycle_right": (0.6, 2, 1),
    "ihc": (0.6, 2, 1), "retina": (0.4, 2, 1), "brick": (0.5, 1, 0), "grass": (0.5, 1, 0),
    "coins": (0.65, 1, 1), "moon": (0.5, 1, 0), "page": (1.0, 1, 0), "text": (1.15, 1, 0),
    "hubble_deep_field": (0.5, 2, 2),
}  # fmt: skip
# Nothing is trained or tuned on these photographs.
TEST_PHOTOS = {
    "chelsea": (0.66, 2), "coffee": (0.6, 3), "camera": (0.5, 2), "rocket": (0.6, 2),
    "gravel": (0.5, 1),
}  # fmt: skip
DRAWN = {
    "train": {"leaves": 12, "letters": 3, "mixed": 5},
    "val": {"leaves": 5, "letters": 1, "mixed": 2},
    "test": {"leaves": 4, "letters": 1, "mixed": 1},
}
# HGGT's Test-100 was chosen so that each image has at least two Positives.
MIN_POSITIVE = {"train": 1, "val": 2, "test": 2}


def rng_of(*key: int | str) -> np.random.Generator:
    """Generator for a key such as (seed, "train", "astronaut0"); words count by their CRC-32."""
    return np.random.default_rng([k if isinstance(k, int) else zlib.crc32(k.encode()) for k in key])


# Image operations. Every image below is float32 (H, W, 3) in [0, 1] unless said otherwise.


def to_uint8(x: np.ndarray) -> np.ndarray:
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)


def to_float(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32) / 255


def blur(x: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur; sigma in pixels."""
    return gaussian_filter(x, (sigma, sigma, 0), truncate=3.0)


def unsharp(x: np.ndarray, sigma: float, amount: float) -> np.ndarray:
    return np.clip(x + amount * (x - blur(x, sigma)), 0, 1)


def add_noise(x: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """White Gaussian noise; sigma on the [0, 1] scale."""
    return np.clip(x + sigma * rng.standard_normal(x.shape, np.float32), 0, 1)


def jpeg(x: np.ndarray, quality: float) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(x)).save(buffer, "JPEG", quality=int(quality))
    return to_float(Image.open(buffer))


def resize(x: np.ndarray, width: int, height: int, method: int = Image.BICUBIC) -> np.ndarray:
    """PIL's resize: antialiased when it reduces."""
    return to_float(Image.fromarray(to_uint8(x)).resize((width, height), method))


def denoise(x: np.ndarray, weight: float) -> np.ndarray:
    """Total-variation denoising (Chambolle 2004); weights above 0.05 look like oil paint."""
    from skimage.restoration import denoise_tv_chambolle  # slow to import; Q does not need it

    return denoise_tv_chambolle(x, weight, max_num_iter=20, channel_axis=2).astype(np.float32)


def deconvolve(x: np.ndarray, sigma: float, steps: int) -> np.ndarray:
    """Richardson-Lucy deconvolution of a Gaussian blur; sigma in pixels."""
    observed = x + 1e-3  # a black pixel would stay black
    estimate = observed
    for _ in range(steps):
        estimate = estimate * blur(observed / np.maximum(blur(estimate, sigma), 1e-3), sigma)
    return np.clip(estimate - 1e-3, 0, 1)


def luma(x: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (H, W), BT.601."""
    return x @ np.array([0.299, 0.587, 0.114], np.float32)


# Pristine images.


def photo_crops(photo: str, reduction: float, count: int, seed: int) -> list[np.ndarray]:
    """The `count` most detailed crops of a photograph, the best first; they overlap little.

    reduction: factor on its size; varies by 6 % with the seed, and leaves at least a crop.
    Raises FileNotFoundError if the installed scikit-image lacks the photograph.
    """
    spec = importlib.util.find_spec("skimage")  # not skimage.data, whose functions may download
    folder = Path(spec.submodule_search_locations[0] if spec else "skimage") / "data"
    path = folder / f"{photo}.png"
    if not path.is_file():
        path = path.with_suffix(".jpg")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such photograph; pip install scikit-image")
    image = Image.open(path).convert("RGB")
    reduction *= rng_of(seed, photo).uniform(0.94, 1.06)
    reduction = max(reduction, (SIZE + 0.5) / min(image.size))
    width, height = int(image.width * reduction), int(image.height * reduction)
    x = to_float(image.resize((width, height), Image.LANCZOS))

    detail = sum(np.abs(d).mean(2) for d in np.gradient(x, axis=(0, 1)))
    crops = []
    for _ in range(count):
        # summed[i, j] is the detail above and left of (i, j), so four reads give a crop's sum
        summed = np.pad(detail.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        total = (summed[SIZE:, SIZE:] - summed[:-SIZE, SIZE:] - summed[SIZE:, :-SIZE]
                 + summed[:-SIZE, :-SIZE])  # fmt: skip
        top, left = np.unravel_index(total.argmax(), total.shape)
        crop = (slice(top, top + SIZE), slice(left, left + SIZE))
        crops.append(x[crop])
        detail[crop] = 0
    return crops


def fractal(n: int, slope: float, rng: np.random.Generator, channels: int = 1) -> np.ndarray:
    """Noise with amplitude spectrum 1 / f^slope; (n, n, channels), mean 0, std 1."""
    f = np.fft.fftfreq(n)
    radius = np.hypot(f[:, None], f[None])
    radius[0, 0] = 1
    white = rng.standard_normal((channels, n, n))
    x = np.fft.ifft2(np.fft.fft2(white) / radius**slope).real.transpose(1, 2, 0)
    return (x - x.mean((0, 1))) / x.std((0, 1))


def grating(n: int, rng: np.random.Generator) -> np.ndarray:
    """Sinusoid of random direction and slowly changing period, 6 to 32 pixels; (n, n), +-1."""
    y, x = np.mgrid[:n, :n].astype(float)
    angle, period, drift = rng.uniform(0, np.pi), rng.uniform(6, 32), rng.uniform(0, 1.5) / n
    u = x * np.cos(angle) + y * np.sin(angle)
    return np.sin(2 * np.pi / period * u * (1 + drift * u / 2) + rng.uniform(0, 6))


def draw_leaves(n: int, rng: np.random.Generator) -> np.ndarray:
    """Dead leaves: textured discs and polygons that cover each other, radius density 1 / r^3."""
    count = int(rng.integers(100, 350))
    index = Image.new("I", (n, n), 0)
    pen = ImageDraw.Draw(index)
    r_min, r_max = 8.0, n / 3
    for i in range(1, count + 1):
        r = (r_min**-2 + rng.uniform() * (r_max**-2 - r_min**-2)) ** -0.5
        cx, cy = rng.uniform(0, n, 2)
        if rng.uniform() < 1 / 3:
            squash = rng.uniform(0.5, 1)
            pen.ellipse([cx - r, cy - r * squash, cx + r, cy + r * squash], fill=i)
        else:
            corners = int(rng.integers(3, 7))
            angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
            radii = r * rng.uniform(0.7, 1.3, corners)
            xs, ys = cx + radii * np.cos(angles), cy + radii * np.sin(angles)
            pen.polygon(list(zip(xs.tolist(), ys.tolist(), strict=True)), fill=i)
    leaf = np.asarray(index)
    hue, grey = rng.uniform(0.08, 0.92, (count + 1, 3)), rng.uniform(0.08, 0.92, (count + 1, 1))
    colour = 0.6 * hue + 0.4 * grey
    textures = [fractal(n, slope, rng)[..., 0] for slope in (0.7, 1.0, 1.3)]
    textures = np.stack(textures + [grating(n, rng) for _ in range(3)] + [np.zeros((n, n))] * 2)
    kind, strength = rng.integers(0, len(textures), count + 1), rng.uniform(0.02, 0.12, count + 1)
    y, x = np.mgrid[:n, :n]
    return colour[leaf] + (strength[leaf] * textures[kind[leaf], y, x])[..., None]


def draw_letters(n: int, rng: np.random.Generator) -> np.ndarray:
    """Lines of random letters on cloudy paper, in Pillow's own font."""
    paper = rng.uniform(0.3, 0.9, 3) + 0.1 * fractal(n, 1.8, rng, 3)
    page = Image.fromarray(to_uint8(paper))
    pen = ImageDraw.Draw(page)
    letters = list("abcdefghijklmnoprstuvwxyzABCDEGHKMNRSTW   0123456789")
    y = 4
    while y < n:
        size = int(rng.integers(16, 48))
        ink = rng.integers(0, 90, 3) if paper.mean() > 0.5 else rng.integers(170, 255, 3)
        line, left = "".join(rng.choice(letters, 40)), int(rng.integers(-10, 20))
        font, bold = ImageFont.load_default(size), int(rng.integers(0, 2))
        pen.text((left, y), line, font=font, fill=tuple(ink.tolist()), stroke_width=bold)
        y += int(size * 1.3)
    return to_float(page)


def draw_mixed(n: int, rng: np.random.Generator) -> np.ndarray:
    """Clouds of fractal colour with one to three striped patches."""
    x = 0.5 + 0.18 * rng.uniform(0.4, 1) * fractal(n, rng.uniform(1.0, 1.6), rng, 3)
    x = x + 0.12 * fractal(n, 1.2, rng)
    for _ in range(rng.integers(1, 4)):
        patch = fractal(n, 1.9, rng) > rng.uniform(-0.3, 0.8)
        stripes = rng.uniform(0.2, 0.8, 3) + rng.uniform(0.1, 0.3) * grating(n, rng)[..., None]
        x = np.where(patch, stripes, x)
    return x


def drawing(kind: str, rng: np.random.Generator) -> np.ndarray:
    """An image of one kind of DRAWN, drawn at twice the size and reduced: antialiased edges."""
    draw = {"leaves": draw_leaves, "letters": draw_letters, "mixed": draw_mixed}[kind]
    x = np.clip(draw(2 * SIZE, rng), 0, 1).astype(np.float32)
    return resize(blur(x, 0.6), SIZE, SIZE, Image.LANCZOS)


def pristine(split: str, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, image) of a split, the photographs first, each made when it is needed."""
    photos = TEST_PHOTOS if split == "test" else TRAIN_PHOTOS
    for photo, (reduction, count, *more) in photos.items():
        first, last = (count, count + more[0]) if split == "val" else (0, count)
        crops = photo_crops(photo, reduction, last, seed) if last > first else []
        yield from ((f"{photo}{i}", crops[i]) for i in range(first, last))
    for kind, count in DRAWN[split].items():
        for i in range(count):
            yield f"{kind}{i}", drawing(kind, rng_of(seed, split, f"{kind}{i}"))


# A set: the original, four enhanced GTs, the votes of simulated raters.


def degrade_to_original(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a camera or the web makes of a pristine image: a little blur, noise and JPEG."""
    x = add_noise(blur(x, rng.uniform(0.8, 1.2)), rng.uniform(0.7, 2) / 255, rng)
    return jpeg(x, rng.uniform(85, 96))


def uneven(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mix x and its enhanced version y, in regions of about 60 pixels.

    Learned enhancement is as uneven, which is why AMO chooses per patch (paper Sec. 4.2).
    """
    field = gaussian_filter(rng.standard_normal((SIZE, SIZE)), 20, mode="wrap")
    strength = 1.2 / (1 + np.exp(-2.5 * field / field.std()))
    return np.clip(x + strength[..., None].astype(np.float32) * (y - x), 0, 1)


def enhance(x: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The "enhancement models" 01 .. 04: classical, of random strength; now and then one fails."""
    clean = denoise(x, rng.uniform(0.004, 0.01))
    out = [
        unsharp(clean, 1.1, rng.uniform(1.0, 2.2)),
        deconvolve(clean, rng.uniform(0.8, 1.2), int(rng.integers(8, 18))),
        unsharp(clean, 4.0, rng.uniform(0.05, 0.25)),  # local contrast
    ]
    out[2] = unsharp(out[2], 1.0, rng.uniform(1.2, 2.5))
    for i, y in enumerate(out):  # some fail: noisy and over-sharp, or like oil paint
        failure = rng.uniform()
        if failure < 0.04:
            out[i] = add_noise(unsharp(y, 1.2, 2.0), 0.03, rng)
        elif failure < 0.16:
            out[i] = denoise(y, 0.1)
    out = [uneven(x, y, rng) for y in out]
    character = rng.uniform()  # of the fourth, which is aggressive
    if character < 0.2:
        over = unsharp(unsharp(x, 1.3, rng.uniform(2.0, 3.5)), 0.7, 0.8)
        out.append(jpeg(over, rng.uniform(55, 80)))
    elif character < 0.5:
        out.append(unsharp(denoise(x, rng.uniform(0.06, 0.14)), 1.0, rng.uniform(0.5, 1.2)))
    else:
        out.append(uneven(x, unsharp(clean, 1.1, rng.uniform(1.5, 2.5)), rng))
    return out


def gradient_deviation(a: np.ndarray, b: np.ndarray) -> float:
    """GMSD of two lumas (H, W), 0 = equal; Xue et al. 2014, but at full size."""

    def magnitude(y: np.ndarray) -> np.ndarray:  # of Prewitt's filter
        y = np.pad(y, 1, mode="edge")
        across, down = y[:, 2:] - y[:, :-2], y[2:] - y[:-2]
        across = (across[:-2] + across[1:-1] + across[2:]) / 3
        down = (down[:, :-2] + down[:, 1:-1] + down[:, 2:]) / 3
        return np.hypot(across, down)

    ga, gb = magnitude(a), magnitude(b)
    return float(((2 * ga * gb + 0.0026) / (ga**2 + gb**2 + 0.0026)).std())


def visible_noise(lumas: list[np.ndarray], hidden: np.ndarray) -> np.ndarray:
    """RMS noise of each luma (H, W) in the flat regions of the pristine luma; (K,), on [0, 1].

    People see grain in flat regions, where gradient similarity hardly does; texture masks it.
    """

    def fine(y: np.ndarray) -> np.ndarray:
        return y - gaussian_filter(y, 1.5)

    flatness = np.exp(-gaussian_filter(np.abs(fine(hidden)), 3.0) / (3 / 255))
    return np.array([np.sqrt((flatness * fine(y - hidden) ** 2).mean()) for y in lumas])


def utilities(gts: list[np.ndarray], hidden: np.ndarray) -> np.ndarray:
    """How much better each GT looks than the first, the original, to an ideal rater; (K,).

    The rater knows the pristine image and prefers it mildly sharpened. 0: like the original; 1: all
    gradients restored, with the original's noise.
    """
    target, lumas = luma(unsharp(hidden, 0.8, 0.4)), [luma(x) for x in gts]
    deviation = np.array([gradient_deviation(y, target) for y in lumas])
    noise = visible_noise(lumas, luma(hidden))
    return (deviation[0] - deviation) / deviation[0] - NOISE_PRICE * (noise - noise[0])


NOISE_PRICE = 255 / 8  # visible noise of 8/255 costs what restoring all gradients gains
THRESHOLD = 0.09  # raters do not see a smaller difference in utility
RATER_NOISE = 0.08  # standard deviation of a single judgement


def judge_difference(difference: np.ndarray, raters: int, rng: np.random.Generator) -> np.ndarray:
    """Votes +1, 0, -1 of several raters on differences in utility (K,); int (raters, K)."""
    seen = difference + rng.normal(0, RATER_NOISE, (raters, len(difference)))
    return np.where(seen > THRESHOLD, 1, np.where(seen < -THRESHOLD, -1, 0))


def majority(votes: np.ndarray) -> np.ndarray:
    """(3, K) votes -> (K,) labels; 0 where all three differ (HGGT)."""
    return np.where((votes == 1).sum(0) >= 2, 1, np.where((votes == -1).sum(0) >= 2, -1, 0))


@dataclass
class Quintuplet:
    name: str
    hidden: np.ndarray  # the pristine image, uint8 (H, W, 3)
    gts: list[np.ndarray]  # original, 01 .. 04; uint8 (H, W, 3)
    utility: np.ndarray  # (5,)
    votes: np.ndarray  # (3, 4): rater x enhanced GT, +1, 0, -1

    @property
    def labels(self) -> np.ndarray:
        return majority(self.votes)


def quintuplet(image: tuple[str, np.ndarray], split: str, seed: int) -> Quintuplet:
    """The set of a (name, pristine image); drawn up to 10 times until it has enough Positives."""
    name, hidden = image
    for attempt in range(10):
        rng = rng_of(seed, split, name, f"attempt {attempt}")
        original = degrade_to_original(hidden, rng)
        gts = [to_uint8(x) for x in [original, *enhance(original, rng)]]
        utility = utilities([to_float(x) for x in gts], hidden)
        votes = judge_difference(utility[1:], len(RATERS), rng)
        if (majority(votes) == 1).sum() >= MIN_POSITIVE[split]:
            break
    return Quintuplet(name, to_uint8(hidden), gts, utility, votes)


def make_split(split: str, seed: int, limit: int | None = None) -> list[Quintuplet]:
    """All sets of "train", "val" or "test", or the first `limit` of them, with a progress bar."""
    photos = (TEST_PHOTOS if split == "test" else TRAIN_PHOTOS).values()
    total = sum(DRAWN[split].values()) + sum(photo[1 + (split == "val")] for photo in photos)
    images = itertools.islice(pristine(split, seed), limit)
    make = functools.partial(quintuplet, split=split, seed=seed)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        sets = pool.map(make, images)
        return list(tqdm(sets, split, min(total, limit or total), unit="set", disable=None))


# Writing.


def save_png(x: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path, compress_level=1)


def member(name: str, model: str) -> str:
    """Path of an image of a set below images/, as in HGGT: original/NAME.png, 01/NAME_01.png."""
    return f"{model}/{name}.png" if model == "original" else f"{model}/{name}_{model}.png"


def write_sets(sets: list[Quintuplet], images: Path, labels: Path) -> None:
    """Write the images as PNG, and a JSON file with the votes of each rater on each set."""
    for s in sets:
        for gt, model in zip(s.gts, MODELS, strict=True):
            save_png(gt, images / member(s.name, model))
        for rater, votes in zip(RATERS, s.votes, strict=True):
            record = {
                f"Picture_{k + 1}": {
                    "Name": Path(member(s.name, model)).name,
                    "File": model,
                    "Label": WORDS[int(votes[k - 1])] if k else None,
                }
                for k, model in enumerate(MODELS)
            }
            record["Time_cost"] = {}  # HGGT's raters took time; these take none
            path = labels / rater / f"{s.name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1))


def write_lq(sets: list[Quintuplet], folder: Path, split: str, seed: int, setting: str) -> None:
    """Write an LQ image for each set, degraded from the original as in training (paper Sec. 5)."""
    from models.degradations import apply_degradation, draw_degradation

    for index, s in enumerate(sets):
        rng = rng_of(seed, split, index)
        params = draw_degradation(rng, setting)
        save_png(apply_degradation(s.gts[0], params, rng, scale=4), folder / f"{s.name}.png")


def write_pairs(sets: list[Quintuplet], images: str, path: Path, split: str, seed: int) -> None:
    """Write the ten pairs of each set, sides at random, as a manifest (paper Sec. 3.1).

    images: folder of the images, relative to the manifest
    The column score is the fraction of ten raters that prefer the second image; a rater who sees
    no difference counts as one half.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image1", "image2", "score", "model1", "model2"])
        for s in sets:
            rng = rng_of(seed, split, s.name, "pairs")
            for pair in itertools.combinations(range(len(MODELS)), 2):
                a, b = rng.permutation(pair)
                votes = judge_difference(s.utility[b : b + 1] - s.utility[a], 10, rng)
                names = [f"{images}/{member(s.name, MODELS[i])}" for i in (a, b)]
                score = f"{(votes + 1).mean() / 2:.2f}"
                rows.writerow([*names, score, MODELS[a], MODELS[b]])


def write_realsr(sets: list[Quintuplet], folder: Path, seed: int) -> None:
    """Write the photographs as two cameras might take them: more blur than in training, no JPEG."""
    photos = [s for s in sets if not s.name.startswith(tuple(DRAWN["test"]))]
    for index, s in enumerate(photos):
        rng, hr = rng_of(seed, s.name, "camera"), to_float(s.gts[0])
        small = resize(blur(hr, rng.uniform(1.2, 2.0)), SIZE // 4, SIZE // 4)
        camera = folder / ("Canon" if index < len(photos) / 2 else "Nikon") / "Test/4"
        save_png(s.gts[0], camera / f"{s.name}_HR.png")
        save_png(to_uint8(add_noise(small, 1 / 255, rng)), camera / f"{s.name}_LR4.png")


README = """Made by demo/data.py. The labels are simulated.
pristine/ is hidden knowledge: only the training of Q and the judge, and figures, may read it.
HGGT-val/ shares photographs with the training set: use it for tuning, never for results.
"""


def write_demo(
    out: Path, seed: int = 0, setting: str = "one_round", limit: int | None = None
) -> None:
    """Write everything to `out`, which appears only when it is complete.

    setting: of models/degradations.py, for the LQ images of test and val
    limit: make only the first sets of each split, for tests
    Does nothing if `out` holds the same data already. Raises ValueError if it holds anything else.
    """
    out = Path(out)
    made_by = (Path(__file__), Path(__file__).parent.parent / "models/degradations.py")
    code = zlib.crc32(b"".join(p.read_bytes() for p in made_by))  # other code may make other data
    settings = {"seed": seed, "setting": setting, "limit": limit, "code": code}
    if out.exists():
        stamp = out / "settings.json"
        if stamp.is_file() and json.loads(stamp.read_text()) == settings:
            print(f"{out}: already there")
            return
        raise ValueError(f"{out}: exists, made with other settings or by another version of "
                         "the code; delete it, or give another --out")
    work = out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    for split in ("train", "val", "test"):
        sets = make_split(split, seed, limit)
        for s in sets:
            save_png(s.hidden, work / "pristine" / split / f"{s.name}.png")
        if split == "train":
            root, part = Path("HGGT/Train"), f"0-{len(sets)}"
        else:
            top = Path("HGGT-val/Test" if split == "val" else "HGGT/Test")
            root, part = top / "GT/Test-100", ""
            lq = work / top / "Blind_Degradation_Benchmark_LQ/Test-100/Blind_LR"
            write_lq(sets, lq, split, seed, setting)
        if split == "test":
            write_realsr(sets, work / "RealSR(V3)", seed)
        write_sets(sets, work / root / "images" / part, work / root / "labels" / part)
        if split != "val":
            images = (Path("..") / root / "images" / part).as_posix()
            write_pairs(sets, images, work / "SBS180K" / f"{split}.csv", split, seed)
        labels = np.concatenate([s.labels for s in sets])
        counts = ", ".join(f"{(labels == v).sum()} {word}" for v, word in WORDS.items())
        print(f"{split}: {len(sets)} sets, {counts}")
    (work / "README.txt").write_text(README)
    (work / "settings.json").write_text(json.dumps(settings))
    os.replace(work, out)


def main(args: argparse.Namespace) -> None:
    write_demo(args.out, args.seed, args.setting)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    from models.degradations import SETTINGS

    parser = new_parser(__doc__.split("\n")[0], "python -m demo.data")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=SEED, default=0, help="seed of all images and votes")
    parser.add_argument(
        "--setting", choices=list(SETTINGS), default="one_round",
        help="degradation of the LQ images, as in the network's training",
    )  # fmt: skip
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("demo.data"):
        main(parse_args())
