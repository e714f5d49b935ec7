// exp, SiLU and softplus on sixteen lanes, written once over simd.h. NaN goes in, NaN comes out.
#pragma once

#include "simd.h"

namespace speculative_mamba::SM_ISA {

// exp(x) within about 1 ulp; exactly 1 at 0; exp(-87) from there downwards; infinite from 127.5 ln 2 = 88.4 on.
inline Vec exp(Vec x) {
    // Adding this leaves no bits for a fraction; the lowest ones are then the exponent of a power of two.
    const Vec to_exponent = broadcast(0x1.8p23f + 127);
    x = max(broadcast(-87.f), min(broadcast(89.f), x));
    const Vec exponent = fma(x, broadcast(0x1.715476p+0f), to_exponent);  // x / ln 2
    const Vec n = sub(exponent, to_exponent);
    Vec r = fma(n, broadcast(-0x1.62e4p-1f), x);  // ln 2 in two parts, the first exact times n
    r = fma(n, broadcast(-0x1.7f7d1cp-20f), r);   // |r| <= ln 2 / 2, a little more where x / ln 2 is rounded
    Vec p = broadcast(0x1.6a23dp-10f);            // 1 + r + r² q(r) with the least relative error, below 2^-28
    p = fma(p, r, broadcast(0x1.123a2p-7f));
    p = fma(p, r, broadcast(0x1.5558f2p-5f));
    p = fma(p, r, broadcast(0x1.555492p-3f));
    p = fma(p, r, broadcast(0x1.fffffcp-2f));
    p = fma(p, r, broadcast(1.f));
    p = fma(p, r, broadcast(1.f));
    return mul(p, from_exponent(exponent));
}

// x / (1 + exp(-x))
inline Vec silu(Vec x) { return div(x, add(broadcast(1.f), exp(sub(zero(), x)))); }

// log(1 + exp(x)) = max(x, 0) + log1p(u) with u = exp(-|x|) in (0, 1], and log1p(u) = 2 atanh(u / (2 + u)), whose
// series keeps its relative accuracy down to the smallest u.
inline Vec softplus(Vec x) {
    Vec u = exp(min(x, sub(zero(), x)));
    Vec s = div(u, add(broadcast(2.f), u));  // s <= 1/3
    Vec s2 = mul(s, s);
    Vec p = broadcast(2.f / 15);
    p = fma(p, s2, broadcast(2.f / 13));
    p = fma(p, s2, broadcast(2.f / 11));
    p = fma(p, s2, broadcast(2.f / 9));
    p = fma(p, s2, broadcast(2.f / 7));
    p = fma(p, s2, broadcast(2.f / 5));
    p = fma(p, s2, broadcast(2.f / 3));
    p = fma(p, s2, broadcast(2.f));
    return fma(p, s, max(zero(), x));
}

}  // namespace speculative_mamba::SM_ISA
