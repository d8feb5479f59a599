// Attention on CUDA, common part: element types, arguments, what is seen and added to scores.
//
// Text after the prelude of all kernels. The launcher (mod.rs) puts a kernel's texts together:
//   common rows mma softmax forward_mma                attention_forward_mma
//   common rows hopper wgmma boxes softmax forward_wgmma   attention_forward_wgmma
//   common rows mma partial gradient backward_mma      attention_backward_mma
//   common rows hopper wgmma boxes partial backward_wgmma  attention_backward_wgmma
//   common reduce                                      attention_reduce_rows, attention_reduce_bias
//   common generic                                     attention_*_generic
// Macros that every one of them takes:
//   HEAD_DIM         D; tensor cores want a multiple of 8 up to 128
//   ELEMENT          type of queries, keys, values, outputs and their gradients; float only in the
//                    generic kernels and the reductions
//   ELEMENT_IS_BF16  1 or 0, for the names of instructions
//   HAS_BIAS, BIAS   1 and the type of the bias and its gradient, or 0 and any type
//
// Letters: b images, h heads, n queries, m keys, d the head dim. A `tile` is the address in shared memory of
// rows of one head.

typedef ELEMENT element;
typedef BIAS bias_element;

constexpr float LOG2_E = 1.4426950408889634f;  // exp(x) = 2^(x log2 e)
#define NEGATIVE_INFINITY __int_as_float(0xff800000)
#define INFINITY_F32 __int_as_float(0x7f800000)

/// Rows `[B, N or M, H, D]`; strides in elements, the last one is 1.
struct Rows {
    element *data;
    i64 batch, token, head;
};

/// Arguments of every kernel here, by value. Pointers that a kernel does not use may be null;
/// so may the gradients that are not wanted, `log_sums` in forward, `mask`, and with HAS_BIAS 0 the bias.
struct Arguments {
    Rows query, key, value, output;
    Rows output_gradient, query_gradient, key_gradient, value_gradient;
    /// `[1 or B, 1 or H, N, M]`; strides in elements, 0 where it is broadcast, the last one is 1.
    const bias_element *bias;
    i64 bias_batch, bias_head, bias_query;
    /// u8 `[B, M]`, 0 hides a key.
    const unsigned char *mask;
    i64 mask_batch;
    /// `[B, H, N]`: natural logarithm of the sum of exponentials; +inf for a query that sees no key.
    float *log_sums;
    /// f32 sums of each part, without the scale: of `ds k` over its keys `[parts, B, H, N, D]`, or (backward_wgmma) of
    /// `ds^T q` and then `p^T do` over its queries `[2, parts, B, H, M, D]`.
    float *partial;
    /// `[B, H, N, M]`: `ds`, or null.
    float *bias_partial;
    int batch, heads, queries, keys;
    float scale;
    int parts;
};

/// Strides are 64-bit: a batch of long sequences has more than 2^31 elements.
__device__ __forceinline__ element *head_of(const Rows &rows, int b, int h) {
    return rows.data + b * rows.batch + h * rows.head;
}

/// Position of the first query of a head in `[B, H, N]`.
__device__ __forceinline__ i64 head_index(const Arguments &a, int b, int h) {
    return (i64(b) * a.heads + h) * a.queries;
}

__device__ __forceinline__ bool key_visible(const Arguments &a, int b, int m) {
    return m < a.keys && (a.mask == nullptr || a.mask[b * a.mask_batch + m] != 0);
}

/// The bias times log2 e: scores are kept to the base 2.
__device__ __forceinline__ float bias_at(const Arguments &a, int b, int h, int n, int m) {
    if (!HAS_BIAS) return 0.0f;
    if (n >= a.queries || m >= a.keys) return 0.0f;
    const i64 index = b * a.bias_batch + h * a.bias_head + n * a.bias_query + m;
    return LOG2_E * to_float(a.bias[index]);
}
