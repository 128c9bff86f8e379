"""U-Net discriminator with spectral norm (Real-ESRGAN, Wang et al., ICCVW 2021, arXiv:2107.10833).

Written for this project. Names and shapes follow the public code, so the Real-ESRGAN and HGGT
discriminators load strictly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SpectralConv2d(nn.Module):
    """Convolution without bias, its weight divided by its largest singular value (padding 1).

    Keys, initialisation and results are those of torch.nn.utils.spectral_norm, the public code's:
    one step of power iteration per forward pass in training mode, none in eval mode. But sigma is
    float32 under autocast, too: in bfloat16 weights would move by up to 0.5 % per layer.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int):
        super().__init__()
        self.stride = stride
        self.weight_orig = nn.Conv2d(c_in, c_out, kernel, bias=False).weight  # torch's own start
        for name, size in (("weight_u", c_out), ("weight_v", c_in * kernel**2)):
            self.register_buffer(name, F.normalize(torch.randn(size), dim=0, eps=1e-12))

    def weight(self) -> Tensor:
        with torch.autocast(self.weight_orig.device.type, enabled=False):
            matrix, u, v = self.weight_orig.flatten(1), self.weight_u, self.weight_v
            if self.training:
                with torch.no_grad():
                    v = F.normalize(torch.mv(matrix.t(), u), dim=0, eps=1e-12)
                    u = F.normalize(torch.mv(matrix, v), dim=0, eps=1e-12)
                    self.weight_u.copy_(u)  # copies: an earlier pass may still need its u and v
                    self.weight_v.copy_(v)
            return self.weight_orig / torch.dot(u, torch.mv(matrix, v))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight(), stride=self.stride, padding=1)


def upsample2(x: Tensor) -> Tensor:
    """Double (B, C, H, W) bilinearly; pixel areas are aligned, not corners."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class UNetDiscriminatorSN(nn.Module):
    """Per pixel, the logit that an image is real; the defaults are the paper's network."""

    def __init__(self, num_in_ch: int = 3, num_feat: int = 64, skip_connection: bool = True):
        super().__init__()

        def down(c_in: int, c_out: int) -> nn.Module:
            return SpectralConv2d(c_in, c_out, kernel=4, stride=2)

        def same(c_in: int, c_out: int) -> nn.Module:
            return SpectralConv2d(c_in, c_out, kernel=3, stride=1)

        self.skip_connection = skip_connection
        self.conv0 = nn.Conv2d(num_in_ch, num_feat, 3, 1, 1)
        self.conv1 = down(num_feat, 2 * num_feat)
        self.conv2 = down(2 * num_feat, 4 * num_feat)
        self.conv3 = down(4 * num_feat, 8 * num_feat)
        self.conv4 = same(8 * num_feat, 4 * num_feat)
        self.conv5 = same(4 * num_feat, 2 * num_feat)
        self.conv6 = same(2 * num_feat, num_feat)
        self.conv7 = same(num_feat, num_feat)
        self.conv8 = same(num_feat, num_feat)
        self.conv9 = nn.Conv2d(num_feat, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_in_ch, H, W) float in [0, 1] -> logits (B, 1, H, W).

        Raises ValueError if H or W is not a multiple of 8, which the three halvings need.
        """
        if x.shape[2] % 8 or x.shape[3] % 8:
            raise ValueError(f"discriminator: {x.shape[2]}x{x.shape[3]} px; sides must divide by 8")
        x0 = F.leaky_relu(self.conv0(x), 0.2)
        x1 = F.leaky_relu(self.conv1(x0), 0.2)  # (B, 2C, H/2, W/2)
        x2 = F.leaky_relu(self.conv2(x1), 0.2)  # (B, 4C, H/4, W/4)
        x3 = F.leaky_relu(self.conv3(x2), 0.2)  # (B, 8C, H/8, W/8)

        x = F.leaky_relu(self.conv4(upsample2(x3)), 0.2)  # (B, 4C, H/4, W/4)
        x = x + x2 if self.skip_connection else x
        x = F.leaky_relu(self.conv5(upsample2(x)), 0.2)  # (B, 2C, H/2, W/2)
        x = x + x1 if self.skip_connection else x
        x = F.leaky_relu(self.conv6(upsample2(x)), 0.2)  # (B, C, H, W)
        x = x + x0 if self.skip_connection else x

        x = F.leaky_relu(self.conv7(x), 0.2)
        x = F.leaky_relu(self.conv8(x), 0.2)
        return self.conv9(x)
