// Rows picked and placed by index.
//
// pick: y[g, k] = x[g, index[g, k]], copied; a row of NaN where the index is not in 0..rows.
// place: target[g, index[g, k]] (+)= x[g, k] in f32, in the order of k; rows that no index names are zero, or
// stay as they are if `accumulate`; an index that is not in 0..rows is ignored.
// ELEMENT: element type of x; x of pick [groups, rows, width], of place [groups, picks, width]; index i64
// [groups, picks]; all contiguous. PACK: elements of an access.
// Grid of pick: a block for each picked row. Grid of place: (target rows of all groups, tiles of columns); a thread
// owns PACK columns of one row and looks through all of its group's indices, 32 at a time. So nothing is
// written twice, and sums are deterministic.

extern "C" __global__ void pick(const ELEMENT *x, const i64 *index, ELEMENT *y, u64 rows, u64 picks, u64 width) {
    u32 position = blockIdx.x;
    i64 row = index[position];
    bool inside = row >= 0 && row < i64(rows);
    x += inside ? (position / u32(picks) * rows + row) * width : 0;
    y += u64(position) * width;
    float nothing[PACK];
#pragma unroll
    for (int i = 0; i < PACK; ++i) nothing[i] = __int_as_float(0x7fc00000);
    for (u32 column = threadIdx.x * PACK; column < u32(width); column += blockDim.x * PACK)
        store_held<PACK>(y + column, inside ? hold<PACK>(x + column) : rounded<ELEMENT>(nothing));
}

#define AHEAD 4

extern "C" __global__ void __launch_bounds__(256)
    place(const ELEMENT *x, const i64 *index, float *target, u64 rows, u64 picks, u64 width, u32 accumulate) {
    u64 group = blockIdx.x / u32(rows);
    i64 row = blockIdx.x % u32(rows);
    u64 column = (u64(blockIdx.y) * blockDim.x + threadIdx.x) * PACK;
    bool active = column < width;
    x += group * picks * width + column;
    index += group * picks;
    target += u64(blockIdx.x) * width + column;
    float sums[PACK];
#pragma unroll
    for (int i = 0; i < PACK; ++i) sums[i] = 0.0f;
    bool found = false;
    for (u64 first = 0; first < picks; first += 32) {
        u64 k = first + threadIdx.x % 32;
        u32 matches = __ballot_sync(0xffffffffu, k < picks && index[k] == row);
        if (matches != 0 && !found) {
            found = true;
            if (active && accumulate) load_pack<PACK>(sums, target);
        }
        while (active && matches != 0) {
            // Several loads are under way before the first sum needs one; their order stays that of k.
            float values[AHEAD][PACK];
#pragma unroll
            for (int ahead = 0; ahead < AHEAD; ++ahead) {
#pragma unroll
                for (int i = 0; i < PACK; ++i) values[ahead][i] = 0.0f;
                if (matches != 0) load_pack<PACK>(values[ahead], x + (first + __ffs(matches) - 1) * width);
                matches &= matches - 1;
            }
#pragma unroll
            for (int ahead = 0; ahead < AHEAD; ++ahead)
#pragma unroll
                for (int i = 0; i < PACK; ++i) sums[i] += values[ahead][i];
        }
    }
    if (active && (found || !accumulate)) store_pack<PACK>(target, sums);
}
