"""The shape of the repository: import graph, tags and README, flags, the shell script."""

import ast
import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import analyze_iqa
import evaluate
import finetune_lora
import train_sr
from demo.nets import start_as_interpolation
from demo.report import orderings
from models.checkpoint import read_csv
from train_sr import PRESETS

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("analyze_iqa", "train_sr", "finetune_lora", "evaluate", "figures", "report",
           "user_study")
LEAVES = sorted(p.stem for p in (ROOT / "models").glob("*.py") if p.stem != "__init__")


def project_imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names] + [node.module]
        found |= {n for n in names if n.split(".")[0] in ("models", "demo", "tests", *SCRIPTS)}
    return found


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_imports_no_project_file(leaf):
    assert project_imports(ROOT / "models" / f"{leaf}.py") == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_leaves_only(script):
    others = {n for n in project_imports(ROOT / f"{script}.py") if not n.startswith("models")}
    assert others == ({"train_sr"} if script == "finetune_lora" else set())


def test_leaves_do_nothing_heavy_at_import():
    code = ("import sys\n" + "\n".join(f"import models.{leaf}" for leaf in LEAVES)
            + "\nassert 'pyiqa' not in sys.modules and 'torchvision' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_every_assumption_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    section = readme.split("## Differences from the paper")[1].split("\n## ")[0]
    tagged = {p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.py"), *ROOT.glob("models/*")]
              if p.suffix == ".py" and "# ASSUMED:" in p.read_text()}
    named = set(re.findall(r"`((?:models/)?\w+\.py)`", section))
    assert tagged == named


def test_torch_load_is_always_weights_only():
    paths = [p for p in ROOT.rglob("*.py") if p.parts[len(ROOT.parts)] not in ("runs", "tests")]
    assert len(paths) > 20
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), f"{path}:{node.lineno}"
    for path in [*paths, *ROOT.glob("*.sh")]:  # other ways to unpickle, and shell's Python
        text = path.read_text()
        for word in ("weights_only=False", "pickle.load", "allow_pickle=True", "joblib", "eval("):
            for line in text.splitlines():
                assert word not in line or word == "eval(" and ".eval(" in line or (
                    "pyiqa loads with" in line), f"{path}: {line}"


@pytest.mark.parametrize("script", [*SCRIPTS, "models.iqa"])
def test_help_imports_no_pyiqa_and_asks_no_network(script):
    code = f"""if True:
        import runpy, socket, sys
        def refuse(*args, **kwargs):
            raise AssertionError("a network attempt")
        socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
        sys.argv = ["x", "--help"]
        try:
            runpy.run_module({script!r}, run_name="__main__")
        except SystemExit as stopped:
            assert stopped.code == 0
        heavy = {{"pyiqa", "torchvision", "timm", "transformers", "huggingface_hub"}}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


def test_files_named_in_the_readme_exist():
    readme = (ROOT / "README.md").read_text()
    for name in re.findall(r"`((?:models/|demo/|tests/)?\w+\.(?:py|sh|txt))`", readme):
        assert (ROOT / name).exists() or (ROOT / "models" / name).exists(), name
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", readme):
        assert (ROOT / picture).exists(), picture


PIECES = re.findall(r"```python\n# (models/(\w+)\.py)(.*?)```",
                    (ROOT / "README.md").read_text().split("## Take a piece")[1], re.DOTALL)


@pytest.mark.parametrize(("file", "name", "code"), PIECES, ids=[p[1] for p in PIECES])
def test_a_piece_runs_beside_nothing_but_its_file(tmp_path, file, name, code):
    shutil.copy(ROOT / file, tmp_path)
    code = code.replace('"musiq"', '"iqa:random_musiq"')  # no download
    lines = code.strip().splitlines()[1:]
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, text=True,
                            capture_output=True, env={"PATH": os.environ["PATH"]}, timeout=120)
    assert result.returncode == 0, result.stderr[-800:]
    assert result.stdout.strip() and len(lines) <= 6


def test_every_piece_is_there():
    assert [p[1] for p in PIECES] == ["samplers", "lora", "iqa", "swinir", "degradations"]


def test_readme_numbers_are_those_of_the_committed_tables():
    readme = (ROOT / "README.md").read_text()
    table, _ = read_csv(ROOT / "results/demo/seeds_swinir_means.csv")
    means = {f"SwinIR-{row['row']}": row for row in table}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in readme.splitlines()
            if line.startswith("| SwinIR-")]
    assert [row[0] for row in rows] == list(means)
    for name, *cells in rows:
        expected = [f"{means[name][m]} ± {means[name][m + '_sd']}"
                    for m in ("q", "judge", "psnr", "psnr_original")]
        assert cells == expected, name
    for row in read_csv(ROOT / "results/demo/seeds_swinir.csv")[0]:
        assert re.search(rf"\| {re.escape(row['ordering'])}( \(not.*\))? \| {row['held']} \|",
                         readme), row


def test_readme_speeds_are_those_of_the_committed_benchmarks():
    readme = (ROOT / "README.md").read_text().split("## Speed")[1].split("\n## ")[0]
    results = ROOT / "benchmarks/results"
    steps = {(r["net"], r["arm"]): r for r in read_csv(results / "step_cpu.csv")[0]}
    for arm in ("amo again", "upos", "contiguous", "unfused"):
        assert " | ".join(f"x {steps[net, arm]['ratio']}" for net in ("swinir", "rrdb")) in readme
    reward = [steps["MUSIQ as reward", arm] for arm in ("at once", "one by one")]
    assert f"{reward[1]['peak_mib']}\ninstead of {reward[0]['peak_mib']} MiB" in readme
    loads = {(r["setting"], r["arm"]): r for r in read_csv(results / "loader_cpu.csv")[0]
             if r["workers"] == "0"}
    for arm in ("upos", "upos_cache", "amo", "amo_cache"):
        rows = [loads[setting, arm] for setting in ("one_round", "two_round")]
        assert " | ".join(f"x {r['times_baseline']}, {r['samples_per_second']} samples/s"
                          for r in rows) in readme
    scored = {(r["metric"], r["arm"]): r for r in read_csv(results / "analyze_cpu.csv")[0]}
    speed = scored["models.iqa:random_musiq", "batch_8"]["times_batch_1"]
    assert f"MUSIQ has {speed} of the speed in batches of 8 on one core" in readme


def test_committed_results_are_whole_and_finite():
    folder = ROOT / "results/demo"
    tables = {path.name for path in folder.glob("*.csv")}
    assert tables >= {f"table{n}.csv" for n in range(1, 9)} | {
        "comparison.csv", "figure2.csv", "structured_noise.csv", "user_study_simulated.csv"}
    for n in (2, 3, 4, 5, 6, 7, 8):
        assert (folder / f"figure{n}.png").stat().st_size > 5000
    for name in tables:
        for line in (folder / name).read_text().splitlines():
            assert line.startswith("#") or not re.search(r"(^|,)-?(nan|inf)(,|$)", line), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_in_the_readme_is_one(script):
    text = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=ROOT, check=True,
                          capture_output=True, text=True, timeout=60).stdout
    readme = (ROOT / "README.md").read_text()
    for block in re.findall(r"```bash\n(.*?)```", readme, re.S):
        for command in block.replace("\\\n", " ").splitlines():
            if f"{script}.py " in command:
                for flag in re.findall(r" (--[a-z-]+)", command.split(f"{script}.py ")[1]):
                    assert flag in text, f"{script}.py has no {flag}"


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [(["dmeo"], {}, "unknown command dmeo"), ([], {"NET": "vgg"}, "NET=vgg"),
     ([], {"SEED": "x"}, "SEED=x"), (["paper"], {"HGGT": "absent"}, "set HGGT="),
     (["demo", "--al"], {}, "demo --al"), (["paper", "--on"], {}, "paper --on: unknown flag"),
     (["paper", "--only", "SwinIR-AM"], {}, "--only SwinIR-AM: no such step"),
     (["paper"], {"GPUS": "four"}, "GPUS=four"), (["paper"], {"GPUS": "3"}, "must divide"),
     (["paper", "--only", "table5"], {}, "no row is trained yet")],
)
def test_run_all_refuses_bad_input(arguments, env, message):
    result = run_all(*arguments, **env)
    assert result.returncode == 2 and message in result.stderr


def run_all(*arguments, cwd=ROOT, **env):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(["bash", "run_all.sh", *arguments], cwd=cwd, capture_output=True,
                          text=True, timeout=60, env=os.environ | {"PATH": path} | env)


def paper_plan(*arguments):
    """{step: its command as a list} of the dry run."""
    result = run_all("paper", "--dry-run", *arguments, SWINIR_INIT="s.pth", RRDB_INIT="r.pth")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    return {a.split()[0]: shlex.split(b) for a, b in zip(lines, lines[1:], strict=False)
            if b.startswith("      ")}


def test_paper_plan_holds_every_row_with_the_papers_settings():
    plan, earlier = paper_plan(), set()
    read = {"train_sr.py": train_sr.parse_args, "finetune_lora.py": finetune_lora.parse_args}
    rows = {}
    for step, command in plan.items():
        script = next(c for c in command if c.endswith(".py"))
        args = command[command.index(script) + 1 :]
        if script in read:
            rows[step] = read[script](args)
            assert step.endswith("-stage1") or rows[step].init in earlier, step
            earlier.add(f"{rows[step].out}/net_g_ema.pt")
        elif script == "evaluate.py":
            made = [m.split("=")[1] for m in evaluate.parse_args(args).models]
            assert set(made) <= earlier and len(made) == (8 if step == "table8" else 28)
        else:
            assert step in ("analysis", "figures", "study", "report")
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
        if args.sampler:
            assert step.split("-")[1].split("+")[0].lower() == args.sampler.replace("_", "").lower()


def test_only_plans_what_a_row_starts_from_and_skips_what_is_complete(tmp_path):
    for name in ("run_all.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    step = ("paper", "--dry-run", "--only", "RealESRGAN-UPos+FT_IG")
    assert [line.split()[0] for line in run_all(*step, cwd=tmp_path).stdout.splitlines()
            if " h" in line and line[2] != " "][1:-1] == [
        "RealESRGAN-stage1", "RealESRGAN-UPos", "RealESRGAN-UPos+FT_IG"]
    (tmp_path / "runs/RealESRGAN-UPos").mkdir(parents=True)
    (tmp_path / "runs/RealESRGAN-UPos/net_g_ema.pt").touch()
    text = run_all(*step, cwd=tmp_path, GPUS="2").stdout
    assert "stage1" not in text and "in all 7.0 h" in text  # 3.5 hours on four, 7 on two
    whole = run_all("paper", "--dry-run", cwd=tmp_path).stdout
    assert re.search("RealESRGAN-UPos +complete: runs/RealESRGAN-UPos/net_g_ema.pt", whole)


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


def test_orderings_say_held_and_not_held():
    def row(q):
        return {"q": q, "judge": q, "psnr": 50 - q, "psnr_original": 50 - q}

    means = {r: row(q) for r, q in zip(("OrigsOnly", "Rand", "UPos", "SMP", "SMA", "AMO", "UPos+FT",
                                        "AMO+FT"), range(10, 18), strict=True)}
    outcome = {name: o for _, name, o, _ in orderings(means)}
    assert set(outcome.values()) == {"held"}
    means["SMA"]["q"], means["AMO+FT"]["q"] = 11.5, 15.0
    outcome = {name: o for _, name, o, _ in orderings(means)}
    assert [n for n, o in outcome.items() if o != "held"] == ["Q rises", "AMO+FT has the highest Q"]


def test_names_in_a_manifest_or_a_flag_write_nothing_outside_the_output(tmp_path):
    for name in ("..", ".", "../../evil", "a\\b", "a\nb", ""):
        with pytest.raises(ValueError, match="without a slash"):
            evaluate.split_pairs([f"{name}=x.pt"], "--models")
    inner = tmp_path / "a/b/SBS"
    inner.mkdir(parents=True)
    for k, name in enumerate(("evil.png", "other.png")):
        Image.new("RGB", (32, 32), (90 * k, 80, 70)).save(tmp_path / "a" / name)
    pairs = inner / "pairs.csv"
    pairs.write_text("image1,image2,score,model1,model2\n"
                     "../../evil.png,../../other.png,0.9,../../evil,<script>\n")
    before = set(tmp_path.rglob("*"))
    metric = "..evil=models.iqa:random_musiq"
    analyze_iqa.main(analyze_iqa.parse_args([
        "--pairs", str(pairs), "--metrics", metric, "--reference", "..evil",
        "--out", str(tmp_path / "out")]))
    new = set(tmp_path.rglob("*")) - before
    assert (tmp_path / "out/table6.csv") in new
    assert all(p.is_relative_to(tmp_path / "out") for p in new)
