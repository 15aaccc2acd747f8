"""Validation and the lines before the first step, at every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import training_jobs as jobs
from ranks import RankPool

from opt_megatron.config import OPTConfig
from opt_megatron.model.lora_options import LoRAOptions


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 1), (1, 1, 2), (1, 1, 4), (2, 1, 2), (1, 2, 1)])
def test_the_same_sequences_at_every_layout(
    ranks: Callable[[int], RankPool], four_layers: Path, tp: int, pp: int, dp: int
) -> None:
    from transformers import OPTForCausalLM

    model = OPTForCausalLM.from_pretrained(four_layers, dtype="float32")
    data = jobs.RandomTokens(7, model.config.vocab_size)
    samples = [data[index] for index in range(7)]
    with torch.no_grad():
        logits = model(torch.stack([sample["tokens"] for sample in samples])).logits
    labels, mask = (torch.stack([sample[name] for sample in samples]) for name in ("labels", "loss_mask"))
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none") * mask
    counts = [0, 1, 3, 8]  # 0 and more than there are: all
    expected = [(float(losses[:n].sum() / mask[:n].sum()), int(mask[:n].sum())) for n in (7, 1, 3, 7)]
    config = OPTConfig.from_directory(four_layers)
    lora = {"lora": LoRAOptions(4, target_modules=("linear_qkv", "linear_fc2"))}
    for lines, found in ranks(tp * pp * dp).run(jobs.header_and_validation, four_layers, tp, pp, lora, counts):
        assert [tokens for _, tokens in found] == [tokens for _, tokens in expected]
        assert [loss for loss, _ in found] == [pytest.approx(loss, rel=1e-5) for loss, _ in expected]
        trained = 4 * 4 * (config.hidden_size * 4 + config.ffn_hidden_size + config.hidden_size)
        assert lines == [
            f"model: {config.num_parameters:,} parameters in float32, {trained:,} trainable factors of LoRA",
            f"layout: tensor {tp} x pipeline {pp} x data {dp} ranks",
            "run: 1 steps of 8 sequences of 32 tokens, 256 tokens",
        ]
