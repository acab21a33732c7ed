"""An operator that ATen does not have: the weight gradient of a convolution, sample by sample.

ATen sums it over the batch. On a CPU, oneDNN's product for one sample at a time reads the input in place and takes half
the time of batched products with patches or shifted inputs, which must be written first (examples/bench/step.py: the
paper's CNN). So it stays one node of the graph, whose kernel is a loop over the samples. Elsewhere
:class:`~ddpn_fx.passes.rules.convolution.Convolution` forms the same columns by batched products.

Shapes: B batch, O outputs, C inputs of a group, (kh, kw) the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_ONEDNN_LEAST = 20480  # elements of an input, in ATen's choice of a convolution's backend
_library = torch.library.Library("ddpn_fx", "FRAGMENT")
_library.define(
    "conv2d_weight_columns(Tensor h, Tensor x, SymInt[] kernel, int[] stride, int[] padding, int[] dilation, "
    "int groups) -> Tensor",
    # Whatever strides a backend gives its inputs: an exact layout would be a copy of each.
    tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag),
)
conv2d_weight_columns = torch.ops.ddpn_fx.conv2d_weight_columns.default
"""``(h (B, O, Ho, Wo), x (B, C groups, H, W), [C, kh, kw], stride, padding, dilation, groups) -> (B, O, kh, kw, C)``.

Entry i is the gradient of ``<h_i, conv2d(x_i, W)>`` with respect to W (O, C, kh, kw), with the channels last, which is
how oneDNN lays out a weight's gradient where the activations have their channels last.
"""


@torch.library.impl(_library, "conv2d_weight_columns", "CompositeExplicitAutograd")
def _sample_by_sample(
    h: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    found = []
    # Below this size ATen leaves oneDNN for a slower kernel: then several samples go as groups of one.
    together = 8 if groups == 1 and x[0].numel() <= _ONEDNN_LEAST else 1
    for h_i, x_i in zip(h.split(together), x.split(together), strict=True):
        count = len(x_i)
        if count > 1:
            h_i, x_i = (t.reshape(1, -1, *t.shape[2:]) for t in (h_i, x_i))
        weight = x.new_empty(h_i.shape[1], *kernel)  # read for its shape alone
        options = (None, stride, padding, dilation, False, [0, 0], count * groups, [False, True, False])
        gradient = torch.ops.aten.convolution_backward(h_i, x_i, weight, *options)[1]
        found.append(gradient.unflatten(0, (count, -1)).permute(0, 1, 3, 4, 2))
    return torch.cat(found)


@torch.library.register_fake("ddpn_fx::conv2d_weight_columns", lib=_library)
def _shape(h: Tensor, x: Tensor, kernel: Sequence[int], *options: Any) -> Tensor:
    channels, *places = kernel
    return x.new_empty(x.shape[0], h.shape[1], *places, channels)


@register_flop_formula(torch.ops.ddpn_fx.conv2d_weight_columns)
def _flops(h: Sequence[int], x: Sequence[int], kernel: Sequence[int], *options: Any, **kwargs: Any) -> int:
    """Two for each product: as many as the batch's own weight gradient."""
    return 2 * math.prod(h) * math.prod(kernel)
