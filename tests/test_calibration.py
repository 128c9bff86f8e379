"""Metrics against the published calibration values of five TID2013 pairs in the wheel of pyiqa.

The values are the lines "(ours)" of ResultsCalibra/calibration_summary.csv in the pyiqa repository
(chaofengc/IQA-PyTorch): what its metrics gave its authors. They show that the installed library and
our edge to it score as everyone else's do.
"""

from importlib.metadata import distribution

import numpy as np
import pyiqa
import pytest
import torch
from PIL import Image
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from models import metrics
from models.iqa import MetricUnavailable, load_fr, load_iqa

NAMES = ("I03", "I04", "I06", "I08", "I19")
WITHOUT_WEIGHTS = {
    "psnr": (21.1136, 20.9872, 27.0139, 23.3002, 21.6186),
    "ssim": (0.6997, 0.9978, 0.9989, 0.9671, 0.6522),
}
NO_REFERENCE = {  # metric: (values, tolerance); all of them up = better but piqe
    "piqe": ((100.0, 21.6242, 35.8646, 41.147, 76.9485), 1e-3),
    "musiq": ((12.4773, 75.7764, 73.7459, 75.4604, 38.0248), 0.1),
    "paq2piq": ((44.1341, 73.6015, 74.3297, 76.8748, 70.9153), 0.05),
}
FULL_REFERENCE = {
    "lpips": (0.7237, 0.2572, 0.0508, 0.0521, 0.4253),
    "dists": (0.4742, 0.1424, 0.0682, 0.0287, 0.3123),
}


def image(folder, name):
    path = distribution("pyiqa").locate_file(f"ResultsCalibra/{folder}/{name}.bmp")
    x = np.asarray(Image.open(path).convert("RGB"))
    return torch.from_numpy(x.copy()).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_pyiqa_psnr_and_ssim(name):
    metric = pyiqa.create_metric(name, device="cpu")
    found = [metric(image("dist_dir", n), image("ref_dir", n)).item() for n in NAMES]
    np.testing.assert_allclose(found, WITHOUT_WEIGHTS[name], atol=2e-4)


@pytest.mark.parametrize("name", NO_REFERENCE)
def test_no_reference(name):
    values, tolerance = NO_REFERENCE[name]
    try:
        metric = load_iqa(name, "cpu")
    except MetricUnavailable as error:
        pytest.skip(f"no weights: {error}")
    sign = -1 if name == "piqe" else 1  # load_iqa: up = better
    found = [sign * metric(image("dist_dir", n)).item() for n in NAMES]
    np.testing.assert_allclose(found, values, atol=tolerance)


@pytest.mark.parametrize("name", FULL_REFERENCE)
def test_full_reference(name):
    try:
        metric = load_fr(name, "cpu")
    except MetricUnavailable as error:
        pytest.skip(f"no weights: {error}")
    found = [metric(image("dist_dir", n), image("ref_dir", n)).item() for n in NAMES]
    np.testing.assert_allclose(found, FULL_REFERENCE[name], atol=2e-3)


def photographs():
    """(name, SR, GT) uint8: photographs and their distortions, and unrelated photographs."""
    cat, astronaut, coffee = (x[:200, 60:300] for x in (data.chelsea(), data.astronaut(),
                                                        data.coffee()))
    noise = np.random.default_rng(0).normal(0, 12, cat.shape)
    small = Image.fromarray(coffee).resize((60, 50), Image.Resampling.BICUBIC)
    pairs = [
        ("noisy", np.clip(cat + noise, 0, 255).astype(np.uint8), cat),
        ("enlarged", np.asarray(small.resize((240, 200), Image.Resampling.BICUBIC)), coffee),
        ("unrelated", cat, astronaut), ("unrelated", astronaut, coffee),
        ("negative", 255 - coffee, coffee),
    ]  # fmt: skip
    for name in NAMES:
        x, y = (image(folder, name) for folder in ("dist_dir", "ref_dir"))
        bmp = ((z[0].permute(1, 2, 0) * 255).round().byte().numpy() for z in (x, y))
        pairs.append((name, *bmp))
    return pairs


@pytest.mark.parametrize(("name", "sr", "gt"), photographs())
def test_psnr_and_ssim_of_photographs_equal_an_independent_implementation(name, sr, gt):
    x, y = (torch.from_numpy(z.copy()).permute(2, 0, 1)[None].float() / 255 for z in (sr, gt))
    sr, gt = (z[4:-4, 4:-4].astype(np.float64) for z in (sr, gt))
    psnr = peak_signal_noise_ratio(gt, sr, data_range=255)
    ssim = structural_similarity(gt, sr, data_range=255, gaussian_weights=True, sigma=1.5,
                                 use_sample_covariance=False, channel_axis=-1)
    assert abs(metrics.psnr(x, y, 4).item() - psnr) < 1e-6
    assert abs(metrics.ssim(x, y, 4).item() - ssim) < 1e-6
