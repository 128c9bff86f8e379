"""run_all.sh: the plan of the paper, and the checks and the environment before it starts."""

import csv
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from make_data import make_hggt
from PIL import Image

import analyze_iqa
import evaluate
import finetune_lora
import train_sr
from models.checkpoint import save_atomic
from models.discriminator import UNetDiscriminatorSN
from models.iqa import MetricUnavailable, RefusedFile
from tools import check, environment

ROOT = Path(__file__).resolve().parent.parent
TRAINING = {"train_sr.py": train_sr.parse_args, "finetune_lora.py": finetune_lora.parse_args}


def run_all(*arguments, cwd=ROOT, **env):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(["bash", "run_all.sh", *arguments], cwd=cwd, capture_output=True,
                          text=True, timeout=120, env=os.environ | {"PATH": path} | env)


def paper_plan(**env):
    """{step: its command as a list} of a dry run; None for a step that is finished."""
    result = run_all("paper", DRY="1", **env)
    assert result.returncode == 0, result.stderr
    plan = {}
    for line in result.stdout.splitlines():
        if line.startswith("# "):
            step = line.split()[1]
            plan[step] = None
        else:
            plan[step] = shlex.split(line)
    return plan


def split_command(command):
    """(name of the script or module, its flags) of a command."""
    at = next(i for i, word in enumerate(command) if word.endswith(".py") or "paper." in word)
    return command[at], command[at + 1 :]


@pytest.fixture
def copy(tmp_path):
    """A folder with run_all.sh and nothing else."""
    shutil.copy(ROOT / "run_all.sh", tmp_path)
    return tmp_path


def finish(folder, *rows):
    for row in rows:
        (folder / row).mkdir(parents=True)
        (folder / row / "net_g_ema.pt").touch()


# The plan


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [(["dmeo"], {}, "unknown command dmeo"),
     (["paper", "--dry-run"], {}, "paper --dry-run: unknown"),
     (["paper"], {"SEED": "x"}, "SEED=x: not a number"),
     ([], {"NET": "rrdb"}, "NET= is for the paper; see: python -m demo.run"),
     (["demo"], {"SEED": "3"}, "SEED= is for"), ([], {"DRY": "1"}, "DRY= is for"),
     (["photos"], {"SEED": "3"}, "SEED= is for the paper; see: python -m tools.tune"),
     (["demo"], {"ONLY": "x"}, "ONLY= is for"), (["photos"], {"DRY": "1"}, "DRY= is for"),
     (["paper"], {"GPUS": "four"}, "GPUS=four"),
     (["paper"], {"ONLY": "SwinIR-AM"}, "ONLY=SwinIR-AM matches no step"),
     (["paper"], {"ONLY": "table5"}, "table5: no row is trained yet"),
     (["paper"], {"ONLY": "table8"}, "table8: no row of it is trained yet"),
     (["demo", "--al"], {}, "unrecognized arguments: --al")],
)
def test_run_all_refuses_bad_input(arguments, env, message):
    result = run_all(*arguments, **env)
    assert result.returncode == 2 and message in result.stderr
    assert "Traceback" not in result.stderr


ALONE = ("figures", "study", "report", "SwinIR-AMO+FT_full_eq", "RealESRGAN-AMO+FT_full_eq")


def test_paper_plan_holds_every_row_with_the_papers_settings():
    plan, earlier, rows = paper_plan(), set(), {}
    for step, command in plan.items():
        script, flags = split_command(command)
        if script in TRAINING:
            rows[step] = TRAINING[script](flags)
            assert step.endswith("-stage1") or rows[step].init in earlier, step
            assert rows[step].out == f"runs/{step}" and rows[step].seed == 0
            earlier.add(f"{rows[step].out}/net_g_ema.pt")
        elif script == "evaluate.py":
            args = evaluate.parse_args(flags)
            made = [m.split("=")[1] for m in args.models]
            counts = {"table5": 28, "table8": 8, "equal": 2}
            assert set(made) <= earlier and len(made) == counts[step]
            assert args.require_all and args.out == f"results/paper/{step}.csv"
        elif script == "analyze_iqa.py":
            args = analyze_iqa.parse_args(flags)
            assert step == "analysis" and args.require_all
            assert (args.pairs, args.sets) == ("datasets/SBS180K/train.csv", "datasets/HGGT")
        else:
            assert step in ALONE
            args = importlib.import_module(script).parse_args(flags)
            if step.endswith("_eq"):
                assert {str(args.base), str(args.naive), str(args.lora)} <= earlier
                earlier.add(str(args.out))
    launched = [c[:3] for s, c in plan.items() if s not in ALONE]
    assert set(map(tuple, launched)) == {("torchrun", "--standalone", "--nproc_per_node=4")}
    assert list(plan)[0] == "analysis" and list(plan)[-6:] == [
        "table5", "table8", "equal", "study", "figures", "report"]
    tables = {}
    for number in (5, 7):
        with open(ROOT / f"paper/table{number}.csv", newline="") as file:
            tables[number] = list(csv.DictReader(x for x in file if not x.startswith("#")))
        models = {row["model"] for row in tables[number]} - {"Gold Standard"}
        assert models <= set(rows), models - set(rows)
    for row in tables[7]:
        if "+FT" in row["model"]:  # NNR: no reward; else its metric and lambda_A stand in Table 7
            args = rows[row["model"]]
            assert args.lambda_a == float(row["lambda_a"])
            assert (args.iqa if args.lambda_q else ["-"]) == [row["nr_metric"]]
            assert bool(args.init_d) == (args.lambda_a > 0) and args.steps == 20_000
    assert rows["SwinIR-AMO+FT"].lambda_q == 0.05 and rows["RealESRGAN-UPos+FT_HP"].lambda_p > 1
    assert [s for s, a in rows.items() if getattr(a, "full", False)] == [
        "SwinIR-AMO+FT_full", "RealESRGAN-AMO+FT_full"]
    for step, args in rows.items():
        assert args.net == ("swinir" if step.startswith("SwinIR") else "rrdb")
        assert args.data == ("datasets/DF2K_OST" if "stage1" in step else "datasets/HGGT")
        if args.sampler:
            assert step.split("-")[1].split("+")[0].lower() == args.sampler.replace("_", "").lower()
        else:
            assert step.endswith("-stage1") and args.lambda_p == args.lambda_a == 0
    (table8,) = (evaluate.parse_args(split_command(plan["table8"])[1]).models,)
    with open(ROOT / "paper/table8.csv", newline="") as file:
        names = [row["model"] for row in csv.DictReader(x for x in file if not x.startswith("#"))]
    assert [model.split("=")[0] for model in table8] == names


def test_hours_in_the_head_are_those_of_the_rows():
    """23 and 32 hours per training, 3.5 per fine-tuning, on four GPUs (paper, Sec. 8.2)."""
    hours = 0.0
    for step, command in paper_plan().items():
        if "train_sr.py" in command:
            hours += 23 if step.startswith("SwinIR") else 32
        elif "finetune_lora.py" in command:
            hours += 3.5
    head = (ROOT / "run_all.sh").read_text().split("set -euo")[0]
    assert f"= {hours:g} h" in head and f"{4 * hours:,.0f} GPU hours" in head


def test_only_picks_steps_by_pattern(copy):
    finish(copy / "runs", "SwinIR-stage1")
    assert list(paper_plan(cwd=copy, ONLY="SwinIR-AMO*")) == [
        "SwinIR-AMO", "SwinIR-AMO+FT", "SwinIR-AMO+FT_full", "SwinIR-AMO+FT_full_eq"]
    assert list(paper_plan(cwd=copy, ONLY="@(analysis|figures|SwinIR-UPos)")) == [
        "analysis", "SwinIR-UPos", "figures"]


def test_a_row_without_what_it_starts_from_names_the_row_to_run_first(copy):
    for only, missing in (("RealESRGAN-UPos+FT_IG", "RealESRGAN-UPos"),
                          ("SwinIR-SMA", "SwinIR-stage1")):
        result = run_all("paper", cwd=copy, DRY="1", ONLY=only)
        assert result.returncode == 2 and result.stdout == ""
        assert f"{only} starts from runs/{missing}/net_g_ema.pt" in result.stderr
        assert f"first run ONLY={missing}" in result.stderr
    finish(copy / "runs", "RealESRGAN-UPos")
    result = run_all("paper", cwd=copy, DRY="1", ONLY="RealESRGAN-UPos+FT_IG")  # --init-d
    assert result.returncode == 2 and "runs/RealESRGAN-UPos/last.pt" in result.stderr


def test_finished_rows_are_skipped_and_are_in_the_tables(copy):
    finish(copy / "runs", "RealESRGAN-stage1", "RealESRGAN-UPos")
    plan = paper_plan(cwd=copy, ONLY="@(RealESRGAN-@(stage1|UPos|SMA)|table*|report)")
    assert plan.pop("RealESRGAN-stage1") is plan.pop("RealESRGAN-UPos") is None
    assert list(plan) == ["RealESRGAN-SMA", "table5", "table8", "report"]
    models = {step: evaluate.parse_args(split_command(plan[step])[1]).models
              for step in ("table5", "table8")}
    upos = "RealESRGAN-UPos=runs/RealESRGAN-UPos/net_g_ema.pt"
    assert models["table8"] == [upos]
    assert models["table5"] == [upos, "RealESRGAN-SMA=runs/RealESRGAN-SMA/net_g_ema.pt"]
    assert plan["report"][-2:] == ["--models", "RealESRGAN-UPos"]
    for made in ("results/paper/figure2.csv", "results/paper/study/key.json"):
        (copy / made).parent.mkdir(parents=True, exist_ok=True)
        (copy / made).touch()
    assert paper_plan(cwd=copy, ONLY="@(analysis|study)") == {"analysis": None, "study": None}


def test_a_seed_has_its_own_folders(copy):
    finish(copy / "runs", "SwinIR-stage1")  # of seed 0
    result = run_all("paper", cwd=copy, DRY="1", SEED="2", ONLY="SwinIR-AMO")
    assert result.returncode == 2 and "runs/seed2/SwinIR-stage1" in result.stderr
    for step, command in paper_plan(cwd=copy, SEED="2").items():
        script, flags = split_command(command)
        assert not re.search(r"runs/(?!seed2/)|results/(?!paper-seed2)", " ".join(flags)), step
        if script in TRAINING:
            args = TRAINING[script](flags)
            assert (args.seed, args.out) == (2, f"runs/seed2/{step}")


def test_variables_set_the_paths(copy):
    text = run_all("paper", cwd=copy, DRY="1", HGGT="a b", SBS180K="sbs", REALSR="R (V3)", GPUS="2",
                   DF2K_OST="df", SWINIR_INIT="s.pth", RRDB_INIT="r.pth").stdout
    lines = [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]
    words = {word for line in lines for word in line}
    assert {"a b", "sbs/train.csv", "R (V3)", "df", "s.pth", "r.pth", "--nproc_per_node=2",
            "a b/Test/GT/Test-100"} <= words
    assert "datasets" not in text and "weights/" not in text


STUB = """\
#!/usr/bin/env bash
# In the place of Python: notes its arguments, and makes what training makes
echo "$*" >>calls
case "$*" in
  *tools.check*) cat >plan; exit ${CHECK:-0} ;;
  *train_sr.py* | *finetune_lora.py*)
    [[ "$*" != *"${FAIL:-no row}" ]] || exit ${CODE:-1}
    mkdir -p "${@: -1}" && touch "${@: -1}/net_g_ema.pt" ;;
  *paper.equal*) touch "${@: -1}" ;;
esac
"""


@pytest.fixture
def stubbed(copy):
    """run_all.sh beside an environment.py that gives it a stub in the place of Python."""
    (copy / "python").write_text(STUB)
    (copy / "python").chmod(0o755)
    (copy / "tools").mkdir()
    (copy / "tools/environment.py").write_text(f"print({str(copy / 'python')!r})")
    return copy


def test_the_plan_is_checked_and_then_run(stubbed):
    result = run_all("paper", cwd=stubbed, ONLY="@(SwinIR-stage1|SwinIR-AMO*|figures)")
    assert result.returncode == 0, result.stderr
    calls = (stubbed / "calls").read_text().splitlines()
    assert [next(w for w in c.split() if w.endswith(".py") or w.startswith(("tools.", "paper.")))
            for c in calls] == ["tools.check", "train_sr.py", "train_sr.py", "finetune_lora.py",
                                "finetune_lora.py", "paper.equal", "paper.figures"]
    assert calls[1].startswith("-m torch.distributed.run --standalone --nproc_per_node=4 train_sr")
    printed = [x for x in result.stdout.splitlines() if not x.startswith("#")]
    checked = [x for x in (stubbed / "plan").read_text().splitlines() if not x.startswith("#")]
    assert printed == checked and len(checked) == 6
    again = run_all("paper", cwd=stubbed, ONLY="@(SwinIR-stage1|SwinIR-AMO*)")
    assert again.returncode == 0 and again.stdout.count(" is finished: runs/SwinIR-") == 5
    assert (stubbed / "calls").read_text().splitlines()[len(calls):] == ["-m tools.check --plan"]


def test_nothing_is_started_if_the_check_fails(stubbed):
    result = run_all("paper", cwd=stubbed, CHECK="2")
    assert result.returncode == 2 and "nothing was started" in result.stderr
    assert all(f"{name}=" in result.stderr for name in ("HGGT", "SBS180K", "REALSR", "DF2K_OST",
                                                        "SWINIR_INIT", "RRDB_INIT", "GPUS", "ONLY"))
    assert (stubbed / "calls").read_text() == "-m tools.check --plan\n"


@pytest.mark.parametrize("code", ["1", "0"])  # 0: stopped by a signal, without its result
def test_no_step_begins_after_one_that_did_not_finish(stubbed, code):
    result = run_all("paper", cwd=stubbed, ONLY="SwinIR-*", FAIL="runs/SwinIR-Rand", CODE=code)
    assert result.returncode == 1
    assert result.stderr == ("run_all.sh: SwinIR-Rand did not finish; rerun the same command to "
                             "resume\n")
    assert (stubbed / "calls").read_text().splitlines()[-1].endswith("runs/SwinIR-Rand")


# The check before the plan


@pytest.fixture
def ready(monkeypatch):
    """Four GPUs, room on the disk, and a record of the metrics whose weights are asked for."""
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(check.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
    monkeypatch.setattr(check, "prefetch", asked.append)
    return asked


def problems_of(*commands):
    return check.check_plan(check.read_plan(commands))


def tiny(path, net="swinir_tiny"):
    save_atomic({"params_ema": train_sr.PRESETS[net]["build"]().state_dict()}, path)
    return path


def test_the_whole_plan_is_read(ready):
    """Every command of the four scripts; every metric of the paper and VGG19 are asked for."""
    lines = run_all("paper", DRY="1").stdout.splitlines()
    commands = check.read_plan(lines)
    assert [c[0] for c in commands].count("train_sr.py") == 14 and len(commands) == 34
    assert {processes for *_, processes in commands} == {4}
    problems = check.check_plan(commands)
    assert {line.split(":")[0] for line in problems} == {
        "datasets/SBS180K/train.csv", "datasets/SBS180K/test.csv", "datasets/HGGT",
        "datasets/DF2K_OST", "datasets/HGGT/Test/GT/Test-100", "datasets/RealSR(V3)",
        "weights/swinir_psnr.pth", "weights/esrgan_psnr.pth"}
    assert len(problems) == 8 and set(ready) == {*analyze_iqa.METRICS, "paq2piq", "vgg19", "lpips",
                                                 "stlpips", "dists", "qalign"}
    assert len(ready) == len(set(ready))


def test_sound_data_and_weights_pass(ready, tmp_path, capsys):
    make_hggt(tmp_path / "hggt")
    make_hggt(tmp_path / "test", test=True)
    lq = tmp_path / "lq"
    lq.mkdir()
    for path in (tmp_path / "test/images/original").iterdir():
        Image.open(path).resize((16, 16)).save(lq / path.name)
    net = tiny(tmp_path / "net.pt")
    save_atomic({"net_d": UNetDiscriminatorSN(num_feat=8).state_dict()}, tmp_path / "last.pt")
    (tmp_path / "pairs.csv").touch()
    launch = "torchrun --standalone --nproc_per_node=4"
    data = f"--net swinir_tiny --data {tmp_path}/hggt"
    assert problems_of(
        "# a comment",
        f"{launch} analyze_iqa.py --pairs {tmp_path}/pairs.csv --sets {tmp_path}/hggt "
        "--metrics musiq x=models.iqa:random_musiq",
        f"{launch} train_sr.py {data} --init {net} --sampler upos --out {tmp_path}/runs/UPos",
        f"{launch} finetune_lora.py {data} --init {tmp_path}/runs/UPos/net_g_ema.pt --sampler upos "
        f"--init-d {tmp_path}/last.pt --lambda-a 0.1 --iqa paq2piq --out {tmp_path}/runs/FT",
        f"{launch} evaluate.py --models a=b.pt --gt {tmp_path}/test --lq {lq} --out t.csv "
        "--metrics psnr ssim lpips topiq",
        "python -m paper.figures --results absent",
    ) == []
    assert ready == ["musiq", "vgg19", "paq2piq", "lpips", "topiq_nr"]
    assert f"{tmp_path}/hggt: 4 sets" in capsys.readouterr().out


def test_all_problems_are_listed_at_once(ready, tmp_path, monkeypatch):
    def prefetch(name):
        raise OSError(f"no network\nfor {name}")

    monkeypatch.setattr(check, "prefetch", prefetch)
    monkeypatch.setattr(check.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**31))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    make_hggt(tmp_path / "hggt", test=True)
    shutil.rmtree(tmp_path / "hggt/labels")
    make_hggt(tmp_path / "test", test=True)
    (tmp_path / "lq").mkdir()
    for k, path in enumerate(sorted((tmp_path / "test/images/original").iterdir())[:3]):
        Image.open(path).resize((16 + k, 16)).save(tmp_path / "lq" / path.name)
    rrdb, swinir = tiny(tmp_path / "rrdb.pt", "rrdb_tiny"), tiny(tmp_path / "swinir.pt")
    realsr = tmp_path / "RealSR/Test"
    realsr.mkdir(parents=True)
    for name in ("a_HR.png", "a_LR4.png"):
        Image.new("RGB", (64, 64)).save(realsr / name)
    launch, data = "torchrun --nproc_per_node=3", f"--data {tmp_path}/hggt"
    problems = problems_of(
        f"{launch} analyze_iqa.py --pairs {tmp_path}/absent.csv --metrics musiq",
        f"{launch} train_sr.py --net swinir_tiny {data} --init {rrdb} --sampler upos --lambda-p 0",
        f"{launch} train_sr.py --net swinir_tiny {data} --init {rrdb} --sampler smp --lambda-p 0",
        f"{launch} train_sr.py --net swinir {data} --init {swinir} --sampler amo",
        f"{launch} train_sr.py --data nowhere --init none.pth --sampler rand --lambda-p 0",
        f"{launch} finetune_lora.py --net swinir_tiny {data} --init {swinir} --sampler rand "
        f"--init-d {swinir} --lambda-a 0.1 --lambda-p 0 --lambda-q 0",
        f"{launch} evaluate.py --models a=b.pt --gt {tmp_path}/test --lq {tmp_path}/lq --out t.csv "
        "--metrics psnr",
        f"{launch} evaluate.py --models a=b.pt --realsr {tmp_path}/RealSR --out t.csv "
        "--metrics psnr",
    )
    expected = [
        "GPUS=3: found 2, and each process needs one",
        "batch size 8 must be divisible by the 3 processes",
        "batch size 32 must be divisible", "2 GB free on this disk; about 7 GB",
        "absent.csv: no such file", "hggt: has no labels", "rrdb.pt: not a SwinIR",
        "swinir.pt: SwinIR of another size", "nowhere: no such folder", "none.pth: no such file",
        "swinir.pt: holds no discriminator", "img01.png: 17x16, but its GT is 64x64",
        "img02.png: 18x16", "img03.png: no such LQ image", "as large as its HR image",
        "musiq, vgg19: weights are missing and cannot be downloaded; on a machine with a network, "
        "run: python -m tools.prefetch musiq vgg19"]
    for text in expected:
        assert sum(text in line for line in problems) == 1, (text, problems)
    assert problems[-1] == expected[-1]
    assert len(problems) == len(expected) and not any("\n" in line for line in problems)


def test_missing_weights_share_a_line_and_other_problems_of_metrics_do_not(
    ready, tmp_path, monkeypatch
):
    package = MetricUnavailable("metric liqe: No module named 'clip';\npip install clip")
    package.__cause__ = ModuleNotFoundError("No module named 'clip'")
    raised = {"musiq": MetricUnavailable("metric musiq: no weights"), "liqe": package,
              "nima": RefusedFile("nima.pth: truncated"), "vgg19": FileNotFoundError("no VGG19")}

    def prefetch(name):
        raise raised[name]

    def load_metric(name, device):
        raise OSError("cannot be read")

    monkeypatch.setattr(check, "prefetch", prefetch)
    monkeypatch.setattr(check, "load_metric", load_metric)
    make_hggt(tmp_path / "hggt")
    net, pairs = tiny(tmp_path / "net.pt"), tmp_path / "pairs.csv"
    pairs.touch()
    assert problems_of(
        f"analyze_iqa.py --pairs {pairs} --metrics musiq liqe nima own=musiq@{pairs}",
        f"train_sr.py --net swinir_tiny --data {tmp_path}/hggt --init {net} --sampler rand",
    ) == [
        "liqe: metric liqe: No module named 'clip'; pip install clip",
        "nima: nima.pth: truncated",
        f"musiq@{pairs}: cannot be read",
        "musiq, vgg19: weights are missing and cannot be downloaded; on a machine with a network, "
        "run: python -m tools.prefetch musiq vgg19",
    ]


def test_a_plan_with_problems_exits_2_with_a_line_each(tmp_path):
    """As run_all.sh runs it: nothing of this machine fits the paper's stage one."""
    result = run_all("paper", ONLY="SwinIR-stage1", DF2K_OST=str(tmp_path / "none"),
                     SWINIR_INIT=str(tmp_path / "none.pth"), CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert "check.py: GPUS=4: found 0, and each process needs one" in lines
    assert any(line.startswith(f"check.py: {tmp_path}/none: no such folder") for line in lines)
    assert any(line.startswith(f"check.py: {tmp_path}/none.pth: no such file") for line in lines)
    assert "nothing was started" in lines[-1] and "Traceback" not in result.stderr


def test_one_data_folder_is_checked(tmp_path, capsys):
    make_hggt(tmp_path, test=True)
    check.main(check.parse_args(["--data", str(tmp_path)]))
    assert "4 sets of 5 images" in capsys.readouterr().out
    broken = tmp_path / "images/02/img01_02.png"
    data = bytearray(broken.read_bytes())
    data[60:90] = bytes(30)
    broken.write_bytes(data)
    with pytest.raises(ValueError, match="1 problems, listed above"):
        check.main(check.parse_args(["--data", str(tmp_path)]))
    assert f"{broken}: " in capsys.readouterr().out
    for arguments in ([], ["--plan", "--data", "x"]):
        with pytest.raises(SystemExit, match="2"):
            check.parse_args(arguments)


# The environment


def test_requirements_are_met_or_missing(tmp_path):
    inner, outer = tmp_path / "inner.txt", tmp_path / "outer.txt"
    inner.write_text("numpy>=1  # a comment\n\n# another\nno-wheel; python_version < '3.10'\n")
    outer.write_text("-r inner.txt\nno-such-package-at-all\nnumpy<1\n")
    assert list(environment.missing(inner)) == []
    assert list(environment.missing(outer)) == ["no-such-package-at-all", "numpy<1"]
    assert environment.meets(sys.executable, str(inner))
    assert not environment.meets(sys.executable, str(outer))


def test_an_old_python_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(environment, "OLDEST", (99, 0))
    monkeypatch.setattr(environment, "meets", lambda *_: False)
    with pytest.raises(SystemExit, match="2"):
        environment.prepare(tmp_path / "venv", "requirements.txt")
    assert f"{sys.executable} is too old" in capsys.readouterr().err


@pytest.mark.parametrize("headless", [True, False])
def test_a_new_environment_gets_the_requirements_and_the_headless_opencv(
    monkeypatch, capsys, tmp_path, headless
):
    installed, python = [], str(tmp_path / "venv/bin/python")
    (tmp_path / "venv").mkdir()

    def imports_opencv(which, quiet=False):
        return headless or len(installed) > 1

    monkeypatch.setattr(environment.subprocess, "run",
                        lambda *_, **__: SimpleNamespace(returncode=0))
    monkeypatch.setattr(environment, "meets", lambda *_: False)
    monkeypatch.setattr(environment, "imports_opencv", imports_opencv)
    monkeypatch.setattr(environment, "install", lambda *what: installed.append(what))
    monkeypatch.chdir(ROOT)
    environment.main("tests/requirements.txt", str(tmp_path / "venv"))
    said = capsys.readouterr()
    assert said.out == f"{python}\n"
    assert re.search(r"about 7 GB .*; \d+\.\d GB free\)", said.err)
    assert installed[0] == (python, "-r", "tests/requirements.txt")
    if headless:
        assert len(installed) == 1
    else:
        assert installed[1][:3] == (python, "--force-reinstall", "--no-deps")
        assert re.fullmatch(r"opencv-python-headless>=[\d.]+,<\d+", installed[1][3])


def test_the_current_python_is_taken_if_it_meets_the_requirements():
    result = subprocess.run([sys.executable, "tools/environment.py", "tests/requirements.txt"],
                            cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, f"{sys.executable}\n"), result.stderr


def test_a_python_whose_opencv_fails_is_told_how_to_mend_it(monkeypatch, capsys):
    monkeypatch.setattr(environment, "meets", lambda *_: True)
    monkeypatch.setattr(environment, "imports_opencv", lambda *_, **__: False)
    with pytest.raises(SystemExit, match="2"):
        environment.main("requirements.txt")
    error = capsys.readouterr().err
    assert f"{sys.executable} -m pip install --force-reinstall --no-deps opencv-pyt" in error


def test_no_python_hides_in_the_shell():
    for name in ("run_all.sh", "tests/run.sh", ".ci/run"):
        text = (ROOT / name).read_text()
        assert " -c " not in text and "<<'" not in text and "awk" not in text, name
