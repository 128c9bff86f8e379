"""TEMPORARY copy of evaluate.py's load_net, until the branch that moves it is merged."""

import torch
from torch import nn

from models.checkpoint import read_state
from models.rrdb import RRDBNet
from models.swinir import SwinIR

SCALE = 4


def load_net(path: str) -> nn.Module:
    """The network of a checkpoint, told by its keys, on the CPU. ValueError names the file."""
    state = read_state(path)
    kind = next((cls for cls in (SwinIR, RRDBNet) if cls.matches(state)), None)
    if kind is None:
        raise ValueError(f"{path}: neither a SwinIR nor an RRDBNet checkpoint ({len(state)} "
                         f"weights, the first {next(iter(state))})")
    try:
        net = kind.from_state(state).eval().requires_grad_(False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    side = net(torch.zeros(1, 3, 16, 16)).shape[-1]
    if side != 16 * SCALE:
        raise ValueError(f"{path}: enlarges {side / 16:g} times; {SCALE} times is needed")
    return net
