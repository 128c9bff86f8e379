"""Run the project's scripts as users do, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment(**changes: object) -> dict[str, str]:
    """This process's, on one thread, without GPU and proxy, with tracebacks off."""
    kept = {k: v for k, v in os.environ.items() if k != "DEBUG" and "proxy" not in k.lower()}
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
             "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return kept | fixed | {k: str(v) for k, v in changes.items()}


def run_script(
    script: str | Path, *flags: object, cwd: Path = ROOT, processes: int = 0, **env: object
) -> subprocess.CompletedProcess:
    """script: "evaluate.py", a path, or a module as "tools.upscale"; processes: torchrun's."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    target = [str(ROOT / script)] if str(script).endswith(".py") else ["-m", str(script)]
    return subprocess.run(
        [sys.executable, *(launch if processes else ()), *target, *map(str, flags)], cwd=cwd,
        env=environment(**env), capture_output=True, text=True, timeout=200)
