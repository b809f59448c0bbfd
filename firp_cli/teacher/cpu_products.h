// What the kernels share: vectors, and products of few rows with a frozen matrix.
//
// Reading the weights bounds a decoding step. A matrix is stored in panels of LANES outputs, input by input, so that a
// core reads it in one direction and prefetches it; all rows are multiplied while a panel is in registers. The order of
// a row's sums does not depend on the other rows.
//
// Letters: M rows (of all sequences), K inputs, N outputs.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include <omp.h>

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#else
constexpr int LANES = 4, REGISTERS = 32;
#endif
constexpr int BYTES = 4 * LANES;
constexpr int MOST_ROWS = REGISTERS / 2;  // of one pass over panels: their sums just fit the registers
constexpr int SHARED = 8;  // rows that read a row of the vocabulary matrix together

typedef float vec __attribute__((vector_size(BYTES)));
typedef int32_t ints __attribute__((vector_size(BYTES)));
typedef float loose __attribute__((vector_size(BYTES), aligned(4)));  // a vec that need not be aligned

static inline vec load(const float* from) { return *(const loose*)from; }
static inline void store(float* to, vec value) { *(loose*)to = value; }

// LANES weights of a panel, in float32 or in bfloat16, which is the upper half of a float32.
static inline vec weights_at(const float* panel, int64_t at) { return *(const vec*)(panel + at); }
static inline vec weights_at(const uint16_t* panel, int64_t at) {
  typedef uint16_t half __attribute__((vector_size(BYTES / 2)));
  const ints widened = __builtin_convertvector(*(const half*)(panel + at), ints) << 16;
  vec value;
  memcpy(&value, &widened, BYTES);
  return value;
}

static inline float sum(vec value) {
  alignas(BYTES) float lanes[LANES];
  memcpy(lanes, &value, BYTES);
  for (int half = LANES / 2; half; half /= 2)
    for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// e^x, within 2 units in the last place; 0 where it would be denormal.
static inline vec exponential(vec x) {
  const ints nothing = x < -87.3f;
  x = nothing ? vec{} : x;
  x = x > 88.0f ? vec{} + 88.0f : x;
  const float rounding = 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number
  vec shifted = x * 1.44269504f + rounding;
  vec whole = shifted - rounding;
  vec rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  vec power = vec{} + 1.9875691500e-4f;
  power = power * rest + 1.3981999507e-3f;
  power = power * rest + 8.3334519073e-3f;
  power = power * rest + 4.1665795894e-2f;
  power = power * rest + 1.6666665459e-1f;
  power = power * rest + 5.0000001201e-1f;
  power = power * rest * rest + rest + 1.0f;
  ints exponent = (__builtin_convertvector(whole, ints) + 127) << 23;
  vec scale;
  memcpy(&scale, &exponent, BYTES);
  return nothing ? vec{} : power * scale;
}

extern "C" {
// Frozen matrix (N, K): panels[N / LANES, rounded up][K][LANES], in bfloat16 if `half`, else in float32, and a bias in
// the same order, or null. In a paired matrix, gate and up together (2 N, K), panels of gate and up alternate.
struct Matrix {
  const void* panels;
  const float* bias;
  int64_t outputs, inputs, half;
};
}

enum Kind { PLAIN, ADDED, PAIRED };

// One pass of M rows over V panels. ADDED: `rest` (M, N) is added. PAIRED: silu(gate) * up.
template <int M, int V, Kind KIND, typename Weight>
static void pass(const Matrix& matrix, const float* x, int64_t panel, float* y, const float* rest) {
  constexpr int AHEAD = 2048 / (LANES * sizeof(Weight));  // inputs by which a panel is prefetched
  const int64_t K = matrix.inputs, N = matrix.outputs;
  const Weight* panels = (const Weight*)matrix.panels + panel * K * LANES;
  vec sums[M][V] = {};
  for (int64_t k = 0; k < K; k++) {
    // at a panel's end the next pass's panels are prefetched
    const Weight* ahead = panels + (k + AHEAD < K ? k + AHEAD : V * K + k + AHEAD - K) * LANES;
    vec weights[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) {
      weights[v] = weights_at(panels, (v * K + k) * LANES);
      __builtin_prefetch(ahead + v * K * LANES);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 3
      for (int v = 0; v < V; v++) sums[m][v] += x[m * K + k] * weights[v];
  }
  if (matrix.bias)
    for (int m = 0; m < M; m++)
      for (int v = 0; v < V; v++) sums[m][v] += *(const vec*)(matrix.bias + (panel + v) * LANES);
  constexpr int STRIDE = KIND == PAIRED ? 2 : 1;
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v += STRIDE) {
      vec value = sums[m][v];
      if (KIND == PAIRED) value = value / (exponential(-value) + 1.0f) * sums[m][v + STRIDE - 1];
      int64_t first = (panel + v) / STRIDE * LANES;
      float* to = y + m * N + first;
      const float* add = KIND == ADDED ? rest + m * N + first : nullptr;
      if (first + LANES <= N) {
        store(to, KIND == ADDED ? value + load(add) : value);
      } else {
        for (int lane = 0; first + lane < N; lane++) to[lane] = KIND == ADDED ? value[lane] + add[lane] : value[lane];
      }
    }
}

// Panels of a pass: three where the registers suffice for all sums, each panel's weights and a row's value.
static constexpr int width(int64_t rows) { return 3 * rows + 4 <= REGISTERS ? 3 : 2; }

template <int M, Kind KIND, typename Weight>
static void sweep(const Matrix& matrix, const float* x, int64_t panel, int64_t count, float* y, const float* rest) {
  constexpr int ONE = KIND == PAIRED ? 2 : 1, THREE = KIND != PAIRED && width(M) == 3 ? 3 : 2;
  if (count == 1) pass<M, ONE, KIND, Weight>(matrix, x, panel, y, rest);
  else if (count == 2) pass<M, 2, KIND, Weight>(matrix, x, panel, y, rest);
  else pass<M, THREE, KIND, Weight>(matrix, x, panel, y, rest);
}

typedef void (*Sweep)(const Matrix&, const float*, int64_t, int64_t, float*, const float*);

template <Kind KIND, typename Weight, int... ROWS>
static Sweep sweep_of(int64_t rows, std::integer_sequence<int, ROWS...>) {
  static constexpr Sweep all[] = {sweep<ROWS + 1, KIND, Weight>...};
  return all[rows - 1];
}

// A thread's part of y (M, N) = x (M, K) W^T + b (+ rest). Blocks of rows, of nearly equal size, use a panel one after
// the other while it is in the cache.
template <Kind KIND, typename Weight>
static void multiply_panels(const Matrix& matrix, const float* x, int64_t M, float* y, const float* rest, int thread,
                            int threads) {
  constexpr int UNIT = KIND == PAIRED ? 2 : 1;
  const int64_t panels = (matrix.outputs + LANES - 1) / LANES, blocks = (M + MOST_ROWS - 1) / MOST_ROWS;
  const int64_t last = panels * (thread + 1) / threads * UNIT, wide = width((M + blocks - 1) / blocks) / UNIT * UNIT;
  for (int64_t panel = panels * thread / threads * UNIT; panel < last; panel += wide)
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t from = M * block / blocks, rows = M * (block + 1) / blocks - from, at = from * matrix.outputs;
      sweep_of<KIND, Weight>(rows, std::make_integer_sequence<int, MOST_ROWS>())(
          matrix, x + from * matrix.inputs, panel, std::min(wide, last - panel), y + at, rest ? rest + at : nullptr);
    }
}

template <Kind KIND>
static void multiply(const Matrix& matrix, const float* x, int64_t M, float* y, const float* rest, int thread,
                     int threads) {
  if constexpr (KIND != PAIRED)
    if (matrix.half) return multiply_panels<KIND, uint16_t>(matrix, x, M, y, rest, thread, threads);
  multiply_panels<KIND, float>(matrix, x, M, y, rest, thread, threads);
}

// 1 / sqrt(mean(x^2) + e)
static float inverse_root_mean_square(const float* x, float epsilon, int64_t size) {
  vec squares = {};
  int64_t at = 0;
  for (; at + LANES <= size; at += LANES) squares += load(x + at) * load(x + at);
  float total = sum(squares);
  for (; at < size; at++) total += x[at] * x[at];
  return 1.0f / std::sqrt(total / size + epsilon);
}

// (rows of `size`) y = x w / sqrt(mean(x^2) + e)
static void normalise(const float* x, const float* weight, float epsilon, int64_t size, float* y) {
  const float scale = inverse_root_mean_square(x, epsilon, size);
  for (int64_t at = 0; at < size; at++) y[at] = x[at] * scale * weight[at];
}

// Buffers are kept from call to call.
static void grow(std::vector<float>& buffer, int64_t size) {
  if ((int64_t)buffer.size() < size) buffer.resize(size);
}
