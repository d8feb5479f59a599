// What every kernel may use. Goes before each source; includes nothing.
//
// Element types are float, bf16 and f16; arithmetic is in float. Kernels are instantiated by macros
// given at compile time (element types, sizes; none is named T, which NVRTC's own headers use), so that loops unroll
// and divisions vanish.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct alignas(2) bf16 { u16 bits; };
struct alignas(2) f16 { u16 bits; };

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) { return __uint_as_float(u32(value.bits) << 16); }
__device__ __forceinline__ float to_float(f16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

template <typename T> __device__ __forceinline__ T from_float(float value);
template <> __device__ __forceinline__ float from_float<float>(float value) { return value; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float value) {
    bf16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}
template <> __device__ __forceinline__ f16 from_float<f16>(float value) {
    f16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

// Whether N elements may be loaded together from there: a view may start at any element.
template <int N, typename T> __device__ __forceinline__ bool is_aligned(const T *pointer) {
    return reinterpret_cast<u64>(pointer) % (sizeof(T) * N) == 0;
}

template <int BYTES_OF_WORD> struct WordOf { typedef u32 Type; };
template <> struct WordOf<2> { typedef u16 Type; };

template <typename T> __device__ __forceinline__ float half_of_word(u32 word, int half);
template <> __device__ __forceinline__ float half_of_word<float>(u32 word, int) { return __uint_as_float(word); }
template <> __device__ __forceinline__ float half_of_word<bf16>(u32 word, int half) {
    return __uint_as_float(half ? word & 0xffff0000u : word << 16);
}
template <> __device__ __forceinline__ float half_of_word<f16>(u32 word, int half) {
    return to_float(f16{u16(half ? word >> 16 : word)});
}

template <typename T> __device__ __forceinline__ u32 word_of_pair(float low, float high);
template <> __device__ __forceinline__ u32 word_of_pair<bf16>(float low, float high) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
template <> __device__ __forceinline__ u32 word_of_pair<f16>(float low, float high) {
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// N elements as they lie in memory, in whole registers: kernels hold many at once and convert each where it is used, which
// single elements of 16 bits would take twice the registers for.
template <typename T, int N> struct Held {
    typedef typename WordOf<sizeof(T) * N>::Type Word;
    static constexpr int COUNT = sizeof(T) * N / sizeof(Word);
    Word words[COUNT];

    __device__ __forceinline__ float operator[](int k) const {
        return half_of_word<T>(words[k * sizeof(T) / sizeof(Word)], k * sizeof(T) / 2 % 2);
    }
};

// By 16 bytes at most.
template <int N, typename T> __device__ __forceinline__ Held<T, N> hold(const T *from) {
    Held<T, N> held;
    constexpr int COUNT = Held<T, N>::COUNT;
    if constexpr (COUNT % 4 == 0) {
#pragma unroll
        for (int k = 0; k < COUNT; k += 4) {
            uint4 four = reinterpret_cast<const uint4 *>(from)[k / 4];
            held.words[k] = four.x, held.words[k + 1] = four.y, held.words[k + 2] = four.z, held.words[k + 3] = four.w;
        }
    } else if constexpr (COUNT == 2) {
        uint2 two = *reinterpret_cast<const uint2 *>(from);
        held.words[0] = two.x, held.words[1] = two.y;
    } else {
        held.words[0] = *reinterpret_cast<const typename Held<T, N>::Word *>(from);
    }
    return held;
}

template <int N, typename T> __device__ __forceinline__ void store_held(T *to, const Held<T, N> &held) {
    constexpr int COUNT = Held<T, N>::COUNT;
    // In words: the compiler takes a wide store in a branch apart into four, which cost memory four times as much.
    if constexpr (COUNT % 4 == 0) {
#pragma unroll
        for (int k = 0; k < COUNT; k += 4)
            asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(reinterpret_cast<uint4 *>(to) + k / 4),
                         "r"(held.words[k]), "r"(held.words[k + 1]), "r"(held.words[k + 2]), "r"(held.words[k + 3])
                         : "memory");
    } else if constexpr (COUNT == 2) {
        asm volatile("st.global.v2.b32 [%0], {%1,%2};" ::"l"(to), "r"(held.words[0]), "r"(held.words[1]) : "memory");
    } else {
        *reinterpret_cast<typename Held<T, N>::Word *>(to) = held.words[0];
    }
}

// Numbers rounded to T.
template <typename T, int N> __device__ __forceinline__ Held<T, N> rounded(const float (&from)[N]) {
    Held<T, N> to;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int k = 0; k < N; ++k) to.words[k] = __float_as_uint(from[k]);
    } else if constexpr (N == 1) {
        to.words[0] = from_float<T>(from[0]).bits;
    } else {
#pragma unroll
        for (int k = 0; k < N; k += 2) to.words[k / 2] = word_of_pair<T>(from[k], from[k + 1]);
    }
    return to;
}

template <int N, typename T> __device__ __forceinline__ void load_pack(float (&to)[N], const T *from) {
    Held<T, N> held = hold<N>(from);
#pragma unroll
    for (int k = 0; k < N; ++k) to[k] = held[k];
}

template <int N, typename T> __device__ __forceinline__ void store_pack(T *to, const float (&from)[N]) {
    store_held<N>(to, rounded<T>(from));
}

__device__ __forceinline__ u32 shared_address(const void *pointer) {
    return u32(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes to shared memory without waiting, or writes zeros (sm_80 on).
__device__ __forceinline__ void copy_16(u32 to, const void *from, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// 16 bytes of shared memory.
__device__ __forceinline__ void load_chunk(u32 (&words)[4], u32 address) {
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}

// Stores 16 bytes to memory if `valid`, without a branch.
__device__ __forceinline__ void store_16(void *to, const u32 (&words)[4], bool valid) {
    asm volatile(
        "{.reg .pred valid; setp.ne.b32 valid, %5, 0; @valid st.global.v4.b32 [%0], {%1,%2,%3,%4};}" ::"l"(to),
        "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(int(valid))
        : "memory");
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1)
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
    return value;
}

// The counter generator (Philox 4x32-10, Salmon et al., SC 2011), as in anneal-tensor/src/rng.rs.
__device__ __forceinline__ void philox_4x32_10(u32 (&words)[4], u32 key_low, u32 key_high) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        u32 first_low = 0xD2511F53u * words[0], first_high = __umulhi(0xD2511F53u, words[0]);
        u32 second_low = 0xCD9E8D57u * words[2], second_high = __umulhi(0xCD9E8D57u, words[2]);
        words[0] = second_high ^ words[1] ^ key_low;
        words[1] = second_low;
        words[2] = first_high ^ words[3] ^ key_high;
        words[3] = first_low;
        key_low += 0x9E3779B9u;
        key_high += 0xBB67AE85u;
    }
}

// Elementary functions. PRECISE (set where elements are f32) chooses those that are right to the last bits;
// else the fast forms, whose error of some 1e-6 is far below the rounding of bf16 and f16.
#ifdef PRECISE
__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ float exp2_of(float x) { return exp2f(x); }
__device__ __forceinline__ float quotient(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float reciprocal_of(float x) { return __frcp_rn(x); }
__device__ __forceinline__ float tanh_of(float x) { return tanhf(x); }
__device__ __forceinline__ float reciprocal_root(float x) { return __frsqrt_rn(x); }
#else
__device__ __forceinline__ float exp_of(float x) { return __expf(x); }
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }
// One instruction each; numbers too small for a normal float count as zero.
__device__ __forceinline__ float exp2_of(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}
__device__ __forceinline__ float reciprocal_of(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
__device__ __forceinline__ float tanh_of(float x) {
    float e = __expf(-2.0f * fabsf(x));
    return copysignf(__fdividef(1.0f - e, 1.0f + e), x);
}
__device__ __forceinline__ float reciprocal_root(float x) { return rsqrtf(x); }
#endif

__device__ __forceinline__ float sigmoid_of(float x) {
    // By the exponential of a negative number, so that nothing overflows.
    float e = exp_of(-fabsf(x));
    float s = quotient(1.0f, 1.0f + e);
    return x >= 0.0f ? s : e * s;
}

// GELU by its tanh form (arXiv 1606.08415, section 2), and its derivative.
__device__ __forceinline__ float gelu_tanh(float x) {
    float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + tanh_of(inner));
}

__device__ __forceinline__ float gelu_tanh_derivative(float x) {
    float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    float slope = 0.7978845608028654f * (1.0f + 0.134145f * x * x);
    float t = tanh_of(inner);
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * slope;
}

__device__ __forceinline__ float silu_of(float x) { return x * sigmoid_of(x); }

__device__ __forceinline__ float silu_derivative(float x) {
    float s = sigmoid_of(x);
    return s * (1.0f + x * (1.0f - s));
}
