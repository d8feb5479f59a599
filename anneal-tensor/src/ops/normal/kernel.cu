// Standard normal draws of each row's stream, and the row mixed with a clean one.
//
// normal: noise[b, i]. noised: noise[b, i], and noised[b, i] = alpha_b * clean[b, i] + sigma_b * noise[b, i].
// All f32 [samples, width], contiguous; rows: a Row for each sample, which changes from step to step.
// Word w of a stream is word w % 4 of the block with counter position + w / 4; words 2j and 2j + 1 give elements 2j
// and 2j + 1 by Box-Muller, in double as on the CPU (rng.rs).
// Grid: blocks of THREADS threads, `per_row` to a row; a thread makes one block of words, and so four
// neighbours, which go out in 16 bytes where rows are aligned. Deterministic.

#define THREADS 256

struct Row {
    u32 key[2];
    u32 counter[4];
    float alpha, sigma;
};

// The first word maps to (0, 1], the second to an angle in [0, 2 pi).
__device__ __forceinline__ void normal_pair(u32 first, u32 second, float &a, float &b) {
    const double scale = 1.0 / 4294967296.0;
    double radius = sqrt(-2.0 * log((double(first) + 1.0) * scale)), sine, cosine;
    sincospi(2.0 * scale * double(second), &sine, &cosine);
    a = float(radius * cosine);
    b = float(radius * sine);
}

__device__ __forceinline__ void draws(float (&values)[4], const Row &row, u32 block) {
    u32 words[4] = {row.counter[0] + block, row.counter[1], row.counter[2], row.counter[3]};
    philox_4x32_10(words, row.key[0], row.key[1]);
    normal_pair(words[0], words[1], values[0], values[1]);
    normal_pair(words[2], words[3], values[2], values[3]);
}

// Four values or those that are left of the row.
__device__ __forceinline__ void store(float *to, const float (&values)[4], u64 left) {
    if (left >= 4 && is_aligned<4>(to)) {
        store_pack<4>(to, values);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < left) to[i] = values[i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    normal(const Row *rows, float *noise, u64 width, u32 per_row) {
    u32 sample = blockIdx.x / per_row, block = blockIdx.x % per_row * THREADS + threadIdx.x;
    u64 first = 4 * u64(block);
    if (first >= width) return;
    float values[4];
    draws(values, rows[sample], block);
    store(noise + sample * width + first, values, width - first);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    noised(const Row *rows, const float *clean, float *noise, float *noised, u64 width, u32 per_row) {
    u32 sample = blockIdx.x / per_row, block = blockIdx.x % per_row * THREADS + threadIdx.x;
    u64 first = 4 * u64(block);
    if (first >= width) return;
    u64 start = sample * width + first, left = width - first;
    Row row = rows[sample];
    float values[4], mixed[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (left >= 4 && is_aligned<4>(clean + start)) {
        load_pack<4>(mixed, clean + start);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < left) mixed[i] = clean[start + i];
    }
    draws(values, row, block);
#pragma unroll
    for (int i = 0; i < 4; ++i) mixed[i] = row.alpha * mixed[i] + row.sigma * values[i];
    store(noise + start, values, left);
    store(noised + start, mixed, left);
}
