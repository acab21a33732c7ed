"""Bases of second moments: eigenvectors, and what one step of orthogonal iteration makes of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx.preconditioners import EigenFactored, Site, rotated
from ddpn_fx.preconditioners.bases import eigenbases, iterated, orthonormal
from tests.harness import close


def moments(count=3, n=12, rank=None, dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(count, n, rank or 2 * n, dtype=dtype) * torch.logspace(0, -2, n, dtype=dtype)[:, None]
    return x @ x.mT


def orthogonal(basis):
    torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[-1], dtype=basis.dtype).expand_as(basis),
                               rtol=0, atol=1e-5 if basis.dtype == torch.float32 else 1e-10)  # fmt: skip


def correlation(second):
    """The mean square of what is off the diagonal, over the diagonal."""
    d = second.diagonal(dim1=-2, dim2=-1)
    c = second**2 / (d[..., :, None] * d[..., None, :])
    return float(c.sum((-2, -1)).mean() / second.shape[-1] - 1)


def test_eigenbases_diagonalise():
    second = moments()
    basis, inside = eigenbases(second)
    orthogonal(basis)
    close(basis.mT @ second @ basis, inside, 1e-10, "in the basis")
    assert correlation(inside) == 0.0


def test_an_iteration_is_torchs_qr_of_the_sorted_columns():
    second = moments()
    basis, inside = iterated(second)
    for one, got in zip(second, basis, strict=True):
        order = one.diagonal().argsort(descending=True)
        q, r = torch.linalg.qr(one[order][:, order] + 1e-6 * one.diagonal().mean() * torch.eye(12, dtype=one.dtype))
        want = torch.empty_like(q)
        want[order[:, None], order] = q * r.diagonal().sign()
        close(got, want, 1e-8, "Q")
    close(basis.mT @ second @ basis, inside, 1e-12, "in the basis")


def test_iterations_go_to_the_eigenbases():
    second, found = moments(), []
    inside = second
    for _ in range(30):
        found.append(correlation(inside))
        basis, inside = iterated(inside)
        orthogonal(basis)
    assert found[1] < 0.1 * found[0]
    assert found[-1] < 1e-4 * found[0]


def beside(second):
    """The norm of what is off the diagonal."""
    return float((second - second.diagonal(dim1=-2, dim2=-1).diag_embed()).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 4])
def test_without_full_rank_the_basis_is_a_whole_one(rank, dtype):
    second = moments(rank=rank, dtype=dtype)
    second[:, 3], second[:, :, 3] = 0.0, 0.0  # an input that is always zero
    basis, inside = iterated(second)
    orthogonal(basis)
    assert not torch.equal(basis, torch.eye(12, dtype=dtype).expand_as(basis))
    assert beside(inside) < 0.5 * beside(second)


@pytest.mark.parametrize("renewed", [eigenbases, iterated])
def test_a_matrix_that_cannot_be_used_keeps_its_basis_and_hurts_no_other(renewed):
    second = moments()
    alone = renewed(second[:1])[0]
    second[1, 2, 3] = math.nan
    second[2] = 0.0
    basis, _ = renewed(second)
    assert torch.equal(basis[1], torch.eye(12, dtype=basis.dtype))
    close(basis[:1], alone, 1e-12, "its neighbour")
    orthogonal(basis)


def test_newtons_step_mends_a_basis():
    basis = eigenbases(moments())[0]
    orthogonal(orthonormal(basis + 1e-6 * torch.randn_like(basis)))


@pytest.mark.parametrize("every", [1, 10, 16])
def test_after_doubled_steps_alone_an_iteration_gives_way_to_an_eigendecomposition(every, monkeypatch):
    exact = []

    def counted(second):
        exact.append(step)
        return eigenbases(second)

    monkeypatch.setattr(rotated, "eigenbases", counted)
    p, site = EigenFactored(solver="qr", refresh_every=every), Site("w", (3, 2))
    state = p.state(site, torch.zeros(()))
    for step in range(1, 41):
        p.refresh(site, state, step)
    wanted = {1: [1, 2, 4, 8, 16, 32], 10: [1, 2, 4, 8], 16: [1, 2, 4, 8, 16, 32]}[every]
    assert sorted(set(exact)) == wanted


@pytest.mark.parametrize("solver", ["eigh", "qr"])
def test_parameters_are_renewed_together_as_one_by_one(solver):
    """Those with bases of one size are a stack; a square weight has both of its sides in it."""
    p = EigenFactored(solver=solver)
    sites = {n: Site(n, shape) for n, shape in {"a": (6, 6), "b": (4, 6), "c": (6, 2, 3, 1), "bias": (6,)}.items()}
    states = {}
    for n, site in sites.items():
        states[n] = p.state(site, torch.zeros((), dtype=torch.float64))
        for slot, t in states[n].items():
            if slot.startswith("second"):
                x = torch.randn(*t.shape[:2], 9, dtype=t.dtype)
                t.copy_(x @ x.mT)
            elif not slot.startswith("basis"):
                t.copy_(torch.rand_like(t))
        if len(site.shape) > 1:
            states[n]["exp_avg"] = torch.randn(site.shape[0], math.prod(site.shape[1:]), dtype=torch.float64)
    singly = {n: {slot: t.clone() for slot, t in state.items()} for n, state in states.items()}
    for step in (1, 2, 10, 20):
        p.refresh_all([(sites[n], states[n]) for n in sites], step)
        for n, site in sites.items():
            p.refresh(site, singly[n], step)
    for n in sites:
        for slot, t in states[n].items():
            close(t, singly[n][slot], 1e-9, f"{n}, {slot}")
    assert not torch.equal(states["a"]["basis0"], states["a"]["basis1"])


def test_inputs_that_are_always_zero_stop_no_training():
    """Where torch's own eigendecomposition in float32 was seen to fail."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 3))
    opt = ddpn_fx.DDPNOpt(
        ddpn_fx.compile(model, loss=F.mse_loss, backend="eager"), preconditioner=EigenFactored(refresh_every=1)
    )
    size = torch.where(torch.rand(128) < 0.7, 0.0, 10 ** (-16 * torch.rand(128)))
    losses = []
    for _ in range(20):
        x = torch.randn(4, 128) * size
        losses.append(opt.train_step(x, x[:, :3] * 5 + 1))
        assert opt.stats["skipped"] == 0
    assert losses[-1] < 0.1 * losses[0]


def test_bases_are_renewed_in_full_precision():
    """Though autocast is on around the step: of bfloat16 they would be orthonormal to three digits."""
    torch.manual_seed(0)
    net = ddpn_fx.compile(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)), loss=F.cross_entropy,
                          backend="eager")  # fmt: skip
    opt = ddpn_fx.DDPNOpt(net, preconditioner="eigen-factored")
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            opt.train_step(torch.randn(32, 6), torch.randint(0, 3, (32,)))
    basis = opt.state[net[0].weight]["basis0"]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[-1]).expand_as(basis), rtol=0, atol=1e-5)
