// Rows normalised, and normalised again in backward:
//   z = x + gate * branch (z = x if branch is null), n = (z - mean) * rstd, y = n * (base + scale) + shift,
// mean over the row (zero if not centered), rstd = 1 / sqrt(mean of (z - mean)^2 + eps), the second after the first.
//
// x, branch, sum (takes z), y [rows, width], contiguous, of ELEMENT; statistics [rows] of (mean, rstd), or null.
// scale, shift, gate: a row of `width` elements of VECTOR for each group of `group_rows` rows, `*_stride` elements apart
// (0: one row for all); scale and shift may be null.
// PACK elements are loaded together: width and strides are multiples of it, all pointers of its bytes.
//
// Geometry: a team of WARPS warps has a row, of which each thread holds ITERATIONS packs, as few as do, in registers; teams
// of one warp are four to a block, wider ones alone. Each thread loads its part of the row before anything waits.
// Deterministic: sums are taken in an order that the macros fix. `normalize_again` repeats the arithmetic of
// `normalize` on the z and the statistics that it stored, so its y has the same bits.

constexpr int TEAM = 32 * WARPS;
constexpr int TEAMS = WARPS == 1 ? 4 : 1;

// Whether the pack of this iteration lies in the row; only the last one may not.
__device__ __forceinline__ bool inside(int iteration, int column, int width) {
    return iteration < ITERATIONS - 1 || column < width;
}

// The sum over a team. `scratch` is used by one call only, so that one barrier is enough.
__device__ __forceinline__ float team_sum(float value, float *scratch) {
    value = warp_sum(value);
    if (WARPS == 1) return value;
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += scratch[warp];
    return sum;
}

// A vector's values, zeros if there is none.
__device__ __forceinline__ Held<VECTOR, PACK> load_vector(const VECTOR *row, int column) {
    return row ? hold<PACK>(row + column) : Held<VECTOR, PACK>{};
}

__device__ __forceinline__ void store_normal(
    ELEMENT *y, const Held<ELEMENT, PACK> &z, float2 statistics, const VECTOR *scale, const VECTOR *shift, int column,
    float base) {
    Held<VECTOR, PACK> multiplier = load_vector(scale, column), offset = load_vector(shift, column);
    float out[PACK];
#pragma unroll
    for (int k = 0; k < PACK; ++k)
        out[k] = fmaf((z[k] - statistics.x) * statistics.y, base + multiplier[k], offset[k]);
    store_held<PACK>(y + column, rounded<ELEMENT>(out));
}

// A thread's packs of a row; zeros outside of it.
__device__ __forceinline__ void load_row(
    Held<ELEMENT, PACK> (&to)[ITERATIONS], const ELEMENT *row, int lane, int width) {
#pragma unroll
    for (int i = 0; i < ITERATIONS; ++i) {
        int column = (i * TEAM + lane) * PACK;
        to[i] = Held<ELEMENT, PACK>{};
        if (inside(i, column, width)) to[i] = hold<PACK>(row + column);
    }
}

// z = x + gate * branch in the place of x, rounded as it is stored.
__device__ __forceinline__ void add_gated(
    Held<ELEMENT, PACK> (&x)[ITERATIONS], const ELEMENT *branch, const VECTOR *gate, ELEMENT *sum, int lane, int width) {
    Held<ELEMENT, PACK> added[ITERATIONS];
    load_row(added, branch, lane, width);
#pragma unroll
    for (int i = 0; i < ITERATIONS; ++i) {
        int column = (i * TEAM + lane) * PACK;
        if (!inside(i, column, width)) continue;
        Held<VECTOR, PACK> gates = hold<PACK>(gate + column);
        float z[PACK];
#pragma unroll
        for (int k = 0; k < PACK; ++k) z[k] = fmaf(gates[k], added[i][k], x[i][k]);
        x[i] = rounded<ELEMENT>(z);
        store_held<PACK>(sum + column, x[i]);
    }
}

extern "C" __global__ void __launch_bounds__(TEAM *TEAMS) normalize(
    const ELEMENT *__restrict__ x, const ELEMENT *__restrict__ branch, ELEMENT *__restrict__ sum, ELEMENT *__restrict__ y,
    float2 *__restrict__ statistics, const VECTOR *__restrict__ scale, i64 scale_stride,
    const VECTOR *__restrict__ shift, i64 shift_stride, const VECTOR *__restrict__ gate, i64 gate_stride, u32 rows,
    u32 group_rows, int width, float base, float eps, int centered) {
    __shared__ float scratch[2][WARPS];
    int lane = threadIdx.x % TEAM;
    u32 row = blockIdx.x * TEAMS + threadIdx.x / TEAM;
    if (row >= rows) return;
    u32 group = row / group_rows;
    i64 start = i64(row) * width;
    Held<ELEMENT, PACK> z[ITERATIONS];
    load_row(z, x + start, lane, width);
    if (branch) add_gated(z, branch + start, gate + group * gate_stride, sum + start, lane, width);

    float2 found = {0.0f, 0.0f};
    if (centered) {
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < ITERATIONS; ++i)
#pragma unroll
            for (int k = 0; k < PACK; ++k) total += z[i][k];
        found.x = team_sum(total, scratch[0]) / float(width);
    }
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < ITERATIONS; ++i)
        if (inside(i, (i * TEAM + lane) * PACK, width))
#pragma unroll
            for (int k = 0; k < PACK; ++k) squares = fmaf(z[i][k] - found.x, z[i][k] - found.x, squares);
    found.y = reciprocal_root(team_sum(squares, scratch[1]) / float(width) + eps);
    if (statistics && lane == 0) statistics[row] = found;

    if (scale) scale += group * scale_stride;
    if (shift) shift += group * shift_stride;
#pragma unroll
    for (int i = 0; i < ITERATIONS; ++i) {
        int column = (i * TEAM + lane) * PACK;
        if (inside(i, column, width)) store_normal(y + start, z[i], found, scale, shift, column, base);
    }
}

extern "C" __global__ void __launch_bounds__(TEAM *TEAMS) normalize_again(
    const ELEMENT *__restrict__ z, const float2 *__restrict__ statistics, ELEMENT *__restrict__ y,
    const VECTOR *__restrict__ scale, i64 scale_stride, const VECTOR *__restrict__ shift, i64 shift_stride, u32 rows,
    u32 group_rows, int width, float base) {
    int lane = threadIdx.x % TEAM;
    u32 row = blockIdx.x * TEAMS + threadIdx.x / TEAM;
    if (row >= rows) return;
    u32 group = row / group_rows;
    i64 start = i64(row) * width;
    Held<ELEMENT, PACK> values[ITERATIONS];
    load_row(values, z + start, lane, width);
    float2 found = statistics[row];
    if (scale) scale += group * scale_stride;
    if (shift) shift += group * shift_stride;
#pragma unroll
    for (int i = 0; i < ITERATIONS; ++i) {
        int column = (i * TEAM + lane) * PACK;
        if (inside(i, column, width)) store_normal(y + start, values[i], found, scale, shift, column, base);
    }
}
