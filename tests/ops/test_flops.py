"""torch's counter of floating-point operations counts our layers as it counts the official ones."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hashengine import nn as he_nn
from tests.helpers.layouts import feature_map
from tests.helpers.official import OfficialSimAM, OfficialTriplet
from tests.helpers.paths import ROOT

PAIRS = {
    "triplet": (he_nn.TripletAttention, OfficialTriplet),
    "triplet, two branches, kernel of 3": (
        lambda: he_nn.TripletAttention(no_spatial=True, kernel_size=3),
        lambda: OfficialTriplet(no_spatial=True, kernel_size=3),
    ),
    "simam": (he_nn.SimAM, OfficialSimAM),
}


def counts(layer: nn.Module, device: str) -> list[int]:
    """The operations of a forward with gradients, of its backward, and of a forward without gradients."""
    x = feature_map("contiguous").to(device).requires_grad_()
    layer = layer.to(device)
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    with torch.no_grad(), FlopCounterMode(display=False) as inference:
        layer(x.detach())
    return [counter.get_total_flops() for counter in (forward, backward, inference)]


@pytest.mark.parametrize("device", ["cpu", "meta"])  # on meta, no native kernel runs
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_layers_are_counted_as_the_official_ones(pair, training, device):
    ours, official = (counts(build().train(training), device) for build in pair)
    assert ours == official
    assert all(ours) or pair is PAIRS["simam"]


def test_a_part_that_runs_separately_is_counted_once():
    layer = he_nn.TripletAttention()
    layer.cw.conv.conv = nn.utils.parametrizations.weight_norm(layer.cw.conv.conv)
    assert counts(layer, "cpu") == counts(OfficialTriplet(), "cpu")


@pytest.mark.parametrize("first", ["hashengine.ops", "torch.utils.flop_counter"])
def test_the_counter_counts_whichever_module_is_imported_first(first):
    """The counter imports triton, where it is installed. `hashengine.ops` must not import it."""
    code = f"""
import sys
import {first}
assert {first.startswith("torch")} == ("torch.utils.flop_counter" in sys.modules)
import torch, hashengine.nn, torch.utils.flop_counter
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    hashengine.nn.TripletAttention()(torch.randn(2, 3, 4, 5))
assert counter.get_total_flops() > 0
assert not any("hashengine" in type(finder).__module__ for finder in sys.meta_path)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
