"""paper/figures.py: hand-made tables and tiny images; the paper's numbers; each bad input."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.checkpoint import read_csv
from paper import draw, figures
from paper.draw import overlap, place_labels
from paper.figures import (
    at_quantiles,
    best_window,
    close_ups,
    compare,
    high_pass,
    incoherent,
    main,
    parse_args,
    structured_noise,
    table7,
    window_sums,
)

ROOT = Path(__file__).resolve().parent.parent
ROWS = ("UPos", "AMO", "UPos+FT", "AMO+FT", "AMO+FT_full")
NAMES = ("0001", "0002", "0003", "0004", "0005", "0006")  # read as numbers, were they not names
PAIR = ("set", "image1", "image2", "quality1", "quality2", "difference")  # of figure2.csv
COLUMNS = ("psnr", "ssim", "musiq", "q", "judge")


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
    rows, comments = read_csv(ROOT / "paper" / f"table{table}.csv", [figures.KEY[table]])
    assert {r[figures.KEY[table]]: r[column] for r in rows}[row] == value
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


def test_close_ups_find_the_noise_in_the_flat_area_and_elsewhere():
    reference, sr = np.zeros((96, 96)), np.zeros((96, 96))
    reference[:, 48:] = 5 * (-1.0) ** np.indices((96, 48)).sum(0)  # detail in the right half
    reference[40:, :48] = 2 * np.arange(56)[:, None]  # a slope, without high frequency
    sr += reference
    sr[70, 20] += 20  # worse than in the flat area
    sr[20, 10], sr[70, 80], sr[70, 81] = 9, 40, 40
    grey = (np.stack([x + 100] * 3, -1) for x in (sr, reference))
    (top, left), (top2, left2) = close_ups(*grey, 16)
    assert top <= 20 < top + 16 and left <= 10 < left + 16
    assert top2 <= 70 < top2 + 16 and left2 <= 80 < left2 + 16


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


def test_planes_turn_lower_is_better_axes_and_tell_ours_from_the_papers():
    ours = {"SwinIR-AMO": {"psnr": 25.0, "lpips": 0.2, "q": 40.0}}
    paper = {"SwinIR-AMO": {"psnr": 22.08, "lpips": 0.167, "dists": 0.123, "musiq": 68.08}}
    fig = figures.plane_figure(ours, paper)
    panels = {(ax.get_xlabel(), ax.get_ylabel()): ax for ax in fig.axes if ax.axison}
    lpips = "LPIPS ↓, axis reversed"
    assert set(panels) == {("PSNR (dB)", "Q"), ("PSNR (dB)", "MUSIQ, paper only"), (lpips, "Q"),
                           (lpips, "MUSIQ, paper only")}  # no DISTS: ours has none
    for (x, y), ax in panels.items():
        assert ax.xaxis_inverted() == (x == lpips)
        (points,) = ax.collections
        assert len(points.get_facecolor()) == (y == "Q")  # the paper's are hollow
    figures.plt.close(fig)
    assert figures.plane_figure({"SwinIR-AMO": {"q": 40.0}}, paper) is None


def test_rows_that_the_paper_does_not_have_are_gray_and_last_in_the_legend():
    ours = {"SwinIR-Mine": {"psnr": 25.0, "q": 40.0}, "SwinIR-AMO": {"psnr": 24.0, "q": 50.0}}
    fig = figures.plane_figure(ours, {})
    handles = fig.legends[0].legend_handles
    assert [h.get_label() for h in handles] == ["AMO", "Mine", "SwinIR, ours",
                                                "SwinIR, the paper's"]
    assert handles[1].get_color() == "gray" != handles[0].get_color()
    figures.plt.close(fig)


@pytest.mark.parametrize(("naive", "text"), [(90.0, "NOT at equal"), (52.0, "at about equal")])
def test_the_noise_figure_says_whether_quality_is_equal(tmp_path, naive, text):
    make_run(tmp_path)
    test = figures.TestSet({"0001": tmp_path / "gt/0001.png"}, tmp_path / "lq", tmp_path / "sr")
    rows = (("AMO", 0.0, 20.0), ("AMO+FT", 0.1, 50.0), ("AMO+FT_full", 0.2, naive))
    noise = {f"SwinIR-{row}": {"noise": n, "quality": q} for row, n, q in rows}
    fig = figures.noise_figure(test, [("SwinIR", "0001")], "q", noise)
    texts = "\n".join(t.get_text() for t in fig.texts)
    figures.plt.close(fig)
    assert text in texts and f"Mean Q is {naive} for naive, 50.0 for LoRA, 20.0" in texts
    assert "AMO+FT             50.0   0.100" in texts


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
    write(results / "table5.csv", [*figures.TABLE7, *COLUMNS], table)
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
    assert image.shape[1] == draw.WIDTH * draw.DPI and image.shape[0] > 150
    assert image.std() > 10
    assert f"{name}.png: written" in printed
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


def test_the_images_are_chosen_by_gain_or_by_name(tmp_path, monkeypatch):
    make_run(tmp_path, ("SwinIR", "RealESRGAN"))
    made = {}

    def draw_grid(rows, labels, title="", extra=0.0):
        made[len(made)] = [label.split("\n")[0] for label in labels]
        return figures.plt.figure(figsize=(1, 1 + extra))

    monkeypatch.setattr(figures, "draw_grid", draw_grid)
    monkeypatch.setattr(figures, "plane_figure", lambda *_: None)
    monkeypatch.setattr(figures, "tradeoff_figure", lambda *_: None)

    def both(*names):
        return [f"{net}: {name}" for net in ("SwinIR", "RealESRGAN") for name in names]

    main(parse_args(arguments(tmp_path)))
    assert made[1] == both("0002", "0005")  # figure4; gain rises with the name
    assert made[2] == both("0001", "0004", "0006")  # figure6
    assert made[3] == both("0001", "0002")  # figure8: lowest held-out
    assert made[4] == [f"SwinIR: {n}" for n in ("0001", "0003", "0004", "0006")]  # crops
    assert [len(made[i]) for i in (6, 7)] == [2, 4]  # figures 3 and 5
    assert {p.name for p in (tmp_path / "results").glob("crops*")} == {"crops_SwinIR.png",
                                                                       "crops_RealESRGAN.png"}
    made.clear()
    main(parse_args(arguments(tmp_path, "--images", "0006", "0003", "0001")))
    assert made[1] == both("0006", "0003") and made[2] == both("0001")
    assert made[6] == both("0006") and made[7] == both("0003", "0001")


def test_what_is_missing_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(draw, "DPI", 30)
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
