"""What tests of research hooks let every rank do (importable by the rank processes)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opt_megatron import OPT
from opt_megatron.analysis.logit_lens import Lens, logit_lens
from opt_megatron.errors import UserError


def look(directory: Path, tp: int, pp: int, tokens: Tensor, generate_first: bool = False) -> dict[str, Any]:
    """Everything there is to see, on this rank."""
    opt = _load(directory, tp, pp)
    if generate_first:
        opt.generate([[2, 9, 30]], max_new_tokens=3)
    return {
        "logits": opt.logits(tokens),
        "hidden_states": opt.hidden_states(tokens),
        "some": opt.hidden_states(tokens, layers=[3, -1, 0]),
        "attentions": opt.attentions(tokens),
        "last attention": opt.attentions(tokens, layers=[-1])[0],
    }


def captured(directory: Path, tp: int, pp: int, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Whole tensors."""
    return _load(directory, tp, pp).capture(tokens, names)


def changed(directory: Path, tp: int, pp: int, tokens: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Logits with a hook that scales different parts differently, and after it has gone."""
    opt = _load(directory, tp, pp)
    with opt.hooks({name: scaled}):
        logits = opt.logits(tokens)
        again = opt.logits(tokens)
    assert torch.equal(logits, again)
    return logits, opt.logits(tokens)


def scaled(tensor: Tensor) -> Tensor:
    """Multiply by numbers from -1 to 2 along the last two dimensions."""
    size = tensor.shape[-2:]
    return tensor * torch.linspace(-1, 2, size.numel()).view(size)


def kept(
    directory: Path, tp: int, tokens: Tensor, names: list[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    """What hooks keep, what `capture` gives, and whether hooks that write into what they get leave the model alone."""
    opt = _load(directory, tp, 1)
    plain = opt.logits(tokens)
    seen: dict[str, Tensor] = {}
    with opt.hooks({name: partial(seen.__setitem__, name) for name in names}):
        opt.logits(tokens)
    with opt.hooks(dict.fromkeys(names, _spoil)):
        spoilt = opt.logits(tokens)
    return seen, opt.capture(tokens, names), torch.equal(plain, spoilt)


def _spoil(tensor: Tensor) -> None:
    tensor.zero_()


def failing(directory: Path, pp: int, tokens: Tensor, name: str) -> tuple[list[str], bool]:
    """What hooks that fail at one place come to on this rank, and whether the model is as before."""
    opt = _load(directory, 1, pp)
    plain = opt.logits(tokens)

    def fail(tensor: Tensor) -> None:
        raise ZeroDivisionError("by nothing")

    messages = []
    for hook, run in (
        (fail, lambda: opt.logits(tokens)),
        (lambda tensor: tensor[:, :1], lambda: opt.capture(tokens, ["output"])),
        (fail, lambda: opt.hidden_states(tokens, layers=[0])),
    ):
        try:
            with opt.hooks({name: hook}):
                run()
            messages.append("nothing was raised")
        except (UserError, ZeroDivisionError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages, torch.equal(plain, opt.logits(tokens))


def errors(directory: Path, tp: int) -> list[str]:
    """The messages of mistakes, on this rank."""
    opt = _load(directory, tp, 1)
    messages = []
    for mistake in (
        lambda: opt.capture([2, 5], ["layers.12"]),
        lambda: opt.capture([2, 5], ["layers.1.nose"]),
        lambda: opt.hidden_states([2, 5], layers=[13]),
        lambda: opt.attentions([2, 5], layers=[12]),
        lambda: opt.logits([[2, 5], [2]]),
        lambda: opt.logits([2, 516]),
        lambda: opt.logits([2] * 257),
        lambda: opt.logits([0.5]),
        lambda: opt.logits([]),
        lambda: opt.tokens("text"),
        lambda: opt.generate([[2, 5]], heat=3),
        lambda: opt.generate([[2, 5]], max_new_tokens=2.5),
        lambda: opt.logits(None),
        lambda: _with(opt, "layers.1", lambda x: x[..., 1:]),
        lambda: _with(opt, "layers.1.attention.weights", lambda x: x),
        lambda: _generate_within(opt),
        lambda: _with(opt, "layers.1", 3),
        lambda: opt.hidden_states([2, 5], layers=3),
        lambda: opt.attentions([2, 5], layers=["1"]),
        lambda: opt.generate([2, 5]),
        lambda: opt.score([7]),
        lambda: opt.score([("a", "b", "c")]),
        lambda: opt.unembed(torch.zeros(1, 2, 47)),
        lambda: _load(directory, tp, 1, batch_size=0),
    ):
        try:
            mistake()
            messages.append("nothing was raised")
        except UserError as error:
            messages.append(str(error))
    assert torch.isfinite(opt.logits([2, 5])).all()  # no hook is left behind
    return messages


def lens(directory: Path, tp: int, pp: int, tokens: Tensor) -> Lens:
    """The logit lens."""
    return logit_lens(_load(directory, tp, pp), tokens)


def _with(opt: OPT, name: str, hook: Any) -> None:
    with opt.hooks({name: hook}):
        opt.logits([2, 5])


def _generate_within(opt: OPT) -> None:
    with opt.hooks({"layers.1": lambda x: None}):
        opt.generate([[2, 5]])


def _load(directory: Path, tp: int, pp: int, **options: Any) -> OPT:
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return OPT.from_pretrained(str(directory), **sizes, **options)
