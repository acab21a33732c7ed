"""Bad input is a clear error that names the value and the way out, and nothing of the user's is changed."""

import copy
import math
import re
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx import CaptureError, LossError, StagingError


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(size=6):
    g = torch.Generator().manual_seed(1)
    return torch.randn(size, 4, generator=g), torch.randint(3, (size,), generator=g)


def compiled(model=None, **options):
    options = {"loss": F.cross_entropy, "disable": True, **options}
    return ddpn_fx.compile(mlp() if model is None else model, **options)


@contextmanager
def unchanged(net, opt=None):
    """Parameters, buffers, gradients, modes, the random state and the optimiser's state stay as they are."""
    model = net._original if isinstance(net, ddpn_fx.module.CompiledModule) else net
    for p in model.parameters():
        p.grad = torch.ones_like(p)

    def state():
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return (
            {n: t.detach().clone() for n, t in tensors},
            {n: p.grad for n, p in model.named_parameters()},
            {n: p.requires_grad for n, p in model.named_parameters()},
            {n: m.training for n, m in model.named_modules()},
            torch.get_rng_state(),
            None if opt is None else str([b for s in opt.state.values() for b in s.values() if b.any()]),
            (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        )

    before = state()
    yield
    after = state()
    for name, value in before[0].items():
        assert torch.equal(after[0][name].nan_to_num(), value.nan_to_num()), name
    for name, grad in before[1].items():
        assert after[1][name] is grad, name
        assert grad is None or bool((grad == 1).all()), name
    assert after[2:4] == before[2:4]
    assert torch.equal(after[4], before[4])
    assert after[5:] == before[5:]


@contextmanager
def refused(net, error, match, opt=None, internals=True):
    """The error, short enough to read, and nothing changed."""
    with unchanged(net, opt):
        with pytest.raises(error, match=match) as caught:
            yield
        text = str(caught.value)
        assert len(text) < 1500, text
        if internals:
            for word in ("FakeTensor", "torch._dynamo", "proxy_tensor", "aten::", "arg0_1"):
                assert word not in text, text


# --- options --------------------------------------------------------------------------------------

OPTIONS = [
    ({"terminal": "bond"}, r"terminal='bond' is not known; choose one of 'bound', 'residual'"),
    ({"preconditioner": "kfac"}, r"preconditioner='kfac' is not known; choose one of 'identity'"),
    ({"quu": "newton"}, r"quu='newton' is not known; choose one of 'gauss-newton', 'preconditioner'"),
    ({"rollout": "quadratic"}, r"rollout='quadratic' is not known; choose one of 'linear', 'nonlinear'"),
    ({"coupling": "group"}, r"coupling='group' must be 'batch', 'sample' or a positive group size, or None"),
    ({"coupling": 0}, r"coupling=0 must be"),
    ({"coupling": 2.5}, r"coupling=2.5 must be"),
    ({"coupling": True}, r"coupling=True must be"),
    ({"feedback": "yes"}, r"feedback='yes' must be True or False"),
    ({"feedback": 1}, r"feedback=1 must be True or False"),
    ({"decoupled": None}, r"decoupled=None must be True or False"),
    ({"tikhonov": -0.1}, r"tikhonov=-0.1 must be finite and not negative"),
    ({"rank": 0}, r"rank=0 must be a positive integer, or None"),
    ({"rank": 1.0}, r"rank=1.0 must be a positive integer, or None"),
    ({"rank": True}, r"rank=True must be"),
    ({"terminal": "residual", "rank": 2}, r"terminal='residual' has one column, so rank=2.*'bound'"),
    ({"terminal": "gradient", "rank": None}, r"terminal='gradient' has one column, so rank=None.*'bound'"),
    ({"terminal": "exact", "rank": 3}, r"terminal='exact' always has all columns, so rank=3"),
    ({"terminal": "sampled", "rank": None}, r"terminal='sampled' draws `rank` columns"),
    ({"terminal": "residual", "curvature": 1.0}, r"curvature= is the bound of terminal='bound'; terminal='residual'"),
    ({"curvature": 0.0}, r"curvature=0.0 must be positive"),
    ({"curvature": -2.0}, r"curvature=-2.0 must be positive"),
    ({"curvature": math.nan}, r"curvature=nan must be positive"),
    ({"curvature": math.inf}, r"curvature=inf must be positive and finite"),
    ({"curvature": "2"}, r"curvature='2' must be"),
    ({"loss_floor": 0.5}, r"loss_floor= is used by terminal='residual' alone, not by 'bound'"),
    ({"terminal": "residual", "loss_floor": math.nan}, r"loss_floor=nan must be finite"),
    ({"terminal": "residual", "loss_floor": None}, r"loss_floor=None must be"),
    ({"lr": -1.0}, r"lr=-1.0 must be finite and not negative"),
    ({"lr": math.nan}, r"lr=nan must be finite and not negative"),
    ({"lr": math.inf}, r"lr=inf must be finite"),
    ({"lr": "fast"}, r"lr='fast' must be a number"),
    ({"lr": torch.ones(2)}, r"lr=tensor.* must be a number"),
    ({"weight_decay": -0.1}, r"weight_decay=-0.1 must be finite and not negative"),
    ({"weight_decay": math.nan}, r"weight_decay=nan must be finite"),
    ({"momentum": -0.9}, r"momentum=-0.9 must be finite and not negative"),
    ({"momentum": math.nan}, r"momentum=nan must be finite"),
    ({"momentum": None}, r"momentum=None must be a number"),
    ({"beta1": 1.0}, r"beta1=1.0 must be in \[0, 1\)"),
    ({"beta1": -0.1}, r"beta1=-0.1 must be in \[0, 1\)"),
    ({"beta1": math.nan}, r"beta1=nan must be in \[0, 1\)"),
    ({"beta1": "a"}, r"beta1='a' must be"),
    ({"beta1": 0.9, "momentum": 0.9}, r"momentum and beta1 both average the direction; set one"),
    ({"nesterov": True}, r"nesterov=True is a form of momentum or of beta1's average: set one"),
    ({"nesterov": 1, "beta1": 0.9}, r"nesterov=1 must be True or False, or None for the metric's own"),
    ({"trust": 0.0}, r"trust=0.0 must be positive, or None"),
    ({"trust": -1.0}, r"trust=-1.0 must be positive, or None"),
    ({"trust": math.nan}, r"trust=nan must be positive, or None"),
    ({"trust": "1"}, r"trust='1' must be"),
    ({"gain": math.nan}, r"gain=nan must be finite"),
    ({"gain": math.inf}, r"gain=inf must be finite"),
    ({"gain": "full"}, r"gain='full' must be"),
    ({"params": []}, r"params is empty; leave it out"),
    ({"params": torch.ones(2)}, r"params must be an iterable .* not a tensor"),
    ({"params": [torch.ones(2)]}, r"shape \(2,\) in params is not a parameter of the compiled model"),
    ({"params": 3}, r"params must be an iterable"),
    ({"params": [3]}, r"params must be .* not .*int"),
    ({"params": [{"lr": 0.1}]}, r"group has no 'params'"),
]


@pytest.mark.parametrize(("options", "match"), OPTIONS, ids=lambda o: str(o) if isinstance(o, dict) else "")
def test_options_of_the_optimizer(options, match):
    net = compiled()
    with unchanged(net), pytest.raises((ValueError, TypeError), match=match) as caught:
        ddpn_fx.DDPNOpt(net, **options)
    assert str(caught.value).startswith("DDPNOpt: ")


def test_an_option_that_does_not_exist():
    with pytest.raises(TypeError, match="learning_rate"):
        ddpn_fx.DDPNOpt(compiled(), learning_rate=0.1)


def test_a_model_that_is_not_compiled():
    with pytest.raises(TypeError, match=r"net must come from ddpn_fx.compile\(model, loss=...\), not be a Sequential"):
        ddpn_fx.DDPNOpt(mlp())


def test_nothing_to_train():
    net = compiled(mlp().requires_grad_(False))
    with pytest.raises(ValueError, match="no parameter with requires_grad=True, so there is nothing to train"):
        ddpn_fx.DDPNOpt(net)
    with pytest.raises(ValueError, match="no parameter"):
        ddpn_fx.DDPNOpt(compiled(nn.Tanh()))


def test_everything_frozen_later():
    net = compiled()
    opt = ddpn_fx.DDPNOpt(net)
    opt.train_step(*batch())
    net.requires_grad_(False)
    with unchanged(net, opt), pytest.raises(ValueError, match=r"no parameter .* requires_grad=True"):
        opt.train_step(*batch())


# --- batches --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ready():
    net = compiled()
    opt = ddpn_fx.DDPNOpt(net, momentum=0.9)
    opt.train_step(*batch())
    return net, opt


X, Y = batch()

BATCHES = [
    ("empty", (X[:0], Y[:0]), ValueError, r"the batch is empty \(dimension 0 of the inputs is 0\)"),
    ("short target", (X, Y[:4]), ValueError, r"the target has length 4, but the batch has 6 samples"),
    ("long target", (X[:4], Y), ValueError, r"the target has length 6, but the batch has 4 samples"),
    ("0-d target", (X, Y[0]), ValueError, r"the target has no batch dimension, but the batch has 6 samples"),
    ("empty target", (X, Y[:0]), ValueError, r"the target has length 0, but the batch has 6 samples"),
    ("no target", (X,), TypeError, r"the loss needs a target: train_step\(inputs, target\)"),
    ("list target", (X, Y.tolist()), TypeError, r"target must be a tensor.*not a list.*torch.as_tensor"),
    ("array target", (X, Y.numpy()), TypeError, r"target must be a tensor.*not a ndarray.*torch.as_tensor"),
    ("array inputs", (X.numpy(), Y), TypeError, r"inputs holds no tensor.*ndarray.*torch.as_tensor"),
    ("no inputs", ((), Y), ValueError, r"inputs holds no tensor"),
    ("0-d inputs", (X.sum(), Y), ValueError, r"inputs holds no tensor with a batch dimension"),
    ("width", (X[:, :3], Y), RuntimeError, r"shapes cannot be multiplied \(6x3 and 4x5\)(.|\n)*in eager"),
    ("two inputs", ((X, X), Y), TypeError, r"positional arguments(.|\n)*in eager"),
    ("a keyword", ({"x": X}, Y), TypeError, r"unexpected keyword argument 'x'(.|\n)*in eager"),
    ("float64 inputs", (X.double(), Y), RuntimeError, r"same dtype.*[dD]ouble(.|\n)*in eager"),
    ("integer inputs", (X.long(), Y), RuntimeError, r"same dtype.*(Long|int64)(.|\n)*in eager"),
    ("float labels", (X, Y.float()), RuntimeError, r"(Long|scalar type).*[fF]loat(.|\n)*in eager"),
    ("int32 labels", (X, Y.int()), RuntimeError, r"(Long|scalar type).*[iI]nt(.|\n)*in eager"),
    ("2-d labels", (X, Y[:, None]), RuntimeError, r"(0D or 1D target|multi-target)(.|\n)*in eager"),
]


@pytest.mark.parametrize("what", BATCHES, ids=lambda b: b[0])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_batches(ready, what, first):
    _, arguments, error, match = what
    net, opt = ready
    if first:
        net = compiled()
        opt = ddpn_fx.DDPNOpt(net, momentum=0.9)
    with unchanged(net, opt), pytest.raises(error, match=match) as caught:
        opt.train_step(*arguments)
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "FakeTensor" not in text
    assert len(text) < 1000


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_label_out_of_range(backend):
    net = compiled(**({} if backend is None else {"disable": False, "backend": backend}))
    opt = ddpn_fx.DDPNOpt(net, momentum=0.9)
    x, y = batch()
    bad = y.clone()
    bad[2] = 7
    with unchanged(net, opt), pytest.raises(IndexError, match="Target 7 is out of bounds"):
        opt.train_step(x, bad)
    opt.train_step(x, y)
    with unchanged(net, opt), pytest.raises(IndexError, match="Target 7 is out of bounds"):
        opt.train_step(x, bad)


def test_an_integer_target_of_mse():
    net = compiled(loss=F.mse_loss)
    opt = ddpn_fx.DDPNOpt(net)
    x, _ = batch()
    target = torch.ones(6, 3, dtype=torch.long)
    twin = copy.deepcopy(net)
    try:
        torch.autograd.grad(F.mse_loss(twin(x), target), list(twin.parameters()))
    except RuntimeError as fails:  # torch 2.11 promotes it in the loss alone, not in its gradient
        with refused(net, RuntimeError, re.escape(str(fails)), opt):
            opt.train_step(x, target)
        return
    loss = opt.train_step(x, target)  # torch promotes it
    assert torch.equal(loss, ddpn_fx.DDPNOpt(twin).train_step(x, target.float()))
    assert torch.equal(net[0].weight, twin[0].weight)


def test_a_target_that_broadcasts():
    net = compiled(loss=F.mse_loss)
    opt = ddpn_fx.DDPNOpt(net)
    x, _ = batch()
    with (
        pytest.warns(UserWarning, match="different to the input size"),  # as in eager mode
        refused(net, LossError, r"(broadcasts|For this loss pass curvature=L)", opt),
    ):
        opt.train_step(x, torch.zeros(6, 1))


def test_a_target_with_loss_none():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x).square().mean()

    net = compiled(Own(), loss=None)
    opt = ddpn_fx.DDPNOpt(net, terminal="residual")
    with refused(net, TypeError, r"a target was given, but ddpn_fx.compile had loss=None.*train_step\(inputs\)", opt):
        opt.train_step(*batch())
    opt.train_step(batch()[0])


def test_a_model_that_returns_no_loss():
    net = compiled(loss=None)
    opt = ddpn_fx.DDPNOpt(net)
    with refused(net, CaptureError, r"loss=None\): Sequential must return its scalar loss.*\(6, 3\).*loss=torch", opt):
        opt.train_step(batch()[0])


# --- losses ---------------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_scalar():
    net = compiled(loss=lambda o, y: F.cross_entropy(o, y, reduction="none"))
    opt = ddpn_fx.DDPNOpt(net)
    with refused(
        net, CaptureError, r"the loss must return a scalar tensor, but returned \(6,\).*reduction='mean'", opt
    ):
        opt.train_step(*batch())


def test_a_loss_that_is_not_a_tensor():
    net = compiled(loss=lambda o, y: float(F.cross_entropy(o, y)))
    opt = ddpn_fx.DDPNOpt(net)
    with refused(net, CaptureError, r"the loss must return a scalar tensor, but returned .*float", opt):
        opt.train_step(*batch())


def test_a_loss_that_forgets_the_output():
    net = compiled(loss=lambda o, y: y.float().mean())
    opt = ddpn_fx.DDPNOpt(net)
    with refused(net, StagingError, r"the loss does not depend on a trainable parameter", opt):
        opt.train_step(*batch())


def test_an_unknown_loss_needs_a_curvature():
    net = compiled(loss=lambda o, y: F.huber_loss(o, F.one_hot(y, 3).float()))
    opt = ddpn_fx.DDPNOpt(net)
    match = r"terminal='bound' knows the curvature of cross_entropy.*curvature=L.*terminal='residual'"
    with refused(net, LossError, match, opt):
        opt.train_step(*batch())
    ddpn_fx.DDPNOpt(net, terminal="residual").train_step(*batch())
    ddpn_fx.DDPNOpt(net, curvature=1.0).train_step(*batch())
    opt = ddpn_fx.DDPNOpt(net, terminal="sampled")
    with refused(net, LossError, r"terminal='sampled' draws labels from cross_entropy.*terminal='residual'", opt):
        opt.train_step(*batch())


def test_too_many_columns():
    net = compiled()
    opt = ddpn_fx.DDPNOpt(net, rank=5)
    with refused(net, LossError, r"rank=5 exceeds the 2 directions .*rank=None", opt):
        opt.train_step(*batch())


def variance(o, y):
    return F.cross_entropy(o, y) + o.var(0).mean()


def contrastive(o, y):
    return F.cross_entropy(o @ o.mT, torch.arange(o.shape[0]))


def centred(o, y):
    return F.cross_entropy(o - o.mean(0), y)


MIXING = {}


@pytest.mark.parametrize("loss", [variance, contrastive, centred])
@pytest.mark.parametrize(
    "options",
    [{"curvature": 1.0}, {"curvature": 1.0, "rank": None}, {"terminal": "residual"}, {"terminal": "exact"}],
    ids=str,
)
def test_a_loss_that_mixes_samples(loss, options):
    net = MIXING.setdefault(loss, compiled(loss=loss))
    opt = ddpn_fx.DDPNOpt(net, momentum=0.9, **options)
    with unchanged(net, opt), pytest.raises(LossError, match=r"the loss mixes the samples.*terminal='gradient'"):
        opt.train_step(*batch())
    gradient = ddpn_fx.DDPNOpt(net, terminal="gradient", lr=0.1)
    assert gradient.train_step(*batch()).isfinite()
    assert not gradient.stats["skipped"]


def test_a_loss_below_its_floor():
    net = compiled(loss=lambda o, y: F.cross_entropy(o, y) - 5.0)
    opt = ddpn_fx.DDPNOpt(net, terminal="residual", momentum=0.9)
    opt.param_groups[0]["lr"] = 0.1
    x, y = batch()
    for _ in range(2):
        with unchanged(net):
            state = {k: v.clone() for s in opt.state.values() for k, v in s.items()}
            with pytest.raises(
                LossError, match=r"below loss_floor=0.0 \(batch loss -3.*no weight was changed.*loss_floor="
            ):
                opt.train_step(x, y)
            assert all(not v.any() for v in state.values())
    opt = ddpn_fx.DDPNOpt(net, terminal="residual", loss_floor=-5.0)
    opt.train_step(x, y)


class Margin(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, o, y):
        return F.cross_entropy(o * self.temperature, y)


def test_a_loss_with_parameters_of_its_own():
    model = mlp()
    with pytest.raises(ValueError, match=r"loss=Margin has trainable parameters of its own \(temperature\).*model"):
        ddpn_fx.compile(model, loss=Margin())
    frozen = Margin().requires_grad_(False)
    ddpn_fx.DDPNOpt(compiled(loss=frozen), curvature=1.0).train_step(*batch())


def test_a_loss_with_state_of_its_own():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, o, y):
            self.count.add_(1)
            return F.cross_entropy(o, y)

    loss = Counted()
    net = compiled(loss=loss)
    opt = ddpn_fx.DDPNOpt(net)
    with refused(net, CaptureError, r"the loss updates its own buffer 'count'.*model", opt):
        opt.train_step(*batch())
    assert loss.count == 0


def test_a_loss_that_uses_the_models_parameters():
    model = mlp()
    net = compiled(model, loss=lambda o, y: F.cross_entropy(o, y) + 0.1 * model[0].weight.square().sum())
    opt = ddpn_fx.DDPNOpt(net, terminal="residual")
    with refused(net, (StagingError, CaptureError), r"loss.*parameter.*(model|weight_decay)", opt):
        opt.train_step(*batch())


def test_a_penalty_that_the_model_returns():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x, y):
            return F.cross_entropy(self.fc(x), y) + 0.1 * self.fc.weight.square().sum()

    net = compiled(Own(), loss=None)
    opt = ddpn_fx.DDPNOpt(net, terminal="residual")
    with unchanged(net, opt), pytest.raises((StagingError, LossError, CaptureError), match=r"parameter|mixes"):
        opt.train_step(batch())


# --- models ---------------------------------------------------------------------------------------


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        if x.sum() > 0:  # the branch
            x = 2 * x
        return self.fc(x)


class Looping(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        for _ in range(int(x[0, 0])):  # the loop
            x = 2 * x
        return self.fc(x)


def line_of(text):
    with open(__file__) as file:
        (found,) = [i for i, line in enumerate(file, 1) if line.rstrip().endswith("# " + text)]
    return found


@pytest.mark.parametrize(("model", "mark"), [(Branching, "the branch"), (Looping, "the loop")])
@pytest.mark.parametrize("backend", [None, "inductor"])
def test_a_branch_on_the_data(model, mark, backend):
    net = compiled(model(), **({} if backend is None else {"disable": False, "backend": backend}))
    opt = ddpn_fx.DDPNOpt(net)
    with unchanged(net, opt), pytest.raises(CaptureError) as caught:
        opt.train_step(*batch())
    text = str(caught.value)
    assert f"test_errors.py:{line_of(mark)}" in text
    assert model.__name__ in text
    assert "depends on the data" in text
    assert "torch.where" in text
    assert len(text) < 1000, text


def test_example_inputs_are_checked_alike():
    with pytest.raises(CaptureError, match="depends on the data"):
        compiled(Branching(), example_inputs=batch()[0])
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        compiled(example_inputs=batch()[0][:, :2])
    with pytest.raises(ValueError, match="empty"):
        compiled(example_inputs=batch()[0][:0])


def test_a_model_with_a_fixed_batch_size():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x.reshape(6, 4))

    net = compiled(Fixed())
    opt = ddpn_fx.DDPNOpt(net)
    with unchanged(net, opt), pytest.raises(CaptureError, match=r"(takes only|every) batch size") as caught:
        opt.train_step(*batch())
    assert "test_errors.py:" in str(caught.value)


def test_an_output_that_no_parameter_reaches():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x).detach()

    net = compiled(Detached())
    opt = ddpn_fx.DDPNOpt(net)
    with refused(net, CaptureError, r"no output of Detached depends on a trainable parameter", opt):
        opt.train_step(*batch())


def test_a_parameter_that_is_not_used_stays():
    class Extra(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.idle = nn.Linear(4, 3), nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(x)

    net = compiled(Extra())
    before = net.idle.weight.clone()
    opt = ddpn_fx.DDPNOpt(net, weight_decay=0.1, momentum=0.9)
    opt.train_step(*batch())
    assert torch.equal(net.idle.weight, before)


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.fc1(x)
        if h.requires_grad:
            h.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        return self.fc2(h)


def test_a_gradient_that_the_capture_loses():
    net = compiled(Hooked())
    opt = ddpn_fx.DDPNOpt(net)
    match = r"gives another gradient than the model for fc1.weight, fc1.bias.*hooks.*autograd.Function"
    with refused(net, CaptureError, match, opt):
        opt.train_step(*batch())


class AcrossTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = torch.tanh(self.fc1(x))
        h = torch.softmax(h @ h.mT, 1) @ h
        return self.fc2(h)


def test_a_model_that_mixes_samples():
    net = compiled(AcrossTheBatch())
    opt = ddpn_fx.DDPNOpt(net)
    with unchanged(net, opt), pytest.raises(StagingError, match=r"mixes the samples.*feedback=False") as caught:
        opt.train_step(*batch())
    assert "test_errors.py" in str(caught.value)
    x, y = batch()
    plain = ddpn_fx.DDPNOpt(net, feedback=False, lr=0.1)
    loss = F.cross_entropy(net(x), y)
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    want = [p.detach() - 0.1 * g for p, g in zip(net.parameters(), gradients, strict=True)]
    assert torch.allclose(plain.train_step(x, y), loss)
    assert all(torch.allclose(p, w, atol=1e-6) for p, w in zip(net.parameters(), want, strict=True))


def test_a_model_that_fails_in_eager_keeps_its_error():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            raise KeyError("mine")

    net = compiled(Failing())
    opt = ddpn_fx.DDPNOpt(net)
    with unchanged(net, opt), pytest.raises(KeyError, match="mine"):
        opt.train_step(*batch())


def test_an_input_that_the_model_writes_to():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            x.mul_(2)
            return self.fc(x)

    net = compiled(Writing())
    opt = ddpn_fx.DDPNOpt(net)
    x, y = batch()
    kept = x.clone()
    with unchanged(net, opt), pytest.raises(CaptureError, match=r"writes into its input.*clone"):
        opt.train_step(x, y)
    assert torch.equal(x, kept)


def test_after_an_error_training_goes_on():
    net = compiled()
    opt = ddpn_fx.DDPNOpt(net)
    x, y = batch()
    for bad in ((x[:0], y[:0]), (x, y[:3]), (x, y.float())):
        with pytest.raises((ValueError, RuntimeError)):
            opt.train_step(*bad)
    first = opt.train_step(x, y)
    assert opt.train_step(x, y) < first


def test_export_before_anything_was_captured(tmp_path):
    net = compiled()
    for given in (net, ddpn_fx.DDPNOpt(net)):
        with pytest.raises(RuntimeError, match="nothing is captured yet"):
            ddpn_fx.export(given, tmp_path)
    with pytest.raises(TypeError, match="not a Sequential"):
        ddpn_fx.export(mlp(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_lazy_module_is_asked_for_a_batch():
    statistics = nn.Sequential(nn.LazyBatchNorm1d(affine=False), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"'0.running_mean' of Sequential has no shape yet"):
        ddpn_fx.compile(statistics, loss=F.cross_entropy)
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"'0.weight' of Sequential has no shape yet.*call the model on a batch first"):
        ddpn_fx.compile(model, loss=F.cross_entropy)
    model(torch.randn(2, 5))
    net = ddpn_fx.compile(model, loss=F.cross_entropy, backend="eager")
    assert torch.isfinite(ddpn_fx.DDPNOpt(net).train_step(torch.randn(4, 5), torch.tensor([0, 1, 2, 0])))
