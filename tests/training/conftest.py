"""Fixtures of the training tests: an indexed corpus of random tokens, and small models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factory import random_model, save

VOCABULARY = 516


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The prefix of an indexed corpus: 300 documents of 10 to 89 tokens, of which the next is often the same again."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(tmp_path_factory.mktemp("corpus") / "random_text_document")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    generator = torch.Generator().manual_seed(0)
    for number in range(300):
        words = torch.randint(4, VOCABULARY, (10 + number % 80,), generator=generator)
        document = torch.cat([words.repeat_interleave(2)[:-1], torch.tensor([2])])
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture(scope="session")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of four layers as a Hugging Face directory."""
    return save(random_model(num_hidden_layers=4), tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="session")
def post_norm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One as 350m is."""
    model = random_model(num_hidden_layers=4, do_layer_norm_before=False, word_embed_proj_dim=24)
    return save(model, tmp_path_factory.mktemp("post"))
