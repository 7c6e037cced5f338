"""Causal depthwise short convolution over packed sequences, with a streaming window.

Axes: N sequences, T tokens, C channels, W taps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdn2.kernels import numba
from gdn2.kernels.dispatch import Implementation, choose
from gdn2.numerics import silu
from gdn2.ragged import Ragged


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, ragged: Ragged, activate: bool = True
) -> tuple[Tensor, Tensor]:
    """y_t = sum_j weight[:, W-1-j] x_{t-j} (+ bias), SiLU after it unless `activate` is off.

    Args:
        x: packed tokens [T, C].
        weight: taps, the last one for the present token [C, W].
        window: the W - 1 inputs before each sequence, zero at its start [N, C, W - 1].

    Returns:
        y [T, C] and the window after the last token of each sequence [N, C, W - 1].
    """
    taps = weight.shape[1]
    past = taps - 1
    order, here, ends = ragged.behind_windows(past)
    history = window.to(x.dtype).transpose(1, 2).reshape(-1, x.shape[1])
    buffer = torch.cat([x, history])[order]
    y = buffer[here] * weight[:, past]
    for j in range(1, taps):
        y = y + buffer[here - j] * weight[:, past - j]
    if bias is not None:
        y = y + bias
    return silu(y) if activate else y, buffer[ends].transpose(1, 2).to(window.dtype)


class ShortConv(nn.Module):
    """Parameters of a short convolution in the layout every published checkpoint uses: weight [C, 1, W], bias [C].

    With the "triton" implementation gradients stop at the windows.
    """

    implementation: Implementation | None = None

    def __init__(self, channels: int, taps: int = 4, bias: bool = False, activate: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.activate = activate

    def reset_parameters(self) -> None:
        """Uniform in +- taps^-1/2, torch's own rule for a depthwise convolution; bias likewise."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def window(self, n: int) -> Tensor:
        """The window of n sequences that have not begun: zeros [n, C, W - 1]."""
        channels, _, taps = self.weight.shape
        return self.weight.new_zeros(n, channels, taps - 1)

    def forward(self, x: Tensor, window: Tensor, ragged: Ragged) -> tuple[Tensor, Tensor]:
        if choose(x.device, self.implementation, x.dtype) == "triton":
            from gdn2.kernels.triton import prologue

            return prologue.short_conv(x, self.weight[:, 0], self.bias, window.detach(), ragged, self.activate)
        if x.dtype != torch.float64 and choose(x.device, self.implementation) == "numba":
            return numba.short_conv(x, self.weight[:, 0], self.bias, window, ragged, self.activate)
        return short_conv(x, self.weight[:, 0], self.bias, window, ragged, self.activate)

    def step(self, x: Tensor, window: Tensor) -> Tensor:
        """One token for each of N sequences: x [N, C] to y [N, C]; `window` [N, C, W - 1] moves on in place."""
        taps = self.weight[:, 0]
        if choose(x.device, self.implementation, x.dtype) == "triton":
            from gdn2.kernels.triton import prologue

            return prologue.conv_step(x, taps, self.bias, window, activate=self.activate)
        if x.dtype != torch.float64 and choose(x.device, self.implementation) == "numba":
            return numba.conv_step(x, taps, self.bias, window, self.activate)
        y = x * taps[:, -1]
        for j in range(1, taps.shape[1]):
            y = y + window[:, :, -j].to(x.dtype) * taps[:, -1 - j]
        if self.bias is not None:
            y = y + self.bias
        window.copy_(torch.cat([window[:, :, 1:], x.unsqueeze(-1).to(window.dtype)], dim=-1))
        return silu(y) if self.activate else y
