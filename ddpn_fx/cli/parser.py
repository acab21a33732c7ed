"""The arguments of every command, and the forms in which they are written."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from ddpn_fx.cli import commands, texts
from ddpn_fx.cli.model import LOSSES

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64")
DEMO_FOLDER = "demo-output"


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    layout: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser("ddpn_fx", description=texts.DESCRIPTION, epilog=texts.EPILOG, **layout)
    parser.add_argument("--version", action=_Version, help="print the versions of ddpn_fx, PyTorch and Python")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")

    def command(name: str, run: Callable[[argparse.Namespace], None], summary: str) -> argparse.ArgumentParser:
        description, epilog = texts.OF[name]
        sub = subparsers.add_parser(
            name, help=summary, description=description, epilog=epilog, parents=[common], **layout
        )
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", commands.demo, "train on real digits beside SGD and Adam")
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

    chain = command("chain", commands.chain, "print the stages of a model")
    export = command("export", commands.export, "write the generated graphs of a model")
    explain = command("explain", commands.explain, "say what was done to a model, and why")
    diff = command("diff", commands.diff, "compare two exports")
    diff.add_argument("first", metavar="A", type=Path, help="a folder that export wrote")
    diff.add_argument("second", metavar="B", type=Path, help="another")
    diff.add_argument("--context", metavar="N", type=int, default=3, help="lines around a change (default: 3)")
    command("passes", commands.passes, "list the compiler's passes, and which can be switched off")
    picture = command("picture", commands.picture, "draw a recorded training")
    picture.add_argument("record", metavar="CSV", type=Path, help="the file that ddpn_fx.Recorder wrote")
    picture.add_argument("picture", metavar="PICTURE", type=Path, help="what to write: .png, .svg or .pdf")
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
        sub.add_argument(
            "--disable-pass",
            metavar="NAME",
            action="append",
            default=[],
            dest="disabled",
            help='switch an optional pass off, one an option; "ddpn_fx passes" lists them',
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
