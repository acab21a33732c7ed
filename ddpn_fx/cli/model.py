"""The user's model: made by MODULE:FACTORY, with example inputs and a target that fits the loss."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ddpn_fx.cli.errors import USAGE, CommandError, cannot, one_line

if TYPE_CHECKING:
    import torch
    from torch import nn

LOSSES = {"cross_entropy": "cross_entropy", "mse": "mse_loss", "bce": "binary_cross_entropy_with_logits"}


def load(options: argparse.Namespace) -> tuple[nn.Module, Any, Any]:
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
            message = f"{factory_name}() in {module_name} failed: {one_line(error)}"
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
        raise CommandError(f"importing {name} failed: {one_line(error)}", USAGE) from error
    except Exception as error:
        raise CommandError(f"importing {name} failed: {one_line(error)}", USAGE) from error


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


def loss_of(name: str) -> Any:
    """The loss of ``--loss``; None: the model returns it."""
    import torch.nn.functional as F

    return None if name == "none" else getattr(F, LOSSES[name])


def example_target(model: nn.Module, inputs: Any, options: argparse.Namespace) -> torch.Tensor:
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
        raise CommandError(cannot("run", options.factory, error), USAGE) from error
    finally:
        model.train(training)
    if not isinstance(output, torch.Tensor):
        raise CommandError(
            f"the model returns {type(output).__name__}, not a tensor; let the factory wrap it so that it returns the "
            "output for the loss, or use --loss none with a model that returns its loss",
            USAGE,
        )
    return output
