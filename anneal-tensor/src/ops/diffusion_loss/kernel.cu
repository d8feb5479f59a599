// The loss of each sample and its gradient; formulas in mod.rs, in double as on the CPU.
//
// OUTPUT: element type of the model's output and of its gradient; LEARNED: defined if the output has a second
// half for the variance. output [samples, elements (x 2)], clean and noise f32 [samples, elements], contiguous;
// rows: a Row for each sample, which changes from step to step.
// diffusion_loss: writes total, error, variational f32 [samples]; a block for each sample, threads stride over
// its elements; sums by threads, warps and block in a fixed order: deterministic.
// diffusion_loss_gradient: of the sum over b of upstream_b * total_b; grid: (parts of THREADS elements, samples
// striding over the y dimension); a thread writes an element of the gradient, and that of its variance.

#define THREADS 512
#define LN_2 0.693147180559945309417

struct Row {
    double target_clean, target_noise, error_weight;
    double weight, mean_slope, log_variance_low, log_variance_range, decoder;
};

struct Pair {
    double value, slope;
};

#ifdef LEARNED
#define HALVES 2
// Half the distance of two pixel values when 0..255 is mapped to -1..1.
#define HALF_BIN (1.0 / 255.0)
// Likelihoods below this count as this: the logarithm stays finite, and its slope is zero.
#define SMALLEST_LIKELIHOOD 1e-12

// The normal distribution function by its tanh approximation, as the logistic function of twice the argument.
__device__ Pair normal(double x) {
    const double scale = 2.0 * 0.797884560802865355880;
    double argument = scale * (x + 0.044715 * x * x * x);
    double mass = 1.0 / (1.0 + exp(-argument)), rest = 1.0 / (1.0 + exp(argument));
    return {mass, mass * rest * scale * (1.0 + 3.0 * 0.044715 * x * x)};
}

// The logarithm of the likelihood of a pixel under a Gaussian whose mean lies `offset` below it, and its
// derivative with respect to `log_scale`. The end bins reach to infinity.
__device__ Pair log_likelihood(double pixel, double offset, double log_scale) {
    // Mirrored into the lower tail, where small masses do not cancel.
    if (offset > 0.0) {
        pixel = -pixel;
        offset = -offset;
    }
    double inverse = exp(-log_scale);
    double upper = (offset + HALF_BIN) * inverse, lower = (offset - HALF_BIN) * inverse;
    Pair above = pixel > 0.999 ? Pair{1.0, 0.0} : normal(upper);
    Pair below = pixel < -0.999 ? Pair{0.0, 0.0} : normal(lower);
    double likelihood = above.value - below.value;
    if (likelihood < SMALLEST_LIKELIHOOD) return {log(SMALLEST_LIKELIHOOD), 0.0};
    // Both bounds scale with 1 / scale, so d bound / d log_scale = -bound.
    return {log(likelihood), (lower * below.slope - upper * above.slope) / likelihood};
}

// The variational term of one element in nats, and its derivative with respect to `variance`.
__device__ Pair term(const Row &row, double difference, double variance, double clean) {
    double above_low = (variance + 1.0) / 2.0 * row.log_variance_range;
    double mean_difference = -row.mean_slope * difference;
    Pair result;
    if (row.decoder != 0.0) {
        Pair of = log_likelihood(clean, mean_difference, (row.log_variance_low + above_low) / 2.0);
        result = {-of.value, -of.slope / 2.0};
    } else {
        double precision = exp(-row.log_variance_low - above_low);
        double distance = mean_difference * mean_difference * precision;
        double shrink = expm1(-above_low);
        result = {(above_low + shrink + distance) / 2.0, (-shrink - distance) / 2.0};
    }
    result.slope *= row.log_variance_range / 2.0;
    return result;
}
#else
#define HALVES 1
#endif

// output - target.
__device__ __forceinline__ double difference_of(const Row &row, float output, float clean, float noise) {
    return double(output) - (row.target_clean * double(clean) + row.target_noise * double(noise));
}

__device__ double block_sum(double value, double (&of_warps)[THREADS / 32]) {
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
    __syncthreads();
    double sum = 0.0;
    for (int warp = 0; warp < THREADS / 32; ++warp) sum += of_warps[warp];
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    diffusion_loss(const Row *rows, const OUTPUT *output, const float *clean, const float *noise, float *total,
                   float *error, float *variational, i64 elements) {
    __shared__ double of_warps[THREADS / 32];
    i64 sample = blockIdx.x;
    Row row = rows[sample];
    output += sample * elements * HALVES;
    clean += sample * elements;
    noise += sample * elements;
    double squares = 0.0, nats = 0.0;
    for (i64 i = threadIdx.x; i < elements; i += THREADS) {
        double difference = difference_of(row, to_float(output[i]), clean[i], noise[i]);
        squares += difference * difference;
#ifdef LEARNED
        nats += term(row, difference, double(to_float(output[elements + i])), double(clean[i])).value;
#endif
    }
    squares = block_sum(squares, of_warps) / double(elements);
    nats = block_sum(nats, of_warps) / (double(elements) * LN_2);
    if (threadIdx.x == 0) {
        total[sample] = float(row.error_weight * squares + row.weight * nats);
        error[sample] = float(squares);
        variational[sample] = float(nats);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    diffusion_loss_gradient(const Row *rows, const OUTPUT *output, const float *clean, const float *noise,
                            const float *upstream, OUTPUT *gradient, i64 samples, i64 elements) {
    i64 i = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= elements) return;
    for (i64 sample = blockIdx.y; sample < samples; sample += gridDim.y) {
        Row row = rows[sample];
        i64 at = sample * elements * HALVES + i, own = sample * elements + i;
        double difference = difference_of(row, to_float(output[at]), clean[own], noise[own]);
        double scale = double(upstream[sample]) / double(elements);
        gradient[at] = from_float<OUTPUT>(float(scale * row.error_weight * 2.0 * difference));
#ifdef LEARNED
        double variance = double(to_float(output[at + elements]));
        double slope = term(row, difference, variance, double(clean[own])).slope;
        gradient[at + elements] = from_float<OUTPUT>(float(scale * row.weight / LN_2 * slope));
#endif
    }
}
