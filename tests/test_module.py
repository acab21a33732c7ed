"""The wrapper is the user's module in all that others see: names, state, attributes, modes, copies, pickles."""

import copy
import functools
import inspect
import io
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx.passes.ir import Chain


class Net(nn.Module):
    """Two linear layers, a buffer that the forward pass uses and one that is not saved, a plain attribute, a method."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("shift", torch.full((4,), 0.25))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.scale = 1.0

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x + self.shift)) * self.scale)

    def count(self):
        return sum(p.numel() for p in self.parameters())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.head.weight = self.emb.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.emb(tokens)))


def batch(size=6, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return torch.randn(size, 4, generator=g).to(dtype), torch.randint(3, (size,), generator=g)


def compiled(model=None, **options):
    options = {"loss": F.cross_entropy, "disable": True, **options}
    return ddpn_fx.compile(Net() if model is None else model, **options)


NETS = {}


def captured():
    """A net of its own that has been captured already."""
    if not NETS:
        NETS["plain"] = compiled()
        NETS["plain"].capture(*batch(), with_target=True)
    return copy.deepcopy(NETS["plain"])


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Net, Tied, lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))])
def test_names_are_the_models(make):
    model = make()
    net = compiled(model)
    assert list(net.state_dict()) == list(model.state_dict())
    for listing in ("named_parameters", "named_buffers", "named_modules", "named_children"):
        got, want = list(getattr(net, listing)()), list(getattr(model, listing)())
        assert [n for n, _ in got] == [n for n, _ in want]
        assert all(a is b for (_, a), (_, b) in zip(got, want, strict=True)), listing
    for listing in ("parameters", "buffers", "modules", "children"):
        assert all(a is b for a, b in zip(getattr(net, listing)(), getattr(model, listing)(), strict=True)), listing
    assert [n for n, _ in net.named_parameters(prefix="a", remove_duplicate=False)] == [
        n for n, _ in model.named_parameters(prefix="a", remove_duplicate=False)
    ]
    assert net.get_submodule("") is net


def test_getters_by_name():
    net = compiled()
    assert net.get_parameter("fc1.weight") is net.fc1.weight
    assert net.get_buffer("shift") is net.shift
    assert net.get_submodule("fc2") is net.fc2


def test_tied_parameters_train_as_one():
    net = compiled(Tied())
    assert len(list(net.parameters())) == 2
    opt = ddpn_fx.DDPNOpt(net)
    before = net.emb.weight.clone()
    opt.train_step(torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 4]))
    assert net.head.weight is net.emb.weight
    assert not torch.equal(net.emb.weight, before)


def test_state_dict_takes_prefix_and_destination():
    net = compiled()
    assert set(net.state_dict(prefix="a.")) == {"a." + k for k in Net().state_dict()}
    destination = {}
    assert net.state_dict(destination=destination, keep_vars=True) is destination
    assert destination["fc1.weight"] is net.fc1.weight
    assert "scratch" not in net.state_dict()


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_are_accepted_on_load(prefix):
    source, net = Net(), compiled()
    result = net.load_state_dict({prefix + k: v for k, v in source.state_dict().items()})
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in net.state_dict().items())


def test_a_layer_that_is_called_module_keeps_its_name():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(4, 3)

        def forward(self, x):
            return self.module(x)

    source, net = Holder(), compiled(Holder())
    for prefix in ("", "module.", "_orig_mod."):
        net.load_state_dict({prefix + k: v for k, v in source.state_dict().items()})
        assert torch.equal(net.module.weight, source.module.weight)


def test_strict_errors_name_the_users_keys():
    net = compiled()
    state = {"module." + k: v for k, v in net.state_dict().items()}
    state["module.extra"] = state.pop("module.fc1.weight")
    with pytest.raises(RuntimeError, match=r'for Net(.|\n)*Missing key.*"fc1.weight"') as error:
        net.load_state_dict(state)
    assert '"module.extra"' in str(error.value)
    result = net.load_state_dict(state, strict=False)
    assert result.missing_keys == ["fc1.weight"]
    assert result.unexpected_keys == ["module.extra"]
    with pytest.raises(RuntimeError, match="size mismatch for fc1.weight"):
        net.load_state_dict({**net.state_dict(), "fc1.weight": torch.zeros(2, 2)})


def test_load_keeps_the_versions_of_the_state_dict():
    class Versioned(nn.Linear):
        _version = 3

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
            self.seen = local_metadata.get("version")
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    net = compiled(nn.Sequential(Versioned(4, 3)))
    net.load_state_dict(net.state_dict())
    assert net[0].seen == 3
    net[0].seen = None
    prefixed = nn.ModuleDict({"module": nn.Sequential(Versioned(4, 3))}).state_dict()
    net.load_state_dict(prefixed)
    assert net[0].seen == 3


def test_load_with_assign():
    net = compiled()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    assert net.fc1.weight.data_ptr() == state["fc1.weight"].data_ptr()


def test_state_dict_hooks_run_where_they_are_registered():
    seen = []
    model = Net()
    model.fc1.register_state_dict_post_hook(lambda m, state, prefix, meta: seen.append("child"))
    model.register_state_dict_pre_hook(lambda m, prefix, keep: seen.append("before"))
    net = compiled(model)
    net.register_state_dict_post_hook(lambda m, state, prefix, meta: seen.append("after"))
    net.register_load_state_dict_pre_hook(lambda m, *args: seen.append("load"))
    net.register_load_state_dict_post_hook(lambda m, keys: seen.append("loaded"))
    state = net.state_dict()
    assert seen == ["before", "child", "after"]
    seen.clear()
    net.load_state_dict(state)
    assert seen == ["load", "loaded"]


def test_inside_another_module():
    class Own(Net):
        def _load_from_state_dict(self, *args):
            self.loads = getattr(self, "loads", 0) + 1
            super()._load_from_state_dict(*args)

    outer = nn.Module()
    outer.net = compiled(Own())
    plain = nn.Module()
    plain.net = Net()
    assert list(outer.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in outer.named_parameters()] == [n for n, _ in plain.named_parameters()]
    outer.load_state_dict(plain.state_dict())
    assert outer.net.loads == 1
    assert torch.equal(outer.net.fc1.weight, plain.net.fc1.weight)
    outer.eval()
    assert not outer.net._original.training
    outer.double()
    assert outer.net.fc1.weight.dtype == torch.float64


# --- attributes -----------------------------------------------------------------------------------


def test_attributes_are_read_set_and_deleted_on_the_model():
    model = Net()
    net = compiled(model)
    assert net.fc1 is model.fc1
    assert net.scale == 1.0
    assert net.count() == model.count()
    net.scale = 2.0
    assert model.scale == 2.0
    net.note = "mine"
    assert model.note == "mine"
    del net.note
    assert not hasattr(model, "note")
    net.fc3 = nn.Linear(2, 2)
    assert "fc3.weight" in dict(net.named_parameters())
    del net.fc3
    assert "fc3" not in dict(model.named_children())
    net.register_buffer("more", torch.ones(1))
    assert "more" in model.state_dict()
    net.register_parameter("free", nn.Parameter(torch.ones(1)))
    assert model.free is net.free
    with pytest.raises(AttributeError, match="'Net' object has no attribute 'nothing'"):
        _ = net.nothing
    assert {"fc1", "scale", "chain", "count"} <= set(dir(net))


def test_methods_that_the_model_overrides_are_the_models():
    class Own(Net):
        def extra_repr(self):
            return "mine"

        def parameters(self, recurse=True):
            return iter([self.fc2.weight])

        def to(self, *args, **kwargs):
            self.moved = True
            return super().to(*args, **kwargs)

    net = compiled(Own())
    assert [p is net.fc2.weight for p in net.parameters()] == [True]
    assert net.to(torch.float64) is net
    assert net.moved


def test_sequences_forward_their_protocol():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    net = compiled(model)
    assert len(net) == 3
    assert net[0] is model[0]
    assert [m is n for m, n in zip(net, model, strict=True)] == [True] * 3
    assert isinstance(net[:2], nn.Sequential)
    net[1] = nn.Tanh()
    assert isinstance(model[1], nn.Tanh)
    del net[1]
    assert len(model) == 2
    assert nn.Linear in {type(m) for m in net}
    table = compiled(nn.ModuleDict({"a": nn.Linear(2, 2)}))
    assert "a" in table
    assert "b" not in table
    assert bool(compiled(nn.Sequential()))
    with pytest.raises(TypeError, match=r"'Net'.* has no len"):
        len(compiled())
    with pytest.raises(TypeError, match="'Net' object is not subscriptable"):
        compiled()[0]
    with pytest.raises(TypeError, match="'Net' object is not iterable"):
        iter(compiled())


def test_hooks_run_once_with_the_model():
    calls = []
    model = Net()
    net = compiled(model)
    net.register_forward_pre_hook(lambda m, args: calls.append(("before", type(m))))
    model.register_forward_hook(lambda m, args, out: calls.append(("after", type(m))))
    net(batch()[0])
    assert calls == [("before", Net), ("after", Net)]


def test_a_hook_that_changes_the_output_is_trained_through():
    x, y = batch()
    net = compiled()
    opt = ddpn_fx.DDPNOpt(net, feedback=False, lr=0.1)
    first = opt.train_step(x, y)
    handle = net.register_forward_hook(lambda m, args, out: 3.0 * out)
    assert torch.allclose(F.cross_entropy(net(x), y), opt.train_step(x, y))
    handle.remove()
    assert torch.allclose(F.cross_entropy(net(x), y), opt.train_step(x, y))
    assert first > opt.stats["loss"]


# --- modes, dtypes, devices -----------------------------------------------------------------------


def test_train_and_eval_go_both_ways():
    model = Net()
    net = compiled(model)
    assert net.eval() is net
    assert not model.training
    assert not model.fc1.training
    model.train()
    assert net.training
    net.training = False
    assert not model.training
    assert net.train() is net
    assert model.fc1.training


def test_train_and_eval_are_two_captures():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.9), nn.Linear(5, 3))
    net = compiled(model)
    opt = ddpn_fx.DDPNOpt(net, lr=0.1)
    x, y = batch()
    opt.train_step(x, y)
    train = net.chain
    net.eval()
    with torch.no_grad():
        want = F.cross_entropy(model(x), y)
    assert torch.allclose(opt.train_step(x, y), want)
    assert net.chain is not train
    assert not net.training
    opt.train_step(x, y)
    assert len(net._chains) == 2
    net.train()
    opt.train_step(x, y)
    assert len(net._chains) == 2


def test_part_of_the_model_in_eval_mode():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    net = compiled(model)
    opt = ddpn_fx.DDPNOpt(net, lr=0.1)
    net[1].eval()
    before = model[1].running_mean.clone()
    opt.train_step(*batch())
    assert torch.equal(model[1].running_mean, before)
    assert [m.training for m in model] == [True, False, True]


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.float64, None), (torch.float16, None), (torch.bfloat16, None), (torch.bfloat16, "eager")],
    ids=str,
)
def test_dtype_changes_are_followed(dtype, backend):
    options = {"disable": True} if backend is None else {"disable": False, "backend": backend}
    net = captured() if backend is None else compiled(**options)
    opt = ddpn_fx.DDPNOpt(net, lr=0.1)
    x, y = batch()
    opt.train_step(x, y)
    assert net.to(dtype) is net
    assert net._original.fc1.weight.dtype == dtype
    before = net.fc1.weight.clone()
    with torch.no_grad():
        want = F.cross_entropy(net._original(x.to(dtype)), y)
    got = opt.train_step(x.to(dtype), y)
    assert torch.allclose(got.double(), want.double(), rtol=1e-2)
    assert net.fc1.weight.dtype == dtype
    assert not torch.equal(before, net.fc1.weight)
    assert not opt.stats["skipped"]


def test_half_float_double_return_the_wrapper():
    net = compiled()
    for name, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16), ("double", torch.float64)):
        assert getattr(net, name)() is net
        assert net.fc1.weight.dtype == dtype
    assert net.float() is net
    assert net.cpu() is net


def test_one_layer_in_another_dtype():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.fc2(torch.tanh(self.fc1(x)).to(self.fc2.weight.dtype))

    net = compiled(Mixed())
    opt = ddpn_fx.DDPNOpt(net, lr=0.1)
    opt.train_step(*batch())
    net.fc2.double()
    loss = opt.train_step(*batch())
    assert net.fc2.weight.dtype == torch.float64
    assert net.fc1.weight.dtype == torch.float32
    assert loss.isfinite()
    assert len(net._chains) == 2


def test_frozen_after_capture_stays_untouched():
    net = captured()
    opt = ddpn_fx.DDPNOpt(net, lr=0.1, momentum=0.9, weight_decay=0.1)
    x, y = batch()
    opt.train_step(x, y)
    net.fc1.requires_grad_(False)
    frozen, free = net.fc1.weight.clone(), net.fc2.weight.clone()
    opt.train_step(x, y)
    assert torch.equal(net.fc1.weight, frozen)
    assert not torch.equal(net.fc2.weight, free)
    assert len(net._chains) == 2
    assert "fc1.weight" not in str(net.chain)
    assert net.requires_grad_(True) is net
    opt.train_step(x, y)
    assert not torch.equal(net.fc1.weight, frozen)
    assert len(net._chains) == 2


def test_a_setting_that_changes_after_the_capture_is_followed():
    net = captured()
    opt = ddpn_fx.DDPNOpt(net, lr=0.1)
    x, y = batch()
    opt.train_step(x, y)
    net.scale = 3.0
    want = F.cross_entropy(net(x), y)
    assert torch.allclose(opt.train_step(x, y), want)
    assert len(net._chains) == 2
    opt.train_step(x, y)
    assert len(net._chains) == 2


def test_a_dropout_rate_that_changes_is_followed():
    net = compiled(nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)))
    opt = ddpn_fx.DDPNOpt(net, lr=0.0)
    x, y = batch()
    opt.train_step(x, y)
    net[1].p = 0.0
    want = F.cross_entropy(net(x), y)
    assert torch.allclose(opt.train_step(x, y), want)


def test_a_counter_in_the_forward_pass_captures_once():
    class Counting(Net):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    net = compiled(Counting())
    opt = ddpn_fx.DDPNOpt(net, lr=0.1)
    for _ in range(3):
        opt.train_step(*batch())
        net(batch()[0])
    assert len(net._chains) == 1


def test_what_the_forward_pass_keeps_is_left_alone_by_the_capture():
    class Keeping(Net):
        def __init__(self):
            super().__init__()
            self.seen, self.table, self.size = [], {"a": 1}, 0

        def forward(self, x):
            out = super().forward(x)
            self.seen.append(out)
            self.table["out"] = out
            self.size = 2
            return out

    net = compiled(Keeping())
    ddpn_fx.DDPNOpt(net).train_step(*batch())
    assert (net.seen, net.table, net.size) == ([], {"a": 1}, 0)


def test_a_batch_as_long_as_another_input():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x, w):
            return self.fc(x) * w

    net = compiled(Weighted())
    opt = ddpn_fx.DDPNOpt(net, lr=0.0)
    x, y = batch()
    w = torch.tensor([1.0, 2.0, 3.0])
    for size in (6, 3, 2):
        want = F.cross_entropy(net(x[:size], w), y[:size])
        assert torch.allclose(opt.train_step((x[:size], w), y[:size]), want)
    assert len(net._chains) == 1


def test_a_buffer_that_changes_between_steps_is_read_anew():
    net = captured()
    opt = ddpn_fx.DDPNOpt(net, lr=0.1)
    x, y = batch()
    opt.train_step(x, y)
    net.shift.fill_(2.0)
    want = F.cross_entropy(net(x), y)
    assert torch.allclose(opt.train_step(x, y), want)
    net.shift = torch.full((4,), -1.0)
    want = F.cross_entropy(net(x), y)
    assert torch.allclose(opt.train_step(x, y), want)
    assert len(net._chains) == 1


def test_weights_that_are_loaded_are_used():
    net, other = captured(), Net()
    opt = ddpn_fx.DDPNOpt(net, lr=0.1)
    x, y = batch()
    opt.train_step(x, y)
    net.load_state_dict(other.state_dict())
    assert torch.allclose(opt.train_step(x, y), F.cross_entropy(other(x), y))
    with torch.no_grad():
        net.fc1.weight.zero_()
    assert torch.allclose(opt.train_step(x, y), F.cross_entropy(net(x), y) + 0 * opt.stats["loss"], atol=1.0)


def test_apply_and_zero_grad():
    net = compiled()
    seen = []
    assert net.apply(lambda m: seen.append(type(m))) is net
    assert seen == [nn.Linear, nn.Linear, Net]
    F.cross_entropy(net(batch()[0]), batch()[1]).backward()
    assert net.fc1.weight.grad is not None
    net.zero_grad()
    assert net.fc1.weight.grad is None


# --- copies and pickles ---------------------------------------------------------------------------


@pytest.mark.parametrize("stepped", [False, True])
def test_deepcopy_is_independent(stepped):
    net = captured()
    x, y = batch()
    if stepped:
        ddpn_fx.DDPNOpt(net, lr=0.1).train_step(x, y)
    twin = copy.deepcopy(net)
    assert torch.equal(twin.fc1.weight, net.fc1.weight)
    before = net.fc1.weight.clone()
    ddpn_fx.DDPNOpt(twin, lr=0.1).train_step(x, y)
    assert torch.equal(net.fc1.weight, before)
    assert not torch.equal(twin.fc1.weight, before)


def test_copy_shares_the_weights():
    net = captured()
    twin = copy.copy(net)
    assert twin is not net
    assert twin.fc1.weight is net.fc1.weight
    ddpn_fx.DDPNOpt(twin).train_step(*batch())


@pytest.mark.parametrize("stepped", [False, True])
def test_the_whole_net_is_saved_and_loaded(stepped):
    net = captured()
    x, y = batch()
    if stepped:
        ddpn_fx.DDPNOpt(net, lr=0.1).train_step(x, y)
    net.eval()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert not loaded.training
    assert torch.equal(loaded(x), net(x))
    assert torch.equal(ddpn_fx.DDPNOpt(loaded).train_step(x, y), ddpn_fx.DDPNOpt(copy.deepcopy(net)).train_step(x, y))


def test_the_state_dict_is_saved_and_loaded_with_weights_only():
    net = compiled()
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    plain = Net()
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(plain.fc1.weight, net.fc1.weight)


# --- running --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"disable": True}, {"backend": "eager"}, {"backend": "aot_eager"}], ids=str)
def test_the_forward_pass_is_the_models(options):
    model = Net()
    net = ddpn_fx.compile(model, **options)
    x = batch()[0].requires_grad_()
    got = net(x)
    want = model(x)
    assert torch.equal(got, want)
    got.square().sum().backward()
    assert model.fc1.weight.grad is not None
    assert x.grad is not None
    with torch.no_grad():
        assert torch.equal(net(x=x[:2]), model(x[:2]))


def test_disable_traces_no_step():
    net = compiled(nn.Linear(4, 3))
    ddpn_fx.DDPNOpt(net).train_step(*batch())
    assert list(net.graphs) == ["captured", "stage0", "simulate", "backward", "feedback"]


def test_graphs_have_names_and_leave_the_optimizers_alone():
    net = compiled(nn.Linear(4, 3), disable=False, backend="eager")
    first, second = ddpn_fx.DDPNOpt(net, momentum=0.9), ddpn_fx.DDPNOpt(net)
    assert net.graphs == {}
    first.train_step(*batch())
    second.train_step(*batch(3))
    state = str(first.state_dict())
    names = ["captured", "stage0"]
    names += [part + suffix for suffix in ("", "_2") for part in ("simulate", "backward", "feedback", "step")]
    graphs = net.graphs
    assert list(graphs) == names
    assert all(isinstance(g, torch.fx.GraphModule) for g in graphs.values())
    assert str(first.state_dict()) == state
    assert not second.state


@pytest.mark.parametrize(
    "example",
    [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}],
    ids=["tensor", "tuple", "list", "dict"],
)
def test_example_inputs_capture_at_once(example):
    net = compiled(example_inputs=example(batch()[0]))
    assert isinstance(net.chain, Chain)
    assert [s.controls for s in net.chain.stages] == [("fc1.weight", "fc1.bias"), ("fc2.weight", "fc2.bias")]
    assert "fc1.weight" in str(net.chain)
    assert {"captured", "stage0", "stage1"} == set(net.graphs)


@pytest.mark.parametrize(
    "given", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}], ids=["tensor", "tuple", "list", "dict"]
)
def test_inputs_of_a_step(given):
    net = compiled()
    x, y = batch()
    want = F.cross_entropy(net(x), y)
    assert torch.allclose(ddpn_fx.DDPNOpt(net).train_step(given(x), y), want)


def test_several_inputs_and_constants():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, a, b, *, double=False):
            return self.fc(a + b) * (2 if double else 1)

    x, y = batch()
    net = compiled(Two())
    opt = ddpn_fx.DDPNOpt(net, lr=0.0)
    want = F.cross_entropy(net(x, x), y)
    assert torch.allclose(opt.train_step((x, x), y), want)
    assert torch.allclose(opt.train_step({"a": x, "b": x}, y), want)
    assert torch.allclose(
        opt.train_step({"a": x, "b": x, "double": True}, y), F.cross_entropy(net(x, x, double=True), y)
    )
    assert torch.allclose(opt.train_step({"a": x, "b": x, "double": False}, y), want)


def test_chain_before_capture_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"net.chain: nothing is captured.*train_step.*example_inputs="):
        _ = compiled().chain


def test_repr_names_the_model_and_its_layers():
    text = repr(compiled())
    assert "ddpn_fx.compile(Net)" in text
    assert "(fc1): Linear(in_features=4, out_features=5, bias=True)" in text


def test_compile_twice_is_an_error():
    net = compiled()
    with pytest.raises(TypeError, match=r"already compiled by ddpn_fx.*original"):
        ddpn_fx.compile(net)


def test_a_model_compiled_by_torch_is_taken_by_its_original():
    model = Net()
    net = compiled(torch.compile(model, backend="eager"))
    assert "fc1.weight" in net.state_dict()
    ddpn_fx.DDPNOpt(net).train_step(*batch())


def test_a_model_in_data_parallel_is_named():
    with pytest.raises(TypeError, match=r"DataParallel.*\.module"):
        compiled(nn.DataParallel(Net()))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"model": F.relu}, TypeError, "model must be an nn.Module or a torch.export.ExportedProgram, not "),
        ({"loss": "ce"}, TypeError, "loss must be a callable .* not str; .*cross_entropy"),
        ({"backend": "inducto"}, ValueError, "backend='inducto' is not known.*inductor"),
        ({"mode": "fast"}, ValueError, "refuses mode='fast'.*reduce-overhead"),
        ({"options": {"no_such": 1}}, ValueError, "no_such"),
        ({"fullgrap": True}, TypeError, "fullgrap"),
    ],
    ids=["model", "loss", "backend", "mode", "options", "name"],
)
def test_unknown_options_of_compile(options, error, match):
    options = {"model": Net(), "loss": F.cross_entropy, **options}
    with pytest.raises(error, match=match):
        ddpn_fx.compile(**options)


def test_forward_has_the_signature_of_the_module():
    net = compiled()
    assert inspect.signature(net.forward) == inspect.signature(net._original.forward)
    assert inspect.signature(copy.deepcopy(net).forward) == inspect.signature(Net().forward)
    assert inspect.signature(type(net).forward)  # of the class, as the HF Trainer asks


def test_a_forward_that_calls_the_wrappers_stays_on_the_wrapper():
    """As Accelerate sets one: on the module it would call itself."""
    net = compiled()
    x, _ = batch()
    want = net(x)
    plain = net.forward

    @functools.wraps(plain)
    def doubled(*args):
        return 2 * plain(*args)

    net.forward = doubled
    assert torch.equal(net(x), 2 * want)
    assert "forward" not in net._original.__dict__
    assert torch.equal(net._original(x), want)
    net.forward = types.MethodType(functools.wraps(type(net).forward)(lambda self, x: 3 * plain(x)), net)
    assert torch.equal(net(x), 3 * want)
    del net.forward
    assert torch.equal(net(x), want)


def test_another_forward_is_the_modules():
    net = compiled()
    x, y = batch()
    net.forward = lambda x: net.fc2(x[:, :1].expand(-1, 5))
    assert torch.equal(net(x), net._original(x))
    assert torch.equal(net(x), net.fc2(x[:, :1].expand(-1, 5)))
    ddpn_fx.DDPNOpt(net).train_step(x, y)
    del net.forward
    assert net(x).shape == (6, 3)
