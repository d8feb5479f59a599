// Numbers between -1 and 1 with bits as irregular as those of real data, for measuring: to[i], `count` elements of ELEMENT.
// Any grid; threads stride over the elements. Deterministic: a function of i.

extern "C" __global__ void noise(ELEMENT *to, i64 count) {
    for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += i64(gridDim.x) * blockDim.x) {
        u32 words[4] = {u32(i), u32(i >> 32), 0, 0};
        philox_4x32_10(words, 1, 2);
        to[i] = from_float<ELEMENT>(float(int(words[0])) * 4.6566129e-10f);
    }
}
