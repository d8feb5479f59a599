// The gradients of normalised rows: with n = (z - mean) * rstd, p = gradient * (base + scale), means over the row,
//   dz = rstd * (p - mean(p) - n * mean(p * n)) + direct (without mean(p) if not centered),
//   dbranch = gate * dz,
// and over the rows of each run the sums of gradient * n (for scale), gradient (for shift) and (branch + branch_bias) * dz
// (for gate), and gate * the sum of dz (for the bias).
//
// z, gradient, direct (that of z as an output; if DIRECT), z_gradient, branch, branch_gradient (both if GATED)
// [groups, rows, width], contiguous, of ELEMENT. A result may lie in the memory of `gradient` or `direct`: each thread reads its
// elements of a row before it writes them. statistics [groups, rows] of (mean, rstd).
// scale (may be null), gate (if GATED): a row of `width` elements of VECTOR a group, `*_stride` elements apart (0: one row for
// all); branch_bias (if BIASED): such a row too. partial [groups, runs, 3 if GATED else 2, width], bias_partial (if BIASED, may be
// null) [groups, runs, width], both f32.
// PACK elements are loaded together: width and strides are multiples of it, all pointers of its bytes.
//
// Geometry: a block of THREADS has a run of `run` rows of one group; grid: groups * runs. A thread has the same ITERATIONS packs
// of columns in every row, so that its vectors and its part of the sums over rows stay in registers. ROWS rows are worked
// on at a time: all their loads are under way together, and one barrier serves their sums over columns.
// Deterministic: every sum is taken in an order that the macros and the run fix.

constexpr int WARPS = THREADS / 32;
// Two sums for each row, made a power of two that a warp can halve.
constexpr int VALUES = 2 * ROWS;

__device__ __forceinline__ bool inside(int iteration, int column, int width) {
    return iteration < ITERATIONS - 1 || column < width;
}

// Sums of VALUES numbers over a warp: each step hands half of them to the partner and takes over its share of the
// other half. The sum of number v ends in the lanes from v * 32 / VALUES on.
__device__ __forceinline__ float warp_sums(float (&values)[VALUES]) {
    int offset = 16;
#pragma unroll
    for (int half = VALUES / 2; half > 0; half /= 2, offset /= 2) {
        bool upper = threadIdx.x & offset;
#pragma unroll
        for (int v = 0; v < half; ++v) {
            float sent = upper ? values[v] : values[v + half];
            float kept = upper ? values[v + half] : values[v];
            values[v] = kept + __shfl_xor_sync(0xffffffffu, sent, offset);
        }
    }
#pragma unroll
    for (; offset > 0; offset /= 2) values[0] += __shfl_xor_sync(0xffffffffu, values[0], offset);
    return values[0];
}

// Sums over the block, in place. Calls alternate between two scratch areas, so that one barrier is enough: it keeps a
// warp from writing an area that another still reads from the call before the last.
__device__ __forceinline__ void block_sums(float (&values)[VALUES], float (&scratch)[WARPS][VALUES]) {
    int lane = threadIdx.x % 32;
    float sum = warp_sums(values);
    if (lane % (32 / VALUES) == 0) scratch[threadIdx.x / 32][lane / (32 / VALUES)] = sum;
    __syncthreads();
#pragma unroll
    for (int v = 0; v < VALUES; ++v) values[v] = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp)
#pragma unroll
        for (int v = 0; v < VALUES; ++v) values[v] += scratch[warp][v];
}

__device__ __forceinline__ void load_row(
    Held<ELEMENT, PACK> (&to)[ITERATIONS], const ELEMENT *from, i64 start, int width, bool present) {
#pragma unroll
    for (int i = 0; i < ITERATIONS; ++i) {
        int column = (i * THREADS + threadIdx.x) * PACK;
        to[i] = Held<ELEMENT, PACK>{};
        if (present && inside(i, column, width))
            to[i] = hold<PACK>(from + start + column);
    }
}

// Keeps the compiler from carrying what it derived from these elements before a barrier in registers of its own
// (three or four times theirs): it derives it again. Single elements of 16 bits are few.
__device__ __forceinline__ void forget_derived(u32 &word) { asm volatile("" : "+r"(word)); }
__device__ __forceinline__ void forget_derived(u16 &) {}
__device__ __forceinline__ void forget_derived(Held<ELEMENT, PACK> &held) {
#pragma unroll
    for (auto &word : held.words) forget_derived(word);
}

// base plus a vector's values in a thread's columns; zeros outside of the row.
__device__ __forceinline__ void load_vector(
    float (&to)[ITERATIONS][PACK], const VECTOR *row, float base, int width) {
#pragma unroll
    for (int i = 0; i < ITERATIONS; ++i) {
        int column = (i * THREADS + threadIdx.x) * PACK;
        bool within = inside(i, column, width);
        Held<VECTOR, PACK> values{};
        if (row && within) values = hold<PACK>(row + column);
#pragma unroll
        for (int k = 0; k < PACK; ++k) to[i][k] = within ? base + values[k] : 0.0f;
    }
}

__device__ __forceinline__ void store_sums(float *to, const float (&sums)[ITERATIONS][PACK], int width) {
#pragma unroll
    for (int i = 0; i < ITERATIONS; ++i) {
        int column = (i * THREADS + threadIdx.x) * PACK;
        if (!inside(i, column, width)) continue;
        // 16 bytes at a time.
        constexpr int PART = PACK < 4 ? PACK : 4;
#pragma unroll
        for (int k = 0; k < PACK; k += PART) {
            float part[PART];
#pragma unroll
            for (int j = 0; j < PART; ++j) part[j] = sums[i][k + j];
            store_pack<PART>(to + column + k, part);
        }
    }
}

// Adds the bias' part to the sums for the gate, and turns those of dz into the bias' own.
__device__ __forceinline__ void apply_bias(
    float (&gate_sum)[ITERATIONS][PACK], float (&z_sum)[ITERATIONS][PACK], const float (&gates)[ITERATIONS][PACK],
    const VECTOR *branch_bias, int width) {
    // Loaded only now: over the rows its registers are needed.
    float bias[ITERATIONS][PACK];
    load_vector(bias, branch_bias, 0.0f, width);
#pragma unroll
    for (int i = 0; i < ITERATIONS; ++i)
#pragma unroll
        for (int k = 0; k < PACK; ++k) {
            gate_sum[i][k] = fmaf(bias[i][k], z_sum[i][k], gate_sum[i][k]);
            z_sum[i][k] *= gates[i][k];
        }
}

// What a thread holds of a row.
struct Row {
    Held<ELEMENT, PACK> gradient[ITERATIONS], z[ITERATIONS], direct[ITERATIONS], branch[ITERATIONS];
    float2 statistics;

    __device__ __forceinline__ float normal(int i, int k) const { return (z[i][k] - statistics.x) * statistics.y; }
};

// Adds a row to the sums over rows, and to those of p and p * n over its columns.
__device__ __forceinline__ void add_row(
    const Row &row, const float (&multiplier)[ITERATIONS][PACK], float (&shift_sum)[ITERATIONS][PACK],
    float (&scale_sum)[ITERATIONS][PACK], float &p_sum, float &pn_sum) {
#pragma unroll
    for (int i = 0; i < ITERATIONS; ++i)
#pragma unroll
        for (int k = 0; k < PACK; ++k) {
            float incoming = row.gradient[i][k], n = row.normal(i, k), p = incoming * multiplier[i][k];
            shift_sum[i][k] += incoming;
            scale_sum[i][k] = fmaf(incoming, n, scale_sum[i][k]);
            p_sum += p;
            pn_sum = fmaf(p, n, pn_sum);
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) normalize_backward(
    const ELEMENT *z, const float2 *__restrict__ statistics, const ELEMENT *gradient, const ELEMENT *direct, ELEMENT *z_gradient,
    const ELEMENT *branch, ELEMENT *branch_gradient, const VECTOR *__restrict__ scale, i64 scale_stride,
    const VECTOR *__restrict__ gate, i64 gate_stride, const VECTOR *__restrict__ branch_bias, i64 bias_stride,
    float *__restrict__ partial, float *__restrict__ bias_partial, u32 rows, u32 run, u32 runs, int width, float base,
    int centered) {
    alignas(16) __shared__ float scratch[2][WARPS][VALUES];
    u32 group = blockIdx.x / runs, skipped = blockIdx.x % runs * run;
    u32 count = min(run, rows - skipped);
    i64 first = i64(group) * rows + skipped;
    float multiplier[ITERATIONS][PACK], gates[ITERATIONS][PACK];
    load_vector(multiplier, scale ? scale + group * scale_stride : nullptr, base, width);
    load_vector(gates, GATED ? gate + group * gate_stride : nullptr, 0.0f, width);
    float scale_sum[ITERATIONS][PACK] = {}, shift_sum[ITERATIONS][PACK] = {}, gate_sum[ITERATIONS][PACK] = {};
    float z_sum[ITERATIONS][PACK] = {};
    float share = 1.0f / float(width);

    int area = 0;
    for (u32 done = 0; done < count; done += ROWS, area ^= 1) {
        Row loaded[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            bool present = done + r < count;
            i64 start = (first + done + r) * width;
            load_row(loaded[r].gradient, gradient, start, width, present);
            load_row(loaded[r].z, z, start, width, present);
            load_row(loaded[r].direct, direct, start, width, present && DIRECT);
            load_row(loaded[r].branch, branch, start, width, present && GATED);
            loaded[r].statistics = present ? statistics[first + done + r] : float2{0.0f, 0.0f};
        }
        float sums[VALUES] = {};
#pragma unroll
        for (int r = 0; r < ROWS; ++r) add_row(loaded[r], multiplier, shift_sum, scale_sum, sums[2 * r], sums[2 * r + 1]);
        block_sums(sums, scratch[area]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float mean_p = centered ? sums[2 * r] * share : 0.0f, slope = sums[2 * r + 1] * share;
            i64 start = (first + done + r) * width;
            Row &row = loaded[r];
            if (done + r >= count) continue;
#pragma unroll
            for (int i = 0; i < ITERATIONS; ++i) {
                int column = (i * THREADS + threadIdx.x) * PACK;
                forget_derived(row.gradient[i]);
                forget_derived(row.z[i]);
                float dz[PACK], branch_out[PACK];
#pragma unroll
                for (int k = 0; k < PACK; ++k) {
                    float p = row.gradient[i][k] * multiplier[i][k];
                    dz[k] = fmaf(row.statistics.y, fmaf(-row.normal(i, k), slope, p - mean_p), row.direct[i][k]);
                    branch_out[k] = gates[i][k] * dz[k];
                    gate_sum[i][k] = fmaf(row.branch[i][k], dz[k], gate_sum[i][k]);
                    if (BIASED) z_sum[i][k] += dz[k];
                }
                if (!inside(i, column, width)) continue;
                store_held<PACK>(z_gradient + start + column, rounded<ELEMENT>(dz));
                if (GATED) store_held<PACK>(branch_gradient + start + column, rounded<ELEMENT>(branch_out));
            }
        }
    }
    if (BIASED) {
        apply_bias(gate_sum, z_sum, gates, branch_bias + group * bias_stride, width);
        if (bias_partial) store_sums(bias_partial + i64(blockIdx.x) * width, z_sum, width);
    }
    float *to = partial + i64(blockIdx.x) * (GATED ? 3 : 2) * width;
    store_sums(to, scale_sum, width);
    store_sums(to + width, shift_sum, width);
    if (GATED) store_sums(to + 2 * width, gate_sum, width);
}
