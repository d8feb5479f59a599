// The functions of one variable for the element-wise kernel, as in table.rs: `of::f` is y of x = in[0], and
// `of::f_gradient` is g * dy/dx of g = in[0] and v = in[1], what forward saved (x or y, as the formula says).

#define VALUE(name, formula)                                                                              \
    __device__ __forceinline__ float name(const float *in, float first, float second) {                   \
        float x = in[0];                                                                                  \
        return formula;                                                                                   \
    }
#define GRADIENT(name, slope)                                                                             \
    __device__ __forceinline__ float name##_gradient(const float *in, float first, float second) {        \
        float v = in[1];                                                                                  \
        return in[0] * (slope);                                                                           \
    }

namespace of {
// The normal distribution function is the library's own: its error stays small in the lower tail.
__device__ __forceinline__ float normal_density(float x) { return 0.3989422804f * exp_of(-0.5f * x * x); }

VALUE(affine, x * first + second)
__device__ __forceinline__ float affine_gradient(const float *in, float first, float) {
    return in[0] * first;
}
VALUE(clamp, x < first ? first : x > second ? second : x)
GRADIENT(clamp, v < first || v > second ? 0.0f : 1.0f)
VALUE(exp, exp_of(x))
GRADIENT(exp, v)
VALUE(gelu_exact, x *normcdff(x))
GRADIENT(gelu_exact, normcdff(v) + v * normal_density(v))
VALUE(gelu_tanh, ::gelu_tanh(x))
GRADIENT(gelu_tanh, gelu_tanh_derivative(v))
VALUE(log, logf(x))
GRADIENT(log, quotient(1.0f, v))
VALUE(sigmoid, sigmoid_of(x))
GRADIENT(sigmoid, v * (1.0f - v))
VALUE(silu, silu_of(x))
GRADIENT(silu, silu_derivative(v))
VALUE(sqrt, sqrtf(x))
GRADIENT(sqrt, quotient(0.5f, v))
VALUE(square, x * x)
GRADIENT(square, 2.0f * v)
VALUE(tanh, tanh_of(x))
GRADIENT(tanh, 1.0f - v * v)
} // namespace of
