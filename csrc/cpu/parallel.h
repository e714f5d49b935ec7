// A small pool of threads shared by all kernels. Work is handed out in chunks, so a slow or absent worker delays
// nobody, and which thread computes a chunk never changes its result.
#pragma once

#include <cstdint>

namespace speculative_mamba {

using ChunkFunction = void (*)(void* context, int64_t chunk);

// Calls function(context, c) once for every c in [0, chunks) on up to `threads` threads, the caller's included, all in
// the caller's floating-point mode. Fewer do where the system gives no more. Throws what a chunk throws, when the
// others are done.
void parallel_chunks(int64_t chunks, int threads, ChunkFunction function, void* context);

}  // namespace speculative_mamba
