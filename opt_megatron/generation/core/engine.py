"""The engine: continuous batching of requests, led by one rank.

    engine = Engine(model, parallel)
    for event in engine.generate(requests): ...        # the same line on every rank

Only the leader reads the requests, chooses tokens and decides what is computed next; the other ranks follow its
commands (`executor.py`), so that all ranks always run the same step, and only the leader yields events. Requests join
and leave the batch at every step (`scheduler.py`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import partial

import torch
from torch import Tensor

from ...config import OPTConfig
from ...errors import UserError
from ...model.opt_model import OPTModel
from ...parallel.context import ParallelContext, on_all_ranks
from ...parallel.memory import device_memory
from ..decoding.drafts import Draft, DraftModel, PromptLookup
from ..decoding.groups import make_groups
from ..decoding.sampling_group import SamplingGroup
from ..decoding.sequences import SequenceGroup
from ..engine_options import EngineOptions
from ..request import Completion, CompletionBuilder, Request, TokenEvent, check_request
from ..step import BLOCK_SIZE, StepInput
from .executor import Executor, Runner
from .kv_cache_allocator import KVCacheAllocator, round_up
from .launched_step import LaunchedStep
from .model_runner import ModelRunner
from .output_processor import OutputProcessor
from .request_queue import RequestQueue
from .scheduler import ScheduledGroup, Scheduler, SchedulerCounters

_CACHE_SHARE = 0.9  # of the memory that is free; activations need the rest
# Tokens after which a step takes longer in proportion: fewer leave the device's arithmetic units idle.
_PREFILL_CHUNK_SIZES = {"cpu": 256, "cuda": 2048}
_KEEP_ALIVE_SECONDS = 60.0  # without requests, after which the leader sends its followers a keep-alive message


class Engine:
    """Generates with a model that is divided among the context's ranks.

    Args:
        model: this rank's part (`load_model`); it is prepared for inference and cannot be trained any more.
        max_batch_size: sequences that run at the same time; other requests wait.
        kv_cache_memory: bytes that the cache of a rank may take; by default what the requests need,
            `max_batch_size` sequences of the model's maximum length, or nine tenths of the memory that is free once the
            weights are prepared, whichever is least.
        prefill_chunk_size: tokens of prompts that are computed in a step, besides those that decode; by default 256 on
            a CPU and 2048 on a GPU.
        eos_token_ids: each of them ends a text; by default the config's one.
        suppress_tokens: ids that are never chosen; by default those that the config says belong to no token.
        draft_model: this rank's part of a smaller model with the same vocabulary, for speculative decoding.
        prompt_lookup: speculate with what followed the newest tokens earlier in the sequence.
        num_speculative_tokens: proposed at a time.
        kv_cache_dtype: float32, float16, bfloat16 or int8; auto: the model's, without the CPU kernels float32 on a CPU.
        skip_silent_neurons: "auto" leaves out the weights of neurons that ReLU has silenced, on a CPU where few are
            active; "off" reads all.
        cuda_graphs: "auto" records the kernels of decode steps on a GPU, and launches them together, where there is one
            pipeline stage; "off" does not.

    Raises:
        UserError: there are more processes than tensor x pipeline ranks, or an option is out of its range.
    """

    def __init__(
        self,
        model: OPTModel,
        parallel: ParallelContext,
        *,
        max_batch_size: int = 16,
        kv_cache_memory: int | None = None,
        prefill_chunk_size: int | None = None,
        eos_token_ids: Sequence[int] | None = None,
        suppress_tokens: Sequence[int] | None = None,
        draft_model: OPTModel | None = None,
        prompt_lookup: bool = False,
        num_speculative_tokens: int = 4,
        kv_cache_dtype: str = "auto",
        skip_silent_neurons: str = "auto",
        cuda_graphs: str = "auto",
    ) -> None:
        EngineOptions(  # checks the ranges
            max_batch_size=max_batch_size,
            prefill_chunk_size=prefill_chunk_size,
            num_speculative_tokens=num_speculative_tokens,
            kv_cache_dtype=kv_cache_dtype,
            skip_silent_neurons=skip_silent_neurons,
            cuda_graphs=cuda_graphs,
        )
        _check_no_data_parallelism(parallel)
        self._parallel = parallel
        self._config = model.opt_config
        self._eos_token_ids = (self._config.eos_token_id,) if eos_token_ids is None else tuple(eos_token_ids)
        self._suppressed = _suppressed_ids(self._config, suppress_tokens)
        self._max_batch_size = max_batch_size
        self._chunk_size = prefill_chunk_size or _PREFILL_CHUNK_SIZES[parallel.device.type]
        make_runner = partial(
            ModelRunner,
            parallel=parallel,
            suppressed=self._suppressed,
            kv_cache_dtype=kv_cache_dtype,
            skips_silent_neurons=skip_silent_neurons == "auto",
        )
        self._runners: list[Runner] = [make_runner(model, uses_cuda_graphs=cuda_graphs == "auto")]
        self._executor = Executor(parallel, self._runners)
        self._draft: Draft | None = PromptLookup(num_speculative_tokens) if prompt_lookup else None
        if draft_model is not None:
            _check_draft_model(draft_model, model, prompt_lookup)
            self._runners.append(make_runner(draft_model))
            self._draft = DraftModel(partial(self._executor.forward, runner=1), num_speculative_tokens)
        # Speculation needs the tokens, and of sampled ones the distributions.
        self._runs_ahead = self._runners[0].keeps_tokens and self._draft is None
        self._cache_limit = "kv_cache_memory" if kv_cache_memory is not None else "the memory that is free"
        self._cache_bytes_per_token = sum(runner.cache_bytes_per_token for runner in self._runners)
        self._capacity = self._cache_capacity(kv_cache_memory)
        self._queue: RequestQueue | None = None  # while `generate` runs

    def _cache_capacity(self, kv_cache_memory: int | None) -> int:
        """Tokens that the cache may hold."""
        block = BLOCK_SIZE * self._cache_bytes_per_token
        if kv_cache_memory is None:
            kv_cache_memory = int(_CACHE_SHARE * device_memory(self._parallel.device).free)
        num_blocks = min(self._parallel.gather_objects(kv_cache_memory // block))
        if num_blocks == 0:
            raise UserError(
                f"{self._cache_limit} is {kv_cache_memory} bytes, but {BLOCK_SIZE} tokens, the minimum, take "
                f"{block} on each rank"
            )
        longest = round_up(self._config.max_position_embeddings, BLOCK_SIZE)
        return min(self._max_batch_size * longest, num_blocks * BLOCK_SIZE)

    def generate(self, requests: Sequence[Request] | RequestQueue) -> Generator[TokenEvent, None, None]:
        """Continue all requests; called on every rank, and read to its end there.

        Args:
            requests: on the leader; a queue may be given more while events are read, and is served until it is
                closed; one of its requests that cannot be run ends with "refused", one that fails through an error
                of the program with "failed", and neither affects another. On other ranks it is ignored.

        Yields:
            On the leader one event for every token, in the order of generation; on the others nothing.

        Raises:
            UserError: a request of a list cannot be run; raised on the leader, while the others just end.
        """
        commands = self._executor.commands
        if not self._parallel.is_leader:
            commands.follow()
            return
        try:
            with commands.leading():
                yield from self._run(self._open(requests))
        finally:
            self._queue = None

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """`generate` to the end, and on every rank the list of all continuations of each request.

        Raises:
            UserError: a request cannot be run; raised on every rank.
        """
        # The leader may refuse a request; then all raise, and none waits for the result.
        return self._parallel.broadcast_object(on_all_ranks(self._parallel, lambda: self._complete(requests)))

    def _complete(self, requests: Sequence[Request]) -> list[Completion]:
        builder = CompletionBuilder()
        for event in self.generate(requests):
            builder.add(event)
        return builder.completions()

    def stream(self, request: Request) -> Iterator[str]:
        """The text of the request's continuation, in pieces as they are generated; called and read on every rank.

        Closed early, on every rank, it ends the generation.

        Raises:
            UserError: the request cannot be run; raised on the leader, while the others just end (see `check`).
        """
        commands = self._executor.commands
        if not self._parallel.is_leader:
            for numbers in commands.follow_shared():
                yield bytes(numbers).decode()
            return
        with closing(self.generate([request])) as events:
            for event in events:
                if event.text and not event.is_prompt:
                    if commands.has_followers:
                        commands.share(list(event.text.encode()))
                    yield event.text

    def cancel(self, request_id: int) -> None:
        """End a request of the running `generate`, from any thread; its memory is free at the next step."""
        queue = self._queue
        if queue is not None:
            queue.cancel(request_id)

    def check(self, request: Request, what: str = "the prompt") -> None:
        """Raise UserError unless the model and the cache can run the request.

        Args:
            what: how the message calls the prompt.
        """
        check_request(request, self._config, what)
        group = next(self._make_groups(0, request))
        num_sequences = len(group.sequences)
        num_tokens = num_sequences * round_up(group.max_length, BLOCK_SIZE)
        if num_sequences > self._max_batch_size:
            raise UserError(
                f"{what} needs {num_sequences} rows at a time; raise max_batch_size, which is {self._max_batch_size}"
            )
        if num_tokens > self._capacity:
            raise UserError(
                f"{what} needs {num_tokens} tokens of KV cache and {self._capacity} fit into {self._cache_limit}: "
                "shorten it, ask for fewer new tokens, or raise kv_cache_memory"
            )

    @property
    def running_requests(self) -> set[int]:
        """Ids of the requests that ran in the latest step; to be read in the thread that reads the events."""
        return {group.request_id for group in self._scheduler.running} if self._queue is not None else set()

    @property
    def counters(self) -> SchedulerCounters:
        """What the scheduler has done since `generate` was called."""
        return self._scheduler.counters if self._queue is not None else SchedulerCounters()

    @property
    def num_cache_blocks(self) -> int:
        """How many blocks of `BLOCK_SIZE` tokens the cache may have."""
        return self._capacity // BLOCK_SIZE

    @property
    def kv_cache_bytes(self) -> int:
        """The memory that the cache takes on this rank when it is full."""
        return self._capacity * self._cache_bytes_per_token

    @property
    def kv_cache_usage(self) -> float:
        """The part of the cache's tokens that are in use, from 0 to 1."""
        return self._scheduler.allocator.num_used_tokens / self._capacity if self._queue is not None else 0.0

    def _open(self, requests: Sequence[Request] | RequestQueue) -> RequestQueue:
        """Allocate a cache for the requests, and return their queue."""
        num_tokens = self._capacity
        self._checks_arrivals = isinstance(requests, RequestQueue)
        if not isinstance(requests, RequestQueue):
            for index, request in enumerate(requests):
                self.check(request, f"prompt {index + 1}")
            sizes = [size for request in requests for size in self._sequence_sizes(request)]
            num_tokens = min(num_tokens, sum(sorted(sizes)[-self._max_batch_size :]))
            requests = RequestQueue(requests)
            requests.close()
        if num_tokens:
            self._executor.allocate(num_tokens)
        allocator = KVCacheAllocator(num_tokens, BLOCK_SIZE)
        self._scheduler = Scheduler(allocator, self._max_batch_size, self._chunk_size)
        self._outputs = OutputProcessor(
            self._scheduler,
            self._executor.copy,
            self._config.vocab_size,
            isolates_errors=self._checks_arrivals,
        )
        self._queue = requests
        return requests

    def _make_groups(self, request_id: int, request: Request) -> Iterator[SequenceGroup]:
        return make_groups(
            request_id,
            request,
            self._eos_token_ids,
            self._config.vocab_size,
            self._suppressed,
            samples_in_step=self._runs_ahead,
        )

    def _sequence_sizes(self, request: Request) -> list[int]:
        """Tokens of the blocks of each of the request's sequences, as far as they can run together."""
        group = next(self._make_groups(0, request))
        count = request.params.num_sampled if isinstance(group, SamplingGroup) else len(group.sequences)
        return [round_up(group.max_length, BLOCK_SIZE)] * min(count, self._max_batch_size)

    def _run(self, queue: RequestQueue) -> Iterator[TokenEvent]:
        """One step after the other until all requests have ended.

        Where the runner keeps the tokens, a step is started before the tokens of the one before it are read.
        """
        scheduler = self._scheduler
        running: LaunchedStep | None = None
        while True:
            yield from self._process_arrivals(queue)
            scheduler.admit(self._executor.copy)
            started = self._start(scheduler.schedule()) if scheduler.running else None
            if running is not None:
                yield from self._outputs.process(running)
            elif started is None:
                if queue.is_exhausted:
                    assert not scheduler.waiting  # a request that was accepted fits when it is alone
                    return
                if not queue.wait(_KEEP_ALIVE_SECONDS):
                    self._executor.commands.keep_alive()
            running = started
            if running is not None and not running.is_read_later:
                yield from self._outputs.process(running)
                running = None
            scheduler.release_finished()

    def _process_arrivals(self, queue: RequestQueue) -> Iterator[TokenEvent]:
        arrived, cancelled = queue.drain()
        for request_id, request in arrived:
            try:
                if self._checks_arrivals:  # a list was checked before anything ran
                    self.check(request, f"request {request_id}")
                groups = list(self._make_groups(request_id, request))
            except Exception as error:
                yield self._outputs.error_event(request_id, error)
                continue
            self._outputs.add_request(request_id, request)
            self._scheduler.waiting.extend(groups)
        for request_id in cancelled:
            yield from self._outputs.cancel_request(request_id)

    def _start(self, scheduled: list[ScheduledGroup]) -> LaunchedStep | None:
        """Start a step; None if there is nothing to compute."""
        if self._draft is not None:
            scheduled = _with_proposals(scheduled, self._draft)
        if not scheduled:
            return None
        kind = max([group.output_kind for group, _, _ in scheduled])
        step = StepInput(tuple([sequence for part in scheduled for sequence in part.sequences]), kind)
        output = self._executor.forward(step)
        for group, sequences, _ in scheduled:
            group.mark_computed(sequences)
        choosing = [group for group, _, _ in scheduled if isinstance(group, SamplingGroup) and group.sampling]
        is_read_later = self._runs_ahead and len(choosing) == len(scheduled)
        is_read_later = is_read_later and not any(group.needs_newest_token for group in choosing)
        if is_read_later:
            for group in choosing:
                group.expect_token()
        return LaunchedStep(scheduled, output, is_read_later=is_read_later)


def _suppressed_ids(config: OPTConfig, suppress_tokens: Sequence[int] | None) -> Tensor:
    """[ids] int64 in ascending order, without those that the model has no row for."""
    ids = range(config.num_tokens, config.vocab_size) if suppress_tokens is None else suppress_tokens
    return torch.tensor(sorted({token for token in ids if 0 <= token < config.vocab_size}), dtype=torch.int64)


def _with_proposals(scheduled: list[ScheduledGroup], draft: Draft) -> list[ScheduledGroup]:
    """Let the draft propose tokens for the groups that decode, and schedule these too."""
    proposing = [
        group
        for group, _, _ in scheduled
        if isinstance(group, SamplingGroup) and group.max_proposed_tokens > 0 and not group.is_restoring
    ]
    draft.propose(proposing)
    return [part._replace(sequences=part.group.schedule(0)) if part.group in proposing else part for part in scheduled]


def _check_draft_model(draft_model: OPTModel, model: OPTModel, prompt_lookup: bool) -> None:
    draft, config = draft_model.opt_config, model.opt_config
    if prompt_lookup:
        raise UserError("a draft model and prompt lookup are given; use one of them")
    if draft.vocab_size != config.vocab_size:
        raise UserError(
            f"the draft model has {draft.vocab_size} vocabulary rows and the model "
            f"{config.vocab_size}: they must have the same tokenizer"
        )
    if draft.max_position_embeddings < config.max_position_embeddings:
        raise UserError(
            f"the draft model has {draft.max_position_embeddings} positions and the model "
            f"{config.max_position_embeddings}: it must have as many"
        )


def _check_no_data_parallelism(parallel: ParallelContext) -> None:
    if parallel.data_parallel_size != 1:
        raise UserError(
            f"generation runs on tensor x pipeline ranks alone, but {parallel.world_size} processes leave "
            f"{parallel.data_parallel_size} data parallel copies: start fewer processes"
        )
