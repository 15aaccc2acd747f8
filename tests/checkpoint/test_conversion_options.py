"""Combinations of conversion options that are refused."""

import pytest

from opt_megatron.checkpoint.conversion_options import ConversionOptions
from opt_megatron.errors import UserError


@pytest.mark.parametrize(
    "options",
    [
        {"to": "hf", "decoder_first_pipeline_num_layers": 2},
        {"to": "gguf"},
        {"to": "flagai", "pipeline_model_parallel_size": 2},
    ],
)
def test_options_that_do_not_belong_together(options):
    with pytest.raises(UserError):
        ConversionOptions(**options)
