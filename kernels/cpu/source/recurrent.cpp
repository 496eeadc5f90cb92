// The recurrent step of Gated DeltaNet in float32, see kernels/recurrent. Each value head is worked on by one thread.
#include "calls.h"
#include "common.h"

namespace {
float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }
float softplus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }

float dot(const float *x, const float *y, int64_t n) {
    F16 sums = splat(0);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) sums += load<F16>(x + i) * load<F16>(y + i);
    float sum = total(sums);
    for (; i < n; i++) sum += x[i] * y[i];
    return sum;
}

// to = scale * to + x * by, and sums += to * weight
void blend(float *to, float scale, const float *x, float by, float weight, float *sums, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        F16 y = load<F16>(to + i) * scale + load<F16>(x + i) * by;
        store(to + i, y);
        store(sums + i, load<F16>(sums + i) + y * weight);
    }
    for (; i < n; i++) {
        to[i] = to[i] * scale + x[i] * by;
        sums[i] += to[i] * weight;
    }
}
}  // namespace

namespace {
// The convolution's outputs of n channels from `first` on, after SiLU. The row's newest inputs are in their slot.
void convolved(const DeltaStepCall &c, const float *slots, int64_t position, int64_t first, int64_t n, float *out) {
    const int64_t channels = 2 * c.key_heads * c.key_dim + c.value_heads * c.value_dim;
    for (int64_t i = 0; i < n; i++) out[i] = 0;
    for (int64_t back = std::min(position, c.taps - 1); back >= 0; back--) {
        const float *x = slots + (position - back) % c.taps * channels + first;
        const float *weight = c.conv_weight + (c.taps - 1 - back) * channels + first;
        for (int64_t i = 0; i < n; i++) out[i] += x[i] * weight[i];
    }
    for (int64_t i = 0; i < n; i++) out[i] *= sigmoid(out[i]);
}

void head(const DeltaStepCall &c, int64_t b, int64_t h) {
    const int64_t dk = c.key_dim, dv = c.value_dim, keys = c.key_heads * dk, values = c.value_heads * dv;
    const int64_t row = c.rows[b], position = c.positions[b], width = 2 * keys + 2 * values;
    float *out = c.out + b * values + h * dv;
    if (row < 0) {
        memset(out, 0, dv * sizeof(float));
        return;
    }
    float *q = (float *)scratch(6, (2 * dk + 4 * dv) * sizeof(float)), *k = q + dk, *v = k + dk;
    float *found = v + dv, *mixed = found + dv, *nothing = mixed + dv;
    const int64_t key_head = h / (c.value_heads / c.key_heads);
    const float *slots = c.conv + row * c.conv_row;
    convolved(c, slots, position, key_head * dk, dk, q);
    convolved(c, slots, position, keys + key_head * dk, dk, k);
    convolved(c, slots, position, 2 * keys + h * dv, dv, v);
    const float q_scale = 1 / std::sqrt(dot(q, q, dk) + 1e-6f) / std::sqrt((float)dk);
    const float k_scale = 1 / std::sqrt(dot(k, k, dk) + 1e-6f);
    for (int64_t i = 0; i < dk; i++) q[i] *= q_scale, k[i] *= k_scale;
    const float *gates = c.gates + b * 2 * c.value_heads;
    const float beta = sigmoid(gates[h]);
    const float fade = std::exp(c.decay[h] * softplus(gates[c.value_heads + h] + c.bias[h]));
    float *memory = c.memory + row * c.memory_row + h * dk * dv;
    if (position == 0) memset(memory, 0, dk * dv * sizeof(float));
    memset(found, 0, 3 * dv * sizeof(float));
    for (int64_t i = 0; i < dk; i++) blend(memory + i * dv, fade, nothing, 0, k[i], found, dv);
    for (int64_t j = 0; j < dv; j++) v[j] = (v[j] - found[j]) * beta;
    for (int64_t i = 0; i < dk; i++) blend(memory + i * dv, 1, v, k[i], q[i], mixed, dv);
    const float scale = 1 / std::sqrt(dot(mixed, mixed, dv) / dv + (float)c.eps);
    const float *gate = c.projected + b * width + 2 * keys + values + h * dv;
    for (int64_t j = 0; j < dv; j++) out[j] = c.norm[j] * (mixed[j] * scale) * (gate[j] * sigmoid(gate[j]));
}
}  // namespace

FUNCTION(octo_delta_step, DeltaStepCall) {
    const DeltaStepCall &c = *call;
    const int64_t channels = 2 * c.key_heads * c.key_dim + c.value_heads * c.value_dim;
    const int64_t width = channels + c.value_heads * c.value_dim;
    for (int64_t b = 0; b < c.batch; b++)
        if (c.rows[b] >= 0)
            memcpy(c.conv + c.rows[b] * c.conv_row + c.positions[b] % c.taps * channels, c.projected + b * width,
                   channels * sizeof(float));
    parallel(c.batch * c.value_heads, (int)c.threads,
             [&](int64_t i) { head(c, i / c.value_heads, i % c.value_heads); });
}
