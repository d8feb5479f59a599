/* MKL, which pip's PyTorch is linked with, runs its AVX2 kernels on processors of other makers, at half the speed of its
   AVX-512 ones. Preloaded, these two answers make it choose as on an Intel processor. For comparison only: nobody's
   PyTorch does this by itself. */
int mkl_serv_intel_cpu(void) { return 1; }
int mkl_serv_intel_cpu_true(void) { return 1; }
