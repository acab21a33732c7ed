"""One step of the program and one of the oracle, from the same weights, batch and noise."""

from dataclasses import asdict

import torch

import ddpn_fx
from tests import oracle
from tests.models import Case

_NETS: dict = {}


def program(case: Case, settings: oracle.Settings, *, dtype=torch.float64, backend=None, batch=4, seed=0):
    """(net, opt, inputs, target) for a case in a mode; backend None runs the step untraced.

    A case is captured once in a process; its weights are set anew each time.
    """
    module = case.model(seed, dtype)
    inputs, target = case.sample(batch, seed, dtype)
    key = case.name, dtype, backend
    if key not in _NETS:
        options = {"disable": True} if backend is None else {"backend": backend}
        _NETS[key] = ddpn_fx.compile(case.model(seed, dtype), loss=case.loss.call, **options)
    net = _NETS[key]
    net.load_state_dict(module.state_dict())
    options = asdict(settings)
    groups = None
    names = dict(net.named_parameters())
    per_parameter = {k: options[k] for k in ("lr", "weight_decay", "momentum") if isinstance(options[k], dict)}
    if per_parameter:
        groups = [
            {"params": [p], **{k: v[n] for k, v in per_parameter.items() if n in v}}
            for n, p in names.items()
            if "lr" not in per_parameter or n in per_parameter["lr"]
        ]
        for k in per_parameter:
            options[k] = 1.0 if k == "lr" else 0.0
    opt = ddpn_fx.DDPNOpt(net, params=groups, **options)
    return net, opt, inputs, target


def noise_for(case: Case, settings: oracle.Settings, module, inputs, seed: int):
    """The noise that the program draws first after ``torch.manual_seed(seed)``."""
    with torch.no_grad():
        shape = module(*inputs).shape
    torch.manual_seed(seed)
    return oracle.draw_noise(case.loss, settings, shape, torch.default_generator)


def compare(
    case: Case,
    settings: oracle.Settings,
    *,
    tolerance=1e-9,
    steps=1,
    dtype=torch.float64,
    backend=None,
    batch=4,
    seed=0,
):
    """Run both; assert equal losses, controls and statistics. Returns the program's ``(net, opt)``."""
    net, opt, inputs, target = program(case, settings, dtype=dtype, backend=backend, batch=batch, seed=seed)
    stages = case.stages()
    params = {n: p.detach().double().clone() for n, p in net.named_parameters()}
    buffers = None
    for step in range(steps):
        noise = noise_for(case, settings, case.model(seed, dtype), inputs, 100 + step)
        want = oracle.step(
            stages, params, inputs, target, case.loss, settings, buffers=buffers, steps_done=step, noise=noise
        )
        torch.manual_seed(100 + step)
        loss = opt.train_step(inputs, target)
        if step == 0:
            controls = [s.controls for s in net.chain.stages]
            assert [set(c) for c in controls] == [set(s.controls) for s in stages], controls
        close(loss, want.loss, tolerance, "loss")
        got = {n: p.detach().double() for n, p in net.named_parameters()}
        for name, value in want.params.items():
            close_to_scale(got[name], value, value - params[name], tolerance, f"step {step}, {name}")
        close(opt.stats["predicted_decrease"], want.predicted_decrease, 100 * tolerance, "predicted decrease")
        if settings.rank is not None and settings.terminal != "exact":  # there y is in a basis of the program's choice
            close(opt.stats["max_y"], want.max_y, 100 * tolerance, "max |y|")
        assert int(opt.stats["clamps"]) == want.clamps
        assert not opt.stats["skipped"]
        params, buffers = want.params, want.buffers
    return net, opt


def close(got, want, tolerance, what):
    """Equal to a relative tolerance (absolute near zero)."""
    got, want = torch.as_tensor(got).double(), torch.as_tensor(want).double()
    assert torch.allclose(got, want, rtol=tolerance, atol=tolerance), f"{what}: {got} is not {want}"


def close_to_scale(got, want, change, tolerance, what):
    """Equal to a tolerance relative to the largest change."""
    scale = max(float(change.abs().max()), 1e-6)
    gap = float((got - want).abs().max())
    assert gap <= tolerance * max(scale, float(want.abs().max())), (
        f"{what}: off by {gap:.3g}, the change is {scale:.3g}"
    )
