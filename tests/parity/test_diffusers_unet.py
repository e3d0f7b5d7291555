"""Layout "diffusers" has the names, configuration and figures of converted consistency models."""

from __future__ import annotations

import json

import pytest
import torch
from cmkit_std.backbones.adm_layouts import from_openai, to_openai

from cmkit import Cond, DataSpec
from tests.parity import harness
from tests.parity.test_openai_unet import options_of

FIGURES = harness.Figures("diffusers.json")
OPENAI = harness.Figures("openai_unet.json")
CASE = "converted_unet_A"
