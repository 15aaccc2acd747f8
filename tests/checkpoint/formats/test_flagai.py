"""FlagAI's format: parts are read, joined and written, and broken ones are refused."""

import pytest
from checkpoint_samples import SAMPLES, TENSORS
from formats import load, save

from opt_megatron.checkpoint.formats.registry import open_checkpoint
from opt_megatron.errors import CheckpointError


def test_biases_that_flagais_converter_cut_wrongly_are_refused(tmp_path):
    SAMPLES["flagai"](tmp_path)
    for part in range(2):
        path = tmp_path / f"pytorch_model_{part:02d}.bin"
        content = load(path)
        name = "model.decoder.layers.0.fc1.bias"
        content["module"][name] = TENSORS[name].clone()  # whole where it should be cut
        save(content, path)
    with pytest.raises(CheckpointError, match=r"1 biases have wrong shapes.*FlagAI's converter"):
        open_checkpoint(tmp_path)
