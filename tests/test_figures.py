"""paper/figures.py: hand-made tables and tiny images; the paper's numbers; each bad input."""

import csv
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from skimage.color import rgb2lab

from models.checkpoint import read_csv
from paper import draw, figures, pictures, plots, shown
from paper.draw import overlap, place_labels
from paper.figures import main, parse_args
from paper.noise import (
    best_window,
    close_ups,
    gradient,
    high_pass,
    incoherent,
    structured_noise,
    window_sums,
    write_noise_table,
)
from paper.shown import at_quantiles
from paper.tables import KEY, TABLE7, compare, load_seeds, table7

ROOT = Path(__file__).resolve().parent.parent
ROWS = ("UPos", "AMO", "UPos+FT", "AMO+FT", "AMO+FT_full")
NAMES = ("0001", "0002", "0003", "0004", "0005", "0006")  # read as numbers, were they not names
PAIR = ("set", "image1", "image2", "quality1", "quality2", "difference")  # of figure2.csv
COLUMNS = ("psnr", "ssim", "musiq", "q", "judge")


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Pixels cost time; the run of the real script has all of them."""
    monkeypatch.setitem(draw.plt.rcParams, "savefig.dpi", 30)


def rows_of(path):
    return read_csv(path, ())[0]


# ------------------------------------------------------------------------- the tables' maths


def test_compare_subtracts_the_paper_where_both_have_a_number():
    paper = [{"model": "A", "lambda_a": "0.1", "psnr": "22.30", "q": ""},
             {"model": "B", "lambda_a": "-", "psnr": "21.00", "q": ""}]
    ours = [{"model": "A", "lambda_a": "0.1", "psnr": "21.0500", "q": "7"},
            {"model": "C", "lambda_a": "-", "psnr": "20.0", "q": "8"}]
    assert compare(ours, paper, "model") == [("A", "psnr", "21.0500", "22.30", "-1.2500")]
    for nothing in ("", "-", "inf", "nan"):
        assert compare([ours[0] | {"psnr": nothing}], paper, "model") == []


def test_table7_has_the_papers_order_and_labels_and_our_settings_and_numbers():
    paper = rows_of(ROOT / "paper" / "table7.csv")
    ours = [
        # name, of table 5, nr_metric, lambda_a, no_human_labels, psnr
        ("SwinIR-AMO+FT_full", "SwinIR-AMO+FT_full", "q", "0", "yes", "1"),
        ("SwinIR-AMO", "SwinIR-AMO", "-", "-", "yes", "2"),  # belongs to Table 5 alone
        ("RealESRGAN-UPos+FT_IG", "ReSRGAN-UPos + FT_IG", "q", "0.03", "no", "3"),
        ("SwinIR-AMO+FT", "SwinIR-AMO + FT", "q", "0", "", "4"),
        ("mine", "mine", "", "", "", "5"),  # a public file
        ("Gold Standard", "Gold Standard", "-", "-", "no", ""),
    ]
    columns = [*list(paper[0])[:5], "psnr"]
    made = table7([dict(zip(columns, row, strict=True)) for row in ours], paper)
    assert [list(row.values()) for row in made] == [
        ["Gold Standard", "Gold Standard", "-", "-", "no", ""],
        ["SwinIR-AMO+FT", "SwinIR-AMO + FT", "q", "0", "", "4"],
        ["RealESRGAN-UPos+FT_IG", "RESRGAN-UPos + FT_IG", "q", "0.03", "no", "3"],
        ["SwinIR-AMO+FT_full", "SwinIR-AMO+FT_full", "q", "0", "yes", "1"]]
    assert list(made[0]) == columns

    # A table5.csv of an earlier version has no settings: none are made up
    before = [{"model": "SwinIR-AMO+FT", "no_human_labels": "yes", "psnr": "4"}]
    assert table7(before, paper) == [
        {"model": "SwinIR-AMO+FT", "label": "SwinIR-AMO + FT", "nr_metric": "", "lambda_a": "",
         "no_human_labels": "yes", "psnr": "4"}]


FT_ROWS = ["UPos + FT_HP", "UPos + FT_IG", "UPos + FT", "AMO + FT"]
NNR = ["UPos + FT_NNR,IG×2", "UPos + FT_NNR,IG×5", "UPos + FT_PaQ2PiQ"]


@pytest.mark.parametrize(("table", "first", "net", "rows"), [
    (5, ["Gold Standard"], "ReSRGAN",
     ["OrigsOnly", "Rand", "UPos*", "SMA", "SMP", "AMO", *FT_ROWS]),
    (7, ["Gold Standard"], "RESRGAN", ["UPos*", *FT_ROWS[:2], *NNR, *FT_ROWS[2:]]),
    (8, [], "RESRGAN", ["OrigOnly", "UPos*", "AMO", "AMO + FT"]),
])  # fmt: skip
def test_labels_are_printed_names_in_the_papers_order(table, first, net, rows):
    printed = rows_of(ROOT / "paper" / f"table{table}.csv")
    assert [row["label"] for row in printed] == first + [
        f"{name}-{row}" for name in ("SwinIR", net) for row in rows]
    assert all("ReSRGAN" not in row["model"] and "*" not in row["model"] for row in printed)


@pytest.mark.parametrize(
    ("table", "row", "column", "value"),
    [(1, "nima", "accuracy_percent", "74.91"), (2, "liqe", "train_accuracy_percent", "77.70"),
     (2, "musiq", "test_accuracy_percent", "82.73"),
     (3, "topiq_nr", "test_accuracy_percent", "30.89"),
     (3, "arniqa-tid", "train_accuracy_percent", "42.05"), (4, "musiq", "nm", "0.95"),
     (4, "liqe", "src", "0.03"), (4, "qalign", "pm", "0.39"),
     (5, "Gold Standard", "musiq", "69.64"), (5, "SwinIR-AMO+FT", "psnr", "21.77"),
     (5, "RealESRGAN-SMA", "dists", "0.157"), (5, "SwinIR-SMP", "no_human_labels", "no"),
     (6, "piqe", "accuracy_percent", "46.21"), (6, "tres-flive", "accuracy_percent", "63.29"),
     (7, "SwinIR-UPos+FT_NNR,IGx5", "lpips_st", "0.134"),
     (7, "SwinIR-UPos+FT_IG", "lambda_a", "0.1"),
     (7, "RealESRGAN-UPos+FT_PaQ2PiQ", "qalign", "3.51"), (8, "SwinIR-AMO+FT", "musiq", "39.25"),
     (8, "RealESRGAN-OrigsOnly", "ssim", "0.758")],
)  # fmt: skip
def test_numbers_typed_from_the_paper(table, row, column, value):
    rows, comments = read_csv(ROOT / "paper" / f"table{table}.csv", [KEY[table]])
    assert {r[KEY[table]]: r[column] for r in rows}[row] == value
    assert len(comments) == 1 and f"Table {table}" in comments[0]
    assert len(rows) == {1: 7, 2: 7, 3: 6, 4: 7, 5: 21, 6: 42, 7: 17, 8: 8}[table]


# ------------------------------------------------------------------------- choices


def test_images_at_evenly_spaced_quantiles():
    gains = {f"{i:02d}": float(-i) for i in range(20)}  # "19" gains least
    assert at_quantiles(gains, 5) == ["17", "13", "09", "05", "01"]
    assert at_quantiles(gains, 1) == ["09"]
    assert at_quantiles({"b": 1.0, "a": 1.0}, 5) == ["a", "b"]  # each once, ties by name
    assert at_quantiles({}, 3) == []


def test_window_sums_and_the_best_window():
    values = np.arange(70.0).reshape(7, 10)
    sums = window_sums(values, 3, step=2)
    assert sums.shape == (3, 4)
    assert sums[1, 2] == values[2:5, 4:7].sum()
    assert best_window(sums, step=2) == (4, 6)
    spot = np.zeros((40, 40))
    spot[21, 30] = 1
    top, left = best_window(window_sums(spot, 8))
    assert top <= 21 < top + 8 and left <= 30 < left + 8 and (top % 4, left % 4) == (0, 0)


def picture(seed=0, size=64):
    """Smooth blobs and edges, uint8 RGB."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 216, (size // 8, size // 8, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def with_grid(image, strength=20):
    rows, columns = np.indices(image.shape[:2])
    grid = strength * (-1.0) ** (rows + columns)
    return (image + grid[..., None]).clip(0, 255).round().astype(np.uint8)


def test_structured_noise_of_a_scaled_copy_a_sharpening_and_a_grid():
    image = picture()
    reference = high_pass(image)
    assert structured_noise(2.5 * reference, reference) < 1e-12  # sharper at the right places
    sharper = (image + 1.5 * (image - image.mean((0, 1)))).clip(0, 255).round().astype(np.uint8)
    sharpened = structured_noise(high_pass(sharper), reference)
    assert structured_noise(high_pass(with_grid(image)), reference) > 10 * max(sharpened, 0.01)
    # orthogonal noise of equal energy: rho^2 = 1/2, |sr|^2 = 2 |reference|^2
    a, b = np.zeros((4, 4)), np.zeros((4, 4))
    a[0, 0] = b[1, 1] = 3
    assert structured_noise(a + b, a) == pytest.approx(1)
    rho = (a * (a + b)).sum() / np.sqrt((a**2).sum() * ((a + b) ** 2).sum())
    assert incoherent(a + b, a).sum() == pytest.approx((1 - rho**2) * ((a + b) ** 2).sum())


def test_close_ups_are_the_flattest_window_of_the_original_and_the_noisiest_apart_from_it():
    rng = np.random.default_rng(0)
    original = rng.integers(0, 200, (96, 96, 3)).astype(np.uint8)
    original[40:60, 24:44] = 100 + np.arange(20, dtype=np.uint8)[:, None, None]  # a gentle slope
    reference = np.full((96, 96, 3), 100, np.uint8)  # flat everywhere: it does not decide
    sr = reference.copy()
    sr[50, 30] = 255  # the noisiest pixel, but in the flattest window
    sr[70, 80] = 180
    assert gradient(original)[45, 30] == pytest.approx(1)
    first, (top, left) = close_ups(sr, reference, original, 16)
    assert 40 <= first[0] <= 44 and 24 <= first[1] <= 28
    assert top <= 70 < top + 16 and left <= 80 < left + 16


def test_labels_cover_no_label_and_no_point():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(100, 400, (8, 2)), rng.uniform(200, 240, (6, 2))])
    sizes = np.tile([70.0, 12.0], (len(points), 1))
    centres = place_labels(points, sizes, (0, 0, 500, 500))
    boxes = [(*(c - s / 2), *(c + s / 2)) for c, s in zip(centres, sizes, strict=True)]
    assert all(0 <= v <= 500 for box in boxes for v in box)
    for i, box in enumerate(boxes):
        assert not any(overlap(box, other) for other in boxes[i + 1 :])
        assert not any(overlap(box, (*(p - 3), *(p + 3))) for p in points)


def test_a_line_to_a_label_crosses_no_other_point():
    lines = 0
    for seed in range(10):
        points = np.random.default_rng(seed).uniform(200, 230, (6, 2))
        size = np.array([70.0, 12.0])
        centres = place_labels(points, np.tile(size, (6, 1)), (0, 0, 430, 430))
        for i, (point, centre) in enumerate(zip(points, centres, strict=True)):
            if np.hypot(*np.maximum(abs(centre - point) - size / 2, 0)) > 12:  # drawn from here on
                on_line = [point + t * (centre - point) for t in (0.2, 0.4, 0.6)]
                lines += 1
                assert all(abs(np.delete(points, i, 0) - p).max(1).min() > 6 for p in on_line)
    assert lines > 5


# ------------------------------------------------------------------------- colours, plots

# Machado, Oliveira and Fernandes (2009): deuteranopia, severity 1, of linear RGB
DEUTERANOPIA = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                         [-0.011820, 0.042940, 0.968881]])


def as_seen(colour):
    """The colour as deuteranopes see it, CIE Lab."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = (DEUTERANOPIA @ linear).clip(0, 1)
    srgb = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    return rgb2lab(srgb[None, None])[0, 0]


def test_deuteranopes_tell_apart_all_rows_of_one_marker():
    styles = [*draw.ROWS.values(), draw.OTHER_ROW]
    assert len(set(styles)) == len(styles) == 17
    for (a, marker), (b, other) in itertools.combinations(styles, 2):
        if marker == other:
            assert np.linalg.norm(as_seen(a) - as_seen(b)) > 17, (a, b, marker)
    for colour, _ in styles:
        assert np.linalg.norm(as_seen(colour) - as_seen("white")) > 35, colour
    # The measure itself: red and green of one lightness look alike
    assert np.linalg.norm(as_seen("tab:green") - as_seen("tab:red")) < 17


def test_one_panel_per_metric_and_ours_apart_from_the_papers():
    ours = {"SwinIR-AMO": {"psnr": 25.0, "lpips": 0.2, "q": 40.0, "psnr_original": 26.0},
            "RealESRGAN-AMO": {"psnr": 24.0, "q": 41.0}}
    paper = {"SwinIR-AMO": {"psnr": 22.08, "lpips": 0.167, "dists": 0.123, "musiq": 68.08}}
    fig = plots.plane_figure(ours, paper)
    panels = [(ax.get_ylabel(), sorted(float(line.get_xdata()[0]) for line in ax.lines))
              for ax in fig.axes if ax.axison]
    assert panels == [("LPIPS (reversed)", [25.0]), ("Q", [24.0, 25.0]),
                      ("LPIPS (reversed)", [22.08]), ("DISTS (reversed)", [22.08]),
                      ("MUSIQ", [22.08])]
    for ax in (ax for ax in fig.axes if ax.axison):
        assert ax.yaxis_inverted() == ("reversed" in ax.get_ylabel())
    assert {line.get_fillstyle() for line in fig.axes[1].lines} == {"full", "none"}  # networks
    plots.plt.close(fig)
    assert plots.plane_figure({"SwinIR-AMO": {"q": 40.0}}, paper) is None


def test_rows_that_the_paper_does_not_have_are_gray_and_last_in_the_legend():
    ours = {"SwinIR-Mine": {"psnr": 25.0, "q": 40.0}, "SwinIR-AMO": {"psnr": 24.0, "q": 50.0}}
    fig = plots.plane_figure(ours, {})
    handles = fig.legends[0].legend_handles
    assert [h.get_label() for h in handles] == ["AMO", "Mine"]
    assert handles[1].get_color() == "gray" != handles[0].get_color()
    plots.plt.close(fig)


def test_bars_over_seeds_and_an_inset_without_the_far_point(tmp_path):
    rows = [["UPos", 30, 2, 27, 0.5], ["AMO", 33, 2.5, 26, 0.4], ["AMO+FT_full", 60, 8, 24, 0.6]]
    write(tmp_path / "seeds_swinir_means.csv", ["row", "q", "q_sd", "psnr", "psnr_sd"], rows,
          "seed 3: x\n# seed 4: x\n# seed 4: y")
    means, spreads, seeds = load_seeds(tmp_path)
    assert means["SwinIR-AMO"] == {"q": 33, "psnr": 26} and seeds == 2
    assert spreads["SwinIR-UPos"] == {"q": 2, "psnr": 0.5}
    fig = plots.tradeoff_figure(means, "q", spreads, seeds)
    (ax,) = fig.axes
    (inset,) = ax.child_axes
    bars = {c.lines[0].get_xydata()[0][0]: [b.get_segments()[0] for b in c.lines[2]]
            for c in ax.containers}
    assert np.allclose(bars[26][0], [[25.6, 33], [26.4, 33]])
    assert np.allclose(bars[24][1], [[24, 52], [24, 68]])
    assert inset.get_ylim()[1] < 40 < 60 < ax.get_ylim()[1]
    assert {t.get_text() for t in inset.texts} == {"UPos", "AMO"}
    assert "Means of 2 seeds" in fig.get_suptitle() and "Inset" in fig.get_suptitle()
    plots.plt.close(fig)
    fig = plots.tradeoff_figure({m: v for m, v in means.items() if "full" not in m}, "q")
    assert not fig.axes[0].child_axes and "seeds" not in fig.get_suptitle()
    plots.plt.close(fig)


# ------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(("naive", "text"), [(90.0, "NOT at equal"), (52.0, "at about equal")])
@pytest.mark.parametrize("row", ["AMO+FT_full", "AMO+FT_full_eq"])
def test_the_noise_figure_says_whether_quality_is_equal(tmp_path, row, naive, text):
    """Naive fine-tuning is shown at LoRA's quality where that was made."""
    make_run(tmp_path)
    rows = ["AMO", "AMO+FT", "AMO+FT_full", row]
    if row.endswith("_eq"):
        (tmp_path / "sr/SwinIR-AMO+FT_full").rename(tmp_path / "sr/SwinIR-AMO+FT_full_eq")
    test = shown.TestSet({"0001": tmp_path / "gt/0001.png"}, tmp_path / "lq", tmp_path / "sr",
                         scores={(f"SwinIR-{row}", "0001"): {"q": 44.0}}, rows={"SwinIR": rows})
    noise = {f"SwinIR-{r}": {"noise": n, "quality": q} for r, n, q in (
        ("AMO", 0.0, 20.0), ("AMO+FT", 0.1, 50.0), (row, 0.2, naive))}
    fig = pictures.noise_figure(test, [("SwinIR", "0001")], "q", noise)
    texts = "\n".join(t.get_text() for t in fig.texts)
    titles = [ax.get_title() for ax in fig.axes]
    pictures.plt.close(fig)
    assert text in texts and f"Mean Q is {naive} for naive, 50.0 for LoRA, 20.0" in texts
    assert "AMO+FT              50.0  0.100" in texts
    assert f"Naive: {row}, LoRA: AMO+FT." in texts
    assert ("its change from AMO is scaled" in texts) == row.endswith("_eq")
    assert titles[0] == f"naive: Q 44.0\n(mean {naive})"
    assert titles[3].endswith("(mean 50.0)")


def test_titles_name_three_scores_and_the_maps_show_the_difference(tmp_path):
    make_run(tmp_path)
    scores = {("SwinIR-UPos", "0001"): {"q": 10.25, "judge": 60, "psnr": 24.91},
              ("SwinIR-AMO+FT", "0001"): {"q": 30}}
    test = shown.TestSet({"0001": tmp_path / "gt/0001.png"}, tmp_path / "lq", tmp_path / "sr",
                         scores=scores, rows={"SwinIR": list(ROWS)})
    fig = pictures.crops_figure(test, [("SwinIR", "0001")], ("q", "judge", "psnr"))
    assert [ax.get_title() for ax in fig.axes] == [
        "LQ", "original", "UPos: Q 10.2\njudge 60.0, 24.9 dB", "AMO", "AMO+FT: Q 30.0"]
    assert any("Q +19.8" in text.get_text() for text in fig.texts)
    pictures.plt.close(fig)
    fig = pictures.comparison_figure(test, "SwinIR", ["0001"], ["UPos", "AMO+FT_full"], "q")
    pixels = [np.asarray(ax.images[0].get_array()) for ax in fig.axes]
    insets = [[t.get_text() for t in ax.texts] for ax in fig.axes]
    assert [ax.get_title() for ax in fig.axes] == ["LQ", "bicubic", "UPos", "AMO+FT_full",
                                                   "original", "", "", ""]
    assert np.array_equal(pixels[2], pixels[4])  # UPos is the original here
    assert (pixels[6] == 255).all() and insets[6] == ["mean 0.0"]
    assert (pixels[7] == round(255 - 255 * 20 / pictures.DARKEST)).mean() > 0.9  # a grid of 20
    assert insets[2] == ["Q 10.2"] and insets[7] == ["mean 20.0"]
    pictures.plt.close(fig)


# ------------------------------------------------------------------------- the whole script


def write(path, header, rows, comment="made by hand"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        file.write(f"# {comment}\n")
        csv.writer(file).writerows([header, *rows])


def write_image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def make_run(root, nets=("SwinIR",)):
    """Tables and images of a small run; AMO+FT_full of every image has a grid, AMO+FT a faint one.

    Quality q of image i: UPos 10, AMO 20, AMO+FT 30 + 10 i, AMO+FT_full 90.
    """
    table, per_image = [["Gold Standard", "Gold Standard", "-", "-", "no", "", "", 70, 80, 90]], []
    for i, name in enumerate(NAMES):
        gt = picture(i)
        write_image(root / "gt" / f"{name}.png", gt)
        write_image(root / "lq" / f"{name}.png", gt[::4, ::4])
        write_image(root / "clean" / f"{name}.png", gt)
        for net in nets:
            for row in ROWS:
                strength = {"AMO+FT_full": 20, "AMO+FT": 5}.get(row, 0)
                write_image(root / "sr" / f"{net}-{row}" / f"{name}.png", with_grid(gt, strength))
    for net in nets:
        for row, q in zip(ROWS, (10, 20, 25, 30, 90), strict=True):
            scores = [q + 10 * i * (row == "AMO+FT") for i in range(len(NAMES))]
            per_image += [[f"{net}-{row}", name, 25 - s / 100, 0.7, "", s, 50 + s, 26 - s / 100]
                          for name, s in zip(NAMES, scores, strict=True)]
            mean = sum(scores) / len(scores)
            tuned = ["q", "0"] if "+FT" in row else ["-", "-"]
            table.append([f"{net}-{row}", f"{net}-{row}", *tuned, "yes", 25 - mean / 100, 0.7, "",
                          mean, 50 + mean])
    results = root / "results"
    write(results / "table5.csv", [*TABLE7, *COLUMNS], table)
    header = ["model", "image", *COLUMNS, "psnr_original"]
    write(results / "table5_per_image.csv", header, per_image)
    write(results / "table6.csv", ["pyiqa_name", "accuracy_percent"], [["piqe", "50.00"]])
    write(results / "figure2.csv", PAIR, [
        [n, root / "gt" / f"{n}.png", root / "sr" / f"SwinIR-AMO+FT_full/{n}.png", 40, 60, 20]
        for n in NAMES], "quality: q")
    return results


def arguments(root, *more):
    folders = [v for flag in ("sr", "gt", "lq") for v in (f"--{flag}", str(root / flag))]
    return ["--results", str(root / "results"), *folders, "--quality", "q", "--held-out", "judge",
            *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the real script for one network, and what it printed."""
    root = tmp_path_factory.mktemp("run")
    make_run(root)
    command = [sys.executable, "-m", "paper.figures",
               *arguments(root, "--reference", str(root / "clean"))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return root, result.stdout


PICTURES = ["figure2", "figure3", "figure4", "figure5", "figure6", "figure8", "crops", "tradeoff",
            "perception_distortion"]


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_made_and_not_blank(finished, name):
    root, printed = finished
    image = np.asarray(Image.open(root / "results" / f"{name}.png").convert("L"))
    assert image.shape[1] == 2070 and image.shape[0] > 300  # 6.9 inches at 300 dpi
    assert image.std() > 10
    assert f"{name}.png: written, with a PDF" in printed
    pdf = (root / "results" / f"{name}.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and b"/Type3" not in pdf and b"CreationDate" not in pdf
    assert round(float(re.search(rb"MediaBox \[ ?0 0 ([\d.]+)", pdf)[1])) == round(6.9 * 72)
    assert not list((root / "results").glob(".*"))  # nothing half-written is left


def test_tables_beside_the_papers(finished):
    root, printed = finished
    cells = {(r["table"], r["row"], r["column"]): r for r in
             rows_of(root / "results" / "comparison.csv")}
    ft = cells["5", "SwinIR-AMO+FT", "psnr"]
    assert (ft["ours"], ft["paper"], ft["difference"]) == ("24.45", "21.77", "+2.6800")
    assert cells["7", "SwinIR-AMO+FT", "psnr"]["difference"] == "+2.6800"
    assert cells["5", "Gold Standard", "musiq"]["difference"] == "+0.3600"
    assert cells["6", "piqe", "accuracy_percent"]["difference"] == "+3.7900"
    assert ("5", "SwinIR-AMO+FT", "musiq") not in cells  # ours is empty
    assert "SwinIR-AMO+FT                 psnr 24.45 (21.77, +2.68)  ssim 0.700" in printed
    assert "Table 1: not compared, no table1.csv" in printed
    assert "without SwinIR-UPos+FT_HP, " in printed
    rows = rows_of(root / "results" / "table7.csv")
    assert [r["model"] for r in rows] == ["Gold Standard", "SwinIR-UPos", "SwinIR-UPos+FT",
                                          "SwinIR-AMO+FT", "SwinIR-AMO+FT_full"]
    assert [r["label"] for r in rows[1:]] == ["SwinIR-UPos*", "SwinIR-UPos + FT", "SwinIR-AMO + FT",
                                              "SwinIR-AMO+FT_full"]
    assert rows[3]["q"] == "55.0" and rows[3]["nr_metric"] == "q"  # the paper's is musiq
    comments = read_csv(root / "results" / "table7.csv")[1]
    assert "rows that the paper's Table 7 does not have: SwinIR-AMO+FT_full" in comments


def test_structured_noise_table(finished):
    root, _ = finished
    rows = {r["row"]: r for r in rows_of(root / "results" / "structured_noise.csv")}
    assert list(rows) == ["SwinIR-AMO", "SwinIR-AMO+FT", "SwinIR-AMO+FT_full", "SwinIR-UPos",
                          "SwinIR-UPos+FT"]
    assert float(rows["SwinIR-AMO"]["noise"]) == 0 and rows["SwinIR-AMO"]["d_noise"] == ""
    lora, naive = rows["SwinIR-AMO+FT"], rows["SwinIR-AMO+FT_full"]
    assert 0 < float(lora["noise"]) < float(naive["noise"]) == float(naive["d_noise"])
    assert (lora["quality"], lora["d_quality"], lora["d_held_out"]) == ("55.0000", "35.0000",
                                                                       "35.0000")
    assert (naive["d_psnr"], naive["d_psnr_original"]) == ("-0.7000", "-0.7000")


@pytest.mark.parametrize("columns", [5, 6])
def test_the_papers_labels_have_the_size_of_other_text(columns):
    cell = draw.Cell(np.zeros((8, 8, 3), np.uint8), "AMO+FT")
    fig = draw.draw_grid([[cell] * columns] * 2, ["RealESRGAN: 0801_sub012", "SwinIR: a"])
    sizes = {text.get_text(): text.get_fontsize() for text in fig.texts}
    draw.plt.close(fig)
    assert sizes == {"": draw.POINTS, "RealESRGAN:\n0801_sub012": draw.POINTS,
                     "SwinIR: a": draw.POINTS}


def test_the_images_are_chosen_by_gain_or_by_name(tmp_path, monkeypatch):
    make_run(tmp_path, ("SwinIR", "RealESRGAN"))
    made = {}

    def draw_grid(rows, labels, title="", extra=0.0):
        made[len(made)] = [label.split("\n")[0] for label in labels if label != "difference"]
        return draw.plt.figure(figsize=(1, 1 + extra))

    monkeypatch.setattr(pictures, "draw_grid", draw_grid)
    monkeypatch.setattr(figures, "plane_figure", lambda *_: None)
    monkeypatch.setattr(figures, "tradeoff_figure", lambda *_: None)

    def both(*names):
        return [f"{net}: {name}" for net in ("SwinIR", "RealESRGAN") for name in names]

    main(parse_args(arguments(tmp_path)))
    assert made[1] == both("0002", "0005")  # figure4; gain rises with the name
    assert made[2] == both("0001", "0004", "0006")  # figure6
    assert made[3] == both("0001", "0002")  # figure8: lowest held-out
    assert made[4] == [f"SwinIR: {n}" for n in ("0002", "0004", "0006")]  # crops
    assert [len(made[i]) for i in (6, 7)] == [2, 4]  # figures 3 and 5
    assert {p.name for p in (tmp_path / "results").glob("crops*.png")} == {"crops_SwinIR.png",
                                                                           "crops_RealESRGAN.png"}
    made.clear()
    main(parse_args(arguments(tmp_path, "--images", "0006", "0003", "0001")))
    assert made[1] == both("0006", "0003") and made[2] == both("0001")
    assert made[6] == both("0006") and made[7] == both("0003", "0001")


def test_naive_at_equal_quality_is_read_beside_table_5(tmp_path):
    results = make_run(tmp_path)
    args = parse_args(arguments(tmp_path))
    test = shown.load_test(args, shown.load_scores(args)[0])
    assert pictures.naive_row(test, "SwinIR") == "AMO+FT_full"
    shutil.copytree(tmp_path / "sr/SwinIR-AMO+FT", tmp_path / "sr/SwinIR-AMO+FT_full_eq")
    write(results / "equal_per_image.csv", ["model", "image", "q", "judge", "psnr"],
          [["Gold Standard", "0001", 99, 99, ""],
           *(["SwinIR-AMO+FT_full_eq", name, 55, 70, 24] for name in NAMES)])
    test = shown.load_test(args, shown.load_scores(args)[0])
    assert pictures.naive_row(test, "SwinIR") == "AMO+FT_full_eq"
    means = write_noise_table(test, args, [])
    equal, lora = means["SwinIR-AMO+FT_full_eq"], means["SwinIR-AMO+FT"]
    assert equal["noise"] == lora["noise"] > 0 and equal["quality"] == lora["quality"] == 55
    assert "SwinIR-AMO+FT_full_eq" in (results / "structured_noise.csv").read_text()


def test_figure_7_is_made_of_the_run_s_own_study(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "plane_figure", lambda *_: None)
    results = make_run(tmp_path)
    (results / "figure2.csv").unlink()
    main(parse_args(["--results", str(results)]))
    page = results / "study/rater01.html"
    assert f"figure7.png: not made, no {page}" in capsys.readouterr().out
    page.parent.mkdir()
    page.write_text("<p>left or right?")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    main(parse_args(["--results", str(results)]))
    assert (f"figure7.png: not made, no Chromium; it is a picture of {page}"
            in capsys.readouterr().out)


def test_what_is_missing_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "plane_figure", lambda *_: None)
    results = make_run(tmp_path)
    for name in ("figure2.csv", "table6.csv"):
        (results / name).unlink()
    (tmp_path / "sr/SwinIR-AMO").rename(tmp_path / "sr/elsewhere")
    main(parse_args(arguments(tmp_path)))
    printed = capsys.readouterr().out
    for line in (f"SwinIR-AMO: in no picture, no folder of that name in {tmp_path / 'sr'}",
                 "figure2.png: not made, figure2.csv has no pairs",
                 "figures 4 and 6: without SwinIR, it has no SR images of AMO",
                 "figure4.png: not made", "figure8.png: not made", "figure3.png: not made",
                 "structured_noise.csv: without SwinIR-AMO+FT, AMO has no SR images",
                 "crops.png: written"):
        assert line in printed
    assert list(rows_of(results / "structured_noise.csv")[0].values())[0] == "SwinIR-UPos"
    main(parse_args(["--results", str(results)]))
    printed = capsys.readouterr().out
    assert "crops.png, structured_noise.csv: not made, no --sr, --gt and --lq" in printed
    assert "tradeoff.png: not made, table5.csv has no PSNR with musiq" in printed


def shrink(path):
    Image.open(path).resize((32, 32)).save(path)


BAD = {
    "no results": (lambda r: os.rename(r / "results", r / "x"), [], "no such folder"),
    "no tables": (lambda r: [p.unlink() for p in (r / "results").glob("table*")], [],
                  "no table1.csv to table8.csv; run"),
    "no per-image table": (lambda r: (r / "results/table5_per_image.csv").unlink(), [],
                           "table5_per_image.csv: no such table"),
    "wrong column": (lambda r: write(r / "results/table6.csv", ["a"], [[1]]), [],
                     "table6.csv: no column pyiqa_name"),
    "short row": (lambda r: write(r / "results/table6.csv", ["pyiqa_name", "b"], [["x"]]), [],
                  "table6.csv: row 'x' has too few or too many cells"),
    "binary table": (lambda r: (r / "results/table6.csv").write_bytes(b"\xff\xfe\x00"), [],
                     "table6.csv: not a text file in UTF-8"),
    "no such quality": (None, ["--quality", "liqe"], "use one of its columns judge, q"),
    "empty held-out": (None, ["--held-out", "musiq"], "--held-out musiq: no scores in"),
    "no such image": (None, ["--images", "9999"], "image 9999: not in both"),
    "image not in gt": (lambda r: (r / "gt/0006.png").unlink(), [], "image 0006: not in both"),
    "SR absent": (lambda r: (r / "sr/SwinIR-AMO/0002.png").unlink(), [],
                  "SwinIR-AMO/0002.png: no such image"),
    "SR of other size": (lambda r: shrink(r / "sr/SwinIR-AMO/0002.png"), [],
                         "0002.png: 32x32, but the original is 64x64"),
    "LQ of other size": (lambda r: shrink(r / "lq/0001.png"), [], "lq/0001.png: 32x32"),
    "no LQ folder": (lambda r: os.rename(r / "lq", r / "x"), [], "--lq "),
    "no reference": (None, ["--reference", "/nowhere"], "--reference /nowhere: no such folder"),
    "reference absent": (lambda r: (r / "clean/0001.png").unlink(), ["--reference", "clean"],
                         "clean/0001.png: no such image"),
    "no paper": (None, ["--paper", "/nowhere"], "/nowhere/table1.csv: no such table"),
    "pair's image gone": (
        lambda r: write(r / "results/figure2.csv", PAIR, [["s", "a.png", "b.png", 1, 2, 1]]), [],
        "figure2.csv: a.png: no such image"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_written(tmp_path, monkeypatch, case):
    spoil, more, message = BAD[case]
    make_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    if spoil:
        spoil(tmp_path)
    with pytest.raises((ValueError, OSError)) as error:
        main(parse_args(arguments(tmp_path, *more)))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.rglob("comparison.csv")) and not list(tmp_path.rglob("figure*.png"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--sr", "a"], "together"), (["--images", "a"], "need --sr"), (["--qual", "q"], "--qual"),
     (["--sr", "a", "--gt", "b", "--lq", "c", "--images", *"123456"], "five at most")],
)
def test_flags_that_do_not_go_together(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--results", "r", *flags])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_script_says_what_is_wrong_in_one_line(tmp_path):
    result = subprocess.run([sys.executable, "-m", "paper.figures", "--results",
                             str(tmp_path / "none")], cwd=ROOT, capture_output=True, text=True,
                            timeout=60)
    assert result.returncode == 2
    assert result.stderr == f"figures.py: --results {tmp_path / 'none'}: no such folder\n"
