// The library's C interface, and the choice of the instruction set. Called through ctypes (model/cpu_kernels.py).

#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace {

struct KernelTable {
    const char* name;
    bool (*linear)(const Linear&);
    bool (*attention)(const Attention&);
    void (*normal_numbers)(const NormalNumbers&);
};

const KernelTable base_kernels = {"base", base::linear, base::attention, base::normal_numbers};
#if defined(__x86_64__)
const KernelTable avx2_kernels = {"avx2", avx2::linear, avx2::attention, avx2::normal_numbers};
const KernelTable avx512_kernels = {"avx512", avx512::linear, avx512::attention, avx512::normal_numbers};
#endif

constexpr int32_t INTERFACE = 4;  // to be raised with every change of the structs or functions
constexpr uintptr_t HUGE_PAGE = 1 << 21;

const KernelTable* choose(const char* wanted) {
    const auto is_wanted = [&](const KernelTable& table) {
        return wanted == nullptr || std::strcmp(wanted, table.name) == 0;
    };
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512vnni");
    if (has_avx512 && is_wanted(avx512_kernels)) return &avx512_kernels;
    if (has_avx2 && is_wanted(avx2_kernels)) return &avx2_kernels;
#endif
    return is_wanted(base_kernels) ? &base_kernels : nullptr;
}

const KernelTable* kernels = choose(nullptr);

}  // namespace

extern "C" {

int32_t opt_interface() { return INTERFACE; }

const char* opt_instruction_set() { return kernels->name; }

// 0, or 1 where this processor lacks the instruction set; null: the best one.
int32_t opt_use_instruction_set(const char* name) {
    const KernelTable* chosen = choose(name);
    if (chosen != nullptr) kernels = chosen;
    return chosen == nullptr;
}

// 0, or 1 where there was no memory.
int32_t opt_linear(const Linear* call) { return !kernels->linear(*call); }

int32_t opt_attention(const Attention* call) { return !kernels->attention(*call); }

void opt_normal_numbers(const NormalNumbers* call) { kernels->normal_numbers(*call); }

// Asks for pages of 2 MiB, where the system has them, for the whole ones within [begin, begin + size).
void opt_ask_for_huge_pages(void* begin, uint64_t size) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(begin) + size) / HUGE_PAGE * HUGE_PAGE;
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
    (void)begin, (void)size;
#endif
}

}
