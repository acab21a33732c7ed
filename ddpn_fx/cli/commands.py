"""What each command does: functions of the parsed options."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpn_fx.cli.errors import USAGE, CommandError, cannot, one_line
from ddpn_fx.cli.model import example_target, load, loss_of

if TYPE_CHECKING:
    from torch import nn


def demo(options: argparse.Namespace) -> None:
    """Train on real digits beside SGD and Adam."""
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
        raise CommandError(one_line(error) + hint) from error


def chain(options: argparse.Namespace) -> None:
    """Print the stages of a model."""
    off = _passes(options)
    model, inputs, _ = load(options)
    import ddpn_fx

    try:
        loss = loss_of(options.loss)
        net = ddpn_fx.compile(model, loss=loss, example_inputs=inputs, backend="eager", passes=off)
        print(net.chain)
    except Exception as error:
        raise CommandError(cannot("compile", options.factory, error)) from error


def export(options: argparse.Namespace) -> None:
    """Write the generated graphs of a model."""
    import ddpn_fx
    from ddpn_fx.exporting.formats import chosen_formats

    name = ":".join(options.factory)
    try:
        formats = chosen_formats(options.formats, "--format")
    except ValueError as error:
        raise CommandError(str(error), USAGE) from error
    off = _passes(options)
    model, inputs, target = load(options)
    net, step = _training(model, inputs, target, options, off)
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
        raise CommandError(cannot("train", options.factory, failure or error)) from (failure or error)
    for missing, why in written.skipped.items():
        print(f"Not written: {missing}: {why}", file=sys.stderr)
    if failure is not None:
        reached = f"; what was reached is in {options.folder}"
        raise CommandError(cannot("train", options.factory, failure) + reached) from failure
    print(f"Wrote the graphs of {name} into {options.folder}")


def explain(options: argparse.Namespace) -> None:
    """Say what was done to a model, and why."""
    import ddpn_fx

    off = _passes(options)
    model, inputs, target = load(options)
    net, step = _training(model, inputs, target, options, off)
    try:
        opt = step()
    except Exception as error:
        print(ddpn_fx.explain(net))
        raise CommandError(cannot("train", options.factory, error)) from error
    print(ddpn_fx.explain(opt))


def diff(options: argparse.Namespace) -> None:
    """Compare two exports."""
    from ddpn_fx.exporting.compare import compare, switched_off

    try:
        found = compare(options.first, options.second, max(0, options.context))
    except OSError as error:
        raise CommandError(str(error).removeprefix("ddpn_fx diff: "), USAGE) from error
    for name, folder in (("A", options.first), ("B", options.second)):
        off = switched_off(folder)
        if off:
            print(f"{name} was exported with passes switched off: {', '.join(off)}")
    print("\n".join(map(str, found)))


def passes(options: argparse.Namespace) -> None:
    """List the compiler's passes."""
    from ddpn_fx.passes.catalogue import table

    print(table())


def picture(options: argparse.Namespace) -> None:
    """Draw a recorded training."""
    from ddpn_fx.picture import draw
    from ddpn_fx.records import read

    try:
        draw(read(options.record), options.picture)
    except ModuleNotFoundError as error:
        raise CommandError(str(error)) from error
    except (OSError, ValueError) as error:
        raise CommandError(str(error).removeprefix("ddpn_fx picture: "), USAGE) from error
    print(f"Drew {options.record} into {options.picture}")


def _passes(options: argparse.Namespace) -> dict[str, bool]:
    """The ``passes=`` of ``--disable-pass``, known to be right."""
    from ddpn_fx.passes.catalogue import switched_off

    chosen = dict.fromkeys(options.disabled, False)
    try:
        switched_off("--disable-pass", chosen)
    except ValueError as error:
        message = str(error).partition("}: ")[2]
        raise CommandError(f"--disable-pass: {message}", USAGE) from error
    return chosen


def _training(
    model: nn.Module, inputs: Any, target: Any, options: argparse.Namespace, off: Mapping[str, bool]
) -> tuple[Any, Callable[[], Any]]:
    """The compiled model, and a function that takes one step and returns the optimizer."""
    import ddpn_fx

    loss = loss_of(options.loss)
    if loss is None and options.target is not None:
        raise CommandError("--target goes with a loss, but --loss none says that the model returns it", USAGE)
    if loss is not None and (target is None or options.target is not None):
        target = example_target(model, inputs, options)
    # The graphs are what is wanted, not their speed, and they are the same under every backend.
    net = ddpn_fx.compile(model, loss=loss, backend="eager", passes=off)

    def step() -> Any:
        # A loss inside the model has no known bound; its gradient alone is a factor for any loss.
        opt = ddpn_fx.DDPNOpt(net) if loss else ddpn_fx.DDPNOpt(net, terminal="gradient")
        opt.train_step(*((inputs,) if loss is None else (inputs, target)))
        return opt

    return net, step


def _can_compile() -> bool:
    """Tell whether a C++ compiler and Python's headers are there, which inductor needs on a CPU."""
    compilers = (os.environ.get("CXX", ""), "g++", "clang++", "cl")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return headers.is_file() and any(shutil.which(compiler) for compiler in compilers if compiler)
