// The library's kernels, and what they are called with.
#pragma once

#include <cstdint>

constexpr int TILE = 64;  // outputs that are stored side by side

enum Format : int32_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, INT8 = 3, INT4 = 4 };

// A weight [outputs, inputs] in tiles of 64 outputs, the last one padded; no tile depends on another.
//   floats: [tile][input][64]
//   INT8:   [tile][input / 4][64][4] of weight + 128; inputs are padded to whole groups with 128
//   INT4:   [tile][input / 8][64][4]: inputs 0 to 3 in the low halves of the bytes, 4 to 7 in the high ones
struct Weight {
    int32_t format;
    int32_t outputs;
    int32_t inputs;
    int32_t group;        // INT8, INT4: inputs with a scale of their own, of activations too; a multiple of 8
    const void* values;
    const float* scales;  // INT8: [tile][64]; INT4: [tile][group][64]
    const uint8_t* zeros; // INT4: [tile][group][64], the number that stands for zero
    const float* factors; // INT8, INT4: [inputs], of the activations before they are rounded, or null
};

struct Linear {
    const Weight* weight;
    int32_t tokens;
    int32_t relu;        // of the output; excludes a residual
    int32_t skip_zeros;  // leaves out the rows of inputs that are zero in every token, where the others are few
    const float* x;      // [tokens, inputs]
    const float* bias;   // [outputs], or null
    const float* residual;  // [tokens, outputs], or null
    float* y;            // [tokens, outputs]
};

// Keys [block][head][dim][64] and values [block][head][64][dim] of blocks of 64 tokens.
// INT8: each token's key and value of a head is a scale times signed numbers.
struct Attention {
    int32_t format;  // of the cache: FLOAT32, FLOAT16, BFLOAT16 or INT8
    int32_t queries;
    int32_t heads;
    int32_t dim;
    float scale;
    const float* query_key_value;  // [queries, heads, 3, dim]
    const int64_t* first_blocks;   // [queries], of its sequence
    const int64_t* positions;      // [queries], in its sequence
    void* keys;
    void* values;
    float* key_scales;    // INT8: [block][head][64]
    float* value_scales;
    float* output;  // [queries, heads * dim]
};

// Normal numbers of a block of a tensor, for each seed.
struct NormalNumbers {
    const uint64_t* seeds;  // [seeds_count]
    uint64_t name;          // a hash of the tensor's
    int32_t seeds_count;
    int64_t first_row;
    int64_t rows;
    int64_t first_column;
    int64_t columns;
    float* output;  // [seeds_count, rows, columns]
};

// The same kernels, compiled for each instruction set. False: there was no memory, and the output is not complete.
namespace base {
bool linear(const Linear&);
bool attention(const Attention&);
void normal_numbers(const NormalNumbers&);
}  // namespace base
namespace avx2 {  // with FMA and F16C
bool linear(const Linear&);
bool attention(const Attention&);
void normal_numbers(const NormalNumbers&);
}  // namespace avx2
namespace avx512 {  // F, BW, DQ, VL and VNNI
bool linear(const Linear&);
bool attention(const Attention&);
void normal_numbers(const NormalNumbers&);
}  // namespace avx512
