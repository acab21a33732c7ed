"""Eigenvalues where LAPACK gives up."""

import math

import pytest
import torch

from ddpn_fx.passes.eigen import eigh, eigvalsh
from ddpn_fx.preconditioners import bases
from ddpn_fx.preconditioners.bases import eigenbases
from tests.harness import close


def with_zeros(count=60, n=128, dtype=torch.float32):
    """Second moments of four samples of inputs, most of which are always zero and some next to zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, n, 4, generator=generator, dtype=dtype)
    x = x * 10 ** (-8 * torch.rand(count, n, 1, generator=generator, dtype=dtype))
    x = torch.where(torch.rand(count, n, 1, generator=generator) < 0.7, 0.0, x)
    return x @ x.mT


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-30])
def test_matrices_with_rows_of_zeros_have_orthonormal_eigenvectors(scale):
    matrices = with_zeros() * scale
    values, vectors = eigh(matrices)
    close(vectors.mT @ vectors, torch.eye(128).expand_as(vectors), 1e-5, "orthonormal")
    size = matrices.abs().amax()
    assert (vectors * values[..., None, :] @ vectors.mT - matrices).abs().amax() < 1e-5 * size
    assert (eigvalsh(matrices) - values).abs().amax() < 1e-5 * size


def test_in_float64_eigenvalues_are_torchs():
    matrices = with_zeros(dtype=torch.float64)
    close(eigh(matrices)[0], torch.linalg.eigvalsh(matrices), 1e-12, "values")
    close(eigvalsh(matrices), torch.linalg.eigvalsh(matrices), 1e-12, "values alone")


def test_a_matrix_that_is_not_finite_has_values_of_nan_and_hurts_no_other():
    matrices = with_zeros(3, 5, torch.float64)
    alone = eigh(matrices[:1])[0]
    matrices[1, 2, 3] = math.inf
    for values in (eigh(matrices)[0], eigvalsh(matrices)):
        assert values[1].isnan().all()
        close(values[:1], alone, 1e-12, "its neighbour")


def test_one_entry_needs_no_solver():
    values, vectors = eigh(torch.tensor([[[-3.0]], [[math.nan]]]))
    assert values[0].item() == -3.0
    assert values[1].isnan()
    assert vectors.flatten().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("how", ["error", "nan"])
def test_bases_are_asked_of_float64_where_float32_fails_and_kept_where_both_do(how, monkeypatch):
    second = with_zeros(2, 12)
    wanted, failing = eigenbases(second), {torch.float32}

    def solver(matrices):
        if matrices.dtype not in failing:
            return eigh(matrices)
        if how == "error":
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        return matrices[..., 0], torch.full_like(matrices, math.nan)

    monkeypatch.setattr(bases, "eigh", solver)
    basis, inside = eigenbases(second)
    close(inside, wanted[1], 1e-5, "moments by float64")
    close(basis @ inside @ basis.mT, second, 1e-5, "S")
    failing.add(torch.float64)
    basis, inside = eigenbases(second)
    assert torch.equal(basis, torch.eye(12).expand_as(basis))
    assert torch.equal(inside, second)
