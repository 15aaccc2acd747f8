"""FlagAI's interface to OPT: its scripts run after a change of their imports alone.

    from opt_megatron.flagai import AutoLoader, Predictor, mpu

The semantics are FlagAI's (one prompt, only the continuation is returned, the filters in its order), except for
defects: integer and zero temperatures, sequences longer than the model's positions, ranks that sampled
independently, and a lost first token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .api import OPT
from .checkpoint.formats.registry import is_checkpoint
from .errors import UserError, print_notice
from .model.opt_model import OPTModel
from .parallel.context import (
    ParallelContext,
    current_context,
    device_in_use,
    init_parallel,
    seed_everything,
    shut_down_at_exit,
)
from .parallel.core_compat import prepare_megatron
from .tokenizer import OPTTokenizer

__all__ = ["AutoLoader", "Predictor", "mpu"]


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


class AutoLoader:
    """Finds a model by name and loads this rank's part of it.

    Args:
        task_name: "lm", the only task of OPT.
        model_name: a released size as FlagAI writes it (`opt-125m-en`), or anything that --load takes.
        model_dir: where to look first: `model_dir/model_name`, or `model_dir` itself where it is a checkpoint.

    Raises:
        UserError: another task, or no such model.
    """

    def __init__(
        self,
        task_name: str = "lm",
        model_name: str = "opt-125m-en",
        model_dir: str | None = None,
        **unused: Any,
    ) -> None:
        if task_name != "lm":
            raise UserError(f"task {task_name!r}: OPT is a language model, its task is 'lm'")
        self._opt = OPT.open(_local_name(model_name, model_dir), _context())

    def get_model(self) -> OPTModel:
        """The model, loaded on the first call: float32 on a CPU, the checkpoint's dtype on a GPU."""
        return self._opt.model

    def get_tokenizer(self) -> OPTTokenizer:
        """The tokenizer that was found with the weights.

        Raises:
            CheckpointError: there is none.
        """
        return self._opt.pretrained.require_tokenizer()


class Predictor:
    """Continues text with a model and tokenizer of AutoLoader."""

    def __init__(self, model: OPTModel, tokenizer: OPTTokenizer) -> None:
        self._tokenizer = tokenizer
        self._opt = OPT.from_model(model, current_context(), tokenizer, batch_size=1)

    def predict_generate_randomsample(
        self,
        text: str,
        input_max_length: int = 256,
        out_max_length: int = 200,
        top_k: int = 30,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
    ) -> str:
        """The continuation of `text`, the same on every rank; called on every rank.

        The random numbers come from torch's generator, so `torch.manual_seed` repeats a result.

        Args:
            input_max_length: tokens of the text that are used; the others are dropped at its end.
            out_max_length: new tokens at most, and fewer where the model has no more positions.

        Raises:
            UserError: a length is below 1, or the text leaves no position for a new token.
        """
        if input_max_length < 1 or out_max_length < 1:
            raise UserError(
                f"input_max_length is {input_max_length} and out_max_length {out_max_length}; both must be at least 1"
            )
        prompt = self._tokenizer.encode(text, add_bos=False)[:input_max_length]
        prompt = [self._tokenizer.bos_token_id, *prompt]
        unknown = self._tokenizer.unk_token_id
        completions = self._opt.generate(
            [prompt],
            max_new_tokens=self._within_positions(len(prompt), out_max_length),
            temperature=float(temperature),
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=float(repetition_penalty),
            seed=int(torch.randint(2**63 - 1, ())),
            log_probabilities=True,
            banned_tokens=() if unknown is None else (unknown,),
        )
        return completions[0].text

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


def _context() -> ParallelContext:
    """The context of the groups that the script made, or else of a single process."""
    if _parallel_state().model_parallel_is_initialized():
        return current_context()
    return init_parallel()


def _local_name(model_name: str, model_dir: str | None) -> str:
    for directory in (Path(model_dir) / model_name, Path(model_dir)) if model_dir else ():
        if directory.is_dir() and is_checkpoint(directory):
            return str(directory)
    return model_name
