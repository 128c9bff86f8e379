"""RRDBNet x4 (ESRGAN, Wang et al., ECCVW 2018, arXiv:1809.00219), the generator of Real-ESRGAN.

Written for this project. Names and shapes follow the public code (BasicSR), so the Real-ESRGAN,
HGGT and ESRGAN weights load strictly and give the same output.
"""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEYS = re.compile(  # model.N: old names of other scales
    r"(conv_(first|body|up\d|hr|last)|body\.\d+\.rdb\d\.conv\d|model\.\d+)\.(weight|bias)")
# The two older spellings of ESRGAN's checkpoints -> BasicSR's.
OLD_NAMES = (
    (r"^RRDB_trunk\.(\d+)\.RDB(\d)\.", r"body.\1.rdb\2."),
    (r"^trunk_conv\.", "conv_body."),
    (r"^upconv(\d)\.", r"conv_up\1."),
    (r"^HRconv\.", "conv_hr."),
    (r"^model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.", r"body.\1.rdb\2.conv\3."),
    (r"^model\.1\.sub\.\d+\.(weight|bias)$", r"conv_body.\1"),
    (r"^model\.0\.", "conv_first."),
    (r"^model\.3\.", "conv_up1."),
    (r"^model\.6\.", "conv_up2."),
    (r"^model\.9\.", "conv_up3."),  # x8 and x16, which from_state refuses by name
    (r"^model\.12\.", "conv_up4."),
    (r"^model\.8\.", "conv_hr."),
    (r"^model\.10\.", "conv_last."),
)


def modern_name(key: str) -> str:
    """BasicSR's name of an RRDBNet key: old ESRGAN names change, all others stay."""
    for pattern, name in OLD_NAMES:
        key, count = re.subn(pattern, name, key)
        if count:
            break
    return key


class ResidualDenseBlock(nn.Module):
    """Five 3x3 convolutions, each on the input and all outputs before it; with a scaled skip."""

    def __init__(self, num_feat: int, num_grow_ch: int):
        super().__init__()
        self.conv1 = nn.Conv2d(num_feat, num_grow_ch, 3, 1, 1)
        self.conv2 = nn.Conv2d(num_feat + num_grow_ch, num_grow_ch, 3, 1, 1)
        self.conv3 = nn.Conv2d(num_feat + 2 * num_grow_ch, num_grow_ch, 3, 1, 1)
        self.conv4 = nn.Conv2d(num_feat + 3 * num_grow_ch, num_grow_ch, 3, 1, 1)
        self.conv5 = nn.Conv2d(num_feat + 4 * num_grow_ch, num_feat, 3, 1, 1)
        for conv in self.children():
            nn.init.kaiming_normal_(conv.weight)
            conv.weight.data.mul_(0.1)  # small residuals, as the public code starts
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        x1 = F.leaky_relu(self.conv1(x), 0.2)
        x2 = F.leaky_relu(self.conv2(torch.cat((x, x1), 1)), 0.2)
        x3 = F.leaky_relu(self.conv3(torch.cat((x, x1, x2), 1)), 0.2)
        x4 = F.leaky_relu(self.conv4(torch.cat((x, x1, x2, x3), 1)), 0.2)
        x5 = self.conv5(torch.cat((x, x1, x2, x3, x4), 1))
        return x + 0.2 * x5


class RRDB(nn.Module):
    """Three dense blocks with a scaled skip."""

    def __init__(self, num_feat: int, num_grow_ch: int):
        super().__init__()
        self.rdb1 = ResidualDenseBlock(num_feat, num_grow_ch)
        self.rdb2 = ResidualDenseBlock(num_feat, num_grow_ch)
        self.rdb3 = ResidualDenseBlock(num_feat, num_grow_ch)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    """RRDBNet for x4 super-resolution; the defaults are the paper's network.

    Raises ValueError for a scale other than 4.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        scale: int = 4,
        num_feat: int = 64,
        num_block: int = 23,
        num_grow_ch: int = 32,
    ):
        super().__init__()
        if scale != 4:
            raise ValueError(f"RRDBNet: scale {scale}; only 4 is supported")
        self.conv_first = nn.Conv2d(num_in_ch, num_feat, 3, 1, 1)
        self.body = nn.Sequential(*[RRDB(num_feat, num_grow_ch) for _ in range(num_block)])
        self.conv_body = nn.Conv2d(num_feat, num_feat, 3, 1, 1)
        self.conv_up1 = nn.Conv2d(num_feat, num_feat, 3, 1, 1)
        self.conv_up2 = nn.Conv2d(num_feat, num_feat, 3, 1, 1)
        self.conv_hr = nn.Conv2d(num_feat, num_feat, 3, 1, 1)
        self.conv_last = nn.Conv2d(num_feat, num_out_ch, 3, 1, 1)

    def forward(self, lq: Tensor) -> Tensor:
        """(B, 3, H, W) float in [0, 1], any H and W >= 1 -> (B, 3, 4H, 4W), not clamped."""
        x = self.conv_first(lq)
        x = x + self.conv_body(self.body(x))
        x = F.leaky_relu(self.conv_up1(F.interpolate(x, scale_factor=2.0)), 0.2)  # (B, C, 2H, 2W)
        x = F.leaky_relu(self.conv_up2(F.interpolate(x, scale_factor=2.0)), 0.2)  # (B, C, 4H, 4W)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))

    @classmethod
    def matches(cls, state: Mapping[str, Tensor]) -> bool:
        """Whether the state dict is of an RRDBNet, with new or old names.

        ESRGAN+'s and others have these keys too, and further ones.
        """
        needed = {"conv_first.weight", "body.0.rdb1.conv1.weight"}
        return needed <= set(map(modern_name, state)) and all(map(cls.is_key, state))

    @staticmethod
    def is_key(key: str) -> bool:
        return bool(KEYS.fullmatch(modern_name(key)))

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "RRDBNet":
        """The network of a state dict, whose keys and shapes give the settings.

        Raises ValueError for another kind of network, and torch's RuntimeError for keys that are
        missing, unexpected or of another shape.
        """
        if not cls.matches(state):
            raise ValueError(f"not an RRDBNet state dict: {len(state)} keys, {list(state)[:3]} ...")
        state = {modern_name(k): v for k, v in state.items()}
        num_feat, num_in_ch = state["conv_first.weight"].shape[:2]
        levels = sum(k.startswith("conv_up") and k.endswith(".weight") for k in state)
        unshuffle = {3: 1, 12: 2, 48: 4}.get(num_in_ch)  # newer x2 and x1 unshuffle pixels first
        scale = 2**levels // unshuffle if unshuffle else None
        if scale != 4:
            raise ValueError(f"RRDBNet: weights with {num_in_ch} input channels are not of x4 RGB"
                             + (f" but of x{scale}; only x4 is supported" if scale else ""))
        net = cls(
            num_feat=num_feat,
            num_block=len({k.split(".")[1] for k in state if k.startswith("body.")}),
            num_grow_ch=state["body.0.rdb1.conv1.weight"].shape[0],
        )
        net.load_state_dict(state)
        return net
