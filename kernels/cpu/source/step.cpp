// The small operations of a step in float32 (see kernels/step).
#include "calls.h"
#include "common.h"
#include <algorithm>

namespace {
static void norm(const float *x, const float *weight, int64_t n, float eps, float *out) {
    F16 sum = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) sum += load<F16>(x + i) * load<F16>(x + i);
    float squares = total(sum);
    for (; i < n; i++) squares += x[i] * x[i];
    const float factor = 1 / std::sqrt(squares / n + eps);
    if (weight)
        for (i = 0; i < n; i++) out[i] = weight[i] * (x[i] * factor);
    else
        for (i = 0; i < n; i++) out[i] = x[i] * factor;
}
static void layer_norm(const float *x, const float *weight, int64_t n, float eps, float *out) {  // `out` may be `x`
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i];
    const float mean = (float)(sum / n);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] - mean;
    norm(out, weight, n, eps, out);
}
static void times(const float *x, const float *matrix, int64_t d, float *out) {  // x [d] times [d, d]
    for (int64_t i = 0; i < d; i += 64) {
        const int64_t width = std::min<int64_t>(64, d - i);
        if (width == 64) {
            F16 sums[4] = {};
            for (int64_t j = 0; j < d; j++)
                for (int v = 0; v < 4; v++) sums[v] += x[j] * load<F16>(matrix + j * d + i + 16 * v);
            for (int v = 0; v < 4; v++) store(out + i + 16 * v, sums[v]);
            continue;
        }
        for (int64_t k = i; k < i + width; k++) {
            float sum = 0;
            for (int64_t j = 0; j < d; j++) sum += x[j] * matrix[j * d + k];
            out[k] = sum;
        }
    }
}
}  // namespace

FUNCTION(octo_add_rms_norm, NormCall) {
    const NormCall &c = *call;
    const auto normed = c.centred ? layer_norm : norm;
    const float eps = (float)c.eps, by = (float)c.multiplier, scale = (float)c.scale;
    parallel((c.rows + 15) / 16, c.rows < 32 ? 1 : (int)c.threads, [&](int64_t some) {
        float *first = c.post ? (float *)scratch(5, c.n * 4) : nullptr;
        for (int64_t r = some * 16; r < std::min(c.rows, some * 16 + 16); r++) {
            const float *from = c.x + r * c.n;
            if (c.post) normed(from, c.post, c.n, eps, first), from = first;
            if (c.residual) {
                float *sum = c.residual + r * c.n;
                for (int64_t i = 0; i < c.n; i++) sum[i] = (sum[i] + from[i] * by) * scale;
                from = sum;
            }
            if (c.weight) normed(from, c.weight, c.n, eps, c.out + r * c.n);
        }
    });
}

FUNCTION(octo_norm_heads, NormHeadsCall) {
    const NormHeadsCall &c = *call;
    for (int64_t r = 0; r < c.rows; r++)
        norm(c.x + r * c.stride, c.weight, c.n, (float)c.eps, c.x + r * c.stride);
}

FUNCTION(octo_swiglu, SwigluCall) {
    const SwigluCall &c = *call;
    const bool gelu = c.gelu;
    parallel((c.rows + 15) / 16, c.rows < 32 ? 1 : (int)c.threads, [&](int64_t some) {
        for (int64_t r = some * 16; r < std::min(c.rows, some * 16 + 16); r++) {
            const float *gate = c.gate_up + r * 2 * c.n, *up = gate + c.n;
            float *to = c.out + r * c.n;
            int64_t i = 0;
            for (; i + 16 <= c.n; i += 16) {  // half of 1 + tanh(x) is the logistic function of 2 x
                F16 x = load<F16>(gate + i), slope = gelu ? 1.59576912f * (x + 0.044715f * x * x * x) : x;
                F16 e = exponential(pick(slope > 0.0f, -slope, slope));
                F16 share = pick(slope > 0.0f, splat(1), e) / (1.0f + e);
                store(to + i, x * share * load<F16>(up + i));
            }
            for (; i < c.n; i++) {
                const float x = gate[i], slope = gelu ? 1.59576912f * (x + 0.044715f * x * x * x) : x;
                to[i] = x / (1 + std::exp(-slope)) * up[i];
            }
        }
    });
}

FUNCTION(octo_embed, EmbedCall) {
    const EmbedCall &c = *call;
    const int in_word[4] = {0, 2, 1, 3};
    for (int64_t r = 0; r < c.rows; r++) {
        const uint8_t *row = (const uint8_t *)c.table + c.ids[r] * c.row_bytes;
        float *to = c.out + r * c.n;
        if (!c.factors)
            for (int64_t i = 0; i < c.n; i++) to[i] = element(row, (int)c.element, i);
        else  // codes lie in the order of kernels/linear/packed.py
            for (int64_t at = 0; at < c.row_bytes; at++) {
                const int64_t place = at % 128, in_lane = place % 32;
                const int64_t i = at / 128 * 128 + in_lane / 4 * 16 + place / 32 * 4 + in_word[in_lane % 4];
                if (i < c.n) to[i] = (float)(int8_t)row[at] * c.factors[c.ids[r]];
            }
        if (c.scale != 1)
            for (int64_t i = 0; i < c.n; i++) to[i] *= (float)c.scale;
    }
}

// out [vectors, d] = x [vectors, d] rotation^T.
FUNCTION(octo_rotate_back, RotateCall) {
    const RotateCall &c = *call;
    for (int64_t v = 0; v < c.vectors; v++)
        for (int64_t k = 0; k < c.d; k++) {
            F16 sum = {};
            for (int64_t i = 0; i < c.d; i += 16)
                sum += load<F16>(c.x + v * c.d + i) * load<F16>(c.rotation + k * c.d + i);
            c.out[v * c.d + k] = total(sum);
        }
}

FUNCTION(octo_qkv_rope_append, HeadsCall) {
    const HeadsCall &c = *call;
    const int64_t d = c.dim, half = d / 2, group = c.heads / c.kv_heads;
    parallel((c.rows + 7) / 8, c.rows < 16 ? 1 : (int)c.threads, [&](int64_t some) {
        float *normed = (float *)scratch(5, 2 * d * 4), *turned = normed + d;
        for (int64_t b = some * 8; b < std::min(c.rows, some * 8 + 8); b++) {
            const float *row = c.qkv + b * (c.heads + 2 * c.kv_heads) * d, *cos = c.cos + b * half,
                        *sin = c.sin + b * half;
            const int64_t owner = c.owners ? c.owners[b] : b, slot = c.slots[b];
            for (int64_t h = 0; h < c.heads + c.kv_heads; h++) {
                const float *x = row + h * d, *weight = h < c.heads ? c.q_norm : c.k_norm;
                if (weight) norm(x, weight, d, (float)c.eps, normed), x = normed;
                for (int64_t i = 0; i < half; i++) {
                    turned[i] = x[i] * cos[i] - x[half + i] * sin[i];
                    turned[half + i] = x[half + i] * cos[i] + x[i] * sin[i];
                }
                const bool query = h < c.heads;
                if (query && c.queries)
                    for (int64_t i = 0; i < d; i++) turned[i] *= c.queries[b];
                const int64_t kv_head = query ? h / group : h - c.heads;
                if (query && c.coefficients && c.mean) {
                    const float *m = c.mean + kv_head * d;
                    float *to = c.coefficients + (b * c.heads + h) * d;
                    for (int64_t i = 0; i < half; i++) {
                        to[i] = turned[i] * m[i] + turned[half + i] * m[half + i];
                        to[half + i] = turned[half + i] * m[i] - turned[i] * m[half + i];
                    }
                }
                if (!query && owner < 0) continue;
                float *to = query ? c.q + b * c.q_b + h * c.q_h : c.k + owner * c.k_r + kv_head * c.k_h + slot * c.k_t;
                if (c.maps)
                    times(turned, c.maps + (c.one_map ? 0 : ((query ? 0 : c.kv_heads) + kv_head) * d * d), d, to);
                else
                    memcpy(to, turned, d * 4);
            }
            if (owner < 0) continue;
            for (int64_t h = 0; h < c.kv_heads; h++) {
                const float *x = row + (c.heads + c.kv_heads + h) * d;
                if (c.v_norm) norm(x, nullptr, d, (float)c.eps, normed), x = normed;
                float *to = c.v + owner * c.v_r + h * c.v_h + slot * c.v_t;
                if (c.v_rotation)
                    times(x, c.v_rotation, d, to);
                else
                    memcpy(to, x, d * 4);
            }
        }
    });
}
