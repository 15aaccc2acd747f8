"""Prove the CUDA paths of opt_megatron on one real GPU, in 8 minutes at most, and print what was measured as one JSON.

    python tools/gpu_check.py --out check.json                    on a machine with a GPU
    python tools/gpu_check.py --device cpu --tiny                 a rehearsal with toy sizes (one minute)
    python tools/gpu_check.py --only environment big --big 13b    some sections, another size

Needs transformers.

Sections: what the machine is and how fast; parity with transformers (forward, KV cache, greedy text) in three dtypes;
8-bit weights; every feature once; speed of decoding and prefill against the memory's and transformers'; training
against transformers; memory. One that fails costs itself alone, and none begins after --seconds. The file is
rewritten after each, so that a run cut short leaves what it had.

In the JSON, `failed` names the verdicts that are false and the sections that ended early; `ok` says for each section
true or why not; `verdicts` are booleans; all else is what was measured. Exits with 0 also if something failed.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")

import torch
import transformers

from opt_megatron import OPT
from opt_megatron.checkpoint.load import load_model
from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.config import OPTConfig
from opt_megatron.generation.core.engine import Engine
from opt_megatron.generation.core.kv_cache_allocator import round_up
from opt_megatron.generation.core.model_runner import ModelRunner
from opt_megatron.generation.request import Request
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.generation.step import BLOCK_SIZE, KVCacheBlocks, ScheduledSequence, StepInput
from opt_megatron.model.linear_methods.int8_weight_only import Int8WeightOnlyLinear
from opt_megatron.model.scoring import Item, score
from opt_megatron.parallel.context import ParallelContext, init_parallel

from .measure import cache_bytes, weight_bytes

SHAPES = {  # layers, hidden, heads
    "125m": (12, 768, 12),
    "1.3b": (24, 2048, 32),
    "6.7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
}
TINY_SHAPE = (2, 64, 4)
DTYPES = ("float32", "float16", "bfloat16")

Measured = dict[str, Any]
Tokens = tuple[int, ...]


@dataclass
class Check:
    """One run: its settings, and what came out so far."""

    device: str
    is_tiny: bool
    big: str
    folder: Path
    parallel: ParallelContext
    result: Measured = field(default_factory=lambda: {"failed": [], "ok": {}, "verdicts": {}, "seconds": {}})

    @property
    def is_cuda(self) -> bool:
        """This is no rehearsal."""
        return self.device == "cuda"

    def verdict(self, name: str, is_good: bool) -> None:
        """Keep what a claim about the project turned out to be."""
        self.result["verdicts"][name] = bool(is_good)

    def free(self) -> None:
        """Give back the memory of what is no longer used."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def timed(self, action: Callable[[], Any]) -> float:
        """Seconds, the GPU's work included."""
        self._synchronize()
        start = time.perf_counter()
        action()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()


# ---------------------------------------------------------------- models and text


def random_checkpoint(check: Check, size: str) -> Path:
    """A float16 checkpoint whose greedy text wanders, so that every weight, bias and norm matters."""
    directory = check.folder / size
    if directory.exists():
        return directory
    layers, hidden, heads = TINY_SHAPE if check.is_tiny else SHAPES[size]
    config = transformers.OPTConfig(
        vocab_size=512 if check.is_tiny else 50272,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float16)
    with torch.device(check.device):
        model = transformers.OPTForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, _scale_of(name, parameter))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    unfinished = directory.with_suffix(".unfinished")
    model.cpu().save_pretrained(unfinished)
    return unfinished.rename(directory)


def _scale_of(name: str, parameter: torch.Tensor) -> float:
    if "embed_tokens" in name:
        return 0.05
    if "embed_positions" in name:
        return 0.5
    if parameter.dim() > 1:
        return 2.0 / parameter.size(1) ** 0.5
    return 0.03 if "norm" in name else 0.2


def their_model(check: Check, directory: Path, dtype: str) -> Any:
    """transformers' model of a checkpoint."""
    model = transformers.OPTForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    return model.to(check.device).eval()


def our_model(check: Check, directory: Path, dtype: str, **options: Any) -> torch.nn.Module:
    """This project's."""
    return load_model(directory, None, check.parallel, dtype, **options)


def random_prompts(config: OPTConfig, batch: int, length: int, seed: int = 0) -> list[Tokens]:
    """So many prompts, each beginning with BOS."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(4, config.num_tokens, (batch, length - 1), generator=generator).tolist()
    return [(2, *row) for row in rows]


def our_text(engine: Engine, prompts: list[Tokens], count: int, **options: Any) -> list[Tokens]:
    """`count` tokens after each prompt, greedy unless the options say otherwise; an end of sequence is a token."""
    greedy = {} if "penalty_alpha" in options else {"temperature": 0}
    params = SamplingParams(**{"max_new_tokens": count, "ignore_eos": True, **greedy, **options})
    return [completion.tokens for completion in engine.complete([Request(prompt, params) for prompt in prompts])]


@torch.inference_mode()
def their_text(check: Check, model: Any, prompts: list[Tokens], count: int) -> list[Tokens]:
    """transformers' greedy text of prompts that are equally long."""
    ids = torch.tensor(prompts, device=check.device)
    lengths = {"max_new_tokens": count, "min_new_tokens": count}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True, **lengths)
    return [tuple(row) for row in output[:, ids.size(1) :].tolist()]


@torch.inference_mode()
def full_logits(check: Check, model: Any, tokens: Tokens, config: OPTConfig) -> torch.Tensor:
    """Logits of a plain forward pass of either kind of model: [tokens, vocabulary]."""
    output = model(torch.tensor([tokens], device=check.device))
    return getattr(output, "logits", output)[0, :, : config.num_tokens].float()


def cached_logits(check: Check, model: Any, tokens: Tokens, prefill: int, chunk: int) -> torch.Tensor:
    """The same through the KV cache: the first `prefill` tokens in chunks, the others one by one."""
    runner = _runner(check, model)
    blocks = KVCacheBlocks(BLOCK_SIZE, round_up(len(tokens), BLOCK_SIZE))
    runner.allocate(blocks.start + blocks.size)
    begins = [*range(0, prefill, chunk), *range(prefill, len(tokens))]
    pieces = itertools.pairwise([*begins, len(tokens)])
    rows = [ScheduledSequence(blocks, begin, tuple(tokens[begin:end]), end - begin) for begin, end in pieces]
    steps = [runner.forward(StepInput((row,))).rows for row in rows]
    return torch.cat(steps)[:, : model.opt_config.num_tokens]


def _runner(check: Check, model: Any) -> ModelRunner:
    config = model.opt_config
    return ModelRunner(model, check.parallel, torch.arange(config.num_tokens, config.vocab_size))


def error_of(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((value.double() - truth.double()).norm() / truth.double().norm())


# ---------------------------------------------------------------- sections


def environment(check: Check, out: Measured) -> None:
    """What is installed, and how fast the memory and the matrix units are."""
    out["python"], out["torch"] = platform.python_version(), torch.__version__
    for name in ("megatron.core", "transformers", "apex", "transformer_engine", "flash_attn", "triton"):
        try:
            out[name] = getattr(__import__(name, fromlist=["__version__"]), "__version__", "installed")
        except Exception as error:
            out[name] = f"{type(error).__name__}: {error}"[:120]
    if check.is_cuda:
        properties = torch.cuda.get_device_properties(0)
        out["gpu"], out["multiprocessors"] = properties.name, properties.multi_processor_count
        out["gib"] = properties.total_memory / 2**30
        out["cuda"], out["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
        out["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    size = 2**20 if check.is_tiny else 2**31
    source = torch.ones(size // 4, device=check.device)
    target = torch.empty_like(source)
    out["copy_gb_per_s"] = 2 * size / min(check.timed(lambda: target.copy_(source)) for _ in range(8)) / 1e9
    out["read_gb_per_s"] = size / min(check.timed(source.sum) for _ in range(8)) / 1e9
    width = 256 if check.is_tiny else 8192
    left = torch.randn(width, width, device=check.device, dtype=torch.bfloat16)
    right = torch.randn_like(left)
    seconds = statistics.median(check.timed(lambda: left @ right) for _ in range(6))
    out["bfloat16_tflops"] = 2 * width**3 / seconds / 1e12


def parity_story(check: Check, out: Measured) -> None:
    """The embedded model against transformers."""
    _parity(check, out, EMBEDDED_DIRECTORY, "story")


def parity_125m(check: Check, out: Measured) -> None:
    """OPT-125M's shape against transformers."""
    _parity(check, out, random_checkpoint(check, "125m"), "125m")


def _parity(check: Check, out: Measured, directory: Path, label: str) -> None:
    """Errors against transformers in float32; ours must stay within twice that of transformers in the same dtype."""
    config = OPTConfig.from_directory(directory)
    length, count = (40, 8) if check.is_tiny else (300, 48)
    prompts = random_prompts(config, 4, min(length, config.max_position_embeddings - count))
    tokens = prompts[0]
    truth = full_logits(check, their_model(check, directory, "float32"), tokens, config)
    for dtype in DTYPES:
        theirs = their_model(check, directory, dtype)
        peer, their_tokens = full_logits(check, theirs, tokens, config), their_text(check, theirs, prompts, count)
        del theirs
        model = our_model(check, directory, dtype)
        full = full_logits(check, model, tokens, config)
        engine = Engine(model, check.parallel, prefill_chunk_size=128)
        our_tokens = our_text(engine, prompts, count, min_new_tokens=count)  # no end of sequence, as theirs
        cached = cached_logits(check, model, tokens, len(tokens) - 16, 100)
        errors = {
            "transformers": error_of(peer, truth),
            "forward": error_of(full, truth),
            "cached": error_of(cached, truth),
        }
        agreeing = [_agreeing(mine, theirs) for mine, theirs in zip(our_tokens, their_tokens, strict=True)]
        is_equal = torch.equal(full, peer)
        out[dtype] = {"errors": errors, "forward_equals_transformers": is_equal, "greedy_agrees": agreeing, "of": count}
        limit = max(2 * errors["transformers"], 2e-5)
        check.verdict(f"{label} {dtype} logits", errors["forward"] <= limit and errors["cached"] <= limit)
        if dtype == "float32":
            check.verdict(f"{label} float32 greedy text", all(n == count for n in agreeing))
        del model
        check.free()


def _agreeing(left: Tokens, right: Tokens) -> int:
    """How many first tokens are the same."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=True)))


def int8(check: Check, out: Measured) -> None:
    """8-bit weights: their error, and whether half-precision sums overflow where inputs have outliers, as OPT's do."""
    for dtype in ("float16", "bfloat16"):
        plain = our_model(check, EMBEDDED_DIRECTORY, dtype)
        quantized = our_model(check, EMBEDDED_DIRECTORY, dtype, quantization="int8")
        tokens = random_prompts(plain.opt_config, 1, 100)[0]
        truth, logits = (cached_logits(check, model, tokens, 90, 90) for model in (plain, quantized))
        text = our_text(Engine(quantized, check.parallel), [tokens], 8)
        out[dtype] = {"error": error_of(logits, truth), "tokens": text}
        check.verdict(f"int8 {dtype}", out[dtype]["error"] < 0.05)
    if not check.is_cuda:
        return
    weight = torch.randn(512, 2048, device=check.device) * 0.006
    inputs = torch.randn(4, 2048, device=check.device)
    inputs[:, :8] *= 40
    for dtype in (torch.float16, torch.bfloat16):
        output = Int8WeightOnlyLinear(weight.to(dtype))(inputs.to(dtype), None)
        error = error_of(output, inputs @ weight.t())
        out[f"outliers, {dtype}"] = {"error": error}
        check.verdict(f"int8 with outliers, {dtype}", error < 0.05)


def features(check: Check, out: Measured) -> None:
    """All that a user can ask for, once, with the embedded model."""
    model, draft = (our_model(check, EMBEDDED_DIRECTORY, "float16") for _ in range(2))
    with torch.no_grad():  # near the model, so that some proposals are rejected
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    prompts = random_prompts(model.opt_config, 3, 40)
    engine = Engine(model, check.parallel)
    sampled = {"temperature": 0.8, "top_p": 0.9, "seed": 1}
    filters = {
        **{"top_k": 40, "min_p": 0.01, "typical_p": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.2},
        **{"frequency_penalty": 0.1, "logit_bias": {5: 1.0}},
    }

    def text(engine: Engine, count: int = 12, **options: Any) -> Callable[[], Any]:
        return lambda: our_text(engine, prompts, count, **options)

    def scores() -> float:
        fresh = our_model(check, EMBEDDED_DIRECTORY, "float16")
        return score(fresh, check.parallel, [Item(prompt[:5], prompt[5:]) for prompt in prompts])[0].total

    def research() -> None:
        opt = OPT.from_pretrained(str(EMBEDDED_DIRECTORY), device=check.device)
        opt.hidden_states([prompts[0]])
        opt.attentions([prompts[0]])
        with opt.hooks({"layers.1.mlp": lambda output: output * 0}):
            opt.logits([prompts[0]])

    lookup = Engine(model, check.parallel, prompt_lookup=True)
    drafted = Engine(model, check.parallel, draft_model=draft)
    cases = {
        "sampled": text(engine, **sampled),
        "all filters": text(engine, **sampled, **filters),
        "logprobs and echo": text(engine, logprobs=3, echo=True),
        "beams": text(engine, num_beams=3),
        "contrastive": text(engine, penalty_alpha=0.6, top_k=4),
        "best of 3": text(engine, temperature=1.0, n=2, best_of=3),
        "prompt lookup": text(lookup, 24, **sampled),
        "draft model, greedy": text(drafted, 24),
        "draft model, sampled": text(drafted, 24, **sampled),
        "score": scores,
        "research": research,
        **training_features(check),
    }
    for name, case in cases.items():
        try:
            case()
            out[name] = "ok"
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)[-3:]
            lines = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
            out[name] = f"{type(error).__name__}: {error} {lines}"[:400]
        check.verdict(f"feature: {name}", out[name] == "ok")


def speed_125m(check: Check, out: Measured) -> None:
    """Decoding and prefill of the smallest model: launches and Python."""
    _speed(check, out, "125m", ("float16",))


def speed_big(check: Check, out: Measured) -> None:
    """Decoding and prefill of the model that --big names: memory and matrix units."""
    _speed(check, out, check.big, ("float16", "bfloat16", "int8"))


def _speed(check: Check, out: Measured, size: str, kinds: tuple[str, ...]) -> None:
    directory = random_checkpoint(check, size)
    batches = (1, 4) if check.is_tiny else (1, 16, 64)
    prompt_length = 16 if check.is_tiny else 128
    for kind in kinds:
        out[kind] = _speed_of_kind(check, directory, kind, batches, prompt_length, with_prefill=kind == kinds[0])
        check.free()
    _speed_of_transformers(check, out, directory, batches, prompt_length)
    for batch in batches:
        ours, theirs = (out[kind][f"batch {batch}"]["ms_per_step"] for kind in (kinds[0], "transformers"))
        check.verdict(f"{size} batch {batch} decodes faster than transformers", ours < theirs)


def _speed_of_kind(
    check: Check, directory: Path, kind: str, batches: tuple[int, ...], prompt_length: int, *, with_prefill: bool
) -> Measured:
    """Ours, with weights of a dtype or in int8 (and then float16)."""
    options, dtype = ({"quantization": "int8"}, "float16") if kind == "int8" else ({}, kind)
    model = our_model(check, directory, dtype, **options)
    config = model.opt_config
    engine = Engine(model, check.parallel, max_batch_size=max(batches))
    prompts = {batch: random_prompts(config, batch, prompt_length) for batch in batches}
    measured: Measured = {}
    for batch in batches:
        cell = _decoding(check, lambda count, batch=batch: our_text(engine, prompts[batch], count), batch)
        _compare_with_limit(
            check, cell, weight_bytes(config, kind) + batch * cache_bytes(config, dtype, prompt_length + 20)
        )
        measured[f"batch {batch}"] = cell
    sampling = {"temperature": 0.8, "top_p": 0.9, "seed": 1}
    ms = _ms_per_step(check, lambda count: our_text(engine, prompts[batches[-1]], count, **sampling))
    measured[f"sampled, batch {batches[-1]}"] = {"ms_per_step": ms}
    if with_prefill:
        _prefill(check, measured, model)
    return measured


def _decoding(check: Check, run: Callable[[int], Any], batch: int) -> Measured:
    ms = _ms_per_step(check, run)
    measured = {"ms_per_step": ms, "tokens_per_s": batch / ms * 1e3}
    if check.is_cuda and batch <= 16:
        measured |= _gpu_work_per_step(run)
        measured["gpu_busy"] = measured["gpu_us"] / 1e3 / ms
    return measured


def _ms_per_step(check: Check, run: Callable[[int], Any]) -> float:
    """From the difference of two lengths, so that prompts do not count."""
    short, long = (4, 8) if check.is_tiny else (8, 40)
    run(short)
    seconds = [min(check.timed(lambda count=count: run(count)) for _ in range(2)) for count in (short, long)]
    return 1e3 * (seconds[1] - seconds[0]) / (long - short)


def _gpu_work_per_step(run: Callable[[int], Any]) -> Measured:
    """What torch's profiler saw, a step: kernels and copies, those to the host, waits of the host, time of the GPU."""
    from torch.profiler import ProfilerActivity, profile

    def total(count: int) -> tuple[float, ...]:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            run(count)
            torch.cuda.synchronize()
        events = profiler.events()
        on_gpu = [event for event in events if event.device_type.name == "CUDA"]
        copies = sum("DtoH" in event.name for event in on_gpu)
        waits = sum(event.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize") for event in events)
        return len(on_gpu), copies, waits, sum(event.time_range.elapsed_us() for event in on_gpu)

    short, long = 8, 16
    names = ("launches", "copies_to_host", "waits", "gpu_us")
    pairs = zip(names, total(short), total(long), strict=True)
    return {name: (after - before) / (long - short) for name, before, after in pairs}


def _compare_with_limit(check: Check, measured: Measured, bytes_read: int) -> None:
    """A step cannot be faster than the memory gives weights and cache."""
    machine = check.result.get("environment", {})
    bandwidth = max(machine.get("copy_gb_per_s", 0), machine.get("read_gb_per_s", 0)) * 1e9
    if bandwidth:
        measured["limit_ms"] = bytes_read / bandwidth * 1e3
        measured["part_of_limit"] = measured["limit_ms"] / measured["ms_per_step"]


def _prefill(check: Check, measured: Measured, model: Any) -> None:
    config = model.opt_config
    length = 64 if check.is_tiny else 2000
    layer = config.hidden_size * (4 * config.hidden_size + 2 * config.ffn_hidden_size + length)  # causal: half of it
    flops = 2 * length * config.num_layers * layer
    peak = check.result.get("environment", {}).get("bfloat16_tflops")
    for chunk in (256, 2048):
        engine = Engine(model, check.parallel, max_batch_size=1, prefill_chunk_size=chunk)
        warm_up, prompt = (random_prompts(config, 1, length, seed) for seed in (chunk, chunk + 1))
        our_text(engine, warm_up, 1)
        seconds = check.timed(lambda engine=engine, prompt=prompt: our_text(engine, prompt, 1))
        tflops = flops / seconds / 1e12
        cell = measured[f"prefill of {length}, chunk {chunk}"] = {"tokens_per_s": length / seconds, "tflops": tflops}
        if peak:
            cell["part_of_peak"] = tflops / peak


def _speed_of_transformers(check: Check, out: Measured, directory: Path, batches: Iterable[int], length: int) -> None:
    model = their_model(check, directory, "float16")
    config = OPTConfig.from_directory(directory)
    for batch in batches:
        prompts = random_prompts(config, batch, length)
        ms = _ms_per_step(check, lambda count, prompts=prompts: their_text(check, model, prompts, count))
        out.setdefault("transformers", {})[f"batch {batch}"] = {"ms_per_step": ms, "tokens_per_s": batch / ms * 1e3}
    prompt = torch.tensor(random_prompts(config, 1, 64 if check.is_tiny else 2000), device=check.device)
    with torch.inference_mode():
        model(prompt)
        seconds = check.timed(lambda: model(prompt))
    out["transformers"][f"prefill of {prompt.numel()}"] = {"tokens_per_s": prompt.numel() / seconds}


def training(check: Check, out: Measured) -> None:
    """A step of OPT-125M's shape: loss and gradient norm against transformers, and time."""
    directory = random_checkpoint(check, "125m")
    batch, length = (2, 32) if check.is_tiny else (8, 1024)
    rows = random_prompts(OPTConfig.from_directory(directory), batch, length + 1)
    for dtype in DTYPES:
        model, optimizer = trainer_of(check, directory, getattr(torch, dtype))
        loss, norm = train_step(check, model, optimizer, rows)
        seconds = _median_of_steps(check, lambda m=model, o=optimizer: train_step(check, m, o, rows))
        work = 6 * sum(parameter.numel() for parameter in model.parameters()) * batch * length
        out[dtype] = {"loss": loss, "grad_norm": norm, "ms": seconds * 1e3, "tflops": work / seconds / 1e12}
        del model, optimizer
        check.free()
        their_step = _their_step(check, directory, dtype, rows)
        their_loss, their_norm = their_step()
        out[dtype]["transformers"] = {"loss": their_loss, "grad_norm": their_norm}
        out[dtype]["transformers"]["ms"] = _median_of_steps(check, their_step) * 1e3
        tolerance = 1e-5 if dtype == "float32" else 1e-2
        check.verdict(f"training {dtype} loss", math.isclose(loss, their_loss, rel_tol=tolerance))
        check.verdict(f"training {dtype} grad norm", math.isclose(norm, their_norm, rel_tol=max(10 * tolerance, 1e-3)))
        del their_step
        check.free()


def _median_of_steps(check: Check, step: Callable[[], Any]) -> float:
    step()
    return statistics.median(check.timed(step) for _ in range(4))


def _their_step(check: Check, directory: Path, dtype: str, rows: list[Tokens]) -> Callable[[], tuple[float, float]]:
    """A step of transformers without dropout, with torch's fused AdamW."""
    model = their_model(check, directory, dtype)  # in evaluation mode, where dropout is off
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)

    def step() -> tuple[float, float]:
        tokens = torch.tensor(rows, device=check.device)
        optimizer.zero_grad()
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item(), norm.item()

    return step


def memory(check: Check, out: Measured) -> None:
    """What a server of default settings takes at once: on a GPU the cache is not given page by page."""
    model = our_model(check, random_checkpoint(check, check.big), "float16")
    runner = _runner(check, model)
    out["cache_bytes_per_token"] = runner.cache_bytes_per_token
    if check.is_cuda:
        before = torch.cuda.memory_allocated()
        runner.allocate(BLOCK_SIZE if check.is_tiny else 16 * 2048)
        out["weights_gb"] = before / 1e9
        out["cache_gb"] = (torch.cuda.memory_allocated() - before) / 1e9


# ---------------------------------------------------------------- training


def trainer_of(
    check: Check,
    directory: Path,
    dtype: torch.dtype,
    *,
    distributed_optimizer: bool = False,
    lora_rank: int = 0,
    dropout: float = 0.0,
    **execution: Any,
) -> tuple[Any, Any]:
    """Model and optimizer that train from a checkpoint; `execution` are more of TrainingOptions."""
    from opt_megatron.parallel.core_compat import prepare_training

    prepare_training(check.parallel.device)
    from opt_megatron.model.lora_options import LoRAOptions
    from opt_megatron.training.lr_schedule import LRSchedule
    from opt_megatron.training.model_setup import setup_model_and_optimizer
    from opt_megatron.training.options import OptimizerOptions, TrainerOptions
    from opt_megatron.training.training_options import TrainingOptions

    options = TrainingOptions(
        config=OPTConfig.from_directory(directory).replace(dropout=dropout, attention_dropout=dropout),
        schedule=LRSchedule(1e-5, 1e-5, 0, 1),
        trainer=TrainerOptions(1, 1, 1, 1),
        load=str(directory),
        dtype=dtype,
        optimizer=OptimizerOptions(use_distributed_optimizer=distributed_optimizer),
        lora=LoRAOptions(lora_rank) if lora_rank else None,
        **execution,
    )
    return setup_model_and_optimizer(options, check.parallel)


def train_step(check: Check, model: Any, optimizer: Any, rows: list[Tokens]) -> tuple[float, float]:
    """Loss a token, and gradient norm."""
    from opt_megatron.training.loss import forward_backward

    tokens = torch.tensor(rows)
    shape = tokens[:, 1:].shape
    batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": torch.ones(shape),
        "position_ids": torch.arange(shape[1]).expand(shape),
    }
    model.train()
    model.zero_grad_buffer()
    optimizer.zero_grad()
    sums = forward_backward(model, [batch], check.parallel.device)
    outcome = optimizer.step(1e-5)
    return float(sums.total / sums.tokens), outcome.grad_norm


def _rows_of_story() -> list[Tokens]:
    return random_prompts(OPTConfig.from_directory(EMBEDDED_DIRECTORY), 2, 65)


def training_features(check: Check) -> dict[str, Callable[[], Any]]:
    """Every kind of training, once, with the embedded model."""
    from megatron.core.models.gpt import gpt_layer_specs

    half = torch.bfloat16
    cases = {
        "train and resume, float32": lambda: resume(check, torch.float32),
        "train and resume, bfloat16": lambda: resume(check, half),
        "train and resume, float16": lambda: resume(check, torch.float16),
        "train and resume, distributed optimizer": lambda: resume(check, half, distributed_optimizer=True),
        "train and resume, recomputation": lambda: resume(check, half, recompute_granularity="full"),
        "train and resume, LoRA": lambda: resume(check, half, lora_rank=4),
        "train with dropout": lambda: train_a_step(check, half, dropout=0.1, recompute_granularity="full"),
        "train with fused cross-entropy": lambda: train_a_step(check, half, cross_entropy_loss_fusion=True),
    }
    if check.is_cuda and gpt_layer_specs.HAVE_TE:
        name = "transformer_engine"
        cases["train and resume, TransformerEngine"] = lambda: resume(check, half, transformer_impl=name)
    return cases


def train_a_step(check: Check, dtype: torch.dtype, **options: Any) -> tuple[float, float]:
    """One step of the embedded model."""
    return train_step(check, *trainer_of(check, EMBEDDED_DIRECTORY, dtype, **options), _rows_of_story())


def resume(check: Check, dtype: torch.dtype, **options: Any) -> None:
    """Two steps and a checkpoint; what is resumed from it must take the same third step."""
    from opt_megatron.training.checkpointing.manager import CheckpointManager, TrainingState

    rows = _rows_of_story()
    model, optimizer = trainer_of(check, EMBEDDED_DIRECTORY, dtype, **options)
    for _ in range(2):
        train_step(check, model, optimizer, rows)
    checkpoints = CheckpointManager(Path(tempfile.mkdtemp(dir=check.folder)), check.parallel)
    checkpoints.save(model.module, optimizer, TrainingState(iteration=2))
    checkpoints.finish()
    resumed, resumed_optimizer = trainer_of(check, EMBEDDED_DIRECTORY, dtype, **options)
    path = checkpoints.directory / "iter_0000002"
    _, same_layout = checkpoints.read_state(path)
    checkpoints.load(path, resumed.module, resumed_optimizer, same_layout=same_layout)
    loss, _ = train_step(check, model, optimizer, rows)
    loss_after_resuming, _ = train_step(check, resumed, resumed_optimizer, rows)
    if not math.isclose(loss, loss_after_resuming, rel_tol=1e-4):
        raise AssertionError(f"the loss after resuming is {loss_after_resuming} instead of {loss}")


# ---------------------------------------------------------------- the run

SECTIONS: dict[str, Callable[[Check, Measured], None]] = {
    "environment": environment,
    "parity_story": parity_story,
    "parity_125m": parity_125m,
    "int8": int8,
    "features": features,
    "speed_125m": speed_125m,
    "training": training,
    "big": speed_big,
    "memory": memory,
}


def run_section(check: Check, name: str) -> None:
    """Run one section, and keep what it measured or how it ended."""
    measured = check.result[name] = {}
    start = time.perf_counter()
    try:
        SECTIONS[name](check, measured)
        check.result["ok"][name] = True
    except Exception as error:
        check.result["ok"][name] = f"{type(error).__name__}: {error}"[:400]
        measured["traceback"] = traceback.format_exc()[-3000:]
    check.free()
    check.result["seconds"][name] = round(time.perf_counter() - start, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--big", default="1.3b", choices=("1.3b", "6.7b", "13b"), help="size of the section 'big'")
    parser.add_argument("--seconds", type=float, default=420, help="no section begins after so many")
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=SECTIONS, metavar="SECTION")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    arguments = parser.parse_args()
    begun = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        parallel = init_parallel(1, 1, seed=1234, device=arguments.device)
        check = Check(arguments.device, arguments.tiny, arguments.big, Path(folder), parallel)
        result = check.result
        for name in arguments.only:
            if time.perf_counter() - begun > arguments.seconds:
                result["ok"][name] = "not begun: out of time"
            else:
                run_section(check, name)
            bad = [verdict for verdict, is_good in result["verdicts"].items() if not is_good]
            result["failed"] = bad + [section for section, state in result["ok"].items() if state is not True]
            result["total_seconds"] = round(time.perf_counter() - begun, 1)
            arguments.out.write_text(json.dumps(result, indent=1))
            print(f"[{result['total_seconds']:6.1f} s] {name}: {result['ok'][name]}", file=sys.stderr, flush=True)
    print(json.dumps(result))
