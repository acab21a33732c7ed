"""A graph as one readable, runnable Python file.

One statement a node, under the node's own name, with its shape, stage, role, module path and source line as a trailing
comment; sections by stage and role. Small constants are literals, the others are loaded from NAME.pt beside the file.
"""

from __future__ import annotations

import builtins
import inspect
import keyword
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ddpn_fx.exporting import runtime
from ddpn_fx.exporting.literals import callable_source, scalar_source, tensor_source
from ddpn_fx.exporting.main_block import main_block
from ddpn_fx.exporting.nodes import CALLS, describe

_COMMENT_COLUMN = 72
_SYMBOLS = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.floordiv: "//",
    operator.mod: "%", operator.pow: "**", operator.and_: "&", operator.or_: "|", operator.xor: "^",
    operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=",
}  # fmt: skip
_RESERVED = {"torch", "aten", "sys", "Path", "CONSTANTS", *dir(builtins), *keyword.kwlist}


@dataclass(frozen=True)
class PythonFile:
    """A written graph.

    Args:
        text: the file's contents.
        constants: the tensors it reads from "constants" in NAME.pt.
    """

    text: str
    constants: dict[str, torch.Tensor]


def python_source(name: str, graph_module: fx.GraphModule, *, about: str = "", recorded: bool = False) -> PythonFile:
    """Write a graph as Python.

    Args:
        name: the graph's name, for the docstring and for error messages.
        graph_module: a flat ATen graph; graphs that it calls become functions of their own.
        about: what the graph is, in one line.
        recorded: whether NAME.pt will hold inputs and outputs to run and check it on.

    Returns:
        The text of the file, and the constants it needs in NAME.pt.

    Raises:
        ValueError: an argument, a callable or a constant has no Python form; the message names the graph and the node.
    """
    writer = _Writer(name, reserved=_RESERVED | _import_roots(graph_module))
    functions = writer.functions("forward", graph_module)
    has_data = recorded or bool(writer.constants)
    parts = [
        _docstring(name, graph_module, about, has_data),
        _imports(writer.modules, has_data),
        "aten = torch.ops.aten",
    ]
    if writer.constants:
        parts.append('CONSTANTS = torch.load(Path(__file__).with_suffix(".pt"), weights_only=True)["constants"]')
    helpers: list[Callable[..., Any]] = [runtime.leaves, runtime.describe]
    if recorded:
        helpers += [runtime.same, runtime.differences]
    sources = [inspect.getsource(helper).rstrip() for helper in helpers]
    body = "\n\n\n".join([*functions, *sources, main_block(graph_module, recorded=recorded)])
    return PythonFile("\n\n".join(parts) + "\n\n\n" + body + "\n", writer.constants)


def node_lines(name: str, graph: fx.Graph) -> dict[str, str]:
    """The statement of each node, without its comment.

    Args:
        name: the graph's name, for error messages.
        graph: the graph; one without a module of its own is printed as well.

    Returns:
        Node name -> its line. A node without a Python form has fx's own.
    """
    owner = graph.owning_module
    module = owner if isinstance(owner, fx.GraphModule) else fx.GraphModule(torch.nn.Module(), graph)
    function = _Function(_Writer(name, reserved=set(_RESERVED)), "forward", module, {})
    lines: dict[str, str] = {}
    for node in graph.nodes:
        try:
            lines[node.name] = node.name if node.op == "placeholder" else function._statement(node)
        except (ValueError, AttributeError):
            lines[node.name] = node.format_node() or node.name
    return lines


@dataclass
class _Writer:
    """Writes a graph and the graphs it calls as functions; collects what they need from outside."""

    graph_name: str
    reserved: set[str]
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)

    def functions(self, function_name: str, graph_module: fx.GraphModule) -> list[str]:
        """The functions of a graph, those it calls first."""
        self.reserved.add(function_name)
        called: dict[str, str] = {}
        texts = []
        for node in graph_module.graph.nodes:
            if node.op in ("get_attr", "call_module") and node.target not in called:
                inner = _fetch(graph_module, node.target)
                if isinstance(inner, fx.GraphModule):
                    called[node.target] = f"{function_name}_{_identifier(node.target)}"
                    texts += self.functions(called[node.target], inner)
        return [*texts, _Function(self, function_name, graph_module, called).text()]


class _Function:
    """Writes one graph as one function."""

    def __init__(self, writer: _Writer, name: str, graph_module: fx.GraphModule, called: Mapping[str, str]) -> None:
        self.writer = writer
        self.name = name
        self.graph_module = graph_module
        self.called = called
        self.names = self._unique_names(graph_module.graph.nodes)
        self.first_read: dict[str, str] = {}

    def text(self) -> str:
        nodes = list(self.graph_module.graph.nodes)
        arguments = [node for node in nodes if node.op == "placeholder"]
        if arguments:
            lines = [f"def {self.name}("]
            lines += [_commented(f"    {self.names[node]}{self._default(node)},", node) for node in arguments]
            lines.append("):")
        else:
            lines = [f"def {self.name}():"]
        section = ""
        for node in nodes:
            if node.op == "placeholder" or (node.op == "get_attr" and node.target in self.called):
                continue
            info = describe(node)
            if info.section != section and info.section:
                section = info.section
                lines += ["", f"    # ---- {section} ----"] if lines[-1] != "):" else [f"    # ---- {section} ----"]
            lines.append(_commented("    " + self._statement(node), node))
        return "\n".join(lines)

    def _statement(self, node: fx.Node) -> str:
        name = self.names[node]
        if node.op == "output":
            return f"return {self._value(node.args[0], node)}"
        if node.op == "get_attr":
            return f"{name} = {self._attribute(node)}"
        if node.op == "call_module" and node.target not in self.called:
            kind = type(_fetch(self.graph_module, str(node.target))).__name__
            if node.users:
                raise self._error(node, f"calls the module {node.target!r} ({kind}); flatten the graph with make_fx")
            return f"# {name}: the check {node.target} ({kind}) returns nothing and is left out"
        return f"{name} = {self._call(node)}"

    def _call(self, node: fx.Node) -> str:
        args = [self._value(arg, node) for arg in node.args]
        target = node.target
        if node.op == "call_function" and not node.kwargs and len(args) == 2:
            left, right = (f"({arg})" if arg.startswith("-") else arg for arg in args)
            if target is operator.getitem:
                return f"{left}[{args[1]}]"
            if target in _SYMBOLS:
                return f"{left} {_SYMBOLS[target]} {right}"
        args += [f"{key}={self._value(value, node)}" for key, value in node.kwargs.items()]
        if node.op == "call_module":
            return f"{self.called[str(target)]}({', '.join(args)})"
        if node.op == "call_method":
            return f"{args[0]}.{target}({', '.join(args[1:])})"
        return f"{self._callable(target, node)}({', '.join(args)})"

    def _value(self, value: Any, node: fx.Node) -> str:
        if isinstance(value, fx.Node):
            inner = self.called.get(str(value.target)) if value.op == "get_attr" else None
            return inner or self.names[value]
        if isinstance(value, (tuple, list)):
            items = ", ".join(self._value(item, node) for item in value)
            if isinstance(value, list):
                return f"[{items}]"
            return f"({items},)" if len(value) == 1 else f"({items})"
        if isinstance(value, dict):
            items = ", ".join(f"{self._value(k, node)}: {self._value(v, node)}" for k, v in value.items())
            return f"{{{items}}}"
        if isinstance(value, (slice, range)):
            parts = (value.start, value.stop, value.step)
            return f"{type(value).__name__}({', '.join(self._value(part, node) for part in parts)})"
        if isinstance(value, torch.Tensor):
            return self._constant(f"{self.name}.{node.name}", value)
        text = scalar_source(value)
        return self._callable(value, node) if text is None else text

    def _callable(self, target: Any, node: fx.Node) -> str:
        reference = callable_source(target) if callable(target) else None
        if reference is None:
            raise self._error(node, f"has {target!r} ({type(target).__name__}), which cannot be written as Python")
        if reference.module:
            self.writer.modules.add(reference.module)
        return reference.expression

    def _attribute(self, node: fx.Node) -> str:
        target = str(node.target)
        if target in self.first_read:
            return self.first_read[target]
        self.first_read[target] = self.names[node]
        value = _fetch(self.graph_module, target)
        if isinstance(value, torch.Tensor):
            return self._constant(target if self.name == "forward" else f"{self.name}.{target}", value)
        return self._value(value, node)

    def _constant(self, key: str, tensor: torch.Tensor) -> str:
        text = tensor_source(tensor)
        if text is not None:
            return text
        while key in self.writer.constants:
            key += "_"
        self.writer.constants[key] = tensor.detach().clone()
        return f"CONSTANTS[{key!r}]"

    def _default(self, node: fx.Node) -> str:
        return f"={self._value(node.args[0], node)}" if node.args else ""

    def _unique_names(self, nodes: Iterable[fx.Node]) -> dict[fx.Node, str]:
        names: dict[fx.Node, str] = {}
        taken = set(self.writer.reserved)
        for node in nodes:
            name = _identifier(node.name)
            while name in taken:
                name += "_"
            taken.add(name)
            names[node] = name
        return names

    def _error(self, node: fx.Node, problem: str) -> ValueError:
        origin = describe(node).origin
        where = f" ({origin})" if origin else ""
        return ValueError(f"write_graphs: node {node.name!r} of graph {self.writer.graph_name!r}{where} {problem}")


def _commented(code: str, node: fx.Node) -> str:
    info = describe(node)
    comment = " | ".join(filter(None, (info.value, info.origin)))
    return f"{code:<{_COMMENT_COLUMN}}  # {comment}" if comment else code


def _fetch(root: torch.nn.Module, target: Any) -> Any:
    return operator.attrgetter(str(target))(root)


def _identifier(text: str) -> str:
    name = re.sub(r"\W", "_", text)
    return f"_{name}" if name[:1].isdigit() else name


def _import_roots(graph_module: fx.GraphModule) -> set[str]:
    roots = {"operator", "math"}
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                for value in (node.target, *node.args):
                    reference = callable_source(value) if node.op == "call_function" and callable(value) else None
                    if reference is not None:
                        roots.add(reference.module.partition(".")[0])
    return roots


def _imports(modules: Iterable[str], has_data: bool) -> str:
    standard = {"sys", *(module for module in modules if module in ("operator", "math"))}
    others = {"torch", *modules} - standard
    lines = [f"import {module}" for module in sorted(standard)]
    if has_data:
        lines.append("from pathlib import Path")
    return "\n".join([*lines, "", *(f"import {module}" for module in sorted(others))])


def _docstring(name: str, graph_module: fx.GraphModule, about: str, has_data: bool) -> str:
    nodes = list(graph_module.graph.nodes)
    infos = [describe(node) for node in nodes]
    calls = sum(node.op in CALLS for node in nodes)
    inputs = sum(node.op == "placeholder" for node in nodes)
    lines = [f"{name}: {about}" if about else name, "", f"{calls} operations on {inputs} inputs."]
    for title, found in (
        ("Stages", sorted({info.stage for info in infos if info.stage is not None})),
        ("Roles", dict.fromkeys(info.role for info in infos if info.role)),
        ("From", dict.fromkeys(info.source.partition(":")[0] for info in infos if info.source)),
        ("Custom operators (import what registers them first)", _foreign_namespaces(nodes)),
    ):
        if found:
            lines.append(f"{title}: {', '.join(map(str, found))}.")
    beside = " Its data is in the .pt file beside it." if has_data else ""
    lines.append(f"Written by ddpn_fx.export; run it with python, with --check to compare with saved outputs.{beside}")
    text = "\n".join(lines).replace("\\", "\\\\").replace('"""', "'''")
    return f'"""{text}\n"""'


def _foreign_namespaces(nodes: Iterable[fx.Node]) -> list[str]:
    overloads = [node.target for node in nodes if isinstance(node.target, torch._ops.OpOverload)]
    return sorted({target.namespace for target in overloads} - {"aten", "prims", "prim", "ddpn_fx"})
