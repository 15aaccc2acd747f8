// Attention of single queries over a cache of keys and values in blocks of 64 tokens, all queries in one call.
//
// Keys of a block are stored by dimension, so that 64 scores are sums of whole vectors; values by token.

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
    int64_t stride;  // from one block to the next
    int dim;
};

// scores[64] of a block
template <typename W>
void score_block(const Head<W>& head, const W* keys, const float* query, float scale, float* scores) {
    for (int column = 0; column < BLOCK; column += VECTORS_AT_ONCE * LANES) {
        Floats sum[VECTORS_AT_ONCE] = {};
        for (int i = 0; i < head.dim; i++) {
            const Floats factor = broadcast(query[i] * scale);
            for (int v = 0; v < VECTORS_AT_ONCE; v++) sum[v] += load(keys + i * BLOCK + column + v * LANES) * factor;
        }
        for (int v = 0; v < VECTORS_AT_ONCE; v++) store(scores + column + v * LANES, sum[v]);
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
            for (int64_t i = 0; i < dim; i++) convert(key[i], keys[begin + i * BLOCK + slot]);
            for (int64_t i = 0; i < dim; i++) convert(key[dim + i], values[begin + slot * dim + i]);
        }
#pragma omp for schedule(dynamic)
        for (int64_t pair = 0; pair < pairs; pair++) {
            const int64_t query = pair / heads, head = pair % heads;
            const int count = static_cast<int>(call.positions[query]) + 1, blocks = (count + BLOCK - 1) / BLOCK;
            const int64_t begin = call.first_blocks[query] * block_size + head * head_size;
            const Head<W> own{keys + begin, values + begin, block_size, call.dim};
            float* scores = scratch<struct Scores, float>(size_t(blocks) * BLOCK);
            if (scores == nullptr) {
                is_complete = false;
                continue;
            }
            const float* vector = call.query_key_value + pair * 3 * dim;
            for (int block = 0; block < blocks; block++)
                score_block(own, own.keys + block * block_size, vector, call.scale, scores + block * BLOCK);
            const float total = exponentials(scores, count, blocks * BLOCK);
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
    return call.format == FLOAT16 ? attend<Half>(call) : attend<BFloat>(call);
}

}  // namespace KERNELS
