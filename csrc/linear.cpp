// y = x W^T + bias, with ReLU or a residual: products that read each weight once for up to some tens of tokens.
//
// A tile's 64 outputs are lanes of a few vectors, to which the products with one input after the other are added. So
// a token's sums are made in the same order whatever the number of tokens, and a row of weights whose input is zero
// can be left out without a change of any bit.

#include <cmath>
#include <type_traits>

#include "kernels.h"
#include "scratch.h"
#include "vector.h"

namespace KERNELS {
namespace {

constexpr int VECTORS = TILE / LANES;
constexpr int MAX_TOKENS = 6;         // whose sums are in registers together
constexpr int TOKENS_AT_ONCE = 192;   // whose sums of a tile are in the second-level cache
constexpr int ROWS_AT_ONCE = 128;     // of a tile, which stay near from one group of tokens to the next
constexpr int64_t MIN_PARALLEL = 1 << 15;  // products; fewer are computed by one thread
constexpr int SAMPLE = 128;            // inputs that tell whether counting the zeros of all is worth its time
constexpr double MAX_ROWS_READ = 0.4;  // of all; with more, reading every row in turn is faster
constexpr double MAX_INTEGER_ROWS_READ = 0.55;  // each for 4 or 8 inputs
// A processor asks for memory ahead by itself, but begins anew at each page of 4 KiB.
constexpr int BYTES_AHEAD = 8192;
constexpr int INDICES_AHEAD = 8;

// AVX-512 has 32 registers: 6 x 4 sums, 4 vectors of weights. The others have 16: 6 x 2 sums, 2 vectors of weights.
constexpr int vectors_at_once(int tokens) {
    return LANES == 16 ? VECTORS : tokens == 1 ? smaller(VECTORS, 8) : tokens <= 3 ? 4 : 2;
}

// The rows of a tile that a product reads. `later`: the one to ask for while row `number` is computed, which may follow
// the last one.
struct AllRows {
    int count;
    int operator[](int number) const { return number; }
    int64_t later(int number, int distance) const { return int64_t{number} + distance; }
};
struct ActiveRows {
    int count;
    const int32_t* indices;
    int operator[](int number) const { return indices[number]; }
    int64_t later(int number, int) const { return indices[smaller(number + INDICES_AHEAD, count - 1)]; }
};

// A step over some rows of one tile for all tokens.
template <typename Rows>
struct TileRows {
    const Rows& rows;
    int first, count;  // numbers of rows
    const float* x;
    int64_t width;  // of x
    float* sums;    // [tokens][64]
};

template <int N>
using Constant = std::integral_constant<int, N>;

// Asks for `bytes` from `begin`, which need not be memory of the weight.
inline void prefetch(const void* begin, size_t bytes) {
    for (size_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(begin) + byte, 0, 2);
}

enum class From { TILE, TILE_AND_KEEP, COPY };  // KEEP: the rows are copied as floats for the tokens that follow

// sums[t] += x[t, i] * row i for T tokens.
template <int T, From FROM, bool IS_AHEAD, typename Rows, typename W>
void add_rows(const TileRows<Rows>& step, const W* tile, float* copy, int token) {
    constexpr int V = vectors_at_once(T);
    const float* x = step.x + token * step.width;
    for (int column = 0; column < TILE; column += V * LANES) {
        float* sums = step.sums + token * TILE + column;
        Floats sum[T][V];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) sum[t][v] = load(sums + t * TILE + v * LANES);
        for (int number = 0; number < step.count; number++) {
            const int row = step.rows[step.first + number];
            Floats weights[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) {
                const int64_t offset = column + v * LANES;
                if constexpr (FROM == From::COPY) {
                    weights[v] = load(copy + int64_t{number} * TILE + offset);
                } else {
                    weights[v] = load(tile + int64_t{row} * TILE + offset);
                    if constexpr (FROM == From::TILE_AND_KEEP)
                        store(copy + int64_t{number} * TILE + offset, weights[v]);
                }
            }
            if constexpr (FROM != From::COPY || IS_AHEAD) {
                // With IS_AHEAD these rows are near, and the memory is idle: the next ones can come.
                const int distance = IS_AHEAD ? step.count : BYTES_AHEAD / int(TILE * sizeof(W));
                prefetch(tile + step.rows.later(step.first + number, distance) * TILE + column, V * LANES * sizeof(W));
            }
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const Floats factor = broadcast(x[t * step.width + row]);
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) sum[t][v] += weights[v] * factor;
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) store(sums + t * TILE + v * LANES, sum[t][v]);
    }
}

// Calls compute(first token, number of tokens as a constant, number of the group) for groups of nearly equal size.
template <typename Compute>
void for_token_groups(int tokens, Compute compute) {
    const int groups = (tokens + MAX_TOKENS - 1) / MAX_TOKENS;
    for (int group = 0; group < groups; group++) {
        const int begin = tokens * group / groups;
        switch (tokens * (group + 1) / groups - begin) {
            case 1: compute(begin, Constant<1>{}, group); break;
            case 2: compute(begin, Constant<2>{}, group); break;
            case 3: compute(begin, Constant<3>{}, group); break;
            case 4: compute(begin, Constant<4>{}, group); break;
            case 5: compute(begin, Constant<5>{}, group); break;
            default: compute(begin, Constant<6>{}, group);
        }
    }
}

template <typename Rows, typename W>
void multiply_tile(
    const W* tile, const Rows& rows, const float* x, int64_t width, int tokens, float* sums, float* copy) {
    constexpr From AGAIN = std::is_same_v<W, float> ? From::TILE : From::COPY;
    constexpr From FIRST = std::is_same_v<W, float> ? From::TILE : From::TILE_AND_KEEP;
    const int rows_at_once = tokens <= MAX_TOKENS ? larger(1, rows.count) : ROWS_AT_ONCE;
    for (int first = 0; first < rows.count; first += rows_at_once) {
        const TileRows<Rows> step{rows, first, smaller(rows_at_once, rows.count - first), x, width, sums};
        for_token_groups(tokens, [&](int token, auto count, int group) {
            constexpr int T = decltype(count)::value;
            if (tokens <= MAX_TOKENS) add_rows<T, From::TILE, false>(step, tile, copy, token);
            else if (group == 0) add_rows<T, FIRST, false>(step, tile, copy, token);
            else if (group == 1) add_rows<T, AGAIN, true>(step, tile, copy, token);
            else add_rows<T, AGAIN, false>(step, tile, copy, token);
        });
    }
}

// Activations in 8 bits: each group of inputs of each token has its own scale, so that large ones spoil few others.
struct Quantized {
    int groups;
    int64_t width;          // padded to whole groups
    const int8_t* values;   // [tokens, width]
    const float* scales;    // [tokens, groups]
    const int32_t* totals;  // [tokens, groups]: sums of values
    const uint32_t* active; // [groups], or null: bit i is 0 where row i of the group's weights has only zeros to multiply
};

// A row of a tile: its weights for 4 inputs in 8 bits, or for 8 in 4 bits.
constexpr int inputs_per_row(bool is_int4) { return is_int4 ? 8 : 4; }

// factors: null, or of each input.
void quantize_group(
    const float* given, const float* factors, int count, int group, int8_t* values, float* scale, int32_t* total) {
    const auto x = [&](int i) { return factors == nullptr ? given[i] : given[i] * factors[i]; };
    float largest = 0;
    for (int i = 0; i < count; i++) largest = larger(largest, std::fabs(x(i)));
    const float inverse = largest > 0 ? 127 / largest : 0;
    int32_t sum = 0;
    for (int i = 0; i < count; i++) {
        const float scaled = x(i) * inverse;
        const int32_t rounded = static_cast<int32_t>(scaled + std::copysign(0.5f, scaled));
        values[i] = static_cast<int8_t>(rounded);
        sum += rounded;
    }
    fill(values + count, values + group, int8_t{0});
    *scale = largest / 127;
    *total = sum;
}

// sums[t] += scale of the group * (products in 32-bit integers - zero * total), group after group, for T tokens.
template <int T, bool IS_INT4, bool IS_SPARSE>
void add_groups(const Weight& weight, int64_t tile, const Quantized& x, int first, int count, int token, float* sums_) {
    constexpr int V = vectors_at_once(T);
    const int64_t bytes_per_input = IS_INT4 ? TILE / 2 : TILE;
    const uint8_t* values = static_cast<const uint8_t*>(weight.values) + tile * x.width * bytes_per_input;
    for (int column = 0; column < TILE; column += V * LANES) {
        for (int group = first; group < first + count; group++) {
            uint32_t active = 0;
            if constexpr (IS_SPARSE) {
                active = x.active[group];
                if (active == 0) continue;
            }
            const int64_t vector = (tile * x.groups + group) * TILE + column;
            const int8_t* inputs = x.values + token * x.width + int64_t{group} * weight.group;
            Ints sum[T][V];
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const int32_t total = x.totals[(token + t) * x.groups + group];
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) {
                    if constexpr (IS_INT4) {
                        const uint8_t* zeros = weight.zeros + vector + v * LANES;
                        Ints zero;
                        for (int lane = 0; lane < LANES; lane++) zero[lane] = zeros[lane];
                        sum[t][v] = zero * -total;
                    } else {
                        sum[t][v] = broadcast(-128 * total);
                    }
                }
            }
            const uint8_t* rows = values + int64_t{group} * weight.group * bytes_per_input + column * 4;
            for (int i = 0; IS_SPARSE ? active != 0 : i < weight.group; i += inputs_per_row(IS_INT4)) {
                if constexpr (IS_SPARSE) {
                    i = __builtin_ctz(active) * inputs_per_row(IS_INT4);
                    active &= active - 1;
                }
                const uint8_t* row = rows + i * bytes_per_input;
                if constexpr (!IS_SPARSE) prefetch(row + BYTES_AHEAD, V * LANES * 4);
#pragma GCC unroll 2
                for (int half = 0; half < (IS_INT4 ? 2 : 1); half++) {
                    Ints weights[V];
#pragma GCC unroll 8
                    for (int v = 0; v < V; v++) {
                        weights[v] = load_bits<Ints>(row + v * LANES * 4);
                        if constexpr (IS_INT4) weights[v] = (half ? weights[v] >> 4 : weights[v]) & 0x0f0f0f0f;
                    }
#pragma GCC unroll 8
                    for (int t = 0; t < T; t++) {
                        int32_t four;
                        std::memcpy(&four, inputs + t * x.width + i + 4 * half, sizeof four);
                        const Ints factors = broadcast(four);
#pragma GCC unroll 8
                        for (int v = 0; v < V; v++) sum[t][v] = add_products(sum[t][v], weights[v], factors);
                    }
                }
            }
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const Floats scale = broadcast(x.scales[(token + t) * x.groups + group]);
                float* sums = sums_ + (token + t) * TILE + column;
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) {
                    Floats factor = scale;
                    if constexpr (IS_INT4) factor *= load(weight.scales + vector + v * LANES);
                    store(sums + v * LANES, load(sums + v * LANES) + to_floats(sum[t][v]) * factor);
                }
            }
        }
    }
}

template <bool IS_INT4>
void multiply_tile(const Weight& weight, int64_t tile, const Quantized& x, int tokens, float* sums) {
    const int at_once = tokens <= MAX_TOKENS ? x.groups : larger(1, 4 * ROWS_AT_ONCE / weight.group);
    for (int first = 0; first < x.groups; first += at_once) {
        const int count = smaller(at_once, x.groups - first);
        for_token_groups(tokens, [&](int token, auto size, int) {
            constexpr int T = decltype(size)::value;
            if (x.active == nullptr) add_groups<T, IS_INT4, false>(weight, tile, x, first, count, token, sums);
            else add_groups<T, IS_INT4, true>(weight, tile, x, first, count, token, sums);
        });
    }
}

// Bias, ReLU or residual, and the outputs of a tile that there are.
void finish(const Linear& call, int64_t tile, int first, int tokens, const float* sums) {
    const Weight& weight = *call.weight;
    const int64_t begin = tile * TILE;
    const int count = static_cast<int>(smaller<int64_t>(TILE, weight.outputs - begin));
    const float* scales = weight.format == INT8 ? weight.scales + begin : nullptr;
    for (int t = 0; t < tokens; t++) {
        const int64_t offset = int64_t{first + t} * weight.outputs + begin;
        for (int o = 0; o < count; o++) {
            float value = sums[t * TILE + o];
            if (scales != nullptr) value *= scales[o];
            if (call.bias != nullptr) value += call.bias[begin + o];
            if (call.relu) value = value > 0 || value != value ? value : 0;
            if (call.residual != nullptr) value += call.residual[offset + o];
            call.y[offset + o] = value;
        }
    }
}

// Which inputs are not zero in every token: null where leaving rows out does not pay.
const int32_t* active_inputs(const Linear& call, int first, int tokens, int* count) {
    const int inputs = call.weight->inputs;
    *count = inputs;
    if (!call.skip_zeros || tokens > MAX_TOKENS) return nullptr;
    int32_t* indices = scratch<struct Indices, int32_t>(size_t(inputs));
    if (indices == nullptr) return nullptr;
    const float* x = call.x + int64_t{first} * inputs;
    int active = 0;
    for (int i = 0; i < inputs; i++) {
        bool is_active = false;
        for (int t = 0; t < tokens; t++) is_active |= x[int64_t{t} * inputs + i] != 0;
        indices[active] = i;
        active += is_active;
        if (i + 1 == SAMPLE && active > SAMPLE / 2) return nullptr;  // as a layer's that follows no ReLU
    }
    if (active > MAX_ROWS_READ * inputs) return nullptr;
    *count = active;
    return indices;
}

// `active` becomes Quantized's; false where leaving rows out does not pay.
bool find_active_rows(const Linear& call, const Quantized& x, int tokens, uint32_t* active) {
    const int size = call.weight->group, words = inputs_per_row(call.weight->format == INT4) / 4;
    int64_t rows = 0;
    for (int group = 0; group < x.groups; group++) {
        active[group] = 0;
        for (int i = 0; i < size / 4; i++) {
            uint32_t any = 0, word;
            for (int t = 0; t < tokens; t++) {
                std::memcpy(&word, x.values + t * x.width + int64_t{group} * size + 4 * i, sizeof word);
                any |= word;
            }
            active[group] |= uint32_t{any != 0} << i / words;
        }
        rows += __builtin_popcount(active[group]);
        const int64_t looked_at = int64_t{group + 1} * size / 4 / words;
        if (group + 1 == x.groups || looked_at == SAMPLE)
            if (rows > MAX_INTEGER_ROWS_READ * looked_at) return false;
    }
    return true;
}

// False: there was no memory for the sums; the output is not complete.
bool multiply_floats(const Linear& call, int first, int tokens) {
    const Weight& weight = *call.weight;
    int count;
    const int32_t* active = active_inputs(call, first, tokens, &count);
    const float* x = call.x + int64_t{first} * weight.inputs;
    const int64_t tiles = (weight.outputs + TILE - 1) / TILE, size = int64_t{weight.inputs} * TILE;
    bool is_complete = true;
#pragma omp parallel reduction(&& : is_complete) if (tiles > 1 && size * tiles * tokens > MIN_PARALLEL)
    {
        float* sums = scratch<struct Sums, float>(size_t(tokens + ROWS_AT_ONCE) * TILE);
        is_complete = sums != nullptr;
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; tile++) {
            if (sums == nullptr) continue;
            fill(sums, sums + tokens * TILE, 0.0f);
            const auto multiply = [&](auto* values) {
                const auto* own = values + tile * size;
                float* copy = sums + tokens * TILE;
                if (active == nullptr) multiply_tile(own, AllRows{count}, x, weight.inputs, tokens, sums, copy);
                else multiply_tile(own, ActiveRows{count, active}, x, weight.inputs, tokens, sums, copy);
            };
            if (weight.format == FLOAT32) multiply(static_cast<const float*>(weight.values));
            else if (weight.format == FLOAT16) multiply(static_cast<const Half*>(weight.values));
            else multiply(static_cast<const BFloat*>(weight.values));
            finish(call, tile, first, tokens, sums);
        }
    }
    return is_complete;
}

bool multiply_integers(const Linear& call, int first, int tokens) {
    const Weight& weight = *call.weight;
    const int groups = (weight.inputs + weight.group - 1) / weight.group;
    const int64_t width = int64_t{groups} * weight.group, tiles = (weight.outputs + TILE - 1) / TILE;
    const int64_t cells = int64_t{tokens} * groups;
    char* memory = scratch<struct Activations, char>(size_t(tokens) * size_t(width) + size_t(cells) * 8 + size_t(groups) * 4);
    if (memory == nullptr) return false;
    float* scales = reinterpret_cast<float*>(memory);
    int32_t* totals = reinterpret_cast<int32_t*>(scales + cells);
    uint32_t* active = reinterpret_cast<uint32_t*>(totals + cells);
    int8_t* values = reinterpret_cast<int8_t*>(active + groups);
    Quantized x{groups, width, values, scales, totals, nullptr};
    bool is_complete = true;
#pragma omp parallel reduction(&& : is_complete) if (tiles > 1 && width * tiles * TILE * tokens > MIN_PARALLEL)
    {
#pragma omp for schedule(static)
        for (int64_t cell = 0; cell < cells; cell++) {
            const int64_t token = cell / groups, begin = cell % groups * weight.group;
            const int count = static_cast<int>(smaller<int64_t>(weight.group, weight.inputs - begin));
            quantize_group(
                call.x + (first + token) * weight.inputs + begin,
                weight.factors == nullptr ? nullptr : weight.factors + begin, count, weight.group,
                values + token * width + begin, scales + cell, totals + cell);
        }
        if (call.skip_zeros && tokens <= MAX_TOKENS) {
#pragma omp single
            if (find_active_rows(call, x, tokens, active)) x.active = active;
        }
        float* sums = scratch<struct Sums, float>(size_t(tokens) * TILE);
        is_complete = sums != nullptr;
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; tile++) {
            if (sums == nullptr) continue;
            fill(sums, sums + tokens * TILE, 0.0f);
            if (weight.format == INT4) multiply_tile<true>(weight, tile, x, tokens, sums);
            else multiply_tile<false>(weight, tile, x, tokens, sums);
            finish(call, tile, first, tokens, sums);
        }
    }
    return is_complete;
}

}  // namespace

bool linear(const Linear& call) {
    const auto multiply = call.weight->format <= BFLOAT16 ? multiply_floats : multiply_integers;
    for (int first = 0; first < call.tokens; first += TOKENS_AT_ONCE)
        if (!multiply(call, first, smaller(TOKENS_AT_ONCE, call.tokens - first))) return false;
    return true;
}

}  // namespace KERNELS
