// Attention of single queries over a cache of keys and values in blocks of 64 tokens, all queries in one call.
//
// Keys of a block are stored by dimension, so that 64 scores are sums of whole vectors; values by token.

#include <cmath>

#include "kernels.h"
#include "scratch.h"
#include "vector.h"

namespace KERNELS {
namespace {

constexpr int BLOCK = 64;
constexpr int VECTORS_AT_ONCE = LANES == 16 ? 4 : 8;  // of scores, and of an output

template <typename W>
struct Head {  // of one sequence
    const W* keys;
    const W* values;
    const float* key_scales;  // null without scales
    const float* value_scales;
    int64_t stride, scale_stride;  // from one block to the next
    int dim;
};

// Null without scales.
float* from(float* scales, int64_t number) { return scales == nullptr ? nullptr : scales + number; }

// A key or value, into memory where its numbers are `stride` apart.
template <typename W>
void keep(const float* vector, int64_t dim, W* target, int64_t stride, float*) {
    for (int64_t i = 0; i < dim; i++) convert(vector[i], target[i * stride]);
}

// A NaN or an infinity makes the scale NaN, and so the whole vector.
void keep(const float* vector, int64_t dim, int8_t* target, int64_t stride, float* scale) {
    float largest = 0, nothing = 0;
    for (int64_t i = 0; i < dim; i++) {
        largest = larger(largest, std::fabs(vector[i]));
        nothing += vector[i] * 0;
    }
    const float inverse = largest > 0 && nothing == 0 ? 127 / largest : 0;
    for (int64_t i = 0; i < dim; i++) {
        const float scaled = inverse > 0 ? vector[i] * inverse : 0;
        target[i * stride] = static_cast<int8_t>(scaled + std::copysign(0.5f, scaled));
    }
    *scale = largest / 127 + nothing;
}

// scores[64] of a block
template <typename W>
void score_block(const Head<W>& head, int block, const float* query, float scale, float* scores) {
    const W* keys = head.keys + block * head.stride;
    for (int column = 0; column < BLOCK; column += VECTORS_AT_ONCE * LANES) {
        Floats sum[VECTORS_AT_ONCE] = {};
        for (int i = 0; i < head.dim; i++) {
            const Floats factor = broadcast(query[i] * scale);
            for (int v = 0; v < VECTORS_AT_ONCE; v++) sum[v] += load(keys + i * BLOCK + column + v * LANES) * factor;
        }
        for (int v = 0; v < VECTORS_AT_ONCE; v++) {
            const int offset = column + v * LANES;
            if (head.key_scales != nullptr) sum[v] *= load(head.key_scales + block * head.scale_stride + offset);
            store(scores + offset, sum[v]);
        }
    }
}

// Scores become e^(score - largest); returns their sum.
float exponentials(float* scores, int count, int padded) {
    float largest = scores[0];
    for (int i = 1; i < count; i++) largest = larger(largest, scores[i]);
    fill(scores + count, scores + padded, largest);
    Floats sum = {};
    const int whole = count / LANES * LANES;
    for (int i = 0; i < padded; i += LANES) {
        const Floats power = exponential(load(scores + i) - largest);
        store(scores + i, power);
        if (i < whole) sum += power;
    }
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += sum[lane];
    for (int i = whole; i < count; i++) total += scores[i];
    return total;
}

// output[N vectors] = sum of weights[i] * values of token i
template <int N, typename W>
void sum_vectors(const Head<W>& head, const W* values, const float* weights, int count, float* output) {
    Floats sum[N] = {};
    for (int begin = 0; begin < count; begin += BLOCK, values += head.stride) {
        const W* row = values;
        for (int i = begin; i < smaller(count, begin + BLOCK); i++, row += head.dim) {
            const Floats factor = broadcast(weights[i]);
            for (int v = 0; v < N; v++) sum[v] += load(row + v * LANES) * factor;
        }
    }
    for (int v = 0; v < N; v++) store(output + v * LANES, sum[v]);
}

template <typename W>
void apply_value_scales(const Head<W>& head, float* weights, int count) {
    for (int i = 0; i < count; i++) weights[i] *= head.value_scales[i / BLOCK * head.scale_stride + i % BLOCK];
}

template <typename W>
void sum_values(const Head<W>& head, const float* weights, int count, float* output) {
    int column = 0;
    for (; column + VECTORS_AT_ONCE * LANES <= head.dim; column += VECTORS_AT_ONCE * LANES)
        sum_vectors<VECTORS_AT_ONCE>(head, head.values + column, weights, count, output + column);
    for (; column + LANES <= head.dim; column += LANES)
        sum_vectors<1>(head, head.values + column, weights, count, output + column);
    for (; column < head.dim; column++) {  // a dimension that is no multiple of a vector
        float sum = 0;
        for (int i = 0; i < count; i++)
            sum += weights[i] * to_float(head.values[i / BLOCK * head.stride + i % BLOCK * head.dim + column]);
        output[column] = sum;
    }
}

// False: there was no memory for the scores; the output is not complete.
template <typename W>
bool attend(const Attention& call) {
    const int64_t dim = call.dim, heads = call.heads, head_size = dim * BLOCK, block_size = heads * head_size;
    W* keys = static_cast<W*>(call.keys);
    W* values = static_cast<W*>(call.values);
    const int64_t pairs = heads * call.queries;
    bool is_complete = true;
#pragma omp parallel reduction(&& : is_complete) if (pairs > 1)
    {
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < pairs; pair++) {  // every key before any query: some are of one sequence
            const int64_t query = pair / heads, head = pair % heads, position = call.positions[query];
            const int64_t begin = (call.first_blocks[query] + position / BLOCK) * block_size + head * head_size;
            const int64_t slot = position % BLOCK;
            const float* key = call.query_key_value + (pair * 3 + 1) * dim;
            const int64_t number = begin / dim + slot;
            keep(key, dim, keys + begin + slot, BLOCK, from(call.key_scales, number));
            keep(key + dim, dim, values + begin + slot * dim, 1, from(call.value_scales, number));
        }
#pragma omp for schedule(dynamic)
        for (int64_t pair = 0; pair < pairs; pair++) {
            const int64_t query = pair / heads, head = pair % heads;
            const int count = static_cast<int>(call.positions[query]) + 1, blocks = (count + BLOCK - 1) / BLOCK;
            const int64_t begin = call.first_blocks[query] * block_size + head * head_size;
            const float* key_scales = from(call.key_scales, begin / dim);
            const float* value_scales = from(call.value_scales, begin / dim);
            const Head<W> own{keys + begin, values + begin, key_scales, value_scales, block_size, heads * BLOCK, call.dim};
            float* scores = scratch<struct Scores, float>(size_t(blocks) * BLOCK);
            if (scores == nullptr) {
                is_complete = false;
                continue;
            }
            const float* vector = call.query_key_value + pair * 3 * dim;
            for (int block = 0; block < blocks; block++)
                score_block(own, block, vector, call.scale, scores + block * BLOCK);
            const float total = exponentials(scores, count, blocks * BLOCK);
            if (value_scales != nullptr) apply_value_scales(own, scores, count);
            float* output = call.output + pair * dim;
            sum_values(own, scores, count, output);
            for (int64_t i = 0; i < dim; i++) output[i] /= total;
        }
    }
    return is_complete;
}

}  // namespace

bool attention(const Attention& call) {
    if (call.format == FLOAT32) return attend<float>(call);
    if (call.format == INT8) return attend<int8_t>(call);
    return call.format == FLOAT16 ? attend<Half>(call) : attend<BFloat>(call);
}

}  // namespace KERNELS
