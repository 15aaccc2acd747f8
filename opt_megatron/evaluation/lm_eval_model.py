"""An OPT as lm-eval's model, registered as `opt_megatron` (needs the extra `eval`).

Requests are tokenized as lm-eval's own `hf` model does it for OPT: one BOS before every context, an empty context is
BOS alone, and sequences that are too long are truncated on the left. One thing differs: `loglikelihood_rolling` does
not put a second BOS before the text, and score it, as `hf` does with a tokenizer that adds one
(`add_bos_token=False` makes `hf` do the same as here).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..api import OPT
from ..errors import UserError, print_notice
from ..files import progress_bar
from ..generation.request import Request
from ..generation.sampling.sampling_params import SamplingParams
from ..model.scoring import Item
from ..parallel.launch_environment import world_size_from_environment
from ..pretrained import start_parallel
from .evaluator import Evaluator

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_SEARCH = ("num_beams", "length_penalty", "early_stopping")
_HANDLED_APART = ("do_sample", "until", "max_gen_toks")


@register_model("opt_megatron")
class OPTMegatronLM(TemplateLM):
    """lm-eval's interface to a model.

    It is made from an evaluator (`from_evaluator`: under torchrun lm-eval runs on the leader, within
    `evaluator.lead`), or by lm-eval itself from `--model_args load=...`, in one process.

    Raises:
        UserError: the model cannot be loaded, or this process is one of several.
    """

    def __init__(
        self,
        load: str = "story",
        dtype: str = "auto",
        batch_size: int | str = 8,
        device: str | None = None,
        max_batch_size: int | None = None,
        quantization: str | None = None,
        tokenizer: str | None = None,
        revision: str | None = None,
        adapter: str | None = None,
    ) -> None:
        if world_size_from_environment() > 1:
            raise UserError("on several ranks lm-eval is started by `opt-megatron evaluate lm-eval` under torchrun")
        opt = OPT.open(
            load,
            start_parallel(dtype=dtype, device=_device(device)),
            dtype=dtype,
            revision=revision,
            adapter=adapter,
            tokenizer=tokenizer,
            needs_tokenizer=True,
            quantization=quantization,
            batch_size=_batch_size(batch_size),
        )
        self._start(Evaluator(opt.load()))

    @classmethod
    def from_evaluator(cls, evaluator: Evaluator) -> OPTMegatronLM:
        """For a model that is already loaded."""
        self = cls.__new__(cls)
        self._start(evaluator)
        return self

    def _start(self, evaluator: Evaluator) -> None:
        TemplateLM.__init__(self)
        self._evaluator = evaluator
        self._config = evaluator.opt.config
        self._tokenizer = evaluator.opt.tokenizer
        self.batch_size = evaluator.opt.batch_size

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._config.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The id that replaces an empty context."""
        return self._config.bos_token_id

    @property
    def max_length(self) -> int:
        """Tokens that the model can read."""
        return self._config.max_position_embeddings

    @property
    def max_gen_toks(self) -> int:
        """New tokens of tasks that do not set their number."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's cache of requests."""
        return self._evaluator.opt.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids, after BOS unless `add_special_tokens` is False. `</s>` in a text is text."""
        return self._tokenizer.encode(string, add_bos=add_special_tokens is not False)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations, and whether they are greedy; no progress bar without a terminal."""
        return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        items = [self._item(context, continuation) for _, context, continuation in requests]
        with progress_bar("scoring", unit=" items", total=len(items), hidden=disable_tqdm) as bar:
            scores = self._evaluator.score(items, bar.update)
        answers = [(score.total, score.is_greedy) for score in scores]
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def _item(self, context: list[int], continuation: list[int]) -> Item:
        """Truncated on the left, where it is too long; BOS is dropped too then, as lm-eval's `hf` does it."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise UserError(
                f"a continuation has {len(continuation)} tokens, and the model has {self.max_length} positions"
            )
        return Item(tuple(context[-room:]), tuple(continuation))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, by lm-eval's windows: each but the first begins with the token before it."""
        texts = [request.args[0] for request in requests]
        windows = [(number, *window) for number, text in enumerate(texts) for window in self._windows(text)]
        answers = self._loglikelihood_tokens([(None, before, text) for _, before, text in windows], disable_tqdm)
        totals = [0.0] * len(texts)
        for (number, *_), (total, _) in zip(windows, answers, strict=True):
            totals[number] += total
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        ids = self.tok_encode(text, add_special_tokens=False)
        windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
        return [make_disjoint_window(window) for window in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut off before the first of the request's stop strings."""
        prompts = [self._request(*request.args) for request in requests]
        texts = [completion.text for completion in self._evaluator.complete(prompts)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _request(self, context: str, options: dict[str, Any]) -> Request:
        options = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        unknown = sorted(options.keys() - {*_SAMPLING, *_SEARCH, *_HANDLED_APART})
        if unknown:
            raise UserError(f"a task wants generation by {', '.join(unknown)}, which is not known here")
        new, sampled = options["max_gen_toks"], bool(options.get("do_sample"))
        room = self.max_length - new
        if room < 1:
            raise UserError(f"the task wants {new} new tokens, but the model has {self.max_length} positions")
        ids = self.tok_encode(context, add_special_tokens=False)
        prompt = (self.prefix_token_id, *ids[max(0, len(ids) - (room - 1)) :])
        names = (*_SEARCH, *(_SAMPLING if sampled else ()))
        given = {name: options[name] for name in names if options.get(name) is not None}
        stop = tuple(text for text in options["until"] if text)
        given = {"temperature": 0.0, **given, "max_new_tokens": new, "stop": stop}
        params = SamplingParams(**self._evaluator.opt.pretrained.generation_config.with_defaults(given))
        return Request(prompt, params, self._tokenizer.stream)


def _device(device: str | None) -> str | None:
    """lm-eval's command line passes "cuda:0" by default: without a GPU that means the CPU, as for its `hf`."""
    if device == "cuda:0" and not torch.cuda.is_available():
        print_notice("lm-eval asks for cuda:0, and there is no CUDA GPU: running on the CPU")
        return "cpu"
    return device


def _batch_size(batch_size: int | str) -> int:
    if not str(batch_size).isdecimal():
        raise UserError(f"batch_size is {batch_size!r}, but must be a whole number (there is no 'auto')")
    return int(batch_size)
