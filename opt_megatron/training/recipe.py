"""OPT's pre-training recipe, one row a size.

Source: metaseq's baselines (metaseq/launcher/opt_job_constants.py and opt_baselines.py), which differ from the
paper's table 1 (Zhang et al. 2022, arXiv:2205.01068) in 175b's learning rate: the paper says 1.2e-4. Sequences
of 2048 tokens, 300e9 tokens in all, 375e6 of them warm-up.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import OPTConfig, released_config, released_name
from ..errors import UserError

SEQ_LENGTH = 2048
INIT_STD = 0.006
_TOKENS, _WARMUP_TOKENS = 300e9, 375e6


@dataclass(frozen=True)
class Recipe:
    """How one size was trained.

    Attributes:
        global_batch_size: sequences a step.
        lr: peak learning rate.
        tensor_model_parallel_size: on A100s of 80 GB.
    """

    config: OPTConfig
    global_batch_size: int
    lr: float
    tensor_model_parallel_size: int

    @property
    def train_iters(self) -> int:
        """Steps for 300e9 tokens."""
        return int(_TOKENS // (self.global_batch_size * SEQ_LENGTH))

    @property
    def lr_warmup_iters(self) -> int:
        """Steps for 375e6 tokens."""
        return int(_WARMUP_TOKENS // (self.global_batch_size * SEQ_LENGTH))


_8M = OPTConfig(
    num_layers=4, hidden_size=128, num_attention_heads=2, ffn_hidden_size=512, word_embed_proj_dim=128, name="opt-8m"
)
# fmt: off
_ROWS = (
    # size   sequences  peak lr  tensor parallel
    ("8m",       64,    1e-3,    2),
    ("125m",    256,    6e-4,    2),
    ("350m",    256,    3e-4,    2),
    ("1.3b",    512,    2e-4,    2),
    ("2.7b",    512,    1.6e-4,  4),
    ("6.7b",   1024,    1.2e-4,  2),
    ("13b",    2048,    1e-4,    2),
    ("30b",    2048,    1e-4,    2),
    ("66b",    1024,    8e-5,    8),
    ("175b",   1024,    3e-5,    8),
)
# fmt: on
RECIPES = {
    size: Recipe(
        (_8M if size == "8m" else released_config(size)).replace(attention_dropout=0.1, dtype="float32"),
        sequences,
        lr,
        tp,
    )
    for size, sequences, lr, tp in _ROWS
}


def find_recipe(name: str) -> Recipe:
    """The recipe of a size under any of its names (`125m`, `opt-125m`, `facebook/opt-125m`).

    Raises:
        UserError: there is none.
    """
    key = (released_name(name) or name.lower()).removeprefix("opt-")
    if key not in RECIPES:
        raise UserError(f"there is no recipe for {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[key]
