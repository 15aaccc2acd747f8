"""The parameter mapping, on tensors small enough to check by eye."""

import torch

from opt_megatron.checkpoint.checkpoint import Checkpoint
from opt_megatron.checkpoint.load import read_parameter
from opt_megatron.checkpoint.parameter_mapping import (
    Split,
    canonical_shapes,
    component_view,
    rank_block,
    stage_parameters,
)
from opt_megatron.checkpoint.storage.lazy_tensor import wrap_tensor
from opt_megatron.config import RELEASED_SIZES, OPTConfig


def test_heads_are_interleaved_q_k_v():
    # 2 heads of 2 rows: q = 1 2 | 3 4, k = 11 12 | 13 14, v = 21 22 | 23 24
    q, k, v = (torch.tensor([1, 2, 3, 4]) + start for start in (0, 10, 20))
    fused = torch.zeros(12, dtype=torch.int64)
    for part, tensor in enumerate((q, k, v)):
        view = component_view(fused, part, 3, 2)
        view.copy_(tensor.view(view.shape))
    assert fused.tolist() == [1, 2, 11, 12, 21, 22, 3, 4, 13, 14, 23, 24]


def test_each_split_cuts_its_dimension():
    assert rank_block((4, 6), Split.COLUMN, 1, 2) == (slice(2, 4), slice(0, 6))
    assert rank_block((4, 6), Split.ROW, 2, 3) == (slice(0, 4), slice(4, 6))
    assert rank_block((4, 6), Split.REPLICATED, 2, 3) == (slice(0, 4), slice(0, 6))


def test_rank_one_of_two_holds_the_second_head():
    config = OPTConfig(1, 4, 2, 4, 4, vocab_size=4, max_position_embeddings=2)
    tensors = {name: torch.zeros(shape) for name, shape in canonical_shapes(config).items()}
    layer = "model.decoder.layers.0.self_attn."
    for start, name in ((0, "q_proj"), (10, "k_proj"), (20, "v_proj")):
        tensors[f"{layer}{name}.bias"] = torch.arange(1.0, 5.0) + start
    sources = {name: wrap_tensor(tensor) for name, tensor in tensors.items()}
    checkpoint = Checkpoint("", "in memory", config, sources)
    qkv = next(p for p in stage_parameters(config, range(1), first=True, last=True) if "qkv.bias" in p.megatron)
    target = torch.zeros(6)
    read_parameter(target, checkpoint, qkv, 1, 2)
    assert target.tolist() == [3, 4, 13, 14, 23, 24]
    assert checkpoint.bytes_read == 6 * 4


def test_canonical_tensors_add_up_to_the_parameter_count():
    for size in RELEASED_SIZES.values():
        shapes = canonical_shapes(size.config)
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == size.num_parameters
        # The keys of Hugging Face's files: the tied head is stored once more there.
    assert len(canonical_shapes(RELEASED_SIZES["opt-125m"].config)) == 197 - 1
    assert len(canonical_shapes(RELEASED_SIZES["opt-350m"].config)) == 389 - 1
