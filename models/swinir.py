"""SwinIR x4 (Liang et al., ICCVW 2021, arXiv:2108.10257), the paper's transformer generator.

Written for this project. Module names, shapes and buffers follow the public code, so the official
SwinIR, HGGT and BasicSR weights load strictly and give the same output. Tensors inside the blocks
are (B, H, W, C).
"""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, as in the public code
# Added to the logits of token pairs that are not neighbours in the image. The public buffers hold
# -100, whose softmax is a denormal number: same result, but a CPU takes 1.3 times as long.
MASKED, PUBLIC_MASKED = -1000.0, -100.0
KEYS = re.compile(
    r"(conv_first|patch_embed\.norm|norm|conv_after_body(\.\d)?|conv_before_upsample\.0|upsample\.\d"
    r"|conv_up\d|conv_hr|conv_last)\.(weight|bias)"
    r"|layers\.\d+\.(conv(\.\d)?\.(weight|bias)|residual_group\.blocks\.\d+\.(attn_mask"
    r"|(norm\d|attn\.qkv|attn\.proj|mlp\.fc\d)\.(weight|bias)"
    r"|attn\.relative_position_(bias_table|index)))")
UPSAMPLERS = ("pixelshuffle", "nearest+conv", "pixelshuffledirect")
CACHED_MASKS = 4  # sizes; an image's tiles have at most four (inner, right, bottom, corner)
CUDA_GRID = 2**16  # blocks that the fused attention's kernels can start in one dimension
LARGEST_KEPT_MASK = 2**24  # values, 64 MiB: the mask of 512 x 512 LQ pixels


def window_partition(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B, windows, window * window, C); H and W are multiples of window."""
    b, h, w, c = x.shape
    x = x.view(b, h // window, window, w // window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b, -1, window * window, c)


def window_reverse(x: Tensor, window: int, h: int, w: int) -> Tensor:
    """(B, windows, window * window, C) -> (B, h, w, C); the inverse of window_partition."""
    b, c = x.shape[0], x.shape[-1]
    x = x.view(b, h // window, w // window, window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)


def relative_position_index(window: int) -> Tensor:
    """Row of the bias table for each (query, key) of a window: (window^2, window^2) int64.

    Rows run over (dy + window - 1) * (2 * window - 1) + (dx + window - 1), d = query - key.
    """
    token = torch.arange(window * window)
    y, x = token // window, token % window
    dy = y[:, None] - y[None, :] + window - 1
    dx = x[:, None] - x[None, :] + window - 1
    return dy * (2 * window - 1) + dx


def shifted_window_mask(
    h: int, w: int, window: int, device: torch.device | None = None, masked: float = MASKED
) -> Tensor:
    """Attention mask of the windows shifted by window // 2: (windows, window^2, window^2) float32.

    The cyclic shift moves the first rows and columns to the end, so windows there mix pixels from
    opposite borders. The mask is 0 for pairs that were neighbours before the shift, `masked` for
    the others. h and w are multiples of window.
    """
    wrapped_row = torch.arange(h, device=device) >= h - window // 2
    wrapped_col = torch.arange(w, device=device) >= w - window // 2
    region = 2 * wrapped_row[:, None] + wrapped_col[None, :]  # (h, w), values 0..3
    region = window_partition(region[None, :, :, None], window)[0, :, :, 0]  # (windows, window^2)
    return (region[:, :, None] != region[:, None, :]).float() * masked


def stochastic_depth(
    seed: int, draws: Sequence[int], depths: Sequence[int], rate: float = 0.1
) -> Tensor:
    """Multipliers of the two residual branches of each block: (draws, blocks, 2) float32.

    A branch is dropped (0) with a probability that rises linearly from 0 in the first block to
    `rate` in the last, and else scaled by 1 / (1 - probability), as timm's DropPath in the public
    code. Each multiplier is a function of (seed, draw), so a resume or another number of processes
    changes nothing.
    """
    blocks = sum(depths)
    dropped = np.linspace(0, rate, blocks)[:, None]
    kept = [np.random.default_rng((seed, draw, 2)).random((blocks, 2)) >= dropped for draw in draws]
    return torch.from_numpy(np.stack(kept) / (1 - dropped)).float()


def reflect_pad(x: Tensor, multiple: int) -> Tensor:
    """Reflect (B, C, H, W) at the right and bottom until H and W are multiples of `multiple`.

    It selects by index, because F.pad refuses a padding as large as the image. A side of 1 repeats.
    """
    for dim in (2, 3):
        size = x.shape[dim]
        padded = -(-size // multiple) * multiple
        if padded > size:
            period = max(2 * (size - 1), 1)
            i = torch.arange(padded, device=x.device) % period
            x = x.index_select(dim, torch.minimum(i, period - i))
    return x


class Mlp(nn.Module):
    """Linear, GELU, linear, on the last dimension."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T + bias + mask) v of (B, windows, heads, tokens, d); bias: (heads, tokens,
    tokens), mask: (windows, tokens, tokens).

    For the CPU: the fast kernel of F.scaled_dot_product_attention there cannot take a bias that
    needs a gradient, and with the slow one training took 1.2 to 1.8 times as long.
    """
    if mask is not None:
        bias = bias + mask[:, None]  # (windows, heads, tokens, tokens)
    return (q @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v


def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """`plain_attention` by F.scaled_dot_product_attention, for GPUs.

    Its fused kernels need d to be a multiple of 8, so zeros are appended. Bias and mask take q's
    type, bfloat16 under autocast, before they are added: where the mask is 0, the sum is the same.
    The logits stay float32 inside the kernel.
    """
    b, n, h, t, d = q.shape
    bias = bias.to(q.dtype)
    if mask is not None:
        bias = bias + mask[:, None].to(q.dtype)  # (windows, heads, tokens, tokens)
    # A bias of its own for each window: the windows count as heads, so that it need not be repeated
    shape = (b, n * h, t, -1) if bias.ndim == 4 else (b * n, h, t, -1)
    q, k, v = (F.pad(x, (0, -d % 8)).reshape(shape) for x in (q, k, v))
    bias = bias.reshape(1, -1, t, t).expand(len(q), -1, -1, -1)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    return x.view(b, n, h, t, -1)[..., :d]


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learned relative position bias."""

    def __init__(self, dim: int, window: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(
            torch.empty((2 * window - 1) ** 2, num_heads)
        )
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x: (B, windows, tokens, C); mask: (windows, tokens, tokens), added to the logits."""
        b, n, t, c = x.shape
        qkv = self.qkv(x).view(b, n, t, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # each (B, windows, heads, tokens, C / heads)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        fits = b * n * self.num_heads < CUDA_GRID
        attention = fused_attention if x.is_cuda and fits else plain_attention
        x = attention(self.scale * q, k, v, bias, mask)
        return self.proj(x.transpose(2, 3).reshape(b, n, t, c))  # (B, windows, tokens, C)


class SwinBlock(nn.Module):
    """Window attention, then an MLP; each follows a LayerNorm and has a skip."""

    def __init__(
        self, dim: int, num_heads: int, window: int, shifted: bool, hidden: int, img_size: int
    ):
        super().__init__()
        self.window = window
        self.shift = window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)
        if shifted:
            # Kept only for the public state dict; forward takes its mask from SwinIR.
            mask = shifted_window_mask(img_size, img_size, window, masked=PUBLIC_MASKED)
            self.register_buffer("attn_mask", mask)

    def forward(self, x: Tensor, mask: Tensor, branches: Tensor | None) -> Tensor:
        """x: (B, H, W, C), sides multiples of the window; mask: shifted_window_mask(H, W);
        branches: (B, 2), what multiplies attention and MLP, see `stochastic_depth`."""
        h, w = x.shape[1:3]
        y = self.norm1(x)
        if self.shift:
            y = y.roll((-self.shift, -self.shift), dims=(1, 2))
        y = window_partition(y, self.window)  # (B, windows, tokens, C)
        y = self.attn(y, mask if self.shift else None)
        y = window_reverse(y, self.window, h, w)  # (B, H, W, C)
        if self.shift:
            y = y.roll((self.shift, self.shift), dims=(1, 2))
        if branches is None:
            x = x + y
            return x + self.mlp(self.norm2(x))
        attention, mlp = branches.to(y.dtype).view(-1, 2, 1, 1, 1).unbind(1)  # (B, 1, 1, 1)
        x = x + attention * y
        return x + mlp * self.mlp(self.norm2(x))


def residual_conv(dim: int, kind: str) -> nn.Module:
    """The convolution before a skip: "1conv", or "3conv" of the public L models, a bottleneck."""
    if kind == "1conv":
        return nn.Conv2d(dim, dim, 3, 1, 1)
    return nn.Sequential(
        nn.Conv2d(dim, dim // 4, 3, 1, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(dim // 4, dim // 4, 1), nn.LeakyReLU(0.2), nn.Conv2d(dim // 4, dim, 3, 1, 1),
    )  # fmt: skip


class ResidualSwinGroup(nn.Module):
    """RSTB: `depth` Swin blocks, every second one shifted, then `residual_conv`; with a skip."""

    def __init__(
        self, dim: int, depth: int, num_heads: int, window: int, hidden: int, img_size: int,
        resi_connection: str,
    ):
        super().__init__()
        blocks = [
            SwinBlock(dim, num_heads, window, i % 2 == 1, hidden, img_size) for i in range(depth)
        ]
        self.residual_group = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.conv = residual_conv(dim, resi_connection)

    def forward(self, x: Tensor, mask: Tensor, branches: Tensor | None) -> Tensor:
        """x: (B, H, W, C); mask: as in SwinBlock; branches: (B, depth, 2), as in SwinBlock."""
        y = x
        for i, block in enumerate(self.residual_group["blocks"]):
            y = block(y, mask, None if branches is None else branches[:, i])
        y = self.conv(y.permute(0, 3, 1, 2))  # (B, C, H, W)
        return y.permute(0, 2, 3, 1) + x  # (B, H, W, C)


class SwinIR(nn.Module):
    """SwinIR for x4 super-resolution of RGB images; the defaults are the paper's network.

    img_size:  LQ pixels per side of the stored `attn_mask` buffers; any input size works
    upsampler: "pixelshuffle" (the paper's), "nearest+conv" (the public real-world models') or
               "pixelshuffledirect" (the public lightweight model's)
    resi_connection: "1conv", or "3conv" of the public L models
    num_feat:  channels of the upsampling tail; every public model has 64
    Raises ValueError for an unsupported setting.
    """

    def __init__(
        self,
        upscale: int = 4,
        img_size: int = 64,
        window_size: int = 8,
        depths: Sequence[int] = (6,) * 6,
        embed_dim: int = 180,
        num_heads: Sequence[int] = (6,) * 6,
        mlp_ratio: float = 2,
        upsampler: str = "pixelshuffle",
        resi_connection: str = "1conv",
        num_feat: int = 64,
    ):
        super().__init__()
        if upscale != 4 or resi_connection not in ("1conv", "3conv"):
            raise ValueError("SwinIR: only upscale=4 with resi_connection 1conv or 3conv is "
                             "supported")
        if upsampler not in UPSAMPLERS:
            raise ValueError(f"SwinIR: upsampler {upsampler!r}, not one of {', '.join(UPSAMPLERS)}")
        if window_size % 2 or img_size % window_size or img_size <= window_size:
            raise ValueError(
                f"SwinIR: window_size {window_size} must be even and img_size {img_size} a "
                "multiple of it, at least twice as large"
            )
        if len(depths) != len(num_heads) or any(embed_dim % heads for heads in num_heads):
            raise ValueError(
                f"SwinIR: num_heads {tuple(num_heads)} must have one entry per depth "
                f"{tuple(depths)}, each a divisor of embed_dim {embed_dim}"
            )
        self.window_size = window_size
        self.upsampler = upsampler
        self.depths = list(depths)
        self.register_buffer("mean", torch.tensor(RGB_MEAN).view(1, 3, 1, 1), persistent=False)
        self._masks: dict[tuple, Tensor] = {}

        self.conv_first = nn.Conv2d(3, embed_dim, 3, 1, 1)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(embed_dim)})
        hidden = round(embed_dim * mlp_ratio)
        self.layers = nn.ModuleList(
            ResidualSwinGroup(embed_dim, depth, heads, window_size, hidden, img_size,
                              resi_connection)
            for depth, heads in zip(depths, num_heads, strict=True)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = residual_conv(embed_dim, resi_connection)

        if upsampler != "pixelshuffledirect":
            # The slope is 0.01 here, but 0.2 after the other convolutions of nearest+conv.
            self.conv_before_upsample = nn.Sequential(
                nn.Conv2d(embed_dim, num_feat, 3, 1, 1), nn.LeakyReLU(0.01)
            )
        if upsampler == "pixelshuffledirect":
            self.upsample = nn.Sequential(nn.Conv2d(embed_dim, 48, 3, 1, 1), nn.PixelShuffle(4))
        elif upsampler == "pixelshuffle":
            self.upsample = nn.Sequential(
                nn.Conv2d(num_feat, 4 * num_feat, 3, 1, 1),
                nn.PixelShuffle(2),
                nn.Conv2d(num_feat, 4 * num_feat, 3, 1, 1),
                nn.PixelShuffle(2),
            )
        else:
            self.conv_up1 = nn.Conv2d(num_feat, num_feat, 3, 1, 1)
            self.conv_up2 = nn.Conv2d(num_feat, num_feat, 3, 1, 1)
            self.conv_hr = nn.Conv2d(num_feat, num_feat, 3, 1, 1)
        if upsampler != "pixelshuffledirect":
            self.conv_last = nn.Conv2d(num_feat, 3, 3, 1, 1)

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def _mask(self, h: int, w: int, device: torch.device) -> Tensor:
        if torch.compiler.is_compiling():  # an exported graph computes it, for any size
            return shifted_window_mask(h, w, self.window_size, device)
        key = (h, w, device)
        if key in self._masks:
            return self._masks[key]
        mask = shifted_window_mask(h, w, self.window_size, device)
        if mask.numel() <= LARGEST_KEPT_MASK:
            if len(self._masks) == CACHED_MASKS:
                del self._masks[next(iter(self._masks))]  # the oldest
            self._masks[key] = mask
        return mask

    def forward(self, lq: Tensor, branches: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) float in [0, 1], any H and W >= 1 -> (B, 3, 4H, 4W), not clamped.

        branches: (B, blocks, 2) of `stochastic_depth`, in training; None: all of every block
        """
        h, w = lq.shape[2:]
        # ASSUMED: pad only up to whole windows, as the official SwinIR does. HGGT's copy adds a
        # whole window to a size that is a multiple already; the weights are interchangeable.
        x = reflect_pad(lq, self.window_size)
        mask = self._mask(x.shape[2], x.shape[3], x.device).to(x.dtype)

        shallow = self.conv_first(x - self.mean)
        x = self.patch_embed["norm"](shallow.permute(0, 2, 3, 1))  # (B, H, W, C)
        of_layers = [None] * len(self.layers)
        if branches is not None:
            of_layers = branches.split(self.depths, 1)
        for layer, of_layer in zip(self.layers, of_layers, strict=True):
            x = layer(x, mask, of_layer)
        x = self.norm(x).permute(0, 3, 1, 2)  # (B, C, H, W)
        x = self.conv_after_body(x) + shallow
        if self.upsampler == "pixelshuffledirect":
            return (self.upsample(x) + self.mean)[:, :, : 4 * h, : 4 * w]

        x = self.conv_before_upsample(x)
        if self.upsampler == "pixelshuffle":
            x = self.upsample(x)  # (B, num_feat, 4H, 4W)
        else:
            x = F.leaky_relu(self.conv_up1(F.interpolate(x, scale_factor=2.0)), 0.2)
            x = F.leaky_relu(self.conv_up2(F.interpolate(x, scale_factor=2.0)), 0.2)
            x = F.leaky_relu(self.conv_hr(x), 0.2)
        x = self.conv_last(x) + self.mean
        return x[:, :, : 4 * h, : 4 * w]

    @classmethod
    def matches(cls, state: Mapping[str, Tensor]) -> bool:
        """Whether the state dict is of a SwinIR, perhaps of one that from_state cannot build.

        HAT's and others have these keys too, and further ones.
        """
        needed = {"conv_first.weight",
                  "layers.0.residual_group.blocks.0.attn.relative_position_bias_table"}
        return needed <= set(state) and all(map(cls.is_key, state))

    @staticmethod
    def is_key(key: str) -> bool:
        return bool(KEYS.fullmatch(key))

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "SwinIR":
        """The network of a state dict, whose keys and shapes give the settings.

        Masks and position indices may be absent. Raises ValueError for another kind of network or
        another scale, and torch's RuntimeError for keys that are missing, unexpected or of another
        shape.
        """
        if not cls.matches(state):
            raise ValueError(f"not a SwinIR state dict: {len(state)} keys, {list(state)[:3]} ...")
        upsampler, scale = _tail(state)
        if scale != 4:
            raise ValueError(f"a SwinIR x{scale}; only x4 is supported")
        block = "layers.{}.residual_group.blocks.{}.".format
        table = "attn.relative_position_bias_table"
        depths, num_heads = [], []
        while block(len(depths), 0) + table in state:
            i = len(depths)
            num_heads.append(state[block(i, 0) + table].shape[1])
            depths.append(0)
            while block(i, depths[i]) + table in state:
                depths[i] += 1
        try:
            embed_dim = state["conv_first.weight"].shape[0]
            window_size = (math.isqrt(state[block(0, 0) + table].shape[0]) + 1) // 2
            masks = [state[k].shape[0] for k in state if k.endswith(".attn_mask")]
            net = cls(
                img_size=math.isqrt(masks[0]) * window_size if masks else 64,
                window_size=window_size,
                depths=depths,
                embed_dim=embed_dim,
                num_heads=num_heads,
                mlp_ratio=state[block(0, 0) + "mlp.fc1.weight"].shape[0] / embed_dim,
                upsampler=upsampler,
                resi_connection="3conv" if "conv_after_body.0.weight" in state else "1conv",
                num_feat=64 if upsampler == "pixelshuffledirect" else
                state["conv_before_upsample.0.weight"].shape[0],
            )
        except KeyError as key:
            raise ValueError(f"not the state dict of a SwinIR x4: missing {key}") from None
        computed = {k: v for k, v in net.state_dict().items()
                    if k.endswith((".attn_mask", ".relative_position_index"))}
        net.load_state_dict(computed | dict(state))
        return net


def _tail(state: Mapping[str, Tensor]) -> tuple[str, int]:
    """(upsampler, scale) of a SwinIR's state dict."""
    if "conv_before_upsample.0.weight" not in state and "upsample.0.weight" in state:
        return "pixelshuffledirect", math.isqrt(state["upsample.0.weight"].shape[0] // 3)
    if "conv_up1.weight" in state:
        return "nearest+conv", 4 if "conv_up2.weight" in state else 2
    first = state.get("upsample.0.weight")
    if first is not None and first.shape[0] == 9 * first.shape[1]:
        return "pixelshuffle", 3
    return "pixelshuffle", 2 ** sum(f"upsample.{i}.weight" in state for i in (0, 2, 4))
