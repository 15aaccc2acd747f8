"""The training and the validation set of a run, and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable

from ..data.blend import corpora
from ..data.dataloader import SampleDataset
from ..data.indexed_dataset import open_indexed
from ..data.options import DataOptions, SupervisedOptions
from ..data.pretraining_dataset import build_datasets
from ..data.prompt_dataset import PromptDataset
from ..data.supervised_dataset import SupervisedDataset
from ..data.tokenizer_record import check_tokenizer
from ..errors import UserError
from ..parallel.agreement import check_same_on_all_ranks
from ..parallel.context import ParallelContext, on_all_ranks
from ..tokenizer import OPTTokenizer
from .training_options import TrainingOptions


def setup_data(
    options: TrainingOptions, parallel: ParallelContext, print_line: Callable[[str], None] = print
) -> tuple[SampleDataset, SampleDataset | None]:
    """The training and the validation set, with the samples of the whole run. Collective.

    Args:
        print_line: called with lines on the data, and on what was skipped.

    Raises:
        UserError: on every rank; the data cannot be used, or are not enough.
    """
    train_data: SampleDataset
    valid_data: SampleDataset | None
    if options.supervised is not None:
        train_data, valid_data = _supervised_datasets(options.supervised, options, parallel, print_line)
    elif options.data is not None:
        train_data, valid_data = _pretraining_datasets(options.data, options, parallel, print_line)
    else:
        raise UserError("give --data-path (or --train-data-path), or --supervised-data")
    return train_data, valid_data


def _pretraining_datasets(
    data: DataOptions, options: TrainingOptions, parallel: ParallelContext, print_line: Callable[[str], None]
) -> tuple[SampleDataset, SampleDataset | None]:
    trainer = options.trainer
    on_all_ranks(parallel, lambda: _check_tokenizer(data, options) if parallel.is_leader else None)
    datasets = build_datasets(
        data,
        parallel,
        num_train_samples=trainer.train_iters * trainer.global_batch_size,
        num_valid_samples=(trainer.num_eval_samples or None) if trainer.eval_interval else 0,
        seq_length=trainer.seq_length,
        seed=options.seed,
        vocab_size=options.config.vocab_size,
        eod=options.config.eos_token_id,
        pad=options.config.pad_token_id,
    )
    if parallel.is_leader:
        for prefix in corpora(data):
            file = open_indexed(prefix)
            tokens, documents = file.num_tokens(0, len(file.lengths)), len(file.lengths)
            print_line(f"data: {prefix}: {tokens:,} tokens in {documents:,} documents")
    return datasets


def _check_tokenizer(data: DataOptions, options: TrainingOptions) -> None:
    tokenizer = read_tokenizer(options)
    if tokenizer is not None:
        for prefix in corpora(data):
            check_tokenizer(prefix, tokenizer)


def _supervised_datasets(
    files: SupervisedOptions, options: TrainingOptions, parallel: ParallelContext, print_line: Callable[[str], None]
) -> tuple[SampleDataset, SampleDataset | None]:
    trainer = options.trainer
    num_train = trainer.train_iters * trainer.global_batch_size

    def read() -> tuple[SupervisedDataset, SupervisedDataset | None]:
        tokenizer, length, seed = _required_tokenizer(options), trainer.seq_length, options.seed
        train_data = SupervisedDataset(files.train or (), tokenizer, length, seed, num_samples=num_train)
        if not trainer.eval_interval or not files.valid:
            return train_data, None
        return train_data, SupervisedDataset(files.valid, tokenizer, length, seed)

    train_data, valid_data = on_all_ranks(parallel, read)
    _report_examples(train_data, valid_data, parallel, print_line)
    return train_data, valid_data


def setup_prompt_data(
    options: TrainingOptions, parallel: ParallelContext, print_line: Callable[[str], None]
) -> tuple[PromptDataset, PromptDataset | None]:
    """MeZO's training and validation set, example by example. Collective.

    Args:
        print_line: called with lines on the data, and on what was skipped.

    Raises:
        UserError: on every rank; the data cannot be used.
    """
    assert options.supervised is not None and options.mezo is not None
    files, trainer, has_candidates = options.supervised, options.trainer, options.mezo.objective == "classification"
    num_train = trainer.train_iters * trainer.global_batch_size

    def read() -> tuple[PromptDataset, PromptDataset | None]:
        tokenizer, length, seed = _required_tokenizer(options), trainer.seq_length, options.seed
        train_data = PromptDataset(files.train, tokenizer, length, seed, num_train, has_candidates=has_candidates)
        if not trainer.eval_interval or not files.valid:
            return train_data, None
        return train_data, PromptDataset(files.valid, tokenizer, length, seed, has_candidates=has_candidates)

    train_data, valid_data = on_all_ranks(parallel, read)
    _report_examples(train_data, valid_data, parallel, print_line)
    return train_data, valid_data


def _report_examples(
    train_data: PromptDataset | SupervisedDataset,
    valid_data: PromptDataset | SupervisedDataset | None,
    parallel: ParallelContext,
    print_line: Callable[[str], None],
) -> None:
    """Compare the examples of all ranks, and say how many there are."""
    named = {"--supervised-data": train_data, "--supervised-valid-data": valid_data}
    check_same_on_all_ranks(
        parallel.control_group, {f"examples of {name}": data.identity() for name, data in named.items() if data}
    )
    for name, dataset in (("training", train_data), ("validation", valid_data)):
        if dataset is not None:
            print_line(f"data: {dataset.num_examples:,} examples for {name}")
            for line in dataset.report():
                print_line(line)


def _required_tokenizer(options: TrainingOptions) -> OPTTokenizer:
    tokenizer = read_tokenizer(options)
    if tokenizer is None:
        raise UserError(
            "--supervised-data needs a tokenizer: give --tokenizer DIR, or --load a checkpoint that has one"
        )
    return tokenizer


def read_tokenizer(options: TrainingOptions) -> OPTTokenizer | None:
    """The run's tokenizer, or None if it has none.

    Raises:
        UserError: its vocabulary is larger than the model's.
    """
    if options.tokenizer is None:
        return None
    tokenizer = OPTTokenizer.from_directory(options.tokenizer)
    tokenizer.check_fits(options.config.vocab_size)
    return tokenizer
