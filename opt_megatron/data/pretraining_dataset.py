"""Blocks of tokens for pre-training: megatron-core's GPTDataset and its blends behind one function.

Documents are shuffled, concatenated and cut into blocks of `seq_length + 1` (input and shifted target); loss and
attention cross document borders, as in OPT's recipe. The order is a function of the data, the seed, the sequence
length and the number of training samples (core shuffles the epochs of a run together), so a resumed run must
ask for the same number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import UserError
from ..parallel.agreement import check_same_on_all_ranks
from ..parallel.context import ParallelContext, check_seed, on_all_ranks
from ..parallel.core_compat import import_core
from .blend import Blend, read_blends
from .index_cache import IndexCache, open_cache, resolved
from .indexed_dataset import outside_vocabulary
from .options import DataOptions


class PretrainingDataset(torch.utils.data.Dataset):
    """Samples by number: tokens, labels, position_ids (int64) and loss_mask (float32), each [s].

    Labels that are `pad` have no loss. The length is the number of samples that was asked for.
    """

    def __init__(self, samples: Any, length: int, vocab_size: int, pad: int) -> None:
        self._samples, self._length = samples, length
        self._vocab_size, self._pad = vocab_size, pad

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sample.

        Raises:
            UserError: a token id that the model does not have, and that the check of the files has not found.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        sample = self._samples[index]
        tokens, labels = sample["tokens"], sample["labels"]
        highest = int(max(tokens.max(), labels[-1]))
        if highest >= self._vocab_size:
            raise UserError(outside_vocabulary(f"sample {index} of the training data", highest, self._vocab_size))
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": (labels != self._pad).float(),
            "position_ids": sample["position_ids"],
        }


def build_datasets(
    options: DataOptions,
    parallel: ParallelContext,
    *,
    num_train_samples: int,
    num_valid_samples: int | None,
    seq_length: int,
    seed: int,
    vocab_size: int,
    eod: int = 2,
    pad: int = 1,
) -> tuple[PretrainingDataset, PretrainingDataset | None]:
    """The training and the validation set. Collective; rank 0 checks the files and builds the indices.

    Args:
        num_train_samples: sequences of the whole run, over as many epochs as that takes.
        num_valid_samples: the same for validation; 0 is no validation, None is one pass over all of it.
        seq_length: tokens of a sample; each is cut out of the data with one more for the last label.
        vocab_size: rows of the model's embedding, which the token ids are checked against.
        eod, pad: ids of the tokenizer; a label `pad` has no loss.

    Raises:
        UserError: options that contradict each other, files that are missing, damaged or hold too little,
            token ids that the model does not have, or indices that cannot be written. The same on every rank.
    """
    check_seed(seed)
    if seq_length < 1:
        raise UserError(f"--seq-length is {seq_length}, but must be at least 1")
    import_core()

    def prepare() -> tuple[list[Blend], IndexCache] | None:
        if not parallel.is_leader:
            return None
        blends = read_blends(options, num_train_samples, num_valid_samples)
        return open_cache(options, blends, seq_length, seed, vocab_size)

    blends, cache = parallel.broadcast_object(on_all_ranks(parallel, prepare))
    try:
        facts = on_all_ranks(parallel, lambda: cache.check_shared(blends))
        check_same_on_all_ranks(parallel.control_group, facts)
        tokenizer = _TokenizerInterface(vocab_size, eod)
        built = [_build(blend, cache.path, tokenizer, seq_length, seed, pad) for blend in blends]
        dist.barrier(group=parallel.control_group)  # all ranks have opened the indices: they may be renamed
        if parallel.is_leader:
            cache.publish()
    finally:
        if parallel.is_leader:
            cache.remove_unpublished()
    return built[0], built[1] if len(built) > 1 else None


class _TokenizerInterface:
    """What megatron-core's datasets need of a tokenizer.

    `pad` is not a token id: core would replace padding tokens by id 0, and change its cached loss mask for good.
    """

    pad = -1

    def __init__(self, vocab_size: int, eod: int) -> None:
        self.vocab_size, self.eod, self.eos = vocab_size, eod, eod
        self.unique_identifiers = {"vocab_size": vocab_size, "eod": eod}  # part of the names of cached indices


def _build(
    blend: Blend, cache: Path, tokenizer: _TokenizerInterface, seq_length: int, seed: int, pad: int
) -> PretrainingDataset:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    weights = None if blend.weights is None else list(blend.weights)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=([resolved(prefix) for prefix in blend.prefixes], weights),
        split=blend.split,
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    config.split_matrix = [share if n == blend.index else None for n, share in enumerate(config.split_matrix)]
    sizes: list[int | None] = [0, 0, 0]
    sizes[blend.index] = blend.num_samples
    if weights is not None and blend.num_samples is not None:
        # Rounding up adds up to one sample for each corpus, which the largest corpus may have to provide alone.
        config.mid_level_dataset_surplus += 2 * len(blend.prefixes) / blend.num_samples
    try:
        samples = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[blend.index]
    except Exception as error:  # core wraps an OSError in a bare Exception
        if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
            reason = error if isinstance(error, OSError) else error.__cause__
            raise UserError(f"{cache}: the indices of the data cannot be written or read: {reason}") from error
        raise
    return PretrainingDataset(samples, blend.num_samples or len(samples), tokenizer.vocab_size, pad)
