// Kernels of a decoding step on a CPU. Compiled by teacher/cpu_kernels.py with GCC or Clang for this machine's processor
// (GCC's vector extensions, OpenMP).

#include "cpu_decoding.h"
#include "cpu_layers.h"
#include "cpu_products.h"

extern "C" {

int64_t firp_lanes() { return LANES; }

// y (M, N) = x (M, K) W^T + b, all contiguous.
void firp_product(const Matrix* matrix, const float* x, int64_t M, float* y, int threads) {
#pragma omp parallel num_threads(threads)
  multiply<PLAIN>(*matrix, x, M, y, nullptr, omp_get_thread_num(), omp_get_num_threads());
}
}
