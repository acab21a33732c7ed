"""Bundled kernels: those of one program in few libraries, the same results, and nothing of anybody else's."""

import logging

import pytest
import torch
from torch._inductor.cpp_builder import CppBuilder

from ddpn_fx.passes.bundle import _MOST, Bundle, _plain, _shared_out, bundled
from ddpn_fx.passes.direct import Direct
from ddpn_fx.passes.lower import trace

PLAIN = """#include <torch/csrc/inductor/cpp_prefix.h>
extern "C"  void  kernel(const float* in_ptr0,
                       float* out_ptr0)
{
    {
        out_ptr0[0] = in_ptr0[0];
    }
}
"""


@pytest.fixture
def built(monkeypatch):
    """The libraries that are built, in an empty cache."""
    from torch._inductor.utils import fresh_cache

    found, build = [], CppBuilder.build

    def counted(self, *args, **kwargs):
        target = self.get_target_file_path()
        if target.endswith(".so"):
            found.append(target)
        return build(self, *args, **kwargs)

    monkeypatch.setattr(CppBuilder, "build", counted)
    with fresh_cache():
        torch.compile(lambda x: x + 1)(torch.ones(3))  # inductor looks at the compiler once
        found.clear()
        yield found


def many(*tensors):
    """Products with a kernel of its own between each and the next, two of them the same."""
    x = tensors[0]
    for i, t in enumerate(tensors[1:]):
        x = (x @ t).sin() if i < 2 else (x @ t).relu() + i
    return [x, *(t.exp().sum(0) for t in tensors)]


def inputs(count=6, size=40):
    torch.manual_seed(0)
    return [torch.randn(size, size) / size**0.5 for _ in range(count)]


@pytest.mark.cases(1)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_program_is_few_libraries(built, monkeypatch, threads):
    monkeypatch.setattr("ddpn_fx.passes.bundle._LEAST", 1_000)
    given = inputs()
    with torch._inductor.config.patch(compile_threads=threads):
        direct = Direct(trace(many, given), {})
        for got, want in zip(direct(*given), many(*given), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert len(built) == threads
        for _ in range(2):  # the same program again, from inductor's caches
            again = Direct(trace(many, given), {})
            torch.testing.assert_close(list(again(*given)), list(direct(*given)))
    assert len(built) == threads


def test_only_ours(built):
    with bundled():
        pass  # the hooks are there from now on
    given = inputs()
    compiled = torch.compile(many, backend="inductor")
    torch.testing.assert_close(compiled(*given), many(*given), rtol=1e-4, atol=1e-5)
    assert len(built) > 2


def test_a_kernel_that_is_called_wrongly_says_so():
    bundle = Bundle(None)
    bundle.add(("const float*", "float*"), PLAIN)
    with torch._inductor.config.patch(compile_threads=1):
        (kernel,) = bundle.functions()
    given, found = torch.tensor([3.0]), torch.zeros(1)
    kernel(given, found)
    assert found.item() == 3
    with pytest.raises(RuntimeError, match="requires 2 args"):
        kernel(given)


def test_the_same_kernel_is_there_once():
    bundle = Bundle(None)
    first, again, other = (bundle.add((kind, "float*"), PLAIN) for kind in ("float*", "float*", "const float*"))
    assert (first.index, again.index, other.index) == (0, 0, 1)
    assert len(bundle.kernels) == 2


@pytest.mark.cases(1)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_bundle_that_is_refused_is_compiled_one_by_one(built, monkeypatch, caplog, threads):
    hand_out = "ddpn_fx.passes.bundle._HAND_OUT"
    monkeypatch.setattr(hand_out, "static PyObject* hand_out() {{ return no_such_function(); }}")
    given = inputs(4)
    with torch._inductor.config.patch(compile_threads=threads), caplog.at_level(logging.INFO, "ddpn_fx.passes"):
        direct = Direct(trace(many, given), {})
        for got, want in zip(direct(*given), many(*given), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert "one by one" in caplog.text
    assert len(built) > 2


@pytest.mark.parametrize(
    "source",
    [
        PLAIN.replace("extern", "static int helper() { return 1; }\nextern"),
        PLAIN.replace("kernel(", "other("),
        PLAIN + 'extern "C" void more() {}\n',
        "#define N 3\n" + PLAIN,
        "",
    ],
)
def test_what_is_not_plain_is_left_to_inductor(source):
    assert _plain(PLAIN)
    assert not _plain(source)


@pytest.mark.parametrize(
    ("lengths", "threads", "count"),
    [
        ([100], 8, 1),
        ([15_000] * 3, 8, 3),
        ([15_000] * 8, 2, 2),
        ([_MOST // 2] * 6, 1, 3),
        ([10, 90_000, 30_000, 30_000, 30_000], 2, 2),
    ],
)
def test_shared_out(lengths, threads, count):
    parts = _shared_out(lengths, threads)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert len(parts) == count
    taken = [sum(lengths[i] for i in part) for part in parts]
    assert max(taken) - min(taken) <= max(lengths) or count == 1
