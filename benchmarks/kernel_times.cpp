// Writes when each kernel of a process began and ended, for kernel_times.py. The driver loads this library into a process where
// CUDA_INJECTION64_PATH names it, and calls InitializeInjection (CUPTI's manual, "Injection"). Kernels of a replayed graph are
// recorded one by one.
//
// A line for each kernel: begin and end in ns, launch geometry, name. KERNEL_TIMES names the file.

#include <cstdio>
#include <cstdlib>

#include <cupti.h>

static std::FILE *lines;

static void CUPTIAPI give_buffer(uint8_t **buffer, size_t *size, size_t *most_records) {
    *size = 16 << 20;
    *buffer = static_cast<uint8_t *>(std::aligned_alloc(64, *size));
    *most_records = 0;
}

static void CUPTIAPI take_buffer(CUcontext, uint32_t, uint8_t *buffer, size_t, size_t valid) {
    CUpti_Activity *record = nullptr;
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
        if (record->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) continue;
        // Later versions of the record begin with the fields of this one.
        auto *kernel = reinterpret_cast<CUpti_ActivityKernel9 *>(record);
        std::fprintf(
            lines, "%llu %llu %dx%dx%d %s\n", static_cast<unsigned long long>(kernel->start),
            static_cast<unsigned long long>(kernel->end), kernel->gridX, kernel->gridY, kernel->gridZ, kernel->name);
    }
    std::free(buffer);
}

static void finish() {
    cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
    std::fclose(lines);
}

extern "C" int InitializeInjection() {
    lines = std::fopen(std::getenv("KERNEL_TIMES"), "w");
    if (lines == nullptr) return 0;
    cuptiActivityRegisterCallbacks(give_buffer, take_buffer);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
    std::atexit(finish);
    return 1;
}
