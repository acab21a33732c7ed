"""The second moments of "eigen-factored" from sums of neighbours: the oracle's, right in the mean, and where."""

import pytest
import torch

from ddpn_fx.passes.metric import Moment, Site
from ddpn_fx.preconditioners import EigenFactored
from tests import oracle


def moments(d, step=3, name="a.weight", **options):
    """Second moments of rows and columns after a step with the direction d, from zeros, and the options."""
    p = EigenFactored(basis_decay=0.9, **options)
    site = Site(name, tuple(d.shape))
    state = p.state(site, torch.zeros((), dtype=d.dtype))
    flat = d.flatten(1)
    _, new = p.metric(Moment(site, flat, torch.tensor(float(step)), d.dtype, None), state)
    return new["second0"], new.get("second1")


def parts(t, size):
    return [t[i : i + size] for i in range(0, len(t), size)]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 60), (12, 5, 3, 2)])
@pytest.mark.parametrize("least", [4, 8])
def test_they_are_the_oracles(shape, least):
    torch.manual_seed(0)
    d = torch.randn(shape, dtype=torch.float64)
    flat, step = d.flatten(1), 3
    rows, columns = moments(d, step, sums=least)
    right, left = (
        oracle.sums("a.weight", 1 - k, n, least, step, n) for k, n in ((0, flat.shape[1]), (1, flat.shape[0]))
    )
    assert right.shape[1] < flat.shape[1]
    for found, summed in ((rows, flat @ right), (columns, flat.T @ left)):
        want = torch.stack([0.1 * part @ part.T for part in parts(summed, found.shape[-1])])
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_they_are_right_in_the_mean_and_random():
    torch.manual_seed(0)
    d = torch.randn(16, 32, dtype=torch.float64)
    exact = moments(d, sums=0)
    found = [torch.stack(each) for each in zip(*(moments(d, step, sums=4) for step in range(400)), strict=True)]
    for drawn, want in zip(found, exact, strict=True):
        spread = drawn.std(0) / 400**0.5
        assert ((drawn.mean(0) - want).abs() <= 5 * spread + 1e-12).all()
        assert (drawn.std(0) > 0.05 * want.abs().max()).any()


@pytest.mark.parametrize(("shape", "options"), [((24, 40), {"sums": 0}), ((24, 40), {}), ((24, 41), {"sums": 8})])
def test_without_enough_neighbours_they_are_exact(shape, options):
    """None; fewer than twice as many as are left; a prime number."""
    d = torch.randn(shape, dtype=torch.float64)
    rows, _ = moments(d, **options)
    want = torch.stack([0.1 * part @ part.T for part in parts(d, rows.shape[-1])])
    torch.testing.assert_close(rows, want, rtol=1e-12, atol=1e-12)


def test_weights_and_steps_have_signs_of_their_own():
    d = torch.randn(16, 32, dtype=torch.float64)
    first = moments(d, sums=4)[0]
    assert torch.equal(first, moments(d, sums=4)[0])
    assert not torch.allclose(first, moments(d, step=4, sums=4)[0])
    assert not torch.allclose(first, moments(d, name="b.weight", sums=4)[0])
