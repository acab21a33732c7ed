"""Preconditioners: the recursion in a dense metric, torch's own optimisers, KFAC and EKFAC built by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx.passes.mode import AVERAGES
from ddpn_fx.passes.rules.embedding import Embedding
from ddpn_fx.passes.turned import Turned
from ddpn_fx.preconditioners import Diagonal, EigenFactored, EigenKronecker, Factored, Kronecker
from tests import oracle
from tests.harness import close, close_to_scale
from tests.models import case

MOMENTS = ("gradient", "value")


def eye(n):
    return torch.eye(n, dtype=torch.float64)


# --- dense metrics, written anew from the definitions ---------------------------------------------------------------


class Dense:
    """A dense metric for `oracle.step`: called once a step and parameter, it keeps its moving averages.

    weight_decay: what is added to Q_u (not decoupled). batch: B.
    tables: names of parameters that are looked up. lagged: whether K is in the metric of the step before, `kept`.
    """

    def __init__(self, preconditioner, weight_decay=0.0, batch=4):
        self.p, self.weight_decay, self.batch = preconditioner, weight_decay, batch
        self.averages, self.step, self.renewed = {}, 0, []
        self.may_lag, self.tables = preconditioner.moments == "gradient", ()

    def lagged(self, name):
        every = getattr(self.p, "exact_every", 1)
        return self.may_lag and name not in self.tables and self.step > 1 and self.step % every != 0

    def kept(self, name, u):
        """The metric as the step before has left it."""
        self.step -= 1
        found = self.made(name, u)
        self.step += 1
        return found

    def adopt(self, state):
        """What the program kept after a step, where the definition leaves it open."""

    def average(self, key, fresh):
        old = self.averages.get(key, torch.zeros_like(fresh))
        self.averages[key] = self.p.decay * old + (1 - self.p.decay) * fresh
        return self.corrected(key)

    def corrected(self, key):
        corrected = getattr(self.p, "bias_correction", True)
        return self.averages[key] / (1 - self.p.decay**self.step) if corrected else self.averages[key]

    def samples(self, u, G, c):
        """(B, *M): Q_u of each sample's own loss."""
        own = self.batch * (c[:, None] * G)
        return own.reshape(self.batch, -1, u.numel()).sum(1).reshape(self.batch, *u.shape)


class DenseDiagonal(Dense):
    def __call__(self, name, u, G, c):
        d = (c @ G).reshape(u.shape) + self.weight_decay * u
        self.average(name, d**2)
        return self.made(name, u)

    def made(self, name, u):
        root = self.corrected(name).sqrt()
        return (root + self.p.eps + self.p.relative_eps * root.mean()).flatten().diag()


class DenseFactored(Dense):
    """sides: name -> roots of M^-1's two sides as `oracle.sketch` takes them, or of a bias's one, last made."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sides = {}

    def outer(self, name, row, column, first, second):
        """M's diagonal as a matrix, from the moments of its sides and the bases of both, I in the order S, C."""
        floor = self.p.relative_eps**2 * row.mean() + self.p.eps**2
        rows, columns = ((row + floor) / (row.mean() + floor)).sqrt(), (column + floor).sqrt()
        self.sides[name] = first @ rows.rsqrt().diag(), second @ columns.rsqrt().diag()
        return torch.outer(rows, columns)

    def __call__(self, name, u, G, c):
        d = (c @ G).reshape(u.shape) + self.weight_decay * u
        if u.dim() < 2:
            self.average(name, d**2)
        else:
            square = d.reshape(*u.shape[:2], -1).transpose(1, 2).flatten(1) ** 2
            self.average(name + "r", square.mean(1)), self.average(name + "c", square.mean(0))
        return self.made(name, u)

    def made(self, name, u):
        if u.dim() < 2:
            v = self.corrected(name)
            m = (v + self.p.relative_eps**2 * v.mean() + self.p.eps**2).sqrt()
            self.sides[name] = (m.rsqrt().diag(),)
            return m.diag()
        row, column = self.corrected(name + "r"), self.corrected(name + "c")
        m = self.outer(name, row, column, eye(len(row)), eye(len(column)))
        return m.reshape(len(m), -1, u.shape[1]).transpose(1, 2).flatten().diag()


class DenseKronecker(Dense):
    """x and V_h of a linear layer from the samples' gradients themselves, which are of rank one."""

    def factors(self, name, u, G, c):
        samples = self.samples(u, G, c)
        left, size, right = zip(*(torch.linalg.svd(s) for s in samples), strict=True)
        assert all(s[1:].max() < 1e-9 * s[0] for s in size if len(s) > 1), "more than one position"
        x = torch.stack([v[0] for v in right])
        h = torch.stack([s[0] * w[:, 0] for s, w in zip(size, left, strict=True)])
        scale = self.inputs[name].norm(dim=1, keepdim=True)  # an outer product leaves the scale open
        x, h = x * scale, h / scale
        return self.average(name + "G", h.T @ h / self.batch), self.average(name + "A", x.T @ x / self.batch)

    def flat(self, name, u, G, c):
        d = self.samples(u, G, c).reshape(self.batch, -1)
        return self.average(name + "F", d.T @ d / self.batch)

    def __call__(self, name, u, G, c):
        if u.dim() == 1:
            return self.flat(name, u, G, c) + self.p.damping * eye(u.numel())
        g, a = self.factors(name, u, G, c)
        pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
        root = math.sqrt(self.p.damping)
        return torch.kron(g + root / pi * eye(len(g)), a + root * pi * eye(len(a)))


class DenseEigenKronecker(DenseKronecker):
    """Bases change after the first step and every `refresh_every` steps, and carry the second moments over."""

    bases: dict

    def __call__(self, name, u, G, c):
        samples = self.samples(u, G, c).reshape(self.batch, -1)
        if u.dim() == 1:
            factors = (self.flat(name, u, G, c),)
        else:
            factors = self.factors(name, u, G, c)
        U = self.bases.setdefault(name, eye(u.numel()))
        s = self.average(name + "s", ((samples @ U) ** 2).mean(0))
        if self.step == 1 or self.step % self.p.refresh_every == 0:
            fresh = torch.linalg.eigh(factors[0])[1]
            if len(factors) == 2:
                fresh = torch.kron(fresh, torch.linalg.eigh(factors[1])[1])
            self.averages[name + "s"] = (fresh.T @ U) ** 2 @ self.averages[name + "s"]
            self.bases[name] = fresh
        return U @ (s + self.p.damping).diag() @ U.T


def whole(state, k, n):
    """The basis of the k-th dimension as one (n, n) matrix."""
    return torch.block_diag(*state[f"basis{k}"]) if f"basis{k}" in state else eye(n)


def blocks(state, k):
    """The parts of the k-th dimension that have a basis each, as slices."""
    count, size, _ = state[f"basis{k}"].shape if f"basis{k}" in state else (0, 0, 0)
    return [slice(i * size, (i + 1) * size) for i in range(count)]


class DenseEigenFactored(DenseFactored):
    """The factored metric of d as a matrix (O, S C), turned from both sides and back; bases change as those of EKFAC.

    Few samples leave a null space, whose basis is anyone's: once checked, the program's own is taken.
    """

    bases: dict

    def __call__(self, name, u, G, c):
        if u.dim() < 2:
            return super().__call__(name, u, G, c)
        count = u.shape[0], u.shape[1], u[0, 0].numel()
        d = ((c @ G).reshape(u.shape) + self.weight_decay * u).reshape(count)
        beta = self.p.basis_decay
        inputs = torch.einsum("ocs,odt->sctd", d, d).reshape(2 * (count[1] * count[2],))
        for k, outer in enumerate((torch.einsum("ocs,pcs->op", d, d), inputs)):
            self.averages[f"{name}{k}"] = beta * self.averages.get(f"{name}{k}", 0.0) + (1 - beta) * outer
        first, second = self.bases.setdefault(name, (eye(len(d)), eye(len(inputs))))
        by_input = second.reshape(count[2], count[1], -1)
        square = torch.einsum("ocs,op,sci->pi", d, first, by_input) ** 2
        self.average(name + "r", square.mean(1)), self.average(name + "c", square.mean(0))
        if self.step == 1 or self.step % self.p.refresh_every == 0:
            self.renewed.append((name, (first, second)))
        return self.made(name, u)

    def made(self, name, u):
        if u.dim() < 2:
            return super().made(name, u)
        first, second = self.bases[name]
        by_input = second.reshape(u[0, 0].numel(), u.shape[1], -1)
        row, column = self.corrected(name + "r"), self.corrected(name + "c")
        m = self.outer(name, row, column, first, second).flatten().diag()
        U = torch.einsum("op,sci->ocspi", first, by_input).reshape(u.numel(), -1)
        return U @ m @ U.T

    def adopt(self, state):
        for name, old in self.renewed:
            fresh = [whole(state[name], k, len(u)) for k, u in enumerate(old)]
            for k, basis in enumerate(fresh):
                torch.testing.assert_close(basis.T @ basis, eye(len(basis)), rtol=0, atol=1e-12)
                factor = self.averages[f"{name}{k}"]
                for block in blocks(state[name], k):
                    turned = basis[:, block].T @ factor @ basis[:, block]
                    torch.testing.assert_close(turned, turned.diag().diag(), rtol=0, atol=1e-12 * float(factor.norm()))
            self.averages[name + "r"] = (fresh[0].T @ old[0]) ** 2 @ self.averages[name + "r"]
            self.averages[name + "c"] = (fresh[1].T @ old[1]) ** 2 @ self.averages[name + "c"]
            self.bases[name] = tuple(fresh)
        self.renewed = []


DENSE = {
    Diagonal: DenseDiagonal,
    Factored: DenseFactored,
    EigenFactored: DenseEigenFactored,
    Kronecker: DenseKronecker,
    EigenKronecker: DenseEigenKronecker,
}


def inputs_of(module, inputs):
    """Each weight's name -> the layer's input."""
    found = {}
    hooks = [
        m.register_forward_hook(lambda _, x, __, n=n: found.update({f"{n}.weight": x[0].detach()}))
        for n, m in module.named_modules()
        if isinstance(m, nn.Linear)
    ]
    module(*inputs)
    for hook in hooks:
        hook.remove()
    return found


def compare(name, preconditioner, settings, steps=3, tolerance=1e-8, backend=None):
    """The program against the oracle in the dense metric, over some steps."""
    model_case = case(name)
    module = model_case.model()
    inputs, target = model_case.sample()
    options = {"disable": True} if backend is None else {"backend": backend}
    net = ddpn_fx.compile(copy.deepcopy(module), loss=model_case.loss.call, **options)
    given = {k: v for k, v in vars(settings).items() if v != getattr(oracle.Settings(), k)}
    given |= {"beta1": settings.beta1, "nesterov": settings.nesterov, "sketch": 0}  # else the metric's own
    opt = ddpn_fx.DDPNOpt(net, preconditioner=preconditioner, **given)
    params = {n: p.detach().clone() for n, p in module.named_parameters()}
    decay = 0.0 if settings.decoupled else settings.weight_decay
    metric = DENSE[type(preconditioner)](preconditioner, decay)
    metric.bases, buffers, stages = {}, None, model_case.stages()
    metric.may_lag &= settings.feedback and not settings.cg_iterations
    for step in range(steps):
        metric.step = step + 1
        with torch.no_grad():
            for n, p in module.named_parameters():
                p.copy_(params[n])
        metric.inputs = inputs_of(module, inputs)
        want = oracle.step(
            *(stages, params, inputs, target, model_case.loss, settings),
            buffers=buffers,
            steps_done=step,
            metric=metric,
            moments=preconditioner.moments,
        )
        close(opt.train_step(inputs, target), want.loss, tolerance, f"loss of step {step}")
        assert not opt.stats["skipped"]
        for n, p in net.named_parameters():
            close_to_scale(p.detach(), want.params[n], want.du[n], tolerance, f"step {step}, {n}")
        close(opt.stats["predicted_decrease"], want.predicted_decrease, 1e3 * tolerance, f"decrease of step {step}")
        close(opt.stats["max_y"], want.max_y, 1e3 * tolerance, f"max |y| of step {step}")
        metric.adopt({n: opt.state[p] for n, p in net.named_parameters()})
        params, buffers = want.params, want.buffers
    return net, opt


SETTINGS = {
    "default": oracle.Settings(lr=0.05),
    "nonlinear": oracle.Settings(lr=0.05, rollout="nonlinear"),
    "paper": oracle.Settings(
        lr=0.01, coupling="sample", quu="preconditioner", terminal="gradient", rollout="nonlinear"
    ),
    "groups, gain": oracle.Settings(lr=0.05, coupling=3, gain=0.7, terminal="residual"),
    "exact, decay, momentum": oracle.Settings(lr=0.05, terminal="exact", weight_decay=0.02, momentum=0.8),
    "decoupled, beta1": oracle.Settings(lr=0.05, weight_decay=0.02, decoupled=True, beta1=0.7),
    "nesterov": oracle.Settings(lr=0.05, weight_decay=0.02, beta1=0.7, nesterov=True),
    "open loop": oracle.Settings(lr=0.05, feedback=False, weight_decay=0.02),
    "conjugate gradients": oracle.Settings(lr=0.05, cg_iterations=2),
    "conjugate gradients, decay, beta1": oracle.Settings(lr=0.05, cg_iterations=3, weight_decay=0.02, beta1=0.7),
}
TURNS = {"decay": 0.9, "eps": 1e-3, "basis_decay": 0.8, "refresh_every": 2}
PRECONDITIONERS = {
    "diagonal": lambda m: Diagonal(decay=0.9, eps=1e-3, moments=m),
    "adam": lambda m: Diagonal(decay=0.9, eps=1e-4, relative_eps=0.05, bias_correction=True, moments=m),
    "factored": lambda m: Factored(decay=0.9, eps=1e-3, moments=m),
    "eigen-factored": lambda m: EigenFactored(**TURNS, max_cost=9.0, moments=m),
    "eigen-factored, parts": lambda m: EigenFactored(**TURNS, max_size=3, moments=m),
    "kronecker": lambda m: Kronecker(decay=0.9, damping=0.1, moments=m),
    "eigen-kronecker": lambda m: EigenKronecker(decay=0.9, damping=0.1, refresh_every=2, moments=m),
}


@pytest.mark.cases(4)
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", PRECONDITIONERS)
def test_every_mode_equals_the_oracle_in_the_dense_metric(kind, settings, moments):
    if SETTINGS[settings].cg_iterations and moments == "value":
        pytest.skip("moments of V need the recursion stage by stage")
    compare("mlp-tanh", PRECONDITIONERS[kind](moments), SETTINGS[settings])


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", ["cnn", "cnn-groupnorm", "residual", "attention", "looped", "tied-embedding", "bare"])
@pytest.mark.parametrize("kind", ["diagonal", "adam", "factored", "eigen-factored", "eigen-factored, parts"])
def test_metrics_of_the_direction_on_other_models(kind, name):
    compare(name, PRECONDITIONERS[kind]("gradient"), SETTINGS["default"], steps=2)


# --- torch's own ----------------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 5))
    ).double()


def run_both(make, opt, steps=20, backend=None):
    """Parameters after the same batches: torch's optimiser, and the open loop."""
    eager, model = network(), network()
    torch_opt = make(eager.parameters())
    net = ddpn_fx.compile(
        model, loss=F.cross_entropy, **({"disable": True} if backend is None else {"backend": backend})
    )
    ours = opt(net)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(6, 1, 8, 8, generator=generator, dtype=torch.float64)
        y = torch.randint(5, (6,), generator=generator)
        torch_opt.zero_grad()
        F.cross_entropy(eager(x), y).backward()
        torch_opt.step()
        ours.train_step(x, y)
    for (name, a), b in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    return ours, torch_opt


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "extra", [{}, {"momentum": 0.9}, {"weight_decay": 0.01}, {"momentum": 0.5, "weight_decay": 0.1}]
)
@pytest.mark.parametrize("backend", [None, "eager"])
def test_diagonal_open_loop_is_rmsprop(extra, backend):
    ours, theirs = run_both(
        lambda p: torch.optim.RMSprop(p, lr=1e-3, alpha=0.99, eps=1e-8, **extra),
        lambda net: ddpn_fx.DDPNOpt(net, lr=1e-3, preconditioner="diagonal", feedback=False, **extra),
        backend=backend,
    )
    for a, b in zip(ours.state.values(), theirs.state.values(), strict=True):
        torch.testing.assert_close(a["square_avg"], b["square_avg"])


def test_diagonal_with_bias_correction_and_beta1_is_adam():
    adam = Diagonal(decay=0.999, bias_correction=True)
    run_both(
        lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.9, 0.999)),
        lambda net: ddpn_fx.DDPNOpt(net, lr=1e-2, preconditioner=adam, beta1=0.9, feedback=False),
    )


# --- KFAC and EKFAC of layers with positions, by hooks ----------------------------------------------------------------


class Layers(nn.Module):
    """A grouped and a depthwise convolution, an embedding and a linear layer over positions."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2, bias=False)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.word = nn.Embedding(7, 3)
        self.mix = nn.Linear(3, 4, bias=False)
        self.head = nn.Linear(10, 5)

    def forward(self, x, t):
        h = torch.tanh(self.depth(torch.tanh(self.conv(x)))).mean((2, 3))
        return self.head(torch.cat([h, torch.tanh(self.mix(self.word(t))).mean(1)], 1))


def layers():
    torch.manual_seed(0)
    model = Layers().double()
    inputs = torch.randn(16, 4, 6, 6, dtype=torch.float64), torch.randint(7, (16, 5))
    return model, inputs, torch.randint(5, (16,))


def by_hooks(model, inputs, target):
    """Each product layer's name -> (x (S, n, I), V_h (S, n, O) of each sample's own loss), by autograd alone."""
    seen = {}
    for name, m in model.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding)):

            def hook(m, x, out, name=name):
                out.retain_grad()
                seen[name] = m, x[0].detach(), out

            m.register_forward_hook(hook)
    F.cross_entropy(model(*inputs), target).backward()
    batch, found = len(target), {}
    for name, (m, x, out) in seen.items():
        h = out.grad * batch
        if isinstance(m, nn.Conv2d):
            x = F.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride).unflatten(1, (m.groups, -1))
            x, h = (t.permute(1, 0, 3, 2).flatten(1, 2) for t in (x, h.flatten(2).unflatten(1, (m.groups, -1))))
        elif isinstance(m, nn.Embedding):
            x, h = F.one_hot(x, m.num_embeddings).double().flatten(0, 1)[None], h.flatten(0, 1)[None]
        else:
            x, h = x.reshape(1, -1, x.shape[-1]), h.reshape(1, -1, h.shape[-1])
        found[name] = (h, x) if not isinstance(m, nn.Embedding) else (x, h)
    return found, {n: p.grad.clone() for n, p in model.named_parameters()}


def test_kfac_of_grouped_convolutions_embeddings_and_positions():
    """One open-loop step: -eta M^-1 grad J with M = (A + pi sqrt(l)) (x) (G + sqrt(l) / pi), group by group."""
    model, inputs, target = layers()
    sides, grads = by_hooks(copy.deepcopy(model), inputs, target)
    damping, before = 0.05, {n: p.detach().clone() for n, p in model.named_parameters()}
    net = ddpn_fx.compile(model, loss=F.cross_entropy, disable=True)
    opt = ddpn_fx.DDPNOpt(net, lr=0.3, preconditioner=Kronecker(damping=damping), feedback=False)
    opt.train_step(inputs, target)
    for name, (rows, columns) in sides.items():
        weight = name + ".weight"
        solved = torch.zeros_like(grads[weight]).reshape(rows.shape[0], rows.shape[2], columns.shape[2])
        for s in range(rows.shape[0]):
            embedding = name == "word"  # there the rows are the inputs
            g = rows[s].T @ rows[s] / (rows.shape[1] if embedding else len(target))
            a = columns[s].T @ columns[s] / (len(target) if embedding else columns.shape[1])
            pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
            g = g + math.sqrt(damping) / pi * eye(len(g))
            a = a + math.sqrt(damping) * pi * eye(len(a))
            block = grads[weight].reshape(solved.shape)[s].flatten()
            solved[s] = torch.linalg.solve(torch.kron(g, a), block).reshape(solved[s].shape)
        want = before[weight] - 0.3 * solved.reshape(grads[weight].shape)
        torch.testing.assert_close(dict(model.named_parameters())[weight], want, rtol=1e-9, atol=1e-11, msg=weight)


def test_ekfac_of_grouped_convolutions_embeddings_and_positions():
    """The second step, in the eigenbases of the first one's factors, s averaged over both, against dense matrices."""
    model, inputs, target = layers()
    p = EigenKronecker(decay=0.9, damping=0.05, refresh_every=50)
    opt = ddpn_fx.DDPNOpt(
        ddpn_fx.compile(model, loss=F.cross_entropy, disable=True), lr=0.3, preconditioner=p, feedback=False
    )
    moments: dict = {}
    for step in (1, 2):
        sides, grads = by_hooks(copy.deepcopy(model), inputs, target)
        before = {n: q.detach().clone() for n, q in model.named_parameters()}
        opt.train_step(inputs, target)
        for name, (rows, columns) in sides.items():
            weight, count = name + ".weight", len(target)
            shape = rows.shape[0], rows.shape[2], columns.shape[2]
            each = torch.einsum(
                "sbpo,sbpi->bsoi", *(t.reshape(shape[0], count, -1, t.shape[-1]) for t in (rows, columns))
            )
            if step == 1:
                bases = [eye(shape[1] * shape[2])] * shape[0]
                s = 0.1 * (each**2).mean(0).flatten(1)
                fresh = []
                for k in range(shape[0]):
                    g, a = (torch.linalg.eigh(t[k].T @ t[k])[1].contiguous() for t in (rows, columns))
                    fresh.append(torch.kron(eye(shape[1]) if name == "word" else g, a))
                moments[name] = torch.stack([(f.T**2) @ v for f, v in zip(fresh, s, strict=True)]), fresh
                s = s / 0.1
            else:
                old, bases = moments[name]
                turned = torch.stack([each[:, k].flatten(1) @ u for k, u in enumerate(bases)], 1)
                s = (0.9 * old + 0.1 * (turned**2).mean(0)) / (1 - 0.9**2)
            grad = grads[weight].reshape(shape[0], -1)
            solved = torch.stack([u @ ((u.T @ d) / (v + 0.05)) for u, d, v in zip(bases, grad, s, strict=True)])
            want = before[weight] - 0.3 * solved.reshape(grads[weight].shape)
            torch.testing.assert_close(
                dict(model.named_parameters())[weight], want, rtol=1e-7, atol=1e-9, msg=f"{weight}, step {step}"
            )


def test_eigen_factored_of_grouped_convolutions_embeddings_and_positions():
    """Two open-loop steps against the definition; words and classes keep their coordinates."""
    model, inputs, target = layers()
    p = EigenFactored(decay=0.9, relative_eps=0.1, basis_decay=0.8)
    opt = ddpn_fx.DDPNOpt(
        ddpn_fx.compile(model, loss=F.cross_entropy, disable=True), lr=0.03, preconditioner=p, feedback=False, beta1=0
    )
    bases, averages = {}, {}
    for step in (1, 2):
        _, grads = by_hooks(copy.deepcopy(model), inputs, target)
        before = {n: q.detach().clone() for n, q in model.named_parameters()}
        opt.train_step(inputs, target)
        for name, d in grads.items():
            if d.dim() < 2:
                continue
            d = (d.flatten(2) if d.dim() > 2 else d[..., None]).transpose(1, 2)  # (O, S, C)
            u, v = bases.get(name, (eye(d.shape[0]), eye(d[0].numel())))
            turned = u.T @ d.flatten(1) @ v
            square = turned**2
            means = square.mean(1), square.mean(0)
            old = averages.get(name, [torch.zeros_like(m) for m in means])
            averages[name] = [0.9 * o + 0.1 * m for o, m in zip(old, means, strict=True)]
            row, column = (a / (1 - 0.9**step) for a in averages[name])
            floor = 0.01 * row.mean()
            m = (torch.outer(row + floor, column + floor) / (row.mean() + floor)).sqrt()
            change = (u @ (turned / m) @ v.T).reshape(d.shape).transpose(1, 2)
            want = before[name] - 0.03 * change.reshape(before[name].shape)
            got = dict(model.named_parameters())[name]
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9, msg=f"{name}, step {step}")
            kept = opt.state[got]
            assert ("basis0" in kept) == (name not in ("word.weight", "head.weight"))
            assert "basis1" in kept
            new = [whole(kept, k, n) for k, n in enumerate((d.shape[0], d[0].numel()))]
            averages[name][0] = (new[0].T @ u) ** 2 @ averages[name][0]
            averages[name][1] = (new[1].T @ v) ** 2 @ averages[name][1]
            bases[name] = new


@pytest.mark.parametrize("name", ["cnn", "mlp-tanh"])
def test_eigen_factored_without_bases_is_factored(name):
    model_case = case(name)
    inputs, target = model_case.sample()
    ends = []
    for p in (EigenFactored(max_size=0, decay=0.9), Factored(decay=0.9, exact_every=4)):
        net = ddpn_fx.compile(model_case.model(), loss=model_case.loss.call, disable=True)
        opt = ddpn_fx.DDPNOpt(net, lr=0.01, preconditioner=p, beta1=0.9, nesterov=True, sketch=0)
        for _ in range(6):
            opt.train_step(inputs, target)
        ends.append(list(net.parameters()))
    for got, want in zip(*ends, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "options", "sizes"),
    [
        ((4, 3), {}, (2, 3)),  # four rows: at most three at once
        ((4, 3), {"max_cost": 2.0}, (4, 3)),
        ((4, 3), {"max_size": 3}, (2, 3)),
        ((4, 3), {"max_size": 0}, (None, None)),
        ((32, 784), {}, (32, 28)),
        ((128, 784), {}, (128, 112)),
        ((1536, 512), {}, (128, 128)),
        ((127, 64), {}, (None, 64)),  # prime
        ((62, 30), {}, (None, 30)),  # parts of 2 are not worth it
        ((40, 4, 3, 3), {}, (20, 36)),  # a kernel's inputs: at most max_size
        ((4, 32, 3, 3), {}, (4, 96)),
        ((4, 1, 3, 3), {"max_cost": 0.0}, (None, 9)),
        ((4, 32, 1, 1), {}, (4, 4)),
        ((7,), {}, (None, None)),
    ],
)
def test_eigen_factored_turns_dimensions_in_parts_that_it_can_afford(shape, options, sizes):
    state = EigenFactored(**options).state(ddpn_fx.preconditioners.Site("w", shape), torch.zeros(()))
    for k, size in enumerate(sizes):
        found = state[f"basis{k}"].shape if f"basis{k}" in state else None
        assert found == (None if size is None else ((shape[0], math.prod(shape[1:]))[k] // size, size, size))


class Words(nn.Module):
    """A table of words and a head over them, tied where it is asked, and what lies between head and loss."""

    def __init__(self, *, tied=False, move=lambda o: o.flatten(0, 1)):
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(8, 6), nn.Linear(6, 6), nn.Linear(6, 8, bias=False)
        self.move = move
        if tied:
            self.head.weight = self.table.weight

    def forward(self, words):
        return self.move(self.head(self.hidden(self.table(words)).tanh()))


def of_words(loss):
    """A loss of the flat logits (B T, C) and words (B, T)."""
    return lambda output, target: loss(output, target.flatten())


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    ("model", "shape", "loss", "found"),
    [
        (Words(), (4, 3), of_words(F.cross_entropy), {"table", "head"}),
        (Words(tied=True), (4, 3), of_words(F.cross_entropy), {"table"}),
        (Words(move=lambda o: o.transpose(1, 2)), (4, 3), F.cross_entropy, {"table", "head"}),
        (
            Words(move=lambda o: o[:, :-1].contiguous().view(-1, 8)),
            (4, 2),
            of_words(F.cross_entropy),
            {"table", "head"},
        ),
        (Words(move=lambda o: o[:, -1]), (4,), F.cross_entropy, {"table", "head"}),
        (Words(move=lambda o: o.log_softmax(-1)[:, 1:].flatten(0, 1)), (4, 2), of_words(F.nll_loss), {"table", "head"}),
        (Words(move=lambda o: o[:, -1].double()), (4,), F.cross_entropy, {"table", "head"}),
        (Words(move=lambda o: o[:, -1, :4]), (4,), F.cross_entropy, {"table"}),  # some of its rows are classes
        (Words(move=lambda o: o), (4, 8), F.cross_entropy, {"table"}),  # its classes are the positions
        (Words(move=lambda o: o[:, -1]), (4, 8), F.mse_loss, {"table"}),
        (Words(move=lambda o: 2 * o[:, -1]), (4,), F.cross_entropy, {"table"}),  # not seen through
    ],
)
def test_which_weights_have_categories_for_rows(model, shape, loss, found):
    """A list's neighbours have nothing in common: its rows are not turned, whoever else uses the weight."""
    words, target = torch.randint(8, (4, 3)), torch.randint(3, shape)
    net = ddpn_fx.compile(model, loss=loss, disable=True)
    opt = ddpn_fx.DDPNOpt(net, preconditioner=EigenFactored())
    opt.train_step(words, target.float() if loss is F.mse_loss else target)
    weights = {n.removesuffix(".weight"): w for n, w in net.named_parameters() if w.dim() > 1}
    assert {n for n, w in weights.items() if "basis0" not in opt.state[w]} == found
    assert all("basis1" in opt.state[w] for w in weights.values())


def test_eigen_factored_leaves_a_basis_alone_that_it_cannot_renew():
    site = ddpn_fx.preconditioners.Site("w", (3, 2))
    p = EigenFactored(max_cost=2.0)
    state = p.state(site, torch.zeros((), dtype=torch.float64))
    state["second0"].fill_(math.nan)
    state["second1"].copy_(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    p.refresh(site, state, 10)
    assert torch.equal(state["basis0"], eye(3)[None])
    assert not torch.equal(state["basis1"], eye(2)[None])


def test_an_average_that_was_kept_without_a_frame_goes_into_it():
    """Beside an average that starts at nothing, nine tenths of it are left after a step."""
    model_case, p = case("cnn"), EigenFactored(bias_correction=False)
    inputs, target = model_case.sample()
    net = ddpn_fx.compile(model_case.model(), loss=model_case.loss.call, disable=True)
    old = ddpn_fx.DDPNOpt(net, lr=0.01, beta1=0.9)
    old.train_step(inputs, target)
    before = {n: old.state[w]["exp_avg"].clone() for n, w in net.named_parameters()}
    after = []
    for start in (old.state_dict(), None):
        opt = ddpn_fx.DDPNOpt(net, beta1=0.9, preconditioner=p)
        if start is not None:
            opt.load_state_dict(start)
        opt.param_groups[0]["lr"] = 0.0
        opt.train_step(inputs, target)
        kept = {n: opt.state[w] for n, w in net.named_parameters()}
        frames = {n: p.frame(ddpn_fx.preconditioners.Site(n, before[n].shape), k) for n, k in kept.items()}
        after.append({n: k["exp_avg"] if frames[n] is None else frames[n].out(k["exp_avg"]) for n, k in kept.items()})
    assert sum(f is not None and len(f.shape) == 4 for f in frames.values()), "a convolution has a frame"
    for name, average in before.items():
        close(after[0][name] - after[1][name], 0.9 * average, 1e-10, name)


def test_bases_are_renewed_after_powers_of_two_and_then_every_so_many_steps():
    site, p = ddpn_fx.preconditioners.Site("w", (3, 2)), EigenFactored(refresh_every=10)
    state, renewed = p.state(site, torch.zeros(())), []
    for step in range(1, 41):
        x = torch.randn(1, 2, 5)
        state["second1"] += x @ x.mT
        before = state["basis1"].clone()
        p.refresh(site, state, step)
        renewed += [step] * (not torch.equal(before, state["basis1"]))
    assert renewed == [1, 2, 4, 8, 10, 20, 30, 40]


def test_bases_stay_orthonormal_and_the_averages_in_them_what_they_were():
    """In float32, over many refreshes with other second moments each."""
    torch.manual_seed(0)
    site, p = ddpn_fx.preconditioners.Site("w", (6, 2, 2, 1)), EigenFactored(refresh_every=1)
    state = p.state(site, torch.zeros(()))
    average = torch.randn(site.shape)
    state["exp_avg"] = p.frame(site, state).into(average)
    assert state["exp_avg"].shape == (6, 4)
    for step in range(2000):
        for k in (0, 1):
            x = torch.randn(*state[f"second{k}"].shape[:2], 8)
            state[f"second{k}"] += x @ x.mT
        p.refresh(site, state, step)
    for k in (0, 1):
        basis = state[f"basis{k}"]
        torch.testing.assert_close(basis @ basis.mT, torch.eye(basis.shape[1]).expand_as(basis), rtol=0, atol=1e-5)
    torch.testing.assert_close(p.frame(site, state).out(state["exp_avg"]), average, rtol=0, atol=1e-3)
    assert not torch.allclose(state["exp_avg"], p.frame(site, p.state(site, torch.zeros(()))).into(average), atol=0.1)


@pytest.mark.cases(3)
@pytest.mark.parametrize("coupling", ["batch", 4])
@pytest.mark.parametrize("p", [Factored(decay=0.9), EigenFactored(refresh_every=1), Kronecker(damping=0.1)])
def test_a_large_table_in_a_metric_of_two_sides_forms_no_column(p, coupling, monkeypatch):
    """K from equal indices, against columns that are formed and then whitened."""
    formed, results = Embedding._columns, []

    def count(self, argument):
        counted.append(argument)
        return formed(self, argument)

    monkeypatch.setattr(Embedding, "_columns", count)
    for dense in (False, True):
        counted: list = []
        if dense:
            monkeypatch.setattr(Embedding, "lookups", lambda *_: None)
        torch.manual_seed(1)
        model = nn.Sequential(nn.Embedding(90, 4, padding_idx=2), nn.Flatten(), nn.Linear(20, 5)).double()
        net = ddpn_fx.compile(model, loss=F.cross_entropy, disable=True)
        opt = ddpn_fx.DDPNOpt(net, lr=0.05, preconditioner=p, coupling=coupling, rank=2, beta1=0.9, sketch=0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            x = torch.randint(90, (8, 5), generator=generator)
            x[0], x[1, :3] = x[3], 2
            opt.train_step(x, torch.randint(5, (8,), generator=generator))
        assert bool(counted) == dense
        results.append(torch.cat([w.detach().flatten() for w in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


TURNED = {(1, 6): True, (2, 6): True, (40, 6): False, (4, 6, 6): False}  # shape of x -> whether its factors are turned


class Each(nn.Module):
    """A layer over the positions of a sample, and one behind their mean."""

    def __init__(self, shape):
        super().__init__()
        self.each = nn.Linear(6, 5) if len(shape) == 2 else nn.Conv2d(4, 6, 3, groups=2)
        self.head = nn.LazyLinear(4)

    def forward(self, x):
        h = torch.tanh(self.each(x))
        return self.head(h.mean(1) if h.dim() == 3 else h.mean((2, 3)))


@pytest.mark.cases(2)
@pytest.mark.parametrize("rank", [1, None])
@pytest.mark.parametrize(
    ("p", "shape", "turned"),
    [
        *((EigenKronecker(decay=0.9, damping=0.05, refresh_every=1), s, t) for s, t in TURNED.items()),
        (EigenFactored(decay=0.9, refresh_every=1), (5, 6), True),
        (EigenFactored(decay=0.9, refresh_every=1), (40, 6), False),
        (EigenFactored(decay=0.9, refresh_every=1, max_size=3), (5, 6), True),
        (EigenFactored(decay=0.9, refresh_every=1, max_size=3), (40, 6), False),
    ],
)
def test_turned_factors_are_turned_columns(p, shape, turned, rank, monkeypatch):
    """The closed loop with factors in the eigenbases, against columns that are formed and then turned.

    The factors are the cheaper with one position and with few; not with many, as in a convolution.
    """
    find, seen, results = Turned.factors.func, set(), []
    for formed in (False, True):

        def factors(self, formed=formed):
            found = find(self)
            if self.site.name == "each.weight":
                seen.add(found is not None)
            return None if formed else found

        monkeypatch.setattr(Turned, "factors", property(factors))
        torch.manual_seed(0)
        model = Each(shape).double()
        model(torch.zeros(1, *shape, dtype=torch.float64))
        x, target = torch.randn(8, *shape, dtype=torch.float64), torch.randint(4, (8,))
        net = ddpn_fx.compile(model, loss=F.cross_entropy, disable=True)
        opt = ddpn_fx.DDPNOpt(net, lr=0.1, preconditioner=p, rank=rank)
        for _ in range(3):
            opt.train_step(x, target)
        results.append(torch.cat([t.detach().flatten() for t in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
    assert seen == {turned}


@pytest.mark.cases(2)
@pytest.mark.parametrize("kind", ["identity", "diagonal", "kronecker"])
def test_the_papers_form_by_name(kind):
    """`DDPNOpt.paper` is Alg. 3: the class's step with the literal settings, M from V."""
    named = (
        {}
        if kind == "identity"
        else {"preconditioner": (Diagonal if kind == "diagonal" else Kronecker)(moments="value")}
    )
    literal = {"terminal": "gradient", "coupling": "sample", "quu": "preconditioner", "rollout": "nonlinear"}
    results = []
    for make in (
        lambda net: ddpn_fx.DDPNOpt.paper(net, lr=0.05, preconditioner=kind),
        lambda net: ddpn_fx.DDPNOpt(net, lr=0.05, **literal, **named),
    ):
        model = case("mlp-tanh").model()
        opt = make(ddpn_fx.compile(model, loss=F.cross_entropy, disable=True))
        inputs, target = case("mlp-tanh").sample()
        clamps = [(opt.train_step(inputs, target), int(opt.stats["clamps"]))[1] for _ in range(3)]
        results.append(([p.detach().clone() for p in model.parameters()], clamps))
    assert results[0][1] == results[1][1]
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("lr", "clamped"), [(1e-6, False), (10.0, True)])
def test_the_papers_form_counts_its_clamps(lr, clamped):
    model = case("mlp").model()
    inputs, target = case("mlp").sample()
    opt = ddpn_fx.DDPNOpt.paper(ddpn_fx.compile(model, loss=F.cross_entropy, disable=True), lr=lr)
    opt.train_step(inputs, target)
    assert (opt.stats["clamps"] > 0) == clamped


# --- behaviour ------------------------------------------------------------------------------------------------------

KINDS = ("diagonal", "factored", "eigen-factored", "kronecker", "eigen-kronecker")


@pytest.mark.cases(1)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_program_equals_the_untraced_one(kind):
    results = []
    for backend in (None, "eager"):
        model, inputs, target = layers()
        options = {"disable": True} if backend is None else {"backend": backend}
        opt = ddpn_fx.DDPNOpt(
            ddpn_fx.compile(model, loss=F.cross_entropy, **options), lr=0.01, preconditioner=kind, beta1=0.5
        )
        for _ in range(3):
            opt.train_step(inputs, target)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.thorough
def test_inductor_keeps_a_scale_of_channels_last_weights_as_it_lies():
    """A metric's small tensors are kept by a view with their strides, those of the weight (`worked_out`)."""
    results = []
    for options in ({"disable": True}, {"backend": "inductor"}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).double()
        model = model.to(memory_format=torch.channels_last)
        opt = ddpn_fx.DDPNOpt(
            ddpn_fx.compile(model, loss=F.cross_entropy, **options), lr=0.01, preconditioner="diagonal"
        )
        x, y = torch.randn(6, 3, 6, 6, dtype=torch.float64), torch.randint(5, (6,))
        for _ in range(3):
            opt.train_step(x, y)
        assert model[0].weight.stride() == (27, 1, 9, 3)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.cases(1)
@pytest.mark.parametrize("kind", KINDS)
def test_state_is_saved_and_loaded(kind):
    """Two steps, a save, two more: as four without the save; moments of a bfloat16 model stay in float32."""

    def make():
        model, inputs, target = layers()
        net = ddpn_fx.compile(model.bfloat16(), loss=F.cross_entropy, disable=True)
        return ddpn_fx.DDPNOpt(net, lr=0.01, preconditioner=kind), (inputs[0].bfloat16(), inputs[1]), target

    through, inputs, target = make()
    for _ in range(2):
        through.train_step(inputs, target)
    saved, weights = copy.deepcopy(through.state_dict()), copy.deepcopy(through.net.state_dict())
    for _ in range(2):
        through.train_step(inputs, target)
    loaded, *_ = make()
    loaded.net.load_state_dict(weights)
    loaded.load_state_dict(saved)
    for _ in range(2):
        loaded.train_step(inputs, target)
    for a, b in zip(through.net.parameters(), loaded.net.parameters(), strict=True):
        assert torch.equal(a, b)
    slots = {k: v for kept in loaded.state.values() for k, v in kept.items()}
    averages = {k: slots.pop(k) for k in AVERAGES if k in slots}  # as torch's, in the parameter's
    assert slots
    assert bool(averages) == (kind == "eigen-factored")
    assert all(v.dtype == torch.float32 for v in slots.values())


def test_singular_factors_are_damped_and_a_batch_of_zeros_changes_nothing_to_nan():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    for kind in KINDS:
        net = ddpn_fx.compile(copy.deepcopy(model), loss=F.cross_entropy, disable=True)
        opt = ddpn_fx.DDPNOpt(net, lr=0.1, preconditioner=kind)
        for x in (torch.zeros(5, 3), torch.ones(5, 3), torch.full((5, 3), torch.nan)):
            opt.train_step(x, torch.zeros(5, dtype=torch.long))
            assert bool(opt.stats["skipped"]) == bool(x.isnan().any())
            state = [t for kept in opt.state.values() for t in kept.values()]
            assert all(bool(t.isfinite().all()) for t in [*net.parameters(), *state]), kind


class Halved:
    """A preconditioner of the user's own: M = 2."""

    moments = "gradient"

    def state(self, site, like):
        return {}

    def metric(self, moment, state):
        return Twice(), {}

    def refresh(self, site, state, step):
        pass


class Twice:
    sides = None

    def solve(self, direction):
        return direction / 2

    def whiten(self, columns):
        return columns * 2**-0.5


def test_an_object_of_the_users_own_is_half_the_step_size():
    results = []
    for options in ({"lr": 0.5}, {"lr": 1.0, "preconditioner": Halved()}):
        model = case("mlp-tanh").model()
        inputs, target = case("mlp-tanh").sample()
        opt = ddpn_fx.DDPNOpt(ddpn_fx.compile(model, loss=F.cross_entropy, disable=True), **options)
        opt.train_step(inputs, target)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("given", "lr"),
    [
        *(("identity", 1.0), ("kronecker", 1.0), ("eigen-kronecker", 1.0), (Halved(), 1.0)),
        *(("diagonal", 0.01), ("factored", 0.01), ("eigen-factored", 0.01), (EigenFactored(decay=0.9), 0.01)),
    ],
)
def test_the_step_size_is_the_metric_s_own_where_none_is_given(given, lr):
    net = ddpn_fx.compile(nn.Linear(2, 2), loss=F.cross_entropy)
    groups = [{"params": [net.get_parameter("weight")]}, {"params": [net.get_parameter("bias")], "lr": 0.3}]
    opt = ddpn_fx.DDPNOpt(net, preconditioner=given, params=groups)
    assert [g["lr"] for g in opt.param_groups] == [lr, 0.3]
    assert ddpn_fx.DDPNOpt(net, 0.2, preconditioner=given).param_groups[0]["lr"] == 0.2


def test_the_coupling_is_the_metric_s_own_where_none_is_given():
    net = ddpn_fx.compile(nn.Linear(2, 2), loss=F.cross_entropy)

    def chosen(**options):
        return ddpn_fx.DDPNOpt(net, **options).coupling

    for plain in ("identity", "diagonal", "factored", "kronecker", "eigen-kronecker", Halved()):
        assert chosen(preconditioner=plain) == "batch"
    for turned in ("eigen-factored", EigenFactored(max_size=4)):
        assert chosen(preconditioner=turned) == 128
        assert chosen(preconditioner=turned, coupling="batch") == "batch"
        assert chosen(preconditioner=turned, coupling=64) == 64
        assert chosen(preconditioner=turned, rollout="nonlinear") == "batch"
        assert chosen(preconditioner=turned, cg_iterations=2) == "batch"
    assert ddpn_fx.DDPNOpt.paper(net, 0.1, preconditioner="eigen-kronecker").coupling == "sample"
    wrong = Halved()
    wrong.default_coupling = "groups"
    with pytest.raises(ValueError, match="coupling='groups' must be 'batch'"):
        chosen(preconditioner=wrong)


def test_a_large_batch_falls_into_groups_of_128():
    """Without `coupling` a step of 300 samples is that of groups of 128, not the whole's; one of 100 is the whole's."""
    torch.manual_seed(0)
    net = ddpn_fx.compile(nn.Linear(6, 3), loss=F.cross_entropy, backend="eager")
    first, x, y = copy.deepcopy(net.state_dict()), torch.randn(300, 6), torch.randint(3, (300,))

    def stepped(batch, **options):
        net.load_state_dict(first)
        ddpn_fx.DDPNOpt(net, preconditioner="eigen-factored", **options).train_step(x[:batch], y[:batch])
        return net.weight.detach().clone()

    assert torch.equal(stepped(300), stepped(300, coupling=128))
    assert not torch.allclose(stepped(300), stepped(300, coupling="batch"), rtol=1e-3)
    assert torch.equal(stepped(100), stepped(100, coupling="batch"))


def test_the_average_is_the_metric_s_own_where_none_is_given():
    net = ddpn_fx.compile(nn.Linear(2, 2), loss=F.cross_entropy)

    def chosen(**options):
        opt = ddpn_fx.DDPNOpt(net, **options)
        return opt.beta1, opt.nesterov

    for plain in ("identity", "diagonal", "factored", "kronecker", "eigen-kronecker", Halved()):
        assert chosen(preconditioner=plain) == (0.0, False)
    for turned in ("eigen-factored", EigenFactored(decay=0.9)):
        assert chosen(preconditioner=turned) == (0.9, True)
        assert chosen(preconditioner=turned, beta1=0.5) == (0.5, True)
        assert chosen(preconditioner=turned, nesterov=False) == (0.9, False)
        assert chosen(preconditioner=turned, beta1=0) == (0, False)
        assert chosen(preconditioner=turned, momentum=0.9) == (0.0, False)
        group = {"params": [net.get_parameter("bias")], "momentum": 0.9}
        assert chosen(preconditioner=turned, params=[group]) == (0.0, False)
        opt = ddpn_fx.DDPNOpt.paper(net, 0.1, preconditioner=turned)
        assert (opt.beta1, opt.nesterov) == (0.0, False)
        assert ddpn_fx.DDPNOpt.paper(net, 0.1, preconditioner=turned, beta1=0.9).beta1 == 0.9


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ("diag", ValueError, r"preconditioner='diag' is not known; choose one of 'identity', 'diagonal', 'factored'"),
        (Diagonal, TypeError, "is a class, not an object of it"),
        (3.0, TypeError, r"preconditioner=3.0 has no moments; it needs moments, state, metric and refresh"),
    ],
)
def test_a_wrong_preconditioner_is_refused(given, error, match):
    net = ddpn_fx.compile(nn.Linear(2, 2), loss=F.cross_entropy)
    with pytest.raises(error, match=match):
        ddpn_fx.DDPNOpt(net, preconditioner=given)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Diagonal(decay=1.0), r"Diagonal: decay=1.0 must be in \[0, 1\)"),
        (lambda: Kronecker(damping=0.0), "Kronecker: damping=0.0 must be positive and finite"),
        (
            lambda: EigenKronecker(refresh_every=0),
            "EigenKronecker: refresh_every=0 must be a whole number of at least 1",
        ),
        (lambda: EigenFactored(basis_decay=1.0), r"EigenFactored: basis_decay=1.0 must be in \[0, 1\)"),
        (lambda: EigenFactored(refresh_every=0), "EigenFactored: refresh_every=0 must be a whole number of at least 1"),
        (lambda: EigenFactored(solver="svd"), "EigenFactored: solver='svd' must be 'eigh', 'qr' or None"),
        (lambda: EigenFactored(max_cost=-1.0), "EigenFactored: max_cost=-1.0 must be not negative"),
        (lambda: EigenFactored(max_size=-1), "EigenFactored: max_size=-1 must be not negative"),
        (lambda: EigenFactored(sums=-1), "EigenFactored: sums=-1 must be a whole number of at least 0"),
        (lambda: EigenFactored(exact_every=0), "EigenFactored: exact_every=0 must be a whole number of at least 1"),
        (lambda: Factored(exact_every=2.5), "Factored: exact_every=2.5 must be a whole number of at least 1"),
        (lambda: EigenFactored(refresh_every=2.5), "refresh_every=2.5 must be a whole number of at least 1"),
        (lambda: EigenFactored(decay=-0.1), r"EigenFactored: decay=-0.1 must be in \[0, 1\)"),
        (lambda: Factored(moments="loss"), r"Factored: moments='loss' must be one of \('gradient', 'value'\)"),
    ],
)
def test_a_wrong_option_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
