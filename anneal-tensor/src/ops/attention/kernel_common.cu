// Attention on CUDA, common part: element types, memory, matrix instructions, arguments.
//
// The texts of a kernel are concatenated by the launcher, this one first:
//   kernel_common + kernel_forward     attention_forward
//   kernel_common + kernel_backward    attention_backward
//   kernel_common + kernel_reduce      attention_reduce_queries, attention_reduce_bias
//   kernel_common + kernel_generic     attention_*_generic
// Macros that every one of them takes:
//   HEAD_DIM   D; the kernels of tensor cores want a multiple of 8 up to 128
//   ELEMENT    dtype of queries, keys, values, outputs and their gradients: 1 f32 (only the
//              generic kernels and the reductions), 2 bf16, 3 f16
//   BIAS       dtype of the bias and of its gradient: the same codes, 0 for no bias
//
// Letters: b images, h heads, n queries, m keys, d the head dim. A `tile` is a shared-memory
// address of rows of one head, `ROW_BYTES` apart.

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

constexpr float LOG2_E = 1.4426950408889634f;  // exp(x) = 2^(x log2 e)
#define NEGATIVE_INFINITY __int_as_float(0xff800000)
#define INFINITY_F32 __int_as_float(0x7f800000)

template <int CODE> struct Storage { typedef u16 type; };
template <> struct Storage<1> { typedef float type; };
typedef Storage<ELEMENT>::type element;
typedef Storage<BIAS>::type bias_element;

/// Rows `[B, N or M, H, D]`; strides in elements, the last one is 1.
struct Rows {
    element* data;
    i64 batch, token, head;
};

/// Arguments of every kernel here, by value. Pointers that a kernel does not use may be null;
/// so may the gradients that are not wanted, `log_sums` in forward, `mask`, and with BIAS 0 the bias.
struct Arguments {
    Rows query, key, value, output;
    Rows output_gradient, query_gradient, key_gradient, value_gradient;
    /// `[1 or B, 1 or H, N, M]`; strides in elements, 0 where it is broadcast, the last one is 1.
    const bias_element* bias;
    i64 bias_batch, bias_head, bias_query;
    /// u8 `[B, M]`, 0 hides a key.
    const unsigned char* mask;
    i64 mask_batch;
    /// `[B, H, N]`: natural logarithm of the sum of exponentials; +inf for a query that sees no key.
    float* log_sums;
    /// `[parts, B, H, N, D]`: sums of `ds k` over each part's keys, without the scale.
    float* query_partial;
    /// `[B, H, N, M]`: `ds`, or null.
    float* bias_partial;
    int batch, heads, queries, keys;
    float scale;
};

__device__ __forceinline__ float f32_of_f16(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

template <int CODE> __device__ __forceinline__ float to_f32(typename Storage<CODE>::type value) {
    if constexpr (CODE == 1) return value;
    else if constexpr (CODE == 2) return __uint_as_float(u32(value) << 16);
    else return f32_of_f16(value);
}

/// Two numbers in one word, the first in the low half, rounded to nearest even.
template <int CODE> __device__ __forceinline__ u32 pack(float low, float high) {
    u32 word;
    if constexpr (CODE == 2) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

template <int CODE> __device__ __forceinline__ typename Storage<CODE>::type from_f32(float value) {
    if constexpr (CODE == 1) return value;
    else return u16(pack<CODE>(value, 0.0f));
}

__device__ __forceinline__ float exp2_fast(float value) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
    return power;
}

/// Strides are 64-bit: a batch of long sequences has more than 2^31 elements.
__device__ __forceinline__ element* head_of(const Rows& rows, int b, int h) {
    return rows.data + b * rows.batch + h * rows.head;
}

/// Position of the first query of a head in `[B, H, N]`.
__device__ __forceinline__ i64 head_index(const Arguments& a, int b, int h) {
    return (i64(b) * a.heads + h) * a.queries;
}

__device__ __forceinline__ bool key_visible(const Arguments& a, int b, int m) {
    return m < a.keys && (a.mask == nullptr || a.mask[b * a.mask_batch + m] != 0);
}

/// The bias times log2 e: scores are kept to the base 2.
__device__ __forceinline__ float bias_at(const Arguments& a, int b, int h, int n, int m) {
    if constexpr (BIAS == 0) return 0.0f;
    if (n >= a.queries || m >= a.keys) return 0.0f;
    const i64 index = b * a.bias_batch + h * a.bias_head + n * a.bias_query + m;
    return LOG2_E * to_f32<BIAS == 0 ? 1 : BIAS>(a.bias[index]);
}
