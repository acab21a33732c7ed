"""The zoo: model families that people train, each held to the same checks (see `checks.py`).

Where `transformers` or `timm` is not installed, their families are absent.
"""

import importlib
import importlib.util

from tests.zoo import generative, odd, refusals, sequence, tabular, transformers, vision  # noqa: F401
from tests.zoo.family import FAMILIES, REFUSALS, Family, Refusal

if importlib.util.find_spec("transformers"):
    importlib.import_module("tests.zoo.hf")
if importlib.util.find_spec("timm"):
    importlib.import_module("tests.zoo.timm_models")

__all__ = ["FAMILIES", "REFUSALS", "Family", "Refusal"]
