"""Images to columns, each with the elements under a window, and columns summed to images."""

import torch

from .._types import Size
from ..tape import record
from .registry import Rule, composite

T = torch.Tensor
_nn = torch._C._nn


class Im2Col(Rule):
    """y[n, c k, l] = x[n, c, s l + d k - p]:  dx = g, added at the elements it was copied from"""

    infer = staticmethod(_nn.im2col)
    public = staticmethod(_nn.im2col)

    @staticmethod
    def forward(input: T, kernel_size: Size, dilation: Size, padding: Size, stride: Size) -> T:
        return _nn.im2col(input, kernel_size, dilation, padding, stride)

    @staticmethod
    def d_input(
        g: T,
        input_shape: torch.Size,
        kernel_size: Size,
        dilation: Size,
        padding: Size,
        stride: Size,
    ) -> T:
        size = tuple(input_shape[-2:])
        return _nn.col2im(g, size, kernel_size, dilation, padding, stride)


class Col2Im(Rule):
    """y[n, c, s l + d k - p] is the sum of x[n, c k, l]:  dx = g at the elements it was added to"""

    infer = staticmethod(_nn.col2im)
    public = staticmethod(_nn.col2im)

    @staticmethod
    def forward(
        input: T,
        output_size: Size,
        kernel_size: Size,
        dilation: Size,
        padding: Size,
        stride: Size,
    ) -> T:
        return _nn.col2im(input, output_size, kernel_size, dilation, padding, stride)

    @staticmethod
    def d_input(g: T, kernel_size: Size, dilation: Size, padding: Size, stride: Size) -> T:
        return _nn.im2col(g, kernel_size, dilation, padding, stride)


@composite(_nn.im2col)
def im2col(input: T, kernel_size: Size, dilation: Size, padding: Size, stride: Size) -> T:
    return record(Im2Col, (input, kernel_size, dilation, padding, stride))[0]


@composite(_nn.col2im)
def col2im(
    input: T,
    output_size: Size,
    kernel_size: Size,
    dilation: Size,
    padding: Size,
    stride: Size,
) -> T:
    return record(Col2Im, (input, output_size, kernel_size, dilation, padding, stride))[0]
