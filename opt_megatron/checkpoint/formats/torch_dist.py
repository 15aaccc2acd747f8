"""torch_dist, Megatron-LM's default format: megatron-core's dist_checkpointing, of any layout. `train` writes it.

    DIR/iter_0000200/  .metadata  __0_0.distcp ...       where every shard of every tensor is, and their files
                       common.pt                         what is not sharded, Megatron-LM's `args` among it (from
                                                         megatron-core 0.19 on it is in a .distcp file)
                       metadata.json                     the mark of the format; without it, it is plain DCP
    DIR/latest_checkpointed_iteration.txt                which iteration DIR means

config.json and the tokenizer's files, which only `train` writes, may lie in the one directory or in the other.
LoRA's factors (`lora_a`, `lora_b`, and lora.json) are added to their weights as they are read. The optimizer and the
extra state of layers are not looked at.
"""

from __future__ import annotations

from pathlib import Path

from ...config import OPTConfig
from ...errors import CheckpointError
from ...model.parameter_names import local_name
from ..adapter import add_adapter
from ..checkpoint import Checkpoint
from .dcp_metadata import METADATA_FILE
from .format import Format
from .infer_config import directory_config, namespace_values
from .lora_run import LORA_FILE, run_adapter
from .megatron_args import check_arguments
from .megatron_ranks import find_iteration
from .megatron_stages import canonical_model
from .torch_dist_shards import read_directory


class TorchDistFormat(Format):
    """One iteration, or the one of a run's directory that its tracker names."""

    title = "torch_dist"
    detection_rank = 10  # before Megatron's: the directory of a run has Megatron-LM's tracker file too

    def detect(self, directory: Path) -> bool:
        """Whether the directory is an iteration's, or holds one."""
        return find_iteration(directory, _is_iteration) is not None

    def open(self, path: Path, config: OPTConfig | None = None) -> Checkpoint:
        """Open one iteration lazily.

        Args:
            config: instead of config.json; where there is neither, one is inferred from the shapes and `args`.

        Raises:
            CheckpointError: a file is missing or damaged, or the model is not an OPT.
        """
        directory = find_iteration(path, _is_iteration) or path
        _check_files(directory)
        home = next((path for path in (directory, directory.parent) if (path / "config.json").is_file()), directory)
        shards, common = read_directory(directory)
        arguments = namespace_values(common.get("args")) if isinstance(common, dict) else {}
        check_arguments(arguments, directory)
        stored = {local_name(name): tensor for name, tensor in shards.items()}
        has_lora = (directory / LORA_FILE).is_file()
        factors = {
            name: stored.pop(name) for name in list(stored) if has_lora and name.endswith((".lora_a", ".lora_b"))
        }
        config, tensors, notes = canonical_model(
            directory, [[stored]], [[directory]], config or directory_config(home), arguments
        )
        checkpoint = Checkpoint(home, f"torch_dist checkpoint {directory.name}", config, tensors, notes)
        return add_adapter(checkpoint, run_adapter(directory, config, factors)) if has_lora else checkpoint


FORMAT = TorchDistFormat()


def _is_iteration(directory: Path) -> bool:
    return (directory / METADATA_FILE).is_file() or any(directory.glob("*.distcp"))


def _check_files(directory: Path) -> None:
    if not (directory / METADATA_FILE).is_file():
        raise CheckpointError(
            f"{directory}: holds shards (.distcp) but no {METADATA_FILE}, which says what they are: saving was "
            "interrupted, or the hidden file was not copied with the others"
        )
    if not (directory / "metadata.json").is_file():
        raise CheckpointError(
            f"{directory}: has no metadata.json, so it is not torch_dist but a format that is not read here "
            "(torch_dcp, fsdp_dtensor): save it with --ckpt-format torch_dist"
        )
