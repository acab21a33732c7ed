"""What is lent to torch while it traces computes what torch's own operators do, and is taken back."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddpn_fx.passes.kernels import _DECOMPOSITIONS, lent

aten = torch.ops.aten
cross_entropy = _DECOMPOSITIONS[aten.cross_entropy_loss.default]
lstm = _DECOMPOSITIONS[aten.lstm.input]


def grads(value, *tensors):
    return value, *torch.autograd.grad(value.sum(), tensors)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 2, 2), (3,)], ids=str)
@pytest.mark.parametrize("soft", [True, False])
def test_cross_entropy(reduction, smoothing, weighted, shape, soft):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dim = min(1, len(shape) - 1)
    target = torch.rand(shape, dtype=torch.float64).softmax(dim) if soft else torch.randn(shape).argmax(dim)
    weight = torch.rand(3, dtype=torch.float64) if weighted else None
    number = ("none", "mean", "sum").index(reduction)
    want = F.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(
        grads(cross_entropy(x, target, weight, number, -100, smoothing), x), grads(want, x), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("projected", [0, 2])
@pytest.mark.parametrize("batch", [1, 4])
def test_lstm(layers, bidirectional, projected, batch):
    layer = nn.LSTM(3, 4, layers, bidirectional=bidirectional, proj_size=projected, batch_first=True).double()
    x = torch.randn(batch, 5, 3, dtype=torch.float64)
    count = layers * (2 if bidirectional else 1)
    start = [torch.randn(count, batch, n, dtype=torch.float64) for n in (projected or 4, 4)]
    out, final = layer(x, tuple(start))
    found = lstm(x, start, layer._flat_weights, True, layers, 0.0, True, bidirectional, True)
    torch.testing.assert_close(found, (out, *final), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fails", [False, True])
def test_torch_s_own_come_back(fails):
    a_shape = "aten::fake_quantize_per_channel_affine_cachemask", "Meta"
    before = {op: dict(op.py_kernels) for op in _DECOMPOSITIONS}
    knew = torch._C._dispatch_has_kernel_for_dispatch_key(*a_shape)
    with pytest.raises(RuntimeError) if fails else nullcontext(), lent():
        assert all(set(op.py_kernels.values()) == {f} for op, f in _DECOMPOSITIONS.items())
        assert torch._C._dispatch_has_kernel_for_dispatch_key(*a_shape)
        if fails:
            raise RuntimeError
    assert before == {op: op.py_kernels for op in _DECOMPOSITIONS}
    assert torch._C._dispatch_has_kernel_for_dispatch_key(*a_shape) == knew
