"""Which of several ground truths to learn from (paper Sec. 4.2; the baselines of Sec. 5)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

SAMPLERS = ("origs_only", "rand", "upos", "sma", "smp", "amo")
LABELLED = ("upos", "smp")  # need human labels
SCORING = ("sma", "smp", "amo")  # need a quality model

Scorer = Callable[[Tensor], Tensor]  # (N, 3, H, W) in [0, 1] -> (N,), up = better


def sampling_weights(
    sampler: str, labels: np.ndarray | None, quality: np.ndarray | None, tau: float, shape: tuple
) -> np.ndarray | None:
    """Probability of each ground truth of each set (paper Eq. 2-4 and the baselines of Sec. 5).

    labels:  (n, K) +1 positive, 0 similar, -1 negative, column 0 the original; upos and smp only
    quality: (n, K) image-level NR-IQA scores, up = better; sma and smp only
    tau:     softmax temperature on the scale of quality (tau -> inf: uniform)
    shape:   (n, K)
    Returns (n, K) float64, rows sum to 1, a set without candidates is a row of zeros; None for amo,
    whose choice is made per patch by `choose_argmax`.
    """
    if sampler == "amo":
        return None
    if sampler == "origs_only":
        return np.repeat(np.eye(1, shape[1]), shape[0], axis=0)
    if sampler == "rand":
        return np.full(shape, 1 / shape[1])
    allowed = labels > 0 if sampler in LABELLED else np.ones(shape, bool)
    # PAPER: Eq. 2, SoftMax_tau(Q(S_I)) over S_I = all or the positives; upos is tau -> infinity
    logits = np.zeros(shape) if sampler == "upos" else quality.astype(np.float64) / tau
    logits = np.where(allowed, logits, -np.inf)
    best = logits.max(1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(best), best, 0))
    return weights / np.maximum(weights.sum(1, keepdims=True), 1e-300)


@torch.no_grad()
def choose_argmax(gts: Tensor, iqa: Scorer) -> Tensor:
    """Argmax-online (paper Sec. 4.2): the best of the K patches of each sample.

    gts: (N, K, 3, H, W) in [0, 1], the same random location of every ground truth
    Returns (N,) int64 indices into K. A patch without a score (NaN) is not the best.
    """
    return _quality(gts, iqa).argmax(1)


def _quality(gts: Tensor, iqa: Scorer) -> Tensor:
    """(N, K) scores, -inf where there is none."""
    return iqa(gts.flatten(0, 1)).view(gts.shape[:2]).nan_to_num(nan=-torch.inf)


class FastArgmax:
    """`choose_argmax` by rough scores; sets that are too close to call are scored again exactly.

    rough, exact: the same metric in TF32 and in float32, for example. Too close is a lead of the
    best of at most `bound`: four times the largest difference of their scores over 64 sets. It is
    measured again after every `renew` calls.
    """

    SETS, MARGIN = 64, 4.0  # a lead changes by twice the difference at most

    def __init__(self, rough: Scorer, exact: Scorer, renew: int = 1000):
        self.rough, self.exact, self.renew = rough, exact, renew
        self.calls = self.measured = 0
        self.bound = torch.zeros(())

    @torch.no_grad()
    def __call__(self, gts: Tensor) -> Tensor:
        """gts: (N, K, 3, H, W) in [0, 1]; returns (N,) int64 indices into K."""
        if self.calls % self.renew == 0:
            self.measured, self.bound = 0, torch.zeros((), device=gts.device)
        self.calls += 1
        rough = _quality(gts, self.rough)
        if self.measured < self.SETS:
            exact = _quality(gts, self.exact)
            difference = (rough - exact).nan_to_num(nan=0.0).abs().max()  # NaN: both are -inf
            self.bound = torch.maximum(self.bound, self.MARGIN * difference)
            self.measured += len(gts)
            return exact.argmax(1)
        best = rough.topk(min(2, rough.shape[1]), 1).values
        close = ~(best[:, 0] - best[:, -1] > self.bound)  # so that NaN, -inf of both, is close
        choice = rough.argmax(1)
        for i in close.nonzero().flatten().tolist():  # one by one: compiled code knows the shape
            choice[i] = _quality(gts[i : i + 1], self.exact).argmax(1)[0]
        return choice
