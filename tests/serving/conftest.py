"""The engine whose results the server's are compared with."""

import pytest
from running_server import EMBEDDED_DIRECTORY, TOKENIZER

from opt_megatron.checkpoint.load import load_model
from opt_megatron.generation.core.engine import Engine
from opt_megatron.generation.request import Request
from opt_megatron.generation.sampling.sampling_params import SamplingParams


@pytest.fixture(scope="session")
def offline(alone):
    engine = Engine(load_model(EMBEDDED_DIRECTORY, None, alone), alone)

    def complete(prompt: str, **params):
        request = Request(tuple(TOKENIZER.encode(prompt)), SamplingParams(**params), TOKENIZER.stream)
        return engine.complete([request])

    return complete
