// The functions of two variables for the element-wise kernel, as in table.rs: `of::f` is y of a = in[0] and
// b = in[1]; `of::f_left` and `of::f_right` are g times the derivative with respect to a and to b, of g = in[0],
// a = in[1] and b = in[2]. A derivative that needs neither has g alone.

namespace of {
__device__ __forceinline__ float add(const float *in, float, float) { return in[0] + in[1]; }
__device__ __forceinline__ float sub(const float *in, float, float) { return in[0] - in[1]; }
__device__ __forceinline__ float sub_right(const float *in, float, float) { return -in[0]; }
__device__ __forceinline__ float mul(const float *in, float, float) { return in[0] * in[1]; }
__device__ __forceinline__ float mul_left(const float *in, float, float) { return in[0] * in[2]; }
__device__ __forceinline__ float mul_right(const float *in, float, float) { return in[0] * in[1]; }
__device__ __forceinline__ float div(const float *in, float, float) { return in[0] / in[1]; }
__device__ __forceinline__ float div_left(const float *in, float, float) { return in[0] / in[2]; }
__device__ __forceinline__ float div_right(const float *in, float, float) {
    return in[0] * (-in[1] / (in[2] * in[2]));
}
} // namespace of
