"""The page of an export: one file that asks for nothing, and works in a real browser where there is one."""

import json
import re
import time
from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx.exporting import write_graphs
from ddpn_fx.exporting.html import origin
from tests import browser


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.fc(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.blocks = nn.ModuleList([Block(6), Block(6)])
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(path of the page, the compiled module)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("page")
    net = ddpn_fx.compile(Net(), loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net)
    opt.train_step(torch.randn(6, 4), torch.randint(3, (6,)))
    written = ddpn_fx.export(opt, folder, "html")
    assert written.skipped == {}
    return folder / "index.html", net


def data_of(path):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(text)


def test_the_page_is_one_file(page):
    text = page[0].read_text()
    found = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.extend(v for k, v in attributes if k in ("src", "href") and v)

    Links().feed(text)
    assert found == ["data:,"]
    assert not re.search(r"@import|url\(|https?://", re.sub(r'<script type="application/json".*?</script>', "", text))
    assert "prefers-color-scheme: dark" in text


def test_its_data_are_the_graphs(page):
    path, net = page
    data = data_of(path)
    text = data["strings"]
    assert [g["name"] for g in data["graphs"]] == list(net.graphs)
    for graph, module in zip(data["graphs"], net.graphs.values(), strict=True):
        nodes = list(module.graph.nodes)
        assert [text[i] for i in graph["node"]] == [n.name for n in nodes]
        assert [[text[graph["node"][i]] for i in row] for row in graph["inputs"]] == [
            [a.name for a in n.all_input_nodes] for n in nodes
        ]
    assert [row["controls"] for row in data["chain"]] == [row["controls"] for row in net.chain.rows()]
    assert all("operations of the step" in row["cost"] for row in data["chain"])
    assert [p["name"] for p in data["passes"]] == ["capture", "normalize", "stage", "trace", "fuse"]


def test_a_backward_node_shares_its_forward_s_origin(page):
    data = data_of(page[0])
    text = data["strings"]
    graphs = {g["name"]: g for g in data["graphs"]}
    captured, step = graphs["captured"], graphs["step"]
    at = next(i for i, m in enumerate(captured["module"]) if text[m] == "blocks.0.fc (Linear)")
    roles = {text[step["role"][i]] for i, o in enumerate(step["origin"]) if o == captured["origin"][at]}
    assert {"forward", "backward", "gram", "update"} <= roles
    assert origin("a.b (Linear)", "s") == origin("a.b.weight", "s") == ("a.b", "s")


def test_a_text_of_the_model_ends_no_script(tmp_path):
    rows = [{"index": 0, "controls": ["</script><script>alert(1)</script>"], "cut": "<!-- __DATA__"}]
    write_graphs({}, tmp_path, chain_rows=rows, formats="html", title="<b>&")
    text = (tmp_path / "index.html").read_text()
    assert text.count("</script>") == 2
    assert "<title>&lt;b&gt;&amp;: ddpn_fx</title>" in text
    assert data_of(tmp_path / "index.html")["chain"][0]["controls"] == rows[0]["controls"]


# ---- in a browser ----


@pytest.fixture(scope="module")
def tab():
    """A headless browser; the tests that need one are skipped where there is none, or none that starts."""
    if browser.find() is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    try:
        found = browser.Browser()
    except (OSError, RuntimeError, TimeoutError) as error:
        pytest.skip(f"{browser.find()} does not start here: {error}")
    yield found
    found.close()


def wait_for(tab, condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not tab.run(f"!!({condition})"):
        assert time.monotonic() < deadline, f"never true: {condition}"
        time.sleep(0.02)


def details(tab):
    return tab.run("document.getElementById('details').innerText")


def test_search_finds_a_node_and_shows_where_it_comes_from(tab, page):
    tab.open(page[0])
    tab.run("document.body.focus()")
    tab.key("/", "/")
    assert tab.run("document.activeElement.id") == "search"
    tab.type("blocks.1.fc")
    wait_for(tab, "document.getElementById('found').textContent.includes('graphs')")
    tab.key("Enter")
    shown = details(tab)
    assert "blocks.1.fc (Linear)" in shown
    assert "test_page.py" in shown or "linear.py" in shown
    assert "backward" in tab.run("document.getElementById('counterparts').innerText")
    left = tab.run("document.querySelector('.row.pick').dataset.node")
    tab.key("Enter")  # to the first counterpart in the other graph
    right = tab.run("document.querySelector('.pane:last-of-type .row.pick').dataset.node")
    assert right != left
    assert "graph\nstep" in details(tab)
    tab.key("Escape")
    assert tab.run("document.getElementById('search').value") == ""
    assert tab.errors == []
    assert all(url.startswith(("file:", "data:")) for url in tab.requests)


def test_keyboard_chain_passes_and_theme(tab, page):
    tab.open(page[0])
    tab.run("document.querySelector('.pane .list').focus()")
    tab.key("ArrowDown")
    tab.key("ArrowDown")
    assert tab.run("document.querySelector('.row.pick').style.top") == "20px"
    tab.run("document.getElementById('fold').click()")
    stages = tab.run("document.getElementById('stages').innerText")
    assert all(word in stages for word in ("blocks.0.fc.weight", "(B, 6)", "a sample", "linear", "x_T"))
    tab.run("document.getElementById('tab-passes').click()")
    assert "after normalize" in tab.run("document.getElementById('pass').textContent")
    tab.run("document.body.focus()")
    for _ in range(3):
        tab.key("ArrowRight")
    assert "5 of 5: after fuse" in tab.run("document.getElementById('pass').textContent")
    assert tab.run("document.querySelectorAll('#diff .plus, #diff .minus').length") > 0
    before = tab.run("getComputedStyle(document.body).backgroundColor")
    tab.run("document.getElementById('theme').click()")
    assert tab.run("getComputedStyle(document.body).backgroundColor") != before
    assert tab.errors == []


def test_an_address_opens_at_its_node(tab, page):
    module = page[1].graphs["step"]
    name = next(n.name for n in module.graph.nodes if n.meta.get("role") == "backward")
    tab.open(page[0], f"#step/{name}")
    wait_for(tab, "document.querySelector('.row.pick')")
    assert details(tab).startswith(name)


def test_only_what_is_in_view_is_drawn(tab, tmp_path):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for _ in range(20_000):
        x = graph.call_function(torch.ops.aten.neg.default, (x,))
    graph.output(x)
    write_graphs({"long": torch.fx.GraphModule(nn.Module(), graph)}, tmp_path, formats="html")
    tab.open(tmp_path / "index.html", "#long/neg_default_19000")
    wait_for(tab, "document.querySelector('.row.pick')")
    assert tab.run("document.querySelectorAll('.row').length") < 200
    assert tab.errors == []
