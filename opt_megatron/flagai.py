"""FlagAI's interface to OPT: its scripts run after a change of their imports alone.

    from opt_megatron.flagai import AutoLoader, Predictor, mpu

The semantics are FlagAI's (one prompt, only the continuation is returned, the filters in its order), except for
defects: integer and zero temperatures, sequences longer than the model's positions, ranks that sampled
independently, and a lost first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .api import OPT
from .checkpoint.formats.registry import is_checkpoint
from .checkpoint.load import resolve_dtype
from .config import OPTConfig, dtype_name
from .errors import UserError, print_notice
from .generation.engine_options import EngineOptions
from .generation.sampling.sampling_params import MOST_ROWS
from .model.opt_model import OPTModel, build_model
from .parallel.context import (
    ParallelContext,
    current_context,
    device_in_use,
    init_parallel,
    on_all_ranks,
    seed_everything,
    shut_down_at_exit,
)
from .parallel.core_compat import prepare_megatron
from .tokenizer import OPTTokenizer
from .training.init_weights import init_weights

__all__ = ["AutoLoader", "Predictor", "mpu"]

_TASKS = ("lm", "seq2seq")


class mpu:
    """The functions of FlagAI's `mpu` that its OPT scripts call, implemented by Megatron-core's parallel state."""

    @staticmethod
    def initialize_model_parallel(model_parallel_size: int) -> None:
        """Make tensor parallel groups of this size; torch.distributed must have been initialised.

        Raises:
            UserError: it has not been.
        """
        if not dist.is_initialized():
            raise UserError("call torch.distributed.init_process_group before mpu.initialize_model_parallel")
        prepare_megatron(device_in_use())
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=model_parallel_size)
        shut_down_at_exit()  # FlagAI's scripts do not

    @staticmethod
    def model_parallel_cuda_manual_seed(seed: int) -> None:
        """Seed Python, numpy, torch and Megatron's model-parallel random states."""
        seed_everything(seed)

    @staticmethod
    def get_model_parallel_group() -> dist.ProcessGroup:
        """The tensor parallel group of this rank."""
        return _parallel_state().get_tensor_model_parallel_group()

    @staticmethod
    def get_model_parallel_rank() -> int:
        """This process's rank in its tensor parallel group."""
        return _parallel_state().get_tensor_model_parallel_rank()

    @staticmethod
    def get_model_parallel_world_size() -> int:
        """The size of the tensor parallel group."""
        return _parallel_state().get_tensor_model_parallel_world_size()


class FlagAITokenizer(OPTTokenizer):
    """OPT's tokenizer with FlagAI's `encode_plus`."""

    def encode_plus(
        self, source_text: str, truncation: bool = True, max_length: int | None = None
    ) -> dict[str, list[int]]:
        """BOS and the ids of a text, as FlagAI gives them for OPT (`prepare_for_model`).

        Args:
            truncation: keep the first `max_length` ids of the text, beside BOS.

        Returns:
            `input_ids`, and as many zeros as `token_type_ids`.
        """
        ids = self.encode(source_text)
        if truncation and max_length is not None:
            ids = ids[: max_length + 1]
        return {"input_ids": ids, "token_type_ids": [0] * len(ids)}


class AutoLoader:
    """Finds a model by name and loads this rank's part of it.

    Args:
        task_name: "lm" or "seq2seq", which are the same model.
        model_name: a released size as FlagAI writes it (`opt-125m-en`), or anything that --load takes.
        model_dir: where to look first: `model_dir/model_name`, or `model_dir` itself where it is a checkpoint.
        only_download_config: read the config alone; the weights are OPT's initial ones.
        device: "cpu" or "cuda"; by default CUDA where there is one.
        torch_dtype: of the weights; by default float32 on a CPU and the checkpoint's on a GPU.
        low_cpu_mem_usage: without effect: weights are read tensor by tensor in any case.
        lora_dir: an adapter of peft, which is added to the weights.

    Raises:
        UserError: another task, no such model, or another device than that of the script's groups.
    """

    def __init__(
        self,
        task_name: str = "lm",
        model_name: str = "opt-125m-en",
        model_dir: str | None = "./checkpoints/",
        only_download_config: bool = False,
        device: str | torch.device | None = None,
        torch_dtype: torch.dtype | str | None = None,
        low_cpu_mem_usage: bool = True,
        lora_dir: str | None = None,
    ) -> None:
        if task_name not in _TASKS:
            raise UserError(f"task {task_name!r}: OPT's tasks are {' and '.join(map(repr, _TASKS))}")
        name = _local_name(model_name, model_dir)
        parallel = _context(None if device is None else torch.device(device).type)
        dtype = "auto" if torch_dtype is None else dtype_name(torch_dtype)
        if only_download_config and (Path(name) / "config.json").is_file():  # there need be no weights
            self._files = Path(name)
            config = on_all_ranks(parallel, lambda: OPTConfig.from_directory(self._files))
        else:
            opt = OPT.open(name, parallel, dtype=dtype, adapter=lora_dir)
            assert opt.pretrained.checkpoint is not None
            self._files, config = opt.pretrained.checkpoint.path, opt.config
        self._load = (lambda: _initial_model(config, parallel, dtype)) if only_download_config else lambda: opt.model
        self._model: OPTModel | None = None

    def get_model(self) -> OPTModel:
        """The model, loaded on the first call."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def get_tokenizer(self) -> FlagAITokenizer:
        """The tokenizer that was found with the weights or the config.

        Raises:
            CheckpointError: there is none.
        """
        return FlagAITokenizer.from_directory(self._files)


class Predictor:
    """Continues text with a model and tokenizer of AutoLoader."""

    def __init__(self, model: OPTModel, tokenizer: OPTTokenizer) -> None:
        self._tokenizer = tokenizer
        engine = EngineOptions(max_batch_size=MOST_ROWS)  # of one prompt: beams, candidates
        self._opt = OPT.from_model(model, current_context(), tokenizer, engine=engine)

    def predict_generate_randomsample(
        self,
        text: str,
        input_max_length: int = 256,
        out_max_length: int = 200,
        top_k: int = 30,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        prompts_tokens: Sequence[Sequence[int]] | None = None,
    ) -> str:
        """A sampled continuation of `text`, the same on every rank; called on every rank.

        The random numbers come from torch's generator, so `torch.manual_seed` repeats a result.

        Args:
            input_max_length: tokens of the text that are used; the others are dropped at its end.
            out_max_length: new tokens at most, and fewer where the model has no more positions.
            prompts_tokens: a list of one prompt's ids, BOS included, which are used instead of the text's.

        Raises:
            UserError: a length is below 1, or the text leaves no position for a new token.
        """
        if prompts_tokens is not None and len(prompts_tokens) != 1:
            raise UserError(f"prompts_tokens has {len(prompts_tokens)} prompts; one text is returned: give one")
        unknown = self._tokenizer.unk_token_id
        return self._continue(
            text if prompts_tokens is None else prompts_tokens[0],
            input_max_length,
            out_max_length,
            temperature=float(temperature),
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=float(repetition_penalty),
            seed=int(torch.randint(2**63 - 1, ())),
            log_probabilities=True,
            banned_tokens=() if unknown is None else (unknown,),
        )

    def predict_generate_beamsearch(
        self, text: str, input_max_length: int = 256, out_max_length: int = 100, beam_size: int = 1
    ) -> str:
        """The best continuation of a beam search; with one beam the greedy one. Otherwise as for random samples."""
        return self._continue(text, input_max_length, out_max_length, temperature=0.0, num_beams=beam_size)

    def predict_generate_contrastive_search(
        self, text: str, input_max_length: int = 256, out_max_length: int = 100, beam_size: int = 1
    ) -> str:
        """The continuation by contrastive search among `beam_size` candidates, with FlagAI's alpha of 0.6.

        With one candidate the greedy one. The similarities are of hidden states, as in the paper (Su et al. 2022,
        arXiv:2202.06417); FlagAI's are of logits. Otherwise as for random samples.
        """
        if beam_size < 1:
            raise UserError(f"beam_size is {beam_size}, but must be at least 1")
        options: dict[str, Any] = {"penalty_alpha": 0.6, "top_k": beam_size} if beam_size > 1 else {"temperature": 0.0}
        return self._continue(text, input_max_length, out_max_length, **options)

    def _continue(self, prompt: str | Sequence[int], input_max_length: int, out_max_length: int, **options: Any) -> str:
        if input_max_length < 1 or out_max_length < 1:
            raise UserError(
                f"input_max_length is {input_max_length} and out_max_length {out_max_length}; both must be at least 1"
            )
        if isinstance(prompt, str):
            prompt = self._tokenizer.encode(prompt)[: input_max_length + 1]  # BOS is beside them
        max_new_tokens = self._within_positions(len(prompt), out_max_length)
        return self._opt.generate([list(prompt)], max_new_tokens=max_new_tokens, **options)[0].text

    def _within_positions(self, prompt_length: int, out_max_length: int) -> int:
        room = self._opt.config.max_position_embeddings - prompt_length
        if room < 1:
            raise UserError(
                f"the text has {prompt_length} tokens and the model {self._opt.config.max_position_embeddings} "
                f"positions: lower input_max_length to {self._opt.config.max_position_embeddings - 2} or less"
            )
        if out_max_length > room and dist.get_rank() == 0:
            print_notice(f"out_max_length {out_max_length} is cut to the {room} positions left")
        return min(out_max_length, room)


def _parallel_state() -> Any:
    from megatron.core import parallel_state

    return parallel_state


def _context(device: str | None) -> ParallelContext:
    """The context of the groups that the script made, or else of a single process.

    Raises:
        UserError: the groups are another device's.
    """
    if not _parallel_state().model_parallel_is_initialized():
        return init_parallel(device=device)
    context = current_context()
    if device not in (None, context.device.type):
        raise UserError(f"device is {device}, but torch.distributed was initialised for {context.device.type}")
    return context


def _initial_model(config: OPTConfig, parallel: ParallelContext, dtype: str) -> OPTModel:
    """This rank's part of a model with OPT's initial weights, which torch's seed repeats."""
    model = build_model(config, parallel, resolve_dtype(dtype, config, parallel.device))
    init_weights(model, config, parallel, parallel.broadcast_object(torch.initial_seed() % 2**31))
    return model.requires_grad_(False)


def _local_name(model_name: str, model_dir: str | None) -> str:
    for directory in (Path(model_dir) / model_name, Path(model_dir)) if model_dir else ():
        if directory.is_dir() and (is_checkpoint(directory) or (directory / "config.json").is_file()):
            return str(directory)
    return model_name
