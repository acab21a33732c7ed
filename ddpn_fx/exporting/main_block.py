"""The `if __name__ == "__main__":` part of a written graph: run it on saved or random inputs, and check the outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ddpn_fx.exporting.literals import scalar_source
from ddpn_fx.exporting.nodes import recorded_value


def main_block(graph_module: fx.GraphModule, *, recorded: bool) -> str:
    """Write the part that runs when the file is called as a script.

    Args:
        graph_module: the graph whose placeholders are the inputs.
        recorded: True: take inputs and expected outputs from NAME.pt; False: random tensors of the recorded shapes.

    Returns:
        Its text; for random inputs with a function `random_inputs` before it.
    """
    default = torch.get_default_dtype()
    settings = [f"    torch.set_num_threads({torch.get_num_threads()})"]
    if default != torch.float32:
        settings.append(f"    torch.set_default_dtype({default})")
    if recorded:
        return "\n".join([_HEAD, *settings, _RECORDED])
    return "\n".join([_random_inputs(graph_module), "", "", _HEAD, *settings, _RANDOM])


_HEAD = 'if __name__ == "__main__":'

_SHOW = """\
    for position, output in enumerate(outputs):
        print(f"output {position}: {describe(output)}")"""

_RECORDED = f"""\
    data = torch.load(Path(__file__).with_suffix(".pt"), weights_only=True)
    inputs = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in data["inputs"]]
    with torch.no_grad():
        torch.manual_seed(0)
        outputs = leaves(forward(*inputs))
{_SHOW}
    if "--check" in sys.argv[1:]:
        inputs_after = [data["mutated"].get(position, leaf) for position, leaf in enumerate(data["inputs"])]
        wrong = differences(outputs, data["outputs"], "output") + differences(inputs, inputs_after, "input")
        if wrong:
            sys.exit("\\n".join(["not bit-equal to the graph:", *wrong]))
        print(f"check: {{len(outputs)}} outputs and {{len(data['mutated'])}} changed inputs are equal bit for bit")"""

_RANDOM = f"""\
    if "--check" in sys.argv[1:]:
        sys.exit("nothing to check: this graph was written without example inputs")
    with torch.no_grad():
        torch.manual_seed(0)
        outputs = leaves(forward(*random_inputs()))
{_SHOW}"""


def _random_inputs(graph_module: fx.GraphModule) -> str:
    lines = ["def random_inputs():", '    """Inputs of the recorded shapes and dtypes; integers are zero."""']
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    values = []
    for node in placeholders:
        text = _random_value(recorded_value(node))
        if text is None:
            problem = f"no shape of input {node.name} was recorded: write the graph with example inputs to run it"
            return "\n".join([*lines, f"    raise SystemExit({problem!r})"])
        values.append(f"        {text},")
    return "\n".join([*lines, "    return [", *values, "    ]"] if values else [*lines, "    return []"])


def _random_value(value: Any) -> str | None:
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        known = _hint(value)
        return None if known is None else scalar_source(known)
    shape = tuple(_hint(size) for size in value.shape)
    if None in shape:
        return None
    device = getattr(value, "device", None)
    place = "" if device is None or device.type == "cpu" else f', device="{device}"'
    if not (value.dtype.is_floating_point or value.dtype.is_complex):
        return f"torch.zeros({shape}, dtype={value.dtype}{place})"
    if value.dtype.itemsize == 1:
        return f"torch.randn({shape}{place}).to({value.dtype})"
    stride = tuple(_hint(step) for step in (value.stride() if callable(value.stride) else value.stride))
    if None in stride or 0 in shape or stride == torch.empty(shape, device="meta").stride():
        return f"torch.randn({shape}, dtype={value.dtype}{place})"
    return f"torch.empty_strided({shape}, {stride}, dtype={value.dtype}{place}).normal_()"


def _hint(size: Any) -> Any:
    """The number behind a symbolic one (None where it has none); anything else is itself."""
    return size.node.hint if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) else size
