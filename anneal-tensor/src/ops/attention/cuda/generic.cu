// Attention without tensor cores, forward and backward, for f32 and for head dims that are no
// multiple of 8: products and sums in f32 whatever the element type.
//
// The same algorithm as forward_mma.cu, and of 2307.08691's backward two walks instead of one: over
// keys for `dq` (and the bias), over queries for `dk` and `dv`. Each block of threads has `TILE` rows
// of its own and walks over tiles of the others, all in shared memory as f32. A row's results are
// spread over `LANES` threads, which hold every `LANES`-th column.
//
// attention_forward_generic(Arguments)           grid (ceil(N / TILE), H, B)
// attention_backward_queries_generic(Arguments)  grid (ceil(N / TILE), H, B): dq and bias_partial
// attention_backward_keys_generic(Arguments)     grid (ceil(M / TILE), H, B): dk and dv
//   block TILE * LANES threads; shared 4 * (4 * TILE * (HEAD_DIM | 1) + 2 * TILE * (TILE + 1) + 2 * TILE)
// Contracts as in forward_mma.cu and backward_mma.cu, without alignment; partial is not used.
// TILE is 32, 16 or 8: what fits the device's shared memory, and no more than 16 for head dims above 256. BIAS as everywhere.

#ifndef TILE
#define TILE 32
#endif
constexpr int LANES = 8;
constexpr int THREADS = TILE * LANES;
constexpr int PITCH = HEAD_DIM | 1;  // odd: the rows of a column lie in different banks
constexpr int COLUMNS = (HEAD_DIM + LANES - 1) / LANES;
constexpr int SCORES = TILE / LANES;  // of a row, each thread's

/// Tiles in shared memory: rows of queries or keys, and scores of every row with every other.
struct Tiles {
    float *rows[4];
    float *scores[2];
    float *statistics[2];

    __device__ explicit Tiles(float *shared) {
        for (int i = 0; i < 4; i++) rows[i] = shared + i * TILE * PITCH;
        for (int i = 0; i < 2; i++) scores[i] = shared + 4 * TILE * PITCH + i * TILE * (TILE + 1);
        for (int i = 0; i < 2; i++) statistics[i] = shared + 4 * TILE * PITCH + 2 * TILE * (TILE + 1) + i * TILE;
    }
};

struct Own {
    int b, h, row, lane;  // this thread's row within the tile, and its first column
    __device__ Own() : b(blockIdx.z), h(blockIdx.y), row(threadIdx.x / LANES), lane(threadIdx.x % LANES) {}
};

/// Rows from `limit` on become zeros.
__device__ void load_tile(float *tile, const Rows &rows, const Own &own, int first, int limit) {
    const element *head = head_of(rows, own.b, own.h);
    for (int i = threadIdx.x; i < TILE * HEAD_DIM; i += THREADS) {
        const int row = i / HEAD_DIM, column = i % HEAD_DIM;
        const bool valid = first + row < limit;
        tile[row * PITCH + column] = valid ? to_float(head[(first + row) * rows.token + column]) : 0.0f;
    }
}

__device__ float dot(const float *left, const float *right) {
    float sum = 0.0f;
    for (int d = 0; d < HEAD_DIM; d++) sum += left[d] * right[d];
    return sum;
}

/// The sum over the threads of one row; all of them get it.
__device__ float sum_over_row(float value) {
    for (int step = 1; step < LANES; step *= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

__device__ float max_over_row(float value) {
    for (int step = 1; step < LANES; step *= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
    return value;
}

/// To the base 2; minus infinity where the query does not see the key.
__device__ float score(const Arguments &a, const Own &own, const float *query, const float *key, int n, int m) {
    if (!key_visible(a, own.b, m)) return NEGATIVE_INFINITY;
    return dot(query, key) * (a.scale * LOG2_E) + bias_at(a, own.b, own.h, n, m);
}

__device__ void store_row(
    const Rows &rows, const Own &own, const float (&sums)[COLUMNS], float factor, int row, int limit) {
    if (row >= limit || rows.data == nullptr) return;
    element *to = head_of(rows, own.b, own.h) + row * rows.token;
    for (int c = 0; c < COLUMNS; c++) {
        const int column = own.lane + c * LANES;
        if (column < HEAD_DIM) to[column] = from_float<element>(sums[c] * factor);
    }
}

/// `sums += weights[j] * rows[j]` over a tile.
__device__ void add_rows(float (&sums)[COLUMNS], const float *weights, const float *rows, const Own &own) {
    for (int j = 0; j < TILE; j++) {
        const float weight = weights[j];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const int column = own.lane + c * LANES;
            if (HEAD_DIM % LANES == 0 || column < HEAD_DIM) sums[c] += weight * rows[j * PITCH + column];
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_forward_generic(const __grid_constant__ Arguments a) {
    extern __shared__ float shared[];
    const Tiles tiles(shared);
    const Own own;
    const int first = blockIdx.x * TILE, n = first + own.row;
    float sums[COLUMNS] = {}, maximum = NEGATIVE_INFINITY, total = 0.0f;
    load_tile(tiles.rows[0], a.query, own, first, a.queries);
    for (int start = 0; start < a.keys; start += TILE) {
        __syncthreads();
        load_tile(tiles.rows[1], a.key, own, start, a.keys);
        load_tile(tiles.rows[2], a.value, own, start, a.keys);
        __syncthreads();
        float s[SCORES], largest = maximum;
        for (int i = 0; i < SCORES; i++) {
            const int j = own.lane + i * LANES;
            s[i] = score(a, own, tiles.rows[0] + own.row * PITCH, tiles.rows[1] + j * PITCH, n, start + j);
            largest = fmaxf(largest, s[i]);
        }
        largest = max_over_row(largest);
        const float base = largest == NEGATIVE_INFINITY ? 0.0f : largest;
        const float shrink = exp2f(maximum - base);
        maximum = largest;
        total *= shrink;
        for (int c = 0; c < COLUMNS; c++) sums[c] *= shrink;
        float *weights = tiles.scores[0] + own.row * (TILE + 1);
        for (int i = 0; i < SCORES; i++) {
            const float p = exp2f(s[i] - base);
            total += p;
            weights[own.lane + i * LANES] = p;
        }
        __syncwarp();
        add_rows(sums, weights, tiles.rows[2], own);
    }
    total = sum_over_row(total);
    store_row(a.output, own, sums, total == 0.0f ? 0.0f : 1.0f / total, n, a.queries);
    if (a.log_sums != nullptr && own.lane == 0 && n < a.queries)
        a.log_sums[head_index(a, own.b, own.h) + n] =
            total == 0.0f ? INFINITY_F32 : (maximum + log2f(total)) / LOG2_E;
}

/// Log-sums to the base 2 and row sums of `do * o` of a tile of queries, `do` being in `upstream`.
__device__ void load_statistics(
    const Tiles &tiles, const Arguments &a, const Own &own, const float *upstream, int first) {
    const int n = first + own.row;
    float sum = 0.0f, log_sum = INFINITY_F32;
    if (n < a.queries) {
        const element *output = head_of(a.output, own.b, own.h) + n * a.output.token;
        for (int d = own.lane; d < HEAD_DIM; d += LANES) sum += upstream[own.row * PITCH + d] * to_float(output[d]);
        log_sum = a.log_sums[head_index(a, own.b, own.h) + n] * LOG2_E;
    }
    sum = sum_over_row(sum);
    if (own.lane != 0) return;
    tiles.statistics[0][own.row] = log_sum;
    tiles.statistics[1][own.row] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_backward_queries_generic(const __grid_constant__ Arguments a) {
    extern __shared__ float shared[];
    const Tiles tiles(shared);
    const Own own;
    const int first = blockIdx.x * TILE, n = first + own.row;
    float sums[COLUMNS] = {};
    load_tile(tiles.rows[0], a.query, own, first, a.queries);
    load_tile(tiles.rows[1], a.output_gradient, own, first, a.queries);
    __syncthreads();
    load_statistics(tiles, a, own, tiles.rows[1], first);
    for (int start = 0; start < a.keys; start += TILE) {
        __syncthreads();
        load_tile(tiles.rows[2], a.key, own, start, a.keys);
        load_tile(tiles.rows[3], a.value, own, start, a.keys);
        __syncthreads();
        float *weights = tiles.scores[0] + own.row * (TILE + 1);
        for (int i = 0; i < SCORES; i++) {
            const int j = own.lane + i * LANES, m = start + j;
            const float s = score(a, own, tiles.rows[0] + own.row * PITCH, tiles.rows[2] + j * PITCH, n, m);
            const float p = exp2f(s - tiles.statistics[0][own.row]);
            const float dp = dot(tiles.rows[1] + own.row * PITCH, tiles.rows[3] + j * PITCH);
            const float ds = p * (dp - tiles.statistics[1][own.row]);
            weights[j] = ds;
            if (a.bias_partial != nullptr && n < a.queries && m < a.keys)
                a.bias_partial[(head_index(a, own.b, own.h) + n) * a.keys + m] = ds;
        }
        __syncwarp();
        add_rows(sums, weights, tiles.rows[2], own);
    }
    store_row(a.query_gradient, own, sums, a.scale, n, a.queries);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_backward_keys_generic(const __grid_constant__ Arguments a) {
    extern __shared__ float shared[];
    const Tiles tiles(shared);
    const Own own;
    const int first = blockIdx.x * TILE, m = first + own.row;
    float key_sums[COLUMNS] = {}, value_sums[COLUMNS] = {};
    load_tile(tiles.rows[0], a.key, own, first, a.keys);
    load_tile(tiles.rows[1], a.value, own, first, a.keys);
    for (int start = 0; start < a.queries; start += TILE) {
        __syncthreads();
        load_tile(tiles.rows[2], a.query, own, start, a.queries);
        load_tile(tiles.rows[3], a.output_gradient, own, start, a.queries);
        __syncthreads();
        load_statistics(tiles, a, own, tiles.rows[3], start);
        __syncthreads();
        float *p_row = tiles.scores[0] + own.row * (TILE + 1);
        float *ds_row = tiles.scores[1] + own.row * (TILE + 1);
        for (int i = 0; i < SCORES; i++) {
            const int j = own.lane + i * LANES;
            const float s = score(a, own, tiles.rows[2] + j * PITCH, tiles.rows[0] + own.row * PITCH, start + j, m);
            const float p = exp2f(s - tiles.statistics[0][j]);
            const float dp = dot(tiles.rows[3] + j * PITCH, tiles.rows[1] + own.row * PITCH);
            p_row[j] = p;
            ds_row[j] = p * (dp - tiles.statistics[1][j]);
        }
        __syncwarp();
        add_rows(value_sums, p_row, tiles.rows[3], own);
        add_rows(key_sums, ds_row, tiles.rows[2], own);
    }
    store_row(a.value_gradient, own, value_sums, 1.0f, m, a.keys);
    store_row(a.key_gradient, own, key_sums, a.scale, m, a.keys);
}
