// Standard normal numbers of Philox's words, to the bit those of opt_megatron/checkpoint/mezo/normal_numbers.py, which
// says what they are: every product and sum is rounded on its own here, too.

#include <cmath>
#include <cstring>

#include "kernels.h"
#include "scratch.h"

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace KERNELS {

namespace {

constexpr int COUNTERS = 64;  // that are computed at a time
constexpr int WORDS = 4;      // of a counter, each of which becomes a number
constexpr int ROUNDS = 10;
constexpr uint32_t SQRT_HALF_BITS = 0x3F3504F3;
constexpr float PI_4 = 0.78539816339744830962f;

struct Block {
    uint32_t words[WORDS][COUNTERS];
    float numbers[COUNTERS][WORDS];
};

// Philox4x32-10 of the counters (row, column + 0, 1, 2 ..., name).
void philox(Block& block, uint32_t row, uint32_t column, uint64_t name, uint64_t seed) {
    auto& [c0, c1, c2, c3] = block.words;
    for (int i = 0; i < COUNTERS; i++) {
        c0[i] = row;
        c1[i] = column + static_cast<uint32_t>(i);
        c2[i] = static_cast<uint32_t>(name);
        c3[i] = static_cast<uint32_t>(name >> 32);
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < ROUNDS; round++, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
        for (int i = 0; i < COUNTERS; i++) {
            const uint64_t left = uint64_t{c0[i]} * 0xD2511F53, right = uint64_t{c2[i]} * 0xCD9E8D57;
            c0[i] = static_cast<uint32_t>(right >> 32) ^ c1[i] ^ k0;
            c1[i] = static_cast<uint32_t>(right);
            c2[i] = static_cast<uint32_t>(left >> 32) ^ c3[i] ^ k1;
            c3[i] = static_cast<uint32_t>(left);
        }
    }
}

inline float logarithm(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const int32_t exponent = static_cast<int32_t>(bits - SQRT_HALF_BITS) >> 23;
    bits -= static_cast<uint32_t>(exponent) << 23;
    float mantissa;
    std::memcpy(&mantissa, &bits, sizeof mantissa);
    const float ratio = (mantissa - 1.0f) / (mantissa + 1.0f), square = ratio * ratio;
    const float series =
        (((square * static_cast<float>(1.0 / 9) + static_cast<float>(1.0 / 7)) * square + static_cast<float>(1.0 / 5)) *
             square + static_cast<float>(1.0 / 3)) * square + 1.0f;
    return static_cast<float>(exponent) * 0.69314718055994530942f + ratio * 2.0f * series;
}

// Two numbers of each pair of words.
void box_muller(Block& block, int first) {
    const uint32_t *radius_bits = block.words[first], *angle_bits = block.words[first + 1];
    for (int i = 0; i < COUNTERS; i++) {
        const float uniform = static_cast<float>(static_cast<int32_t>((radius_bits[i] >> 8) + 1)) * 0x1p-24f;
        float radius = std::sqrt(logarithm(uniform) * -2.0f);
        const uint32_t quarter = angle_bits[i] >> 30;
        const int32_t fraction = static_cast<int32_t>(angle_bits[i] >> 8 & 0x3FFFFF) - 0x200000;
        const float angle = static_cast<float>(fraction) * (PI_4 * 0x1p-21f), square = angle * angle;
        const float sine = angle * ((((square * static_cast<float>(1.0 / 362880) + static_cast<float>(-1.0 / 5040)) *
                                          square + static_cast<float>(1.0 / 120)) * square +
                                     static_cast<float>(-1.0 / 6)) * square + 1.0f);
        const float cosine = (((square * static_cast<float>(1.0 / 40320) + static_cast<float>(-1.0 / 720)) * square +
                               static_cast<float>(1.0 / 24)) * square - 0.5f) * square + 1.0f;
        radius = quarter & 2 ? -radius : radius;
        block.numbers[i][first] = radius * (quarter & 1 ? sine : cosine);
        block.numbers[i][first + 1] = radius * (quarter & 1 ? cosine : sine);
    }
}

void fill_row(float* output, uint64_t seed, uint64_t name, int64_t row, int64_t first_column, int64_t columns) {
    Block block;
    const int64_t end = first_column + columns;
    for (int64_t begin = first_column / WORDS * WORDS; begin < end; begin += COUNTERS * WORDS) {
        philox(block, static_cast<uint32_t>(row), static_cast<uint32_t>(begin / WORDS), name, seed);
        box_muller(block, 0);
        box_muller(block, 2);
        const int64_t from = larger(begin, first_column), to = smaller<int64_t>(begin + COUNTERS * WORDS, end);
        const size_t bytes = static_cast<size_t>(to - from) * sizeof(float);
        std::memcpy(output + (from - first_column), &block.numbers[0][0] + (from - begin), bytes);
    }
}

}  // namespace

void normal_numbers(const NormalNumbers& call) {
    const int64_t tasks = int64_t{call.seeds_count} * call.rows;
#pragma omp parallel for schedule(static)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t row = call.first_row + task % call.rows;
        fill_row(call.output + task * call.columns, call.seeds[task / call.rows], call.name, row, call.first_column,
                 call.columns);
    }
}

}  // namespace KERNELS
