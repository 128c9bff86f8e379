"""The shape of the repository: import graph, tags and README, flags, the shell script."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from demo.nets import start_as_interpolation
from demo.report import incoherent_energy, orderings
from train_sr import PRESETS

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("analyze_iqa", "train_sr", "finetune_lora", "evaluate")
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
    for path in [*ROOT.glob("*.py"), *ROOT.glob("models/*.py"), *ROOT.glob("demo/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), f"{path}:{node.lineno}"


def test_files_named_in_the_readme_exist():
    readme = (ROOT / "README.md").read_text()
    for name in re.findall(r"`((?:models/|demo/|tests/)?\w+\.(?:py|sh|txt))`", readme):
        assert (ROOT / name).exists() or (ROOT / "models" / name).exists(), name
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", readme):
        assert (ROOT / picture).exists(), picture


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
     ([], {"SEED": "x"}, "SEED=x"), (["paper"], {"HGGT": "absent"}, "set HGGT=")],
)
def test_run_all_refuses_bad_input(arguments, env, message):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(["bash", "run_all.sh", *arguments], cwd=ROOT, capture_output=True,
                            text=True, timeout=60, env=os.environ | {"PATH": path} | env)
    assert result.returncode == 2 and message in result.stderr


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


def test_structured_noise_counts_grids_but_not_sharpness():
    generator = torch.Generator().manual_seed(0)
    pristine = (F.avg_pool2d(torch.rand(3, 66, 66, generator=generator), 3, 1) * 255)
    pristine = pristine.permute(1, 2, 0).numpy()
    assert incoherent_energy(pristine, pristine) < 1e-9
    sharper = pristine + 0.5 * (pristine - pristine.mean())
    grid = pristine.copy()
    grid[::2] += 20
    assert incoherent_energy(sharper, pristine) < 1e-6
    assert incoherent_energy(grid, pristine) > 0.1
