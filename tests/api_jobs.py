"""Jobs that ranks run for the tests of `OPT` and its hooks."""

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


def adapted(directory: Path, adapter: Path, tp: int, pp: int, tokens: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Logits and a greedy continuation with an adapter of peft."""
    opt = _load(directory, tp, pp, adapter=str(adapter))
    return opt.logits(tokens), opt.generate([[2, 9, 30]], max_new_tokens=8, temperature=0, ignore_eos=True)[0].tokens


def captured(directory: Path, tp: int, pp: int, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """The whole tensors at several hook points."""
    return _load(directory, tp, pp).capture(tokens, names)


def changed(directory: Path, tp: int, pp: int, tokens: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Logits with a hook that scales different parts differently, and after it was removed."""
    opt = _load(directory, tp, pp)
    with opt.hooks({name: scaled}):
        logits = opt.logits(tokens)
        again = opt.logits(tokens)
    assert torch.equal(logits, again)
    return logits, opt.logits(tokens)


def scaled(tensor: Tensor) -> Tensor:
    """Multiply by numbers from -1 to 2 along the last two dimensions."""
    size = tensor.shape[-2:]
    return tensor * torch.linspace(-1, 2, size.numel(), device=tensor.device).view(size)


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
    """The errors of hooks that fail at one hook point, on this rank, and whether the model is as before."""
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


def streamed(tp: int, pp: int) -> dict[str, Any]:
    """What streams of text give on this rank: whole ones, and one that is closed early."""
    opt = OPT.from_pretrained(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0.8, "seed": 4, "ignore_eos": True}
    pieces = list(opt.stream("Once upon a time — très", **options))
    text = opt.generate("Once upon a time — très", **options)[0].text
    stream = opt.stream("The king", **options)
    first = [next(stream), next(stream)]
    logits = opt.logits([2, 5])  # between two pieces all ranks are free
    refused = []
    for action in (lambda: opt.generate("x"), lambda: next(iter(opt.stream("x")))):
        try:
            action()
        except UserError as error:
            refused.append(str(error))
    stream.close()
    for message in (lambda: opt.stream("x", n=2), lambda: opt.stream("x" * 9999), lambda: opt.stream("x", heat=1)):
        try:
            message()
        except UserError as error:
            refused.append(str(error))
    again = opt.generate("The king", **options)[0].text
    dropped = next(opt.stream("The king", **options))  # not closed by anybody
    assert torch.equal(opt.logits([2, 5]), logits)
    return {"pieces": pieces, "text": text, "first": first, "again": again, "dropped": dropped, "refused": refused}


def weights_before_and_after_generating(
    directory: Path, tp: int, pp: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All weights by name, and again once an engine has packed them."""
    opt = _load(directory, tp, pp)
    before = {name: opt.weights[name] for name in (*opt.weights, "lm_head.weight")}
    opt.generate([[2, 9, 30]], max_new_tokens=3)
    return before, {name: opt.weights[name] for name in (*opt.weights, "lm_head.weight")}


def pruned(directory: Path, tp: int, pp: int, target: Path, generate_first: bool) -> None:
    """Magnitude pruning: half of every layer's matrices become zero."""
    opt = _load(directory, tp, pp)
    if generate_first:
        opt.generate([[2, 9, 30]], max_new_tokens=3)
    for name in opt.weights:
        if ".layers." in name and name.endswith(("proj.weight", "fc1.weight", "fc2.weight")):
            weight = opt.weights[name]
            threshold = weight.abs().flatten().kthvalue(weight.numel() // 2).values
            opt.weights[name] = weight.where(weight.abs() > threshold, 0)
    opt.save(target)


def edited_and_reloaded(directory: Path, tp: int, pp: int, target: Path) -> dict[str, bool]:
    """Whether a model edited in the middle of its use is one that is loaded with the edited weights."""
    opt = _load(directory, tp, pp)
    generator = torch.Generator().manual_seed(3)
    names = list(opt.weights)
    noisy = {name: opt.weights[name] + torch.randn(opt.weights.shape(name), generator=generator) for name in names}
    for name in names[::2]:
        opt.weights[name] = noisy[name]
    opt.generate([[2, 9, 30]], max_new_tokens=3)
    for name in names[1::2]:
        opt.weights[name] = noisy[name]
    opt.weights["lm_head.weight"] = noisy["model.decoder.embed_tokens.weight"] * 2
    opt.save(target, force=True)
    other = _load(target, tp, pp)
    options = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    tokens = [one.generate([[2, 9, 30]], **options)[0].tokens for one in (opt, other)]
    return {
        "weights": all(torch.equal(opt.weights[name], other.weights[name]) for name in names),
        "logits": torch.equal(opt.logits([2, 9, 30]), other.logits([2, 9, 30])),
        "tokens": tokens[0] == tokens[1],
    }


def saved(directory: Path, tp: int, target: Path, options: dict[str, Any]) -> None:
    """Load and save."""
    _load(directory, tp, 1).save(target, **options)


def weight_errors(directory: Path, tp: int, target: Path) -> list[str]:
    """The messages of mistakes with weights, on this rank."""
    opt = _load(directory, tp, 1)
    name = "model.decoder.layers.0.fc1.weight"
    before, messages = opt.weights[name], []
    infinite = before.clone()
    infinite[0, 0] = torch.inf
    opt.save(target / "saved")
    for mistake in (
        lambda: opt.weights["model.decoder.layers.0.fc1.weigth"],
        lambda: opt.weights["layer"],
        lambda: opt.weights.__setitem__(name, 1.0),
        lambda: opt.weights.__setitem__(name, before.t()),
        lambda: opt.weights.__setitem__(name, before.long()),
        lambda: opt.weights.__setitem__(name, infinite),
        lambda: opt.weights.__setitem__(name, before + opt.parallel.rank),
        lambda: opt.save(target / "saved"),
        lambda: opt.save(target / "other", to="nonsense"),
    ):
        try:
            mistake()
            messages.append("nothing was raised")
        except UserError as error:
            messages.append(str(error))
    assert torch.equal(opt.weights[name], before)
    return messages


def _with(opt: OPT, name: str, hook: Any) -> None:
    with opt.hooks({name: hook}):
        opt.logits([2, 5])


def _generate_within(opt: OPT) -> None:
    with opt.hooks({"layers.1": lambda x: None}):
        opt.generate([[2, 5]])


def _load(directory: Path, tp: int, pp: int, **options: Any) -> OPT:
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return OPT.from_pretrained(str(directory), **sizes, **options)
