// Every channel has its own Δ, every state its own decay: a power of two, of A · log₂e.
#include "scan.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr float kLog2e = 1.442695041f;

struct SelectiveScan {
    using Params = SelectiveScanParams;
    static constexpr int kChannels = 1, kFewLanes = 4;
    static constexpr bool kOwnDt = true;
    static constexpr int min_blocks(int lanes, bool replays) { return lanes == 4 && !replays ? 5 : 4; }
    static __host__ __device__ __forceinline__ int64_t heads(const Params& p) { return p.channels; }
    static __host__ __device__ __forceinline__ int64_t head_size(const Params&) { return 1; }
    static __host__ __device__ __forceinline__ int64_t x_heads(const Params& p) { return p.channels; }

    static bool fits_block(const Params& p, int64_t channels) {
        auto shared = [&](int64_t groups) { return groups == 1 || p.channels / groups % channels == 0; };
        return fours<float>(p.A) && shared(p.b_groups) && shared(p.c_groups);
    }
    static __device__ __forceinline__ float step_size(const Params&, float dt, float bias) {
        return softplus(dt + bias);
    }
    static __device__ __forceinline__ const float* skip(const Params& p, int64_t, int64_t channel) {
        return p.D + channel;
    }
    template <bool InFours>
    static __device__ __forceinline__ Float4 load_A(const Params& p, int64_t channel, int n, int count, From from) {
        const float* row = p.A + channel * p.state_size + n;
        Float4 A{};
        if (!InFours) A = load4(row, count, from);
        if (InFours && count) A = widen(load_packed4(row, from));
#pragma unroll
        for (int i = 0; i < 4; i++) A.v[i] *= kLog2e;
        return A;
    }
    static __device__ __forceinline__ Float4 decay(const Float4& A, float dt) {
        Float4 decay;
#pragma unroll
        for (int i = 0; i < 4; i++) decay.v[i] = power_of_2(dt * A.v[i]);
        return decay;
    }
    template <int Own>
    struct Steps {
        float dt[Own], dt_x[Own];

        __device__ __forceinline__ void set(int k, const Float4&, float dt_k, float x) {
            dt[k] = dt_k, dt_x[k] = dt_k * x;
        }
        template <typename OfToken>
        __device__ __forceinline__ Float4 decay_of(const Float4& A, float token_dt, OfToken) const {
            return decay(A, token_dt);
        }
    };
};

}  // namespace

void selective_scan_verify(const SelectiveScanParams& p, cudaStream_t stream) { run_scan<SelectiveScan>(p, stream); }

}  // namespace speculative_mamba::cuda
