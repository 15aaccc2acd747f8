"""`OPT`: the one front door to a model on any layout, for notebooks, scripts and this package's own commands.

    opt = OPT.from_pretrained("opt-125m")
    opt.generate("The capital of France is", max_new_tokens=8)

Every method is called on every rank with the same arguments and gives every rank the same result, unless its
description says otherwise.

There is one model. Looking into it runs its ordinary forward pass, which in float32 on one tensor parallel rank
gives transformers' values to the bit. `generate` and `stream` make an engine, which repacks the weights
(`generation/core/engine.py`); from then on the ordinary pass uses the packed ones and differs in its last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint.conversion_options import ConversionOptions
from .compression.compress import compress_pretrained
from .compression.options import CalibrationOptions
from .compression.recipe import Recipe, find_recipe
from .compression.report import CompressionReport
from .errors import UserError
from .generation.request import Completion, Request
from .generation.sampling.sampling_params import SamplingParams
from .generation.sampling.watermark_detector import WatermarkDetection, WatermarkDetector
from .generation.sampling.watermark_options import DetectionOptions
from .inputs import Tokens, layer_numbers, pair_to_item, prompt_ids, scored_pair, token_ids
from .loaded_model import LoadedModel
from .model.hook_points import Hook
from .model.inspection import Inspector
from .model.scoring import Item, Score, score
from .parallel.context import on_all_ranks
from .saving import save_weights
from .weights import Weights


class OPT(LoadedModel):
    """A model on any layout, with its tokenizer; made by `from_pretrained`, `open` or `from_model`.

    Attributes:
        pretrained: what was opened: name, config, tokenizer, checkpoint.
        batch_size: sequences in a pass of `score`, and, without engine options, that `generate` runs at a time.
    """

    _has_open_stream = False

    def tokens(self, text: str) -> Tensor:
        """Ids of a text after one BOS, [1, s]."""
        return torch.tensor([self.tokenizer.encode(text)])

    def generate(self, prompts: str | Sequence[str] | Sequence[Sequence[int]], **options: Any) -> list[Completion]:
        """Continue prompts (texts, or ids that begin with BOS); all continuations, in the order of the prompts.

        Args:
            options: of `SamplingParams`: max_new_tokens, temperature, top_p, stop, n, num_beams, logprobs ...

        Raises:
            UserError: a prompt or an option is wrong, or hooks are active: the engine's own pass does not run them.
        """
        params = self._params("generate", options)
        self._check_no_open_stream()
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return self.engine.complete([self.request(prompt, params) for prompt in prompts])

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Iterator[str]:
        """Continue a prompt (a text, or ids that begin with BOS) and give the text in pieces, as it is generated.

            for piece in opt.stream("Once upon a time", max_new_tokens=50):
                print(piece, end="", flush=True)

        Every rank reads the same pieces. Closing the iterator, or dropping it, ends the generation; on several ranks
        every rank does so after the same piece. Until then `generate` and other streams are refused.

        Args:
            options: of `SamplingParams`, as for `generate`; `n` must be 1.

        Raises:
            UserError: the prompt or an option is wrong, there is no tokenizer, or hooks are active.
        """
        params = self._params("stream", options)
        if params.n != 1:
            raise UserError(f"stream gives one continuation, but n is {params.n}: use generate")
        if self.pretrained.tokenizer is None:
            raise UserError(f"{self.name} has no tokenizer to make text of ids: use generate")
        request = self.request(prompt, params)
        self.engine.check(request)  # at once, and not when the first piece is read
        return self._pieces(request)

    def _pieces(self, request: Request) -> Iterator[str]:
        self._check_no_open_stream()
        self._has_open_stream = True
        try:
            yield from self.engine.stream(request)
        finally:
            self._has_open_stream = False

    def _check_no_open_stream(self) -> None:
        if self._has_open_stream:
            raise UserError("a stream is open: read it to its end, or close it")

    def request(self, prompt: str | Sequence[int], params: SamplingParams) -> Request:
        """A prompt (text, or ids that begin with BOS) for the engine.

        Raises:
            UserError: it is neither, or a text without a tokenizer.
        """
        ids = tuple(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt_ids(prompt)
        if self.pretrained.tokenizer is None:
            return Request(ids, params)
        bad_word_ids = self.tokenizer.bad_word_ids(params.bad_words)
        params = replace(params, sentence_end_tokens=self._sentence_ends, bad_word_ids=bad_word_ids)
        return Request(ids, params, self.tokenizer.stream)

    def score(self, texts: str | Sequence[str | tuple[str, str]]) -> list[Score]:
        """Log-likelihoods: of whole texts after BOS, or of continuations in pairs (context, continuation).

        The tokens of a continuation are those by which the tokens of both together are more than the context's,
        so a space between the two belongs to the continuation. Hooks act on it.

        Raises:
            UserError: a text is empty or longer than the model, or something is neither a text nor a pair.
        """
        pairs = [scored_pair(text) for text in ([texts] if isinstance(texts, str) else texts)]
        return self.score_items([pair_to_item(*pair, self.tokenizer) for pair in pairs])

    def score_items(
        self, items: Sequence[Item], *, batch_size: int | None = None, on_batch: Callable[[int], object] | None = None
    ) -> list[Score]:
        """`score` for continuations that are ids.

        Args:
            batch_size: sequences in a pass; by default the object's.
            on_batch: called with the number of items of each finished batch.

        Raises:
            UserError: an item does not fit the model.
        """
        scores = score(
            self.model,
            self.parallel,
            items,
            batch_size=self.batch_size if batch_size is None else batch_size,
            on_batch=on_batch,
        )
        self._inspector.raise_hook_errors()
        return scores

    def detect(self, texts: str | Sequence[str] | Sequence[Sequence[int]], **options: Any) -> list[WatermarkDetection]:
        """Whether texts (or their ids, as `generate` takes prompts) without their prompts carry a watermark.

            options = {"watermark_key": 271828183}
            text = opt.generate("The king", max_new_tokens=100, watermark_delta=2.0, **options)[0].text
            opt.detect(text, **options)[0].z_score

        Args:
            options: of `DetectionOptions`: the key, gamma, scheme and vocabulary that generated the texts, the
                threshold ...

        Raises:
            UserError: a text has too few tokens, or an option is wrong.
        """
        try:
            detector = WatermarkDetector(DetectionOptions(**options), self.config.vocab_size, self.config.bos_token_id)
        except TypeError as error:
            raise UserError(f"detect: {str(error).removeprefix('DetectionOptions.__init__() ')}") from None
        found = []
        items: Sequence[str | Sequence[int]] = [texts] if isinstance(texts, str) else texts
        for number, text in enumerate(items, 1):
            ids = self.tokenizer.encode(text, add_bos=False) if isinstance(text, str) else prompt_ids(text)
            self.config.check_token_ids(ids, f"text {number}")
            found.append(detector.detect(ids, f"text {number}"))
        return found

    def logits(self, tokens: Tokens) -> Tensor:
        """[b, s, vocab_size] for ids [b, s] (or one sequence [s]); padding rows of the vocabulary included."""
        return self._inspector.logits(self._ids(tokens))

    def hidden_states(self, tokens: Tokens, layers: Iterable[int] | None = None) -> tuple[Tensor, ...]:
        """Hidden states by transformers' convention (`output_hidden_states`), each [b, s, hidden_size].

        0 is the embedding, k the output of the first k layers, and the last, num_layers, what the head reads: after
        the final norm too, and in 350m after the projection to the embedding's width (only that one is narrower).

        Args:
            layers: which; negative ones count from the end. None: all, of which there are num_layers + 1.

        Raises:
            UserError: there is no such layer, or the tokens do not fit the model.
        """
        return self._inspector.hidden_states(self._ids(tokens), layer_numbers(layers, self.config.num_layers + 1))

    def attentions(self, tokens: Tokens, layers: Iterable[int] | None = None) -> tuple[Tensor, ...]:
        """Attention maps by transformers' convention (`output_attentions`), each [b, heads, s, s].

        Args:
            layers: which, from 0; negative ones count from the end. None: all.

        Raises:
            UserError: there is no such layer, or the tokens do not fit the model.
        """
        return self._inspector.attentions(self._ids(tokens), layer_numbers(layers, self.config.num_layers))

    def capture(self, tokens: Tokens, names: Iterable[str]) -> dict[str, Tensor]:
        """The whole tensors at the named hook points (`model/hook_points.py`) of one pass.

        Raises:
            UserError: there is no such hook point, or the tokens do not fit the model.
        """
        return self._inspector.capture(self._ids(tokens), names)

    def hooks(self, hooks: Mapping[str, Hook]) -> AbstractContextManager[None]:
        """Within the block, call hooks at the named hook points (`model/hook_points.py`) of every pass.

        A hook gets a copy of the whole tensor, whatever the layout. What it returns replaces the tensor; None
        leaves the tensor as it is, whatever was written into the copy. It is called on all ranks of the pipeline
        stage that has the hook point, and must do the same on each.

        Raises:
            UserError: there is no such hook point, or no function for it; after a pass: a hook returned something of
                another shape, or raised an error on another rank. What it raised itself is raised where it did.
        """
        return self._inspector.hooks(hooks)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [b, s, vocab_size] that hidden states [b, s, H] would give after the last layer.

        The final norm is applied, where the model has one: for the states of any layer but the last (the logit
        lens).

        Raises:
            UserError: they are no hidden states of this model.
        """
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.size(-1) != self.config.hidden_size:
            got = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise UserError(f"hidden states must be [b, s, {self.config.hidden_size}], not {got}")
        return self._inspector.unembed(hidden)

    @cached_property
    def weights(self) -> Weights:
        """The weights, to be read and written as whole tensors: `opt.weights["model.decoder.layers.0.fc1.weight"]`."""
        return Weights(self.model, self.parallel)

    def save(
        self,
        directory: str | Path,
        to: str = "hf",
        *,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        dtype: str | None = None,
        force: bool = False,
    ) -> None:
        """Write the weights as they are now, with config and tokenizer, as `opt-megatron convert` writes checkpoints.

        Args:
            to: "hf", "megatron", "metaseq" or "flagai".
            tensor_model_parallel_size, pipeline_model_parallel_size: of Megatron's directory (metaseq's and FlagAI's
                parts), whatever the layout of this object.
            dtype: cast to it; by default the weights' own.
            force: replace a directory that is a checkpoint already.

        Raises:
            UserError: the weights are quantised, an option is wrong, or the directory cannot be written; the same one
                on every rank.
        """
        options = ConversionOptions(
            to=to,
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            dtype=dtype,
        )
        save_weights(self.weights, self.pretrained, Path(directory).expanduser(), options, force=force)

    def compress(
        self,
        directory: str | Path,
        recipe: str | Recipe | Mapping[str, Any] | Sequence[Any],
        calibration: CalibrationOptions | None = None,
        *,
        to: str = "hf",
        dtype: str | None = None,
        force: bool = False,
        resume: bool = False,
        on_linears: Callable[[int], object] = lambda count: None,
    ) -> CompressionReport:
        """Write a smoothed, pruned or quantised copy of the checkpoint that this was opened from, and its report.

            opt.compress("opt-125m-gptq4", "gptq4-g128", CalibrationOptions(calibration_data="train.jsonl"))

        The checkpoint is read layer by layer; nothing is loaded into this object, and what was changed in `weights` is
        not part of it. The layout may have data parallel ranks, too.

        Args:
            recipe: a ready recipe's name, a YAML file, or the steps, as [{"quantize": {"bits": 4}}].
            calibration: which samples; not needed for recipes of rounding to nearest or magnitude pruning.
            to: "hf", weights as floats that every program loads, or "gptq", integers in GPTQ's published layout.
            dtype: of the floats that are written; by default the checkpoint's.
            force: replace a directory that is a checkpoint already.
            resume: continue what an interrupted run with the same source and settings has written.
            on_linears: called with the number of linear layers finished since its last call, six in a decoder layer.

        Raises:
            UserError: of any kind; the same one on every rank.
        """
        return compress_pretrained(
            self.pretrained,
            Path(directory).expanduser(),
            on_all_ranks(self.parallel, lambda: find_recipe(recipe)),
            calibration or CalibrationOptions(),
            to=to,
            dtype=dtype,
            force=force,
            resume=resume,
            on_linears=on_linears,
        )

    @cached_property
    def _inspector(self) -> Inspector:
        return Inspector(self.model, self.parallel)

    @cached_property
    def _sentence_ends(self) -> tuple[int, ...]:
        return self.tokenizer.sentence_end_tokens()

    def _ids(self, tokens: Tokens) -> Tensor:
        return token_ids(tokens, self.config).to(self.parallel.device)

    def _params(self, method: str, options: dict[str, Any]) -> SamplingParams:
        if self._inspector.has_hooks:
            raise UserError(f"{method} does not run hooks: leave the block, or use logits, score or hidden_states")
        try:
            return SamplingParams(**self.pretrained.generation_config.with_defaults(options))
        except TypeError as error:
            raise UserError(f"{method}: {str(error).removeprefix('SamplingParams.__init__() ')}") from None
