// Attention backward: sums of partial gradients, each by one thread in the order of the parts.
//
// attention_reduce_rows(gradient, partial, rows, parts, factor): gradient `[B, rows, H, D]` = factor * sum of partial
// `[parts, B, H, rows, D]` over its parts. Grid (ceil(rows * D / 256), H, B), 256 threads.
//
// attention_reduce_bias(Arguments, gradient, b_size, h_size): gradient `[b_size, h_size, N, M]`,
// contiguous, in the bias's dtype, = bias_partial `[B, H, N, M]` summed over the images if b_size
// is 1 and over the heads if h_size is 1. Grid (ceil(N * M / 256), h_size, b_size), 256 threads.
// Grids may be smaller in the first dimension: threads stride.

extern "C" __global__ void attention_reduce_rows(
    const Rows gradient, const float *partial, int rows, int parts, float factor) {
    const int b = blockIdx.z, h = blockIdx.y;
    const i64 count = i64(rows) * HEAD_DIM;
    const i64 part_size = count * gridDim.y * gridDim.z;
    const float *head = partial + (i64(b) * gridDim.y + h) * count;
    element *to = head_of(gradient, b, h);
    for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += i64(gridDim.x) * blockDim.x) {
        float sum = 0.0f;
        for (int part = 0; part < parts; part++) sum += head[part * part_size + i];
        to[i / HEAD_DIM * gradient.token + i % HEAD_DIM] = from_float<element>(sum * factor);
    }
}

#if HAS_BIAS
extern "C" __global__ void attention_reduce_bias(
    const __grid_constant__ Arguments a, bias_element *gradient, int b_size, int h_size) {
    const i64 count = i64(a.queries) * a.keys;
    const int b_first = blockIdx.z, b_end = b_size == 1 ? a.batch : b_first + 1;
    const int h_first = blockIdx.y, h_end = h_size == 1 ? a.heads : h_first + 1;
    bias_element *to = gradient + (i64(b_first) * h_size + h_first) * count;
    for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += i64(gridDim.x) * blockDim.x) {
        float sum = 0.0f;
        for (int b = b_first; b < b_end; b++)
            for (int h = h_first; h < h_end; h++) sum += a.bias_partial[(i64(b) * a.heads + h) * count + i];
        to[i] = from_float<bias_element>(sum);
    }
}
#endif
