"""Log-likelihoods of continuations against transformers, at every layout and batch size."""

import evaluation_jobs
import pytest
import torch

from opt_megatron.errors import UserError
from opt_megatron.model.scoring import Item, score

TOLERANCE = 1e-4


def items_of(vocab_size: int, positions: int) -> list[Item]:
    """Unequal ones, the last of which takes all positions and one target more."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, vocab_size, (positions,), generator=generator).tolist()
    sizes = [(1, 1), (1, 9), (5, 2), (30, 1), (12, 12), (positions - 3, 4)]
    return [Item((2, *ids[:n][: n - 1]), tuple(ids[n - 1 : n - 1 + k])) for n, k in sizes]


def oracle(model, item: Item) -> tuple[list[float], bool]:
    with torch.no_grad():
        logits = model(torch.tensor([item.input_tokens])).logits[0, len(item.context) - 1 :]
    own = logits.log_softmax(-1)[range(len(item.continuation)), list(item.continuation)]
    return own.tolist(), logits.argmax(-1).tolist() == list(item.continuation)


def greedy_item(model, size: int) -> Item:
    with torch.no_grad():
        ids = model.generate(torch.tensor([[2, 9, 30]]), max_new_tokens=size, do_sample=False, eos_token_id=None)
    return Item((2, 9, 30), tuple(ids[0, 3:].tolist()))


@pytest.mark.parametrize(("tp", "pp", "batch_size"), [(1, 1, 1), (1, 1, 4), (2, 1, 3), (1, 2, 2), (2, 2, 8)])
@pytest.mark.parametrize("name", ["pre-norm", "post-norm"])
def test_scores_are_transformers_at_every_layout_and_batch_size(models, ranks, name, tp, pp, batch_size):
    directory, model = models[name]
    items = [*items_of(516, 256), greedy_item(model, 6)]
    for found in ranks(tp * pp).run(evaluation_jobs.scores, directory, tp, pp, items, batch_size):
        for item, one in zip(items, found, strict=True):
            expected, is_greedy = oracle(model, item)
            assert torch.tensor(one.logprobs).sub(torch.tensor(expected)).abs().max() <= TOLERANCE
            assert one.is_greedy == is_greedy
        assert found[-1].is_greedy and not found[1].is_greedy


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_a_model_that_an_engine_has_taken_over_scores_the_same(models, ranks, tp, pp):
    directory, model = models["pre-norm"]
    items = items_of(516, 256)
    found = ranks(tp * pp).run(evaluation_jobs.scores, directory, tp, pp, items, 4, True)[0]
    for item, one in zip(items, found, strict=True):
        assert torch.tensor(one.logprobs).sub(torch.tensor(oracle(model, item)[0])).abs().max() <= TOLERANCE


def test_nothing_gives_nothing_and_what_does_not_fit_is_refused(models, alone):
    from opt_megatron.checkpoint.load import load_model

    model = load_model(models["pre-norm"][0], None, alone)
    assert score(model, alone, []) == []
    for item, message in (
        (Item((2,), (5,) * 257), "text 2 has 258 tokens with BOS, and a model with 256 positions scores 257"),
        (Item((2,), (516,)), "text 2 holds the id 516, but ids go from 0 to 515"),
        (Item((), (5,)), "must have a token each"),
    ):
        with pytest.raises(UserError, match=message):
            score(model, alone, [Item((2,), (5,)), item])
    with pytest.raises(UserError, match="batch_size is 0"):
        score(model, alone, [], batch_size=0)
