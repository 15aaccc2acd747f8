"""The ranges of the sampling options, and the kinds of values they take."""

import math

import numpy as np
import pytest

from opt_megatron.errors import UserError
from opt_megatron.generation.sampling.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": -1}, "temperature is -1, but must be 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 2}, r"top_p is 2, but must be from 0 \(greedy\) to 1"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"top_k": -5}, "top_k is -5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"seed": -(2**63) - 1}, "seed is -9223372036854775809"),
        ({"max_new_tokens": 0, "num_beams": 2}, "max_new_tokens is 0, but must be at least 1 in a beam search"),
        ({"max_new_tokens": 0, "penalty_alpha": 0.6, "top_k": 4}, "max_new_tokens is 0, .* in a contrastive search"),
        ({"max_new_tokens": -1, "echo": True}, "max_new_tokens is -1, but must be at least 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9, but must be from 0 to .* 8"),
        ({"stop": ("a", "")}, "stop is"),
        ({"bad_words": ""}, "bad_words is .* strings that are not empty"),
        ({"allowed_token_ids": (4, -1)}, "allowed_token_ids is"),
        ({"logprob_token_ids": (4,)}, "logprobs is None, but must be given with logprob_token_ids"),
        ({"bad_word_ids": (4,)}, "bad_word_ids is 4, but must be a list of ids"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"min_p": 1.5}, "min_p is 1.5, but must be from 0"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"typical_p": 0}, "typical_p is 0"),
        ({"omega_bound": -0.1}, "omega_bound is -0.1"),
        ({"lambda_decay": 0}, "lambda_decay is 0"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf, but must be a finite number"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"prompt_presence_penalty": math.inf}, "prompt_presence_penalty is inf"),
        ({"prompt_frequency_penalty": math.inf}, "prompt_frequency_penalty is inf"),
        ({"length_penalty": math.nan}, "length_penalty is nan"),
        ({"penalty_alpha": 2, "top_k": 4}, "penalty_alpha is 2"),
        ({"banned_tokens": (3, -1)}, "banned_tokens is .* ids, which are 0 or above"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids is"),
        ({"sentence_end_tokens": (-1,)}, "sentence_end_tokens is"),
        ({"logit_bias": ((-1, 2.0),)}, "logit_bias is .* different ids"),
        ({"logit_bias": ((1, 2.0), (1, 3.0))}, "logit_bias is .* different ids"),
        ({"logit_bias": ((1, -math.inf),)}, "logit_bias is .*use banned_tokens"),
        ({"logprobs": 101}, "logprobs is 101, but must be none, or from 0 .* to 100"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"n": 0}, "n is 0, but must be from 1 to 100000"),
        ({"n": 2.0}, "n is 2.0, but must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens is True, but must be a whole number"),
        ({"temperature": "1"}, "temperature is '1', but must be a number"),
        ({"temperature": 10**400}, "which is more than a number can be"),
        ({"echo": 1}, "echo is 1, but must be true or false"),
        ({"stop": [1]}, "stop is .1., but must be a string or a list of strings"),
        ({"stop_token_ids": [True]}, "stop_token_ids is .True., but must be a list of ids"),
        ({"stop_token_ids": "5"}, "stop_token_ids is .5., but must be a list of ids"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5, but must be a list of ids"),
        ({"logit_bias": [1]}, "logit_bias is .1., but must be ids with a number each"),
        ({"n": 3, "best_of": 2}, "best_of is 2, but must be at least n, which is 3"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature is 0.5, but must be 0 or 1 in a beam search"),
        ({"num_beams": 2, "n": 3}, "n is 3, but must be at most num_beams, which is 2"),
        ({"num_beams": 2, "top_k": 5}, r"top_k is 5, but has no meaning in a beam search \(num_beams is 2\)"),
        ({"num_beams": 2, "top_p": 0.5}, "top_p is 0.5, but has no meaning in a beam search"),
        ({"num_beams": 2, "min_p": 0.5}, "min_p is 0.5, but has no meaning"),
        ({"num_beams": 2, "typical_p": 0.5}, "typical_p is 0.5, but has no meaning"),
        ({"num_beams": 2, "lambda_decay": 0.5}, "lambda_decay is 0.5, but has no meaning"),
        ({"num_beams": 2, "penalty_alpha": 0.5}, "penalty_alpha is 0.5, but has no meaning"),
        ({"num_beams": 2, "best_of": 3}, "best_of is 3, but has no meaning"),
        ({"num_beams": 2, "prompt_logprobs": 0}, "prompt_logprobs is 0, but has no meaning"),
        ({"penalty_alpha": 0.6}, "top_k is 0, but must be from 2 to 1024 in a contrastive search"),
        ({"penalty_alpha": 0.6, "top_k": 4, "temperature": 0}, "temperature is 0, .* in a contrastive search"),
        ({"penalty_alpha": 0.6, "top_k": 4, "top_p": 0.9}, "top_p is 0.9, .* in a contrastive search"),
        ({"penalty_alpha": 0.6, "top_k": 4, "n": 2}, "n is 2, .* in a contrastive search"),
        ({"stop_regex": ("a(",)}, r"stop_regex 'a\(' is not a regular expression: missing \) at position 2"),
        ({"stop_regex": ("x*",)}, r"stop_regex 'x\*' matches the empty string"),
    ],
)
def test_values_out_of_range_are_named(option, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**option)


def test_what_is_allowed_together():
    SamplingParams(max_new_tokens=0, echo=True, logprobs=0)
    SamplingParams(num_beams=4, n=4, temperature=0, length_penalty=-1.0, repetition_penalty=1.2)
    SamplingParams(penalty_alpha=0.6, top_k=4)
    SamplingParams(n=2, best_of=5)


def test_values_come_in_all_kinds():
    given = SamplingParams(
        seed=np.int64(7), temperature=np.float32(0.5), stop="ab", stop_token_ids=[np.int32(4)], logit_bias={5: -1}
    )
    assert given == SamplingParams(seed=7, temperature=0.5, stop=("ab",), stop_token_ids=(4,), logit_bias=((5, -1),))
    assert type(given.seed) is int and type(given.temperature) is float and type(given.stop_token_ids[0]) is int
