"""models/lora.py: identity at the start, exact merge, only the adapters train."""

import copy
from types import SimpleNamespace

import pytest
import torch
from spandrel.architectures.SPAN import SPAN
from torch import nn

import finetune_lora
from models.checkpoint import save_atomic
from models.lora import add_lora, load_lora, lora_state, merge_lora, merged_state
from models.rrdb import RRDBNet
from models.swinir import SwinIR
from models.weights import load_net

SWINIR = ("*.mlp.fc1", "*.mlp.fc2")
RRDB = ("body.*.rdb?.conv?",)


def nets():
    torch.manual_seed(0)
    yield SwinIR(embed_dim=12, depths=(2,), num_heads=(2,)), SWINIR, 4
    yield RRDBNet(num_feat=8, num_block=1, num_grow_ch=4), RRDB, 15


def perturb(net):
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))


@pytest.mark.parametrize("case", [0, 1])
def test_identity_then_exact_merge(case):
    net, targets, count = list(nets())[case]
    x = torch.rand(1, 3, 16, 16)
    keys, before = set(net.state_dict()), net(x)
    names = add_lora(net, targets, rank=3)
    assert len(names) == count
    assert torch.equal(net(x), before)  # B = 0
    perturb(net)
    adapted = net(x)
    assert (adapted - before).abs().max() > 1e-4
    merge_lora(net)
    assert set(net.state_dict()) == keys
    assert torch.allclose(net(x), adapted, atol=1e-5)


@pytest.mark.parametrize("case", [0, 1])
def test_only_adapters_train(case):
    net, targets, count = list(nets())[case]
    add_lora(net, targets, rank=3)
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * count and all("lora_" in n for n in trained)
    frozen = {n: p.clone() for n, p in net.named_parameters() if n not in trained}
    optimiser = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        net(torch.rand(1, 3, 8, 8)).square().mean().backward()
        optimiser.step()
    assert all(torch.equal(p, frozen[n]) for n, p in net.named_parameters() if n in frozen)
    moved = lora_state(net)
    assert all(v.abs().sum() > 0 for v in moved.values())


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(5, 7), nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(5, 6, 3, stride=2, bias=False),
     nn.Conv2d(5, 4, 1), nn.Conv2d(6, 4, 3, groups=2)],
)
def test_update_is_b_a_of_the_given_rank(layer):
    net = nn.Sequential(layer)
    base = layer.weight.detach().clone()
    add_lora(net, ["0"], rank=2, alpha=4.0)
    perturb(net)
    state = lora_state(net)
    merge_lora(net)
    update = (net[0].weight - base).flatten(1)
    expected = 4.0 / 2 * state["0.lora_b"] @ state["0.lora_a"]  # alpha / rank * B A
    assert torch.allclose(update, expected, atol=1e-6)
    assert torch.linalg.matrix_rank(update, rtol=1e-4) == 2


def test_conv_adapter_is_kxk_then_1x1():
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1))
    base = copy.deepcopy(net)
    add_lora(net, ["0"], rank=2)
    perturb(net)
    state, x = lora_state(net), torch.rand(2, 3, 9, 9)
    down = nn.functional.conv2d(x, state["0.lora_a"].view(2, 3, 3, 3), padding=1)
    up = nn.functional.conv2d(down, state["0.lora_b"].view(5, 2, 1, 1))
    assert torch.allclose(net(x), base(x) + up, atol=1e-5)


def test_state_round_trip_and_refusals():
    net, targets, _ = next(nets())
    other = copy.deepcopy(net)
    add_lora(net, targets, rank=3)
    perturb(net)
    add_lora(other, targets, rank=3)
    load_lora(other, lora_state(net))
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(net(x), other(x))
    with pytest.raises(ValueError, match="already has LoRA"):
        add_lora(net, targets, rank=3)
    with pytest.raises(ValueError, match="'nothing' matches no"):
        add_lora(merge_lora(net), ["nothing"], rank=3)
    add_lora(net, targets, rank=2)
    with pytest.raises(ValueError, match="do not fit"):
        load_lora(other, lora_state(net))


def test_deepcopy_keeps_adapters_separate():
    net, targets, _ = next(nets())
    add_lora(net, targets, rank=3)
    twin = copy.deepcopy(net)
    perturb(net)
    assert all(v.abs().sum() == 0 for k, v in lora_state(twin).items() if "lora_b" in k)


@pytest.mark.parametrize("case", [0, 1])
def test_products_of_one_shape_are_computed_at_once(case):
    net, targets, count = list(nets())[case]
    add_lora(net, targets, rank=3)
    perturb(net)
    assert sum(map(len, net.lora_groups)) == count and len(net.lora_groups) <= 5
    x = torch.rand(1, 3, 16, 16)
    grouped = net(x)
    grouped.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    assert all(adapter.update is None for group in net.lora_groups for adapter in group)

    net.zero_grad()
    groups, net.lora_groups = net.lora_groups, []  # each adapter by itself
    single = net(x)
    single.square().mean().backward()
    assert torch.allclose(grouped, single, atol=1e-6)
    for name, grad in grads.items():
        assert torch.allclose(net.get_parameter(name).grad, grad, rtol=1e-4, atol=1e-7), name
    net.lora_groups = groups


def test_a_deep_copy_computes_with_its_own_adapters_and_merging_leaves_no_hooks():
    net, targets, _ = next(nets())
    add_lora(net, targets, rank=3)
    perturb(net)
    other = copy.deepcopy(net)
    perturb(other)
    x = torch.rand(1, 3, 16, 16)
    assert not torch.allclose(net(x), other(x), atol=1e-4)
    before, keys = other(x), set(next(nets())[0].state_dict())
    state = merged_state(net)
    assert set(state) == keys
    plain = next(nets())[0]
    plain.load_state_dict(state)
    assert torch.allclose(plain(x), net(x), atol=1e-5)  # which is still adapted
    merge_lora(other)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in merged_state(other).items())
    assert not other._forward_pre_hooks and not other._forward_hooks
    assert not hasattr(other, "lora_groups")
    assert torch.allclose(other(x), before, atol=1e-5)
    assert net._forward_pre_hooks  # the copy's merging is its own


def test_adapters_of_other_networks_are_where_training_reaches(tmp_path):
    """SPAN's layers for inference are computed from the trained ones; adapters there did nothing,
    and the averaged network was scored without its own."""
    torch.manual_seed(0)
    span = SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=4)
    save_atomic({"params": span.state_dict()}, tmp_path / "span.pth")
    net = load_net(tmp_path / "span.pth").requires_grad_(True).train()
    args = SimpleNamespace(lora_targets=None, net="other", lora_rank=2)
    targets = finetune_lora.adapt(args, net)
    assert targets and not any("eval_conv" in name for name in targets)
    perturb(net)
    x = torch.rand(1, 3, 9, 9)
    trained, validated = net(x), copy.deepcopy(net).eval()(x)
    torch.testing.assert_close(trained, validated, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(merge_lora(net).eval()(x), validated, atol=1e-3, rtol=1e-3)

    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4),
                           nn.Conv2d(4, 4, 1))
    assert finetune_lora.trained_layers(pooled) == ["0", "3"]  # as in DAT
    net = load_net(tmp_path / "span.pth").requires_grad_(True).train()
    args.lora_targets = ["*.eval_conv"]
    with pytest.raises(ValueError, match="--lora-targets: training does not reach .*eval_conv"):
        finetune_lora.adapt(args, net)
