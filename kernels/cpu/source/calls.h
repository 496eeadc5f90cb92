// What the kernels' functions are given: a structure each, which `_fields_` of kernels/cpu/*.py states again.
#pragma once
#include <cstdint>

// Begins the definition of a function. Beside it there is the size of its structure, by which Python sees that it would
// call a library that is not compiled from its sources.
#define FUNCTION(name, Call)                            \
    extern "C" {                                        \
    extern const int64_t name##_size;                   \
    const int64_t name##_size = (int64_t)sizeof(Call);  \
    }                                                   \
    extern "C" void name(const Call *call)

extern "C" {
// linear.cpp
struct PackedCall {
    int64_t code_kind, out_rows, columns, padded, group;
    const uint8_t *codes;
    const float *rows;
    const uint16_t *scales, *offsets;
    const int32_t *order;
    const void *x;
    int64_t kind, tokens, x_stride;
    const float *bias;
    void *out;
    int64_t stride, threads;
};
struct DenseCall {
    const void *weight;
    int64_t weight_kind, out_rows, columns;
    const void *x;
    int64_t kind, tokens, x_stride;
    const float *bias;
    void *out;
    int64_t stride, threads;
};
struct PackCall {
    const void *weight;
    int64_t element, rows, columns, stride, padded;
    uint8_t *codes;
    float *factors;
    int64_t threads;
};
void octo_packed_linear(const PackedCall *);
void octo_dense_linear(const DenseCall *);
void octo_pack_rows(const PackCall *);

// attention.cpp
struct Codec {  // of K or of V
    int64_t kind, element, bytes, stream, state_bits, is_signed, triplets, chains, entries;
    const void *table;  // trellis: int32 [entries], half steps in three fields of 10 bits; octopus: float32 [3, entries]
    double unit;        // what a number of the table times the stored norm is multiplied by
};
struct AttentionCall {
    int64_t batch, count, heads, kv_heads, dim, element, sink, capacity, threads;
    double scale;
    const void *q;
    int64_t q_b, q_c, q_h;
    void *out;
    int64_t o_b, o_c, o_h;
    const uint8_t *pages;
    int64_t page_page, page_head;
    const int32_t *page_table;
    int64_t table_row;
    const int32_t *rows, *num_packed, *starts, *tail_origin;
    const void *sink_k, *sink_v, *tail_k, *tail_v;
    int64_t sk_r, sk_h, sk_t, sv_r, sv_h, sv_t, tk_r, tk_h, tk_t, tv_r, tv_h, tv_t;
    const float *coefficients, *base, *offset;  // of the key mean, or null; coefficients [B, C, H, d]
    const float *sink_logits;                   // [H], or null
    int64_t window;                             // the newest tokens that a query sees
    double cap;                                 // of logits; 0: without
    Codec k, v;
};
void octo_attend(const AttentionCall *);

// encode.cpp
struct TrellisCall {
    int64_t vectors, dim, stream, state_bits, is_signed, norm_shift, chains, bytes, threads;
    const float *y;  // [vectors][dim], rows y_stride floats apart
    int64_t y_stride;
    const int8_t *table;  // [entries][3]
    double step;
    uint8_t *out;  // [vectors][bytes]
};
void octo_encode_trellis(const TrellisCall *);

// recurrent.cpp
struct DeltaStepCall {
    int64_t batch, key_heads, value_heads, key_dim, value_dim, taps, threads, conv_row, memory_row;
    double eps;
    const float *projected, *gates, *conv_weight, *decay, *bias, *norm;
    const int32_t *positions, *rows;
    float *conv, *memory, *out;
};
void octo_delta_step(const DeltaStepCall *);

// step.cpp
struct NormCall {
    const float *x;
    float *residual;
    const float *weight, *post;
    double eps, multiplier, scale;
    int64_t centred;
    float *out;
    int64_t rows, n, threads;
};
struct SwigluCall {
    const float *gate_up;
    float *out;
    int64_t rows, n, gelu, threads;
};
struct NormHeadsCall {
    float *x;
    const float *weight;
    double eps;
    int64_t stride, rows, n;
};
struct EmbedCall {  // a row of a table for each id: dense, or packed in 8 bits with a factor for each row
    const int64_t *ids;
    const void *table;
    const float *factors;  // null: dense, of `element`
    int64_t element, row_bytes, rows, n;
    double scale;
    float *out;
};
struct RotateCall {
    const float *x, *rotation;
    float *out;
    int64_t vectors, d;
};
struct HeadsCall {
    int64_t rows, heads, kv_heads, dim, one_map, v_norm, threads;
    double eps;
    const float *qkv, *cos, *sin, *q_norm, *k_norm, *maps, *v_rotation, *mean, *queries;
    const int32_t *slots, *owners;
    float *k, *v, *q, *coefficients;
    int64_t k_r, k_h, k_t, v_r, v_h, v_t, q_b, q_h;
};
void octo_add_rms_norm(const NormCall *);
void octo_norm_heads(const NormHeadsCall *);
void octo_swiglu(const SwigluCall *);
void octo_embed(const EmbedCall *);
void octo_rotate_back(const RotateCall *);
void octo_qkv_rope_append(const HeadsCall *);
}
