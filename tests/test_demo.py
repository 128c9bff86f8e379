"""The demo: its data, Q and the judge, its networks, its steps, and what it makes of its tables."""

import csv
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import analyze_iqa
import evaluate
import finetune_lora
import train_sr
from demo import data, quality, report, run
from demo.nets import start_as_interpolation
from models.checkpoint import read_csv, save_atomic, write_csv
from models.hggt import load_sets
from models.settings import ema_checkpoint
from models.testset import find_realsr
from paper import user_study
from train_sr import PRESETS

ROOT = Path(__file__).resolve().parent.parent
SEED, LIMIT = 3, 2
TRAIN, TEST, VAL = "HGGT", "HGGT/Test/GT/Test-100", "HGGT-val/Test/GT/Test-100"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Two sets per split."""
    out = tmp_path_factory.mktemp("demo") / "seed3"
    data.write_demo(out, SEED, limit=LIMIT)
    return out


@pytest.fixture(scope="module")
def pool():
    """12 versions of three drawings, 96 pixels wide."""
    kinds = ("leaves", "letters", "mixed")
    images = [data.drawing(kind, data.rng_of(kind))[:96, :96] for kind in kinds]
    return quality.make_pool(images, 12, 0, "pool")


# Data


@pytest.mark.parametrize(("split", "root"), [("train", TRAIN), ("test", TEST), ("val", VAL)])
def test_labels_read_back_as_drawn(demo, split, root):
    sets = load_sets(demo / root)
    assert len(sets.names) == LIMIT
    expected = {s.name: s for s in data.make_split(split, SEED, LIMIT)}
    for name, paths, labels, size in zip(
        sets.names, sets.paths, sets.labels, sets.sizes, strict=True
    ):
        drawn = expected[name]
        assert labels.tolist() == [0, *drawn.labels]
        assert [Path(path).parent.name for path in paths] == list(data.MODELS)
        for path, gt in zip(paths, drawn.gts, strict=True):
            assert np.array_equal(np.asarray(Image.open(path)), gt)
        assert size.tolist() == [192, 192]


def test_json_is_hggts_format(demo):
    name = data.make_split("train", SEED, 1)[0].name
    (path,) = (demo / "HGGT/Train/labels").glob(f"*/B/{name}.json")
    assert path.parts[-3] == f"0-{LIMIT}"
    record = json.loads(path.read_text())
    assert list(record) == [f"Picture_{k}" for k in range(1, 6)] + ["Time_cost"]
    assert record["Picture_1"] == {"Name": f"{name}.png", "File": "original", "Label": None}
    assert record["Picture_5"]["Name"] == f"{name}_04.png"
    assert record["Picture_5"]["File"] == "04"
    assert record["Picture_5"]["Label"] in ("Positive", "Similar", "Negative")


def test_majority_of_three_raters():
    votes = np.array([[1, 1, 1, 0, -1], [1, 0, -1, 0, -1], [-1, -1, 0, 1, 1]])
    assert data.majority(votes).tolist() == [1, 0, 0, 0, -1]


def test_lq_and_pristine_belong_to_the_sets(demo):
    for split, top in (("test", "HGGT"), ("val", "HGGT-val")):
        lq = demo / top / "Test/Blind_Degradation_Benchmark_LQ/Test-100/Blind_LR"
        sets = load_sets(demo / top / "Test/GT/Test-100")
        for name, paths in zip(sets.names, sets.paths, strict=True):
            image = Image.open(lq / f"{name}.png")
            assert (image.size, image.mode) == ((48, 48), "RGB")
            enlarged = np.asarray(image.resize((192, 192)), float)
            gt = np.asarray(Image.open(paths[0]), float)
            assert np.corrcoef(enlarged.ravel(), gt.ravel())[0, 1] > 0.8
            assert (demo / "pristine" / split / f"{name}.png").is_file()


def test_cameras_are_in_realsr_layout(demo):
    sets, lq, problems = find_realsr(demo / "RealSR(V3)")
    assert sets.names == ["Canon/Test/4/chelsea0", "Nikon/Test/4/chelsea1"]
    assert problems == []
    original = demo / "HGGT/Test/GT/Test-100/images/original/chelsea0.png"
    assert Path(sets.paths[0][0]).read_bytes() == original.read_bytes()


def test_simulated_votes_prefer_the_pristine_and_are_accepted(demo, tmp_path):
    pristine = demo / "pristine/test"
    for name, sigma in (("A", 0.0), ("B", 1.5)):
        for path in pristine.glob("*.png"):
            x = data.to_float(Image.open(path))
            x = data.blur(x, sigma) if sigma else x
            data.save_png(data.to_uint8(x), tmp_path / name / path.name)
    study, votes = tmp_path / "study", tmp_path / "votes"
    args = user_study.parse_args([
        "make", "--a", f"A={tmp_path / 'A'}", "--b", f"B={tmp_path / 'B'}", "--pairs", "2",
        "--raters", "3", "--out", str(study)])
    args.main(args)
    report.simulate_votes(study, tmp_path, pristine, votes)
    key = json.loads((study / "key.json").read_text())
    for path in votes.iterdir():
        rater, cast = user_study.read_votes(str(path), key)
        sides = {pair["id"]: pair["left"] for pair in key["plan"][rater]["pairs"]}
        assert all((v["choice"] == "left") == (sides[v["id"]] == "a") for v in cast)
    assert len(list(votes.iterdir())) == 3


def test_training_logs_are_compared_with_the_reference(tmp_path, capsys):
    for row, header, rows in (("AMO", "step,l_pix,share_0,share_1", ["10,0.5,1,0", "20,0.4,1,0"]),
                              ("stage1", "step,l_pix,share_0", ["10,0.9,1"])):
        (tmp_path / "a" / row).mkdir(parents=True)
        (tmp_path / "a" / row / "log.csv").write_text("\n".join([header, *rows]) + "\n")
    reference = str(tmp_path / "reference.csv")
    report.main(report.parse_args(["--logs", str(tmp_path / "a"), "--out", reference]))
    lines = Path(reference).read_text().splitlines()
    assert lines[0].startswith("# ") and "torch" in lines[0]
    assert lines[1:] == ["run,step,l_pix,share_0,share_1", "AMO,10,0.5,1,0", "AMO,20,0.4,1,0",
                         "stage1,10,0.9,1,"]
    report.compare_logs(tmp_path / "a", Path(reference))
    assert capsys.readouterr().out == f"  training logs: 2 of 2 equal to {reference}\n"
    log = tmp_path / "a/AMO/log.csv"
    log.write_text(log.read_text().replace("20,0.4", "20,0.41"))
    (tmp_path / "a/stage1/log.csv").unlink()
    report.compare_logs(tmp_path / "a", Path(reference))
    assert capsys.readouterr().out.splitlines() == [
        "  AMO: differs from step 20 on; last l_pix 0.41, reference 0.4", "  stage1: no log",
        f"  training logs: 0 of 2 equal to {reference}"]
    log.write_text(log.read_text().rsplit("20,", 1)[0])
    report.compare_logs(tmp_path / "a", Path(reference))
    assert "AMO: other length; last l_pix 0.5, reference 0.4" in capsys.readouterr().out


def test_splits_share_no_image(demo):
    splits = ("train", "val", "test")
    names = {s: {p.stem for p in (demo / "pristine" / s).iterdir()} for s in splits}
    assert {len(v) for v in names.values()} == {LIMIT}
    assert not names["train"] & names["val"]
    photos, test_photos = set(data.TRAIN_PHOTOS), set(data.TEST_PHOTOS)
    assert not photos & test_photos
    assert not (photos | test_photos) & set(data.DRAWN["train"])  # a name would occur twice
    streams = [data.rng_of(SEED, split, "leaves0").integers(2**32) for split in names]
    assert len(set(streams)) == 3


@pytest.mark.parametrize("split", ["train", "test"])
def test_manifest(demo, split):
    path = demo / "SBS180K" / f"{split}.csv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image1", "image2", "score", "model1", "model2"]
    assert len(rows) == 10 * LIMIT
    for row in rows:
        for k in "12":
            assert (path.parent / row[f"image{k}"]).resolve().is_file()
            assert f"/{row[f'model{k}']}/" in row[f"image{k}"]
        assert float(row["score"]) * 20 in range(21)  # halves of ten raters
    models = [frozenset((row["model1"], row["model2"])) for row in rows]
    assert {models.count(pair) for pair in models} == {LIMIT}


def test_scores_follow_the_raters(tmp_path, monkeypatch):
    """Clear preference for the second image is 1, for the first 0; an unseen difference 0.5."""
    drawn = data.make_split("train", SEED, 1)[0]
    drawn.utility = np.array([0, 5, 5, -5, -10.0])
    monkeypatch.setattr(data, "RATER_NOISE", 0.0)
    data.write_pairs([drawn], "images", tmp_path / "pairs.csv", "train", SEED)
    utility = dict(zip(data.MODELS, drawn.utility, strict=True))
    with open(tmp_path / "pairs.csv", newline="") as file:
        for row in csv.DictReader(file):
            difference = utility[row["model2"]] - utility[row["model1"]]
            assert float(row["score"]) == (np.sign(difference) + 1) / 2


def test_raters_like_restoration_and_dislike_noise_and_blur():
    hidden = data.drawing("leaves", data.rng_of("raters"))
    original = data.blur(hidden, 1.0)
    grainy = data.add_noise(original, 0.05, data.rng_of("grain"))
    gts = [original, data.unsharp(original, 1.1, 1.0), data.blur(original, 1.5), grainy]
    utility = data.utilities(gts, hidden)
    assert utility[0] == 0
    assert utility[1] > data.THRESHOLD
    assert utility[2] < -data.THRESHOLD
    assert utility[3] < -data.THRESHOLD


def test_enhancement_is_uneven_in_regions():
    """Strength runs from almost none to a little more than all, slowly over the image."""
    flat = np.zeros((data.SIZE, data.SIZE, 3), np.float32)
    strength = data.uneven(flat, flat + 0.5, data.rng_of("field"))[..., 0] / 0.5
    assert 0 <= strength.min() < 0.2 and 1 < strength.max() <= 1.2 + 1e-6
    assert np.abs(np.diff(strength, axis=0)).max() < 0.15
    quarters = strength.reshape(4, 48, 4, 48).mean((1, 3))
    assert quarters.std() > 0.1  # a patch of 64 pixels sees mostly one region


def test_sharpening_makes_up_for_blur_until_enough():
    values = [quality.sharpened(0.5, amount, enough=2) for amount in (0, 1, 2, 3.5, 5)]
    assert values[0] == 0.5 and values[0] < values[1] < values[2] > values[3] > values[4]
    assert quality.sharpened(1.0, 6.0, enough=2) == pytest.approx(0.2)  # 1 - 0.8


def test_same_seed_same_bytes_other_seed_other_bytes(demo, tmp_path):
    """A run in another process, with other hashes of strings and fewer sets, writes the same."""
    out = tmp_path / "again"
    code = f"from demo.data import write_demo; write_demo({str(out)!r}, {SEED}, limit=1)"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    files = [path.relative_to(out) for path in out.rglob("*.png")]
    assert len(files) == 3 * 6 + 4  # members, pristine; LQ of test and val; a camera's pair
    for file in files:
        same = Path(str(file).replace("0-1", f"0-{LIMIT}"))  # Train's range folder
        assert (out / file).read_bytes() == (demo / same).read_bytes()

    ours, other = (data.make_split("test", seed, 1)[0] for seed in (SEED, SEED + 1))
    assert ours.name == other.name
    assert not np.array_equal(ours.hidden, other.hidden)
    assert not np.array_equal(ours.gts[0], other.gts[0])


def test_existing_folder_is_kept_or_refused(demo, capsys):
    stamp = (demo / "settings.json").stat().st_mtime_ns
    data.write_demo(demo, SEED, limit=LIMIT)
    assert "already there" in capsys.readouterr().out
    with pytest.raises(ValueError, match="seed3: exists, .*--out"):
        data.write_demo(demo, SEED + 1, limit=LIMIT)
    assert (demo / "settings.json").stat().st_mtime_ns == stamp


def test_photographs_are_those_of_the_installed_package():
    crops = data.photo_crops("retina", 0.4, 3, 0)
    assert [crop.shape for crop in crops] == [(192, 192, 3)] * 3
    with pytest.raises(FileNotFoundError, match="no_such_photo.*scikit-image"):
        data.photo_crops("no_such_photo", 1.0, 1, 0)


# Q and the judge


@pytest.mark.parametrize("make", quality.NETS.values())
def test_net_shape_bounds_gradient(make):
    torch.manual_seed(0)
    net = make().eval()
    for size in ((32, 32), (33, 47), (96, 64)):
        x = torch.rand(2, 3, *size, requires_grad=True)
        score = net(x)
        assert score.shape == (2,) and score.dtype == torch.float32
        assert ((score > 0) & (score < 100)).all()
        (gradient,) = torch.autograd.grad(score.sum(), x)
        assert gradient.isfinite().all() and gradient.abs().max() > 0
        torch.testing.assert_close(net(x[:1])[0], score[0])  # an image's score is its own
    flat = torch.full((1, 3, 32, 32), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(flat).sum(), flat)
    assert gradient.isfinite().all()  # the judge divides by local contrast


@pytest.mark.parametrize("make", quality.NETS.values())
def test_a_strip_counts_only_by_its_area(make):
    """Two halves scored apart give the whole, but for the seam: the score is a local mean."""
    torch.manual_seed(0)
    net = make().eval()
    left, right = torch.rand(1, 3, 64, 512), torch.zeros(1, 3, 64, 512)
    with torch.no_grad():
        whole = net(torch.cat([left, right], 3))
        halves = (net(left) + net(right)) / 2
        assert abs(net(left) - net(right)) > 10 * abs(whole - halves)


def test_folded_batch_norms_change_nothing():
    torch.manual_seed(0)
    net = quality.QNet(norm=True)
    for _ in range(3):
        net(torch.rand(4, 3, 64, 64))  # moves the running statistics
    x = torch.rand(2, 3, 48, 48)
    expected = net.eval()(x)
    net.fold()
    torch.testing.assert_close(net.train()(x), expected, rtol=1e-4, atol=1e-4)
    assert net.state_dict().keys() == quality.QNet().state_dict().keys()


def test_degradations_lower_the_quality(pool):
    versions, qualities = pool
    assert versions.shape == (3, 12, 96, 96, 3) and versions.dtype == np.uint8
    assert (qualities[:, 0] == 1).all()
    assert (qualities >= 0).all() and (qualities <= 1).all() and qualities.std() > 0.1
    rng = np.random.default_rng(0)
    images = [quality.degrade(versions[0, 0] / np.float32(255), rng)[0] for _ in range(40)]
    assert all(x.dtype == np.float32 and x.min() >= 0 and x.max() <= 1 for x in images)


def test_ranking_loss_by_hand():
    """0.9 against 0.1 wants a gap of 0.4, against 0.08 one of 0.41; 0.1 and 0.08 are too close."""
    score, truth = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.9, 0.1, 0.08])
    expected = ((0.4 - 0.1) + (0.41 - 0.2)) / 2
    assert quality.ranking_loss(score, truth, 3).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("which", ["q", "judge"])
def test_twenty_steps_reduce_the_loss(which, tmp_path):
    sharp = data.drawing("leaves", data.rng_of("steps"))[:96, :96]
    versions = [data.to_uint8(data.blur(sharp, sigma)) for sigma in (0.1, 0.8, 1.6, 2.6)]
    versions, qualities = np.stack(versions)[None], np.array([[1, 0.6, 0.35, 0.05]], np.float32)
    net, losses = quality.train(which, versions, qualities, steps=20, seed=0)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    save_atomic(net.state_dict(), tmp_path / "net.pt")
    loaded = getattr(quality, which)(str(tmp_path / "net.pt"))
    x = torch.rand(1, 3, 40, 40)
    torch.testing.assert_close(loaded(x), net(x), rtol=1e-4, atol=1e-4)


def test_training_is_repeatable(pool):
    (first, _), (second, _) = (quality.train("judge", *pool, steps=3, seed=5) for _ in range(2))
    other, _ = quality.train("judge", *pool, steps=3, seed=6)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    assert not torch.equal(first.head[0].weight, other.head[0].weight)


def test_pair_accuracy_by_hand():
    class Brightness(torch.nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3))

    images = np.stack([np.full((4, 4, 3), v, np.uint8) for v in (10, 20, 30)])[None]
    truth = np.array([[0.2, 0.9, 0.5]], np.float32)  # of three pairs, 20 against 30 is wrong
    assert quality.pair_accuracy(Brightness(), images, truth) == pytest.approx(2 / 3)


def test_bad_weights_give_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^missing.pt: no such file; .*--which q"):
        quality.q("missing.pt")
    with pytest.raises(ValueError, match="demo.quality:judge needs weights"):
        quality.judge()
    save_atomic(quality.QNet().state_dict(), tmp_path / "q.pt")
    with pytest.raises(ValueError, match="q.pt: not the weights of judge") as error:
        quality.judge(str(tmp_path / "q.pt"))
    assert "\n" not in str(error.value)


def test_script_without_data_exits_2(tmp_path):
    command = [sys.executable, "-m", "demo.quality", "--data", str(tmp_path / "nothing")]
    command += ["--which", "q", "--out", str(tmp_path / "q.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("demo.quality: ") and done.stderr.count("\n") == 1
    assert "demo.data --out" in done.stderr
    assert not (tmp_path / "q.pt").exists()


# The networks


@pytest.mark.parametrize("name", ["swinir_tiny", "rrdb_tiny"])
def test_demo_nets_start_as_interpolation(name):
    torch.manual_seed(0)
    net, x = start_as_interpolation(PRESETS[name]["build"]()), torch.rand(1, 3, 16, 16)
    taps = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel, y = torch.outer(taps, taps).expand(3, 1, 3, 3), x
    for _ in range(2):
        y = F.conv2d(F.interpolate(y, scale_factor=2), kernel, padding=1, groups=3)
    assert (net(x) - y)[..., 8:-8, 8:-8].abs().max() < 1e-5  # borders: zero padding by colour mean
    net(x).mean().backward()
    assert net.conv_first.weight.grad.abs().sum() > 0


# Orderings


ROWS = ("OrigsOnly", "Rand", "UPos", "SMP", "SMA", "AMO", "UPos+FT", "AMO+FT")


def test_orderings_say_held_and_not_held():
    def row(q):
        return {"q": q, "judge": q, "psnr": 50 - q, "psnr_original": 50 - q}

    means = {r: row(q) for r, q in zip(ROWS, range(10, 18), strict=True)}
    outcome = {name: o for _, name, o, _ in report.orderings(means)}
    assert set(outcome.values()) == {"held"}
    means["SMA"]["q"], means["AMO+FT"]["q"] = 11.5, 15.0
    outcome = {name: o for _, name, o, _ in report.orderings(means)}
    assert [n for n, o in outcome.items() if o != "held"] == ["Q rises", "AMO+FT has the highest Q"]


def test_table_over_seeds(tmp_path, capsys):
    """Two seeds of two images; on the second seed SMA's Q falls below UPos's."""
    folders = {0: tmp_path / "demo", 7: tmp_path / "demo-swinir-seed7"}
    for seed, folder in folders.items():
        lines = [["Gold Standard", "a", 99, 99, "", ""]]
        for k, row in enumerate(ROWS):
            q = 10 + k + seed if (row, seed) != ("SMA", 7) else 18.5
            lines += [[f"SwinIR-{row}", name, q + d, q + d, 50 - q - d, 50 - q - d]
                      for name, d in (("a", -1), ("b", 1))]
        write_csv(folder / "table5_per_image.csv",
                  ["model", "image", "q", "judge", "psnr", "psnr_original"], lines, [f"of {seed}"])
        report.write_orderings(folder)
    report.seeds_table(folders, tmp_path / "seeds.csv")
    table, notes = read_csv(tmp_path / "seeds.csv")
    first = table[0]
    assert (first["ordering"], first["held"]) == ("Q rises", "1 of 2")
    assert (first["seed_0"], first["seed_7"]) == ("held", "not held")
    assert notes == ["seed 0: of 0", "seed 7: of 7"]
    means, _ = read_csv(tmp_path / "seeds_means.csv")
    assert [row["row"] for row in means] == list(ROWS)
    assert (means[0]["q"], means[0]["q_sd"], means[0]["psnr"]) == ("13.50", "3.50", "36.50")
    out = capsys.readouterr().out
    assert "warning: Q rises: not held: OrigsOnly 17.00 < Rand 18.00 < UPos 19.00 < SMA 18" in out
    assert "  Q rises: held on 1 of 2" in out


# The steps


PARSERS = {"analyze_iqa.py": analyze_iqa, "train_sr.py": train_sr, "evaluate.py": evaluate,
           "finetune_lora.py": finetune_lora}


def parsed(step):
    """The flags of a step, parsed by its own program."""
    words = step.command.split()
    if words[0] == "-m":
        return importlib.import_module(words[1]).parse_args(words[2:])
    return PARSERS[words[0]].parse_args(words[1:])


@pytest.mark.parametrize("all_rows", [False, True])
@pytest.mark.parametrize("net", ["swinir", "rrdb"])
def test_every_step_is_accepted_and_comes_after_what_it_reads(net, all_rows):
    demo = run.Demo(net, 3, all_rows)
    steps = {step.name: step for step in demo.steps()}
    assert len(steps) == len(demo.steps())
    args = {name: parsed(step) for name, step in steps.items()}

    def before(name):
        return set(steps[name].after).union(*map(before, steps[name].after))

    for name, flags in args.items():
        if name in ("analysis", "figures"):  # they write many files into the results' folder
            continue
        path = re.escape(str(getattr(flags, "export", None) or flags.out))
        for reader, step in steps.items():
            if reader != name and re.search(rf"{path}(?![\w.+,-])", step.command):
                unused = (name, reader) == ("q", "stage1")  # its --iqa chooses nothing
                assert unused or name in before(reader), (name, reader)
    assert {"analysis", "table5", "table8", "equal_table"} <= before("figures")
    assert "table5" in before("study")
    for name in demo.rows:
        a = args[name]
        assert (a.net, a.seed, a.tau) == (f"{net}_tiny", 3, 10.0 if "+FT" in name else 3.0)
        assert a.sampler == name.split("+")[0].lower().replace("origs", "origs_")
        assert a.steps == (60 if "+FT" in name else 200) and a.perceptual == "laplacian"
    assert args["stage1"].steps == 400 and args["stage1"].lambda_p == args["stage1"].lambda_a == 0
    assert args["data"].setting == PRESETS[f"{net}_tiny"]["degradation"]
    assert args["AMO+FT_Q0"].lambda_q == 0 and args["AMO+FT"].lambda_q == 0.001
    assert args["AMO+FT_full"].full and args["AMO+FT_full"].lr == 1e-4
    assert [m.split("=")[0] for m in args["table5"].models] == [
        f"{demo.label}-{row}" for row in demo.rows]
    assert [m.split("=")[0] for m in args["lora_curve"].models] == ["0", "0.5", "1", "1.5"]


def test_all_rows_are_those_of_table_7():
    table = read_csv(Path(ROOT / "paper/table7.csv"))[0]
    paper = {row["model"].removeprefix("SwinIR-"): row for row in table
             if row["model"].startswith("SwinIR-")}
    rows = {step.name: parsed(step) for step in run.Demo("swinir", 0, True).steps()
            if step.name in paper}
    assert set(rows) == set(paper)
    for name, args in rows.items():
        if "+FT" in name:
            assert args.lambda_a == float(paper[name]["lambda_a"])
            metric = {"-": 0, "musiq": "demo.quality:q", "paq2piq": "demo.quality:judge"}
            assert (args.lambda_q and args.iqa[0].split("@")[0]) == metric[paper[name]["nr_metric"]]
            assert bool(args.init_d) == (args.lambda_a > 0)
            # The demo's Table 7 names the demo's own quality models
            settings = ema_checkpoint({}, args)["settings"]
            metric = {"-": "-", "musiq": "q", "paq2piq": "judge"}[paper[name]["nr_metric"]]
            assert evaluate.setting_cells(settings) == [
                metric, paper[name]["lambda_a"], paper[name]["no_human_labels"]]
    few = [row for row in run.Demo("swinir", 0, False).rows]
    assert few == [*report.CHAIN[:3], "SMA", "SMP", "AMO", "UPos+FT", "AMO+FT", "AMO+FT_Q0",
                   "AMO+FT_full"]


def test_folders_of_the_demo():
    for net, seed, results in (("swinir", 0, "demo"), ("rrdb", 0, "demo-rrdb-seed0"),
                               ("swinir", 2, "demo-swinir-seed2")):
        demo = run.Demo(net, seed, False)
        assert str(demo.results) == f"results/{results}"
        assert str(demo.data) == f"datasets/demo/{net}-seed{seed}"
        assert str(demo.runs) == f"runs/demo/{net}-seed{seed}"


@pytest.mark.parametrize("flags", [["--net", "vgg"], ["--seeds", "x"], ["--seeds"], ["--al"]])
def test_wrong_flags_of_the_demo(flags):
    with pytest.raises(SystemExit, match="2"):
        run.parse_args(flags)


def script(folder, name, text):
    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_steps_run_side_by_side_in_the_order_of_their_needs(tmp_path, capfd):
    """Two at a time; each writes when it began and ended, and what it sees of the environment."""
    child = script(tmp_path, "child", """
        import os, sys, time
        begin = time.time()
        print(os.environ["OMP_NUM_THREADS"], repr(os.environ["CUDA_VISIBLE_DEVICES"]), sys.argv[1])
        print("to the log", file=sys.stderr)
        time.sleep(0.3)
        open(sys.argv[1], "w").write(f"{begin} {time.time()}")
        """)
    (tmp_path / "there").touch()
    steps = [run.Step("last", ("a", "b", "skipped"), f"{child} {tmp_path}/last.txt", shown=True),
             run.Step("skipped", (), "no_such_file.py", makes=tmp_path / "there"),
             *(run.Step(n, (), f"{child} {tmp_path}/{n}.txt") for n in "abc")]
    run.run_steps(steps, tmp_path, 2)
    times = {n: [float(x) for x in (tmp_path / f"{n}.txt").read_text().split()]
             for n in ("a", "b", "c", "last")}
    assert times["a"][0] < times["b"][1] and times["b"][0] < times["a"][1]  # side by side
    assert times["c"][0] > min(times["a"][1], times["b"][1])  # there is no third at a time
    assert times["last"][0] > max(times["a"][1], times["b"][1])
    assert (tmp_path / "a.log").read_text() == f"1 '' {tmp_path}/a.txt\nto the log\n" or (
        tmp_path / "a.log").read_text() == f"to the log\n1 '' {tmp_path}/a.txt\n"
    assert (tmp_path / "last.log").read_text() == "to the log\n"
    out = capfd.readouterr().out
    assert f"1 '' {tmp_path}/last.txt\n" in out and "a.txt" not in out
    assert sorted(line.split()[0] for line in out.splitlines() if line.endswith(" s")) == [
        "a", "b", "c", "last"]


def test_a_step_that_fails_stops_the_others_and_shows_the_end_of_its_log(tmp_path, capfd):
    slow = script(tmp_path, "slow", "import time; time.sleep(60)")
    bad = script(tmp_path, "bad", "import sys; print(*range(9), sep='\\n'); sys.exit(3)")
    begin = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        run.run_steps([run.Step("slow", (), slow), run.Step("bad", (), bad),
                       run.Step("never", ("bad",), slow)], tmp_path, 2)
    assert stopped.value.code == 1 and time.monotonic() - begin < 30
    assert capfd.readouterr().err.splitlines() == [
        *"45678", f"demo.run: bad failed; see {tmp_path}/bad.log"]
    assert not (tmp_path / "never.log").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_steps(tmp_path, number):
    """The step saves on SIGTERM; its own child ends as well; the demo's exit code is 130."""
    child = script(tmp_path, "child", """
        import signal, subprocess, sys, time
        def save(*_):
            open("saved", "w").close()
            sys.exit(0)
        signal.signal(signal.SIGTERM, save)
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open("started", "w").write(str(grandchild.pid))
        time.sleep(60)
        """)
    main = script(tmp_path, "main", f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import signal
        from demo import run
        from models.distributed import clean_exit
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" ignores it
        run.Demo.steps = lambda self: [run.Step("child", (), {child!r})]
        with clean_exit("demo.run"):
            run.main(run.parse_args(["--seeds", "5", "6"]))
        """)
    process = subprocess.Popen([sys.executable, main], cwd=tmp_path, stderr=subprocess.PIPE,
                               text=True)
    while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert error == "demo.run: stopped; rerun the same command to resume\n"
    assert (tmp_path / "saved").exists()
    grandchild = Path("/proc", (tmp_path / "started").read_text(), "stat")
    assert not grandchild.exists() or grandchild.read_text().split()[2] == "Z"
    assert not (tmp_path / "runs/demo/swinir-seed6").exists()


@pytest.mark.slow
def test_a_row_trains_from_stage_one_by_its_own_commands(demo, tmp_path, monkeypatch, capfd):
    """The first weights, stage one and AMO of the real step list, two steps each, on two sets."""
    monkeypatch.chdir(tmp_path)
    for name in ("train_sr.py", "models", "demo"):
        Path(name).symlink_to(ROOT / name)
    few = run.Demo("rrdb", 0, False)
    few.data.parent.mkdir(parents=True)
    subprocess.run(["cp", "-r", demo, few.data], check=True)
    for kind in ("images", "labels"):
        (few.data / f"HGGT/Train/{kind}/0-{LIMIT}").rename(few.data / f"HGGT/Train/{kind}/0-40")
    few.runs.mkdir(parents=True)
    save_atomic(quality.QNet().state_dict(), few.runs / "q.pt")
    for name in ("STAGE_ONE", "STAGE_TWO"):
        monkeypatch.setattr(run, name, getattr(run, name) + " --steps 2 --batch-size 2")
    steps = {step.name: step for step in few.steps()}
    run.run_steps([steps["start"]._replace(after=()), steps["stage1"],
                   steps["AMO"]._replace(after=("stage1",))], few.runs, 2)
    for name in ("stage1", "AMO"):
        assert (few.runs / name / "net_g_ema.pt").is_file()
        assert "net_g_ema.pt" in (few.runs / f"{name}.log").read_text()
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()] == [
        "start", "stage1", "AMO"]
