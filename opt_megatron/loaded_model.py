"""The part of `OPT` that loads: from a name to ranks, an opened checkpoint, its weights, and an engine.

Loading is lazy: `open` reads no weights, and the engine is created when it is first used.
"""

from __future__ import annotations

from functools import cached_property
from typing import Self

from .checkpoint.load import load_model, open_on_all_ranks
from .config import OPTConfig
from .errors import UserError
from .generation.core.engine import Engine
from .generation.engine_options import EngineOptions
from .model.opt_model import OPTModel
from .model.scoring import check_batch_size
from .parallel.agreement import check_same_on_all_ranks
from .parallel.context import ParallelContext
from .pretrained import Pretrained, open_pretrained, start_parallel
from .tokenizer import OPTTokenizer


class LoadedModel:
    """A model on any layout with its tokenizer and its engine; the part of `OPT` that loads.

    Attributes:
        pretrained: what was opened: name, config, tokenizer, checkpoint.
        batch_size: sequences in a pass of `score`, and, without engine options, that `generate` runs at a time.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        model: OPTModel | None = None,
        *,
        dtype: str = "auto",
        quantization: str | None = None,
        batch_size: int = 8,
        engine: EngineOptions | None = None,
    ) -> None:
        check_batch_size(batch_size)
        self.pretrained = pretrained
        self.batch_size = batch_size
        self._model = model
        self._dtype, self._quantization = dtype, quantization
        self._engine_options = EngineOptions(max_batch_size=batch_size) if engine is None else engine

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
        adapter: str | None = None,
        config: OPTConfig | None = None,
        tokenizer: str | None = None,
        use_generation_config: bool = True,
        quantization: str | None = None,
        batch_size: int = 8,
        engine: EngineOptions | None = None,
        seed: int = 1234,
    ) -> Self:
        """Load a checkpoint in any format, at any layout; on several ranks under torchrun, on each of them.

        Args:
            name_or_dir: as for --load: a directory, a released size, a Hub repository, or "story".
            dtype: float32, float16, bfloat16, or auto: the checkpoint's on a GPU; float32 on a CPU, where weights of 16
                bits are kept as they are and computed with in float32.
            device: "cpu" or "cuda"; by default CUDA where there is one.
            adapter: a LoRA adapter of peft, a directory or a Hub repository, which is added to the weights.
            config: used instead of the checkpoint's own.
            tokenizer: where its files are; by default next to the weights. Without one, prompts are ids.
            use_generation_config: end texts, suppress tokens and sample as the checkpoint's generation_config.json says
                where `generate` and `stream` are not told otherwise.
            quantization: "int8" or "int4" (also "int4-g32" and so on, by the inputs that share a scale); weights are
                quantised while they are loaded.
            batch_size: sequences that `score` and `generate` run at a time.
            engine: options of the engine of `generate`, a draft model among them.

        Raises:
            UserError: of any kind; the same one on every rank.
        """
        tp, pp = tensor_model_parallel_size, pipeline_model_parallel_size
        return cls.open(
            name_or_dir,
            start_parallel(tp, pp, dtype=dtype, device=device, seed=seed),
            dtype=dtype,
            revision=revision,
            adapter=adapter,
            config=config,
            tokenizer=tokenizer,
            use_generation_config=use_generation_config,
            quantization=quantization,
            batch_size=batch_size,
            engine=engine,
        ).load()

    @classmethod
    def open(
        cls,
        name_or_dir: str,
        parallel: ParallelContext,
        *,
        dtype: str = "auto",
        revision: str | None = None,
        adapter: str | None = None,
        config: OPTConfig | None = None,
        tokenizer: str | None = None,
        needs_tokenizer: bool = False,
        use_generation_config: bool = True,
        quantization: str | None = None,
        batch_size: int = 8,
        engine: EngineOptions | None = None,
    ) -> Self:
        """`from_pretrained` on ranks that have been started, without reading the weights, which `load` does.

        Arguments can so be checked against config and tokenizer before the weights are read, which may take long.

        Args:
            needs_tokenizer: a missing tokenizer is an error.

        Raises:
            UserError: of any kind; the same one on every rank.
        """
        pretrained = open_pretrained(
            name_or_dir,
            parallel,
            revision=revision,
            adapter=adapter,
            config=config,
            tokenizer=tokenizer,
            needs_tokenizer=needs_tokenizer,
            use_generation_config=use_generation_config,
        )
        opened = cls(pretrained, dtype=dtype, quantization=quantization, batch_size=batch_size, engine=engine)
        check_same_on_all_ranks(parallel.control_group, opened._options_and_tokenizer())
        return opened

    def _options_and_tokenizer(self) -> dict[str, object]:
        """What must be the same on all ranks besides the checkpoint, by name."""
        tokenizer, engine = self.pretrained.tokenizer, vars(self._engine_options)
        return {
            "dtype": self._dtype,
            "quantization": self._quantization,
            "batch_size": self.batch_size,
            **engine,
            "draft_model": "none" if engine["draft_model"] is None else "given",  # compared when it is opened
            "tokenizer": None if tokenizer is None else tokenizer.identity(),
            "generation_config.json": self.pretrained.generation_config,
        }

    @classmethod
    def from_model(
        cls,
        model: OPTModel,
        parallel: ParallelContext,
        tokenizer: OPTTokenizer | None = None,
        *,
        batch_size: int = 8,
        engine: EngineOptions | None = None,
    ) -> Self:
        """An `OPT` around a model whose weights are loaded already."""
        pretrained = Pretrained("the model", parallel, model.opt_config, tokenizer)
        return cls(pretrained, model, batch_size=batch_size, engine=engine)

    def load(self) -> Self:
        """Read the weights, unless they have been read; returns the object itself.

        Raises:
            CheckpointError: the checkpoint turned out to be damaged; on every rank.
        """
        if self._model is None:
            self._model = self.pretrained.load_model(self._dtype, quantization=self._quantization)
        return self

    @property
    def model(self) -> OPTModel:
        """This rank's part of the model, loaded if it was not."""
        model = self.load()._model
        assert model is not None
        return model

    @property
    def name(self) -> str:
        """The name or directory that it was opened by."""
        return self.pretrained.name

    @property
    def config(self) -> OPTConfig:
        """The model's architecture."""
        return self.pretrained.config

    @property
    def parallel(self) -> ParallelContext:
        """The layout, and this rank's part in it."""
        return self.pretrained.parallel

    @property
    def tokenizer(self) -> OPTTokenizer:
        """The model's tokenizer.

        Raises:
            UserError: it has none.
        """
        if self.pretrained.tokenizer is None:
            raise UserError(f"{self.name} has no tokenizer: give ids, or from_pretrained(tokenizer=DIR)")
        return self.pretrained.tokenizer

    @cached_property
    def engine(self) -> Engine:
        """The engine of `generate`, made when first used. It repacks the model's weights.

        Raises:
            UserError: an option is out of its range, or the draft model cannot be loaded or does not fit.
        """
        options, draft_model = self._engine_options, None
        model = self.model
        if options.draft_model is not None:
            checkpoint = open_on_all_ranks(options.draft_model, self.parallel)
            draft_model = load_model(checkpoint, None, self.parallel, self._dtype, quantization=self._quantization)
        return Engine(
            model,
            self.parallel,
            max_batch_size=options.max_batch_size,
            kv_cache_memory=options.kv_cache_memory,
            prefill_chunk_size=options.prefill_chunk_size,
            eos_token_ids=self.pretrained.eos_token_ids,
            suppress_tokens=self.pretrained.suppress_tokens,
            draft_model=draft_model,
            prompt_lookup=options.prompt_lookup,
            num_speculative_tokens=options.num_speculative_tokens,
            cuda_graphs=options.cuda_graphs,
            kv_cache_dtype=options.kv_cache_dtype,
            skip_silent_neurons=options.skip_silent_neurons,
        )
