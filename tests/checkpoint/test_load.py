"""Loading: each rank reads its share and no more."""

import copy

import pytest
import rank_jobs
import torch
from factory import save
from safetensors.torch import load_file, save_file

from opt_megatron.checkpoint.conversion_options import ConversionOptions
from opt_megatron.checkpoint.convert import convert
from opt_megatron.checkpoint.load import load_model, resolve_dtype
from opt_megatron.config import OPTConfig
from opt_megatron.errors import UserError
from opt_megatron.model.cpu_kernels import library
from opt_megatron.model.linear_methods.cpu_float import CPUFloat16Linear


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("converted", [False, True])
def test_each_rank_reads_only_its_own_slices(models, ranks, tmp_path, tp, pp, converted):
    directory = models["pre-norm"][0]
    if converted:  # to another layout than the one that reads
        convert(
            directory, tmp_path / "c", ConversionOptions(tensor_model_parallel_size=6, pipeline_model_parallel_size=3)
        )
        directory = tmp_path / "c"
    config = OPTConfig.from_directory(directory)
    everything = config.num_parameters * 4
    read = ranks(tp * pp).run(rank_jobs.bytes_read_by_rank, directory, tp, pp)
    # Beyond its share, a rank reads what is replicated: norms, positions, row-parallel biases, and the head's
    # copy of the embedding on the last stage.
    h = config.hidden_size
    replicated = 4 * (config.num_layers * 6 * h + 2 * h + config.num_position_rows * h)
    embedding = 4 * config.vocab_size * config.word_embed_proj_dim / tp
    for number in read:
        assert number <= everything / (tp * pp) + replicated + embedding
    assert sum(read) <= everything + tp * pp * replicated + (tp * embedding if pp > 1 else 0)


def test_weights_are_cast_to_the_asked_dtype_and_frozen(models, alone):
    model = load_model(models["story"][0], None, alone, "bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_auto_dtype_is_float32_on_a_cpu_and_the_checkpoints_on_a_gpu():
    config = OPTConfig(1, 4, 1, 4, 4, dtype="bfloat16")
    assert resolve_dtype("auto", config, torch.device("cpu")) is torch.float32
    assert resolve_dtype("auto", config, torch.device("cuda")) is torch.bfloat16
    with pytest.raises(UserError, match=r"'fp7' is not one of .* \(or auto\)"):
        resolve_dtype("fp7", config, torch.device("cpu"))


@pytest.mark.skipif(library() is None, reason="there are no CPU kernels here")
def test_auto_keeps_16_bits_where_all_matrices_have_them(models, tmp_path, alone):
    """Half the bytes; not with a matrix of float32, whose values would be rounded, nor where a dtype is asked for."""
    weights = {}
    for name, changed in (("whole", None), ("mixed", "model.decoder.layers.1.fc2.weight")):
        directory = save(copy.deepcopy(models["pre-norm"][1]).half(), tmp_path / name)
        tensors = load_file(directory / "model.safetensors")
        if changed is not None:
            tensors[changed] = tensors[changed].float()
            save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        weights[name] = load_model(directory, None, alone).decoder.layers[0].mlp.linear_fc1.packed
    assert isinstance(weights["whole"], CPUFloat16Linear) and weights["whole"].unpack().dtype is torch.float16
    assert weights["mixed"] is None  # float parameters until an engine packs them
    model = load_model(tmp_path / "whole", None, alone, "float32")
    assert model.decoder.layers[0].mlp.linear_fc1.weight.dtype is torch.float32
