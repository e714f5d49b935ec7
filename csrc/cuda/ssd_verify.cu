// A head has one Δ and one decay: half a warp or a warp shares four channels, and computes each decay once.
#include "scan.cuh"

namespace speculative_mamba::cuda {
namespace {

struct Ssd {
    using Params = SsdParams;
    static constexpr int kChannels = 4, kFewLanes = 16;
    static constexpr bool kOwnDt = false;
    static constexpr int min_blocks(int, bool) { return 3; }
    static __host__ __device__ __forceinline__ int64_t heads(const Params& p) { return p.heads; }
    static __host__ __device__ __forceinline__ int64_t head_size(const Params& p) { return p.head_size; }
    static __host__ __device__ __forceinline__ int64_t x_heads(const Params& p) { return p.x_heads; }

    static bool fits_block(const Params& p, int64_t channels) { return p.head_size % channels == 0; }
    static __device__ __forceinline__ float step_size(const Params& p, float dt, float bias) {
        return clamped(softplus(dt + bias), p.dt_min, p.dt_max);
    }
    static __device__ __forceinline__ const float* skip(const Params& p, int64_t head, int64_t channel) {
        return p.D + (p.d_per_channel ? channel : head);
    }
    template <bool InFours>
    static __device__ __forceinline__ float load_A(const Params& p, int64_t head, int, int, From from) {
        return load(p.A + head, from);
    }
    static __device__ __forceinline__ Float4 repeated(float value) { return {value, value, value, value}; }
    static __device__ __forceinline__ Float4 decay(float A, float dt) { return repeated(expf(dt * A)); }

    template <int Own>
    struct Steps {
        float dt[Own], decay[Own], dt_x[Own];

        __device__ __forceinline__ void set(int k, float A, float dt_k, float x) {
            dt[k] = dt_k, decay[k] = expf(dt_k * A), dt_x[k] = dt_k * x;
        }
        template <typename OfToken>
        __device__ __forceinline__ Float4 decay_of(float, float, OfToken of_token) const {
            return repeated(of_token(decay));
        }
    };
};

}  // namespace

void ssd_verify(const SsdParams& p, cudaStream_t stream) { run_scan<Ssd>(p, stream); }

}  // namespace speculative_mamba::cuda
