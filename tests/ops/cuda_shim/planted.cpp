// Kernels with planted faults, each of which the shim must find; and the same without.
#include <vector>

#include "copies.cuh"
#include "device.cuh"

namespace speculative_mamba {

namespace cuda {
namespace {

constexpr int kThreads = 64;

struct Arguments {
    const float* in;  // (blocks, 64)
    float* out;       // (blocks)
    int fault;
    const float* written;  // by the launch before
};

enum Fault {
    none,
    no_barrier,
    load_beyond,
    store_beyond,
    store_to_input,
    two_blocks,
    lost_lane,
    different_barriers,
    early_load,
    plain_add,
    wide_store,
    no_wait,
    false_constant,
    misaligned,
    no_group,
    young_group,
    copy_before_wait,
    never_awaited,
    written_constant
};

// Sums a row of 64: lane by lane through memory of the block.
__global__ void block_sum(Arguments a) {
    SM_SHARED(float, values, kThreads);
    const int i = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
    if (a.fault == false_constant && i == 5) load(a.in + i, From::constants);
    if (a.fault == written_constant && i == 5) load(a.written, From::constants);
    if (a.fault != no_wait) wait_for_previous();
    if (a.fault == misaligned && i == 9) load_group<4>(a.in + 1);
    store(values + i, load(a.in + block * kThreads + (a.fault == load_beyond ? i + 1 : i)));
    for (int width = kThreads / 2; width > 0; width /= 2) {
        if (a.fault != no_barrier || width != 16) __syncthreads();
        float sum = 0.f;
        if (i < width) sum = load(values + i) + load(values + i + width);
        __syncthreads();
        if (i < width) store(values + i, sum);
    }
    if (a.fault == store_to_input && i == 0) store(const_cast<float*>(a.in), 0.f);
    if (i == 0) store(a.out + (a.fault == store_beyond ? block + 1 : a.fault == two_blocks ? 0 : block), load(values));
}

// The same within warps, by shuffles.
__global__ void warp_sum(Arguments a) {
    const int i = static_cast<int>(threadIdx.x);
    wait_for_previous();
    if (a.fault == lost_lane && i == 7) return;
    if (a.fault == different_barriers && i % 2) __syncthreads();
    const float sum = warp_reduce_sum<32>(load(a.in + blockIdx.x * kThreads + i));
    if (i == 0) store(a.out + blockIdx.x, sum);
}

// How many values of a row are positive: all threads count in one place.
__global__ void count_positive(Arguments a) {
    SM_SHARED(unsigned, counts, 4);
    wait_for_previous();
    const int i = static_cast<int>(threadIdx.x);
    if (i < 4) store_raw(counts + i, 0u);
    if (a.fault != no_barrier) __syncthreads();
    if (a.fault == wide_store && i == 5) store_raw(reinterpret_cast<Float4*>(counts), Float4{});
    if (load(a.in + blockIdx.x * kThreads + i) > 0) {
        if (a.fault == plain_add && i % 2) {
            store_raw(counts + 2, load_raw(counts + 2) + 1);
        } else {
            add_atomically(counts + 2, 1u);
        }
    }
    if (a.fault != early_load) __syncthreads();
    if (i == 0) store(a.out + blockIdx.x, static_cast<float>(load_raw(counts + 2)));
}

// Sums a row that is copied in the background, in two groups a thread.
__global__ void copied_sum(Arguments a) {
    SM_LAUNCHED_MEMORY(memory);
    float* const values = reinterpret_cast<float*>(memory);
    const int i = static_cast<int>(threadIdx.x);
    if (a.fault != copy_before_wait) wait_for_previous();
    for (int half = 0; half < 2; half++) {
        const int first = 4 * i + half * kThreads / 2;
        const float* from = a.in + blockIdx.x * kThreads + first;
        const int skipped = a.fault == misaligned ? 1 : a.fault == load_beyond ? 4 : 0;
        if (i < kThreads / 8) copy_async(values + first, from + skipped, 16);
        if (a.fault != no_group) end_group_of_copies();
    }
    if (a.fault == copy_before_wait) wait_for_previous();
    if (a.fault == young_group) {
        wait_for_copies<1>();
    } else if (a.fault != never_awaited) {
        wait_for_copies<0>();
    }
    if (a.fault != no_barrier) __syncthreads();
    float sum = 0.f;
    for (int j = 0; i == 0 && a.fault != never_awaited && j < kThreads; j++) sum += load(values + j);
    if (i == 0) store(a.out + blockIdx.x, sum);
}

}  // namespace

// Runs a kernel on `blocks` rows. What went wrong, or nothing.
extern "C" __attribute__((visibility("default"))) const char* run(const char* kernel, int fault, const float* in,
                                                                  float* out, int blocks, unsigned seed) {
    static std::string message;
    auto& machine = shim::Machine::get();
    machine.seed(seed);
    const auto announce = [&](const float* base, int64_t count, shim::Use use) {
        machine.announce(base, static_cast<size_t>(count) * sizeof(float), use);
    };
    machine.begin_call();
    announce(in, blocks * kThreads, shim::Use::read);
    announce(out, blocks, shim::Use::write);
    message.clear();
    try {
        const std::string name = kernel;
        auto function = name == "block_sum"    ? block_sum
                        : name == "warp_sum"   ? warp_sum
                        : name == "copied_sum" ? copied_sum
                                               : count_positive;
        const int64_t memory = name == "copied_sum" ? kThreads * sizeof(float) : 0;
        const dim3 grid(static_cast<unsigned>(blocks));
        std::vector<float> weight(1);
        if (fault == written_constant) {
            announce(weight.data(), 1, shim::Use::write);
            launch_with_memory(function, dim3(1), dim3(kThreads), memory, nullptr,
                               Arguments{in, weight.data(), none, nullptr});
            machine.begin_call();
            announce(in, blocks * kThreads, shim::Use::read);
            announce(out, blocks, shim::Use::write);
            announce(weight.data(), 1, shim::Use::constant);
        }
        launch_with_memory(function, grid, dim3(kThreads), memory, nullptr, Arguments{in, out, fault, weight.data()});
    } catch (const shim::Failure& failure) { message = failure.what(); }
    return message.c_str();
}

}  // namespace cuda
}  // namespace speculative_mamba
