"""The command line: ``ddpn_fx demo``, ``chain``, ``explain``, ``export`` and ``diff`` (also ``python -m ddpn_fx``).

Exit status: 0 done; 1 the model or the installation does not allow it; 2 bad usage; 130 interrupted.
PyTorch is imported by the commands, not by this module, so that ``--help`` and ``--version`` answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch
    from torch import nn

USAGE, FAILURE, INTERRUPTED = 2, 1, 130
LOSSES = {"cross_entropy": "cross_entropy", "mse": "mse_loss", "bce": "binary_cross_entropy_with_logits"}
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64")
DEMO_FOLDER = "demo-output"

DESCRIPTION = """\
Turn a PyTorch module into an optimal-control problem and train it with
Differential Dynamic Programming.
"""
EPILOG = """\
examples:
  ddpn_fx demo                                        train on real digits and compare with SGD and Adam
  ddpn_fx chain my_models.py:make_net --input 8,784   show the stages of a model of yours
  ddpn_fx export my_models.py:make_net graphs --input 8,784
                                                      write the generated graphs as readable Python
  ddpn_fx explain my_models.py:make_net --input 8,784 what each pass did, where it was cut and why
  ddpn_fx diff graphs-before graphs-after             what differs between two exports

"ddpn_fx COMMAND --help" explains a command.
"""
DEMO_DESCRIPTION = """\
Train a small ReLU network on the 1,797 handwritten digits of scikit-learn, with
DDPNOpt, SGD and Adam over a grid of step sizes. Prints a table and writes
accuracy.png, results.json and the generated graphs. Takes a minute or two and no
network. Needs the extra packages of: pip install "ddpn-fx[demo]"
"""
DEMO_EPILOG = """\
examples:
  ddpn_fx demo                          the whole comparison, into ./demo-output
  ddpn_fx demo --quick                  a trial in seconds: one seed, few steps, nothing compiled
  ddpn_fx demo --out results --seeds 10   more trainings, into ./results
"""
FACTORY_HELP = """\
MODULE is a dotted name (my_package.models) or a path to a .py file. FACTORY is a
name in it: a function without arguments, an nn.Module class or an nn.Module. A
function may return the model alone, (model, example_inputs) or (model,
example_inputs, target); otherwise --input gives the shape, batch first, and the
values are drawn at random.
"""
CHAIN_DESCRIPTION = f"""\
Cut a model into the stages of a control problem and print them as a table: for each
stage its parameters (the control) and the activations that enter it (the state).

{FACTORY_HELP}"""
CHAIN_EPILOG = """\
examples:
  ddpn_fx chain my_models.py:make_net --input 8,784
  ddpn_fx chain torchvision.models:vgg11 --input 4,3,224,224
  ddpn_fx chain my_models.py:make_transformer --input 8,64 --dtype int64
  ddpn_fx chain my_models.py:net_and_inputs
"""
EXPORT_DESCRIPTION = f"""\
Take one training step of a model and write every graph that was generated for it into
DIR: readable, runnable Python, the table of the stages, and drawings.

{FACTORY_HELP}"""
EXPORT_EPILOG = """\
examples:
  ddpn_fx export my_models.py:make_net graphs --input 8,784
  ddpn_fx export my_models.py:make_net graphs --input 8,784 --target labels:10
  ddpn_fx export my_models.py:make_autoencoder graphs --input 8,784 --target 8,784 --loss mse
  ddpn_fx export my_models.py:make_net graphs --input 8,784 --format html passes model-explorer
"""
EXPLAIN_DESCRIPTION = f"""\
Take one training step of a model and say how it was captured, what each pass did and how
long it took, where the stages are cut and why, by which rules, what was compiled for
what, and what the fast path does not cover.

{FACTORY_HELP}"""
EXPLAIN_EPILOG = """\
examples:
  ddpn_fx explain my_models.py:make_net --input 8,784
  ddpn_fx explain my_models.py:make_autoencoder --input 8,784 --target 8,784 --loss mse
"""
DIFF_DESCRIPTION = """\
Compare two folders that "ddpn_fx export" wrote Python into: for each graph the operators
that came and went, and a unified difference of its lines.
"""
DIFF_EPILOG = """\
examples:
  ddpn_fx diff graphs-before graphs-after
  ddpn_fx diff graphs-before graphs-after --context 0
"""


class CommandError(Exception):
    """What went wrong, in a line for the user, with the exit status to leave with."""

    def __init__(self, message: str, status: int = FAILURE) -> None:
        """Store the message and the exit status."""
        super().__init__(message)
        self.status = status


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; bad usage raises SystemExit(2), as argparse does."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        options.run(options)
    except CommandError as error:
        if options.traceback:
            raise
        print(f"ddpn_fx {options.command}: error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"ddpn_fx {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    layout: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser("ddpn_fx", description=DESCRIPTION, epilog=EPILOG, **layout)
    parser.add_argument("--version", action=_Version, help="print the versions of ddpn_fx, PyTorch and Python")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")

    def command(name: str, run: Any, summary: str, description: str, epilog: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=description, epilog=epilog, parents=[common], **layout
        )
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", _demo, "train on real digits beside SGD and Adam", DEMO_DESCRIPTION, DEMO_EPILOG)
    demo.add_argument(
        "--out", metavar="DIR", type=Path, default=Path(DEMO_FOLDER), help=f"where to write (default: {DEMO_FOLDER})"
    )
    demo.add_argument("--seeds", metavar="N", type=_positive, help="trainings for each step size (default: 5)")
    demo.add_argument("--steps", metavar="N", type=_positive, help="steps of each training (default: 300)")
    demo.add_argument(
        "--backend",
        metavar="NAME",
        help="backend of torch.compile (default: inductor, or eager where there is no C++ compiler)",
    )
    demo.add_argument("--quick", action="store_true", help="one seed, 60 steps, backend eager, unless given")

    chain = command("chain", _chain, "print the stages of a model", CHAIN_DESCRIPTION, CHAIN_EPILOG)
    export = command("export", _export, "write the generated graphs of a model", EXPORT_DESCRIPTION, EXPORT_EPILOG)
    explain = command("explain", _explain, "say what was done to a model, and why", EXPLAIN_DESCRIPTION, EXPLAIN_EPILOG)
    diff = command("diff", _diff, "compare two exports", DIFF_DESCRIPTION, DIFF_EPILOG)
    diff.add_argument("first", metavar="A", type=Path, help="a folder that export wrote")
    diff.add_argument("second", metavar="B", type=Path, help="another")
    diff.add_argument("--context", metavar="N", type=int, default=3, help="lines around a change (default: 3)")
    for sub in (chain, export, explain):
        sub.add_argument("factory", metavar="MODULE:FACTORY", type=_factory_name, help="where the model is made")
    export.add_argument("folder", metavar="DIR", type=Path, help="where to write")
    for sub in (chain, export, explain):
        sub.add_argument(
            "--input",
            metavar="SHAPE",
            type=_shape,
            nargs="+",
            action="extend",
            dest="inputs",
            help="shape of each example input, batch first: --input 8,784",
        )
        sub.add_argument(
            "--dtype",
            choices=DTYPES,
            help="of the inputs that --input describes, and of the model where it is floating-point "
            "(default: float32); int64 draws the indices 0 and 1",
        )
        sub.add_argument(
            "--loss",
            choices=(*LOSSES, "none"),
            default="cross_entropy",
            help="loss(output, target); none: the model itself returns the loss (default: cross_entropy)",
        )
    for sub in (export, explain):
        sub.add_argument(
            "--target",
            metavar="SHAPE|labels:N",
            type=_target,
            help="example target: its shape, or one label below N for each sample or position "
            "(default: what fits the loss and the model's output)",
        )
    export.add_argument(
        "--format",
        metavar="NAME",
        nargs="+",
        action="extend",
        dest="formats",
        help="what to write: python, dot, svg, mermaid, html, passes, json, graphml, model-explorer, pt2, torchscript, "
        "onnx, or all (default: the first five)",
    )
    return parser


class _Version(argparse.Action):
    """Print the versions and leave."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        versions = []
        for package in ("ddpn-fx", "torch"):
            try:
                versions.append(metadata.version(package))
            except metadata.PackageNotFoundError:
                versions.append("(not installed)")
        print(f"ddpn_fx {versions[0]}, torch {versions[1]}, Python {platform.python_version()}")
        parser.exit()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(_positive(size) for size in text.split(","))
    except argparse.ArgumentTypeError:
        message = f"{text!r} is not a shape: write positive sizes with commas and no blanks, as in 8,784"
        message += "; --input comes after MODULE:FACTORY" if ":" in text else ""
        raise argparse.ArgumentTypeError(message) from None


def _target(text: str) -> tuple[int, ...] | int:
    """Return a shape as a tuple, ``labels:N`` as the number N."""
    kind, colon, classes = text.partition(":")
    if colon and kind == "labels" and classes.isdecimal() and int(classes) > 0:
        return int(classes)
    try:
        return _shape(text)
    except argparse.ArgumentTypeError:
        message = f"{text!r} is neither a shape, as in 8,784, nor labels:N, as in labels:10"
        raise argparse.ArgumentTypeError(message) from None


def _factory_name(text: str) -> tuple[str, str]:
    module, colon, factory = text.rpartition(":")
    if not (colon and module and all(part.isidentifier() for part in factory.split("."))):
        message = f"{text!r} is not MODULE:FACTORY: write for example my_models.py:make_net or my_package.models:Net"
        raise argparse.ArgumentTypeError(message)
    return module, factory


def _demo(options: argparse.Namespace) -> None:
    quick: dict[str, Any] = {"seeds": 1, "steps": 60, "backend": "eager"} if options.quick else {}
    chosen = {name: value for name in ("seeds", "steps", "backend") if (value := getattr(options, name)) is not None}
    settings = quick | chosen
    if "backend" not in settings and not _can_compile():
        print("No C++ compiler with Python's headers found: the demo runs uncompiled (backend eager), and slower.")
        settings["backend"] = "eager"
    try:
        from ddpn_fx import demo

        demo.run(options.out, **settings)
    except OSError as error:
        raise CommandError(f"{error.filename or options.out}: {error.strerror or error}", USAGE) from error
    except ModuleNotFoundError as error:
        raise CommandError(str(error)) from error
    except Exception as error:
        hint = "" if settings.get("backend") == "eager" else " `--backend eager` runs without a compiler."
        raise CommandError(_one_line(error) + hint) from error


def _chain(options: argparse.Namespace) -> None:
    model, inputs, _ = _load(options)
    import ddpn_fx

    try:
        net = ddpn_fx.compile(model, loss=_loss(options.loss), example_inputs=inputs, backend="eager")
        print(net.chain)
    except Exception as error:
        raise CommandError(_cannot("compile", options.factory, error)) from error


def _export(options: argparse.Namespace) -> None:
    import ddpn_fx
    from ddpn_fx.exporting.formats import chosen_formats

    name = ":".join(options.factory)
    try:
        formats = chosen_formats(options.formats, "--format")
    except ValueError as error:
        raise CommandError(str(error), USAGE) from error
    model, inputs, target = _load(options)
    net, step = _training(model, inputs, target, options)
    failure: Exception | None = None
    try:
        step()
    except Exception as error:
        failure = error
    try:
        written = ddpn_fx.export(net, options.folder, formats)
    except OSError as error:
        raise CommandError(f"{error.filename or options.folder}: {error.strerror or error}", USAGE) from error
    except RuntimeError as error:
        raise CommandError(_cannot("train", options.factory, failure or error)) from (failure or error)
    for missing, why in written.skipped.items():
        print(f"Not written: {missing}: {why}", file=sys.stderr)
    if failure is not None:
        reached = f"; what was reached is in {options.folder}"
        raise CommandError(_cannot("train", options.factory, failure) + reached) from failure
    print(f"Wrote the graphs of {name} into {options.folder}")


def _explain(options: argparse.Namespace) -> None:
    import ddpn_fx

    model, inputs, target = _load(options)
    net, step = _training(model, inputs, target, options)
    try:
        opt = step()
    except Exception as error:
        print(ddpn_fx.explain(net))
        raise CommandError(_cannot("train", options.factory, error)) from error
    print(ddpn_fx.explain(opt))


def _diff(options: argparse.Namespace) -> None:
    from ddpn_fx.exporting.compare import compare

    try:
        found = compare(options.first, options.second, max(0, options.context))
    except OSError as error:
        raise CommandError(str(error).removeprefix("ddpn_fx diff: "), USAGE) from error
    print("\n".join(map(str, found)))


def _training(model: nn.Module, inputs: Any, target: Any, options: argparse.Namespace) -> tuple[Any, Callable[[], Any]]:
    """The compiled model, and a function that takes one step and returns the optimizer."""
    import ddpn_fx

    loss = _loss(options.loss)
    if loss is None and options.target is not None:
        raise CommandError("--target goes with a loss, but --loss none says that the model returns it", USAGE)
    if loss is not None and (target is None or options.target is not None):
        target = _example_target(model, inputs, options)
    # The graphs are what is wanted, not their speed, and they are the same under every backend.
    net = ddpn_fx.compile(model, loss=loss, backend="eager")

    def step() -> Any:
        # A loss inside the model has no known bound; its gradient alone is a factor for any loss.
        opt = ddpn_fx.DDPNOpt(net) if loss else ddpn_fx.DDPNOpt(net, terminal="gradient")
        opt.train_step(*((inputs,) if loss is None else (inputs, target)))
        return opt

    return net, step


def _load(options: argparse.Namespace) -> tuple[nn.Module, Any, Any]:
    """Make the model, its example inputs and its target (None: not given) from the command's options."""
    module_name, factory_name = options.factory
    if options.dtype and not options.inputs:
        raise CommandError("--dtype is that of the inputs which --input describes; give --input too", USAGE)
    module = _import(module_name)
    made = _attribute(module, module_name, factory_name)

    import torch
    from torch import nn

    if callable(made) and not isinstance(made, nn.Module):
        try:
            made = made()
        except Exception as error:
            message = f"{factory_name}() in {module_name} failed: {_one_line(error)}"
            if isinstance(error, TypeError) and "argument" in str(error):
                message += "; FACTORY is called without arguments, so name a function that makes the model"
            raise CommandError(message, USAGE) from error
    parts = made if isinstance(made, tuple) else (made,)
    if not (1 <= len(parts) <= 3 and isinstance(parts[0], nn.Module)):
        raise CommandError(
            f"{factory_name} in {module_name} gives {type(made).__name__}; it must give an nn.Module, "
            "(model, example_inputs) or (model, example_inputs, target)",
            USAGE,
        )
    model, inputs, target = (*parts, None, None)[:3]
    if options.inputs:
        dtype = getattr(torch, options.dtype or "float32")
        model = model.to(dtype) if options.dtype and dtype.is_floating_point else model
        tensors = tuple(_random_input(shape, dtype) for shape in options.inputs)
        inputs = tensors[0] if len(tensors) == 1 else tensors
    if inputs is None:
        raise CommandError(
            f"{factory_name} in {module_name} gives a model without example inputs; describe them, batch first, "
            "for example: --input 8,784",
            USAGE,
        )
    return model, inputs, target


def _import(name: str) -> ModuleType:
    """Import a module by dotted name (also from the working directory) or by path."""
    path = Path(name)
    is_path = path.suffix == ".py" or os.sep in name
    if is_path and not path.is_file():
        raise CommandError(f"there is no file {name}", USAGE)
    folder = str(path.resolve().parent) if is_path else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        if not is_path:
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise CommandError(f"{name} is not a Python file: its name must end in .py", USAGE)
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
        return module
    except CommandError:
        raise
    except ModuleNotFoundError as error:
        if not is_path and error.name is not None and f"{name}.".startswith(f"{error.name}."):
            message = f"no module {error.name!r} from here; name one that Python can import, or a path to a .py file"
            raise CommandError(message, USAGE) from error
        raise CommandError(f"importing {name} failed: {_one_line(error)}", USAGE) from error
    except Exception as error:
        raise CommandError(f"importing {name} failed: {_one_line(error)}", USAGE) from error


def _attribute(module: ModuleType, module_name: str, name: str) -> Any:
    """Look up a possibly dotted name in a module."""
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = [known for known in vars(module) if not known.startswith("_")]
            close = difflib.get_close_matches(part, public, n=3)
            own = [known for known in public if getattr(vars(module)[known], "__module__", None) == module.__name__]
            offer = f"did you mean {' or '.join(close)}?" if close else f"it defines {', '.join(own) or 'none'}"
            raise CommandError(f"there is no {name!r} in {module_name}: {offer}", USAGE)
        found = getattr(found, part)
    return found


def _random_input(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    import torch

    return torch.randn(shape, dtype=dtype) if dtype.is_floating_point else torch.randint(0, 2, shape, dtype=dtype)


def _loss(name: str) -> Any:
    import torch.nn.functional as F

    return None if name == "none" else getattr(F, LOSSES[name])


def _example_target(model: nn.Module, inputs: Any, options: argparse.Namespace) -> torch.Tensor:
    """A random target that fits the loss: as `--target` says, or like the model's output."""
    import torch

    wanted: tuple[int, ...] | int | None = options.target
    if isinstance(wanted, int) and options.loss != "cross_entropy":
        raise CommandError(f"--target labels:{wanted} is for cross_entropy; --loss {options.loss} needs a SHAPE", USAGE)
    output = _output(model, inputs, options)
    if options.loss == "cross_entropy" and not isinstance(wanted, tuple):
        if output.ndim < 2:
            raise CommandError(
                f"cross entropy needs logits of (batch, classes), but the output has shape {tuple(output.shape)}; "
                "choose another --loss",
                USAGE,
            )
        return torch.randint(0, wanted or output.shape[1], output.shape[:1] + output.shape[2:])
    shape = wanted if isinstance(wanted, tuple) else output.shape
    noise = torch.randn(shape, dtype=output.dtype)
    if options.loss == "cross_entropy":
        return noise.softmax(dim=1)
    return (noise > 0).to(output.dtype) if options.loss == "bce" else noise


def _output(model: nn.Module, inputs: Any, options: argparse.Namespace) -> torch.Tensor:
    """The model's output on the example inputs, without changing its buffers."""
    import torch

    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            if isinstance(inputs, dict):
                output = model(**inputs)
            else:
                output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    except Exception as error:
        raise CommandError(_cannot("run", options.factory, error), USAGE) from error
    finally:
        model.train(training)
    if not isinstance(output, torch.Tensor):
        raise CommandError(
            f"the model returns {type(output).__name__}, not a tensor; let the factory wrap it so that it returns the "
            "output for the loss, or use --loss none with a model that returns its loss",
            USAGE,
        )
    return output


def _can_compile() -> bool:
    """Tell whether a C++ compiler and Python's headers are there, which inductor needs on a CPU."""
    compilers = (os.environ.get("CXX", ""), "g++", "clang++", "cl")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return headers.is_file() and any(shutil.which(compiler) for compiler in compilers if compiler)


def _cannot(verb: str, factory: tuple[str, str], error: Exception) -> str:
    return f"cannot {verb} {':'.join(factory)}: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    """Return an error's message without its traceback."""
    text = str(error).strip() or "no message"
    return f"{text} ({type(error).__name__}; --traceback shows where)"
