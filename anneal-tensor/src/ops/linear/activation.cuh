// An activation and its derivative, which share an exponential. Text before the kernels of this folder.
// ACTIVATION: 1 GELU by its tanh form (arXiv 1606.08415, section 2), 2 SiLU; 0 where neither is wanted.

#ifndef ACTIVATION
#define ACTIVATION 0
#endif

#if ACTIVATION == 1
// 0.5 x (1 + tanh u) = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).
__device__ __forceinline__ void value_and_derivative(float x, float &value, float &derivative) {
    constexpr float SLOPE = 1.5957691216057308f, TWO_TO = -SLOPE * 1.4426950408889634f;
    float square = x * x;
    float s = reciprocal_of(1.0f + exp2_of(x * (TWO_TO + TWO_TO * 0.044715f * square)));
    value = x * s;
    derivative = s + (value - value * s) * (SLOPE + SLOPE * 0.134145f * square);
}
#elif ACTIVATION == 2
__device__ __forceinline__ void value_and_derivative(float x, float &value, float &derivative) {
    float s = sigmoid_of(x);
    value = x * s;
    derivative = s + (value - value * s);
}
#endif
