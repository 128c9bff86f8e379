"""NR-IQA metrics that take long, or fail at a chosen moment on a chosen rank."""

import os
import signal
import time

import torch


class Brightness(torch.nn.Module):
    """100 times the mean of each image; `fault` is called before, with the number of the call."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.calls = fault, 0

    def forward(self, x):
        self.calls += 1
        self.fault(self.calls)
        return 100 * x.mean((1, 2, 3))


def slow():
    return Brightness(lambda call: time.sleep(0.1))


def quick():
    return Brightness(lambda call: None)


def on_rank_1(action):
    return Brightness(lambda call: action() if call == 2 and os.environ["RANK"] == "1" else None)


def fails_on_rank_1():
    def action():
        raise ValueError("metric broken: no score")

    return on_rank_1(action)


def killed_on_rank_1():
    return on_rank_1(lambda: os.kill(os.getpid(), signal.SIGKILL))
