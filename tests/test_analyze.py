"""analyze_iqa.py: the tables on hand-made pairs and sets, the score cache, the script itself."""

import csv
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from make_data import make_hggt
from PIL import Image
from scipy.stats import spearmanr
from scripts import ROOT, run_script

import analyze_iqa
from analyze_iqa import (
    METRICS,
    Pairs,
    accuracies,
    accuracy,
    bootstrap,
    draw_phase1,
    judged,
    main,
    parse_args,
    parse_metric,
    read_pairs,
    separated_positives,
    set_columns,
    set_measures,
    verdicts,
)
from models import scores
from models.iqa import load_iqa
from models.metrics import split_pairs
from models.scores import Scores, cache_stem

# Paper, Table 6.
PAPER_TABLE6 = {
    "paq2piq": 76.41, "nima": 74.91, "musiq": 74.47, "liqe": 74.03, "arniqa-tid": 74.03,
    "qalign": 73.77, "topiq_nr": 73.06, "hyperiqa": 72.27, "arniqa-kadid": 71.48,
    "liqe_mix": 71.48, "arniqa-flive": 71.30, "topiq_nr-spaq": 71.30, "arniqa-csiq": 71.21,
    "musiq-spaq": 70.86, "nima-vgg16-ava": 70.77, "maniqa": 70.51, "clipiqa+": 70.25,
    "maniqa-kadid": 70.16, "tres": 69.98, "clipiqa+_vitL14_512": 69.98, "musiq-paq2piq": 69.98,
    "maniqa-pipal": 69.63, "clipiqa+_rn50_512": 69.10, "dbcnn": 68.49, "clipiqa": 68.40,
    "arniqa-live": 68.05, "arniqa-clive": 66.81, "arniqa-spaq": 66.73, "arniqa": 66.46,
    "musiq-ava": 66.37, "nrqm": 65.05, "cnniqa": 63.73, "tres-flive": 63.29, "pi": 62.41,
    "brisque_matlab": 61.00, "wadiqam_nr": 60.30, "topiq_nr-flive": 58.19, "ilniqe": 57.92,
    "niqe": 56.43, "brisque": 55.11, "niqe_matlab": 51.94, "piqe": 46.21,
}  # fmt: skip
OWN_METRICS = """
import os
import torch

class Metric(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        if "CALLS" in os.environ:
            with open(os.environ["CALLS"], "a") as file:
                file.write("x" * len(x))
        return self.function(x)

def large_only(x):
    if x.shape[-1] < 32:
        raise RuntimeError("image too small")
    return x.mean((1, 2, 3))

def mean(weights=None): return Metric(lambda x: x.mean((1, 2, 3)))
def dark(weights=None): return Metric(lambda x: -x.mean((1, 2, 3)))
def same(weights=None): return Metric(lambda x: torch.ones(len(x)))
def contrast(weights=None): return Metric(lambda x: x.std((1, 2, 3)))
def large(weights=None): return Metric(large_only)
def nan(weights=None): return Metric(lambda x: torch.full((len(x),), torch.nan))
def single(weights=None): return Metric(lambda x: x.mean((1, 2, 3)) if len(x) == 1 else 1 / 0)
def no_weights(weights=None): raise OSError("weights are missing")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with the module `own_metrics` of the metrics above, importable."""
    (tmp_path / "own_metrics.py").write_text(OWN_METRICS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_metrics", raising=False)
    return tmp_path


def save_grey(path: Path, level: int, side: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(level).integers(-3, 4, (side, side, 3))
    Image.fromarray((noise + level).astype(np.uint8)).save(path)


def write_manifest(folder: Path, name: str = "train.csv") -> Path:
    """Twelve pairs of images of grey level 20, 40, ..., 200, three of each of four comparisons.

    Two are ties. The brighter image is preferred in seven of the other ten.
    """
    for i in range(10):
        save_grey(folder / "images" / f"{i}.png", 20 + 20 * i)
    pairs = [  # first, second, score (second preferred), models
        (0, 1, 0.9, "AB"), (2, 3, 0.6, "BA"), (5, 4, 0.1, "AB"),  # brighter, 3 times
        (6, 7, 0.5, "AC"), (8, 9, 1.0, "CA"), (9, 0, 0.0, "AC"),  # tie, brighter twice
        (1, 5, 0.2, "BC"), (7, 3, 0.8, "BC"), (2, 8, 0.4, "CB"),  # darker, 3 times
        (3, 6, 0.5, "DA"), (0, 9, 0.7, "AD"), (4, 2, 0.45, "AD"),  # tie, brighter twice
    ]  # fmt: skip
    path = folder / name
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image1", "image2", "score", "model1", "model2"])
        for first, second, score, models in pairs:
            rows.writerow([f"images/{first}.png", f"images/{second}.png", score, *models])
    return path


def read_table(path: Path) -> tuple[list[str], dict[str, dict]]:
    """Column names, and {pyiqa_name: row} of a written table."""
    with open(path, newline="") as file:
        table = csv.DictReader(line for line in file if not line.startswith("#"))
        return list(table.fieldnames), {row["pyiqa_name"]: row for row in table}


# ------------------------------------------------------------------------- the tables' maths


def test_verdicts_accuracy_and_ties_by_hand():
    q1 = np.array([1.0, 1.0, 2.0, 2.0, 1.0, 1.0, np.nan, 3.0])
    q2 = np.array([2.0, 2.0, 1.0, 1.0, 1.0, 2.0, 2.0, np.nan])
    score = np.array([0.9, 0.2, 0.4, 0.51, 0.8, 0.5, 0.7, 0.5])
    # hit, miss, hit, miss, equal quality = miss, raters tie, failed image, both
    found = verdicts(q1, q2, score)
    assert found.tolist() == [1, 0, 1, 0, 0, -1, -1, -1]
    assert accuracy(found) == 40.0
    assert np.isnan(accuracy(found[5:]))


def test_accuracies_count_scored_ties_and_failures():
    keys = np.array(list("abcdef"), object)
    pairs = Pairs(keys, keys[::-1], np.array([0.9, 0.1, 0.5, 0.5, 0.3, 0.7]))
    up = Scores(dict(zip("abcdef", range(6), strict=True)), 1.0)  # second is better in the first 3
    partial = Scores({k: v for k, v in up.quality.items() if k != "f"}, 1.0)  # pairs 1 and 6 fail
    found = accuracies(pairs, {"up": up, "partial": partial}, seed=0, prefix="test_")
    up, partial = found["up"], found["partial"]
    assert [up[f"test_{k}"] for k in ("scored", "ties", "failures")] == [4, 2, 0]
    assert up["test_accuracy_percent"] == 50.0  # hit, miss, -, -, hit, miss
    assert [partial[f"test_{k}"] for k in ("scored", "ties", "failures")] == [2, 2, 2]
    assert partial["test_accuracy_percent"] == 50.0  # miss, hit
    assert up["test_ci_low"] <= 50 <= up["test_ci_high"]


def test_table3_is_accuracy_where_the_reference_fails():
    keys = np.array(["a", "b", "c", "d"], object)
    pairs = Pairs(keys, keys[[1, 2, 3, 0]], np.array([0.8, 0.2, 0.5, 0.9]))
    reference = Scores({"a": 1, "b": 2, "c": 3, "d": 4}, 0.0)  # hit, miss, tie, miss
    other = Scores({"a": 5, "b": 4, "c": 3, "d": 6}, 0.0)  # miss, hit, -, miss
    failed = pairs.take(judged(reference, pairs) == 0)
    assert failed.image1.tolist() == ["b", "d"]
    found = accuracies(failed, {"other": other}, seed=0)["other"]
    assert found["accuracy_percent"] == 50.0 and found["scored"] == 2 and found["ties"] == 0


def test_phase1_draws_three_of_each_comparison_whatever_the_order():
    models = [("x", "y")] * 5 + [("y", "x")] * 5 + [("x", "z")] * 2 + [("z", "y")] * 40
    drawn = draw_phase1(models, len(models), seed=0)
    assert len(set(drawn.tolist())) == len(drawn) == 3 + 2 + 3
    assert [(drawn < 10).sum(), ((drawn >= 10) & (drawn < 12)).sum()] == [3, 2]
    assert np.array_equal(drawn, draw_phase1(models, len(models), seed=0))
    assert any(not np.array_equal(drawn, draw_phase1(models, len(models), s)) for s in range(1, 4))
    # 404 comparisons of the paper give its 1,212 pairs; without models 1,212 are drawn as well.
    many = [(f"m{i % 404}", "base") for i in range(4040)]
    assert len(draw_phase1(many, len(many), seed=0)) == 1212
    assert len(np.unique(draw_phase1(None, 4040, seed=0))) == 1212
    assert draw_phase1(None, 7, seed=0).tolist() == list(range(7))


def test_phase1_recovers_planted_ties():
    """Every comparison has 3 pairs, 76 of the 1,212 are ties: the paper's 1,136 remain."""
    rng = np.random.default_rng(0)
    score = np.full(1212, 0.8)
    score[rng.choice(1212, 76, replace=False)] = 0.5
    models = [(f"m{i // 3}", "base") for i in range(1212)]
    drawn = draw_phase1(models, 1212, seed=3)
    quality2 = np.where(np.arange(1212) % 4 == 0, -1.0, 1.0)
    found = verdicts(np.zeros(1212), quality2, score)[drawn]
    kept = score != 0.5
    assert (found >= 0).sum() == 1136 and (found < 0).sum() == 76
    assert (found == 1).sum() == (quality2[kept] > 0).sum()


def test_paper_table6_is_k_of_1136():
    assert tuple(PAPER_TABLE6) == METRICS

    def fits(n: int) -> bool:
        values = PAPER_TABLE6.values()
        return all(f"{100 * round(a * n / 100) / n:.2f}" == f"{a:.2f}" for a in values)

    assert [n for n in range(42, 1213) if fits(n)] == [1136]


def test_bootstrap_interval():
    rng = np.random.default_rng(0)
    widths = []
    for n in (100, 1600):
        verdict = (rng.random((2, n)) < [[0.7], [0.4]]).astype(np.int8)
        verdict[:, :10] = -1
        intervals = bootstrap(verdict, seed=1)
        for v, (low, high) in zip(verdict, intervals, strict=True):
            assert low < accuracy(v) < high
        p = accuracy(verdict[0]) / 100
        expected = 100 * 2 * 1.96 * np.sqrt(p * (1 - p) / (n - 10))  # normal approximation
        assert intervals[0, 1] - intervals[0, 0] == pytest.approx(expected, rel=0.12)
        widths.append(intervals[0, 1] - intervals[0, 0])
        assert np.array_equal(intervals, bootstrap(verdict, seed=1))
    assert widths[1] < widths[0] / 3  # 4 by theory
    # The same pairs for all metrics: copies get equal intervals, and a metric that is right exactly
    # where another is wrong gets the mirrored one.
    v = (rng.random(200) < 0.6).astype(np.int8)
    same, copy, opposite = bootstrap(np.stack([v, v, 1 - v]), seed=0)
    assert np.array_equal(same, copy) and np.allclose(opposite, 100 - same[::-1])
    assert np.isnan(bootstrap(np.full((2, 5), -1, np.int8), seed=0)).all()


def test_table4_by_hand_in_both_readings():
    labels = np.array([
        [0, 1, 0, -1, -1],
        [0, 1, 1, 1, -1],
        [0, -1, -1, -1, -1],
    ])  # fmt: skip
    quality = np.array([
        [3.0, 4.0, 5.0, 1.0, 2.0],  # positive 4 below similar 5; negatives below all similar
        [2.0, 5.0, 4.0, 3.0, 1.0],  # in perfect order
        [1.0, 2.0, 3.0, 4.0, 5.0],  # negatives above the original
    ])  # fmt: skip
    found = set_measures(quality, labels)
    assert found["pm"] == pytest.approx(1 / 3) and found["nm"] == pytest.approx(1 / 3)
    rho = [spearmanr(q, v).statistic for q, v in zip(quality, labels, strict=True)]
    assert found["src"] == pytest.approx(np.mean(rho)) and found["src_sets"] == 3
    # By hand, third set: labels rank 5, 2.5 x 4; quality rank 1..5: -5/sqrt(10 * 5)
    assert rho[2] == pytest.approx(-5 / np.sqrt(50))
    enhanced = set_measures(quality[:, 1:], labels[:, 1:])
    assert enhanced["pm"] == pytest.approx(1 / 3) and enhanced["nm"] == 0
    assert enhanced["src_sets"] == 2  # all four negative: no correlation
    assert enhanced["src"] == pytest.approx(
        np.mean([spearmanr(quality[i, 1:], labels[i, 1:]).statistic for i in (0, 1)])
    )
    equal = set_measures(np.ones((2, 5)), labels[:2])  # equal is neither above nor below
    assert equal["pm"] == equal["nm"] == equal["src_sets"] == 0 and np.isnan(equal["src"])


def test_section_7_1_by_hand_and_sets_that_failed():
    labels = np.array([[0, 1, -1, 0, 1], [0, -1, 1, 1, 1], [0, 1, 1, 1, -1], [0, -1, 0, 0, 0]])
    quality = np.array([[1.0, 2, 9, 3, 4], [5, 1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, np.nan, 0, 0]])
    found = set_columns(quality, labels, n_sets=50)
    assert found["negative_percent"] == 8.0  # 4 of 50
    assert found["negative_highest_percent"] == pytest.approx(200 / 3)  # of the three scored
    assert found["overall_percent"] == pytest.approx(8 * 2 / 3)
    assert (found["sets"], found["failures"]) == (3, 1)
    nothing = set_columns(np.empty((0, 5)), np.empty((0, 5), int), n_sets=50)
    assert nothing["negative_percent"] == 0 and np.isnan(nothing["overall_percent"])


def test_positives_furthest_apart_by_hand():
    nan = np.nan
    quality = np.array([[9.0, 1, 5, 3, 0], [9, 2, 8, 1, 7], [0, 1, nan, 3, 4], [1, 2, 3, 4, 5]])
    labels = np.array([[0, 1, 1, 1, -1], [0, 1, -1, 0, 1], [0, 1, 1, 0, -1], [1, 0, 1, 1, -1]])
    # differences 4, 5, none (one scored positive is left), and 3: members 0, 2 and 3 of the last
    assert separated_positives(quality, labels) == [(1, 1, 4), (0, 1, 2), (3, 0, 3)]


def test_metric_names(own):
    weights = own / "q=1.pt"
    weights.write_bytes(b"one")
    alias = parse_metric(f"q=own_metrics:mean@{weights}")
    assert alias[:2] == ("q", f"own_metrics:mean@{weights}")
    stem = cache_stem(alias.spec)
    weights.write_bytes(b"two")
    assert cache_stem(alias.spec) != stem  # other weights, another cache
    assert parse_metric("clipiqa+_vitL14_512") == ("clipiqa+_vitL14_512",) * 2
    assert parse_metric(f"musiq@{weights}")[:2] == ("musiq", f"musiq@{weights}")
    for bad in ("own_metrics:absent", "no.such.module:f", "musiq@absent.pth"):
        with pytest.raises((ValueError, OSError), match=f"--metrics {bad}: "):
            parse_metric(bad)


# ------------------------------------------------------------------------- the script


def run(own: Path, *flags: str, processes: int = 0) -> subprocess.CompletedProcess:
    return run_script("analyze_iqa.py", *flags, processes=processes, PYTHONPATH=own)


def test_end_to_end(own):
    train = write_manifest(own / "SBS")
    labels = make_hggt(own / "HGGT", n=6, size=32)
    result = run(own, "--pairs", train, "--pairs-test", train, "--sets", own / "HGGT",
                 "--out", own / "out", "--reference", "bright", "--metrics",
                 "bright=own_metrics:mean", "own_metrics:dark", "own_metrics:same", "piqe",
                 "own_metrics:no_weights", "contrast=own_metrics:contrast")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("weights are missing") == 1  # named once, not tried in phase II
    strict = run(own, "--pairs", train, "--out", own / "strict", "--reference", "bright",
                 "--metrics", "bright=own_metrics:mean", "own_metrics:no_weights", "--require-all")
    assert strict.returncode == 2 and not list((own / "strict").glob("*.csv"))
    assert "metric own_metrics:no_weights: not scored, see above" in strict.stderr

    columns, table6 = read_table(own / "out/table6.csv")
    assert columns[:2] == ["pyiqa_name", "accuracy_percent"]
    accuracy6 = {name: row["accuracy_percent"] for name, row in table6.items()}
    assert accuracy6["bright"] == "70.00" and accuracy6["own_metrics:dark"] == "30.00"
    assert accuracy6["own_metrics:same"] == "0.00"  # equal quality is a miss
    assert accuracy6["own_metrics:no_weights"] == "" == table6["own_metrics:no_weights"]["scored"]
    assert 0 <= float(accuracy6["piqe"]) <= 100
    sorted_by = [float(a) for a in accuracy6.values() if a]
    assert sorted_by == sorted(sorted_by, reverse=True) and list(accuracy6.values())[-1] == ""
    row = table6["bright"]
    assert [row[k] for k in ("scored", "ties", "failures")] == ["10", "2", "0"]
    assert float(row["ci_low"]) < 70 < float(row["ci_high"]) and float(row["seconds"]) >= 0

    columns, table1 = read_table(own / "out/table1.csv")
    assert columns[:3] == ["metric", "pyiqa_name", "accuracy_percent"]
    assert list(table1) == list(table6)[:5]
    columns, table2 = read_table(own / "out/table2.csv")
    split = ["train_accuracy_percent", "test_accuracy_percent"]
    assert columns[:4] == ["metric", "pyiqa_name", *split]
    assert [table2["own_metrics:dark"][c] for c in split] == ["30.00", "30.00"]
    columns, table3 = read_table(own / "out/table3.csv")
    assert columns[:4] == ["metric", "pyiqa_name", *split] and "bright" not in table3
    assert table3["own_metrics:dark"]["train_accuracy_percent"] == "100.00"
    row = table3["own_metrics:dark"]
    assert [row[f"train_{k}"] for k in ("scored", "ties", "failures")] == ["3", "0", "0"]

    columns, table4 = read_table(own / "out/table4.csv")
    assert columns[:5] == ["metric", "pyiqa_name", "src", "pm", "nm"]
    row = table4["contrast"]  # member k has the k-th highest contrast (make_hggt)
    assert labels[:3].tolist() == [[0, 1, 0, -1, 1], [0, 1, -1, 1, 0], [0, 1, 1, 0, -1]]
    assert (row["pm"], row["nm"], row["sets"]) == ("1.0000", "1.0000", "6")
    assert (row["pm_enhanced"], row["nm_enhanced"]) == ("1.0000", "0.6667")
    rho = np.mean([spearmanr(range(5), v).statistic for v in labels])
    assert float(row["src"]) == pytest.approx(rho, abs=1e-4)
    seven = ("negative_percent", "negative_highest_percent", "overall_percent")
    assert [row[k] for k in seven] == ["100.0000", "33.3333", "33.3333"]
    assert "Section 7.1: 100.0 % of the sets have a negative; bright" in result.stdout

    lines = (own / "out/figure2.csv").read_text().splitlines()
    assert lines[1] == "# quality: bright"
    assert lines[3] == "# weights of bright: none" and "pyiqa 0." in lines[4]
    rows = [line.split(",") for line in lines[6:]]
    assert lines[5] == "set,image1,image2,quality1,quality2,difference"
    assert len(rows) == 6 and all((ROOT / image).is_file() for r in rows for image in r[1:3])
    gaps = [float(row[5]) for row in rows]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 0
    assert gaps[0] == pytest.approx(float(rows[0][4]) - float(rows[0][3]), abs=2e-4)

    notes = (own / "out/table6.csv").read_text().split("pyiqa_name,")[0]
    assert "12 of the 12 pairs" in notes and "3 of each of 4 comparisons" in notes
    assert "seed 0" in notes and "bright = own_metrics:mean" in notes and "pyiqa 0." in notes
    images = (own / f"out/scores/piqe-pyiqa{version('pyiqa')}.csv").read_text().splitlines()
    assert len(images) == 1 + 10 + 30
    assert sum("SBS/images/0.png" in line for line in images) == 1


def test_phases_and_sets_together_decode_and_score_an_image_once(own, monkeypatch):
    train = write_manifest(own / "SBS")  # 10 images of 32 px in 12 pairs
    make_hggt(own / "HGGT", n=6, size=48)
    read, batched, decoded, batches = scores.read_or_error, scores.score_batch, [], []
    monkeypatch.setattr(scores, "read_or_error", lambda p: decoded.append(p) or read(p))

    def score_batch(net, batch, device):
        batches.append([image.shape[0] for image in batch])
        return batched(net, batch, device)

    monkeypatch.setattr(scores, "score_batch", score_batch)
    main(parse_args(["--pairs", str(train), "--pairs-test", str(train), "--sets",
                     str(own / "HGGT"), "--out", str(own / "out"), "--metrics", "own_metrics:mean",
                     "--reference", "own_metrics:mean", "--batch-size", "8"]))
    assert len(decoded) == len(set(decoded)) == 10 + 30
    assert batches == [[32] * 8, [32] * 2, [48] * 8, [48] * 8, [48] * 8, [48] * 6]


def test_two_processes_give_the_same_tables(own, monkeypatch):
    """Eleven images, so that the shares are uneven, and one on which only one rank fails."""
    train = write_manifest(own / "SBS")
    save_grey(own / "SBS/images/10.png", 77, side=16)
    with open(train, "a") as file:
        file.write("images/10.png,images/3.png,0.9,A,B\n")
    flags = ["--pairs", train, "--reference", "large", "--batch-size", "2", "--metrics",
             "bright=own_metrics:mean", "large=own_metrics:large", "own_metrics:no_weights"]
    together = run(own, *flags, "--out", own / "two", processes=2)
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("large: 1 of") == 2  # in each phase, by one rank only
    shards = sorted((own / "two/scores").glob("own_metrics-mean*.csv"))
    rows = [len(shard.read_text().splitlines()) - 1 for shard in shards]
    assert len(rows) == 2 and sum(rows) == 11 and min(rows) == 5  # each image once, shared evenly
    main(parse_args([*map(str, flags), "--out", str(own / "one")]))
    for name in ("table1", "table2", "table3", "table6"):
        columns, one = read_table(own / f"one/{name}.csv")
        assert columns == read_table(own / f"two/{name}.csv")[0]
        for row in (one, two := read_table(own / f"two/{name}.csv")[1]):
            for cells in row.values():
                cells.pop("seconds", None)
        assert one == two and one
    # One process resumes from the files of both ranks: it tries only the failed image again.
    calls = own / "calls"
    monkeypatch.setenv("CALLS", str(calls))
    main(parse_args([*map(str, flags), "--out", str(own / "two")]))
    assert len(calls.read_text()) == 2  # once in each phase


def test_manifest_of_other_names_without_models(own, capsys):
    folder = own / "other"
    write_manifest(folder)
    text = (folder / "train.csv").read_text().splitlines()
    rows = [line.split(",")[:3] for line in text[1:]]
    manifest = folder / "sub" / "own.csv"  # paths that leave the manifest's folder are fine
    manifest.parent.mkdir()
    manifest.write_text("# a note\nvotes,right,left\n"
                        + "".join(f"{s},../{b},../{a}\n" for a, b, s in rows))
    flags = ["--columns", "image1=left", "image2=right", "score=votes", "--reference", "b",
             "--metrics", "b=own_metrics:mean"]
    main(parse_args(["--pairs", str(manifest), *flags, "--out", str(own / "a")]))
    assert read_table(own / "a/table6.csv")[1]["b"]["accuracy_percent"] == "70.00"
    assert "drawn uniformly" in (own / "a/table6.csv").read_text()
    # Swapped columns: the other image is preferred.
    flags[1:3] = ["image1=right", "image2=left"]
    main(parse_args(["--pairs-test", str(manifest), *flags, "--out", str(own / "b")]))
    assert read_table(own / "b/table2.csv")[1]["b"]["test_accuracy_percent"] == "30.00"
    assert not (own / "b/table6.csv").exists()


def test_data_folders_of_the_same_name_do_not_share_scores(own):
    train, test = write_manifest(own / "a/SBS"), write_manifest(own / "b/SBS")
    for i in range(10):  # the darker of two images in a/ is the brighter one here
        save_grey(own / "b/SBS/images" / f"{i}.png", 200 - 20 * i)
    main(parse_args(["--pairs", str(train), "--pairs-test", str(test), "--reference", "b",
                     "--metrics", "b=own_metrics:mean", "--out", str(own / "out")]))
    row = read_table(own / "out/table2.csv")[1]["b"]
    assert (row["train_accuracy_percent"], row["test_accuracy_percent"]) == ("70.00", "30.00")


def test_bad_manifests_are_refused_before_scoring(own, monkeypatch):
    def never(*args):
        raise AssertionError("scored")

    monkeypatch.setattr(analyze_iqa, "score_images", never)
    good = write_manifest(own / "SBS")
    lines = good.read_text().splitlines()
    flags = ["--metrics", "b=own_metrics:mean", "--reference", "b", "--out", str(own / "out")]
    cases = {
        "no such manifest": None,
        "no column score in": [lines[0].replace("score", "votes"), *lines[1:]],
        "no column model2 in": [lines[0].replace(",model2", ""), *lines[1:]],
        "no pairs": lines[:1],
        r"1 problems: pair 2: score 'x' is not in \[0, 1\]$":
            [*lines[:2], "images/1.png,images/2.png,x"],
        r"score '1.5' is not in \[0, 1\]": [lines[0], "images/1.png,images/2.png,1.5,A,B"],
        r"score 'nan' is not in \[0, 1\]": [lines[0], "images/1.png,images/2.png,nan,A,B"],
        "score None is not": [lines[0], "images/1.png,images/2.png"],
        "4 problems: pair 1: no image 'a.png'; pair 1: no image ''; pair 2: .*; ...$":
            [lines[0], "a.png,,0.5,A,B", "b.png,c.png,0.5,A,B"],
    }
    for message, text in cases.items():
        path = own / "SBS" / "bad.csv"
        if text:
            path.write_text("\n".join(text) + "\n")
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            main(parse_args(["--pairs", str(path), *flags]))
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    (own / "SBS/bad.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file in UTF-8"):
        read_pairs(str(own / "SBS/bad.csv"), {})


def test_bad_flags_are_refused(own):
    good = str(write_manifest(own / "SBS"))
    flat = own / "flat"
    save_grey(flat / "a.png", 9)
    metrics = ["--metrics", "b=own_metrics:mean", "--reference", "b"]
    cases = {
        "--columns": ["--pairs", good, *metrics, "--columns", "picture=a"],
        "nothing to analyse": metrics,
        "--metrics piqe piqe: a name twice":
            ["--pairs", good, "--metrics", "piqe", "piqe", "--reference", "piqe"],
        "--reference musiq: not among b": ["--pairs", good, *metrics[:2]],
        "has no labels": ["--sets", str(flat), *metrics],
        "no such folder": ["--sets", str(own / "absent"), *metrics],
        "--metrics musik: pyiqa has no such metric": ["--pairs", good, "--metrics", "musik"],
        "--phase2-metrics musik: pyiqa has":
            ["--pairs", good, *metrics, "--phase2-metrics", "musik"],
        "--phase2-metrics b b: a name twice":
            ["--pairs", good, *metrics, "--phase2-metrics", *metrics[1:2], *metrics[1:2]],
    }
    for message, flags in cases.items():
        with pytest.raises((ValueError, OSError), match=message):
            main(parse_args([*flags, "--out", str(own / "out")]))
    assert not (own / "out").exists()


def test_one_line_and_exit_code_2(own):
    good = write_manifest(own / "SBS")
    metrics = ["--metrics", "own_metrics:no_weights", "--reference", "own_metrics:no_weights"]
    result = run(own, "--pairs", good, *metrics, "--out", own / "out")
    assert result.returncode == 2
    assert result.stderr == ("analyze_iqa.py: no metric could be scored; "
                             "the reasons are printed above\n")
    assert result.stdout == ("own_metrics:no_weights: 10 of 10 images not scored: "
                             "weights are missing\n")


# ------------------------------------------------------------------------- the score cache


def score(name, images, folder):
    return scores.score_images(name, lambda: load_iqa(name, "cpu"), images, folder)


def test_each_image_is_scored_once_and_an_interrupted_run_resumes(own, monkeypatch):
    calls = own / "calls"
    monkeypatch.setenv("CALLS", str(calls))
    images = {}
    for i, side in enumerate((32, 24, 32, 32, 40, 24)):
        save_grey(own / f"{i}, image.png", 20 * i + 10, side)  # the comma needs quoting
        images[f"data/{i}, image.png"] = str(own / f"{i}, image.png")
    metric = "own_metrics:mean"
    first = score(metric, images, own)
    assert len(calls.read_text()) == 6
    for i in range(6):
        mean = np.asarray(Image.open(own / f"{i}, image.png")).mean() / 255
        assert first.quality[f"data/{i}, image.png"] == pytest.approx(mean, rel=1e-6)
    assert score(metric, images, own) == first  # nothing is scored, seconds are kept
    assert len(calls.read_text()) == 6
    # A kill cut the last line within its quality: that image alone is scored again.
    cache = own / "own_metrics-mean.csv"
    whole = cache.read_text()
    last = whole.rstrip("\n").rsplit("\n", 1)[1]
    cache.write_text(whole[: whole.rindex(last)] + last[: last.rindex(",") - 3])
    assert score(metric, images, own).quality == first.quality
    assert len(calls.read_text()) == 7
    assert score(metric, images, own).quality == first.quality
    assert len(calls.read_text()) == 7
    # Another file under the same name (its size tells) is scored anew.
    save_grey(own / "0, image.png", 200, side=48)
    again = score(metric, images, own)
    assert len(calls.read_text()) == 8
    assert again.quality["data/0, image.png"] > 0.7


def test_names_in_a_manifest_or_a_flag_write_nothing_outside_the_output(tmp_path):
    for name in ("..", ".", "../../evil", "a\\b", "a\nb", ""):
        with pytest.raises(ValueError, match="without a slash"):
            split_pairs([f"{name}=x.pt"], "--models")
    inner = tmp_path / "a/b/SBS"
    inner.mkdir(parents=True)
    for k, name in enumerate(("evil.png", "other.png")):
        Image.new("RGB", (32, 32), (90 * k, 80, 70)).save(tmp_path / "a" / name)
    pairs = inner / "pairs.csv"
    pairs.write_text("image1,image2,score,model1,model2\n"
                     "../../evil.png,../../other.png,0.9,../../evil,<script>\n")
    before = set(tmp_path.rglob("*"))
    metric = "..evil=models.iqa:random_musiq"
    main(parse_args([
        "--pairs", str(pairs), "--metrics", metric, "--reference", "..evil",
        "--out", str(tmp_path / "out")]))
    new = set(tmp_path.rglob("*")) - before
    assert (tmp_path / "out/table6.csv") in new
    assert all(p.is_relative_to(tmp_path / "out") for p in new)
