// Memory of a thread that is kept from call to call. No containers of the standard library: their functions would be
// compiled for several instruction sets under one name, of which the linker keeps any.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace KERNELS {

// `size` elements, not initialised; those of the former call with the same PURPOSE are given up. Null: no memory. (An
// exception could not leave a parallel region.)
template <typename Purpose, typename Element>
inline Element* scratch(size_t size) {
    struct Memory {
        void* data = nullptr;
        size_t bytes = 0;
        ~Memory() { std::free(data); }
    };
    thread_local Memory memory;
    const size_t bytes = (size * sizeof(Element) + 63) / 64 * 64;
    if (bytes > memory.bytes) {
        std::free(memory.data);
        memory.data = std::aligned_alloc(64, bytes);
        memory.bytes = memory.data == nullptr ? 0 : bytes;
    }
    return static_cast<Element*>(memory.data);
}

template <typename Number>
constexpr Number smaller(Number a, Number b) {
    return b < a ? b : a;
}
template <typename Number>
constexpr Number larger(Number a, Number b) {
    return a < b ? b : a;
}

template <typename Element>
inline void fill(Element* begin, Element* end, Element value) {
    for (; begin != end; begin++) *begin = value;
}

}  // namespace KERNELS
