"""Small checkpoints in every format, and what tests ask of any checkpoint: what it holds, whether two hold the same."""

import torch
from formats import (
    POST_NORM,
    hf_config,
    load,
    random_tensors,
    save,
    write_flagai,
    write_hf,
    write_megatron_lm,
    write_metaseq_flat,
    write_metaseq_parts,
    write_metaseq_singleton,
    write_torch_dist,
)

from opt_megatron.checkpoint.conversion_options import ConversionOptions
from opt_megatron.checkpoint.formats.registry import open_checkpoint
from opt_megatron.config import OPTConfig

PRE, POST = hf_config(), hf_config(**POST_NORM)
OPT_CONFIG = OPTConfig.from_hf(PRE)
TENSORS, POST_TENSORS = random_tensors(PRE), random_tensors(POST, seed=1)
SAMPLES = {
    "hf": lambda d: write_hf(d, PRE, TENSORS),
    "flagai": lambda d: write_flagai(d, PRE, TENSORS, 2),
    "flagai-4": lambda d: write_flagai(d, PRE, TENSORS, 4),
    "flagai-single": lambda d: write_flagai(d, PRE, TENSORS, 1),
    "fsdp": lambda d: write_metaseq_flat(d, PRE, TENSORS, 2, 3),
    "fsdp-many": lambda d: write_metaseq_flat(d, PRE, TENSORS, 4, 11),
    "flat": lambda d: write_metaseq_flat(d, PRE, TENSORS, 2, 1),
    "parts": lambda d: write_metaseq_parts(d, PRE, TENSORS, 2),
    "opt-iml-30b": lambda d: write_metaseq_parts(d, PRE, TENSORS, 2, "checkpoint_1_4000.pt-model_part-{}.pt"),
    "opt-iml-175b": lambda d: write_metaseq_parts(d, PRE, TENSORS, 4, "checkpoint_1_8000-model_part-{}.pt"),
    "66b": lambda d: write_metaseq_parts(d, PRE, TENSORS, 2, "reshard-part-{}-shard0.pt"),
    "singleton": lambda d: write_metaseq_singleton(d, PRE, TENSORS, fused=True, name="restored.pt"),
    "singleton-split": lambda d: write_metaseq_singleton(d, PRE, TENSORS, fused=False, name="reshard.pt"),
    "megatron-lm": lambda d: write_megatron_lm(d, PRE, TENSORS, 1, 1),
    "megatron-lm-2x2": lambda d: write_megatron_lm(d, PRE, TENSORS, 2, 2, te=True),
    "torch-dist": lambda d: write_torch_dist(d, PRE, TENSORS, stacked=True),
    "torch-dist-by-layer": lambda d: write_torch_dist(d, PRE, TENSORS, stacked=False),
}


def assert_holds(path, tensors, config=None):
    checkpoint = open_checkpoint(path, config)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor), name
        rows = slice(tensor.size(0) // 3, tensor.size(0) - 1)
        block = (rows, *[slice(1, size - 2) for size in tensor.shape[1:]])
        assert torch.equal(checkpoint.read(name, block), tensor[block]), name
    return checkpoint


def rewrite(path, **changes):
    """Read one of the test's own files, change entries of its model, and save it again."""
    content = load(path)
    for name, value in changes.items():
        content["model"] = content["model"] | {name.replace("__", "."): value}
    save(content, path)


def megatron(tp: int, pp: int = 1, **options) -> ConversionOptions:
    return ConversionOptions(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **options)


def contents(path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name).clone() for name in checkpoint.tensors}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor, right[name]), name
