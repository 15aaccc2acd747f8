"""The engine: one rank leads, the others follow.

    engine = Engine(model, parallel)
    for event in engine.generate(requests): ...        # the same line on every rank

The leader alone reads the requests, chooses tokens and decides what comes next. Before every step it
broadcasts a plan (`plan.py`), which all ranks carry out (`runner.py`); so ranks cannot part, and only the
leader yields events. Requests join the batch and leave it at every step (`scheduler.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...parallel.context import ParallelContext, on_all_ranks
from ..decoding.beam_search import BeamBranch
from ..decoding.contrastive_search import ContrastiveBranch
from ..decoding.sequences import BestOf, Branch, CachedSequence, SamplingBranch
from ..decoding.speculative import Draft, DraftModel, PromptLookup
from ..request import Completion, CompletionBuilder, Request, TokenEvent, check_request
from ..sampling.sampler import choose
from ..step import BLOCK, Kind, Output, PlanChannel, Row, Step
from .kv_cache_allocator import CacheMemory, round_up
from .model_runner import ModelRunner, carry_out
from .request_queue import RequestQueue
from .scheduler import Planned, Scheduler

_SECONDS_OF_SILENCE = 60  # after which followers hear that the leader is still there
_MODEL, _DRAFT_MODEL = 0, 1
_LOGGER = logging.getLogger(__name__)


class Engine:
    """Generates with a model that is spread over the context's ranks.

    Args:
        model: this rank's part (`load_model`); it is prepared for inference and cannot be trained any more.
        max_batch_size: sequences that run at the same time; other requests wait.
        kv_cache_memory: bytes that the cache of a rank may take; by default what the requests need, or
            `max_batch_size` sequences of the model's longest, whichever is less.
        prefill_chunk_size: tokens of prompts that are computed in a step, beside what decodes.
        num_tokens: ids from this one on are vocabulary padding and are never chosen; by default the config's.
        draft_model: this rank's part of a smaller model with the same vocabulary, for speculative decoding.
        prompt_lookup: speculate with what followed the newest tokens earlier in the sequence.
        num_speculative_tokens: proposed at a time.

    Raises:
        UserError: there are more processes than tensor x pipeline ranks, or an option is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        parallel: ParallelContext,
        *,
        max_batch_size: int = 16,
        kv_cache_memory: int | None = None,
        prefill_chunk_size: int = 256,
        num_tokens: int | None = None,
        draft_model: nn.Module | None = None,
        prompt_lookup: bool = False,
        num_speculative_tokens: int = 4,
    ) -> None:
        _check_options(parallel, max_batch_size, prefill_chunk_size, num_speculative_tokens)
        self._parallel = parallel
        self._config = model.opt_config
        self._num_tokens = min(num_tokens or self._config.num_tokens, self._config.num_tokens)
        self._max_batch_size = max_batch_size
        self._chunk = prefill_chunk_size
        self._runners = [ModelRunner(model, parallel, self._num_tokens)]
        self._draft: Draft | None = PromptLookup(num_speculative_tokens) if prompt_lookup else None
        if draft_model is not None:
            self._add_draft_model(draft_model, prompt_lookup, num_speculative_tokens)
        self._capacity = self._tokens_that_fit(kv_cache_memory)
        self._channel = PlanChannel(parallel)
        self._queue: RequestQueue | None = None
        self._serves_queue = False

    def _add_draft_model(self, draft_model: nn.Module, prompt_lookup: bool, num_tokens: int) -> None:
        if prompt_lookup:
            raise UserError("a draft model and prompt lookup are given; use one of them")
        if draft_model.opt_config.vocab_size != self._config.vocab_size:
            raise UserError(
                f"the draft model has {draft_model.opt_config.vocab_size} vocabulary rows and the model "
                f"{self._config.vocab_size}: they must have the same tokenizer"
            )
        positions = draft_model.opt_config.max_position_embeddings
        if positions < self._config.max_position_embeddings:
            raise UserError(
                f"the draft model has {positions} positions and the model {self._config.max_position_embeddings}: "
                "it must have as many"
            )
        self._runners.append(ModelRunner(draft_model, self._parallel, self._num_tokens))
        self._draft = DraftModel(lambda step: self._forward(_DRAFT_MODEL, step), num_tokens)

    def _tokens_that_fit(self, kv_cache_memory: int | None) -> int:
        longest = self._max_batch_size * round_up(self._config.max_position_embeddings, BLOCK)
        if kv_cache_memory is None:
            return longest
        per_token = sum(runner.cache_bytes_per_token for runner in self._runners)
        if kv_cache_memory < per_token * BLOCK:
            raise UserError(
                f"kv_cache_memory is {kv_cache_memory} bytes, but {BLOCK} tokens, the least that can be had, take "
                f"{per_token * BLOCK} on each rank"
            )
        return min(longest, kv_cache_memory // (per_token * BLOCK) * BLOCK)

    def generate(self, requests: Sequence[Request] | RequestQueue) -> Iterator[TokenEvent]:
        """Continue all requests; called on every rank, and read to its end there.

        Args:
            requests: on the leader; a queue may be given more while events are read, and is served until it is
                closed; one of its requests that cannot be run ends with "refused", one that fails through an error
                of the program with "failed", and neither disturbs another. The other ranks' is not looked at.

        Yields:
            On the leader one event for every token, in the order of generation; on the others nothing.

        Raises:
            UserError: a request of a list cannot be run; raised on the leader, while the others just end.
        """
        if not self._parallel.is_leader:
            self._follow()
            return
        try:
            yield from self._lead(self._opened(requests))
        finally:  # whatever happened, also when the caller stops listening: release the others
            self._queue = None
            self._channel.send(Kind.STOP, [])

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """`generate` to the end, and on every rank the list of what came out: all continuations of each request.

        Raises:
            UserError: a request cannot be run; raised on every rank.
        """
        # The leader may refuse a request; then all raise, and none is left waiting for the result.
        return self._parallel.broadcast_object(on_all_ranks(self._parallel, lambda: self._complete(requests)))

    def _complete(self, requests: Sequence[Request]) -> list[Completion]:
        builder = CompletionBuilder()
        for event in self.generate(requests):
            builder.add(event)
        return builder.completions()

    def cancel(self, request: int) -> None:
        """End a request of the running `generate`, from any thread; its memory is free at the next step."""
        queue = self._queue
        if queue is not None:
            queue.cancel(request)

    def check(self, request: Request, what: str = "the prompt") -> None:
        """Raise UserError unless the model and the cache can run the request."""
        check_request(request, self._config, what)
        first = next(self._branches(0, request))
        rows = len(first.sequences)
        tokens = rows * round_up(first.size, BLOCK)
        if rows > self._max_batch_size:
            raise UserError(
                f"{what} needs {rows} rows at a time; raise max_batch_size, which is {self._max_batch_size}"
            )
        if tokens > self._capacity:
            raise UserError(
                f"{what} needs {tokens} tokens of KV cache and {self._capacity} fit into kv_cache_memory: "
                "shorten it, ask for fewer new tokens, or raise kv_cache_memory"
            )

    @property
    def running_requests(self) -> set[int]:
        """Numbers of the requests that had rows in the latest step; to be read where events are."""
        return {branch.number for branch in self._scheduler.running} if self._queue is not None else set()

    @property
    def kv_cache_usage(self) -> float:
        """The part of the cache's tokens that are in use, from 0 to 1."""
        return self._scheduler.memory.used_tokens / self._capacity if self._queue is not None else 0.0

    def _opened(self, requests: Sequence[Request] | RequestQueue) -> RequestQueue:
        """A queue of the requests, after making a cache that suits them."""
        tokens = self._capacity
        self._serves_queue = isinstance(requests, RequestQueue)
        if not isinstance(requests, RequestQueue):
            for index, request in enumerate(requests):
                self.check(request, f"prompt {index + 1}")
            sizes = [size for request in requests for size in self._sizes(request)]
            tokens = min(tokens, sum(sorted(sizes)[-self._max_batch_size :]))
            requests = RequestQueue(requests)
            requests.close()
        if tokens:
            self._do(Kind.ALLOCATE, [tokens] * len(self._runners))
        self._scheduler = Scheduler(CacheMemory(tokens, BLOCK), self._max_batch_size, self._chunk)
        self._best_of: dict[int, BestOf] = {}
        self._queue = requests
        return requests

    def _branches(self, number: int, request: Request) -> Iterator[Branch]:
        """One after the other: what they have in common can be seen on the first."""
        params = request.params
        eos = None if params.ignore_eos else self._config.eos_token_id
        if params.num_beams > 1:
            yield BeamBranch(number, request, eos)
        elif params.penalty_alpha > 0:
            yield ContrastiveBranch(number, request, eos, self._num_tokens)
        else:
            for choice in range(params.num_drawn):
                yield SamplingBranch(number, request, eos, choice)

    def _sizes(self, request: Request) -> list[int]:
        """Tokens of the extents that the request's sequences need, of no more of them than can run together."""
        first = next(self._branches(0, request))
        copies = request.params.num_drawn
        sequences = copies if isinstance(first, SamplingBranch) else len(first.sequences)
        return [round_up(first.size, BLOCK)] * min(sequences, self._max_batch_size)

    def _lead(self, queue: RequestQueue) -> Iterator[TokenEvent]:
        scheduler = self._scheduler
        while True:
            yield from self._arrivals(queue)
            scheduler.admit(self._copy)
            if scheduler.running:
                yield from self._step(scheduler.plan())
                scheduler.release_finished()
            elif queue.is_drained:
                assert not scheduler.waiting  # whatever was let in fits when it is alone
                return
            elif not queue.wait(_SECONDS_OF_SILENCE):
                self._do(Kind.WAIT, [])

    def _arrivals(self, queue: RequestQueue) -> Iterator[TokenEvent]:
        fresh, cancelled = queue.take()
        for number, request in fresh:
            try:
                if self._serves_queue:  # a list was checked before anything ran
                    self.check(request, f"request {number}")
                branches = list(self._branches(number, request))
            except Exception as error:
                yield self._ending(number, error)
                continue
            if request.params.best_of is not None:
                self._best_of[number] = BestOf(request.params.n, request.params.best_of)
            self._scheduler.waiting.extend(branches)
        for number in cancelled:
            branches, group = self._scheduler.remove(number), self._best_of.pop(number, None)
            events = [event for branch in branches for event in branch.cancelled()]
            yield from group.cancelled(number) if group else events

    def _step(self, planned: list[Planned]) -> Iterator[TokenEvent]:
        if self._draft is not None:
            planned = self._with_proposals(planned)
        feeds = [(plan.branch, feed) for plan in planned for feed in plan.feeds]
        rows = tuple(Row(f.sequence.extent, f.sequence.cached, f.tokens, f.asked) for _, f in feeds)
        kind = Output(max((branch.output for branch, feed in feeds if feed.asked), default=Output.BEST))
        outputs = self._forward(_MODEL, Step(rows, kind)).split([feed.asked for _, feed in feeds])
        yield from self._take(planned, list(outputs), kind)

    def _with_proposals(self, planned: list[Planned]) -> list[Planned]:
        decoding = [
            plan.branch
            for plan in planned
            if isinstance(plan.branch, SamplingBranch) and plan.branch.room_for_proposals > 0
        ]
        self._draft.propose(decoding)
        return [Planned(p.branch, p.branch.feeds(0)) if p.branch in decoding else p for p in planned]

    def _take(self, planned: list[Planned], outputs: list[Tensor], kind: Output) -> Iterator[TokenEvent]:
        """Give every branch its outputs; the plain ones' tokens are chosen all at once."""
        plain: list[tuple[SamplingBranch, Tensor]] = []
        for plan in planned:
            mine, outputs = outputs[: len(plan.feeds)], outputs[len(plan.feeds) :]
            branch = plan.branch
            if branch.is_finished:  # its request was refused in this very step
                continue
            if kind is not Output.BEST:
                mine = self._as_wanted(branch, mine)
            if not isinstance(branch, SamplingBranch) or branch.proposal.tokens:
                yield from self._try(branch, partial(branch.take, plan.feeds, mine, self._copy))
                continue
            yield from self._try(branch, partial(branch.advance, plan.feeds[0], mine[0]))
            if not branch.lead.pending and not branch.is_finished:
                plain.append((branch, mine[0][-1]))
        yield from self._choose(plain)

    def _try(self, branch: Branch, action: Callable[[], list[TokenEvent]]) -> list[TokenEvent]:
        """The branch's events; if it cannot go on, its request ends, and no other with it.

        This is safe for any error: what an action changes is the branch's own. (A lost rank, which a copy within
        the cache may notice, stops the engine at the next step.)
        """
        try:
            return self._shown(branch, action())
        except Exception as error:
            for other in self._scheduler.remove(branch.number):
                other.is_finished = True
            self._best_of.pop(branch.number, None)
            return [self._ending(branch.number, error)]

    def _ending(self, number: int, error: Exception) -> TokenEvent:
        if not self._serves_queue:
            raise error
        if isinstance(error, UserError):
            return TokenEvent(number, None, str(error), "refused")
        _LOGGER.error("request %d failed", number, exc_info=error)
        return TokenEvent(number, None, f"{type(error).__name__}: {error}", "failed")

    def _as_wanted(self, branch: Branch, outputs: list[Tensor]) -> list[Tensor]:
        """What the branch would have got alone: a step gives all rows what the most demanding one needs."""
        if branch.output is Output.HIDDEN:
            return outputs
        logits = [output[:, : self._num_tokens] for output in outputs]
        if branch.output is Output.LOGITS:
            return [rows.cpu() for rows in logits]
        return [torch.stack((rows.argmax(-1).double(), rows.amax(-1).double()), dim=-1) for rows in logits]

    def _choose(self, plain: list[tuple[SamplingBranch, Tensor]]) -> Iterator[TokenEvent]:
        """Choose the next tokens of branches without proposals, of those that sample all at once."""
        sampled = [(branch, row) for branch, row in plain if branch.output is Output.LOGITS]
        tokens = self._draw(sampled)
        for branch, row in plain:
            if branch.is_finished:
                continue
            if branch.output is Output.BEST:
                yield from self._try(branch, partial(self._accept, branch, int(row[0]), None))
            else:
                yield from self._try(branch, partial(self._accept, branch, tokens[id(branch)], row))

    @staticmethod
    def _draw(sampled: list[tuple[SamplingBranch, Tensor]]) -> dict[int, int | Exception]:
        """The chosen token of each branch, by its id(); or why there is none."""
        if not sampled:
            return {}
        logits = torch.stack([row for _, row in sampled])
        rows = [(branch.request.params, branch.history, branch.generator) for branch, _ in sampled]
        states = [branch.generator.get_state() for branch, _ in sampled]
        try:
            tokens = choose(logits, rows)
        except Exception as error:
            if len(sampled) == 1:
                return {id(sampled[0][0]): error}
            for (branch, _), state in zip(sampled, states, strict=True):  # one at a time, with the same numbers
                branch.generator.set_state(state)
            return {key: value for pair in sampled for key, value in Engine._draw([pair]).items()}
        return {id(branch): token for (branch, _), token in zip(sampled, tokens, strict=True)}

    @staticmethod
    def _accept(branch: SamplingBranch, token: int | Exception, row: Tensor | None) -> list[TokenEvent]:
        if isinstance(token, Exception):
            raise token
        return [branch.accept(token, row)]

    def _shown(self, branch: Branch, events: list[TokenEvent]) -> list[TokenEvent]:
        group = self._best_of.get(branch.number)
        if group is None or not isinstance(branch, SamplingBranch):
            return events
        shown = group.add(branch, events) if events else events
        if group.is_finished:
            del self._best_of[branch.number]
        return shown

    def _copy(self, source: CachedSequence, target: CachedSequence, begin: int, end: int) -> None:
        if begin < end:
            self._do(Kind.COPY, [_MODEL, *source.extent, *target.extent, begin, end])

    def _forward(self, model: int, step: Step) -> Tensor:
        return self._do(Kind.FORWARD, [model, *step.to_numbers()])

    def _do(self, kind: Kind, numbers: list[int]) -> Tensor | None:
        self._channel.send(kind, numbers)
        return carry_out(self._runners, kind, numbers)

    def _follow(self) -> None:
        while True:
            kind, numbers = self._channel.receive()
            if kind is Kind.STOP:
                return
            carry_out(self._runners, kind, numbers)


def _check_options(parallel: ParallelContext, max_batch_size: int, chunk: int, speculative: int) -> None:
    if parallel.data_parallel_size != 1:
        raise UserError(
            f"generation runs on tensor x pipeline ranks alone, but {parallel.world_size} processes leave "
            f"{parallel.data_parallel_size} data parallel copies: start fewer processes"
        )
    for name, value in (
        ("max_batch_size", max_batch_size),
        ("prefill_chunk_size", chunk),
        ("num_speculative_tokens", speculative),
    ):
        if value < 1:
            raise UserError(f"{name} is {value}, but must be at least 1")
