"""A script's flags: their parser, numbers with a range, and the refusal of what does not fit.

    parser = new_parser(__doc__)
    parser.add_argument("--tau", type=number(1e-6))   # error: argument --tau: '0': must be ...
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn


class Help(argparse.RawDescriptionHelpFormatter):
    """The description as it stands; each default that the help of a flag does not mention."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        hidden = default in (None, argparse.SUPPRESS, [], "") or isinstance(default, bool)
        if "default" in text or hidden:
            return text
        values = default if isinstance(default, list | tuple) else [default]
        return f"{text} (default: {' '.join(map(str, values))})".replace("%", "%%")


class Parser(argparse.ArgumentParser):
    """Errors are one line, without argparse's usage; a subcommand's parser is of this class too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def new_parser(description: str, prog: str | None = None) -> Parser:
    """A parser that shows the description as it stands and takes flags by their whole names."""
    return Parser(prog=prog, description=description, allow_abbrev=False, formatter_class=Help)


def describe(parser: argparse.ArgumentParser, **texts: str) -> None:
    """Give flags another help text, by their names in the namespace."""
    for action in parser._actions:
        action.help = texts.pop(action.dest, action.help)
    assert not texts, texts


def refuse(problems: list[str], shown: int = 20) -> None:
    """ValueError with a line for each of the first problems, if there are any."""
    if problems:
        more = [f"and {len(problems) - shown} more problems"] if len(problems) > shown else []
        raise ValueError("\n".join(problems[:shown] + more))


@dataclass(frozen=True)
class number:
    """A finite number from low to high, both included. Raises ArgumentTypeError for other text."""

    low: float
    high: float = math.inf

    def __call__(self, text: str) -> float:
        return self._checked(text, float, "a number")

    def _checked(self, text: str, kind: type, name: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not self.low <= value <= self.high or math.isinf(value) or "_" in text:  # 1_0 is 10
            limits = f" of {self.low} or more"
            if self.high < math.inf:
                limits = f" from {self.low} to {self.high}"
            raise argparse.ArgumentTypeError(f"{text!r}: must be {name}{limits}")
        return value


@dataclass(frozen=True)
class integer(number):
    """An integer from low to high, both included (by default up to the largest of 32 bits), and a
    multiple of `multiple`."""

    high: int = 2**31 - 1
    multiple: int = 1

    def __call__(self, text: str) -> int:
        value = self._checked(text, int, "an integer")
        if value % self.multiple:
            raise argparse.ArgumentTypeError(f"{text!r}: must be a multiple of {self.multiple}")
        return value


SEED = integer(0, 2**32 - 1)
PATCH_SIZE = integer(16, 2**16, multiple=8)  # 16: the degradations and VGG19 need it


def perceptual(text: str) -> str:
    """A perceptual loss: laplacian, vgg19, or vgg19@FILE with a file of its weights."""
    name, at, file = text.partition("@")
    if name not in ("vgg19", "laplacian") or at and (name != "vgg19" or not Path(file).is_file()):
        raise argparse.ArgumentTypeError(f"{text!r}: must be laplacian, vgg19, or vgg19@FILE with "
                                         "a file that exists")
    return text


def folder_or_count(text: str) -> str | int:
    """Digits are a number, of 1 or more, other text a folder."""
    return integer(1)(text) if text.isdigit() else text
