"""Drafts propose the tokens that followed earlier, or those of the draft model."""

from opt_megatron.generation.decoding.drafts import PromptLookup


def test_lookup_proposes_what_followed_the_newest_tokens_last():
    def proposed(tokens, size=3):
        group = type("Group", (), {})()
        group.lead = type("Sequence", (), {"tokens": list(tokens)})()
        group.max_proposed_tokens = 2
        PromptLookup(size).propose([group])
        return group.proposal.tokens

    assert proposed([1, 2, 3, 4, 1, 2, 3]) == [4, 1]
    assert proposed([1, 2, 3, 9, 2, 3, 8, 1, 2, 3]) == [9, 2]  # three tokens tell more than two
    assert proposed([2, 3, 9, 2, 3, 8, 1, 2, 3]) == [8, 1]  # the latest of several
    assert proposed([1, 2, 3, 4, 1, 2, 3], size=1) == [4]
    assert proposed([5, 5, 5, 5]) == [5]
    assert proposed([1, 2, 3]) == proposed([1]) == []
