"""A linear layer whose rows do not depend on how many there are.

Matrix-product libraries choose a kernel by the number of rows, so the same row gives other last bits in another batch.
Without gradients the product is made in blocks of a fixed number of rows (the last one filled with zeros); within one
block size every row's result depends on that row alone. Training uses the plain product, and so does who asks for
`rows_at_once(None)`.

Axes: T rows, D in, E out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 64  # rows of one matrix product, unless said otherwise

_rows: ContextVar[int | None] = ContextVar("rows of one matrix product", default=BLOCK)


@contextmanager
def rows_at_once(rows: int | None) -> Iterator[None]:
    """Products inside are made in blocks of so many rows; None is all rows at once, as the library likes it."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def blocked(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, D] times weight [E, D] transposed, plus bias [E], in blocks of the rows asked for: [T, E]."""
    size = _rows.get()
    if size is None:
        return F.linear(x, weight, bias)
    if weight.shape[0] == 1:  # a single column is a product with a vector, which rounds by the number of blocks
        y = blocked(x, weight.expand(2, -1))[:, :1]
        return y if bias is None else y + bias
    t, d = x.shape
    whole = -(-t // size) * size
    rows = x if whole == t else F.pad(x, (0, 0, 0, whole - t))
    blocks = rows.reshape(-1, size, d)
    y = torch.bmm(blocks, weight.t().expand(blocks.shape[0], d, weight.shape[0])).reshape(whole, -1)[:t]
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """`nn.Linear` on rows [T, D]; batch-invariant wherever gradients are off."""

    def __init__(self, d_in: int, d_out: int, bias: bool = False) -> None:
        super().__init__(d_in, d_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.shape[0] == 0:
            return F.linear(x, self.weight, self.bias)
        return blocked(x, self.weight, self.bias)
