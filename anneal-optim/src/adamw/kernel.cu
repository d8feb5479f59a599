// AdamW over all chunks at once (arXiv 1711.05101, algorithm 2), with clipping, averages and a guard against
// gradients that are not finite; the formulas are those of mod.rs. Nothing of it is known to the host.
//
// tasks    [TASKS] of Task: ranges of a chunk, starts and lengths multiples of 16 elements.
// pointers [STATES, 5 + AVERAGES]: of each trained chunk gradient f32, weights WEIGHT, master f32, first and second
//          moment f32, then the averages f32; all aligned to 16 bytes. Where WEIGHT is float the weights are the masters.
// Launches: adamw_squares <<<TASKS, 256>>>, adamw_decide <<<1, 1024>>>, adamw_update <<<TASKS, 256>>>.
// Deterministic: every sum has one order, which depends on the tasks alone.
//
// WEIGHT: element type of the weights. AVERAGES: number of averages.

#define THREADS 256
#define COLUMNS (5 + AVERAGES)

struct Task {
    i64 state, start, elements, decays;
};

// The numbers of one step, made by adamw_decide.
struct Constants {
    float apply;  // 0 where the step is skipped
    float gradient_scale, keep, step_size, root_correction, epsilon;
    float beta[2], rest[2];
    float average[2 * AVERAGES + 2];  // rate and 1 - rate of each average, and two unused
};

// The optimizer's constants.
struct Settings {
    double beta[2], epsilon, weight_decay, clip;  // clip is infinite where there is none
    float least_scale, most_scale;
    int good_steps;  // after which the loss scale doubles; 0 where it is constant
    int ema_warmup;
};

template <typename T>
__device__ __forceinline__ T *pointer_to(const u64 *pointers, const Task &task, int column) {
    T *start = reinterpret_cast<T *>(pointers[task.state * COLUMNS + column]);
    // Else loads by an address out of a table would ask each time which memory it lies in.
    __builtin_assume(__isGlobal(start));
    return start + task.start;
}

// partials[task] = sum of squares of the task's gradients.
extern "C" __global__ void __launch_bounds__(THREADS)
    adamw_squares(const Task *tasks, const u64 *pointers, double *partials) {
    __shared__ double of_warps[THREADS / 32];
    Task task = tasks[blockIdx.x];
    const float *gradients = pointer_to<float>(pointers, task, 0);
    double sums[4] = {0.0, 0.0, 0.0, 0.0};
#pragma unroll 4
    for (i64 i = 4 * threadIdx.x; i < task.elements; i += 4 * THREADS) {
        float values[4];
        load_pack<4>(values, gradients + i);
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) sums[lane] += double(values[lane]) * double(values[lane]);
    }
    double sum = warp_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        sum = 0.0;
        for (int warp = 0; warp < THREADS / 32; ++warp) sum += of_warps[warp];
        partials[blockIdx.x] = sum;
    }
}

// Sums the partials and decides what the step does.
//
// learning_rate [1]; rates [AVERAGES]; counts [2]: steps that changed the weights, good steps of the loss scale;
// loss_scale [1]; report [2]: the norm without the loss scale, and that scale.
extern "C" __global__ void __launch_bounds__(1024)
    adamw_decide(const double *partials, i64 tasks, const double *learning_rate, const double *rates,
                 Settings settings, i64 *counts, float *loss_scale, Constants *constants, double *report) {
    __shared__ double of_warps[32];
    double squares = 0.0;
    for (i64 i = threadIdx.x; i < tasks; i += 1024) squares += partials[i];
    squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = squares;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    squares = warp_sum(of_warps[threadIdx.x]);
    if (threadIdx.x > 0) return;

    float scale = *loss_scale;
    double norm = sqrt(squares) / scale;
    bool finite = isfinite(norm);
    report[0] = norm;
    report[1] = scale;
    constants->apply = finite ? 1.0f : 0.0f;
    if (settings.good_steps > 0) {
        i64 good = finite ? counts[1] + 1 : 0;
        if (!finite) *loss_scale = fmaxf(scale * 0.5f, settings.least_scale);
        if (good == settings.good_steps) {
            *loss_scale = fminf(scale * 2.0f, settings.most_scale);
            good = 0;
        }
        counts[1] = good;
    }
    if (!finite) return;
    i64 steps = counts[0] + 1;
    counts[0] = steps;
    double count = double(steps);
    // The small number keeps a norm of zero harmless.
    constants->gradient_scale = float(fmin(settings.clip / (norm + 1e-6), 1.0) / scale);
    constants->keep = float(1.0 - *learning_rate * settings.weight_decay);
    constants->step_size = float(*learning_rate / (1.0 - pow(settings.beta[0], count)));
    constants->root_correction = float(1.0 / sqrt(1.0 - pow(settings.beta[1], count)));
    constants->epsilon = float(settings.epsilon);
    for (int moment = 0; moment < 2; ++moment) {
        constants->beta[moment] = float(settings.beta[moment]);
        constants->rest[moment] = float(1.0 - settings.beta[moment]);
    }
    for (int k = 0; k < AVERAGES; ++k) {
        double rate = settings.ema_warmup ? fmin(rates[k], count / (9.0 + count)) : rates[k];
        constants->average[2 * k] = float(rate);
        constants->average[2 * k + 1] = float(1.0 - rate);
    }
}

// Moments, masters, weights and averages of one task, each read and written once.
extern "C" __global__ void __launch_bounds__(THREADS)
    adamw_update(const Task *tasks, const u64 *pointers, const Constants *shared_constants) {
    Constants constants = *shared_constants;
    if (constants.apply == 0.0f) return;
    Task task = tasks[blockIdx.x];
    const float *gradients = pointer_to<float>(pointers, task, 0);
    WEIGHT *weights = pointer_to<WEIGHT>(pointers, task, 1);
    float *master = pointer_to<float>(pointers, task, 2);
    float *first = pointer_to<float>(pointers, task, 3);
    float *second = pointer_to<float>(pointers, task, 4);
    float *averages[AVERAGES + 1];
#pragma unroll
    for (int k = 0; k < AVERAGES; ++k) averages[k] = pointer_to<float>(pointers, task, 5 + k);
    float keep = task.decays ? constants.keep : 1.0f;
    for (i64 i = 4 * threadIdx.x; i < task.elements; i += 4 * THREADS) {
        float g[4], p[4], m[4], v[4], e[AVERAGES + 1][4];
        load_pack<4>(g, gradients + i);
        load_pack<4>(p, master + i);
        load_pack<4>(m, first + i);
        load_pack<4>(v, second + i);
#pragma unroll
        for (int k = 0; k < AVERAGES; ++k) load_pack<4>(e[k], averages[k] + i);
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
            float gradient = g[lane] * constants.gradient_scale;
            m[lane] = constants.beta[0] * m[lane] + constants.rest[0] * gradient;
            v[lane] = constants.beta[1] * v[lane] + constants.rest[1] * gradient * gradient;
            float denominator = sqrtf(v[lane]) * constants.root_correction + constants.epsilon;
            p[lane] = p[lane] * keep - constants.step_size * m[lane] / denominator;
#pragma unroll
            for (int k = 0; k < AVERAGES; ++k)
                e[k][lane] = constants.average[2 * k] * e[k][lane] + constants.average[2 * k + 1] * p[lane];
        }
        store_pack(first + i, m);
        store_pack(second + i, v);
        store_pack(master + i, p);
        if (sizeof(WEIGHT) != sizeof(float)) store_pack(weights + i, p);
#pragma unroll
        for (int k = 0; k < AVERAGES; ++k) store_pack(averages[k] + i, e[k]);
    }
}
