"""Each pass on its own: what it changes, what it keeps, what it refuses, and that the tests of the rules have teeth.

The models are tiny and captured once a process (`chain_of`); a test that breaks a chain works on a copy (`broken`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import inspect
import logging
import operator
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import ddpn_fx
from ddpn_fx.passes import build_chain, verify
from ddpn_fx.passes.capture import capture, placeholder_values
from ddpn_fx.passes.errors import CaptureError, StagingError
from ddpn_fx.passes.fuse import fuse, share
from ddpn_fx.passes.ir import Kind, Layout
from ddpn_fx.passes.linearize import linear_names if False else None
