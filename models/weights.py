import os
import torch
from torch import nn
from models.checkpoint import load_file, one_line, read_state
from models.losses import _cached_vgg19, _read_state
from models.rrdb import RRDBNet
from models.swinir import SwinIR


def load_net(path):
    state = read_state(path)
    kind = next((cls for cls in (SwinIR, RRDBNet) if cls.matches(state)), None)
    if kind is None:
        raise ValueError(f"{path}: neither a SwinIR nor an RRDBNet checkpoint")
    try:
        return kind.from_state(state).eval().requires_grad_(False)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error


def load_discriminator(net_d, path):
    data = load_file(path)
    state = data["net_d"] if "net_d" in data else read_state(path)
    try:
        net_d.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: holds no discriminator of this size for --init-d") from error


def vgg19_state():
    return _read_state(_cached_vgg19())
