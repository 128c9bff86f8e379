import math
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision

from models.losses import VGG19Loss, gan_loss_d, gan_loss_g, laplacian_loss


@pytest.fixture(scope="module")
def features():
    """torchvision's own VGG19 convolutions with random weights."""
    torch.manual_seed(0)
    layers = torchvision.models.vgg.cfgs["E"]
    features = torchvision.models.vgg.make_layers(layers)
    for layer in features:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
            torch.nn.init.uniform_(layer.bias, -0.1, 0.1)
    return features


@pytest.fixture(scope="module")
def state(features):
    return {f"features.{key}": value for key, value in features.state_dict().items()}


def images(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_vgg_taps_are_torchvisions_before_relu(features, state):
    image = images(1, 2, 3, 32, 48)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    taps = VGG19Loss(state).taps(image)
    # conv1_2, conv2_2, conv3_4, conv4_4, conv5_4 are the 2nd, 4th, 8th, 12th, 16th convolution:
    # found by counting here, by index in losses.py
    convolutions = [i for i, layer in enumerate(features) if isinstance(layer, torch.nn.Conv2d)]
    assert len(taps) == 5
    for tap, nth in zip(taps, (2, 4, 8, 12, 16), strict=True):
        with torch.no_grad():
            expected = features[: convolutions[nth - 1] + 1]((image - mean) / std)
        assert torch.equal(tap, expected)
        assert (tap < 0).any(), "taken after the ReLU"


def test_vgg_loss_is_the_weighted_l1(state):
    loss, sr, gt = VGG19Loss(state), images(1, 1, 3, 32, 32), images(2, 1, 3, 32, 32)
    parts = [(a - b).abs().mean() for a, b in zip(loss.taps(sr), loss.taps(gt), strict=True)]
    expected = 0.1 * parts[0] + 0.1 * parts[1] + parts[2] + parts[3] + parts[4]
    assert loss(sr, gt).item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss(sr, gt).shape == () and loss(gt, gt).item() == 0


def test_vgg_gradient_reaches_sr_only(state):
    loss = VGG19Loss(state).train()
    sr, gt = (images(i, 1, 3, 16, 16).requires_grad_() for i in (1, 2))
    loss(sr, gt).backward()
    assert sr.grad.abs().sum() > 0 and gt.grad is None
    assert all(not p.requires_grad and p.grad is None for p in loss.parameters())


def test_vgg_loads_a_file_and_needs_its_features_only(state, tmp_path):
    path = tmp_path / "vgg19.pth"
    torch.save(state | {"classifier.0.weight": torch.zeros(2, 2)}, path)
    image = images(1, 1, 3, 16, 16)
    assert torch.equal(VGG19Loss(path).taps(image)[4], VGG19Loss(state).taps(image)[4])


@pytest.mark.parametrize("key, change", [
    ("34.bias", {"features.34.bias": None}),
    ("37.weight", {"features.37.weight": torch.zeros(1)}),
    ("0.weight", {"features.0.weight": torch.zeros(64, 1, 3, 3)}),
])  # fmt: skip
def test_vgg_weights_that_do_not_fit(state, tmp_path, key, change):
    wrong = {k: v for k, v in (state | change).items() if v is not None}
    torch.save(wrong, tmp_path / "weights.pth")
    for weights in (wrong, tmp_path / "weights.pth"):
        with pytest.raises(RuntimeError, match=f'"{key}"|for {key}'):
            VGG19Loss(weights)


def test_vgg_unpickles_nothing_but_tensors(tmp_path):
    torch.save({"features.0.weight": pytest.approx}, tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError):
        VGG19Loss(tmp_path / "evil.pth")
    with pytest.raises(FileNotFoundError, match="none.pth"):
        VGG19Loss(tmp_path / "none.pth")


def test_vgg_without_weights_takes_the_hub_cache(state, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub/checkpoints/vgg19-dcbb9e9d.pth"
    cached.parent.mkdir(parents=True)
    torch.save(state, cached)
    image = images(1, 1, 3, 16, 16)
    assert torch.equal(VGG19Loss().taps(image)[4], VGG19Loss(state).taps(image)[4])


def test_laplacian_by_hand():
    # one bright pixel in the middle of 12 x 12, one level: the filter leaves 1 - (6/16)^2 there and
    # takes from its neighbours what it gave them, 1 - (6/16)^2 in all, over 144 pixels
    gt = torch.zeros(1, 1, 12, 12)
    sr = gt.clone()
    sr[0, 0, 6, 6] = 1.0
    assert laplacian_loss(sr, gt, levels=1).item() == pytest.approx(2 * (1 - 36 / 256) / 144)


def test_laplacian_compares_band_pass_residuals():
    sr, gt = images(1, 2, 3, 20, 24), images(2, 2, 3, 20, 24)
    taps = torch.tensor([1.0, 4, 6, 4, 1]) / 16

    def residual(x):
        flat = F.pad(x, (2, 2, 2, 2), mode="reflect").flatten(0, 1)[:, None]
        return x - F.conv2d(flat, torch.outer(taps, taps)[None, None]).view(x.shape)

    expected, a, b = 0, sr, gt
    for _ in range(3):
        expected += (residual(a) - residual(b)).abs().mean() / 3
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    assert laplacian_loss(sr, gt).item() == pytest.approx(expected.item(), rel=1e-5)
    assert laplacian_loss(gt + 0.2, gt).item() == pytest.approx(0, abs=1e-6)
    assert laplacian_loss(gt[..., :12, :12] * 0, gt[..., :12, :12]).item() > 0  # the smallest size
    sr.requires_grad_()
    laplacian_loss(sr, gt).backward()
    assert sr.grad.abs().sum() > 0


def test_gan_losses_by_hand():
    fake = torch.tensor([[0.0, 2.0], [-1.0, 3.0]])
    real = torch.tensor([[1.0, -2.0], [0.5, 4.0]])

    def cross_entropy(logits, label):
        sigmoid = [1 / (1 + math.exp(-x)) for x in logits.flatten().tolist()]
        return sum(-math.log(p if label else 1 - p) for p in sigmoid) / 4

    assert gan_loss_g(fake).item() == pytest.approx(cross_entropy(fake, 1))
    expected = cross_entropy(real, 1) + cross_entropy(fake, 0)
    assert gan_loss_d(real, fake).item() == pytest.approx(expected)
    assert gan_loss_g(torch.zeros(2, 2)).item() == pytest.approx(math.log(2))


def test_gan_gradients_pull_the_right_way():
    fake, real = torch.zeros(2, 2, requires_grad=True), torch.zeros(2, 2, requires_grad=True)
    gan_loss_g(fake).backward()
    assert torch.allclose(fake.grad, torch.full((2, 2), -0.125))  # G wants the logit up
    fake.grad = None
    gan_loss_d(real, fake).backward()
    assert torch.allclose(fake.grad, torch.full((2, 2), 0.125))
    assert torch.allclose(real.grad, torch.full((2, 2), -0.125))
