"""Low-quality (LQ) images from ground truth (GT): blur, resize, noise and JPEG, drawn per sample.

    params = draw_degradation(rng, "one_round")              # plain numbers: what will be done
    y0, y1, x0, x1 = crop_with_margin(height, width, top, left, patch_size, "one_round")
    lq = apply_degradation(gt[y0:y1, x0:x1], params, rng, full_gt=gt)
    lq = lq[(top - y0) // 4 :, (left - x0) // 4 :][: patch_size // 4, : patch_size // 4]

Two settings (paper Sec. 5): "one_round" trains SwinIR; "two_round", Real-ESRGAN's scheme (Wang et
al., ICCV Workshops 2021), trains RRDB. Values and order of the steps are those of the public HGGT
configs and code (CVPR 2023, github ChrisDud0257/HGGT, on top of BasicSR). All on the CPU, one
image at a time, inside a DataLoader worker. Between the steps an image is float32 (H, W, 3) in
0..255.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial

import cv2
import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from scipy.special import j1, ndtri, pdtr

# PAPER: Sec. 5, setup: "the same training settings as HGGT".
# Source: HGGT public configs train_{SwinIRGAN,RealESRGAN}_PosNegGT_Blind_Pos_x4, a dict per round.
# Numbers are probabilities, pairs uniform ranges, "sizes" equally likely. blur: sigma in pixels.
# resize: relative to the GT in the first round, to GT / 4 in the second. noise: sigma in 1/255;
# Poisson where not Gaussian. jpeg: quality.
SETTINGS = {
    "one_round": [
        {
            "blur": {"prob": 1.0, "sizes": [3, 5, 7, 9], "sigma": [0.1, 1.0]},
            "resize": {"up": 0.1, "down": 0.85, "keep": 0.05, "range": [0.8, 1.2]},
            "noise": {"gaussian": 0.5, "sigma": [1, 12], "scale": [0.05, 0.8], "gray": 0.2},
            "jpeg": [75, 95],
        },
    ],
    "two_round": [
        {
            "blur": {"prob": 1.0, "sizes": [3, 5, 7], "sigma": [0.1, 0.6]},
            "resize": {"up": 0.1, "down": 0.85, "keep": 0.05, "range": [0.9, 1.1]},
            "noise": {"gaussian": 0.5, "sigma": [1, 8], "scale": [0.05, 0.5], "gray": 0.2},
            "jpeg": [85, 95],
        },
        {
            "blur": {"prob": 0.8, "sizes": [3, 5], "sigma": [0.1, 0.4]},
            "resize": {"up": 0.1, "down": 0.85, "keep": 0.05, "range": [0.9, 1.1]},
            "noise": {"gaussian": 0.5, "sigma": [0, 4], "scale": [0, 0.3], "gray": 0.2},
            "jpeg": [87, 95],
        },
    ],
    # ASSUMED: not HGGT's. The demo's, for SwinIR: what 150 steps of a tiny net can learn to undo.
    "light": [
        {
            "blur": {"prob": 1.0, "sizes": [3, 5, 7], "sigma": [0.1, 0.6]},
            "resize": {"up": 0.05, "down": 0.05, "keep": 0.9, "range": [0.95, 1.05]},
            "noise": {"gaussian": 1.0, "sigma": [0.5, 2], "scale": [0, 0.1], "gray": 0.2},
            "jpeg": [92, 98],
        },
    ],
}
# End of "two_round": the last resize and, seldom, a sinc filter, after the last JPEG or before it.
FINAL = {"jpeg_first": 0.5, "sinc": 0.1, "sizes": [3, 5]}
# In every round
SINC = 0.01  # of the blur kernels; the others are Gaussian
ANISO = 0.3  # of the Gaussian kernels; the others are isotropic
ROTATION = [-math.pi, math.pi]  # of an anisotropic kernel, uniform
OMEGA_C = [math.pi / 3, math.pi]  # cut-off of a sinc kernel, radians per pixel, uniform
MODES = ["area", "bilinear", "bicubic"]  # of a resize, equally likely
LUMA = np.array([0.2989, 0.587, 0.114], np.float32)  # as torchvision's rgb_to_grayscale
POISSON_DRAWS = 4096  # quantiles per level, 2^12

# GT pixels that apply_degradation needs on each side, so that what lies beyond does not matter.
#   one_round: blur 4, resize 2 / 0.8, last resize 2 / 0.8 less the 2 that the first LQ pixel's
#     centre lies inside: 7. A JPEG block in between: 16 / 0.8 = 20.
#   two_round: blurs 3 and 2 / 0.9, resizes 2 / 0.9 twice, last resize 8 / 0.9 and sinc 8: 27.
#     JPEG blocks: 16 / 0.9 = 18 in the first round, 64 in the second, at about LQ size.
# Inside a JPEG block pixels affect each other only through the rounding of coefficients, so one
# block of the second round is enough. What is left, at factor 1 and without noise: no LQ pixel of
# one_round differs from the full image's, 0.05 % of two_round do.
MARGIN = {"one_round": 32, "two_round": 64, "light": 32}
# A JPEG grid has to cut the patch where it does in the full image; else its phase, there as random
# as the patch's place, would be fixed by the margin. Blocks are 8 pixels, 16 in colour (4:2:0), at
# about LQ size in the second round: regions start at a multiple of 16 LQ pixels.
JPEG_BLOCK = 16
USM_TAPS = 51  # BasicSR's radius of 50, made odd


def draw_degradation(rng: np.random.Generator, setting: str) -> dict:
    """All parameters of one sample's degradation: a pure function of the generator's state.

    Returns plain Python values: {"setting", "rounds": [{"blur", "resize", "noise", "jpeg"}] of one
    or two, "final"}. blur: {"kind": "iso" | "aniso", "size", "sigma_x", "sigma_y", "rotation"} or
    {"kind": "sinc", "size", "omega_c"} or None; resize: {"direction", "factor", "mode"}; noise:
    {"kind": "gaussian", "gray", "sigma"} or {"kind": "poisson", "gray", "scale"}; jpeg: quality;
    final: {"jpeg_first", "mode", "sinc": a sinc blur or None} or None.
    Raises ValueError for an unknown setting.
    """
    if setting not in SETTINGS:
        raise ValueError(f"unknown degradation {setting!r}: choose from {', '.join(SETTINGS)}")
    # ASSUMED: every sample has its own draw. HGGT draws resizes and kinds of noise once for a batch
    # and mixes batches in a pool of 160 to 180 samples: the same distribution of single samples.
    rounds = [_draw_round(rng, table) for table in SETTINGS[setting]]
    final = None
    if setting == "two_round":
        sinc = _draw_sinc(rng, FINAL["sizes"]) if _happens(rng, FINAL["sinc"]) else None
        jpeg_first = _happens(rng, FINAL["jpeg_first"])
        final = {"jpeg_first": jpeg_first, "mode": _one_of(rng, MODES), "sinc": sinc}
    return {"setting": setting, "rounds": rounds, "final": final}


def _draw_round(rng: np.random.Generator, table: dict) -> dict:
    blur = _draw_blur(rng, table["blur"]) if _happens(rng, table["blur"]["prob"]) else None

    low, high = table["resize"]["range"]
    bounds = {"up": (1, high), "down": (low, 1), "keep": (1, 1)}
    direction = list(bounds)[rng.choice(3, p=[table["resize"][name] for name in bounds])]
    factor = _uniform(rng, bounds[direction])
    resize = {"direction": direction, "factor": factor, "mode": _one_of(rng, MODES)}

    gaussian = _happens(rng, table["noise"]["gaussian"])
    strength = "sigma" if gaussian else "scale"
    noise = {
        "kind": "gaussian" if gaussian else "poisson",
        "gray": _happens(rng, table["noise"]["gray"]),
        strength: _uniform(rng, table["noise"][strength]),
    }
    return {"blur": blur, "resize": resize, "noise": noise, "jpeg": _uniform(rng, table["jpeg"])}


def _draw_blur(rng: np.random.Generator, table: dict) -> dict:
    if _happens(rng, SINC):
        return _draw_sinc(rng, table["sizes"])
    blur = {"kind": "aniso" if _happens(rng, ANISO) else "iso"}
    blur |= {"size": _one_of(rng, table["sizes"]), "sigma_x": _uniform(rng, table["sigma"])}
    if blur["kind"] == "iso":
        return blur | {"sigma_y": blur["sigma_x"], "rotation": 0.0}
    return blur | {"sigma_y": _uniform(rng, table["sigma"]), "rotation": _uniform(rng, ROTATION)}


def _draw_sinc(rng: np.random.Generator, sizes: list[int]) -> dict:
    return {"kind": "sinc", "size": _one_of(rng, sizes), "omega_c": _uniform(rng, OMEGA_C)}


def _happens(rng: np.random.Generator, probability: float) -> bool:
    return bool(rng.random() < probability)


def _uniform(rng: np.random.Generator, bounds: list[float]) -> float:
    return float(rng.uniform(*bounds))


def _one_of(rng: np.random.Generator, options: list):
    return options[rng.integers(len(options))]


def crop_with_margin(
    height: int, width: int, top: int, left: int, patch_size: int, setting: str,
    scale: int = 4,
) -> tuple[int, int, int, int]:
    """The part (y0, y1, x0, x1) of a GT image to degrade in order to get one LQ patch out of it.

    All in GT pixels. height, width: of the image; top, left, patch_size: of the patch, multiples of
    scale, as is the result.
    The LQ patch begins at row (top - y0) // scale, column (left - x0) // scale of the degraded part
    and is distributed as if cut out of the degraded full image: the margin covers the steps' reach,
    y0 and x0 lie on the full image's JPEG grid, and the image's own borders are borders there too.
    Raises ValueError for a patch off the image or off the grid.
    """
    bounds = []
    for size, start in ((height, top), (width, left)):
        stop = start + patch_size
        if start < 0 or stop > size or start % scale or patch_size % scale:
            patch = f"{patch_size} GT pixels at {start} of {size}"
            raise ValueError(f"patch of {patch}: it must lie inside, on multiples of {scale}")
        grid, margin = JPEG_BLOCK * scale, MARGIN[setting]
        bounds += [max(0, start - margin) // grid * grid]
        bounds += [min(size, stop + margin) // scale * scale]
    return tuple(bounds)


def apply_degradation(
    gt: np.ndarray, params: dict, rng: np.random.Generator,
    scale: int = 4, full_gt: np.ndarray | None = None,
) -> np.ndarray:
    """Degrade a GT image, or part of one, as drawn; the order of the steps is the public code's.

    gt: uint8 (H, W, 3), sides multiples of scale and at least 16. params: from draw_degradation.
    rng: for the noise fields only. full_gt: uint8 (H', W', 3), the full image if gt is a part of
    one: Poisson noise is stronger the fewer 8-bit values the degraded full image has.
    Returns uint8 (H / scale, W / scale, 3). Raises ValueError for another dtype, shape or size.
    """
    if gt.dtype != np.uint8 or gt.ndim != 3 or gt.shape[2] != 3:
        raise ValueError(f"GT is {gt.dtype} {gt.shape}: it must be uint8 (H, W, 3)")
    height, width = gt.shape[:2]
    if height % scale or width % scale or min(height, width) < 16:
        raise ValueError(f"GT is {height} x {width}: sides must be multiples of {scale} and >= 16")
    lq_size = (height // scale, width // scale)
    first, final = params["rounds"][0], params["final"]

    cv2.setNumThreads(1)  # OpenCV's threads would multiply the workers, and do not survive a fork

    def before_first_noise(gt: np.ndarray) -> np.ndarray:
        image = _blur(gt.astype(np.float32), first["blur"])
        return _resize(image, first["resize"]["mode"], factor=first["resize"]["factor"])

    full = None if full_gt is None else partial(before_first_noise, full_gt)
    if final is None:
        image = _add_noise(before_first_noise(gt), first["noise"], rng, full)
        image = _jpeg(image, first["jpeg"])
        return _to_uint8(_resize(image, first["resize"]["mode"], size=lq_size))
    second = params["rounds"][1]

    def before_second_noise(gt: np.ndarray, full: Callable | None = None) -> np.ndarray:
        image = _add_noise(before_first_noise(gt), first["noise"], rng, full)
        image = _blur(_jpeg(image, first["jpeg"]), second["blur"])
        size = tuple(int(side // scale * second["resize"]["factor"]) for side in gt.shape[:2])
        return _resize(image, second["resize"]["mode"], size=size)

    image = before_second_noise(gt, full)
    full = None if full_gt is None else partial(before_second_noise, full_gt)
    image = _add_noise(image, second["noise"], rng, full)
    if final["jpeg_first"]:
        image = _jpeg(image, second["jpeg"])
    image = _blur(_resize(image, final["mode"], size=lq_size), final["sinc"])
    if not final["jpeg_first"]:
        image = _jpeg(image, second["jpeg"])
    return _to_uint8(image)


def degrade_patch(
    gt: np.ndarray, top: int, left: int, patch_size: int, rng: np.random.Generator, setting: str,
    scale: int = 4,
) -> np.ndarray:
    """One training LQ patch: draw a degradation, apply it around one GT patch, cut the patch out.

    gt: the whole image, uint8 (H, W, 3). top, left, patch_size: the patch in GT pixels, multiples
    of `scale`. Returns uint8 (patch_size / scale, patch_size / scale, 3).
    """
    y0, y1, x0, x1 = crop_with_margin(*gt.shape[:2], top, left, patch_size, setting, scale)
    params = draw_degradation(rng, setting)
    lq = apply_degradation(gt[y0:y1, x0:x1], params, rng, scale, full_gt=gt)
    row, column, size = (top - y0) // scale, (left - x0) // scale, patch_size // scale
    return lq[row : row + size, column : column + size]


def blur_kernel(blur: dict) -> np.ndarray:
    """The kernel of a drawn blur: float64 (size, size), sum 1 (as BasicSR's degradations.py).

    Gaussians have the covariance R diag(sigma_x^2, sigma_y^2) R^T, R the rotation. "sinc" is the
    ideal circular low-pass omega_c J1(omega_c r) / (2 pi r), cut to the square.
    """
    axis = np.arange(blur["size"]) - blur["size"] // 2
    x, y = np.meshgrid(axis, axis)
    if blur["kind"] == "sinc":
        omega_c, r = blur["omega_c"], np.maximum(np.hypot(x, y), 1e-6)  # J1(z) / z is smooth at 0
        kernel = omega_c * j1(omega_c * r) / (2 * math.pi * r)
    else:
        cos, sin = math.cos(blur["rotation"]), math.sin(blur["rotation"])
        u, v = (cos * x + sin * y) / blur["sigma_x"], (cos * y - sin * x) / blur["sigma_y"]
        kernel = np.exp(-(u**2 + v**2) / 2)
    return kernel / kernel.sum()


def _blur(image: np.ndarray, blur: dict | None) -> np.ndarray:
    """Correlate each channel with the kernel, borders reflected."""
    if blur is None:
        return image
    kernel, pad, (height, width) = blur_kernel(blur), blur["size"] // 2, image.shape[:2]
    # Far taps of a narrow Gaussian change nothing. filter2D skips zeros; denormals are slow.
    kernel[np.abs(kernel) < 1e-16] = 0
    # Rows of a multiple of 8 pixels: else filter2D rounds the last few of a row differently.
    right = pad + -(width + 2 * pad) % 8
    image = cv2.copyMakeBorder(image, pad, pad, pad, right, cv2.BORDER_REFLECT_101)
    image = cv2.filter2D(image, -1, kernel.astype(np.float32))
    return image[pad : pad + height, pad : pad + width]


def _resize(
    image: np.ndarray, mode: str, factor: float = 1.0, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Resize to (height, width), or by a factor: output sizes are floored, sampling steps use the
    exact factor. No antialiasing, corners not aligned.

    The results are F.interpolate's, as in the public code, in a tenth to a fifth of its time. (On a
    CPU, but not on a GPU, its bilinear mode leaves an axis alone whose floored size stays the same;
    this function follows the GPU, where the public code degrades.)
    """
    if factor == 1 and size in (None, image.shape[:2]):
        return image
    height, width = size or (int(side * factor) for side in image.shape[:2])
    if mode == "area":  # a window's mean is the mean of its rows' means: one axis, then the other
        for side in (height, width):
            means = _window_means(image.shape[0], side) @ image.reshape(image.shape[0], -1)
            image = cv2.transpose(means.reshape(side, -1, 3))
        return image
    how = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}[mode]
    if size:
        return cv2.resize(image, (width, height), interpolation=how)
    resized = cv2.resize(image, None, fx=factor, fy=factor, interpolation=how)
    if resized.shape == image.shape:  # OpenCV rounds sizes, and only copies if none changes
        planes = torch.from_numpy(image.transpose(2, 0, 1))[None]
        return F.interpolate(planes, scale_factor=factor, mode=mode)[0].numpy().transpose(1, 2, 0)
    return resized[:height, :width]


@lru_cache(maxsize=256)
def _window_means(before: int, after: int) -> csr_array:
    """(after, before) float32: means of the windows of F.interpolate's "area" along one axis."""
    i = np.arange(after)
    first, end = i * before // after, -(-(i + 1) * before // after)
    lengths, ends = end - first, np.cumsum(end - first)
    taps = np.arange(ends[-1]) + np.repeat(end - ends, lengths)
    weights = np.repeat(1 / lengths, lengths).astype(np.float32)
    return csr_array((weights, taps, np.append(0, ends)), shape=(after, before))


def _add_noise(
    image: np.ndarray, noise: dict, rng: np.random.Generator,
    full: Callable[[], np.ndarray] | None = None,
) -> np.ndarray:
    """Add Gaussian or Poisson noise, one field for all channels if gray; clamped to 0..255.

    Poisson as BasicSR's random_add_poisson_noise_pt: scale x the noise of counts whose mean at
    white is the number of 8-bit values in the image, rounded up to a power of two.
    full: makes the full image as it is at this step, if `image` is a part of one. HGGT counts the
    values of the full image. A part with over 128 needs no second look: both round up to 256.
    """
    gray = noise["gray"]
    draws = _uniform_16bit(rng, image.shape[:2] + (1 if gray else 3,))
    if noise["kind"] == "gaussian":
        field = np.take(_normal_quantiles() * np.float32(noise["sigma"]), draws)
    else:
        signal = _signal(image, gray)
        levels = _levels(signal)
        if levels <= 128 and full is not None:
            levels = _levels(_signal(full(), gray))
        table = torch.from_numpy(_poisson_noise(peak=2 ** math.ceil(math.log2(levels))))
        index = signal.astype(np.int32).reshape(draws.shape) * POISSON_DRAWS
        index += draws >> 4  # 16 bits to 12
        field = table.index_select(0, torch.from_numpy(index.ravel())).numpy().reshape(index.shape)
        field *= np.float32(noise["scale"])
    noisy = image + field
    return noisy.clip(0, 255, out=noisy)


def _uniform_16bit(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """uint16, every value equally likely; four from each 64-bit number."""
    count = math.prod(shape)
    numbers = rng.integers(2**64, size=-(-count // 4), dtype=np.uint64)
    return numbers.view(np.uint16)[:count].reshape(shape)


@lru_cache
def _normal_quantiles() -> np.ndarray:
    """65,536 equally likely values of a standard normal variable, float32."""
    # ASSUMED: instead of rng.standard_normal: 4 times faster, each tail cut at 1 in 131,072.
    return ndtri((np.arange(2**16) + 0.5) / 2**16).astype(np.float32)


def _signal(image: np.ndarray, gray: bool) -> np.ndarray:
    """The image, or its luma if gray, in 8 bit: (H, 3 W) or (H, W)."""
    return _to_uint8(image @ LUMA if gray else image.reshape(len(image), -1))


def _levels(signal: np.ndarray) -> int:
    """How many different values uint8 (H, W) has."""
    return np.count_nonzero(cv2.calcHist([signal], [0], None, [256], [0, 256]))


@lru_cache
def _poisson_noise(peak: int) -> np.ndarray:
    """For each 8-bit level, POISSON_DRAWS equally likely values of the noise: float32, flat.

    Level v has the count Poisson(peak v / 255); the noise is count * 255 / peak - v.
    """
    # ASSUMED: equally spaced quantiles instead of rng.poisson: 4 times faster, mean and variance
    # within 0.5 %, each tail cut at 1 in 8192.
    probability = (np.arange(POISSON_DRAWS) + 0.5) / POISSON_DRAWS
    counts = np.arange(2 * peak + 64)  # far beyond the last quantile of the brightest level
    table = np.empty((256, POISSON_DRAWS), np.float32)
    for level in range(256):
        table[level] = np.searchsorted(pdtr(counts, peak * level / 255), probability)
        table[level] = table[level] * (255 / peak) - level
    return table.ravel()


def _jpeg(image: np.ndarray, quality: float) -> np.ndarray:
    """Through a JPEG file in memory, colour at half resolution (4:2:0).

    As by the public DiffJPEG, each colour sample is repeated 2 x 2, where most decoders
    interpolate, and the quantisation tables are transposed: so the image is, before and after.
    """
    # ASSUMED: a real codec, so quality and quantisation tables are whole numbers, input and output
    # are 8 bit, borders continue. The public DiffJPEG has real numbers and pads with black.
    bgr = cv2.cvtColor(cv2.transpose(_to_uint8(image)), cv2.COLOR_RGB2BGR)
    # simplejpeg's encoder is as fast, but transforms less exactly below quality 96.
    _, file = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, round(quality)])
    return cv2.transpose(simplejpeg.decode_jpeg(file, fastupsample=True)).astype(np.float32)


def _to_uint8(image: np.ndarray) -> np.ndarray:
    """float32 -> uint8, clamped and rounded."""
    image = np.rint(image)
    return image.clip(0, 255, out=image).astype(np.uint8, "C")


def usm_sharpen(gt: np.ndarray) -> np.ndarray:
    """Unsharp masking, for the GT of RRDB's stage one (Real-ESRGAN's USMSharp with its defaults).

    gt: uint8 (H, W, 3), sides over 25. Returns uint8 (H, W, 3): gt + 0.5 (gt - blurred gt), faded
    in by the blurred mask of where that difference exceeds 10 of 255; rounded to 8 bit. The public
    code degrades the *sharpened* GT. Raises ValueError for a smaller side.
    """
    if min(gt.shape[:2]) <= USM_TAPS // 2:
        raise ValueError(f"GT is {gt.shape[0]} x {gt.shape[1]}: sharpening needs sides over 25")
    image = torch.from_numpy(np.ascontiguousarray(gt.transpose(2, 0, 1))).float()
    down, across = _gaussian_matrix(gt.shape[0]), _gaussian_matrix(gt.shape[1]).T
    residual = image - down @ image @ across
    soft_mask = down @ (residual.abs() > 10).float() @ across
    sharp = (image + 0.5 * residual).clamp(0, 255)
    mixed = soft_mask * sharp + (1 - soft_mask) * image
    return _to_uint8(mixed.permute(1, 2, 0).numpy())


@lru_cache(maxsize=4)
def _gaussian_matrix(size: int) -> torch.Tensor:
    """(size, size) float32: blurs a column, borders reflected; the product is the fastest way."""
    radius = USM_TAPS // 2
    sigma = 0.3 * ((USM_TAPS - 1) * 0.5 - 1) + 0.8  # OpenCV's getGaussianKernel for sigma 0: 8
    taps = np.exp(-((np.arange(USM_TAPS) - radius) ** 2) / (2 * sigma**2))
    rows = np.arange(size)[:, None]
    columns = np.abs(rows + np.arange(USM_TAPS) - radius)
    columns = np.where(columns < size, columns, 2 * (size - 1) - columns)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (rows, columns), taps / taps.sum())
    return torch.from_numpy(matrix).float()
