"""Low-rank adapters (LoRA, Hu et al., ICLR 2022) for linear and convolution layers (Sec. 4.3).

An adapter adds (alpha / rank) * B A to a frozen weight, A (rank, in * kh * kw), B (out, rank). For
a convolution that is a k x k convolution to `rank` channels and then a 1 x 1 convolution, merged
exactly for every stride, padding and kernel size. It is applied as a parametrisation of the weight,
so the network's own code stays untouched:

    net = SwinIR(...); add_lora(net, ("*.mlp.fc1", "*.mlp.fc2"), rank=48)
    train(p for p in net.parameters() if p.requires_grad)
    torch.save(lora_state(net), "lora.pt"); merge_lora(net)     # the plain network again
"""

import math
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """weight -> weight + (alpha / rank) * (B A) in the shape of the weight; B = 0 at the start."""

    def __init__(self, weight: Tensor, rank: int, alpha: float):
        super().__init__()
        fan_out, fan_in = weight.shape[0], weight[0].numel()
        self.lora_a = nn.Parameter(weight.new_empty(rank, fan_in))
        self.lora_b = nn.Parameter(weight.new_zeros(fan_out, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.scaling = alpha / rank
        self.update: Tensor | None = None  # B A, while a forward pass runs, see `_group_adapters`

    def forward(self, weight: Tensor) -> Tensor:
        update = self.lora_b @ self.lora_a if self.update is None else self.update
        return weight + self.scaling * update.view_as(weight)


def _adapters(net: nn.Module) -> Iterator[tuple[str, nn.Module, LowRank]]:
    for name, module in net.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            for adapter in module.parametrizations.weight:
                if isinstance(adapter, LowRank):
                    yield name, module, adapter


def add_lora(
    net: nn.Module, targets: Iterable[str], rank: int, alpha: float | None = None
) -> list[str]:
    """Freeze `net` and give every nn.Linear / nn.Conv2d whose name matches a target an adapter.

    targets: shell patterns of module names, for example "*.mlp.fc1" or "body.*.conv?"
    rank:    rank of the update; alpha: its scale, alpha / rank multiplies B A
    Returns the adapted modules' names. The output of `net` is unchanged until B is trained.
    Raises ValueError if a target matches nothing or if `net` already has adapters.
    """
    if any(True for _ in _adapters(net)):
        raise ValueError("the network already has LoRA adapters; merge_lora() them first")
    alpha = float(rank) if alpha is None else alpha  # ASSUMED: alpha = rank; the paper gives none
    targets, names = list(targets), []
    layers = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for target in targets:
        if not any(fnmatchcase(name, target) for name, _ in layers):
            raise ValueError(f"LoRA target {target!r} matches no linear or convolution layer")
    net.requires_grad_(False)
    for name, module in layers:
        if any(fnmatchcase(name, target) for target in targets):
            adapter = LowRank(module.weight, rank, alpha)
            parametrize.register_parametrization(module, "weight", adapter)
            names.append(name)
    _group_adapters(net)
    return names


def _group_adapters(net: nn.Module) -> None:
    """Compute the B A of all adapters of one shape at once, at the start of each forward pass.

    RealESRGAN's 345 adapters have five shapes: five batched products in place of 345.
    """
    groups: dict[tuple, list[LowRank]] = {}
    for _, _, adapter in _adapters(net):
        groups.setdefault((adapter.lora_a.shape, adapter.lora_b.shape), []).append(adapter)
    net.lora_groups = list(groups.values())  # where the hooks of a deep copy find their own
    net.lora_hooks = [net.register_forward_pre_hook(_compute_updates),
                      net.register_forward_hook(_drop_updates)]


def _compute_updates(net: nn.Module, _: tuple) -> None:
    for group in net.lora_groups:
        updates = torch.stack([x.lora_b for x in group]) @ torch.stack([x.lora_a for x in group])
        for adapter, update in zip(group, updates.unbind(), strict=True):
            adapter.update = update


def _drop_updates(net: nn.Module, *_: object) -> None:
    for group in net.lora_groups:
        for adapter in group:
            adapter.update = None


def lora_state(net: nn.Module) -> dict[str, Tensor]:
    """The adapters alone: {"<module>.lora_a": ..., "<module>.lora_b": ...}, on the CPU."""
    state = {}
    for name, _, adapter in _adapters(net):
        state[f"{name}.lora_a"] = adapter.lora_a.detach().cpu().clone()
        state[f"{name}.lora_b"] = adapter.lora_b.detach().cpu().clone()
    return state


def load_lora(net: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy a lora_state() into a network that has the same adapters; ValueError if they differ."""
    expected = lora_state(net)
    differing = sorted(set(expected) ^ set(state)) + [
        key for key in expected if key in state and expected[key].shape != state[key].shape
    ]
    if differing:
        raise ValueError(f"LoRA weights do not fit the network: {', '.join(differing[:3])}")
    with torch.no_grad():
        for name, _, adapter in _adapters(net):
            adapter.lora_a.copy_(state[f"{name}.lora_a"])
            adapter.lora_b.copy_(state[f"{name}.lora_b"])


def merged_state(net: nn.Module) -> dict[str, Tensor]:
    """The plain network's state dict, every adapter folded into its weight; `net` stays adapted."""
    merged = {f"{name}.weight": module.weight.detach() for name, module, _ in _adapters(net)}
    state = {key.replace(".parametrizations.weight.original", ".weight"): value
             for key, value in net.state_dict().items() if "parametrizations.weight.0." not in key}
    return {key: merged.get(key, value) for key, value in state.items()}


def merge_lora(net: nn.Module) -> nn.Module:
    """Fold every adapter into its weight, in place; the result has the plain network's keys.

    torch removes the adapters from a class that deep copies of `net` share: they cannot be used
    any more.
    """
    for _, module, _ in list(_adapters(net)):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    for hook in net.__dict__.pop("lora_hooks", ()):
        hook.remove()
    net.__dict__.pop("lora_groups", None)
    return net
