// Memory that is kept from call to call, in whole cache lines. No std::vector: its code would be shared by all
// instruction sets, and the linker might keep the copy of the widest.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "../dtype.h"

namespace speculative_mamba::SM_ISA {

class Buffer {
 public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    // Room for `count` values, of which nothing is known. Throws where there is no memory.
    template <typename T>
    T* reserve(int64_t count) {
        const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
        if (bytes_ < bytes) {
            std::free(data_);
            data_ = std::aligned_alloc(kLine, (bytes + kLine - 1) / kLine * kLine);
            bytes_ = data_ ? bytes : 0;
            if (!data_) throw_out_of_memory();
        }
        return static_cast<T*>(data_);
    }

 private:
    static constexpr int64_t kLine = 64;  // bytes

    void* data_ = nullptr;
    int64_t bytes_ = 0;
};

}  // namespace speculative_mamba::SM_ISA
