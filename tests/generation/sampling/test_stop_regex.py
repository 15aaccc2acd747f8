"""Regular expressions that may end a stream, and those that may not."""

import pytest

from opt_megatron.errors import UserError
from opt_megatron.generation.sampling.stop_regex import compile_stop_regex


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"a(", r"is not a regular expression: missing \)"),
        (r"a|", "matches the empty string"),
        (r"(?r)ab", "searches backwards"),
        (r"a\Kb", "moves the start"),
    ],
)
def test_patterns_that_cannot_end_a_stream_are_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        compile_stop_regex(pattern)
