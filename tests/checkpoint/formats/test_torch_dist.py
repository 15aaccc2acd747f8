"""torch_dist: what Megatron-core's own dist_checkpointing saves, and what a damaged or hostile directory is told."""

from __future__ import annotations

import argparse
import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import SAMPLES, TENSORS, assert_holds, assert_same, contents
from ranks import RankPool
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch_dist_jobs import Saving, save_with_core

from opt_megatron.checkpoint.formats.dcp_metadata import read_metadata
from opt_megatron.checkpoint.formats.registry import open_checkpoint
from opt_megatron.checkpoint.storage import safe_unpickler
from opt_megatron.errors import CheckpointError


@pytest.mark.parametrize(
    ("world", "saving"),
    [
        (1, Saving(metadata={"singleton_local_shards": True})),
        (2, Saving(fully_parallel=True)),
        (4, Saving(2, 2, padding=124)),
    ],
)
def test_what_core_saves_is_read_to_the_bit(
    ranks: Callable[[int], RankPool], four_layers: Path, tmp_path: Path, world: int, saving: Saving
) -> None:
    arguments = argparse.Namespace(num_attention_heads=12, hidden_size=48, params_dtype=torch.float32, swiglu=False)
    ranks(world).run(save_with_core, four_layers, tmp_path / "run" / "iter_0000500", saving, arguments)
    if saving.padding:  # nothing but a config can tell which rows are padding
        shutil.copy(four_layers / "config.json", tmp_path / "run")
    assert_same(contents(four_layers), contents(tmp_path / "run"))
    assert_same(contents(four_layers), contents(tmp_path / "run" / "iter_0000500"))


def test_a_directory_means_the_iteration_that_its_tracker_names(tmp_path: Path) -> None:
    directory = SAMPLES["torch-dist"](tmp_path)
    (tmp_path / "iter_0000009").mkdir()
    (tmp_path / "iter_0000009" / ".metadata").touch()  # Megatron-LM was ended while it saved this one
    assert assert_holds(directory, TENSORS).format_description == "torch_dist checkpoint iter_0000007"
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(CheckpointError, match="iter_0000009"):
        open_checkpoint(directory)


def rewrite_metadata(path: Path, change: Callable[[Any], object]) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


NORM = "decoder.final_layernorm.weight"


def place(metadata: Any, **changes: object) -> None:
    """Change what is said of where the final norm's weight lies."""
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == NORM)
    for name, value in changes.items():
        object.__setattr__(info, name, value)


def shift(metadata: Any) -> None:
    chunks = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks
    chunks[1] = chunks[0]


METADATA_CHANGES = {
    "not of the directory, '../x'": lambda m: place(m, relative_path="../x"),
    "x: cannot be read: No such file": lambda m: place(m, relative_path="x"),
    "is damaged or incomplete": lambda m: place(m, length=10**9),
    r"is damaged|truncated|something else than a tensor": lambda m: place(m, offset=3),
    r"with the transform stream\.zstd/1": lambda m: place(m, transform_descriptors=["stream.zstd/1"]),
    "does not say where .* is from": lambda m: m.storage_data.clear(),
    r"shards of decoder\.layers\.mlp\.linear_fc2\.weight do not make up": shift,
    "of a dtype that OPT is not stored in": lambda m: setattr(
        m.state_dict_metadata[NORM].properties, "dtype", torch.int64
    ),
    "does not lie there as": lambda m: setattr(m.state_dict_metadata[NORM].properties, "dtype", torch.bfloat16),
    "tensors are missing": lambda m: m.state_dict_metadata.pop(NORM),
    "output_layer.weight": lambda m: m.state_dict_metadata.update({"output_layer.weight": m.state_dict_metadata[NORM]}),
}


@pytest.mark.parametrize("message", METADATA_CHANGES)
def test_metadata_that_lies_is_refused(tmp_path: Path, message: str) -> None:
    path = SAMPLES["torch-dist"](tmp_path) / "iter_0000007"
    rewrite_metadata(path, METADATA_CHANGES[message])
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path).read("model.decoder.final_layer_norm.weight")
    assert "\n" not in str(caught.value)


def save_common(path: Path, **arguments: object) -> None:
    torch.save({"args": argparse.Namespace(num_attention_heads=4, hidden_size=12, **arguments)}, path / "common.pt")


def move_common(path: Path) -> None:
    """Where megatron-core 0.19 keeps what is not sharded (dist_checkpointing/serialization.py): beside the tensors."""
    buffer = io.BytesIO()
    torch.save([torch.load(path / "common.pt", weights_only=False)], buffer)  # this test wrote it
    (path / "common.pt").unlink()
    (path / "__7_0.distcp").write_bytes(b"before" + buffer.getvalue())
    name = "common_state/shard_0_1"

    def change(metadata: Any) -> None:
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(name)] = _StorageInfo("__7_0.distcp", 6, len(buffer.getvalue()))

    rewrite_metadata(path, change)


def test_the_common_state_beside_the_tensors(tmp_path: Path) -> None:
    path = SAMPLES["torch-dist"](tmp_path) / "iter_0000007"
    move_common(path)
    assert_holds(tmp_path, TENSORS)
    save_common(path, squared_relu=True)
    move_common(path)
    with pytest.raises(CheckpointError, match=r"squared_relu=True; in OPT it is False"):
        open_checkpoint(path)
    (path / "__7_0.distcp").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="is damaged or incomplete"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "metadata.json").unlink(), r"not torch_dist but .*torch_dcp.* --ckpt-format torch_dist"),
        (lambda d: (d / ".metadata").unlink(), r"holds shards .* but no \.metadata.*hidden file was not copied"),
        (lambda d: (d / "common.pt").unlink(), "common.pt is missing, and .metadata names no common state"),
        (lambda d: (d / ".metadata").write_bytes(b"\x80\x04N."), "is damaged: ValueError: something else where a Meta"),
        (lambda d: (d / ".metadata").write_bytes((d / ".metadata").read_bytes()[:300]), ".metadata: is damaged"),
        (lambda d: save_common(d, squared_relu=True), "squared_relu=True; in OPT it is False"),
    ],
)
def test_a_directory_that_is_incomplete_or_no_opt(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    directory = SAMPLES["torch-dist"](tmp_path)
    damage(directory / "iter_0000007")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(directory)


def test_nothing_in_metadata_is_run(tmp_path: Path) -> None:
    path = SAMPLES["torch-dist"](tmp_path) / "iter_0000007"

    class Call:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "touched",)

    rewrite_metadata(path, lambda metadata: metadata.state_dict_metadata.update(other=Call()))
    assert_holds(path, TENSORS)
    assert not (tmp_path / "touched").exists()


def test_metadata_of_many_shards_is_within_the_limit_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what every pickle may allocate, which counts for little where there are a hundred thousand shards."""
    path = SAMPLES["torch-dist"](tmp_path) / "iter_0000007"
    monkeypatch.setattr(safe_unpickler, "_FREE_BYTES", 0)
    assert len(read_metadata(path).tensors) == 16
