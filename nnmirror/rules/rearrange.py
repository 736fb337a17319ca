"""Elements of images moved: channels to pixels and back, channels among each other.

Each element is copied once, so the gradient is moved back.
"""

import torch

from .registry import Rule, rule

T = torch.Tensor


@rule(torch.pixel_shuffle)
class PixelShuffle(Rule):
    """y[c, h r + i, w r + j] = x[(c r + i) r + j, h, w]:  dx = g, moved back

    y of shape (*, C, H r, W r) from x of shape (*, C r^2, H, W), r = `upscale_factor`
    """

    @staticmethod
    def forward(input: T, upscale_factor: int) -> T:
        return torch.pixel_shuffle(input, upscale_factor)

    @staticmethod
    def d_input(g: T, input_shape: torch.Size, upscale_factor: int) -> T:
        if not g.numel():  # for an empty input PyTorch keeps the shape, and its backward fails
            return g.reshape(input_shape)
        return torch.pixel_unshuffle(g, upscale_factor)


@rule(torch.pixel_unshuffle)
class PixelUnshuffle(Rule):
    """y[(c r + i) r + j, h, w] = x[c, h r + i, w r + j]:  dx = g, moved back

    y of shape (*, C r^2, H, W) from x of shape (*, C, H r, W r), r = `downscale_factor`
    """

    @staticmethod
    def forward(input: T, downscale_factor: int) -> T:
        return torch.pixel_unshuffle(input, downscale_factor)

    @staticmethod
    def d_input(g: T, downscale_factor: int) -> T:
        return torch.pixel_shuffle(g, downscale_factor)


@rule(torch.channel_shuffle)
class ChannelShuffle(Rule):
    """y[n, i G + k] = x[n, k C / G + i] for C channels in G = `groups`:  dx = g, moved back"""

    @staticmethod
    def forward(input: T, groups: int) -> T:
        return torch.channel_shuffle(input, groups)

    @staticmethod
    def d_input(g: T, groups: int) -> T:
        return torch.channel_shuffle(g, g.shape[1] // groups)
