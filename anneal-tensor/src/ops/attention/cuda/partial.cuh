// Attention on CUDA, backward: gradients of rows from registers to memory, summed over several visits.
//
// Text after rows.cuh, before the backward kernels.

/// Rows of a head's gradient `[limit, D]`, times `scale`: final when the last visit adds its sums, with none left in f32 for
/// attention_reduce_rows. `sums`: f32 `[limit, D]`, of the visits before; unused where one visit is all.
struct Target {
    element *head;
    u32 stride;
    float *sums;
    int limit;
    float scale;
    bool first, final;
};

/// `*sums += (x, y)` without waiting for it.
__device__ __forceinline__ void add_in_memory(float *sums, float x, float y) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v2.f32 [%0], {%1,%2};" ::"l"(sums), "f"(x), "f"(y) : "memory");
#else
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(sums), "f"(x) : "memory");
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(sums + 1), "f"(y) : "memory");
#endif
}

/// Of four words of each lane, lane `q` of four gets all lanes' words `q`.
__device__ __forceinline__ void exchange_in_fours(u32 *words) {
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2)
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            u32 &low = words[distance == 1 ? 2 * pair : pair], &high = words[distance == 1 ? 2 * pair + 1 : pair + 2];
            const bool gives_low = threadIdx.x & distance;
            const u32 other = __shfl_xor_sync(~0u, gives_low ? low : high, distance);
            (gives_low ? low : high) = other;
        }
}

/// The pairs of columns that a thread has of a row, to memory in whole chunks where four lanes have four of them.
template <int COUNT> __device__ __forceinline__ void store_pairs(u32 (&words)[COUNT], element *row, bool valid) {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n + 4 <= COUNT; n += 4) {
        exchange_in_fours(words + n);
        store_16(row + (n + lane) * 8, reinterpret_cast<const u32 (&)[4]>(words[n]), valid);
    }
#pragma unroll
    for (int n = COUNT / 4 * 4; n < COUNT; n++)
        if (valid) *reinterpret_cast<u32 *>(row + n * 8 + lane * 2) = words[n];
}

/// Rows in a thread's hands, `first_row + 8 i`, eights of columns from `first_tile`. An address belongs to one thread,
/// whose stores and additions to it keep their order: this is no race, and the sum is always the same.
template <int COUNT>
__device__ __forceinline__ void finish_rows(
    const float (&c)[COUNT][4], const Target &to, int first_row, int first_tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = first_row + i * 8 + lane / 4;
        const bool valid = row < to.limit;
        float2 *sums = reinterpret_cast<float2 *>(to.sums + (row * HEAD_DIM + first_tile * 8 + lane % 4 * 2));
        if (to.final) {
            u32 words[COUNT];
#pragma unroll
            for (int n = 0; n < COUNT; n++) {
                const float2 before = to.first || !valid ? make_float2(0.0f, 0.0f) : __ldcg(sums + n * 4);
                words[n] = word_of_pair<element>(
                    (before.x + c[n][2 * i]) * to.scale, (before.y + c[n][2 * i + 1]) * to.scale);
            }
            store_pairs(words, to.head + (row * to.stride + first_tile * 8), valid);
        } else if (valid) {
#pragma unroll
            for (int n = 0; n < COUNT; n++)
                if (to.first) sums[n * 4] = make_float2(c[n][2 * i], c[n][2 * i + 1]);
                else add_in_memory(reinterpret_cast<float *>(sums + n * 4), c[n][2 * i], c[n][2 * i + 1]);
        }
    }
}
