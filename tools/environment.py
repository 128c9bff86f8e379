"""Print a Python that has the requirements: the current one, or that of .venv, which is made once.

    PYTHON=$(python3 tools/environment.py demo/requirements.txt)   # as run_all.sh does
    python3 tools/environment.py tests/requirements.txt DIR     # the environment DIR in any case

Messages go to stderr. It needs no package, and runs far enough on an old Python to say so.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = (3, 10)
OPENCV = "opencv-python-headless"


def missing(file):
    """Yield the lines of a requirements file that the running Python does not meet."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement
    for line in file.read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r"):
            yield from missing(file.parent / line[2:].strip())
        elif line:
            need = Requirement(line)
            if need.marker and not need.marker.evaluate():
                continue
            try:
                met = need.specifier.contains(version(need.name), prereleases=True)
            except PackageNotFoundError:
                met = False
            if not met:
                yield line


def meets(python, file):
    """Whether an interpreter is new enough and has all that a requirements file lists."""
    check = [python, __file__, "--check", file]
    return subprocess.run(check, stderr=subprocess.DEVNULL).returncode == 0


def imports_opencv(python, quiet=False):
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run([python, "-c", "import cv2"], stderr=output).returncode == 0


def install(python, *what):
    """pip install, its output on stderr."""
    command = [python, "-m", "pip", "install", "-q", *what]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        refuse(f"{' '.join(command)} failed, see above")


def prepare(folder, file):
    """The interpreter of the virtual environment in `folder`, with all that `file` lists."""
    python = str(folder / "bin/python")
    if not os.access(python, os.X_OK):
        if sys.version_info < OLDEST:
            refuse(f"{sys.executable} is too old; Python 3.10 or newer is needed")
        print(f"making {folder} (once)", file=sys.stderr)
        make = [sys.executable, "-m", "venv", "--clear", str(folder)]
        if subprocess.run(make, stdout=sys.stderr).returncode:
            Path(python).unlink(missing_ok=True)  # half an environment; the next run makes it anew
            refuse(f"could not make {folder}, see above")
    if not meets(python, file):
        free = shutil.disk_usage(folder).free / 1e9
        print(f"installing {file} into {folder} (once; about 7 GB with PyTorch's CUDA libraries; "
              f"{free:.1f} GB free)", file=sys.stderr)
        install(python, "-r", file)
    if not imports_opencv(python, quiet=True):
        # pyiqa brings opencv-python, which needs libGL and takes the headless one's place
        lines = Path("requirements.txt").read_text().split()
        wanted = next(word for word in lines if word.startswith(OPENCV))
        install(python, "--force-reinstall", "--no-deps", wanted)
    return python


def refuse(message):
    print(f"tools/environment.py: {message}", file=sys.stderr)
    sys.exit(2)


def main(file, folder=None):
    os.chdir(Path(__file__).resolve().parent.parent)
    python = sys.executable
    if folder or not meets(python, file):
        python = prepare(Path(folder or ".venv").absolute(), file)
    if not imports_opencv(python):
        refuse("OpenCV cannot be imported, see above; where libGL is missing:\n"
               f"    {python} -m pip install --force-reinstall --no-deps {OPENCV}")
    print(python)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        sys.exit(sys.version_info < OLDEST or any(missing(Path(sys.argv[2]))))
    main(*sys.argv[1:])
