"""What is checked, and how large it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from opt_megatron.config import OPTConfig, released_config

SIZES = ("1.3b", "2.7b", "6.7b", "13b")  # of the large model
SMALL = "125m"
_TINY = OPTConfig(
    num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=256, word_embed_proj_dim=64, vocab_size=512
)


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Attributes:
        device: "cuda", or "cpu" for a rehearsal.
        num_devices: GPUs of the machine; in a rehearsal, processes.
        directory: of the random checkpoints.
        size: of the large model, one of SIZES.
        is_tiny: every size is a toy's.
        threads: of each process on the CPU.
    """

    device: str
    num_devices: int
    directory: Path
    size: str = SIZES[0]
    is_tiny: bool = False
    threads: int = 1

    @property
    def is_cuda(self) -> bool:
        """This is no rehearsal."""
        return self.device == "cuda"

    def on_cpu(self) -> Settings:
        """The same on the CPU, whose results are the ones to compare with."""
        return replace(self, device="cpu")

    def config(self, size: str) -> OPTConfig:
        """Of the random model of a released size."""
        return _TINY if self.is_tiny else released_config(f"opt-{size}")

    def checkpoint(self, size: str) -> Path:
        """Where `models.make_checkpoint` puts it."""
        return self.directory / size
