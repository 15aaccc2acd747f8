"""`OPT`: one object for a pretrained model on any layout, for notebooks and scripts.

Every method is called on every rank with the same arguments and gives every rank the same result.

There is one model. What looks into it runs its ordinary forward pass, to the bit transformers' in float32 on
one tensor parallel rank. `generate` makes an engine, which repacks the weights (`generation/core/engine.py`); the
ordinary pass goes on with those, and differs in its last bits from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .config import OPTConfig
from .errors import UserError
from .generation.core.engine import Engine
from .generation.request import Completion, Request
from .generation.sampling.sampling_params import SamplingParams
from .model.full_forward import stage_forward
from .model.hook_points import EMBEDDING, OUTPUT, Hook, attach, parse
from .model.opt_model import OPTModel
from .model.scoring import Item, Score, score
from .parallel.context import ParallelContext, init_parallel
from .pretrained import Pretrained, open_pretrained
from .tokenizer import OPTTokenizer

Tokens = Tensor | Sequence[int] | Sequence[Sequence[int]]


class OPT:
    """A pretrained model; made by `from_pretrained`.

    Attributes:
        model: this rank's part.
    """

    def __init__(self, pretrained: Pretrained, model: OPTModel, batch_size: int) -> None:
        self.model = model
        self._pretrained = pretrained
        self._batch_size = batch_size
        self._active_hooks = 0
        self._hook_errors: list[Exception] = []  # of the pass that runs

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str = "story",
        *,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        dtype: str = "auto",
        device: str | None = None,
        revision: str | None = None,
        tokenizer: str | None = None,
        quantization: str | None = None,
        batch_size: int = 8,
        seed: int = 1234,
    ) -> OPT:
        """Load a checkpoint in any format, at any layout; on several ranks under torchrun, on each of them.

        Args:
            name_or_dir: as of --load: a directory, a released size, a Hub repository, or "story".
            dtype: float32, float16, bfloat16, or auto: float32 on a CPU, the checkpoint's on a GPU.
            tokenizer: where its files are; by default beside the weights. Without one, ids go in.
            batch_size: sequences that `score` and `generate` run at a time.

        Raises:
            UserError: of any kind; the same one on every rank.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, but must be at least 1")
        parallel = init_parallel(tensor_model_parallel_size, pipeline_model_parallel_size, seed=seed, device=device)
        if parallel.data_parallel_size != 1:
            raise UserError(
                f"{parallel.world_size} processes were started for tensor {tensor_model_parallel_size} x pipeline "
                f"{pipeline_model_parallel_size}: there must be as many as their product"
            )
        pretrained = open_pretrained(
            name_or_dir, parallel, revision=revision, tokenizer=tokenizer, needs_tokenizer=False
        )
        return cls(pretrained, pretrained.load_model(dtype, quantization=quantization), batch_size)

    @property
    def config(self) -> OPTConfig:
        """The architecture."""
        return self._pretrained.config

    @property
    def parallel(self) -> ParallelContext:
        """Where this rank stands."""
        return self._pretrained.parallel

    @property
    def tokenizer(self) -> OPTTokenizer:
        """The model's tokenizer.

        Raises:
            UserError: it has none.
        """
        if self._pretrained.tokenizer is None:
            raise UserError(f"{self._pretrained.name} has no tokenizer: give ids, or from_pretrained(tokenizer=DIR)")
        return self._pretrained.tokenizer

    def tokens(self, text: str) -> Tensor:
        """Ids of a text after one BOS, [1, s]."""
        return torch.tensor([self.tokenizer.encode(text)])

    def generate(self, prompts: str | Sequence[str] | Sequence[Sequence[int]], **options: Any) -> list[Completion]:
        """Continue prompts (texts, or ids that begin with BOS); all continuations, in the order of the prompts.

        Args:
            options: of `SamplingParams`: max_new_tokens, temperature, top_p, stop, n, num_beams, logprobs ...

        Raises:
            UserError: a prompt or an option is wrong, or hooks are active: the engine's own pass knows none.
        """
        if self._active_hooks:
            raise UserError("generate does not run hooks: leave the block, or use logits, score or hidden_states")
        try:
            params = SamplingParams(**options)
        except TypeError as error:
            raise UserError(f"generate: {str(error).removeprefix('SamplingParams.__init__() ')}") from None
        decoder = None if self._pretrained.tokenizer is None else self.tokenizer.stream
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return self._engine.complete([Request(self._ids(prompt), params, decoder) for prompt in prompts])

    def score(self, texts: str | Sequence[str | tuple[str, str]]) -> list[Score]:
        """Log-likelihoods: of whole texts after BOS, or of continuations in pairs (context, continuation).

        The tokens of a continuation are those by which the tokens of both together are more than the context's,
        so a space between the two belongs to the continuation. Hooks act on it.

        Raises:
            UserError: a text is empty or longer than the model, or something is neither a text nor a pair.
        """
        items = [self._item(text) for text in ([texts] if isinstance(texts, str) else texts)]
        scores = score(
            self.model, self.parallel, items, batch_size=self._batch_size, num_tokens=self._pretrained.num_tokens
        )
        self._raise_hook_errors()
        return scores

    @torch.no_grad()
    def logits(self, tokens: Tokens) -> Tensor:
        """[b, s, vocab_size] for ids [b, s] (or one sequence [s]); padding rows of the vocabulary included."""
        ids = self._checked(tokens)
        return self._head(self._forward(ids), ids.shape)

    def hidden_states(self, tokens: Tokens, layers: Iterable[int] | None = None) -> tuple[Tensor, ...]:
        """Hidden states by transformers' convention (`output_hidden_states`), each [b, s, hidden_size].

        0 is the embedding, k what is behind k layers, and the last, num_layers, what the head reads: behind the
        final norm too, and in 350m behind the projection to the embedding's width (only that one is narrower).

        Args:
            layers: which; negative ones count from the end. None: all, of which there are num_layers + 1.

        Raises:
            UserError: there is no such layer, or the tokens do not fit the model.
        """
        last = self.config.num_layers
        wanted = self._numbers(range(last + 1) if layers is None else layers, last + 1)
        names = [EMBEDDING, *(f"layers.{number}" for number in range(last - 1)), OUTPUT]
        found = self.capture(tokens, {names[number] for number in wanted})
        if self.config.has_embedding_projection and OUTPUT in found:
            found[OUTPUT] = self._projected(found[OUTPUT])
        return tuple(found[names[number]] for number in wanted)

    def attentions(self, tokens: Tokens, layers: Iterable[int] | None = None) -> tuple[Tensor, ...]:
        """Attention maps by transformers' convention (`output_attentions`), each [b, heads, s, s].

        Args:
            layers: which, from 0; negative ones count from the end. None: all.

        Raises:
            UserError: there is no such layer, or the tokens do not fit the model.
        """
        count = self.config.num_layers
        wanted = self._numbers(range(count) if layers is None else layers, count)
        found = self.capture(tokens, {f"layers.{number}.attention.weights" for number in wanted})
        return tuple(found[f"layers.{number}.attention.weights"] for number in wanted)

    @torch.no_grad()
    def capture(self, tokens: Tokens, names: Iterable[str]) -> dict[str, Tensor]:
        """The whole tensors at the named places (`places.py`) of one pass; each on every rank.

        Raises:
            UserError: there is no such place, or the tokens do not fit the model.
        """
        ids = self._checked(tokens)
        names = sorted({names} if isinstance(names, str) else set(names))  # in one order on all ranks
        found: dict[str, Tensor] = {}
        with self.hooks({name: _keep(found, name) for name in names}):
            self._forward(ids)
        for name in names:
            place = parse(name, self.config)
            stage = place.stage(self.config, self.parallel.pipeline_model_parallel_size)
            found[name] = self._share(found.get(name), place.shape(self.config, *ids.shape), stage)
        return found

    @contextmanager
    def hooks(self, hooks: Mapping[str, Hook]) -> Iterator[None]:
        """Within the block, call hooks at the named places (`places.py`) of every pass.

        A hook gets a copy of the whole tensor, whatever the layout; what it returns takes the tensor's place, None
        leaves it, whatever was written into the copy. It is called on all ranks of the pipeline stage that has the
        place, and must do the same on each.

        Raises:
            UserError: there is no such place, or no function for it; after a pass: a hook returned something of
                another shape, or raised an error on another rank. What it raised itself is raised where it did.
        """
        for name, hook in hooks.items():
            if not callable(hook):
                raise UserError(f"the hook at {name} must be a function, not {type(hook).__name__}")
        places = {name: parse(name, self.config) for name in hooks}
        handles = [
            attach(self.model, self.parallel, place, hooks[name], self._hook_errors) for name, place in places.items()
        ]
        if not self._active_hooks:
            self._hook_errors.clear()  # of a pass that did not come to its end
        self._active_hooks += 1
        try:
            yield
        finally:
            self._active_hooks -= 1
            for handle in handles:
                if handle is not None:
                    handle.remove()

    @torch.no_grad()
    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [b, s, vocab_size] that hidden states [b, s, H] would give behind the last layer.

        The final norm is applied, where the model has one: for states of any layer but those behind it (the
        logit lens).

        Raises:
            UserError: they are no hidden states of this model.
        """
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.size(-1) != self.config.hidden_size:
            got = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise UserError(f"hidden states must be [b, s, {self.config.hidden_size}], not {got}")
        local = None
        if self.parallel.is_last_stage:
            local = hidden.to(device=self.parallel.device, dtype=self.model.params_dtype).transpose(0, 1)
            norm = self.model.decoder.final_layernorm
            local = local if norm is None else norm(local)
        return self._head(local, hidden.shape[:2])

    @cached_property
    def _engine(self) -> Engine:
        return Engine(
            self.model, self.parallel, max_batch_size=self._batch_size, num_tokens=self._pretrained.num_tokens
        )

    def _forward(self, ids: Tensor) -> Tensor:
        hidden = stage_forward(self.model, self.parallel, ids)
        self._raise_hook_errors()
        return hidden

    def _raise_hook_errors(self) -> None:
        """After a pass with hooks: what went wrong on one rank goes wrong on all."""
        if not self._active_hooks:
            return
        errors = self._hook_errors.copy()
        self._hook_errors.clear()
        mine = None
        if errors:
            known = isinstance(errors[0], UserError)
            mine = str(errors[0]) if known else f"a hook raised {type(errors[0]).__name__}: {errors[0]}"
        messages = self.parallel.gather_objects(mine)
        if errors:
            raise errors[0]
        told = next((message for message in messages if message is not None), None)
        if told is not None:
            raise UserError(told)

    def _head(self, hidden: Tensor | None, size: Sequence[int]) -> Tensor:
        """[s, b, H] on the last stage -> [b, s, V] on every rank."""
        logits = None
        if self.parallel.is_last_stage:
            weight = self.model.shared_embedding_or_output_weight()
            logits, _ = self.model.output_layer(hidden, weight=weight, runtime_gather_output=True)
            logits = logits.transpose(0, 1)
        return self._share(logits, (*size, self.config.vocab_size), self.parallel.pipeline_model_parallel_size - 1)

    @torch.no_grad()
    def _projected(self, output: Tensor) -> Tensor:
        local = self.model.output_layer.project_out(output) if self.parallel.is_last_stage else None
        shape = (*output.shape[:2], self.config.word_embed_proj_dim)
        return self._share(local, shape, self.parallel.pipeline_model_parallel_size - 1)

    def _share(self, tensor: Tensor | None, shape: tuple[int, ...], stage: int) -> Tensor:
        """A tensor of the ranks of one stage, on every rank."""
        if self.parallel.pipeline_model_parallel_size == 1:
            return tensor
        if tensor is None:
            tensor = torch.empty(shape, dtype=self.model.params_dtype, device=self.parallel.device)
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=stage * self.parallel.pipeline_stride)
        return tensor

    def _checked(self, tokens: Tokens) -> Tensor:
        """[b, s] on the device."""
        try:
            if isinstance(tokens, list | tuple):  # rows may be tensors or arrays of their own
                tokens = [_plain(row) for row in tokens]
            ids = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"tokens must be ids, in sequences of one length: {error}") from None
        ids = ids[None] if ids.dim() == 1 else ids
        is_whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        if ids.dim() != 2 or ids.numel() == 0 or not is_whole:
            raise UserError(f"tokens must be ids [b, s] or [s], not {ids.dtype} {list(ids.shape)}")
        ids = ids.long()  # first: torch compares no unsigned numbers of 16 bits or more
        if ids.size(1) > self.config.max_position_embeddings:
            raise UserError(f"{ids.size(1)} tokens are more than the model's {self.config.max_position_embeddings}")
        if not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise UserError(f"ids go from 0 to {self.config.vocab_size - 1}, not {int(ids.min())} to {int(ids.max())}")
        return ids.to(self.parallel.device)

    def _numbers(self, layers: Iterable[int], count: int) -> list[int]:
        if not isinstance(layers, Iterable):
            raise UserError(f"layers must be numbers in a list, as in layers=[{layers}]")
        layers = list(_plain(layers))
        strange = [number for number in layers if not (isinstance(number, Integral) and -count <= number < count)]
        if strange:
            raise UserError(f"layer {strange[0]!r}: there are {count}, from 0 to {count - 1}")
        return [number % count for number in layers]

    def _ids(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt))
        ids = _plain(prompt)
        if not isinstance(ids, Sequence) or not all(isinstance(token, Integral) for token in ids):
            raise UserError(f"a prompt must be a text or a list of ids, not {repr(prompt)[:80]}")
        return tuple(ids)

    def _item(self, text: str | tuple[str, str]) -> Item:
        pair = ("", text) if isinstance(text, str) else text
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise UserError(f"what is scored must be a text or a pair (context, continuation), not {repr(text)[:80]}")
        context, continuation = pair
        before = self.tokenizer.encode(context.rstrip(" "))
        both = self.tokenizer.encode(context + continuation)
        return Item(tuple(before), tuple(both[len(before) :]))


def _plain(value: Any) -> Any:
    """Tensors and numpy's arrays and numbers as Python's."""
    return value.tolist() if hasattr(value, "tolist") else value


def _keep(found: dict[str, Tensor], name: str) -> Hook:
    def keep(tensor: Tensor) -> None:
        found[name] = tensor

    return keep
