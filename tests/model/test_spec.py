"""The layer specs: which LayerNorm a device gets."""

import pytest
import torch
from megatron.core.fusions import fused_layer_norm

from opt_megatron.model.spec import OPTLayerNorm, norm_implementation


@pytest.mark.parametrize(("general", "persistent"), [(False, False), (False, True), (True, False), (True, True)])
def test_apexs_norm_is_taken_only_where_its_general_kernel_exists(monkeypatch, general, persistent):
    monkeypatch.setattr(fused_layer_norm, "HAVE_FUSED_LAYER_NORM", general)
    monkeypatch.setattr(fused_layer_norm, "HAVE_PERSIST_LAYER_NORM", persistent)
    expected = fused_layer_norm.FusedLayerNorm if general else OPTLayerNorm  # there is no TransformerEngine here
    assert norm_implementation(torch.device("cuda")) is expected
    assert norm_implementation(torch.device("cpu")) is OPTLayerNorm
