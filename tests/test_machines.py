"""Other machines: Apple's GPU, Windows, other Pythons, fewer packages.

None of them is here, so the pieces are tested: which device is taken, what is imported, how data
workers start, what a decoder gives.
"""

import ast
import contextlib
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make_data import make_hggt
from scripts import ROOT, environment
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_sr
from models.cache import PixelCache
from models.checkpoint import load_file
from models.distributed import init_distributed, start_method
from models.hggt import load_sets
from models.losses import laplacian_loss
from models.swinir import stochastic_depth

FILES = sorted(path for path in ROOT.rglob("*.py")
               if not {"runs", ".venv", "datasets"} & {*path.relative_to(ROOT).parts})
SCRIPTS = ("analyze_iqa", "train_sr", "finetune_lora", "evaluate")


def python(code, cwd=ROOT, **env):
    """Run code in a process of its own, in which it must not fail."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True,
                          timeout=200, env=environment(**env))
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------------- Apple's GPU


@pytest.mark.parametrize(("cuda", "mps", "holds", "autocast", "world", "expected"), [
    (True, True, True, True, 1, "cuda:0"),
    (False, True, True, True, 1, "mps"),
    (False, False, False, True, 1, "cpu"),
    (False, True, False, True, 1, "cpu"),  # a virtual machine
    (False, True, True, False, 1, "cpu"),  # torch 2.4
    (False, True, True, True, 2, "cpu"),  # gloo does not take its tensors
])
def test_the_device_is_cuda_else_mps_else_the_cpu(
    monkeypatch, cuda, mps, holds, autocast, world, expected
):
    def ones(size, device):
        assert device == "mps"
        if not holds:
            raise RuntimeError("MPS backend out of memory")
        return torch.tensor([1.0] * size)

    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda device: autocast)
    monkeypatch.setattr(torch, "ones", ones)
    assert str(init_distributed()[2]) == expected


class NoFloat64(TorchDispatchMode):
    """Refuses tensors in double precision on the device meta, which stands in for mps."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            assert not (isinstance(x, torch.Tensor) and x.is_meta and x.dtype == torch.float64)
        return out


@pytest.mark.parametrize("name", ["swinir_tiny", "rrdb_tiny"])
def test_a_training_step_has_no_double_precision_on_the_device(name, monkeypatch):
    """mps has none. (autocast and Adam's fused kernels do not know the stand-in.)"""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    net, net_ema = (train_sr.PRESETS[name]["build"]().to("meta") for _ in range(2))
    net_d = train_sr.build_discriminator(name, None).to("meta")
    optim = torch.optim.Adam(net.parameters())
    with NoFloat64():
        lq = torch.empty(2, 3, 16, 16, device="meta", dtype=torch.uint8).float() / 255
        gt = torch.empty(2, 3, 64, 64, device="meta")
        depth = ()
        if name == "swinir_tiny":
            depth = (stochastic_depth(0, [0, 1], net.depths, 0.1).to("meta"),)
        sr = net(lq, *depth).float()
        losses = train_sr.generator_losses(sr, gt, net_d, laplacian_loss, None)
        sum(losses.values()).backward()
        train_sr.update(optim, 1e-3)
        train_sr.discriminator_loss(net_d, sr, gt).backward()
        train_sr.ema_update(net_ema, net, 0.9)
        with pytest.raises(AssertionError):
            gt.double()


# ------------------------------------------------------------------------- Windows


TINY = ("--net", "swinir_tiny", "--data", "HGGT", "--sampler", "rand", "--init", "none", "--steps",
        "2", "--batch-size", "2", "--patch-size", "32", "--perceptual", "laplacian", "--log-every",
        "1", "--ema-warmup")


def test_the_scripts_run_without_what_windows_lacks(tmp_path):
    make_hggt(tmp_path / "HGGT", n=2)
    python(f"""if True:
        import windows
        import {", ".join(SCRIPTS)}, tools.upscale
        train_sr.main(train_sr.parse_args({[*TINY, "--num-workers", "0", "--out", "run"]}))
        """, cwd=tmp_path)
    assert (tmp_path / "run/net_g_ema.pt").is_file()


def test_a_worker_is_forked_on_linux_alone(monkeypatch):
    assert start_method() == ("fork" if sys.platform.startswith("linux") else "spawn")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        assert start_method() == "spawn"
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert start_method() == "spawn"


def test_spawned_workers_give_what_forked_ones_give(tmp_path, monkeypatch):
    make_hggt(tmp_path / "HGGT", n=3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    contexts = []

    def make_loader(*args):
        loader = make(*args)
        contexts.append(loader.multiprocessing_context.get_start_method())
        return loader

    make = train_sr.make_loader
    monkeypatch.setattr(train_sr, "make_loader", make_loader)
    for methods in (["fork", "spawn"], ["spawn"]):
        monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda m=methods: m)
        train_sr.main(train_sr.parse_args([*TINY, "--num-workers", "2", "--cache", "cache", "--out",
                                           methods[0]]))
    assert contexts == ["fork", "spawn"]
    assert Path("fork/log.csv").read_text() == Path("spawn/log.csv").read_text()
    forked, spawned = (load_file(f"{out}/last.pt")["params"] for out in contexts)
    assert all(torch.equal(forked[key], spawned[key]) for key in forked)


def test_a_cache_is_opened_anew_where_it_is_unpickled(tmp_path):
    make_hggt(tmp_path / "HGGT", n=3)
    cache = PixelCache(tmp_path / "cache", load_sets(tmp_path / "HGGT"), "key")
    data = pickle.dumps(cache)
    assert len(data) < cache.pixels.nbytes / 10
    again = pickle.loads(data)
    assert np.array_equal(again[1, 2], cache[1, 2]) and not again[1, 2].flags.writeable
    again.check()


def test_the_cache_renames_its_file_closed_where_it_must(tmp_path, monkeypatch):
    """Windows renames no open file, and has no lock that would have to last."""
    make_hggt(tmp_path / "HGGT", n=1)
    sets, rename, still_open = load_sets(tmp_path / "HGGT"), os.replace, []

    def replace(part, file):
        opened = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
        still_open.append(part.resolve() in opened)
        rename(part, file)

    monkeypatch.setattr("models.cache.os.replace", replace)
    PixelCache(tmp_path / "a", sets, "key")
    fake = SimpleNamespace(**{**vars(os), "name": "nt"})
    monkeypatch.setattr("models.cache.os", fake)
    PixelCache(tmp_path / "b", sets, "key")
    assert still_open == [True, False]


# ------------------------------------------------------------------------- Pythons and packages


def test_all_files_are_python_3_10():
    assert len(FILES) > 80
    for path in FILES:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))
    with pytest.raises(SyntaxError):
        ast.parse("type A = int", feature_version=(3, 10))


def test_the_scripts_need_no_package_of_the_demo_and_the_figures():
    python(f"""if True:
        import sys
        for name in ("skimage", "matplotlib", "kornia_rs"):
            sys.modules[name] = None
        import {", ".join(SCRIPTS)}, tools.upscale, tools.check
        """)
    own = {line.split(">")[0] for line in (ROOT / "demo/requirements.txt").read_text().splitlines()
           if line[0] not in "#-"}
    assert own == {"scikit-image", "matplotlib"}
    listed = (ROOT / "requirements.txt").read_text()
    assert not any(name in listed for name in own)
