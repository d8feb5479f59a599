// Rows normalised, and normalised again in backward:
//   z = x + gate * (branch + branch_bias) (z = x if branch is null), n = (z - mean) * rstd, y = n * (base + scale) + shift,
// mean over the row (zero if not centered), rstd = 1 / sqrt(mean of (z - mean)^2 + eps), the second after the first.
//
// x, branch, sum (takes z), y [rows, width], contiguous, of ELEMENT; statistics [rows] of (mean, rstd), or null.
// scale, shift, gate: a row of `width` elements of VECTOR for each group of `group_rows` rows, `*_stride` elements apart
// (0: one row for all); branch_bias: one such row for all. All but the gate may be null.
// PACK elements are loaded together: width and strides are multiples of it, all pointers of its bytes.
//
// Geometry: a team of TEAM threads (half a warp, a warp, or several) has a row, of which each thread holds ITERATIONS packs, as
// few as do, in registers; teams of more than a warp have a block each, of others a block has four warps. Each thread loads its
// part of the row before anything waits.
// Deterministic: sums are taken in an order that the macros fix. `normalize_again` repeats the arithmetic of
// `normalize` on the z and the statistics that it stored, so its y has the same bits.

constexpr int WARPS = TEAM > 32 ? TEAM / 32 : 1, LANES = TEAM < 32 ? TEAM : 32;
constexpr int TEAMS = TEAM > 32 ? 1 : 128 / TEAM;

// Whether the pack of this iteration lies in the row; only the last one may not.
__device__ __forceinline__ bool inside(int iteration, int column, int width) {
    return iteration < ITERATIONS - 1 || column < width;
}

// The sum over a team. `scratch` is used by one call only, so that one barrier is enough.
__device__ __forceinline__ float team_sum(float value, float *scratch) {
    // The other half of a warp may have no row.
    const u32 lanes = LANES < 32 ? ((1u << LANES % 32) - 1) << (threadIdx.x % 32 / LANES * LANES) : ~0u;
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(lanes, value, offset);
    if (WARPS == 1) return value;
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += scratch[warp];
    return sum;
}

// A thread's packs of a row; zeros outside of it, and without one.
template <typename T>
__device__ __forceinline__ void load_row(Held<T, PACK> (&to)[ITERATIONS], const T *row, int lane, int width) {
#pragma unroll
    for (int i = 0; i < ITERATIONS; ++i) {
        int column = (i * TEAM + lane) * PACK;
        to[i] = Held<T, PACK>{};
        if (row && inside(i, column, width)) to[i] = hold<PACK>(row + column);
    }
}

// A vector of a row's group: in registers from the start where a thread has few packs, so that nothing waits for it in the
// end; else loaded where it is used, which leaves room for more threads.
struct GroupVector {
    static constexpr bool EARLY = ITERATIONS <= 2;
    const VECTOR *row;
    Held<VECTOR, PACK> values[ITERATIONS];

    __device__ __forceinline__ GroupVector(const VECTOR *vectors, i64 offset, int lane, int width)
        : row(vectors ? vectors + offset : nullptr) {
        if (EARLY) load_row(values, row, lane, width);
    }

    // Zeros if there is none.
    __device__ __forceinline__ Held<VECTOR, PACK> pack(int iteration, int column) const {
        if (EARLY) return values[iteration];
        return row ? hold<PACK>(row + column) : Held<VECTOR, PACK>{};
    }
};

__device__ __forceinline__ void store_normal(
    ELEMENT *y, const Held<ELEMENT, PACK> (&z)[ITERATIONS], float2 statistics, const GroupVector &scale,
    const GroupVector &shift, int lane, int width, float base) {
#pragma unroll
    for (int i = 0; i < ITERATIONS; ++i) {
        int column = (i * TEAM + lane) * PACK;
        if (!inside(i, column, width)) continue;
        Held<VECTOR, PACK> multiplier = scale.pack(i, column), offset = shift.pack(i, column);
        float out[PACK];
#pragma unroll
        for (int k = 0; k < PACK; ++k)
            out[k] = fmaf((z[i][k] - statistics.x) * statistics.y, base + multiplier[k], offset[k]);
        store_held<PACK>(y + column, rounded<ELEMENT>(out));
    }
}

// z = x + gate * (branch + bias) in the place of x, rounded as it is stored.
__device__ __forceinline__ void add_gated(
    Held<ELEMENT, PACK> (&x)[ITERATIONS], const ELEMENT *branch, const GroupVector &bias, const GroupVector &gate,
    ELEMENT *sum, int lane, int width) {
    Held<ELEMENT, PACK> added[ITERATIONS];
    load_row(added, branch, lane, width);
#pragma unroll
    for (int i = 0; i < ITERATIONS; ++i) {
        int column = (i * TEAM + lane) * PACK;
        if (!inside(i, column, width)) continue;
        Held<VECTOR, PACK> biases = bias.pack(i, column), gates = gate.pack(i, column);
        float z[PACK];
#pragma unroll
        for (int k = 0; k < PACK; ++k) z[k] = fmaf(gates[k], added[i][k] + biases[k], x[i][k]);
        x[i] = rounded<ELEMENT>(z);
        store_held<PACK>(sum + column, x[i]);
    }
}

extern "C" __global__ void __launch_bounds__(TEAM *TEAMS) normalize(
    const ELEMENT *__restrict__ x, const ELEMENT *__restrict__ branch, ELEMENT *__restrict__ sum, ELEMENT *__restrict__ y,
    float2 *__restrict__ statistics, const VECTOR *__restrict__ scale, i64 scale_stride,
    const VECTOR *__restrict__ shift, i64 shift_stride, const VECTOR *__restrict__ gate, i64 gate_stride,
    const VECTOR *__restrict__ branch_bias, i64 bias_stride, u32 rows, u32 group_rows, int width, float base, float eps,
    int centered) {
    __shared__ float scratch[2][WARPS];
    int lane = threadIdx.x % TEAM;
    u32 row = blockIdx.x * TEAMS + threadIdx.x / TEAM;
    if (row >= rows) return;
    u32 group = row / group_rows;
    i64 start = i64(row) * width;
    Held<ELEMENT, PACK> z[ITERATIONS];
    load_row(z, x + start, lane, width);
    GroupVector scales(scale, group * scale_stride, lane, width), shifts(shift, group * shift_stride, lane, width);
    if (branch)
        add_gated(
            z, branch + start, GroupVector(branch_bias, group * bias_stride, lane, width),
            GroupVector(gate, group * gate_stride, lane, width), sum + start, lane, width);

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

    store_normal(y + start, z, found, scales, shifts, lane, width, base);
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
    GroupVector scales(scale, group * scale_stride, lane, width), shifts(shift, group * shift_stride, lane, width);
    store_normal(y + start, values, statistics[row], scales, shifts, lane, width, base);
}
