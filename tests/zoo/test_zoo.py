"""Every family, every check; and the refusals.

The quick tier runs the families that a change of a pass is likeliest to break; `-m slow` runs the rest.
"""

import pytest
import torch

import ddpn_fx
from tests.zoo import FAMILIES, REFUSALS
from tests.zoo.checks import CHECKS, applies, bench

# What torch and transformers themselves warn of while a family is built or run in eager.
pytestmark = pytest.mark.filterwarnings("ignore")


STEPS = ("sgd", "gauss-newton", "batches", "traced", "coverage", "noise")
# What does not work yet: family -> (checks, why). Strict: a family that starts to pass must leave this list.
KNOWN: dict[str, tuple[tuple[str, ...], str]] = {}


def cases():
    """A family's checks side by side, so that a worker (`--dist loadgroup`) captures it once."""
    for name, family in FAMILIES.items():
        for check in CHECKS:
            if applies(family, check):
                marks = [pytest.mark.xdist_group(name)] + ([pytest.mark.slow] if family.slow else [])
                checks, why = KNOWN.get(name, ((), ""))
                if check in checks:
                    marks.append(pytest.mark.xfail(strict=True, reason=why))
                yield pytest.param(name, check, id=f"{name}-{check}", marks=marks)


@pytest.mark.cases(60)
@pytest.mark.parametrize(("name", "check"), list(cases()))
def test_family(name, check):
    CHECKS[check](bench(name))


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name):
    """A model that cannot be served: the error names the place or the way out, and no weight is changed."""
    refusal = REFUSALS[name]
    model = refusal.build().double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    inputs, target = (
        t.double() if t.is_floating_point() else t for t in refusal.draw(torch.Generator().manual_seed(0), 4)
    )
    with pytest.raises(refusal.error, match=refusal.match):
        ddpn_fx.DDPNOpt(ddpn_fx.compile(model, loss=refusal.loss, disable=True), **refusal.options).train_step(
            inputs, target
        )
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_zoo_is_large():
    assert len(FAMILIES) >= 40
