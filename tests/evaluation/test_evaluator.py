"""The leader asks, the others compute: several questions, refused ones among them, and an action that fails."""

import evaluation_jobs
import pytest


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_questions_at_every_layout(models, ranks, tp, pp):
    directory, _ = models["pre-norm"]
    heard, *others = ranks(tp * pp).run(evaluation_jobs.questions, directory, tp, pp)
    alone = ranks(1).run(evaluation_jobs.questions, directory, 1, 1)[0]
    assert others == [None] * (tp * pp - 1)
    assert heard[1:4] == alone[1:4] and len(heard[1][0]) == 5
    assert "holds the id 100000" in heard[2] and "300 tokens" in heard[3]
    for one, expected in zip([*heard[0], *heard[4]], [*alone[0], *alone[0]], strict=True):
        assert one.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert one.is_greedy == expected.is_greedy


def test_what_the_action_raises_is_raised_on_every_rank(models, ranks):
    messages = ranks(2).run(evaluation_jobs.error_of_the_action, models["pre-norm"][0], 2)
    assert messages == ["no such task"] * 2
