"""Bundle: the C++ kernels of a program are compiled together, not each by itself.

Inductor gives the C++ compiler one file for each kernel, and a trivial one takes nearly as long as any: the compiler
reads inductor's header and links with libtorch, and the kernel is a fifth of its time (docs/notes.md). A plain training
step has some dozen kernels, a closed-loop step in a metric over a hundred. Here inductor's files of one program become
as many as there are compilers at work at once, each a module whose one function hands out all of its kernels.

Only what looks as it is known to look is bundled: includes and one function. Everything else, and all that is compiled
outside of :func:`bundled`, goes inductor's own way, and so do the kernels of a bundle that a compiler refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ddpn_fx.passes.log import log

Get = Callable[[], Any]

_INCLUDE = re.compile(r"\s*#include [^\n]*\n")
_FUNCTION = re.compile(r'\s*extern "C"[\w\s]*\bkernel\(')
_DEFINED = re.compile(r"^\S", re.MULTILINE)  # what begins at the margin

_LEAST = 20_000  # characters of a part beside another: the header takes a compiler as long as some 50,000
_MOST = 500_000  # the compiler's memory grows with the file

_BINDING = """
static PyObject* kernel_{index}_py(PyObject* self, PyObject* args) {{
    try {{
        if (!PyTuple_CheckExact(args) || PyTuple_GET_SIZE(args) != {count})
            throw std::runtime_error("requires {count} args");
        kernel_{index}({arguments});
        Py_RETURN_NONE;
    }} catch (std::exception const& e) {{
        PyErr_SetString(PyExc_RuntimeError, e.what());
        return nullptr;
    }} catch (...) {{
        PyErr_SetString(PyExc_RuntimeError, "unhandled error");
        return nullptr;
    }}
}}
"""
_HAND_OUT = """
static PyMethodDef kernels[] = {{ {methods} }};
static PyObject* hand_out() {{
    PyObject* found = PyTuple_New({count});
    for (Py_ssize_t i = 0; found != nullptr && i < {count}; i++) {{
        PyObject* function = PyCFunction_New(&kernels[i], nullptr);
        if (function == nullptr) {{
            Py_DECREF(found);
            return nullptr;
        }}
        PyTuple_SET_ITEM(found, i, function);
    }}
    return found;
}}
"""

_active: ContextVar[bool] = ContextVar("bundled", default=False)


@contextmanager
def bundled() -> Iterator[None]:
    """Bundle the kernels of each program that inductor compiles, or loads from its caches, in here."""
    _hook()
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


@cache
def _hook() -> None:
    """Have inductor ask here, which is imported with the first program: it takes a second."""
    from torch._inductor import async_compile
    from torch._inductor.exc import CppCompileError

    inductors: Any = async_compile.AsyncCompile
    own_kernel, own_wait = inductors.cpp_pybinding, inductors.wait

    def kernel(self: Any, argtypes: list[str], source_code: str) -> Any:
        """What a program calls for each of its kernels as it is loaded."""
        if not _active.get() or not _plain(source_code):
            return own_kernel(self, argtypes, source_code)
        async_compile.kernel_code_log.info("CPP+Bindings Kernel:\n%s", source_code)
        bundle = self.__dict__.setdefault("_ddpn_fx_bundle", Bundle(self.submit))
        return bundle.add(tuple(argtypes), source_code)

    def wait(self: Any, scope: dict[str, Any]) -> None:
        """What it calls then: its kernels, all of them known, take the place of what stands for them."""
        bundle: Bundle | None = self.__dict__.get("_ddpn_fx_bundle")
        if bundle is not None:
            try:
                functions = bundle.functions()
            except CppCompileError as error:
                log.info("kernels are compiled one by one: %s", error)
                functions = [own_kernel(self, list(argtypes), source) for argtypes, source in bundle.kernels]
            scope |= {name: functions[value.index] for name, value in scope.items() if isinstance(value, _Known)}
        own_wait(self, scope)

    inductors.cpp_pybinding, inductors.wait = kernel, wait


def _plain(source: str) -> bool:
    """Whether a file is includes and one function called ``kernel``."""
    body = _body(source)
    return _FUNCTION.match(body) is not None and len(_DEFINED.findall(body)) <= 3  # its head, its braces


def _body(source: str) -> str:
    at = 0
    while (include := _INCLUDE.match(source, at)) is not None:
        at = include.end()
    return source[at:]


@dataclass(frozen=True)
class _Known:
    """Stands for a kernel of a bundle."""

    index: int


@dataclass
class Bundle:
    """The kernels of one program.

    Attributes:
        submit: hands a compilation to one of inductor's processes.
        kernels: argument types and source -> which kernel it is.
    """

    submit: Any
    kernels: dict[tuple[tuple[str, ...], str], int] = field(default_factory=dict)

    def add(self, argtypes: tuple[str, ...], source: str) -> _Known:
        """One more kernel, or one that is there already."""
        return _Known(self.kernels.setdefault((argtypes, source), len(self.kernels)))

    def functions(self) -> list[Any]:
        """Compile them: the function of each."""
        from torch._inductor.async_compile import get_compile_threads

        kernels, threads = list(self.kernels), max(1, get_compile_threads())
        parts = _shared_out([len(source) for _, source in kernels], threads)
        submit = self.submit if threads > 1 else None
        libraries = [_library([kernels[i] for i in part], submit) for part in parts]
        made: dict[int, Any] = {}
        for part, library in zip(parts, libraries, strict=True):
            made.update(zip(part, library()(), strict=True))
        return [made[i] for i in range(len(kernels))]


def _shared_out(lengths: Sequence[int], threads: int) -> list[list[int]]:
    """Indices of kernels in parts that take about equally long: the longest first, each to the shortest part."""
    total = sum(lengths)
    count = max(min(threads, 1 + total // _LEAST), -(-total // _MOST))
    parts: list[list[int]] = [[] for _ in range(count)]
    taken = [0] * count
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        shortest = taken.index(min(taken))
        parts[shortest].append(i)
        taken[shortest] += lengths[i]
    return [sorted(part) for part in parts if part]


def _library(kernels: Sequence[tuple[tuple[str, ...], str]], submit: Any) -> Get:
    """Compile kernels as one module; what is returned waits for it, and gives the function that hands them out."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    includes = dict.fromkeys(line for _, source in kernels for line in _INCLUDE.findall(source[: -len(_body(source))]))
    code = ["".join(includes)]
    bindings, methods = [], []
    for index, (argtypes, source) in enumerate(kernels):
        code.append(f"#define kernel kernel_{index}\n{_body(source)}\n#undef kernel\n")
        arguments = ", ".join(f"parse_arg<{t.replace('const ', '')}>(args, {n})" for n, t in enumerate(argtypes))
        bindings.append(_BINDING.format(index=index, count=len(argtypes), arguments=arguments))
        methods.append(f'{{"kernel_{index}", kernel_{index}_py, METH_VARARGS, ""}}')
    bindings.append(_HAND_OUT.format(methods=", ".join(methods), count=len(kernels)))
    escaped = "".join(bindings).replace("{", "{{").replace("}", "}}")  # inductor formats it

    class Library(CppPythonBindingsCodeCache):
        extra_parse_arg = escaped
        call_entry_function = "return hand_out();"

    get: Get = Library.load_pybinding_async([], "".join(code), submit_fn=submit)
    return get
