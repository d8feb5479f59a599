// Attention backward by warpgroups of sm_90a, deterministic: backward_mma.cu's walk with wgmma.
//
// FlashAttention-2 (arXiv 2307.08691), algorithm 2, with scores transposed. A warpgroup owns
// 64 M_TILES keys and their gradients, which stay in registers; `p^T` and `ds^T` are left factors of
// `dv` and `dk` as they come out of the softmax. `ds^T` also goes to shared memory, where it is the
// left factor of `dq = ds k`, its columns leading. That product runs one block of queries late, so that all
// threads meet once a block; warpgroups share its columns.
//
// attention_backward_wgmma(Arguments): as attention_backward_mma.
//   grid   (parts, heads, batch), such that each part gets one of the ceil(keys / (64 M_TILES GROUPS)) blocks
//   block  128 GROUPS threads
//   shared 2 HEAD_DIM (2 K + 320) + 256 K + 2048, K = 64 M_TILES GROUPS, bytes
// Macros beside those of common.cuh: GROUPS (warpgroups), M_TILES (of 64 keys a warpgroup),
// SUB_QUERIES (32, or 64 for narrow heads: walked at a time), MIN_BLOCKS.

constexpr int ZEROS_OFFSET = END_OFFSET;
constexpr int SHARE = 8 / GROUPS;  // of a panel of `dq`, for each warpgroup, in eights of columns

/// `dq` of 64 queries: this warpgroup's share of each panel, and the columns beyond, which all
/// warpgroups make, so that they need no branch, and the last one stores.
struct QuerySums {
    float panel[PANEL_COUNT][SHARE][4];
    float rest[1][REST_TILES][4];
};

/// Starts `dq = ds k` of a block.
__device__ __forceinline__ void start_query_gradients(QuerySums &c, const Place &at, int block) {
    const Operand ds = chunk_operand(ds_tile(at, block), 128, DS_CHUNK_BYTES);
    const Operand panels = panel_operand(key_tile(at) + at.warp / 4 * SHARE * 16);
    const Operand rest = chunk_operand(key_tile(at) + PANELS * KeyLayout::PANEL_BYTES, 128, KeyLayout::CHUNK_BYTES);
    begin_products();
#pragma unroll
    for (int k = 0; k < KEY_ROWS / 16; k++) {
#pragma unroll
        for (int panel = 0; panel < PANELS; panel++)
            Product<SHARE>::shared<1, 1>(
                c.panel[panel], ds.at(k * 256), panels.at(panel * KeyLayout::PANEL_BYTES + k * 2048), k > 0);
        if constexpr (REST > 0)
            Product<REST_TILES>::shared<1, 1>(c.rest[0], ds.at(k * 256), rest.at(k * 256), k > 0);
    }
    commit_products();
}

__device__ __forceinline__ void end_query_gradients(QuerySums &c, const Arguments &a, const Place &at, int block) {
    hold(c.panel);
    hold(c.rest);
    if (a.query_gradient.data == nullptr) return;
    const int row = block * QUERY_BLOCK + at.warp % 4 * 16, group = at.warp / 4;
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++)
        finish_queries<SHARE>(c.panel[panel], a, at, row, 8 * panel + group * SHARE);
    if constexpr (REST > 0)
        if (group == GROUPS - 1) finish_queries<REST_TILES>(c.rest[0], a, at, row, 8 * PANELS);
}

/// Four 8 x 8 matrices of `ds^T` at once: keys along rows, 16 queries.
__device__ __forceinline__ void store_ds(const u32 (&left)[4], const Place &at, u32 tile, int m, int first_chunk) {
    const int row = own_row(at.warp, m) + at.lane / 8 % 2 * 8 + at.lane % 8;
    const u32 address = tile + (first_chunk + at.lane / 16) * DS_CHUNK_BYTES + row * 16;
    store_matrices(address, left);
}

/// `dv += p^T do` or `dk += ds^T q`, started.
__device__ __forceinline__ void start_sums(
    float (&c)[CHUNKS][4], const u32 (&left)[SUB_TILES / 2][1][4], u32 tile, int row) {
    begin_products();
    multiply_columns<QueryLayout>(c, left, tile, row);
    commit_products();
}

/// What one tile of 64 keys does with `SUB_QUERIES` queries of a block. It ends with products running, under
/// which the next walk begins; more of them at once than these would not fit beside the sums in registers.
__device__ __forceinline__ void walk_queries(
    KeyGradients &sums, const Arguments &a, const Place &at, int block, int sub, int m) {
    const int key_row = at.warp / 4 * GROUP_KEYS + m * 64, query_row = sub * SUB_QUERIES;
    const u32 queries = query_tile(at, block), upstream = upstream_tile(at, block),
              zeros = at.shared + ZEROS_OFFSET;
    const int first_query = block * QUERY_BLOCK + sub * SUB_QUERIES;
    Scores<1> s, dp;
    begin_products();
    multiply_rows<KeyLayout, QueryLayout>(s[0], key_tile(at), key_row, queries, query_row, zeros);
    commit_products();
    multiply_rows<KeyLayout, QueryLayout>(dp[0], value_tile(at), key_row, upstream, query_row, zeros);
    commit_products();
    Columns columns;
    columns.load(at, statistics(at, block) + sub * SUB_QUERIES * 8);
    wait_products<1>();
    hold(s);
    make_probabilities<1>(s, columns, a, at, m, first_query, a.scale * LOG2_E);
    u32 p_left[SUB_TILES / 2][1][4], ds_left[SUB_TILES / 2][1][4];
#pragma unroll
    for (int k = 0; k < SUB_TILES / 2; k++) pack_left(p_left[k], s, k);
    start_sums(sums.value[m], p_left, upstream, query_row);
    wait_products<1>();
    hold(dp);
    make_gradients<1>(dp, s, columns, a, at, m, first_query);
#pragma unroll
    for (int k = 0; k < SUB_TILES / 2; k++) {
        pack_left(ds_left[k], dp, k);
        store_ds(ds_left[k][0], at, ds_tile(at, block), m, sub * SUB_TILES + 2 * k);
    }
    start_sums(sums.key[m], ds_left, queries, query_row);
}

/// `dq` of a block of queries whose `ds^T` all warpgroups have stored.
__device__ __forceinline__ void make_query_gradients(const Arguments &a, const Place &at, int block) {
    QuerySums dq;
    start_query_gradients(dq, at, block);
    wait_products<0>();
    end_query_gradients(dq, a, at, block);
}

__device__ __forceinline__ void visit_keys(const Arguments &a, Place &at) {
    LogSums log_sums;
    start_keys(a, at);
    start_queries(a, at, 0, log_sums);
    clear_zeros<64>(at.shared + ZEROS_OFFSET);
    find_visible(a, at);
    KeyGradients sums;
    clear(sums.key);
    clear(sums.value);
    const int blocks = (a.queries + QUERY_BLOCK - 1) / QUERY_BLOCK;
#pragma unroll 1
    for (int block = 0; block <= blocks; block++) {
        const bool more = block < blocks;
        if (more) {
            wait_copies<0>();
            write_statistics(at, block, log_sums);
        }
        wait_products<0>();
        hold(sums.key);
        hold(sums.value);
        publish();
        __syncthreads();
        if (block + 1 < blocks) start_queries(a, at, block + 1, log_sums);
        if (block > 0) make_query_gradients(a, at, block - 1);
        if (!more) break;
#pragma unroll
        for (int m = 0; m < M_TILES; m++)
#pragma unroll 1
            for (int sub = 0; sub < QUERY_BLOCK / SUB_QUERIES; sub++) walk_queries(sums, a, at, block, sub, m);
    }
    store_key_gradients(sums, a, at);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    attention_backward_wgmma(const __grid_constant__ Arguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere an empty kernel that nobody starts
    extern __shared__ __align__(1024) unsigned char shared[];
    visit_share(a, shared_address(shared));
#endif
}
