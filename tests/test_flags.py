"""Every numeric flag of every script has a range; what is outside is refused by the flag's name."""

import argparse
import importlib
import math
import re
from pathlib import Path

import pytest
from scripts import ROOT, run_script

import finetune_lora
import train_sr
from models.flags import SEED, Help, integer, number

MODULES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for folder in (".", "tools", "paper", "demo", "benchmarks")
    for path in (ROOT / folder).glob("*.py") if "def parse_args" in path.read_text())
OTHER_TYPES = {None, Path, "name_and_folder", "perceptual", "folder_or_count"}


def flags_of(parser, command=()):
    """(subcommand, action) of all flags."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from flags_of(sub, (name,))
        else:
            yield command, action


def collect():
    """(module, subcommand, action) of all flags, from the parsers that the scripts make."""
    for name in MODULES:
        module, parsers = importlib.import_module(name), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args",
                          lambda self, *_, parsers=parsers: parsers.append(self) or self.exit())
            with pytest.raises(SystemExit):
                module.parse_args([])
        yield from ((module, *flag) for flag in flags_of(*parsers))


FLAGS = list(collect())
NUMERIC = [flag for flag in FLAGS if isinstance(flag[2].type, number)]


def label(flag):
    module, command, action = flag
    return " ".join([module.__name__, *command, action.option_strings[0]])


def test_every_script_is_seen():
    assert {"train_sr", "finetune_lora", "evaluate", "analyze_iqa", "tools.upscale", "demo.run",
            "paper.user_study", "benchmarks.step"} <= {module.__name__ for module, *_ in FLAGS}
    assert len(NUMERIC) > 50


@pytest.mark.parametrize("module, command, action", FLAGS)
def test_no_number_is_read_without_a_range(module, command, action):
    """A type that is new to this test is added to OTHER_TYPES if it reads no number."""
    name = getattr(action.type, "__name__", None)
    assert isinstance(action.type, number) or {action.type, name} & OTHER_TYPES, action
    defaults = action.default if isinstance(action.default, list) else [action.default]
    for default in defaults:
        if type(default) in (int, float):
            assert isinstance(action.type, number), action
            assert action.type(str(default)) == default
    metavars = action.metavar if isinstance(action.metavar, tuple) else (action.metavar,)
    assert isinstance(action.type, number) or not {"N", "X"} & set(metavars), action


@pytest.mark.parametrize("flag", NUMERIC, ids=label)
def test_each_refuses_what_is_outside_its_range_by_its_name(flag, capsys):
    module, command, action = flag
    option, kind = action.option_strings[0], action.type
    outside = ["nan", "inf", "", "x", "1_0", f"{kind.low - 1}"]
    if kind.high < math.inf:
        outside.append(f"{kind.high + 1}")
    outside += ["2.5", "9" * 5000] if isinstance(kind, integer) else ["1e999"]
    for text in outside:
        count = action.nargs if isinstance(action.nargs, int) else 1
        with pytest.raises(SystemExit) as stop:
            module.parse_args([*command, option, *[text] * count])
        line = capsys.readouterr().err
        assert stop.value.code == 2 and f"error: argument {option}: " in line
        assert f"{text!r}: must be a" in line and line.count("\n") == 1
    assert kind(f"{kind.low}") == kind.low
    assert kind.high == math.inf or kind(f"{kind.high}") == kind.high


def test_the_values_of_a_range():
    assert integer(1)("12") == 12 and type(integer(1)("12")) is int and SEED("0") == 0
    assert number(0)("1e-3") == 0.001 and type(number(0)("1")) is float
    for kind, text, message in (
        (number(0), "-1", "'-1': must be a number of 0 or more"),
        (number(-10, 10), "nan", "'nan': must be a number from -10 to 10"),
        (integer(0, 9), "x\x1b[2J", r"'x\x1b[2J': must be an integer from 0 to 9"),
    ):
        with pytest.raises(argparse.ArgumentTypeError) as error:
            kind(text)
        assert str(error.value) == message


@pytest.mark.parametrize("script, flags", [
    ("finetune_lora.py", "--lora-rank 0"), ("finetune_lora.py", "--lora-rank -4"),
    ("train_sr.py", "--lambda-l1 -1"), ("train_sr.py", "--milestones -5"),
    ("train_sr.py", "--lambda-a nan"), ("train_sr.py", "--patch-size 8"),
    ("train_sr.py", "--ema-decay 1.5"), ("train_sr.py", "--ema-decay nan"),
    ("train_sr.py", "--tau 0"), ("train_sr.py", "--lr -1"),
    ("tools.upscale", "--lora-scale nan"),
])
def test_what_was_once_taken(script, flags, capsys):
    flag, value = flags.split()
    module = importlib.import_module(script.removesuffix(".py"))
    with pytest.raises(SystemExit):
        module.parse_args([flag, value])
    assert f"argument {flag}: {value!r}: must be " in capsys.readouterr().err


def test_as_a_user_sees_it():
    done = run_script("train_sr.py", "--seed", -1)
    assert done.returncode == 2 and done.stderr == (
        "train_sr.py: error: argument --seed: '-1': must be an integer from 0 to 4294967295; "
        "see --help\n")


@pytest.mark.parametrize("name", MODULES)
def test_an_error_is_one_line(name, capsys):
    module = importlib.import_module(name)
    for words in (["--nothing"], ["make", "--nothing"]):  # make: paper.user_study's
        with pytest.raises(SystemExit) as stop:
            module.parse_args(words)
        text = capsys.readouterr().err
        assert stop.value.code == 2 and ": error: " in text
        assert text.endswith("; see --help\n") and text.count("\n") == 1


@pytest.mark.parametrize("script, texts", [
    (train_sr, ["--lr LR Adam learning rate of net_g (default: 1e-4; stage one 2e-4)",
                "GAN loss; 0: no discriminator (default: 0.1)", "(default: 300000)", "SEED seed of "
                "weights and draws (default: 0)", "runs/<net>-stage1*/net_g_ema.pt"]),
    (finetune_lora, ["(default: 5e-6 SwinIR, 5e-5 others)", "no discriminator (default: 0.0)",
                     "runs/<net>-<sampler>+FT", "(default: 20000)", "(default: musiq)",
                     "runs/<net>-<sampler>*/net_g_ema.pt"]),
], ids=["train_sr", "finetune_lora"])
def test_help_shows_the_defaults_that_hold(script, texts, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert [part for part in texts if part not in text] == []
    assert ("300000" in text) == (script is train_sr)


@pytest.mark.parametrize("module, command, action", FLAGS)
def test_every_default_is_shown(module, command, action):
    text = Help("x")._get_help_string(action)
    assert not text.endswith("(default: )"), action.option_strings
    if isinstance(action.default, bool) or action.default in (None, argparse.SUPPRESS, []):
        return
    assert re.search("default\\S* \\S", text), action.option_strings


@pytest.mark.parametrize("name", MODULES)
def test_help_keeps_the_lines_of_the_examples(name):
    page = importlib.import_module(name).__doc__ or ""
    assert not [line for line in page.splitlines() if re.search(r"\S {6,}-", line)]
