"""The shape of the repository: the import graph, safe loads, commands that start fast."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("analyze_iqa", "train_sr", "finetune_lora", "evaluate")
COMMANDS = (*SCRIPTS, "paper.figures", "paper.report", "paper.user_study", "paper.equal",
            "tools.upscale", "tools.enhance", "tools.check", "tools.prefetch", "demo.run")
PIECES = {"swinir", "rrdb", "discriminator", "lora", "losses", "samplers", "degradations", "iqa"}
PLUMBING = {p.stem for p in (ROOT / "models").glob("*.py")} - PIECES - {"__init__"}
PACKAGES = ("models", "demo", "paper", "tools", "tests", "benchmarks", *SCRIPTS)


def imports(path):
    """The project's modules that a file imports, anywhere in it: "models.iqa", "train_sr", ..."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = (ROOT / node.module.replace(".", "/")).is_dir()
            names = [f"{node.module}.{a.name}" if modules else node.module for a in node.names]
        found |= {name for name in names if name.split(".")[0] in PACKAGES}
    return found


@pytest.mark.parametrize("piece", sorted(PIECES))
def test_a_piece_imports_no_project_file(piece):
    assert imports(ROOT / "models" / f"{piece}.py") == set()


def test_plumbing_imports_pieces_and_plumbing_without_a_circle():
    graph = {name: imports(ROOT / "models" / f"{name}.py") for name in PLUMBING}
    for name, found in graph.items():
        assert all(module.startswith("models.") for module in found), (name, found)
    graph = {n: {m.removeprefix("models.") for m in found} - PIECES for n, found in graph.items()}
    assert set().union(*graph.values()) <= PLUMBING
    while graph:
        done = {name for name, found in graph.items() if not found & set(graph)}
        assert done, f"a circle among {sorted(graph)}"
        graph = {name: found for name, found in graph.items() if name not in done}


def test_no_script_imports_a_script_but_the_fine_tuning():
    for script in SCRIPTS:
        others = {m for m in imports(ROOT / f"{script}.py") if not m.startswith("models.")}
        assert others == ({"train_sr"} if script == "finetune_lora" else set()), script


def test_only_the_demo_knows_the_demo():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("models/*.py"), *ROOT.glob("tools/*.py"),
                 *ROOT.glob("paper/*.py")]:
        assert not {m for m in imports(path) if m.startswith("demo")}, path


def test_modules_do_nothing_heavy_at_import():
    code = "import sys\n" + "\n".join(f"import models.{name}" for name in PIECES | PLUMBING)
    code += "\nassert 'pyiqa' not in sys.modules and 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_torch_load_is_always_weights_only():
    paths = [p for p in ROOT.rglob("*.py") if not {"runs", "tests", ".venv"} & set(p.parts)]
    assert len(paths) > 30
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), f"{path}:{node.lineno}"
    for path in [*paths, *ROOT.glob("*.sh")]:  # other ways to unpickle
        for line in path.read_text().splitlines():
            for word in ("weights_only=False", "pickle.load", "allow_pickle=True", "joblib"):
                assert word not in line or "pyiqa" in line, f"{path}: {line}"
            assert not re.search(r"(?<![.\w])eval\(", line), f"{path}: {line}"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_pyiqa_and_asks_no_network(command):
    code = f"""if True:
        import runpy, socket, sys
        def refuse(*args, **kwargs):
            raise AssertionError("a network attempt")
        socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
        sys.argv = ["x", "--help"]
        try:
            runpy.run_module({command!r}, run_name="__main__")
        except SystemExit as stopped:
            assert stopped.code == 0
        heavy = {{"pyiqa", "torchvision", "timm", "transformers", "huggingface_hub"}}
        if {command!r} in ("paper.figures", "paper.report", "paper.user_study", "demo.run"):
            heavy.add("torch")  # they only read tables and pictures, or start others
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


def test_committed_results_are_complete_and_finite():
    folder = ROOT / "results/demo"
    tables = {path.name for path in folder.glob("*.csv")}
    assert tables >= {f"table{n}.csv" for n in range(1, 9)} | {
        "comparison.csv", "figure2.csv", "structured_noise.csv", "user_study_simulated.csv"}
    for n in (2, 3, 4, 5, 6, 7, 8):
        assert (folder / f"figure{n}.png").stat().st_size > 5000
    for name in tables:
        for line in (folder / name).read_text().splitlines():
            assert line.startswith("#") or not re.search(r"(^|,)-?(nan|inf)(,|$)", line), name
