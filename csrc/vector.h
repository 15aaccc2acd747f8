// Vectors of the instruction set that a file is compiled for, and the weights' formats as vectors of floats.
//
// Each file that includes this is compiled once an instruction set, with KERNELS naming a namespace of its own.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

namespace KERNELS {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

struct Half {  // IEEE binary16
    uint16_t bits;
};
struct BFloat {  // the upper half of a float
    uint16_t bits;
};

inline Floats broadcast(float value) { return value - Floats{}; }
inline Ints broadcast(int32_t value) { return value - Ints{}; }

template <typename Vector, typename Element>
inline Vector load_bits(const Element* source) {
    Vector vector;
    std::memcpy(&vector, source, sizeof vector);
    return vector;
}

inline Floats load(const float* source) { return load_bits<Floats>(source); }

inline Floats load(const BFloat* source) {
#if defined(__AVX512F__)
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
    return reinterpret_cast<Floats>(_mm512_slli_epi32(wide, 16));
#elif defined(__AVX2__)
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
    return reinterpret_cast<Floats>(_mm256_slli_epi32(wide, 16));
#else
    Ints wide;
    for (int lane = 0; lane < LANES; lane++) wide[lane] = static_cast<int32_t>(uint32_t{source[lane].bits} << 16);
    return reinterpret_cast<Floats>(wide);
#endif
}

inline float to_float(Half half) {
    uint32_t sign = uint32_t{half.bits} >> 15 << 31, exponent = half.bits >> 10 & 31, fraction = half.bits & 1023, bits;
    float value;
    if (exponent == 0) {  // zero and subnormal numbers
        value = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline Floats load(const Half* source) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))));
#elif defined(__AVX2__)
    return reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
#else
    Floats wide;
    for (int lane = 0; lane < LANES; lane++) wide[lane] = to_float(source[lane]);
    return wide;
#endif
}

inline Floats load(const int8_t* source) {
#if defined(__AVX512F__)
    __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
    return __builtin_convertvector(reinterpret_cast<Ints>(wide), Floats);
#elif defined(__AVX2__)
    __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
    return __builtin_convertvector(reinterpret_cast<Ints>(wide), Floats);
#else
    Floats wide;
    for (int lane = 0; lane < LANES; lane++) wide[lane] = static_cast<float>(source[lane]);
    return wide;
#endif
}

inline float to_float(int8_t value) { return static_cast<float>(value); }
inline float to_float(float value) { return value; }
inline float to_float(BFloat value) {
    uint32_t bits = uint32_t{value.bits} << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// To the nearest, ties to even, as torch converts. A NaN stays a NaN.
inline void convert(float value, float& target) { target = value; }
inline void convert(float value, BFloat& target) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    target.bits = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void convert(float value, Half& target) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) {
        target.bits = 0x7e00;
    } else if (magnitude >= 0x477ff000) {  // rounds to more than 65504
        target.bits = static_cast<uint16_t>(sign | 0x7c00);
    } else if (magnitude < 0x38800000) {  // subnormal: float addition rounds it
        float absolute;
        std::memcpy(&absolute, &magnitude, sizeof absolute);
        float rounded = absolute + 0.5f;
        std::memcpy(&bits, &rounded, sizeof bits);
        target.bits = static_cast<uint16_t>(sign | (bits - 0x3f000000));
    } else {
        target.bits = static_cast<uint16_t>(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
    }
}

inline void store(float* target, Floats value) { std::memcpy(target, &value, sizeof value); }

inline Floats to_floats(Ints value) { return __builtin_convertvector(value, Floats); }

// sum + products of four unsigned bytes of `bytes` and four signed bytes of `signed_bytes`, in each lane; exact.
inline Ints add_products(Ints sum, Ints bytes, Ints signed_bytes) {
#if defined(__AVX512VNNI__)
    return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(
        reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(bytes), reinterpret_cast<__m512i>(signed_bytes)));
#elif defined(__AVX2__)
    // Pairs are added in 16 bits: 15 * 127 * 2 fits, so the two halves of each unsigned byte are multiplied apart.
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i whole = reinterpret_cast<__m256i>(bytes), factors = reinterpret_cast<__m256i>(signed_bytes);
    __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(whole, nibble), factors);
    __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(whole, 4), nibble), factors);
    __m256i products = _mm256_add_epi32(
        _mm256_madd_epi16(low, _mm256_set1_epi16(1)), _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
    return sum + reinterpret_cast<Ints>(products);
#else
    uint8_t whole[4 * LANES];
    int8_t factors[4 * LANES];
    std::memcpy(whole, &bytes, sizeof whole);
    std::memcpy(factors, &signed_bytes, sizeof factors);
    for (int i = 0; i < 4 * LANES; i++) sum[i / 4] += whole[i] * factors[i];
    return sum;
#endif
}

// e^x for x <= 0, within 2 units in the last place: Cephes' polynomial on [-ln 2 / 2, ln 2 / 2].
inline Floats exponential(Floats x) {
    x = x < -87.0f ? broadcast(-87.0f) : x;
    Floats shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2**23: the sum's last bits are the integer
    Floats whole = shifted - 12582912.0f;
    Floats rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats power = broadcast(1.9875691500e-4f);
    power = power * rest + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
    return reinterpret_cast<Floats>(reinterpret_cast<Ints>(power) + (reinterpret_cast<Ints>(shifted) << 23));
}

}  // namespace KERNELS
