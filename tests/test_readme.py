"""README.md and docs/: what they name exists, commands parse, numbers are those of the tables."""

import ast
import contextlib
import importlib
import inspect
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

import analyze_iqa
import evaluate
import train_sr
from demo.run import Demo
from models import degradations
from models.checkpoint import read_csv
from models.discriminator import UNetDiscriminatorSN
from models.losses import VGG19_WEIGHTS
from models.metrics import pyiqa_name
from tools.prefetch import PAPER_NAMES

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text()
         for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
README = PAGES["README.md"]
# Commands that the pages call; as shell functions they print their arguments instead of running.
# `python -c` alone runs, since its output is part of another command.
STUBS = "set -e\n" + "".join(
    f"{name}() {{ printf '%s\\x1f' {name} \"$@\"; echo; }}\n"
    for name in ("python3", "torchrun", "bash", "pip", "source", "xdg-open"))
STUBS += f'''python() {{
  if [ "$1" = -c ]; then {shlex.quote(sys.executable)} "$@"; return; fi
  printf '%s\\x1f' python "$@"; echo
}}
srun() {{ while [[ $1 == --* ]]; do shift; done; "$@"; }}
scontrol() {{ echo machine0; }}
'''
WRITTEN_BY_THE_READER = {"my_iqa.py"}


def section(page, title):
    """The text below a heading, up to the next one of its level."""
    level = re.search(rf"^(#+) {re.escape(title)}", PAGES[page], re.M)[1]
    return PAGES[page].split(f"{level} {title}")[1].split(f"\n{level} ")[0]


def table_rows(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()
            if line.startswith("| ")]


def code_blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def command_lines(script):
    """The commands of a shell script, as lists of words expanded by bash; they do not run."""
    done = subprocess.run(["bash", "-c", STUBS + script], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0, done.stderr
    return [line.split("\x1f")[:-1] for line in done.stdout.splitlines()]


def target(words):
    """(module, its arguments) of a python or torchrun command."""
    at = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
    if words[at] == "-m":
        return words[at + 1], words[at + 2 :]
    assert (ROOT / words[at]).is_file(), words[at]
    return words[at].removesuffix(".py").replace("/", "."), words[at + 1 :]


def check_command(words):
    """The script exists, and its own parser takes the arguments."""
    if words[0] in ("python", "torchrun"):
        name, arguments = target(words)
        try:
            importlib.import_module(name).parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{name} refuses {' '.join(arguments)}")
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file(), words
        if words[2:3] == ["demo"]:
            check_command(["python", "-m", "demo.run", *words[3:]])
        elif words[2:3] == ["photos"]:
            check_command(["python", "-m", "tools.tune", *(words[3:] or ["demo/photos"])])
        else:
            assert words[1:] in (["run_all.sh"], ["run_all.sh", "paper"], ["tests/run.sh"]), words


def help_text(name, *subcommand):
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        importlib.import_module(name).parse_args([*subcommand, "--help"])
    return text.getvalue()


# ------------------------------------------------------------------------- names


def test_the_table_of_photographs_is_the_committed_one():
    rows = {row["model"]: row for row in read_csv(ROOT / "results/photos/photos.csv")[0]}
    shown = table_rows(section("docs/photos.md", "What it gave on `demo/photos`"))[1:]
    assert len(shown) == 5
    for name, *cells in shown:
        row = rows[re.search(r"\(([\w -]+)\)$", name)[1] if "(" in name else name]
        assert cells == [f"{float(row[c]):.{d}f}" for c, d in (("psnr", 2), ("ssim", 3), ("q", 1))]


def test_the_first_look_at_amo_is_the_committed_one():
    table, _ = read_csv(ROOT / "results/photos/amo.csv")
    shown = table_rows(section("docs/photos.md", "AMO at real size, a first look"))[1:5]
    digits = {"psnr": 2, "ssim": 3, "q": 1, "structured_noise": 3}
    for row, (name, *cells, shares) in zip(table, shown, strict=True):
        assert [name, *cells] == [row["model"], *(f"{float(row[c]):.{d}f}"
                                                  for c, d in digits.items())]
        used = [row[c] for c in ("original", "adapters", "all_weights", "x4plus")]
        assert shares == ", ".join(f"{float(share):.2f}" for share in used if share)
    for column, order in (("q", "OrigsOnly Rand AMO base"), ("psnr", "base AMO Rand OrigsOnly")):
        ranked = sorted(table, key=lambda row: float(row[column]))
        assert [row["model"] for row in ranked] == order.split(), column


def test_adapters_and_all_weights_at_equal_q_are_those_of_the_committed_table():
    rows = {(row["method"], row["gain"]): row for row in read_csv(
        ROOT / "results/photos/equal_q.csv")[0]}
    page = "A real network on real photographs"
    shown = table_rows(section("README.md", page))[1:]
    names = {"RealESRGAN_x4plus (base)": ("base", "0")} | {
        f"{text}, Q + {gain}": (method, f"{gain}.0") for gain in (10, 15)
        for text, method in (("adapters", "lora"), ("all weights", "full"))}
    assert [row[0] for row in shown] == list(names)
    for name, *cells in shown:
        row = rows[names[name]]
        assert cells == [f"{float(row[c]):.{d}f}" for c, d in (
            ("q", 1), ("psnr", 2), ("ssim", 3), ("structured_noise", 3))], name

    def difference(gain, column, digits):
        return [f"{float(rows[kind, f'{gain}.0'][column]):.{digits}f}" for kind in (
            "lora - full", "+- over 4 photos", "+- over 3 seeds")]

    text = one_line(section("README.md", page))
    (db, db_photos, db_seeds), (mean, photos, seeds) = (
        difference(10, "psnr", 2), difference(10, "structured_noise", 3))
    assert f"adapters have {db} dB more, ± {db_seeds} over the seeds (95 %), and less" in text
    assert f"by {mean[1:]} ± {seeds}; the four photos show neither (± {db_photos} dB, ± {photos})" \
        in text
    # What is said of the intervals
    for column, gains in (("psnr", (5, 10, 15)), ("structured_noise", (10, 15))):
        for gain in gains:
            mean, photos, seeds = (abs(float(x)) for x in difference(gain, column, 4))
            assert seeds < mean < photos, (column, gain)
    rest = table_rows(section("docs/photos.md", "Adapters against all weights, at equal Q"))
    shown = [row for row in rest if row[0].startswith("Q + ")]
    for gain, row in zip((5, 10, 15), shown, strict=True):
        assert row == [f"Q + {gain}", *("{} ± {}, {}".format(*difference(gain, column, 3))
                                        for column in ("psnr", "ssim", "structured_noise",
                                                       "flat_noise"))]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 230


@pytest.mark.parametrize("page", PAGES)
def test_files_links_and_pictures_exist(page):
    text = PAGES[page]
    if page == "docs/moved.md":  # the left column is of earlier versions
        text = "\n".join(row[1] for row in table_rows(text))
    homes = (ROOT, ROOT / "models", ROOT / "benchmarks/results")
    for name in re.findall(r"`([\w./-]+\.(?:py|sh|txt|md)|[\w/]*results/[\w/]+\.(?:csv|png)|"
                           r"\w+_cpu\.csv)`", text):
        assert name in WRITTEN_BY_THE_READER or any((home / name).exists() for home in homes), name
    for link in re.findall(r"\]\(((?!https?:).*?)\)", text):
        assert (ROOT / page).parent.joinpath(link).is_file(), link


def test_the_file_map_has_every_script_and_module():
    named = set(re.findall(r"`(?:models/)?(\w+\.py)`", section("README.md", "Files")))
    files = {path.name for path in [*ROOT.glob("*.py"), *ROOT.glob("models/*.py")]}
    assert named == files - {"__init__.py"}


def test_functions_of_the_map_exist():
    names = re.findall(r"`((?:\w+\.)+\w+)`", section("README.md", "Reproduce the paper"))
    names = [name for name in names if not name.endswith((".py", ".sh"))]
    assert len(names) > 15
    for name in names:
        module, _, function = name.rpartition(".")
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        assert function in {node.name for node in tree.body
                            if isinstance(node, ast.FunctionDef)}, name


def test_differences_are_the_assumptions_in_the_code():
    tags = {}
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(("tests/", "runs/", ".venv/")):
            tags[name] = len(re.findall(r"# ASSUMED:", path.read_text()))
    parts = PAGES["docs/differences.md"].split("\n## `")[1:]
    listed = {part.split("`")[0]: part.split("\n## ")[0].count("\n- ") for part in parts}
    assert listed == {name: count for name, count in tags.items() if count}


# Rows of HGGT's settings that differ as the list above them says, by words of that list
LISTED = {
    "padding of 64 x 64 LQ": "a whole window", "degraded": "a crop with a margin",
    "drawn once per batch": "once per batch", "queue_size (pool)": "a pool",
    "JPEG quality": "whole numbers", "JPEG input and output": "8 bit",
    "JPEG quantisation steps": "quantisation tables are whole numbers",
    "JPEG, sides that 16 does not divide": "pads with black",
}


def hggt_rows():
    """{setting: [HGGT's for SwinIR, for RealESRGAN, ours, equal?]} of docs/differences.md."""
    rows = table_rows(section("docs/differences.md", "HGGT's settings, one by one"))
    rows = [row for row in rows if row[0] != "setting"]
    assert all(len(row) == 5 for row in rows) and len(rows) > 90
    assert len({row[0] for row in rows}) == len(rows), "a setting twice"
    return {row[0]: row[1:] for row in rows}


def both(swinir, rrdb):
    """A cell for the two networks: one value if they agree or only one has the setting."""
    return " / ".join(dict.fromkeys(value for value in (swinir, rrdb) if value != "-"))


def test_hggt_settings_called_equal_are_equal_and_the_others_say_why():
    points = one_line(PAGES["docs/differences.md"].split("\n## HGGT's settings")[0])
    for name, (swinir, rrdb, ours, verdict) in hggt_rows().items():
        assert verdict.startswith(("equal", "differs, ", "differs: ", "as given: ")), name
        assert verdict.startswith("equal") == (ours == both(swinir, rrdb)), name
        assert verdict.startswith("differs, listed") == (LISTED.get(name, "-----") in points), name


def test_hggt_settings_are_those_of_the_code(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # as before, once the test ends
    nets = ("swinir", "rrdb")
    presets = [train_sr.PRESETS[net] for net in nets]
    swinir, rrdb = ({name: p.default for name, p in inspect.signature(preset["build"]).parameters
                     .items()} for preset in presets)
    disc = inspect.signature(UNetDiscriminatorSN).parameters
    gpus = int(re.search(r"\{GPUS:-(\d+)\}", (ROOT / "run_all.sh").read_text())[1])

    def of(pair, get):
        return both(*(str(get(item)) for item in pair))

    def row(values):
        return ", ".join(map(str, values))

    code = {
        "channels": f"{swinir['embed_dim']} / {rrdb['num_feat']}",
        "blocks": f"{row(swinir['depths'])} / {rrdb['num_block']}",
        "num_heads": row(swinir["num_heads"]),
        "window_size, img_size, mlp_ratio":
            row(swinir[name] for name in ("window_size", "img_size", "mlp_ratio")),
        "upsampler, resi_connection": row((swinir["upsampler"], swinir["resi_connection"])),
        "num_grow_ch": str(rrdb["num_grow_ch"]),
        "num_feat, skip_connection of D":
            of(presets, lambda p: f"{p['disc_feat']}, {disc['skip_connection'].default}".lower()),
        "num_gpu": str(gpus),
        "layer_weights of VGG19": row(f"{weight:g}" for weight in VGG19_WEIGHTS.values()),
        "betas": re.search(r"betas=(\(.*?\))", (ROOT / "train_sr.py").read_text())[1],
        "gamma": str(train_sr.lr_at(2, 1.0, [1])),
    }

    # Defaults of the flags
    for stage, flags in (("", "--sampler upos"), ("stage one: ", "--lambda-p 0 --lambda-a 0")):
        runs = [train_sr.parse_args(["--net", net, "--init", "none", *flags.split()])
                for net in nets]
        for run in runs:
            train_sr.resolve_args(run, stage_one=bool(stage))
            assert run.lr_d == run.lr and not run.bf16
            train_sr.set_backends(run)
        code |= {
            "cudnn.benchmark": str(torch.backends.cudnn.benchmark).lower(),
            f"{stage}stochastic depth": of(presets, lambda p: p["drop_path"] or "-"),
            f"{stage}pixel_opt": of(runs, lambda run: f"{run.lambda_l1:g}"),
            f"{stage}batch_size_per_gpu": of(runs, lambda run: run.batch_size // gpus),
            f"{stage}lr": of(runs, lambda run: f"{run.lr:g}"),
            f"{stage}milestones": of(runs, lambda run: row(f"{m:,}" for m in run.milestones)),
            f"{stage}total_iter": of(runs, lambda run: f"{run.steps:,}"),
            f"{stage}ema_decay": of(runs, lambda run: run.ema_decay),
        }
        if not stage:
            code |= {
                "perceptual_weight": of(runs, lambda run: f"{run.lambda_p:g}"),
                "gan_opt": of(runs, lambda run: run.lambda_a),
                "gt_size": of(runs, lambda run: run.patch_size),
                "manual_seed": of(runs, lambda run: run.seed),
                "print_freq": of(runs, lambda run: run.log_every),
                "save_checkpoint_freq": of(runs, lambda run: f"{run.save_every:,}"),
            }

    # Degradations
    one_round, two_round = (degradations.SETTINGS[preset["degradation"]] for preset in presets)
    assert len(one_round) == 1 and len(two_round) == 2
    assert one_round[0]["blur"]["prob"] == two_round[0]["blur"]["prob"] == 1
    for number, pair in (("", (one_round[0], two_round[0])), ("2", (two_round[1],) * 2)):
        code |= {
            f"blur_kernel_size{number}": of(pair, lambda r: row(r["blur"]["sizes"])),
            f"kernel_prob{number}: aniso": str(degradations.ANISO),
            f"sinc_prob{number}": str(degradations.SINC),
            f"blur_sigma{number}": of(pair, lambda r: r["blur"]["sigma"]),
            f"resize_prob{number}: up, down, keep":
                of(pair, lambda r: row(r["resize"][name] for name in ("up", "down", "keep"))),
            f"resize_range{number}": of(pair, lambda r: r["resize"]["range"]),
            f"gaussian_noise_prob{number}": of(pair, lambda r: r["noise"]["gaussian"]),
            f"noise_range{number}": of(pair, lambda r: r["noise"]["sigma"]),
            f"poisson_scale_range{number}": of(pair, lambda r: r["noise"]["scale"]),
            f"gray_noise_prob{number}": of(pair, lambda r: r["noise"]["gray"]),
            f"jpeg_range{number}": of(pair, lambda r: r["jpeg"]),
        }
    code |= {
        "mode of a resize, at random": row(degradations.MODES),
        "second_blur_prob": str(two_round[1]["blur"]["prob"]),
        "JPEG before the last resize and sinc": str(degradations.FINAL["jpeg_first"]),
        "final_sinc_prob": str(degradations.FINAL["sinc"]),
        "size of the final sinc kernel": row(degradations.FINAL["sizes"]),
    }

    rows = hggt_rows()
    assert {name: rows[name][2] for name in code} == code


# ------------------------------------------------------------------------- commands


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_taken_by_their_parsers(page):
    for block in code_blocks(PAGES[page], "bash"):
        for words in command_lines(block):
            check_command(words)


def wanted():
    """{wish: its command's words} of the README's table, expanded with the variables before it."""
    text = section("README.md", "I want to ...")
    rows = [row for row in table_rows(text) if row[1].startswith("`")]
    script = code_blocks(text, "bash")[0] + "\n".join(row[1].strip("`") for row in rows)
    return dict(zip((row[0] for row in rows), command_lines(script), strict=True))


def test_every_wish_has_a_command_that_its_parser_takes():
    commands = wanted()
    assert len(commands) >= 15
    for words in commands.values():
        check_command(words)


def test_wishes_use_what_the_demo_makes():
    demo = Demo("swinir", 0, False)
    made = {step.name for step in demo.steps()}
    files = {"net_g_ema.pt", "lora.pt", "last.pt"}
    paths = [path for words in wanted().values() for word in words
             for path in re.findall(rf"{demo.runs}/(\S+)", word)]
    assert len(paths) > 10
    for path in paths:
        first, _, rest = path.partition("/")
        if first == "sr":
            assert rest.startswith("SwinIR-") and rest.removeprefix("SwinIR-") in made, path
        else:
            assert (first in made and rest in files) or path in ("q.pt", "judge.pt"), path
    assert (ROOT / "results/demo").is_dir() and demo.results == Path("results/demo")


def test_the_paper_is_printed_and_every_pattern_matches_a_step():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "run_all.sh", "paper"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PATH": path, "DRY": "1"}, timeout=60)
    assert done.returncode == 0, done.stderr
    steps = re.findall(r"^# (\S+)", done.stdout, re.M)
    for text in PAGES.values():
        for pattern in re.findall(r"ONLY='?([\w*+-]+)", text):
            assert any(fnmatchcase(step, pattern) for step in steps), pattern


def test_paths_of_the_inputs_are_the_defaults_of_the_papers_run():
    rows = table_rows(section("docs/data.md", "Where data and weights come from"))[1:]
    script = (ROOT / "run_all.sh").read_text()
    defaults = re.findall(r"\$\{([A-Z0-9_]+):-([^}]*/[^}]*)\}", script)
    assert len(rows) == 6
    assert {(row[0].strip("`"), row[1].strip("`")) for row in rows} == set(defaults)


def test_prefetch_commands_fetch_what_they_say():
    default, analysis, _ = command_lines(
        code_blocks(section("docs/quality-models.md", "Weights, and offline machines"), "bash")[0])
    table5 = {pyiqa_name(name) for name in evaluate.METRICS if name not in ("psnr", "ssim")}
    assert default[3:] == ["--into", "weights"]
    assert set(PAPER_NAMES) == table5 | {"paq2piq", "vgg19"}
    assert analysis[3:] == ["--into", "weights", *analyze_iqa.METRICS]


def test_moved_commands_exist():
    text = section("docs/moved.md", "Commands")
    commands = [row[1].strip("`") for row in table_rows(text)[1:] if row[1].startswith("`")]
    assert len(commands) > 10
    for words in command_lines("\n".join(commands)):
        if words[0] == "bash":
            check_command(words)
            continue
        if words[0] == "python3":  # tools/environment.py, which parses no flags
            target(words)
            continue
        name, arguments = target(words)
        text = help_text(name, *arguments[: name == "paper.user_study"])
        assert "usage:" in text, words
        for flag in (word for word in arguments if word.startswith("--")):
            assert f"{flag} " in text.replace("]", " ").replace(",", " "), (name, flag)


def test_moved_names_exist():
    for _, now in table_rows(section("docs/moved.md", "Names in the code"))[1:]:
        for file, names in re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", now):
            for name in re.findall(r"`(\w+)`", names):
                assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text(), re.M), name


# ------------------------------------------------------------------------- pieces

EXAMPLES = re.findall(r"```python\n# (models/(\w+)\.py)(.*?)```", PAGES["docs/pieces.md"], re.S)


def test_every_piece_has_an_example():
    assert [e[1] for e in EXAMPLES] == ["samplers", "lora", "iqa", "swinir", "degradations"]


@pytest.mark.parametrize(("file", "name", "code"), EXAMPLES, ids=[e[1] for e in EXAMPLES])
def test_a_piece_runs_beside_nothing_but_its_file(tmp_path, file, name, code):
    shutil.copy(ROOT / file, tmp_path)
    code = code.replace('"musiq"', '"iqa:random_musiq"')  # no download
    lines = code.strip().splitlines()[1:]
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, text=True,
                            capture_output=True, env={"PATH": os.environ["PATH"]}, timeout=120)
    assert result.returncode == 0, result.stderr[-800:]
    assert result.stdout.strip() and len(lines) <= 6


def test_what_to_install_for_a_piece_is_what_it_imports():
    pip = {"cv2": "opencv-python-headless"}
    with_pyiqa = {"scipy", "huggingface_hub"}  # pyiqa requires both
    rows = [row for row in table_rows(PAGES["docs/pieces.md"]) if row[0].startswith("`models/")]
    assert {e[0] for e in EXAMPLES} < {row[0].strip("`") for row in rows}
    for file, command in rows:
        imported = set()
        for node in ast.walk(ast.parse((ROOT / file.strip("`")).read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
        imported -= sys.stdlib_module_names
        imported -= with_pyiqa if "pyiqa" in imported else set()
        listed = set(command.strip("`").removeprefix("pip install ").split())
        assert listed == {pip.get(name, name) for name in imported}, file


# ------------------------------------------------------------------------- numbers


def one_line(text):
    return " ".join(text.split())


def seeds():
    """({row: means}, {ordering: "N of M"}) of the demo's committed tables over five seeds."""
    means = read_csv(ROOT / "results/demo/seeds_swinir_means.csv")[0]
    held = read_csv(ROOT / "results/demo/seeds_swinir.csv")[0]
    return {row["row"]: row for row in means}, {row["ordering"]: row["held"] for row in held}


def test_demo_numbers_are_those_of_the_committed_tables():
    page, (means, held) = PAGES["docs/demo.md"], seeds()
    rows = {row[0].removeprefix("SwinIR-"): row[1:] for row in table_rows(page)
            if row[0].startswith("SwinIR-")}
    assert list(rows) == list(means)
    for name, cells in rows.items():
        assert cells == [f"{means[name][m]} ± {means[name][m + '_sd']}"
                         for m in ("q", "judge", "psnr", "psnr_original")], name
    listed = {re.sub(r" \(not.*", "", row[0]): row[1] for row in table_rows(page)
              if re.fullmatch(r"\d of \d", row[1])}
    assert listed == held

    # Fine-tuning AMO: on seed 0, and in the mean of the five; README's caption compares both
    noise = {row["row"]: row for row in read_csv(ROOT / "results/demo/structured_noise.csv")[0]}
    tuned = noise["SwinIR-AMO+FT"]
    gains = [float(means["AMO+FT"][m]) - float(means["AMO"][m]) for m in ("q", "psnr")]
    assert (f"raises Q by {float(tuned['d_quality']):.1f} for {-float(tuned['d_psnr']):.1f} dB of "
            f"PSNR to the positives; in the mean of the five seeds, by {gains[0]:.1f} for "
            f"{-gains[1]:.1f} dB") in one_line(page)
    assert gains[0] < float(tuned["d_quality"])
    assert abs(float(noise["SwinIR-AMO+FT_Q0"]["d_quality"])) < 1
    chain = [float(means[row]["psnr"]) for row in ("OrigsOnly", "Rand", "UPos", "SMA", "AMO")]
    assert max(chain) - min(chain) < 0.3 and max(chain) in chain[2:4]


def test_readme_counts_are_those_of_the_committed_table():
    text, (_, held) = section("README.md", "What the demo shows"), seeds()
    assert re.findall(r"\d of \d", text) == [held[name] for name in (
        "Q rises", "judge rises", "PSNR to the original falls",
        "PSNR to the positives falls from Rand on")]


def test_psnr_falls_along_the_whole_chain_in_the_paper():
    psnr = {row["model"]: row["psnr"] for row in read_csv(ROOT / "paper/table5.csv")[0]}
    for net in ("SwinIR", "RealESRGAN"):
        chain = [float(psnr[f"{net}-{row}"]) for row in ("OrigsOnly", "Rand", "UPos", "SMA", "AMO")]
        assert all(a > b for a, b in zip(chain, chain[1:], strict=False)), net


def test_speeds_are_those_of_the_committed_benchmarks():
    page, results = one_line(PAGES["docs/speed.md"]), ROOT / "benchmarks/results"
    steps = {(r["net"], r["variant"]): r for r in read_csv(results / "step_cpu.csv")[0]}
    nets = ("swinir", "rrdb")
    assert " | ".join(steps[net, "amo"]["seconds"] for net in nets) in page
    for variant in ("amo again", "upos", "contiguous", "unfused", "pyiqa", "lora", "apart"):
        assert " | ".join(f"x {steps[net, variant]['ratio']}" for net in nets) in page, variant
    assert f"as one kernel | x {steps['swinir', 'attention']['ratio']} |" in page
    moved = [abs(float(row["ratio"]) - 1) for (_, variant), row in steps.items()
             if row["tflop"] and variant != "upos"]
    assert max(moved) < 0.12 and "within 12 % of 1" in page
    timed = {net: [float(steps[net, v][k]) for v in ("amo", "amo again") for k in ("min", "max")]
             for net in nets}
    outside = {(net, v) for (net, v), row in steps.items() if net in nets and row["tflop"]
               and (float(row["max"]) < min(timed[net]) or float(row["min"]) > max(timed[net]))}
    assert outside == {(net, v) for net in nets for v in ("upos", "apart")}
    once, single = (steps["MUSIQ as reward", v] for v in ("at once", "one by one"))
    assert (f"needs {single['peak_mib']} MiB instead of {once['peak_mib']} MiB, and "
            f"{float(single['ratio']):.2f} times as long") in page

    loads = {(r["setting"], r["variant"]): r for r in read_csv(results / "loader_cpu.csv")[0]
             if r["workers"] == "0"}
    settings = ("one_round", "two_round")
    for variant in ("upos", "upos_cache", "amo", "amo_cache"):
        rows = [loads[setting, variant] for setting in settings]
        assert " | ".join(f"x {r['times_baseline']}, {r['samples_per_second']} samples/s"
                          for r in rows) in page, variant
    for variant, before in (("baseline_repeat", ""), ("own_operations", "x ")):
        assert " and ".join(before + loads[setting, variant]["times_baseline"]
                            for setting in settings) in page, variant

    scored = {(r["metric"], r["variant"]): r for r in read_csv(results / "analyze_cpu.csv")[0]}
    speed = scored["models.iqa:random_musiq", "batch_8"]["times_batch_1"]
    assert f"MUSIQ has {speed} of the speed in batches of 8 on one core" in page


def test_tiles_are_those_of_the_committed_benchmark():
    rows = {row[0]: row[1:] for row in table_rows(PAGES["docs/photos.md"])}
    for r in read_csv(ROOT / "benchmarks/results/tiles_cpu.csv")[0]:
        changed = f"{r['changed_percent']} %, by {r['changed_by']}"
        assert rows[r["network"].split(",")[0]] == [
            f"{r['crop']}, {r['tile']}", r["largest"], r["largest_outside_overlaps"],
            changed if float(r["changed_percent"]) else "none"], r


def test_the_citation_names_the_paper():
    text = (ROOT / "CITATION.cff").read_text()
    assert text.startswith("cff-version: 1.2.0\n") and "arXiv:2504.18524" in text
    for name in re.findall(r"family-names: (\S+)", text):
        assert name in README.split("```bibtex")[1], name
    assert "MIT License" in (ROOT / "LICENSE").read_text()
