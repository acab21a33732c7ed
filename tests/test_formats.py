"""Each format of an export is read back by who it is for; what cannot be written is named; the passes are shown."""

import io
import json

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ddpn_fx
from ddpn_fx.exporting import write_graphs
from ddpn_fx.exporting.formats import ALL, DEFAULT, FORMATS, chosen_formats
from ddpn_fx.exporting.mermaid import chain_mermaid
from ddpn_fx.exporting.snapshots import changes


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.first(x)).relu())


def trained(**options):
    torch.manual_seed(0)
    net = ddpn_fx.compile(Net(), loss=F.cross_entropy, backend="eager", **options)
    opt = ddpn_fx.DDPNOpt(net)
    opt.train_step(torch.randn(6, 4), torch.randint(3, (6,)))
    return net, opt


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """An export in all formats, and the model it is of."""
    folder = tmp_path_factory.mktemp("graphs")
    net, opt = trained()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    random = torch.get_rng_state()
    written = ddpn_fx.export(opt, folder, ALL)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items()), "the export changed the model"
    assert net.training
    return net, folder, written


def test_json_and_graphml_are_the_graph(everything):
    net, folder, _ = everything
    for name, module in net.graphs.items():
        nodes = {n.name: {a.name for a in n.all_input_nodes} for n in module.graph.nodes}
        linked = nx.node_link_graph(json.loads((folder / f"{name}.json").read_text()), edges="edges")
        for graph in (linked, nx.read_graphml(folder / f"{name}.graphml")):
            assert {n: set(graph.predecessors(n)) for n in graph} == nodes
    (linear,) = [d for _, d in graph_of(folder, "captured").nodes(data=True) if d["module_path"] == "first (Linear)"]
    assert linear["op"] == "aten.linear.default"
    assert "self.first(x)" in linear["source"]
    assert linear["code"].startswith("linear = aten.linear.default(")
    assert {d.get("stage") for _, d in graph_of(folder, "step").nodes(data=True)} >= {None, 0, 1, 2}


def graph_of(folder, name):
    return nx.node_link_graph(json.loads((folder / f"{name}.json").read_text()), edges="edges")


def test_model_explorer_has_every_graph(everything):
    net, folder, _ = everything
    collection = json.loads((folder / "model_explorer.json").read_text())
    assert collection["label"] == "Net"
    assert [g["id"] for g in collection["graphs"]] == list(net.graphs)
    for graph in collection["graphs"]:
        ids = {n["id"] for n in graph["nodes"]}
        assert len(ids) == len(graph["nodes"])
        assert all(e["sourceNodeId"] in ids for n in graph["nodes"] for e in n["incomingEdges"])
    spaces = {n["namespace"] for g in collection["graphs"] for n in g["nodes"]}
    assert "stage 0/forward/first" in spaces


@pytest.mark.filterwarnings("ignore:`torch.jit.load:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch.export.load of torch 2.11
def test_the_model_itself_runs_elsewhere(everything):
    net, folder, _ = everything
    x = torch.randn(9, 4)
    program = torch.export.load(folder / "model.pt2").module()
    script = torch.jit.load(folder / "model.ts.pt")
    with torch.no_grad():
        want = net(x)
        assert torch.allclose(program(x), want)
        assert torch.allclose(script(x), want)


def test_what_cannot_be_written_has_a_reason(everything, monkeypatch, tmp_path):
    net, folder, written = everything
    if "onnx" in written.skipped:
        assert "onnxscript" in written.skipped["onnx"]
        assert "onnx: ModuleNotFoundError" in (folder / "index.md").read_text()
        assert "not written: onnx: " in str(written)
        assert not (folder / "model.onnx").exists()
    monkeypatch.setattr(torch.export, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("no room\nat all")))
    again = ddpn_fx.export(net, tmp_path, "pt2")
    assert again.skipped == {"pt2": "RuntimeError: no room"}
    assert [p.name for p in again] == ["index.md", "chain.txt"]


def test_the_passes_follow_from_one_another(everything):
    _, folder, _ = everything
    names = sorted(p.name for p in (folder / "passes").iterdir())
    assert names == ["00_capture.txt", "01_normalize.diff", "01_normalize.txt", "02_stage.diff", "02_stage.txt",
                     "03_trace.txt", "04_fuse.diff", "04_fuse.txt"]  # fmt: skip
    diff = (folder / "passes" / "01_normalize.diff").read_text()
    assert "-1 aten._native_batch_norm_legit_functional.default" in diff.splitlines()[0]
    assert "\n- _native_batch_norm_legit_functional = " in diff
    assert "\n+ rsqrt" in diff
    assert "# stage 1" in (folder / "passes" / "02_stage.txt").read_text().replace("| stage", "# stage")
    step = (folder / "step.py").read_text()
    last = [line for line in (folder / "passes" / "04_fuse.txt").read_text().splitlines() if " = aten.mm" in line]
    assert last
    assert all(line.partition("  #")[0] in step for line in last)


def test_a_model_that_cannot_be_run_again_says_so(tmp_path, monkeypatch):
    net, opt = trained()
    monkeypatch.setattr(net._original, "forward", lambda x: x @ torch.ones(7, 7))
    written = ddpn_fx.export(opt, tmp_path, ["passes", "python"])
    assert "running the passes again failed after none" in written.skipped["passes"]
    assert (tmp_path / "step.py").exists()


def test_default_formats(tmp_path):
    net, _ = trained()
    names = {p.name for p in ddpn_fx.export(net, tmp_path)}
    assert {"chain.mmd", "chain.svg", "step.py", "step.dot", "step.pt"} <= names
    assert not {"step.json", "model.pt2", "model_explorer.json"} & names


@pytest.mark.parametrize("graphviz", [True, False])
def test_the_index_says_who_laid_the_pictures_out(graphviz, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: "/bin/false" if graphviz else None)
    write_graphs({}, tmp_path, chain_rows=[{"index": 0}], formats="svg")
    assert ("Graphviz is not installed here" in (tmp_path / "index.md").read_text()) is not graphviz


def test_mermaid_escapes_and_shows_ties():
    rows = [
        {"index": 0, "controls": ['a"b'], "tied": ["w"], "ops": [("mm", "linear")], "state_in": ["data"],
         "state_out": ["(B, 3)"]},
        {"index": 1, "state_out": "(B, 2)"},
    ]  # fmt: skip
    text = chain_mermaid(rows)
    assert text.startswith("flowchart TD\n")
    assert "u: a#34;b<br>u: w (tied)<br>mm: linear" in text
    assert 'x1(["x_1<br>(B, 3)"])' in text
    assert "x1 --> f1 --> x2" in text


def test_format_names_are_checked():
    assert chosen_formats(None) == DEFAULT
    assert chosen_formats(ALL) == tuple(FORMATS)
    assert chosen_formats(["svg", "python", "svg"]) == ("python", "svg")
    with pytest.raises(ValueError, match=r"no format 'hmtl' \(did you mean 'html'\?\); choose from python, dot, svg"):
        chosen_formats("hmtl")
    with pytest.raises(TypeError, match="formats holds a int"):
        chosen_formats([3])  # type: ignore[list-item]


unique = st.lists(st.integers(0, 12), unique=True, max_size=9).map(lambda found: [str(n) for n in found])


@given(unique, unique)
def test_differences_are_the_shortest(before, after):
    found = changes(before, after)
    assert [line for sign, line in found if sign != "+"] == before
    assert [line for sign, line in found if sign != "-"] == after
    longest = [[0] * (len(after) + 1) for _ in range(len(before) + 1)]
    for i, a in enumerate(before):
        for j, b in enumerate(after):
            longest[i + 1][j + 1] = longest[i][j] + 1 if a == b else max(longest[i][j + 1], longest[i + 1][j])
    assert sum(sign == " " for sign, _ in found) == longest[-1][-1]


def test_a_buffer_can_be_read_back():
    """`.pt2` and TorchScript are bytes, so that a failed writer leaves no half file."""
    from ddpn_fx.exporting.model_files import model_file

    data = model_file("pt2", nn.Linear(2, 1), (torch.randn(3, 2),), {}, [True])
    assert isinstance(data, bytes)
    assert torch.export.load(io.BytesIO(data)).module()(torch.randn(5, 2)).shape == (5, 1)
    text = model_file("torchscript", nn.Linear(2, 1), (1,), {"x": torch.randn(3, 2)}, [False, True])
    assert "positional or keyword" in text
