// The gated residual, y = x + gate * branch, and its gradients: with g that of y,
//   dbranch = gate * g, and over the rows of each run the sum of branch * g (for gate).
//
// x, branch, y, gradient, branch_gradient [groups, rows, width], contiguous, of ELEMENT; branch_gradient may lie in the
// memory of branch or gradient. gate: a row of `width` elements of VECTOR a group, `stride` elements apart. partial [groups, runs, width] f32.
// PACK elements are loaded together: width and stride are multiples of it, all pointers of its bytes.
//
// Geometry: a block has a run of `run` rows of one group; grid: groups * runs. A thread has packs of columns, one after the
// other if the row is wider than the block, and walks down the rows with gate and sum in registers and the loads of ROWS rows
// under way together.
// Deterministic: rows are added in order.

extern "C" __global__ void gate_residual(
    const ELEMENT *__restrict__ x, const ELEMENT *__restrict__ branch, ELEMENT *__restrict__ y, const VECTOR *__restrict__ gate,
    i64 stride, u32 rows, u32 run, u32 runs, u32 width) {
    u32 group = blockIdx.x / runs, skipped = blockIdx.x % runs * run;
    u32 count = min(run, rows - skipped);
    i64 first = (i64(group) * rows + skipped) * width;
    for (u32 column = threadIdx.x * PACK; column < width; column += blockDim.x * PACK) {
        float gates[PACK];
        load_pack<PACK>(gates, gate + group * stride + column);
#pragma unroll ROWS
        for (u32 row = 0; row < count; ++row) {
            i64 at = first + i64(row) * width + column;
            float sum[PACK], added[PACK];
            load_pack<PACK>(sum, x + at);
            load_pack<PACK>(added, branch + at);
#pragma unroll
            for (int k = 0; k < PACK; ++k) sum[k] = fmaf(gates[k], added[k], sum[k]);
            store_pack<PACK>(y + at, sum);
        }
    }
}

extern "C" __global__ void gate_residual_backward(
    const ELEMENT *gradient, const ELEMENT *branch, ELEMENT *branch_gradient, const VECTOR *__restrict__ gate, i64 stride,
    float *__restrict__ partial, u32 rows, u32 run, u32 runs, u32 width) {
    u32 group = blockIdx.x / runs, skipped = blockIdx.x % runs * run;
    u32 count = min(run, rows - skipped);
    i64 first = (i64(group) * rows + skipped) * width;
    for (u32 column = threadIdx.x * PACK; column < width; column += blockDim.x * PACK) {
        float gates[PACK], sum[PACK] = {};
        load_pack<PACK>(gates, gate + group * stride + column);
        // All rows of a turn are loaded before one is written, which the compiler could not know to be safe.
        for (u32 done = 0; done < count; done += ROWS) {
            Held<ELEMENT, PACK> g[ROWS], values[ROWS];
#pragma unroll
            for (u32 r = 0; r < ROWS; ++r) {
                i64 at = first + i64(done + r) * width + column;
                if (done + r < count) {
                    g[r] = hold<PACK>(gradient + at);
                    values[r] = hold<PACK>(branch + at);
                }
            }
#pragma unroll
            for (u32 r = 0; r < ROWS; ++r) {
                if (done + r >= count) break;
                float out[PACK];
#pragma unroll
                for (int k = 0; k < PACK; ++k) {
                    sum[k] = fmaf(g[r][k], values[r][k], sum[k]);
                    out[k] = gates[k] * g[r][k];
                }
                store_held<PACK>(branch_gradient + first + i64(done + r) * width + column, rounded<ELEMENT>(out));
            }
        }
#pragma unroll
        for (int k = 0; k < PACK; ++k) partial[i64(blockIdx.x) * width + column + k] = sum[k];
    }
}
