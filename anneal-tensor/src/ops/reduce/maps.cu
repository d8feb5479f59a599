// The element-wise functions of a maximum's gradient, for the element-wise kernel.

namespace of {
// One where x = in[0] is its maximum in[1], else zero.
__device__ __forceinline__ float equal(const float *in, float, float) { return in[0] == in[1] ? 1.0f : 0.0f; }
// The gradient g = in[0] in equal shares, where x = in[1] is its maximum in[2]; in[3]: how many share it.
__device__ __forceinline__ float share(const float *in, float, float) {
    return in[1] == in[2] ? in[0] / in[3] : 0.0f;
}
} // namespace of
