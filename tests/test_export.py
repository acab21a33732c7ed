"""The written graphs run and give the live graph's bits; the pictures are well-formed; nobody's file is overwritten."""

import importlib.util
import math
import operator
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.func import functional_call, grad
from torch.fx.experimental.proxy_tensor import make_fx

import ddpn_fx
from ddpn_fx.exporting import dot, write_graphs
from ddpn_fx.exporting.drawing import Box, Drawing, chain_drawing, graph_drawing
from ddpn_fx.exporting.files import file_stems
from ddpn_fx.exporting.literals import callable_source, scalar_source, tensor_source
from ddpn_fx.exporting.nodes import CALLS, describe, op_name
from ddpn_fx.exporting.runtime import leaves, same
from ddpn_fx.exporting.svg import builtin_svg

SVG = "{http://www.w3.org/2000/svg}"


class Net(nn.Module):
    """Statistics that mutate, an infinite constant, tuples, a dict, dtypes and a size that is not known."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.bn = nn.BatchNorm1d(3)
        self.register_buffer("grid", torch.arange(100.0).reshape(10, 10))

    def forward(self, x):
        h = self.bn(self.fc(x))
        h = torch.where(h > 0, h, torch.tensor(float("-inf"))).to(torch.float64)
        a, b = h.split(2, dim=1)
        rows = b.view(b.shape[0] * 1, -1) + self.grid[:3, :3].sum()
        return {"pair": (a.softmax(1), rows), "n": x.shape[0] * 2}


def exported(module=None, batch=5):
    module = module or Net()
    example = torch.randn(batch, 4)
    dynamic = {"x": {0: torch.export.Dim.DYNAMIC}}
    return torch.export.export(module, (example,), dynamic_shapes=dynamic, strict=False)


def step_graph():
    """Forward, backward and an update in place, as the compiler's step is."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    params = {name: p.detach() for name, p in net.named_parameters()}

    def loss(params, x, y):
        return F.cross_entropy(functional_call(net, params, (x,)), y)

    def step(params, x, y):
        grads = grad(loss)(params, x, y)
        for name, p in params.items():
            torch.ops.aten.copy_(p, p - 0.1 * grads[name])
        return {"grads": grads, "nothing": None}

    inputs = (params, torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0]))
    return make_fx(step)(*inputs), inputs


def run_file(path, *arguments):
    return subprocess.run([sys.executable, str(path), *arguments], capture_output=True, text=True, timeout=120)


def load(path):
    """Import a written file; give its module."""
    spec = importlib.util.spec_from_file_location(f"written_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_written_equals_live(gm, flat_inputs, folder, name="graph"):
    """The written function gives the bits of the live graph, outputs and changed inputs."""
    write_graphs({name: gm}, folder, example_inputs={name: flat_inputs})
    module = load(Path(folder) / f"{name}.py")
    copies = [[x.clone() if isinstance(x, torch.Tensor) else x for x in flat_inputs] for _ in range(2)]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(3)
        live = leaves(fx.Interpreter(gm).run(*copies[0], enable_io_processing=False))
        torch.manual_seed(3)
        written = leaves(module.forward(*copies[1]))
    assert len(live) == len(written)
    assert all(map(same, live, written))
    assert all(map(same, copies[0], copies[1]))
    return module


# ---- NAME.py: the same bits ----


def test_exported_program_runs_and_checks(tmp_path):
    ep = exported()
    named = {spec.arg.name: spec.target for spec in ep.graph_signature.input_specs if spec.target}
    tensors = {**ep.state_dict, **ep.constants}
    flat = [tensors[named[n.name]] if n.name in named else torch.randn(7, 4)
            for n in ep.graph.nodes if n.op == "placeholder"]  # fmt: skip
    before = [x.clone() for x in flat]
    assert_written_equals_live(ep.graph_module, [x.detach() for x in flat], tmp_path, "captured")
    assert all(map(same, before, flat)), "the exporter changed the caller's tensors"
    done = run_file(tmp_path / "captured.py", "--check")
    assert done.returncode == 0, done.stderr
    assert "output 2: 14" in done.stdout
    assert "equal bit for bit" in done.stdout


def test_large_constants_are_loaded_and_checks_are_left_out(tmp_path):
    module = Net()
    gm = exported(module).module()
    statistics = module.bn.running_mean.clone()
    write_graphs({"whole": gm}, tmp_path, example_inputs={"whole": [torch.randn(5, 4)]})
    assert torch.equal(statistics, gm.get_buffer("bn.running_mean")), "the exporter changed the module's buffers"
    text = (tmp_path / "whole.py").read_text(encoding="utf-8")
    assert "CONSTANTS['grid']" in text
    assert "is left out" in text
    assert "bn_bias = torch.tensor([0.0, 0.0, 0.0], dtype=torch.float32)" in text
    assert set(torch.load(tmp_path / "whole.pt", weights_only=True)["constants"]) == {"grid"}
    done = run_file(tmp_path / "whole.py", "--check")
    assert done.returncode == 0, done.stderr


def test_step_with_mutation(tmp_path):
    gm, (params, x, y) = step_graph()
    assert_written_equals_live(gm, [*params.values(), x, y], tmp_path, "step")
    nested = write_graphs({"step": gm}, tmp_path, example_inputs={"step": (params, x, y)})
    assert tmp_path / "step.pt" in nested
    done = run_file(tmp_path / "step.py", "--check")
    assert done.returncode == 0, done.stderr
    assert "5 outputs and 4 changed inputs" in done.stdout


def test_check_finds_a_changed_graph(tmp_path):
    gm = make_fx(lambda x: x * 2)(torch.ones(3))
    write_graphs({"double": gm}, tmp_path, example_inputs={"double": [torch.ones(3)]})
    path = tmp_path / "double.py"
    path.write_text(path.read_text(encoding="utf-8").replace("(x_1, 2)", "(x_1, 3)"), encoding="utf-8")
    done = run_file(path, "--check")
    assert done.returncode == 1
    assert "output 0" in done.stderr


def test_random_inputs_when_none_are_given(tmp_path):
    gm, _ = step_graph()
    write_graphs({"step": gm, "captured": exported().graph_module}, tmp_path)
    assert not list(tmp_path.glob("*.pt"))
    done = run_file(tmp_path / "step.py")
    assert done.returncode == 0, done.stderr
    assert "output 0: (8, 4) torch.float32" in done.stdout
    assert run_file(tmp_path / "step.py", "--check").returncode == 1
    inputs = load(tmp_path / "captured.py").random_inputs()
    assert [tuple(x.shape) for x in inputs][-1] == (5, 4)
    assert inputs[7].dtype == torch.int64


def test_random_inputs_keep_strides_numbers_and_say_what_is_missing(tmp_path):
    def f(x, z, c, n):
        return x.t().contiguous() * n + z.sum(), c

    args = (torch.randn(4, 3).t(), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.complex64), 4)
    gm = make_fx(f, tracing_mode="symbolic")(*args)
    bare = fx.symbolic_trace(lambda x: x)
    write_graphs({"f": gm, "bare": bare}, tmp_path)
    inputs = load(tmp_path / "f.py").random_inputs()
    assert inputs[0].stride() == (1, 3)
    assert [x.dtype for x in inputs[1:3]] == [torch.int64, torch.complex64]
    assert inputs[3] == 4
    done = run_file(tmp_path / "bare.py")
    assert "no shape of input x" in done.stderr


def test_random_operators_are_replayed(tmp_path):
    gm = make_fx(lambda x: F.dropout(x) + torch.tensor([1.0, 2.0, 3.0]))(torch.randn(3))
    state = torch.get_rng_state()
    assert_written_equals_live(gm, [torch.randn(3)], tmp_path)
    write_graphs({"graph": gm}, tmp_path, example_inputs={"graph": [torch.ones(3)]})
    state = torch.get_rng_state()
    write_graphs({"graph": gm}, tmp_path, example_inputs={"graph": [torch.ones(3)]})
    assert torch.equal(state, torch.get_rng_state())
    assert run_file(tmp_path / "graph.py", "--check").returncode == 0


def test_symbolic_sizes_as_placeholders(tmp_path):
    def f(n, x):
        return x.new_zeros(n * 2, x.shape[0] - 1).sum(0) + 2**n

    gm = make_fx(f, tracing_mode="symbolic")(3, torch.randn(4))
    assert_written_equals_live(gm, [3, torch.randn(4)], tmp_path)


def test_graphs_within_a_graph(tmp_path):
    def f(w, x):
        return torch.cond(x.sum() > 0, lambda x: (x.sin() * w,), lambda x: (x.cos() + 0.0,), (x,))

    gm = make_fx(f)(torch.randn(3), torch.randn(3))
    for sign in (1.0, -1.0):
        assert_written_equals_live(gm, [torch.randn(3), sign * torch.ones(3)], tmp_path)
    text = (tmp_path / "graph.py").read_text(encoding="utf-8")
    assert "def forward_true_graph_0(" in text


def by_hand(build):
    """A graph written node by node: `build(graph)` returns the output."""
    graph = fx.Graph()
    graph.output(build(graph))
    return fx.GraphModule(nn.Module(), graph)


def test_every_kind_of_argument(tmp_path):
    aten = torch.ops.aten

    def build(graph):
        x = graph.placeholder("x")
        aten_named = graph.create_node("call_function", aten.neg.default, (x,), name="aten")
        full = graph.call_function(aten.full.default, ([2, 3], float("-inf")), {"dtype": torch.bfloat16})
        nan = graph.call_function(aten.full.default, ([2], float("nan")), {"device": torch.device("cpu")})
        clone = graph.call_function(aten.clone.default, (x,), {"memory_format": torch.contiguous_format})
        empty = graph.call_function(aten.zeros.default, ([2],), {"layout": torch.strided, "pin_memory": False})
        part = graph.call_function(operator.getitem, (x, (slice(None, 2), None, Ellipsis)))
        even = graph.call_function(aten.uniform.default, (x, -1.0, 2.0))
        index = graph.call_function(aten.index.Tensor, (x, [None, torch.tensor([0, 2, 1])]))
        size = graph.call_function(aten.sym_size.int, (x, 0))
        power = graph.call_function(operator.pow, (-2, size))
        largest = graph.call_function(torch.sym_max, (power, 5))
        builtin = graph.call_function(max, (size, 2))
        method = graph.call_method("mul", (x, complex(1, float("inf"))))
        ceiling = graph.call_function(math.ceil, (2.5,))
        smooth = graph.call_function(F.gelu, (x,), {"approximate": "tanh"})
        some = {"a": [full, nan, clone, empty], 'q"': (part,)}
        return some, even, index, largest, builtin, method, ceiling, smooth, aten_named

    module = assert_written_equals_live(by_hand(build), [torch.randn(3, 3)], tmp_path)
    text = Path(module.__file__).read_text(encoding="utf-8")
    assert 'float("-inf")' in text
    assert "(-2) ** sym_size_int" in text
    assert "import math" in text
    assert "aten_ = aten.neg.default(x)" in text
    assert run_file(Path(module.__file__), "--check").returncode == 0


def test_a_constant_read_twice_is_one_tensor(tmp_path):
    graph = fx.Graph()
    first, second = graph.get_attr("c"), graph.get_attr("c")
    graph.call_function(torch.ops.aten.add_.Tensor, (first, 1))
    graph.output(graph.call_function(torch.ops.aten.mul.Tensor, (second, 3)))
    root = nn.Module()
    root.register_buffer("c", torch.tensor([1.0, 2.0]))
    gm = fx.GraphModule(root, graph)
    write_graphs({"graph": gm}, tmp_path, example_inputs={"graph": []})
    module = load(tmp_path / "graph.py")
    assert module.forward().tolist() == [6.0, 9.0]
    assert module.forward().tolist() == [6.0, 9.0]
    assert gm.c.tolist() == [1.0, 2.0]


def test_what_has_no_python_form_is_named(tmp_path):
    x = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"node '_0' of graph 'calls' .*calls the module '0' \(Linear\)"):
        write_graphs({"calls": x}, tmp_path)
    lambda_graph = by_hand(lambda graph: graph.call_function(lambda: 1, ()))
    with pytest.raises(ValueError, match="graph 'odd' has <function .*cannot be written as Python"):
        write_graphs({"odd": lambda_graph}, tmp_path)
    assert not list(tmp_path.iterdir())


# ---- literals ----


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(), st.binary()))
def test_scalars_come_back(value):
    again = eval(scalar_source(value))
    assert type(again) is type(value)
    assert repr(again) == repr(value)


@settings(deadline=None)
@given(
    st.lists(st.floats(width=16), max_size=70),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_small_tensors_come_back_bit_for_bit(values, dtype):
    tensor = torch.tensor(values, dtype=dtype)
    text = tensor_source(tensor)
    unusual = any(v != v for v in values)  # the bits of a NaN may have no literal
    assert (text is None) == (len(values) > 64) or unusual
    if text is not None:
        assert same(eval(text), tensor)


def test_tensors_without_a_literal():
    assert tensor_source(torch.zeros(0, 3)) is None
    assert tensor_source(torch.zeros(2, 3).t()) is None
    assert tensor_source(torch.zeros(2, dtype=torch.complex64)) is None
    assert tensor_source(torch.tensor(True)) == "torch.tensor(True, dtype=torch.bool)"
    assert callable_source(lambda: 0) is None
    assert callable_source(operator.mul) == ("operator.mul", "operator")


# ---- comments: where a node comes from ----


def comment_of(text, statement):
    (line,) = [line for line in text.splitlines() if line.strip().startswith(statement)]
    return line.partition("  # ")[2]


def test_comments_have_module_and_source(tmp_path):
    ep = exported()
    write_graphs({"captured": ep.graph_module}, tmp_path)
    text = (tmp_path / "captured.py").read_text(encoding="utf-8")
    comment = comment_of(text, "linear = ")
    assert comment.startswith("float32[")
    assert "fc (Linear)" in comment
    assert "test_export.py:" in comment
    assert "h = self.bn(self.fc(x))" in comment
    assert "self (Net)" in comment_of(text, "softmax = ")
    assert text.startswith('"""captured: the user\'s module as it was captured\n')
    assert "From: test_export.py." in text


def test_short_keys_come_first_and_make_sections(tmp_path):
    gm, _ = step_graph()
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    for position, node in enumerate(calls):
        node.meta |= {"stage": position % 2, "role": "backward", "module_path": "fc (Linear)",
                      "source": "model.py:12  h = self.fc(\n  x)"}  # fmt: skip
    write_graphs({"backward": gm}, tmp_path)
    text = (tmp_path / "backward.py").read_text(encoding="utf-8")
    assert comment_of(text, f"{calls[1].name} = ").endswith(
        "stage 1 | backward | fc (Linear) | model.py:12: h = self.fc( x)"
    )
    assert "# ---- stage 1 | backward ----" in text
    assert "Stages: 0, 1." in text
    assert text.count("subgraph") == 0
    assert (tmp_path / "backward.dot").read_text(encoding="utf-8").count("subgraph") == 2


def test_frames_of_torch_and_of_ddpn_fx_are_skipped():
    node = fx.Graph().placeholder("x")
    ours = Path(dot.__file__).parent
    node.meta["stack_trace"] = (
        'File "/home/u/train.py", line 3, in main\n    loss = net(x)\n'
        'File "/home/u/model.py", line 12, in forward\n    return self.fc(x)\n'
        f'File "{torch.__file__}", line 5, in forward\n    return 1\n'
        f'File "{ours}/dot.py", line 1, in trace\nFile "<eval_with_key>.1", line 4, in forward\n    y = 0'
    )
    assert describe(node).source == "model.py:12: return self.fc(x)"
    node.meta["nn_module_stack"] = {"a": ("L['self'].layers.0@1", nn.Linear)}
    assert describe(node).module_path == "layers.0 (Linear)"
    node.meta["stack_trace"] = f'File "{__file__}", line 1, in forward'
    assert describe(node).source.startswith('test_export.py:1: """The written graphs')


# ---- pictures ----


def plain(text):
    """Without what does not print, and without Graphviz's hard spaces."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def svg_texts(path):
    return plain(" ".join(ElementTree.parse(path).getroot().itertext()))


@pytest.mark.parametrize("graphviz", [True, False])
def test_svg_is_well_formed_and_mentions_every_op(tmp_path, monkeypatch, graphviz):
    if graphviz and shutil.which("dot") is None:
        pytest.skip("Graphviz's dot is not installed")
    if not graphviz:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    gm = exported().graph_module
    write_graphs({"captured": gm}, tmp_path, chain_rows=[{"index": 0, "ops": [("linear", "linear_few")]}])
    texts = svg_texts(tmp_path / "captured.svg")
    assert all(op_name(node) in texts for node in gm.graph.nodes if node.op in CALLS)
    raw = (tmp_path / "captured.svg").read_text(encoding="utf-8")
    assert "fc (Linear)" in raw, "tooltips"
    assert "linear_few" in svg_texts(tmp_path / "chain.svg")


HOSTILE = Drawing(
    'a "title" \\ <&>',
    {"p": Box(('back\\slash "quote"', "<b>&amp;\x1b\x00", "два"), "#ffffff", "stage \"0\"", "tip\n\\N <x>", True),
     "q": Box(("}; digraph {",), "#cfe2ff")},
    [("p", "q")],
    {"forward": "#cfe2ff"},
)  # fmt: skip


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz's dot is not installed")
@pytest.mark.parametrize("drawing", [HOSTILE, graph_drawing("step", step_graph()[0]), chain_drawing([{}, {}])])
def test_graphviz_takes_the_dot(drawing):
    svg = dot.graphviz_svg(drawing)
    assert svg is not None
    texts = plain("".join(ElementTree.fromstring(svg.encode()).itertext()))
    assert all(plain(line) in texts for box in drawing.boxes.values() for line in box.lines)


def test_hostile_texts_are_escaped():
    root = ElementTree.fromstring(builtin_svg(HOSTILE))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert 'back\\slash "quote"' in texts
    assert "<b>&amp;  " in texts
    source = dot.dot_source(HOSTILE)
    assert '"back\\\\slash \\"quote\\"\\n<b>&amp;amp;  \\nдва"' in source
    assert "\x1b" not in source


@pytest.mark.parametrize("script", ["exit 3", "exec sleep 5"])
def test_a_failing_graphviz_falls_back(tmp_path, monkeypatch, caplog, script):
    program = tmp_path / "dot"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(dot, "_TIMEOUT_S", 0.2)
    assert dot.graphviz_svg(HOSTILE) is None
    assert "using the built-in layout" in caplog.text


def test_boxes_do_not_overlap_and_edges_go_down():
    gm, _ = step_graph()
    drawing = graph_drawing("step", gm)
    root = ElementTree.fromstring(builtin_svg(drawing))
    boxes = [g.find(f"{SVG}rect").attrib for g in root.iter(f"{SVG}g") if g.get("class") == "box"]
    areas = [tuple(float(box[key]) for key in ("x", "y", "width", "height")) for box in boxes]
    assert len(areas) == len(drawing.boxes)
    for i, (x, y, w, h) in enumerate(areas):
        assert x >= 0
        assert y >= 0
        for u, v, _, _ in areas[i + 1 :]:
            assert not (x <= u < x + w and y <= v < y + h)
    tops = dict(zip(drawing.boxes, (y for _, y, _, _ in areas), strict=True))
    assert all(tops[tail] < tops[head] for tail, head in drawing.edges)


def test_large_graph_is_drawn_without_graphviz(monkeypatch):
    boxes = {str(i): Box((f"op{i}",), "#ffffff") for i in range(2000)}
    edges = [(str(i // 2), str(i)) for i in range(1, 2000)] + [(str(i), str(i + 1)) for i in range(0, 1999, 50)]
    drawing = Drawing("large", boxes, edges, {})
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("Graphviz would take minutes"))
    monkeypatch.setattr(shutil, "which", lambda name: "dot")
    assert dot.graphviz_svg(drawing) is None
    root = ElementTree.fromstring(builtin_svg(drawing))
    assert float(root.get("width")) < 4000


def test_chain_shows_states_controls_and_rules(tmp_path):
    rows = [
        {"index": 0, "controls": ["fc1.weight", "fc1.bias"], "ops": [("addmm", "linear")],
         "state_in": ["float32[B, 784]"], "state_out": ["float32[B, 32]"], "cost": 12},
        {"index": 1, "controls": ["fc2.weight"], "ops": [("mm", "generic")], "state_out": "float32[B, 10]"},
    ]  # fmt: skip
    paths = write_graphs({}, tmp_path, chain_table="stage  controls\n0      fc1", chain_rows=rows)
    assert [path.name for path in paths] == ["index.md", "chain.txt", "chain.dot", "chain.svg"]
    assert (tmp_path / "chain.txt").read_text(encoding="utf-8") == "stage  controls\n0      fc1\n"
    texts = svg_texts(tmp_path / "chain.svg")
    for wanted in ("x_0", "x_2", "fc1.weight", "mm [generic]", "float32[B, 784]", "float32[B, 10]"):
        assert wanted in texts
    assert "cost: 12" in (tmp_path / "chain.dot").read_text(encoding="utf-8")


# ---- files ----


def tiny():
    return make_fx(lambda x: x + 1)(torch.ones(2))


def test_index_lists_files_counts_and_meaning(tmp_path):
    write_graphs({"step": tiny(), "stage3": tiny(), "a|b": tiny()}, tmp_path / "new" / "folder")
    index = (tmp_path / "new" / "folder" / "index.md").read_text(encoding="utf-8")
    assert "| [step.py](step.py) [step.dot](step.dot) [step.svg](step.svg) | 3 | 1 | one whole training step" in index
    assert "x_4 = f_3(x_3, u_3)" in index
    assert "(graph 'a\\|b')" in index


def test_names_become_safe_and_stay_apart():
    names = ["stage/0", "stage 0", "STAGE_0", "chain", "copy", "torch", "../etc/passwd", "", "Träger"]
    stems = file_stems(names)
    assert list(stems.values()) == [
        "stage_0", "stage_0_2", "STAGE_0_3", "chain_2", "copy_graph", "torch_graph", "_etc_passwd", "graph", "Tr_ger",
    ]  # fmt: skip


def test_written_again_and_nothing_foreign_is_touched(tmp_path):
    write_graphs({"step": tiny(), "backward": tiny()}, tmp_path)
    write_graphs({"step": tiny()}, tmp_path)
    assert (tmp_path / "backward.py").exists()
    assert "Of earlier exports: [backward.dot]" in (tmp_path / "index.md").read_text(encoding="utf-8")
    write_graphs({"backward": tiny()}, tmp_path)
    (tmp_path / "mine.py").write_text("precious")
    with pytest.raises(FileExistsError, match="has mine.py, which no export wrote"):
        write_graphs({"mine": tiny()}, tmp_path)
    assert (tmp_path / "mine.py").read_text() == "precious"


def test_a_foreign_index_is_not_overwritten(tmp_path):
    (tmp_path / "index.md").write_text("# my notes")
    with pytest.raises(FileExistsError, match=r"index\.md"):
        write_graphs({}, tmp_path)


def test_folder_errors(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "below"):
        with pytest.raises(NotADirectoryError, match="is a file, or lies in one"):
            write_graphs({}, folder)
    with pytest.raises(OSError, match="cannot create folder"):
        write_graphs({}, tmp_path / ("x" * 300))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="no permission to write"):
        write_graphs({}, tmp_path)


def test_argument_errors(tmp_path):
    with pytest.raises(TypeError, match=r"graphs\['g'\] is a Linear"):
        write_graphs({"g": nn.Linear(1, 1)}, tmp_path)
    with pytest.raises(ValueError, match=r"has \['h'\], but the graphs are \['g'\]"):
        write_graphs({"g": tiny()}, tmp_path, example_inputs={"h": []})
    with pytest.raises(ValueError, match="has 0 leaves, but the graph has 1 placeholders: x_1"):
        write_graphs({"g": tiny()}, tmp_path, example_inputs={"g": []})
    with pytest.raises(RuntimeError, match="graph 'g' fails on its example inputs"):
        write_graphs({"g": tiny()}, tmp_path, example_inputs={"g": ["text"]})


def test_a_graph_with_an_operator_of_ours_runs_alone(tmp_path):
    model = nn.Sequential(nn.Conv2d(8, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(16), nn.Flatten(), nn.Linear(64, 10))
    opt = ddpn_fx.DDPNOpt(ddpn_fx.compile(model, loss=F.cross_entropy, backend="eager"), lr=0.01)
    opt.train_step(torch.randn(3, 8, 16, 16), torch.randint(10, (3,)))
    ddpn_fx.export(opt, tmp_path)
    assert "conv2d_weight_columns" in (tmp_path / "step.py").read_text(encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, str(tmp_path / "step.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
