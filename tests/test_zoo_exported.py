"""Exported graphs of zoo families: each file runs alone and gives the live bits, each node knows where it is from."""

import subprocess
import sys

import pytest
import torch

from tests.zoo import FAMILIES
from tests.zoo.exported import QUICK, TEN, run_alone, shares, stepped, total

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch warns of while a family is built


def cases(quick):
    for name in TEN:
        yield pytest.param(name, id=name, marks=[] if name in quick else [pytest.mark.slow])


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", list(cases(QUICK)))
def test_exported_python_runs_alone_bit_for_bit(name, tmp_path):
    net = stepped(name)
    count, failures = run_alone(net, tmp_path)
    assert not failures, failures[0]
    assert count == len(net.graphs) >= 7
    found = shares(net)
    assert total(found) >= 0.98
    assert all(each.share >= 0.98 for each in found), [str(each) for each in found if each.share < 0.98]


def test_one_file_is_run_as_a_user_would(tmp_path):
    run_alone(stepped(QUICK[0]), tmp_path)
    done = subprocess.run(
        [sys.executable, tmp_path / "step.py", "--check"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "are equal bit for bit" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in TEN])
def test_every_node_of_every_family_knows_where_it_comes_from(name):
    found = shares(stepped(name))
    assert sum(each.nodes for each in found) > 50
    assert total(found) >= 0.98, [str(each) for each in found if each.share < 0.98]


def test_a_share_counts_what_is_missing():
    from ddpn_fx.origins import share

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for role, module, source in (("forward", "fc (Linear)", "a.py:1: f"), ("gram", "fc.weight", ""), ("solve", "", "")):
        x = graph.call_function(torch.ops.aten.neg.default, (x,))
        x.meta |= {"role": role, "module_path": module, "source": source}
    graph.output(x)
    found = share("step", torch.fx.GraphModule({}, graph))
    assert (found.nodes, found.known, found.others) == (2, 1, 1)
    assert found.missing == ("neg_default_1",)
    assert str(found) == "step: 1 of 2 (50.0%), 1 of the recursion; without: neg_default_1"
