import io
import json
import math

import numpy as np
import pytest
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy import fft, ndimage, stats

from models import degradations
from models.degradations import (
    apply_degradation,
    blur_kernel,
    crop_with_margin,
    degrade_patch,
    draw_degradation,
    usm_sharpen,
)

SETTINGS = ["one_round", "two_round"]
DRAWS = 6000


@pytest.fixture(scope="module")
def draws():
    return {
        setting: [draw_degradation(np.random.default_rng((7, i)), setting) for i in range(DRAWS)]
        for setting in SETTINGS
    }


@pytest.fixture(scope="module")
def photo():
    """Something with edges, texture and flat parts: (512, 448, 3)."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(512, 448, 3))
    image = sum(s * 12 * ndimage.gaussian_filter(noise, (s, s, 0)) for s in (1, 3, 9)) + 128
    for _ in range(60):
        y, x = rng.integers(0, 400, 2)
        height, width = rng.integers(8, 90, 2)
        image[y : y + height, x : x + width] += rng.normal(0, 40, 3)
    return image.round().clip(0, 255).astype(np.uint8)


def without_noise_and_resize(params):
    for part in params["rounds"]:
        part["resize"] |= {"direction": "keep", "factor": 1.0}
        part["noise"] = {"kind": "gaussian", "gray": False, "sigma": 0.0}
    return params


def plain(setting, quality=80.4, quality2=90.0, **final):
    """No blur (sigma 0.1 leaves a kernel of one 1), no noise, no resize but the last, by area."""
    blur = {"kind": "iso", "size": 3, "sigma_x": 0.1, "sigma_y": 0.1, "rotation": 0.0}
    rounds = [{"blur": blur, "resize": {"mode": "area"}, "noise": {}, "jpeg": quality}]
    if setting == "one_round":
        return without_noise_and_resize({"rounds": rounds, "final": None})
    rounds.append({"blur": None, "resize": {"mode": "area"}, "noise": {}, "jpeg": quality2})
    final = {"jpeg_first": True, "mode": "area", "sinc": None} | final
    return without_noise_and_resize({"rounds": rounds, "final": final})


def through_jpeg(image, quality):
    file = io.BytesIO()
    image = Image.fromarray(np.rint(image).clip(0, 255).astype(np.uint8).transpose(1, 0, 2))
    image.save(file, "JPEG", quality=quality)
    return simplejpeg.decode_jpeg(file.getvalue(), fastupsample=True).transpose(1, 0, 2) * 1.0


def mean_4x4(image):
    height, width = image.shape[:2]
    return image.reshape(height // 4, 4, width // 4, 4, 3).mean((1, 3))


# ---------------------------------------------------------------- draws, against RECIPE's numbers


def check_share(events, probability):
    events = list(events)
    bound = 5 * math.sqrt(len(events) * probability * (1 - probability))
    assert abs(sum(events) - len(events) * probability) <= bound, (np.mean(events), probability)


def check_uniform(values, low, high):
    values = np.array(list(values))
    assert low <= values.min() and values.max() <= high
    if len(values) > 1000:
        edge = 0.02 * (high - low)
        assert values.min() < low + edge and values.max() > high - edge
    sigma = (high - low) / math.sqrt(12 * len(values))
    assert abs(values.mean() - (low + high) / 2) < 5 * sigma


def check_equally_likely(values, options):
    values = list(values)
    assert set(values) == set(options)
    for option in options:
        check_share([value == option for value in values], 1 / len(options))


@pytest.mark.parametrize(
    "setting, index, blurred, sizes, blur, resize, gaussian, poisson, jpeg",
    [
        ("one_round", 0, 1.0, [3, 5, 7, 9], (0.1, 1), (0.8, 1.2), (1, 12), (0.05, 0.8), (75, 95)),
        ("two_round", 0, 1.0, [3, 5, 7], (0.1, 0.6), (0.9, 1.1), (1, 8), (0.05, 0.5), (85, 95)),
        ("two_round", 1, 0.8, [3, 5], (0.1, 0.4), (0.9, 1.1), (0, 4), (0, 0.3), (87, 95)),
    ],
)
def test_a_round(draws, setting, index, blurred, sizes, blur, resize, gaussian, poisson, jpeg):
    rounds = [params["rounds"][index] for params in draws[setting]]

    check_share([part["blur"] is not None for part in rounds], blurred)
    blurs = [part["blur"] for part in rounds if part["blur"]]
    check_equally_likely([b["size"] for b in blurs], sizes)
    check_share([b["kind"] == "sinc" for b in blurs], 0.01)
    check_uniform([b["omega_c"] for b in blurs if b["kind"] == "sinc"], math.pi / 3, math.pi)
    gaussians = [b for b in blurs if b["kind"] != "sinc"]
    check_share([b["kind"] == "iso" for b in gaussians], 0.7)
    isos, anisos = ([b for b in gaussians if b["kind"] == kind] for kind in ("iso", "aniso"))
    assert len(isos) + len(anisos) == len(gaussians)
    check_uniform([b["sigma_x"] for b in isos], *blur)
    assert all(b["sigma_x"] == b["sigma_y"] for b in isos)
    check_uniform([b["sigma_x"] for b in anisos], *blur)
    check_uniform([b["sigma_y"] for b in anisos], *blur)
    check_uniform([b["rotation"] for b in anisos], -math.pi, math.pi)

    resizes = [part["resize"] for part in rounds]
    for direction, probability in (("up", 0.1), ("down", 0.85), ("keep", 0.05)):
        check_share([r["direction"] == direction for r in resizes], probability)
    check_uniform([r["factor"] for r in resizes if r["direction"] == "up"], 1, resize[1])
    check_uniform([r["factor"] for r in resizes if r["direction"] == "down"], resize[0], 1)
    assert {r["factor"] for r in resizes if r["direction"] == "keep"} == {1.0}
    check_equally_likely([r["mode"] for r in resizes], ["area", "bilinear", "bicubic"])

    noises = [part["noise"] for part in rounds]
    assert {n["kind"] for n in noises} == {"gaussian", "poisson"}
    check_share([n["kind"] == "gaussian" for n in noises], 0.5)
    check_share([n["gray"] for n in noises], 0.2)
    check_uniform([n["sigma"] for n in noises if n["kind"] == "gaussian"], *gaussian)
    check_uniform([n["scale"] for n in noises if n["kind"] == "poisson"], *poisson)

    check_uniform([part["jpeg"] for part in rounds], *jpeg)


def test_the_end(draws):
    assert all(params["final"] is None for params in draws["one_round"])
    assert all(len(params["rounds"]) == 1 for params in draws["one_round"])
    assert all(len(params["rounds"]) == 2 for params in draws["two_round"])
    finals = [params["final"] for params in draws["two_round"]]
    check_share([f["jpeg_first"] for f in finals], 0.5)
    check_equally_likely([f["mode"] for f in finals], ["area", "bilinear", "bicubic"])
    check_share([f["sinc"] is not None for f in finals], 0.1)
    sincs = [f["sinc"] for f in finals if f["sinc"]]
    check_equally_likely([s["size"] for s in sincs], [3, 5])
    check_uniform([s["omega_c"] for s in sincs], math.pi / 3, math.pi)


def test_the_parts_of_a_draw_are_independent(draws):
    for setting in SETTINGS:
        rounds = [params["rounds"][-1] for params in draws[setting]]
        for mode in ("area", "bilinear", "bicubic"):
            gray = [r["noise"]["gray"] for r in rounds if r["resize"]["mode"] == mode]
            check_share(gray, 0.2)
    modes = [(p["rounds"][1]["resize"]["mode"], p["final"]["mode"]) for p in draws["two_round"]]
    check_share([first == second for first, second in modes], 1 / 3)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_draw_is_a_pure_function_of_its_generator(setting):
    first, again, other = (draw_degradation(np.random.default_rng(s), setting) for s in (1, 1, 2))
    assert first == again != other
    assert json.loads(json.dumps(first)) == first  # plain Python values only


def test_unknown_setting():
    with pytest.raises(ValueError, match="'three_round'.*one_round, two_round"):
        draw_degradation(np.random.default_rng(0), "three_round")


# ---------------------------------------------------------------- kernels and blur


def test_drawn_kernels(draws):
    kinds = set()
    for params in draws["one_round"][:1500]:
        blur = params["rounds"][0]["blur"]
        kernel = blur_kernel(blur)
        kinds.add(blur["kind"])
        assert kernel.shape == (blur["size"], blur["size"])
        assert kernel.sum() == pytest.approx(1) and np.isfinite(kernel).all()
        assert np.allclose(kernel, kernel[::-1, ::-1])  # about the centre
        if blur["kind"] != "aniso":
            assert np.allclose(kernel, kernel.T) and np.allclose(kernel, kernel[::-1])
        if blur["kind"] != "sinc":
            assert kernel.min() >= 0
    assert kinds == {"iso", "aniso", "sinc"}


def test_gaussian_kernel_by_hand():
    blur = {"kind": "iso", "size": 3, "sigma_x": 0.5, "sigma_y": 0.5, "rotation": 0.0}
    a, b = math.exp(-2), math.exp(-4)  # exp(-r^2 / (2 x 0.25)) at r^2 = 1 and 2
    expected = np.array([[b, a, b], [a, 1, a], [b, a, b]]) / (1 + 4 * a + 4 * b)
    assert np.allclose(blur_kernel(blur), expected)


@pytest.mark.parametrize("rotation", [0.0, 0.4, -2.5, math.pi / 2])
def test_anisotropic_kernel_has_the_drawn_covariance(rotation):
    blur = {"kind": "aniso", "size": 21, "sigma_x": 2.0, "sigma_y": 1.0, "rotation": rotation}
    kernel = blur_kernel(blur)
    y, x = np.mgrid[-10:11, -10:11]
    turn = np.array([[np.cos(rotation), -np.sin(rotation)], [np.sin(rotation), np.cos(rotation)]])
    expected = turn @ np.diag([4.0, 1.0]) @ turn.T
    measured = [[(kernel * a * b).sum() for b in (x, y)] for a in (x, y)]
    assert np.allclose(measured, expected, atol=1e-3)


def test_sinc_kernel_cuts_off_at_omega_c():
    omega_c = math.pi / 2
    kernel = blur_kernel({"kind": "sinc", "size": 101, "omega_c": omega_c})
    x = np.arange(101) - 50
    for omega, gain in ((0.3, 1), (0.6, 1), (0.9, 1), (1.1, 0), (1.4, 0), (1.9, 0)):
        response = (kernel.sum(0) * np.cos(omega * omega_c * x)).sum()
        assert response == pytest.approx(gain, abs=0.06)
    # the limit at the centre, omega^2 / 4 pi, against the next pixel, omega J1(omega) / 2 pi
    j1 = 0.56682408890587398  # of pi / 2
    assert kernel[50, 50] / kernel[50, 51] == pytest.approx((omega_c / 2) / j1, rel=1e-6)


@pytest.mark.parametrize("height, width", [(16, 33), (37, 20), (160, 48)])
def test_blur_is_correlation_with_reflected_borders(height, width):
    image = np.random.default_rng(0).random((height, width, 3), np.float32) * 255
    blur = {"kind": "aniso", "size": 9, "sigma_x": 2.0, "sigma_y": 0.7, "rotation": 0.5}
    expected = ndimage.correlate(image.astype(float), blur_kernel(blur)[..., None], mode="mirror")
    assert np.allclose(degradations._blur(image, blur), expected, atol=1e-3)


@pytest.mark.parametrize("size", [3, 5, 9])
@pytest.mark.parametrize("sigma", [0.1, 0.25, 0.5, 1.0])
def test_blur_rounds_alike_in_regions_of_any_width(photo, size, sigma):
    image = photo[:48, :64].astype(np.float32)
    blur = {"kind": "aniso", "size": size, "sigma_x": sigma, "sigma_y": 1.3 * sigma}
    blur["rotation"] = 0.4
    whole = degradations._blur(image, blur)
    expected = ndimage.correlate(image.astype(float), blur_kernel(blur)[..., None], mode="mirror")
    assert np.abs(whole - expected).max() < 1e-4  # the taps left out do not count
    for width in range(40, 64):
        part = degradations._blur(image[:, :width], blur)
        inner = width - size // 2
        assert np.array_equal(part[:, :inner], whole[:, :inner]), width


# ---------------------------------------------------------------- resizing


def interpolated(image, mode, **to):
    planes = torch.from_numpy(image.transpose(2, 0, 1).astype(float))[None]
    return F.interpolate(planes, mode=mode, **to)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
def test_resize_is_that_of_torch(mode):
    rng = np.random.default_rng(0)
    for _ in range(60):
        height, width = rng.integers(16, 160, 2)
        image = rng.random((height, width, 3), np.float32) * 255
        size = tuple(int(n) for n in rng.integers(4, 160, 2))
        factor = float(rng.choice([rng.uniform(0.8, 1.2), rng.uniform(0.993, 1.007), 1.0]))
        if mode == "bilinear" and factor > 1 and any(int(n * factor) == n for n in (height, width)):
            factor = 1.0  # torch leaves an axis as it is whose cut side is its own
        for ours, torchs, to in (("size", "size", size), ("factor", "scale_factor", factor)):
            resized = degradations._resize(image, mode, **{ours: to})
            expected = interpolated(image, mode, **{torchs: to})
            assert resized.shape == expected.shape and resized.dtype == np.float32
            # float32's positions: 1e-5 of a pixel, of up to 255 per pixel here
            assert np.abs(resized - expected).max() < 0.02, (image.shape, to)


def test_resize_to_its_own_size():
    image = np.random.default_rng(0).random((40, 52, 3), np.float32)
    assert degradations._resize(image, "bicubic", size=(40, 52)) is image
    assert degradations._resize(image, "bicubic") is image


# ---------------------------------------------------------------- noise


def noisy(level, noise, levels=None, size=256):
    image = np.full((size, size, 3), level, np.float32)
    full = None
    if levels is not None:  # an image with that many 8-bit values
        full = lambda: np.arange(levels, dtype=np.float32)[:, None, None].repeat(3, 2)  # noqa: E731
    out = degradations._add_noise(image, noise, np.random.default_rng(0), full)
    return out.reshape(-1, 3).T - level


def test_gaussian_noise():
    field = noisy(128, {"kind": "gaussian", "gray": False, "sigma": 10.0})
    assert abs(field.mean()) < 0.2 and field.std() == pytest.approx(10, rel=0.02)
    assert abs(np.corrcoef(field)[0, 1]) < 0.02
    gray = noisy(128, {"kind": "gaussian", "gray": True, "sigma": 10.0})
    assert np.ptp(gray, axis=0).max() == 0 and gray.std() == pytest.approx(10, rel=0.02)
    dark = noisy(0, {"kind": "gaussian", "gray": False, "sigma": 10.0})
    assert dark.min() == 0 and dark.max() > 20  # clamped


def test_gaussian_noise_is_normal_and_without_structure():
    field = noisy(128, {"kind": "gaussian", "gray": False, "sigma": 10.0}, size=512) / 10
    assert stats.kstest(field[0, ::7], "norm").pvalue > 0.01
    assert abs(stats.kurtosis(field.ravel())) < 0.02 and np.abs(field).max() < 4.4
    spectrum = np.abs(np.fft.rfft(field.T.ravel())[1:]) ** 2  # in the order of the draws
    assert spectrum.max() < 25 * spectrum.mean()  # 400,000 of them: exponential, largest about 13


def test_16_bit_draws_are_equally_likely_and_as_many_as_asked():
    draws = degradations._uniform_16bit(np.random.default_rng(0), (333, 999, 3))
    assert draws.shape == (333, 999, 3) and draws.dtype == np.uint16
    for values in (draws >> 8, draws & 255):
        assert stats.chisquare(np.bincount(values.ravel(), minlength=256)).pvalue > 0.001
    assert np.array_equal(draws, degradations._uniform_16bit(np.random.default_rng(0), draws.shape))


@pytest.mark.parametrize("levels, peak", [(256, 256), (200, 256), (128, 128), (65, 128)])
@pytest.mark.parametrize("gray", [False, True])
def test_poisson_noise(levels, peak, gray):
    # counts of mean peak v / 255, scaled by 255 / peak: variance 255 v / peak
    field = noisy(100, {"kind": "poisson", "gray": gray, "scale": 0.5}, levels)
    assert abs(field.mean()) < 0.1
    assert field.var() == pytest.approx(0.25 * 255 * 100 / peak, rel=0.02)
    if gray:
        assert np.ptp(field, axis=0).max() == 0
    else:
        assert abs(np.corrcoef(field)[0, 1]) < 0.02


@pytest.mark.parametrize("gray", [False, True])
def test_only_an_image_of_few_values_asks_for_the_full_one(gray):
    noise, rng = {"kind": "poisson", "gray": gray, "scale": 0.2}, np.random.default_rng(0)
    image = np.arange(129, dtype=np.float32)[:, None, None].repeat(64, 1).repeat(3, 2)
    degradations._add_noise(image, noise, rng, full=lambda: pytest.fail("129 values are enough"))
    asked = []
    degradations._add_noise(image[:128], noise, rng, full=lambda: asked.append(1) or image)
    degradations._add_noise(image, noise | {"kind": "gaussian", "sigma": 1.0}, rng, full=None)
    assert asked == [1]


def test_poisson_noise_counts_the_values_of_the_image_itself():
    image = np.tile(np.float32([60, 100, 180]), (300, 300, 1))  # 3 values -> a peak of 4
    noise = {"kind": "poisson", "gray": False, "scale": 0.2}
    field = degradations._add_noise(image, noise, np.random.default_rng(0)) - image
    assert field[..., 1].var() == pytest.approx(0.04 * 255 * 100 / 4, rel=0.03)


def test_gray_poisson_noise_follows_the_luma():
    image = np.tile(np.float32([200, 100, 50]), (300, 300, 1))
    noise = {"kind": "poisson", "gray": True, "scale": 0.2}
    full = np.zeros((16, 1024, 3), np.float32)
    full[..., 2] = np.arange(1024) // 4  # 256 values of blue are 30 of luma: a peak of 32
    field = degradations._add_noise(image, noise, np.random.default_rng(0), lambda: full) - image
    luma = 0.2989 * 200 + 0.587 * 100 + 0.114 * 50
    assert np.ptp(field, axis=2).max() < 1e-3
    assert field.var() == pytest.approx(0.04 * 255 * luma / 32, rel=0.03)


@pytest.mark.parametrize("peak, level", [(256, 7), (256, 200), (64, 30), (1, 255)])
def test_poisson_table_is_the_distribution(peak, level):
    table = degradations._poisson_noise(peak).reshape(256, -1)[level]
    counts = np.rint((table + level) * peak / 255).astype(int)
    share = np.bincount(counts, minlength=400)[:400] / len(counts)
    expected = stats.poisson(peak * level / 255).pmf(np.arange(400))
    assert np.abs(share - expected).max() <= 1 / len(counts)
    assert table.mean() == pytest.approx(0, abs=0.01 * 255 / peak)


def text_page():
    page = Image.new("1", (448, 512), 1)
    draw = ImageDraw.Draw(page)
    for row in range(8, 500, 14):
        draw.text((8, row), "The quick brown fox jumps over the lazy dog, again and again." * 2, 0)
    return np.asarray(page.convert("RGB"))


def with_values(photo, kind):
    """The photograph as an image with few values, or with values only in places."""
    luma = np.rint(photo @ degradations.LUMA).astype(np.uint8)[..., None].repeat(3, 2)
    return {
        "text page": lambda: text_page(),
        "posterised": lambda: np.where(photo > 128, 200, 60).astype(np.uint8),
        "gray, stretched": lambda: luma // 3 * 3,  # 86 values with gaps
        "fog": lambda: 170 + photo // 4,
        "night": lambda: photo // 4,
        "flat but for a corner": lambda: np.where(  # 100 values inside the part, 256 in all
            np.arange(448)[None, :, None] < 64, photo, 100 + photo // 4
        ).astype(np.uint8),
        "ordinary": lambda: photo,
    }[kind]()


def recorded_noise(monkeypatch, degrade):
    """{round: (noise, image before, image after)} of a call; of its smallest image for each."""
    seen, add_noise = {}, degradations._add_noise

    def record(image, noise, *rest):
        noisy = add_noise(image, noise, *rest)
        seen.setdefault(id(noise), []).append((noise, image.copy(), noisy))
        return noisy

    with monkeypatch.context() as patch:
        patch.setattr(degradations, "_add_noise", record)
        degrade()
    return [min(calls, key=lambda call: call[1].size) for calls in seen.values()]


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", [
    "text page", "posterised", "gray, stretched", "fog", "night", "flat but for a corner",
    "ordinary",
])  # fmt: skip
def test_poisson_noise_of_a_part_is_as_strong_as_in_the_full_image(
    photo, monkeypatch, kind, setting, gray
):
    gt = with_values(photo, kind)
    for seed in range(3):
        params = draw_degradation(np.random.default_rng(seed), setting)
        for part in params["rounds"]:
            part["noise"] = {"kind": "poisson", "gray": gray, "scale": 0.2}
        full = recorded_noise(
            monkeypatch, lambda p=params, s=seed: apply_degradation(gt, p, np.random.default_rng(s))
        )
        monkeypatch.setattr(degradations, "draw_degradation", lambda *_, p=params: p)
        part = recorded_noise(
            monkeypatch,
            lambda: degrade_patch(gt, 128, 128, 256, np.random.default_rng(9), setting),
        )
        assert len(full) == len(part) == len(params["rounds"])
        for (_, whole, _), (noise, before, after) in zip(full, part, strict=True):
            values = degradations._levels(degradations._signal(whole, noise["gray"]))
            if math.log2(values) % 1 > 0.95 or math.log2(values) % 1 < 0.05:
                continue  # round one's noise, drawn anew, may carry it over the power of two
            expected = public_poisson_noise(before, whole, noise) - before
            assert (after - before).std() == pytest.approx(expected.std(), rel=0.1), noise


def public_poisson_noise(image, counted, noise):
    """The public code's noise on a part, as strong as on the full image `counted`."""
    signal, counted = (
        (x @ [0.2989, 0.587, 0.114])[..., None] if noise["gray"] else x for x in (image, counted)
    )
    signal, counted = np.rint(signal).clip(0, 255), np.rint(counted).clip(0, 255)
    peak = 2 ** np.ceil(np.log2(len(np.unique(counted))))
    field = np.random.default_rng(1).poisson(signal / 255 * peak) / peak * 255 - signal
    return (image + noise["scale"] * field).clip(0, 255)


# ---------------------------------------------------------------- JPEG

# of the JPEG standard, Annex K
LUMINANCE = """16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56
    14 17 22 29 51 87 80 62  18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92
    49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99"""
CHROMINANCE = """17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99
    47 66 99 99 99 99 99 99""" + " 99" * 32
TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def cb_cr(image):
    return (image.astype(float) @ TO_YCC.T)[..., 1:]


def diff_jpeg(image, quality):
    """The public DiffJPEG, of its formulas: real quality, tables transposed, colour repeated."""
    height, width = image.shape[:2]
    padded = np.pad(image.astype(float), ((0, -height % 16), (0, -width % 16), (0, 0)))
    ycc, planes = padded @ TO_YCC.T + [0, 128, 128], []
    for k, table in enumerate((LUMINANCE, CHROMINANCE, CHROMINANCE)):
        step = np.array(table.split(), float).reshape(8, 8).T[:, None] * (200 - 2 * quality) / 100
        plane, repeats = ycc[..., k], 2 if k else 1
        rows, columns = plane.shape[0] // repeats, plane.shape[1] // repeats
        plane = plane.reshape(rows, repeats, columns, repeats).mean((1, 3))
        blocks = plane.reshape(rows // 8, 8, columns // 8, 8) - 128
        blocks = np.rint(fft.dctn(blocks, axes=(1, 3), norm="ortho") / step) * step
        plane = fft.idctn(blocks, axes=(1, 3), norm="ortho").reshape(rows, columns) + 128
        planes.append(plane.repeat(repeats, 0).repeat(repeats, 1))
    rgb = (np.stack(planes, 2) - [0, 128, 128]) @ np.linalg.inv(TO_YCC).T
    return rgb.clip(0, 255)[:height, :width].astype(np.float32)


@pytest.mark.parametrize("quality", [75.0, 88.0, 95.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_jpeg_repeats_colour_samples_on_a_ramp(quality, axis):
    ycc = np.full((64, 64, 3), 128.0)
    ycc[..., 1] = 2 * np.arange(64) + 64  # Cb rises by 2 with each pixel
    ramp = ((ycc - [0, 128, 128]) @ np.linalg.inv(TO_YCC).T).astype(np.float32)
    ramp = ramp if axis else ramp.transpose(1, 0, 2)
    steps = [np.diff(cb_cr(jpeg(ramp, quality))[..., 0], axis=axis).mean(1 - axis)
             for jpeg in (degradations._jpeg, diff_jpeg)]  # fmt: skip
    for inside, between in ((step[::2], step[1::2]) for step in steps):
        assert np.abs(inside).max() < 0.1  # interpolated: 1 or 2
        assert between.mean() == pytest.approx(4, abs=0.2)  # of two pixels
    assert np.abs(steps[0] - steps[1]).mean() < 0.5  # whole numbers, in chroma and tables


@pytest.mark.parametrize("quality", [75.0, 85.0, 95.0])
@pytest.mark.parametrize("height, width", [(128, 96), (101, 75)])
def test_jpeg_is_nearly_the_public_one(photo, quality, height, width):
    image = photo[40 : 40 + height, 200 : 200 + width].astype(np.float32)
    jpeg, expected = degradations._jpeg(image, quality), diff_jpeg(image, quality)
    assert jpeg.dtype == np.float32 and jpeg.shape == image.shape
    inner = np.s_[: height - 16, : width - 16]  # DiffJPEG pads with black, codecs with the border
    loss = [(x - image)[inner].std() for x in (jpeg, expected)]
    assert loss[0] == pytest.approx(loss[1], rel=0.05)
    assert (jpeg - expected)[inner].std() < 0.6 * loss[1]
    # DiffJPEG's tables are transposed: of a detail, more is left if it runs the other way
    luma = [((x - image) @ TO_YCC[0])[: height // 8 * 8 - 16, : width // 8 * 8 - 16]
            for x in (jpeg, expected)]
    spectra = [np.abs(fft.dctn(x.reshape(x.shape[0] // 8, 8, -1, 8), axes=(1, 3))).mean((0, 2))
               for x in luma]
    tilt = [s[3:7, :2].mean() / s[:2, 3:7].mean() for s in spectra]
    assert tilt[0] == pytest.approx(tilt[1], rel=0.08)


def test_colour_gradients_are_those_of_the_public_jpeg(photo, monkeypatch):
    """60 draws of two_round; run once with 500, p is 0.23 (0.46 on photographs)."""

    def gradients():
        rngs = [np.random.default_rng((4, i)) for i in range(60)]
        places = [[4 * int(n) for n in rng.integers((97, 81))] for rng in rngs]
        colours = [cb_cr(degrade_patch(photo, top, left, 128, rng, "two_round"))
                   for (top, left), rng in zip(places, rngs, strict=True)]  # fmt: skip
        return [sum(np.abs(np.diff(c, axis=axis)).mean() for axis in (0, 1)) for c in colours]

    ours = gradients()
    monkeypatch.setattr(degradations, "_jpeg", diff_jpeg)
    public = gradients()
    assert np.mean(ours) == pytest.approx(np.mean(public), rel=0.02)  # interpolated: 0.82
    assert stats.ks_2samp(ours, public).pvalue > 0.05


# ---------------------------------------------------------------- the whole


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("height, width", [(16, 16), (20, 52), (132, 76)])
def test_shape_and_dtype(setting, height, width):
    gt = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for i in range(25):
        rng = np.random.default_rng(i)
        lq = apply_degradation(gt, draw_degradation(rng, setting), rng)
        assert lq.shape == (height // 4, width // 4, 3) and lq.dtype == np.uint8
        assert lq.flags["C_CONTIGUOUS"] and lq.std() > 0


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_result_depends_on_parameters_and_noise_generator_only(setting, photo):
    gt = photo[:96, :64]
    params = draw_degradation(np.random.default_rng(5), setting)
    rngs = [np.random.default_rng(seed) for seed in (1, 1, 2)]
    first, again, other = (apply_degradation(gt, params, rng) for rng in rngs)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.array_equal(first, apply_degradation(gt.copy(), params, np.random.default_rng(1)))
    quiet = without_noise_and_resize(params)
    first, other = (apply_degradation(gt, quiet, np.random.default_rng(s)) for s in (1, 2))
    assert np.array_equal(first, other)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_constant_image_stays_constant_without_noise(setting):
    for i, level in enumerate([0, 77, 255] * 8):
        params = draw_degradation(np.random.default_rng(i), setting)
        for part in params["rounds"]:
            part["noise"] = {"kind": "gaussian", "gray": False, "sigma": 0.0}
        gt = np.full((64, 80, 3), level, np.uint8)
        assert (apply_degradation(gt, params, np.random.default_rng(0)) == level).all()


def test_one_round_is_jpeg_then_resize(photo):
    gt = photo[:96, :128]
    lq = apply_degradation(gt, plain("one_round", 80.4), np.random.default_rng(0))
    assert np.array_equal(lq, np.rint(mean_4x4(through_jpeg(gt, 80))))
    assert not np.array_equal(lq, np.rint(mean_4x4(gt)))  # the codec did something


def test_two_rounds_end_in_either_order(photo):
    gt, rng = photo[:96, :128], np.random.default_rng(0)
    sinc = {"kind": "sinc", "size": 5, "omega_c": 1.5}

    def filtered(image):
        weights = blur_kernel(sinc)[:, :, None]
        return ndimage.correlate(image, weights, mode="mirror")

    small = mean_4x4(through_jpeg(gt, 80))
    for jpeg_first, expected in (
        (True, filtered(through_jpeg(small, 90))),
        (False, through_jpeg(filtered(small), 90)),
    ):
        params = plain("two_round", jpeg_first=jpeg_first, sinc=sinc)
        lq = apply_degradation(gt, params, rng).astype(int)
        assert np.abs(lq - expected.round().clip(0, 255)).max() <= 1  # float32 against float64
        assert (lq == expected.round().clip(0, 255)).mean() > 0.99
    lq = apply_degradation(gt, plain("two_round", jpeg_first=False), rng)
    assert np.array_equal(lq, through_jpeg(small, 90))


def test_sizes_on_the_way(photo, monkeypatch):
    seen, jpeg = [], degradations._jpeg
    monkeypatch.setattr(
        degradations, "_jpeg", lambda x, q: (seen.append((*x.shape[:2], q)), jpeg(x, q))[1]
    )
    gt, rng = photo[:320, :400], np.random.default_rng(0)
    params = plain("one_round")
    params["rounds"][0]["resize"]["factor"] = 0.85
    assert apply_degradation(gt, params, rng).shape == (80, 100, 3)
    for jpeg_first in (True, False):
        params = plain("two_round", jpeg_first=jpeg_first)
        params["rounds"][0]["resize"]["factor"] = 1.07
        params["rounds"][1]["resize"]["factor"] = 0.92  # of GT / 4
        assert apply_degradation(gt, params, rng).shape == (80, 100, 3)
    assert seen == [
        (272, 340, 80.4),
        (342, 428, 80.4), (73, 92, 90.0),
        (342, 428, 80.4), (80, 100, 90.0),
    ]  # fmt: skip


def step_by_step(gt, params, rng):
    """The public code's order of steps, spelled out; of the noise only the drawing is ours."""

    def blur(image, blur):
        return ndimage.correlate(image, blur_kernel(blur)[:, :, None], mode="mirror")

    def noise(image, noise):
        draws = degradations._uniform_16bit(rng, (*image.shape[:2], 1 if noise["gray"] else 3))
        field = stats.norm.ppf((draws + 0.5) / 65536)
        return (image + noise["sigma"] * field).clip(0, 255)

    height, width = gt.shape[0] // 4, gt.shape[1] // 4
    first, *second = params["rounds"]
    image = blur(gt.astype(float), first["blur"])
    image = interpolated(image, first["resize"]["mode"], scale_factor=first["resize"]["factor"])
    image = through_jpeg(noise(image, first["noise"]), round(first["jpeg"]))
    if not second:
        return interpolated(image, first["resize"]["mode"], size=(height, width))
    second, final = second[0], params["final"]
    if second["blur"] is not None:
        image = blur(image, second["blur"])
    size = tuple(int(side * second["resize"]["factor"]) for side in (height, width))
    image = interpolated(image, second["resize"]["mode"], size=size)
    image = noise(image, second["noise"])
    if final["jpeg_first"]:
        image = through_jpeg(image, round(second["jpeg"]))
    image = interpolated(image, final["mode"], size=(height, width))
    if final["sinc"] is not None:
        image = blur(image, final["sinc"])
    if not final["jpeg_first"]:
        image = through_jpeg(image, round(second["jpeg"]))
    return image


@pytest.mark.parametrize("setting", SETTINGS)
def test_against_the_steps_spelled_out(photo, setting):
    gt, equal = photo[:96, :128], []
    for i in range(30):
        params = draw_degradation(np.random.default_rng(i), setting)
        for part in params["rounds"]:
            part["noise"] = {"kind": "gaussian", "gray": i % 3 == 0, "sigma": 4.0}
        lq = apply_degradation(gt, params, np.random.default_rng(i))
        expected = step_by_step(gt, params, np.random.default_rng(i)).round().clip(0, 255)
        equal.append((lq == expected).mean())
    # float32 there, float64 here: now and then a pixel rounds differently before a JPEG
    assert np.median(equal) > 0.999 and sorted(equal)[1] > 0.9 and min(equal) > 0.8, equal


@pytest.mark.parametrize(
    "shape, dtype, named",
    [
        ((64, 64), np.uint8, "uint8"),
        ((64, 64, 4), np.uint8, "64, 4"),
        ((64, 64, 3), np.float32, "float32"),
        ((64, 62, 3), np.uint8, "64 x 62"),
        ((12, 64, 3), np.uint8, "12 x 64"),
    ],
)
def test_bad_images(shape, dtype, named):
    with pytest.raises(ValueError, match=named):
        apply_degradation(np.zeros(shape, dtype), plain("one_round"), np.random.default_rng(0))


# ---------------------------------------------------------------- a region instead of the image


def places(photo, patch_size, count):
    """Random places, the four corners, and places whose margin just meets a border."""
    rng = np.random.default_rng(3)
    last_y, last_x = (side - patch_size for side in photo.shape[:2])
    near = [(0, 0), (0, last_x), (last_y, 0), (last_y, last_x), (64, 32), (36, 60), (last_y - 4, 4)]
    return near + [tuple(4 * int(rng.integers(0, n // 4 + 1)) for n in (last_y, last_x))
                   for _ in range(count)]  # fmt: skip


def degraded_region(photo, params, top, left, patch_size, setting, shift=0):
    y0, y1, x0, x1 = crop_with_margin(*photo.shape[:2], top, left, patch_size, setting)
    y0, x0 = y0 + shift, x0 + shift
    lq = apply_degradation(photo[y0:y1, x0:x1], params, np.random.default_rng(0))
    y, x = (top - y0) // 4, (left - x0) // 4
    return lq[y : y + patch_size // 4, x : x + patch_size // 4].astype(int)


@pytest.mark.parametrize("setting, most", [("one_round", 0.0), ("two_round", 0.005)])
def test_region_equals_full_image(photo, setting, most):
    """Without noise and at factor 1, borders included.

    one_round to the last bit. two_round within 1 level but for 0.5 % of the values: the region's
    border changes pixels less than 32 from it, these the rounding of coefficients in their JPEG
    block, and a block of the second round is 64 GT pixels wide.
    """
    off, shifted, total = 0, 0, 0
    for i, (top, left) in enumerate(places(photo, 128, 9)):
        params = without_noise_and_resize(draw_degradation(np.random.default_rng(i), setting))
        full = apply_degradation(photo, params, np.random.default_rng(0))
        full = full[top // 4 : top // 4 + 32, left // 4 : left // 4 + 32].astype(int)
        patch = degraded_region(photo, params, top, left, 128, setting)
        assert patch.shape == full.shape == (32, 32, 3)
        off += (np.abs(patch - full) > (1 if most else 0)).sum()
        total += full.size
        if min(top, left) >= 64:  # from 4 GT pixels further in: off the JPEG grid
            patch = degraded_region(photo, params, top, left, 128, setting, shift=4)
            shifted += (patch != full).sum()
    assert off <= most * total, off / total
    assert shifted > 0.02 * total, "the comparison is blind"


@pytest.mark.parametrize("setting, margin", [("one_round", 32), ("two_round", 64)])
def test_region_contains_the_margin_on_the_jpeg_grid(setting, margin):
    rng = np.random.default_rng(0)
    for _ in range(500):
        height, width = (int(n) for n in rng.integers(256, 700, 2))
        size = int(rng.choice([64, 128, 256]))
        top, left = (4 * int(rng.integers(0, (n - size) // 4 + 1)) for n in (height, width))
        y0, y1, x0, x1 = crop_with_margin(height, width, top, left, size, setting)
        for start, first, stop, side in ((top, y0, y1, height), (left, x0, x1, width)):
            assert first % 64 == 0 and stop % 4 == 0 and first >= 0 and stop <= side
            assert (start - margin - first) in range(64) or (first == 0 and start < margin)
            assert stop == min(start + size + margin, side // 4 * 4)


@pytest.mark.parametrize("setting", SETTINGS)
def test_jpeg_phase_is_uniform_and_that_of_the_full_image(setting):
    rng = np.random.default_rng(0)
    tops = 4 * rng.integers(0, 160, 4000)  # 0 ... 636: every phase of 64 ten times
    starts = [crop_with_margin(900, 900, int(t), 0, 256, setting)[0] for t in tops]
    phases = (tops - starts) // 4 % 16  # LQ pixels
    assert np.array_equal(phases, tops // 4 % 16)
    check_equally_likely(phases.tolist(), range(16))


@pytest.mark.parametrize("top, left, size", [(2, 0, 64), (0, 40, 64), (-4, 0, 64), (0, 0, 66)])
def test_patch_off_the_image_or_the_grid(top, left, size):
    with pytest.raises(ValueError, match=f"patch of {size} GT pixels"):
        crop_with_margin(100, 100, top, left, size, "one_round")


# ---------------------------------------------------------------- unsharp masking


def test_usm_on_a_step_edge():
    gt = np.full((96, 80, 3), 60, np.uint8)
    gt[:, 40:, 0], gt[30:, :, 1], gt[:, 40:, 2] = 200, 130, 68  # channel 2: a step of 8 < 10
    # directly in two dimensions, 51 x 51 taps of sigma 8
    taps = np.exp(-(np.arange(-25, 26) ** 2) / 128)
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    sharp = usm_sharpen(gt).astype(int)
    for channel in range(3):
        image = gt[:, :, channel].astype(float)
        residual = image - ndimage.correlate(image, kernel, mode="mirror")
        mask = ndimage.correlate((np.abs(residual) > 10).astype(float), kernel, mode="mirror")
        expected = mask * (image + 0.5 * residual).clip(0, 255) + (1 - mask) * image
        assert np.abs(sharp[:, :, channel] - expected).max() <= 0.5 + 1e-3
    assert sharp[:, 40, 0].min() > 220 and sharp[:, 39, 0].max() < 40  # overshoot on both sides
    assert np.array_equal(sharp[:, :, 2], gt[:, :, 2])
    assert (sharp[:, :2, 0] == 60).all()  # 38 away from the edge, nothing happens


def test_usm_of_a_region_with_its_margin(photo):
    part = usm_sharpen(photo[96:300, 48:260])[52:-52, 52:-52]
    full = usm_sharpen(photo)[96:300, 48:260][52:-52, 52:-52]
    assert np.abs(part.astype(int) - full).max() <= 1 and (part == full).mean() > 0.999
    assert full.dtype == np.uint8 and not np.array_equal(full, photo[148:248, 100:208])


def test_usm_of_a_small_image():
    with pytest.raises(ValueError, match="25 x 80"):
        usm_sharpen(np.zeros((25, 80, 3), np.uint8))
