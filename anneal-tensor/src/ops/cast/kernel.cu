// y = x in another element type, rounded to nearest even. FROM, TO: element types.
//
// x, y [count], contiguous. Any grid; threads stride over packs of 4 elements where both pointers allow it.

extern "C" __global__ void cast(const FROM *x, TO *y, i64 count) {
    i64 stride = i64(gridDim.x) * blockDim.x;
    bool aligned = is_aligned<4>(x) && is_aligned<4>(y);
    i64 packs = aligned ? count / 4 : 0;
    for (i64 pack = i64(blockIdx.x) * blockDim.x + threadIdx.x; pack < packs; pack += stride) {
        float values[4];
        load_pack<4>(values, x + 4 * pack);
        store_pack<4>(y + 4 * pack, values);
    }
    for (i64 i = 4 * packs + i64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride)
        y[i] = from_float<TO>(to_float(x[i]));
}
