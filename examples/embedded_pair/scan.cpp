// Forward and backward passes of the three Mamba operations that are not matrix products: RMSNorm, causal depthwise
// convolution with SiLU, and the gated selective scan. float32, contiguous, channels last; rows are independent and
// shared out over threads.
//
// The scan holds A fixed at A[d, n] = -(n + 1), so that exp(dt A[d, n]) = e^(n + 1) with e = exp(-dt): one
// exponential for each channel and position. A block of 16 channels keeps its 16 states in 16 vector registers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int kStates = 16, kLanes = 16, kChunk = 16, kTaps = 4;
typedef float Vec __attribute__((vector_size(64)));

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec splat(float x) { return x - Vec{}; }

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

template <class Work>
void over_rows(int rows, int threads, Work work) {
    threads = std::max(1, std::min(threads, rows));
    auto share = [&](int k) {
        for (int row = k * rows / threads; row < (k + 1) * rows / threads; ++row) work(row, k);
    };
    std::vector<std::thread> pool;
    for (int k = 1; k < threads; ++k) pool.emplace_back(share, k);
    share(0);
    for (auto& thread : pool) thread.join();
}

void sum_threads(const std::vector<std::vector<float>>& parts, float* out) {
    for (const auto& part : parts)
        for (size_t i = 0; i < part.size(); ++i) out[i] += part[i];
}

// dt = softplus(raw), e = exp(-dt) = sigmoid(-raw), for `count` values.
void discretise(const float* raw, float* dt, float* e, int count) {
    for (int i = 0; i < count; ++i) {
        float small = std::exp(-std::fabs(raw[i]));
        dt[i] = std::max(raw[i], 0.0f) + std::log(1.0f + small);
        e[i] = (raw[i] > 0 ? small : 1.0f) / (1.0f + small);
    }
}

}  // namespace

extern "C" {

extern const int states = kStates, chunk = kChunk, taps = kTaps;

// x, y (tokens, width), weight (width), scale (tokens): scale = 1 / rms(x), y = x scale weight.
void rms_forward(const float* x, const float* weight, float eps, float* y, float* scale, int tokens, int width,
                 int threads) {
    over_rows(tokens, threads, [&](int t, int) {
        const float* in = x + (int64_t)t * width;
        float* out = y + (int64_t)t * width;
        float sum = 0;
        for (int d = 0; d < width; ++d) sum += in[d] * in[d];
        float r = scale[t] = 1.0f / std::sqrt(sum / width + eps);
        for (int d = 0; d < width; ++d) out[d] = in[d] * r * weight[d];
    });
}

void rms_backward(const float* x, const float* weight, const float* scale, const float* dy, float* dx, float* dweight,
                  int tokens, int width, int threads) {
    std::vector<std::vector<float>> parts(threads, std::vector<float>(width));
    over_rows(tokens, threads, [&](int t, int k) {
        const float *in = x + (int64_t)t * width, *g = dy + (int64_t)t * width;
        float *out = dx + (int64_t)t * width, *dw = parts[k].data(), r = scale[t], dot = 0;
        for (int d = 0; d < width; ++d) dot += g[d] * weight[d] * in[d];
        float c = dot * r * r * r / width;
        for (int d = 0; d < width; ++d) {
            out[d] = g[d] * weight[d] * r - in[d] * c;
            dw[d] += g[d] * in[d] * r;
        }
    });
    sum_threads(parts, dweight);
}

// x, u (rows, length, width), weight (taps, width), bias (width); u = silu(conv(x)).
void conv_forward(const float* x, const float* weight, const float* bias, float* u, int rows, int length, int width,
                  int threads) {
    over_rows(rows, threads, [&](int row, int) {
        for (int t = 0; t < length; ++t) {
            float* out = u + ((int64_t)row * length + t) * width;
            std::copy(bias, bias + width, out);
            for (int k = std::max(0, kTaps - 1 - t); k < kTaps; ++k) {
                const float* in = x + ((int64_t)row * length + t + k - kTaps + 1) * width;
                const float* w = weight + k * width;
                for (int d = 0; d < width; ++d) out[d] += w[d] * in[d];
            }
            for (int d = 0; d < width; ++d) out[d] *= sigmoid(out[d]);
        }
    });
}

// Writes dx, adds to dweight and dbias.
void conv_backward(const float* x, const float* weight, const float* bias, const float* du, float* dx, float* dweight,
                   float* dbias, int rows, int length, int width, int threads) {
    std::vector<std::vector<float>> dws(threads, std::vector<float>(kTaps * width));
    std::vector<std::vector<float>> dbs(threads, std::vector<float>(width));
    over_rows(rows, threads, [&](int row, int thread) {
        std::vector<float> pre(width);
        std::fill_n(dx + (int64_t)row * length * width, (int64_t)length * width, 0.0f);
        float *dw = dws[thread].data(), *db = dbs[thread].data(), *p = pre.data();
        for (int t = 0; t < length; ++t) {
            const float* g = du + ((int64_t)row * length + t) * width;
            int first = std::max(0, kTaps - 1 - t);
            std::copy(bias, bias + width, p);
            for (int k = first; k < kTaps; ++k) {
                const float* in = x + ((int64_t)row * length + t + k - kTaps + 1) * width;
                const float* w = weight + k * width;
                for (int d = 0; d < width; ++d) p[d] += w[d] * in[d];
            }
            for (int d = 0; d < width; ++d) {
                float s = sigmoid(p[d]);
                p[d] = g[d] * s * (1.0f + p[d] * (1.0f - s));
                db[d] += p[d];
            }
            for (int k = first; k < kTaps; ++k) {
                int64_t at = ((int64_t)row * length + t + k - kTaps + 1) * width;
                const float *in = x + at, *w = weight + k * width;
                float *out = dx + at, *dwk = dw + k * width;
                for (int d = 0; d < width; ++d) {
                    out[d] += w[d] * p[d];
                    dwk[d] += in[d] * p[d];
                }
            }
        }
    });
    sum_threads(dws, dweight);
    sum_threads(dbs, dbias);
}

// u, raw, z, y (rows, length, width); bc (rows, length, 32) = B, C; skip (width). dt = softplus(raw),
// h = e^(n + 1) h + dt u B, y = (C h + skip u) silu(z). states (rows, states, width) holds h before the first position
// and receives it after the last. saved (rows, chunks, states, width), unless null, receives the state at the start of
// each chunk of 16 positions.
void scan_forward(const float* u, const float* raw, const float* bc, const float* skip, const float* z, float* states,
                  float* y, float* saved, int rows, int length, int width, int threads) {
    int chunks = (length + kChunk - 1) / kChunk;
    over_rows(rows, threads, [&](int row, int) {
        std::vector<float> dt(kChunk * width), e(kChunk * width);
        float* state = states + (int64_t)row * kStates * width;
        for (int c = 0; c < chunks; ++c) {
            int begin = c * kChunk, steps = std::min(kChunk, length - begin);
            int64_t token = (int64_t)row * length + begin;
            discretise(raw + token * width, dt.data(), e.data(), steps * width);
            if (saved) std::copy(state, state + kStates * width, saved + ((int64_t)row * chunks + c) * kStates * width);
            for (int d = 0; d < width; d += kLanes) {
                Vec h[kStates];
                for (int n = 0; n < kStates; ++n) h[n] = load(&state[n * width + d]);
                for (int t = 0; t < steps; ++t) {
                    const float *b = bc + (token + t) * 2 * kStates, *cc = b + kStates;
                    Vec in = load(u + (token + t) * width + d), ev = load(&e[t * width + d]), power = ev;
                    Vec x = in * load(&dt[t * width + d]), out = in * load(skip + d);
#pragma GCC unroll 16
                    for (int n = 0; n < kStates; ++n) {
                        h[n] = power * h[n] + x * b[n];
                        out += h[n] * cc[n];
                        power *= ev;
                    }
                    store(y + (token + t) * width + d, out);
                }
                for (int n = 0; n < kStates; ++n) store(&state[n * width + d], h[n]);
            }
            for (int t = 0; t < steps; ++t) {
                const float* zt = z + (token + t) * width;
                float* out = y + (token + t) * width;
                for (int d = 0; d < width; ++d) out[d] *= zt[d] * sigmoid(zt[d]);
            }
        }
    });
}

// Recomputes each chunk's states from `saved`. Writes du, draw, dbc and dz, adds to dskip.
void scan_backward(const float* u, const float* raw, const float* bc, const float* skip, const float* z,
                   const float* saved, const float* dy, float* du, float* draw, float* dbc, float* dskip, float* dz,
                   int rows, int length, int width, int threads) {
    int chunks = (length + kChunk - 1) / kChunk;
    std::vector<std::vector<float>> dskips(threads, std::vector<float>(width));
    over_rows(rows, threads, [&](int row, int thread) {
        std::vector<float> dt(kChunk * width), e(kChunk * width), gate(kChunk * width), slope(kChunk * width);
        std::vector<float> dstate(kStates * width);
        alignas(64) static thread_local Vec hs[kChunk + 1][kStates], db[kChunk][kStates], dc[kChunk][kStates];
        for (int c = chunks - 1; c >= 0; --c) {
            int begin = c * kChunk, steps = std::min(kChunk, length - begin);
            int64_t token = (int64_t)row * length + begin;
            discretise(raw + token * width, dt.data(), e.data(), steps * width);
            for (int t = 0; t < steps; ++t) {
                const float* zt = z + (token + t) * width;
                for (int d = 0; d < width; ++d) {
                    float s = sigmoid(zt[d]);
                    gate[t * width + d] = zt[d] * s;
                    slope[t * width + d] = s * (1.0f + zt[d] * (1.0f - s));
                }
            }
            std::memset(db, 0, sizeof db);
            std::memset(dc, 0, sizeof dc);
            for (int d = 0; d < width; d += kLanes) {
                const float* start = saved + ((int64_t)row * chunks + c) * kStates * width + d;
                const Vec skips = load(skip + d);
                for (int n = 0; n < kStates; ++n) hs[0][n] = load(start + n * width);
                for (int t = 0; t < steps; ++t) {
                    const float *b = bc + (token + t) * 2 * kStates, *cc = b + kStates;
                    Vec in = load(u + (token + t) * width + d), ev = load(&e[t * width + d]), power = ev;
                    Vec x = in * load(&dt[t * width + d]), out = in * skips;
#pragma GCC unroll 16
                    for (int n = 0; n < kStates; ++n) {
                        Vec h = power * hs[t][n] + x * b[n];
                        hs[t + 1][n] = h;
                        out += h * cc[n];
                        power *= ev;
                    }
                    Vec g = load(dy + (token + t) * width + d);
                    store(dz + (token + t) * width + d, g * out * load(&slope[t * width + d]));
                }
                Vec dh[kStates], dskip_sum = load(&dskips[thread][d]);
                for (int n = 0; n < kStates; ++n) dh[n] = load(&dstate[n * width + d]);
                for (int t = steps - 1; t >= 0; --t) {
                    const float *b = bc + (token + t) * 2 * kStates, *cc = b + kStates;
                    Vec in = load(u + (token + t) * width + d), dtv = load(&dt[t * width + d]);
                    Vec ev = load(&e[t * width + d]), power = ev, x = in * dtv, dx = Vec{}, ddt = Vec{};
                    Vec g = load(dy + (token + t) * width + d) * load(&gate[t * width + d]);
                    dskip_sum += g * in;
#pragma GCC unroll 16
                    for (int n = 0; n < kStates; ++n) {
                        Vec grad = dh[n] + g * cc[n];
                        dc[t][n] += hs[t + 1][n] * g;
                        db[t][n] += grad * x;
                        dx += grad * b[n];
                        dh[n] = grad * power;
                        ddt -= dh[n] * hs[t][n] * (float)(n + 1);
                        power *= ev;
                    }
                    store(du + (token + t) * width + d, dx * dtv + g * skips);
                    store(draw + (token + t) * width + d, (ddt + dx * in) * (splat(1.0f) - ev));
                }
                for (int n = 0; n < kStates; ++n) store(&dstate[n * width + d], dh[n]);
                store(&dskips[thread][d], dskip_sum);
            }
            for (int t = 0; t < steps; ++t)
                for (int n = 0; n < kStates; ++n) {
                    float sum_b = 0, sum_c = 0;
                    for (int lane = 0; lane < kLanes; ++lane) sum_b += db[t][n][lane], sum_c += dc[t][n][lane];
                    dbc[(token + t) * 2 * kStates + n] = sum_b;
                    dbc[(token + t) * 2 * kStates + kStates + n] = sum_c;
                }
        }
    });
    sum_threads(dskips, dskip);
}
}
