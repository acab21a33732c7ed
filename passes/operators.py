"""An operator that ATen does not have: the weight gradient of a convolution, sample by sample.

ATen sums it over the batch. Sample by sample it is a product of the cotangents with the patches of the input, which are
the input times the size of the kernel: to write all patches to memory and read them back takes several times as long
as the product. So it stays one node of the graph, whose kernel takes a few samples at a time: their patches, copied row
by row from an input with its channels last, stay in the cache until the product has read them.

Shapes: B batch, O outputs, C inputs, (kh, kw) the kernel, L = Ho Wo positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Elements of the patches that are in memory at a time: on a CPU what its cache holds, elsewhere what keeps it busy.
_AT_A_TIME = {"cpu": 1 << 19}
_ELSEWHERE = 1 << 26

_library = torch.library.Library("ddpn_fx", "FRAGMENT")
_library.define(
    "conv2d_weight_columns(Tensor h, Tensor x, SymInt[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor",
    # Whatever strides a backend gives its inputs: an exact layout would be a copy of each.
    tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag),
)
conv2d_weight_columns = torch.ops.ddpn_fx.conv2d_weight_columns.default
"""``(h (B, O, Ho, Wo), x (B, C, H, W), [kh, kw], stride, padding, dilation) -> (B, O, kh, kw, C)``.

Entry i is the gradient of ``<h_i, conv2d(x_i, W)>`` with respect to W (O, C, kh, kw), with the channels last.
"""


@torch.library.impl(_library, "conv2d_weight_columns", "CompositeExplicitAutograd")
def _columns(
    h: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    batch, outputs, height, width = h.shape
    (ph, pw), (sh, sw), (dh, dw) = padding, stride, dilation
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph)).contiguous()
    sample, row, place, _ = padded.stride()
    shape = (batch, height, width, *kernel, x.shape[1])
    windows = padded.as_strided(shape, (sample, sh * row, sw * place, dh * row, dw * place, 1))
    cotangents = h.permute(0, 2, 3, 1).flatten(1, 2)  # (B, L, O)
    size = math.prod(shape[1:])
    count = max(1, _AT_A_TIME.get(x.device.type, _ELSEWHERE) // max(1, size))
    found = [
        some.mT @ patches.reshape(len(some), height * width, -1)
        for some, patches in zip(cotangents.split(count), windows.split(count), strict=True)
    ]
    return torch.cat(found).view(batch, outputs, *kernel, x.shape[1])


@torch.library.register_fake("ddpn_fx::conv2d_weight_columns", lib=_library)
def _shape(h: Tensor, x: Tensor, kernel: Sequence[int], *options: Any) -> Tensor:
    return x.new_empty(x.shape[0], h.shape[1], *kernel, x.shape[1])


@register_flop_formula(torch.ops.ddpn_fx.conv2d_weight_columns)
def _flops(h: Sequence[int], x: Sequence[int], kernel: Sequence[int], *options: Any, **kwargs: Any) -> int:
    """Two for each product: as many as the batch's own weight gradient."""
    return 2 * math.prod(h) * x[1] * math.prod(kernel)
