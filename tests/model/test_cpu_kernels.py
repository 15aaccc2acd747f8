"""The CPU kernels of csrc/ against torch, for every instruction set that this processor has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from opt_megatron.model import cpu_kernels
from opt_megatron.model.cpu_kernels import INT4, CachedKeysValues, TiledWeight, empty_in_huge_pages, in_tiles, library
from opt_megatron.model.linear_methods.cpu_float import CPUFloatLinear
from opt_megatron.model.linear_methods.cpu_int8 import CPUInt8Linear
from opt_megatron.model.linear_methods.int8_rows import quantize_rows

pytestmark = pytest.mark.skipif(library() is None, reason="there was no C++ compiler when the package was installed")

INSTRUCTION_SETS = ("base", "avx2", "avx512")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# [outputs, inputs]: whole tiles and groups, and sizes that divide by neither.
SHAPES = [(64, 64), (200, 100), (130, 1100), (1, 3)]


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    if not library().use_instruction_set(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    library().use_instruction_set(None)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Int4:
    """Groups of 32 inputs with a scale and a zero of their own, made here from their definition."""

    def __init__(self, weight: torch.Tensor, group: int = 32) -> None:
        outputs, inputs = weight.shape
        groups = torch.nn.functional.pad(weight, (0, -inputs % group)).unflatten(1, (-1, group))
        low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
        scales = ((high - low) / 15).clamp_min(1e-12)
        zeros = (-low / scales).round()
        numbers = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
        self.float = ((numbers - zeros[..., None]) * scales[..., None]).flatten(1)[:, :inputs]
        halves = in_tiles(numbers.flatten(1).byte()).unflatten(2, (-1, 2, 4))  # [tiles, 64, I / 8, 2, 4]
        values = (halves[..., 0, :] | halves[..., 1, :] << 4).transpose(1, 2).contiguous()
        by_group = [in_tiles(each).transpose(1, 2).contiguous() for each in (scales, zeros.byte())]
        self._weight = TiledWeight(INT4, (outputs, inputs), values, *by_group, group=group)

    def __call__(self, x, bias, *, relu=False, residual=None, skip_zeros=False):
        return self._weight.multiply(x, bias, relu=relu, residual=residual, skip_zeros=skip_zeros)


def products(weight: torch.Tensor):
    """Name, linear layer, the float weight that it stands for, and the rounding of its activations, for each format."""
    for dtype in FLOATS:
        yield str(dtype), CPUFloatLinear(weight.to(dtype)), weight.to(dtype).float(), 0.0
    numbers, scales = quantize_rows(weight)
    yield "int8", CPUInt8Linear(weight), numbers * scales[:, None], 0.5 / 127
    int4 = Int4(weight)
    yield "int4", int4, int4.float, 0.5 / 127


@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_one_to_many_tokens(instruction_set, shape):
    weight, bias = drawn(*shape), drawn(shape[0], seed=1)
    for name, linear, exact, rounding in products(weight):
        alone = None
        for tokens in (1, 2, 3, 4, 5, 6, 7, 13, 32, 200):
            x, residual = drawn(tokens, shape[1], seed=2), drawn(tokens, shape[0], seed=3)
            x[0] = drawn(shape[1], seed=4)
            product = linear(x, bias)
            bound = 1e-5 * (x.abs() @ exact.abs().T + 1) + rounding * x.abs().amax(1, keepdim=True) * exact.abs().sum(1)
            assert ((product - (x @ exact.T + bias)).abs() <= bound).all(), (name, tokens)
            assert torch.equal(linear(x, bias, relu=True), product.relu())
            assert torch.equal(linear(x, bias, residual=residual), product + residual)
            assert torch.allclose(linear(x, None) + bias, product, atol=1e-5)
            alone = product[0] if alone is None else alone
            assert torch.equal(product[0], alone), (name, tokens)  # to the bit, whatever else is in the batch


@given(tokens=st.integers(1, 30), share=st.sampled_from([0.0, 0.02, 0.2, 1.0]), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_leaving_out_rows_of_zeros_changes_no_bit(tokens, share, seed):
    weight = drawn(130, 700, seed=seed)
    x = drawn(tokens, 700, seed=seed + 1) * (torch.rand(700, generator=torch.Generator().manual_seed(seed)) < share)
    for name, linear, *_ in products(weight):
        assert torch.equal(linear(x, None, skip_zeros=True), linear(x, None)), name


def test_a_nan_and_infinities_are_not_lost(instruction_set):
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [2.0, 1.0]])
    linear = CPUFloatLinear(torch.ones(3, 2))
    assert linear(x, None).isnan().all(1).tolist() == [True, False, False]
    assert linear(x, None, relu=True).isnan().all(1).tolist() == [True, False, False]
    assert linear(x, None)[1:].tolist() == [[float("inf")] * 3, [3.0] * 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read_as_torch_does(instruction_set, dtype):
    numbers = torch.arange(2**16).to(torch.uint16).view(dtype)
    assert torch.equal(
        CPUFloatLinear(numbers[:, None])(torch.ones(1, 1), None)[0].nan_to_num(), numbers.float().nan_to_num()
    )


def attended(query, keys, values, position):
    """Attention of a query [n, d] over the keys [t, n, d] up to its position by torch: [n * d]"""
    k, v = (cached[: position + 1].transpose(0, 1) for cached in (keys, values))
    return scaled_dot_product_attention(query[:, None], k, v).flatten()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [8, 20, 64, 80, 128])
def test_attention_of_single_queries(instruction_set, dim, dtype):
    """Two sequences in one cache, one of them with three queries in the step; memory that was never written is NaN."""
    heads, blocks, starts = 3, 7, {0: 1, 1: 3}  # sequence -> its first block
    lengths = {0: 70, 1: 200}
    keys, values = (torch.full((blocks, heads, *shape), float("nan")).to(dtype) for shape in ((dim, 64), (64, dim)))
    history = {s: [drawn(n, heads, dim, seed=s + i).to(dtype).float() for i in (10, 20)] for s, n in lengths.items()}
    queries = [(0, 69), (1, 197), (1, 198), (1, 199)]
    step = torch.empty(len(queries), heads, 3, dim)
    for sequence, (key, value) in history.items():
        for position in range(lengths[sequence]):
            block, slot = starts[sequence] + position // 64, position % 64
            if (sequence, position) not in queries:
                keys[block, :, :, slot], values[block, :, slot] = key[position].to(dtype), value[position].to(dtype)
    for number, (sequence, position) in enumerate(queries):
        key, value = history[sequence]
        step[number] = torch.stack((drawn(heads, dim, seed=number), key[position], value[position]), dim=1)
    first_blocks = torch.tensor([starts[sequence] for sequence, _ in queries])
    positions = torch.tensor([position for _, position in queries])
    cache = CachedKeysValues(keys, values)
    found = library().attend(step, cache, first_blocks, positions, dim**-0.5)
    for number, (sequence, position) in enumerate(queries):
        expected = attended(step[number, :, 0], *history[sequence], position)
        assert (found[number] - expected).abs().max() <= 2e-6
        one = slice(number, number + 1)
        alone = library().attend(step[one], cache, first_blocks[one], positions[one], dim**-0.5)
        assert torch.equal(alone[0], found[number])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_and_values_are_rounded_as_torch_does(instruction_set, dtype):
    bits = torch.randint(-(2**31), 2**31, (1, 1, 3, 4096), generator=torch.Generator().manual_seed(0))
    step = bits.to(torch.int32).view(torch.float32)
    step[..., :8] = torch.tensor([65504.0, 65519.9, 65520.0, 2.0**-24, 2.0**-25, 2.0**-25 * 1.5, 2.0**-14, -0.0])
    keys, values = torch.zeros(1, 1, 4096, 64, dtype=dtype), torch.zeros(1, 1, 64, 4096, dtype=dtype)
    first = torch.zeros(1, dtype=torch.int64)
    library().attend(step, CachedKeysValues(keys, values), first, first, 1.0)
    for stored, given_ in ((keys[0, 0, :, 0], step[0, 0, 1]), (values[0, 0, 0], step[0, 0, 2])):
        assert torch.equal(stored.isnan(), given_.isnan())
        assert torch.equal(stored.nan_to_num(7), given_.to(dtype).nan_to_num(7))


@pytest.mark.parametrize("shape", [(3, 7), (1024, 1024), (5, 1000, 777)])
def test_memory_for_huge_pages_begins_with_one(shape):
    tensor = empty_in_huge_pages(shape, torch.float16)
    assert tensor.shape == shape and tensor.dtype is torch.float16 and tensor.is_contiguous()
    assert tensor.nbytes < 2**21 or tensor.data_ptr() % 2**21 == 0
    assert torch.equal(tensor.fill_(3), torch.full(shape, 3.0, dtype=torch.float16))


def test_without_the_library_torch_computes(monkeypatch):
    monkeypatch.setenv("OPT_MEGATRON_CPU_KERNELS", "off")
    library.cache_clear()
    try:
        assert cpu_kernels.library() is None
        assert not CPUFloatLinear.is_available(torch.device("cpu"), torch.float32)
    finally:
        monkeypatch.undo()
        library.cache_clear()
    assert CPUFloatLinear.is_available(torch.device("cpu"), torch.float32)


def test_the_openmp_of_torch_is_found_among_the_mapped_files():
    path = "/site-packages/torch/lib/libgomp.so.1"
    maps = f"7f00-7f01 r-xp 0 00:00 1  {path}\n7f01-7f02 rw-p 0 00:00 0 \n7f02-7f03 rw-p 0 00:00 0 "
    assert cpu_kernels._OPENMP.findall(maps) == [path]
