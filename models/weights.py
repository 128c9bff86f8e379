"""Networks from weight files, told by their keys."""

import torch
from torch import nn

from models.checkpoint import one_line, read_state
from models.rrdb import RRDBNet
from models.swinir import SwinIR

SCALE = 4


@torch.no_grad()
def load_net(path: str) -> nn.Module:
    """The frozen x4 network of a checkpoint, SwinIR or RRDBNet, on the CPU.

    Raises ValueError, one line that names the file, if it holds anything else.
    """
    state = read_state(path)
    kind = next((cls for cls in (SwinIR, RRDBNet) if cls.matches(state)), None)
    if kind is None:
        raise ValueError(f"{path}: neither a SwinIR nor an RRDBNet checkpoint ({len(state)} "
                         f"weights, the first {next(iter(state))})")
    try:
        net = kind.from_state(state).eval().requires_grad_(False)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    side = net(torch.zeros(1, 3, 16, 16)).shape[-1]
    if side != 16 * SCALE:
        raise ValueError(f"{path}: enlarges {side / 16:g} times; {SCALE} times is needed")
    return net
