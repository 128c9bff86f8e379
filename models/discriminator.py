"""U-Net discriminator with spectral norm (Real-ESRGAN, Wang et al., ICCVW 2021, arXiv:2107.10833).

Written for this project. Names and shapes follow the public code, so the Real-ESRGAN and HGGT
discriminators load strictly.
"""

import torch.nn.functional as F
from torch import Tensor, nn

# The older of torch's two spectral norms, because the public keys are convN.weight_orig, _u and _v.
# Its power iteration takes one step per forward in training mode and none in eval mode.
from torch.nn.utils import spectral_norm


def upsample2(x: Tensor) -> Tensor:
    """Double (B, C, H, W) bilinearly; pixel areas are aligned, not corners."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class UNetDiscriminatorSN(nn.Module):
    """Per pixel, the logit that an image is real; the defaults are the paper's network."""

    def __init__(self, num_in_ch: int = 3, num_feat: int = 64, skip_connection: bool = True):
        super().__init__()

        def down(c_in: int, c_out: int) -> nn.Module:
            return spectral_norm(nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False))

        def same(c_in: int, c_out: int) -> nn.Module:
            return spectral_norm(nn.Conv2d(c_in, c_out, 3, 1, 1, bias=False))

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
