// Products and attention of the CPU kernels against double, for machines that no Python of ours runs on: prints a line
// "what error" for each case, the error by the norm of the outputs.
#include "calls.h"
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

namespace {
uint64_t state = 1;
float random_number() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (state >> 40) / 8388608.0f - 1.0f;
}
std::vector<float> numbers(size_t count) {
    std::vector<float> made(count);
    for (float &one : made) one = random_number();
    return made;
}
uint16_t top_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits >> 16;
}
double of_top_half(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
void tell(const char *what, const std::vector<float> &found, const std::vector<double> &wanted) {
    double wrong = 0, norm = 0;
    for (size_t i = 0; i < wanted.size(); i++)
        wrong += (found[i] - wanted[i]) * (found[i] - wanted[i]), norm += wanted[i] * wanted[i];
    printf("%s %.3e\n", what, std::sqrt(wrong / norm));
}
template <class Weight> std::vector<double> product(Weight weight, const std::vector<float> &x, int tokens, int rows) {
    std::vector<double> made(tokens * rows);
    const int columns = (int)x.size() / tokens;
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < columns; i++) made[t * rows + r] += weight(r, i) * x[t * columns + i];
    return made;
}

void products(int tokens) {
    const int rows = 70, columns = 576, padded = 640;
    const std::vector<float> w = numbers(rows * columns), x = numbers(tokens * columns);
    std::vector<float> factors(rows), out(tokens * rows);
    std::vector<uint8_t> codes(rows * padded);
    PackCall pack{w.data(), 0, rows, columns, columns, padded, codes.data(), factors.data(), 2};
    octo_pack_rows(&pack);
    PackedCall packed{1, rows, columns, padded, padded, codes.data(), factors.data(), nullptr, nullptr, nullptr,
                      x.data(), 0, tokens, columns, nullptr, out.data(), rows, 2};
    octo_packed_linear(&packed);
    tell("int8", out, product([&](int r, int i) {
        return std::nearbyint(std::fmin(std::fmax(w[r * columns + i] / factors[r], -127.0f), 127.0f)) * (double)factors[r];
    }, x, tokens, rows));
    DenseCall wide{w.data(), 0, rows, columns, x.data(), 0, tokens, columns, nullptr, out.data(), rows, 2};
    octo_dense_linear(&wide);
    tell("fp32", out, product([&](int r, int i) { return (double)w[r * columns + i]; }, x, tokens, rows));
    std::vector<uint16_t> halves(w.size());
    for (size_t i = 0; i < w.size(); i++) halves[i] = top_half(w[i]);
    DenseCall narrow{halves.data(), 1, rows, columns, x.data(), 0, tokens, columns, nullptr, out.data(), rows, 2};
    octo_dense_linear(&narrow);
    tell("bf16", out, product([&](int r, int i) { return of_top_half(halves[r * columns + i]); }, x, tokens, rows));
}

// Sinks, two pages of bfloat16, and a tail.
void attention(int count) {
    const int dim = 64, heads = 9, groups = 3, length = 300, sink = 64, pages = 2, tail = 128;
    const std::vector<float> q = numbers(count * heads * dim), sink_k = numbers(groups * sink * dim),
                             sink_v = numbers(groups * sink * dim), tail_k = numbers(groups * tail * dim),
                             tail_v = numbers(groups * tail * dim);
    std::vector<float> out(q.size());
    std::vector<uint16_t> stored(pages * groups * 2 * 64 * dim);
    for (uint16_t &one : stored) one = top_half(random_number());
    const int32_t table[pages] = {1, 0}, row[1] = {0}, packed[1] = {pages}, start[1] = {length - count};
    const int32_t origin[1] = {pages * 64};
    const Codec plain{0, 1, dim * 2, 0, 0, 0, 0, 0, 0, nullptr, 1.0};
    const int64_t a = groups * sink * dim, b = groups * tail * dim, s = sink * dim, t = tail * dim, d = dim;
    AttentionCall call{1, count, heads, groups, dim, 0, sink, tail, 2, 0.125, q.data(), count * heads * d, heads * d, d,
              out.data(), count * heads * d, heads * d, d, (const uint8_t *)stored.data(), groups * 256 * d, 256 * d,
              table, pages, row, packed, start, origin, sink_k.data(), sink_v.data(), tail_k.data(), tail_v.data(),
              a, s, d, a, s, d, b, t, d, b, t, d, nullptr, nullptr, nullptr, nullptr, 1ll << 40, 0, plain, plain};
    octo_attend(&call);
    auto number = [&](int group, int at, int i, bool key) -> double {
        if (at < sink) return (key ? sink_k : sink_v)[(group * sink + at) * dim + i];
        const int behind = at - sink;
        if (behind >= pages * 64) return (key ? tail_k : tail_v)[(group * tail + (behind - origin[0]) % tail) * dim + i];
        const int place = (table[behind / 64] * groups + group) * 2 + !key;
        return of_top_half(stored[(place * 64 + behind % 64) * dim + i]);
    };
    std::vector<double> wanted(out.size());
    for (int n = 0; n < count; n++)
        for (int h = 0; h < heads; h++) {
            const int last = length - count + n, first = (n * heads + h) * dim;
            double whole = 0;
            for (int at = 0; at <= last; at++) {
                double logit = 0;
                for (int i = 0; i < dim; i++) logit += q[first + i] * number(h / 3, at, i, true);
                const double share = std::exp(logit * 0.125);
                whole += share;
                for (int i = 0; i < dim; i++) wanted[first + i] += share * number(h / 3, at, i, false);
            }
            for (int i = 0; i < dim; i++) wanted[first + i] /= whole;
        }
    tell("attention", out, wanted);
}
}  // namespace

int main() {
    for (int tokens : {1, 6}) products(tokens);
    for (int count : {1, 20}) attention(count);
}
