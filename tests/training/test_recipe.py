"""The numbers of OPT's recipe."""

from __future__ import annotations

import pytest

from opt_megatron.errors import UserError
from opt_megatron.training.recipe import RECIPES, find_recipe


def test_every_row_of_the_recipe() -> None:
    # metaseq's own numbers of updates and of warm-up updates
    rows = {size: (r.global_batch_size * 2048, r.lr, r.train_iters, r.lr_warmup_iters) for size, r in RECIPES.items()}
    assert rows == {
        "8m": (131072, 1e-3, 2288818, 2861),
        "125m": (524288, 6e-4, 572204, 715),
        "350m": (524288, 3e-4, 572204, 715),
        "1.3b": (1048576, 2e-4, 286102, 357),
        "2.7b": (1048576, 1.6e-4, 286102, 357),
        "6.7b": (2097152, 1.2e-4, 143051, 178),
        "13b": (4194304, 1e-4, 71525, 89),
        "30b": (4194304, 1e-4, 71525, 89),
        "66b": (2097152, 8e-5, 143051, 178),
        "175b": (2097152, 3e-5, 143051, 178),
    }
    assert RECIPES["8m"].config.num_attention_heads == 2
    assert (RECIPES["125m"].config.dropout, RECIPES["125m"].config.attention_dropout) == (0.1, 0.1)
    assert find_recipe("facebook/opt-125m") is RECIPES["125m"]
    with pytest.raises(UserError, match="there are 8m, 125m"):
        find_recipe("7b")
