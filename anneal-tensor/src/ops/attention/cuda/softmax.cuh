// Attention on CUDA, the forward pass between the products: online softmax of a warp's rows.
//
// Text before forward_mma.cu and forward_wgmma.cu, after the constants M_TILES (of 16 queries a
// warp), KEY_TILES (of 8 keys a block) and CHUNKS. FlashAttention-2 (arXiv 2307.08691), algorithm 1.
// Scores are kept to the base 2: `exp(x) = 2^(x log2 e)`, the factor folded into the scale.

constexpr int WARP_ROWS = 16 * M_TILES;
constexpr int KEY_TILES = KEY_BLOCK / 8;

/// What a warp knows of its queries; `[0]` of the second index is row `lane / 4`, `[1]` eight further.
struct RowState {
    float maximum[M_TILES][2];
    float sum[M_TILES][2];  // over this thread's columns
    float output[M_TILES][CHUNKS][4];
};

struct Position {
    int b, h, first_query, warp, lane;
};

/// Adds the bias, which makes the scores scaled ones.
__device__ __forceinline__ void add_bias(
    float (&s)[M_TILES][KEY_TILES][4], const Arguments &a, const Position &at, int first_key, float factor) {
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = at.first_query + at.warp * WARP_ROWS + m * 16 + i / 2 * 8 + at.lane / 4;
                const int column = first_key + n * 8 + at.lane % 4 * 2 + i % 2;
                s[m][n][i] = s[m][n][i] * factor + bias_at(a, at.b, at.h, row, column);
            }
}

__device__ __forceinline__ void hide_keys(
    float (&s)[M_TILES][KEY_TILES][4], const Arguments &a, const Position &at, int first_key) {
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (key_visible(a, at.b, first_key + n * 8 + at.lane % 4 * 2 + j)) continue;
#pragma unroll
            for (int m = 0; m < M_TILES; m++) s[m][n][j] = s[m][n][2 + j] = NEGATIVE_INFINITY;
        }
}

/// Largest of the four threads that share a row.
__device__ __forceinline__ float row_maximum(float value) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
    return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
}

__device__ __forceinline__ float row_sum(float value) {
    value += __shfl_xor_sync(~0u, value, 1);
    return value + __shfl_xor_sync(~0u, value, 2);
}

/// Scores become `2^(factor s - maximum)`; sums and outputs of earlier blocks shrink to the new maximum.
__device__ __forceinline__ void softmax_block(RowState &state, float (&s)[M_TILES][KEY_TILES][4], float factor) {
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float largest = state.maximum[m][i];
#pragma unroll
            for (int n = 0; n < KEY_TILES; n++) largest = fmaxf(largest, fmaxf(s[m][n][2 * i], s[m][n][2 * i + 1]));
            largest = row_maximum(largest);
            // A row that has seen no key yet must not subtract infinities.
            const float base = largest == NEGATIVE_INFINITY ? 0.0f : largest * factor;
            const float shrink = exp2_of(state.maximum[m][i] * factor - base);
            float sum = state.sum[m][i] * shrink;
#pragma unroll
            for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
                for (int j = 2 * i; j < 2 * i + 2; j++) {
                    s[m][n][j] = exp2_of(s[m][n][j] * factor - base);
                    sum += s[m][n][j];
                }
            state.maximum[m][i] = largest;
            state.sum[m][i] = sum;
#pragma unroll
            for (int n = 0; n < CHUNKS; n++)
#pragma unroll
                for (int j = 2 * i; j < 2 * i + 2; j++) state.output[m][n][j] *= shrink;
        }
}

/// What outputs are to be multiplied by in the end, for each of a thread's rows; stores log-sums.
__device__ __forceinline__ void last_factors(
    const RowState &state, float (&inverse)[M_TILES][2], const Arguments &a, const Position &at, float factor) {
    const int first = at.first_query + at.warp * WARP_ROWS;
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float sum = row_sum(state.sum[m][i]);
            inverse[m][i] = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
            const int row = first + m * 16 + i * 8 + at.lane / 4;
            if (a.log_sums == nullptr || at.lane % 4 != 0 || row >= a.queries) continue;
            // Plus infinity makes every probability zero again in backward.
            const float log_sum = (state.maximum[m][i] * factor + __log2f(sum)) * (1.0f / LOG2_E);
            a.log_sums[head_index(a, at.b, at.h) + row] = sum == 0.0f ? INFINITY_F32 : log_sum;
        }
}

/// Stores outputs and log-sums; `tile` has room for the rows of all warps.
template <class LAYOUT>
__device__ __forceinline__ void finish(
    const RowState &state, const Arguments &a, const Position &at, u32 tile, float factor) {
    float inverse[M_TILES][2];
    last_factors(state, inverse, a, at, factor);
    store_rows<LAYOUT>(
        state.output, inverse, tile, at.warp * WARP_ROWS, head_of(a.output, at.b, at.h), a.output.token,
        at.first_query + at.warp * WARP_ROWS, a.queries);
}

__device__ __forceinline__ void clear_state(RowState &state) {
    clear(state.output);
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            state.maximum[m][i] = NEGATIVE_INFINITY;
            state.sum[m][i] = 0.0f;
        }
}
