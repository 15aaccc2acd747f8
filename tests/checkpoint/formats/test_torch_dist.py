"""Megatron-core's distributed checkpoints, written by hand: an index, and torch.save files in one .distcp file."""

import io
import json

import pytest
import torch
from checkpoint_samples import OPT_CONFIG, TENSORS, assert_holds

from opt_megatron.checkpoint.formats.registry import open_checkpoint
from opt_megatron.checkpoint.parameter_mapping import component_view, stage_parameters
from opt_megatron.errors import CheckpointError


def megatron_tensors() -> dict[str, torch.Tensor]:
    """Under megatron-core's names, all layers of a parameter in one tensor."""
    layers, tensors = {}, {}
    for parameter in stage_parameters(OPT_CONFIG, range(OPT_CONFIG.num_layers), first=True, last=True):
        pieces = [TENSORS[name] for name in parameter.canonical]
        fused = torch.zeros(len(pieces) * len(pieces[0]), *pieces[0].shape[1:], dtype=pieces[0].dtype)
        for index, piece in enumerate(pieces):
            view = component_view(fused, index, len(pieces), OPT_CONFIG.head_dim)
            view.copy_(piece.view(view.shape))
        if parameter.megatron.startswith("decoder.layers."):
            layers.setdefault("decoder.layers." + parameter.megatron.split(".", 3)[3], []).append(fused)
        else:
            tensors[parameter.megatron] = fused
    return tensors | {name: torch.stack(pieces) for name, pieces in layers.items()}


def write(directory):
    """A run with one checkpoint, every layer of a tensor in a separate chunk, matrices in two halves."""
    path = directory / "iter_0000007"
    path.mkdir(parents=True)
    index, content = {}, b""
    for name, tensor in megatron_tensors().items():
        chunks = []
        for first in range(len(tensor)) if name.startswith("decoder.layers.") else [None]:
            rows = tensor if first is None else tensor[first : first + 1]
            halves = rows.chunk(2, dim=-1) if rows.dim() > 1 else [rows]
            column = 0
            for half in halves:
                buffer = io.BytesIO()
                torch.save(half.clone(), buffer)
                offsets = [first or 0] + [0] * (tensor.dim() - 1)
                offsets[-1] += column if rows.dim() > 1 else 0
                place = {"file": "__0_0.distcp", "start": len(content), "length": buffer.tell()}
                chunks.append({"offsets": offsets, "sizes": list(half.shape), **place})
                content += buffer.getvalue()
                column += half.shape[-1]
        index[name] = {"shape": list(tensor.shape), "dtype": "float16", "chunks": chunks}
    (path / "__0_0.distcp").write_bytes(content)
    (path / "tensors.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(OPT_CONFIG.to_hf()))
    return path


def test_shards_make_up_the_tensors(tmp_path):
    path = write(tmp_path)
    assert_holds(path, TENSORS)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")  # Megatron's mark, which a run has too
    assert assert_holds(tmp_path, TENSORS).format_description == "training checkpoint iter_0000007"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../x"}, "a file outside the directory"),
        ({"file": "x"}, "x is missing"),
        ({"length": 10**9}, "is damaged or incomplete"),
        ({"start": 3}, "is damaged"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, change, message):
    path = write(tmp_path)
    index = json.loads((path / "tensors.json").read_text())
    index["embedding.word_embeddings.weight"]["chunks"][0] |= change
    (path / "tensors.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path).read("model.decoder.embed_tokens.weight")
