// Kernels of a decoding step on a CPU: products of few rows with a frozen matrix, and a whole decoder layer.
//
// Reading the weights bounds a decoding step. A matrix is stored in panels of LANES outputs, input by input, so that a
// core reads it in one direction and prefetches it; all rows are multiplied while a panel is in registers. The order of
// a row's sums does not depend on the other rows.
//
// Compiled by teacher/cpu_kernels.py with GCC or Clang for this machine's processor (GCC's vector extensions, OpenMP).
// Letters: M rows (of all sequences), K inputs, N outputs, D head size, S key/value slots in view.

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
constexpr int AHEAD = 2048 / BYTES;  // inputs by which a panel is prefetched
constexpr int MOST_ROWS = REGISTERS / 2;  // of one pass over panels: their sums just fit the registers
constexpr int QUERIES = 8;  // that read the keys together
constexpr int MOST_HEAD = 512;  // values of a head

typedef float vec __attribute__((vector_size(BYTES)));
typedef int32_t ints __attribute__((vector_size(BYTES)));
typedef float loose __attribute__((vector_size(BYTES), aligned(4)));  // a vec that need not be aligned

static inline vec load(const float* from) { return *(const loose*)from; }
static inline void store(float* to, vec value) { *(loose*)to = value; }

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

// Frozen matrix (N, K): panels[N / LANES, rounded up][K][LANES], and a bias in the same order, or null. In a paired
// matrix, gate and up together (2 N, K), panels of gate and up alternate.
struct Matrix {
  const float *panels, *bias;
  int64_t outputs, inputs;
};

// Weights of a decoder layer. The norms of queries and keys may be null.
struct Layer {
  Matrix joined, output, gates, down;
  const float *first_norm, *second_norm, *query_norm, *key_norm;
  float first_epsilon, second_epsilon, query_epsilon, key_epsilon, scaling;
  int64_t size, query_heads, key_heads, head;
};

// Rows (B, R, d) of a decoding step. Strides count floats; the last dimension of each array is contiguous.
struct Step {
  int64_t batch, rows, slots;
  const float *hidden, *cosine, *sine, *mask;         // (B, R, d), (B or 1, R, D) twice, (B, R, S) or null
  float *queries, *own_keys, *own_values, *output;  // (B, Hk, R, Hq / Hk, D), (B, Hk, R, D) twice, (B, R, d)
  const float *keys, *values;                       // (B, Hk, S, D)
  int64_t angle_sequence, angle_row, mask_sequence, mask_row, own_sequence, own_head, own_row;
  int64_t key_sequence, key_head, key_row;
};
}

enum Kind { PLAIN, ADDED, PAIRED };

// One pass of M rows over V panels. ADDED: `rest` (M, N) is added. PAIRED: silu(gate) * up.
template <int M, int V, Kind KIND>
static void pass(const Matrix& matrix, const float* x, int64_t panel, float* y, const float* rest) {
  const int64_t K = matrix.inputs, N = matrix.outputs;
  const float* panels = matrix.panels + panel * K * LANES;
  vec sums[M][V] = {};
  for (int64_t k = 0; k < K; k++) {
    // at a panel's end the next pass's panels are prefetched
    const float* ahead = panels + (k + AHEAD < K ? k + AHEAD : V * K + k + AHEAD - K) * LANES;
    vec weights[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) {
      weights[v] = *(const vec*)(panels + (v * K + k) * LANES);
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

template <int M, Kind KIND>
static void sweep(const Matrix& matrix, const float* x, int64_t panel, int64_t count, float* y, const float* rest) {
  constexpr int ONE = KIND == PAIRED ? 2 : 1, THREE = KIND != PAIRED && width(M) == 3 ? 3 : 2;
  if (count == 1) pass<M, ONE, KIND>(matrix, x, panel, y, rest);
  else if (count == 2) pass<M, 2, KIND>(matrix, x, panel, y, rest);
  else pass<M, THREE, KIND>(matrix, x, panel, y, rest);
}

typedef void (*Sweep)(const Matrix&, const float*, int64_t, int64_t, float*, const float*);

template <Kind KIND, int... ROWS>
static Sweep sweep_of(int64_t rows, std::integer_sequence<int, ROWS...>) {
  static constexpr Sweep all[] = {sweep<ROWS + 1, KIND>...};
  return all[rows - 1];
}

// A thread's part of y (M, N) = x (M, K) W^T + b (+ rest). Blocks of rows, of nearly equal size, use a panel one after
// the other while it is in the cache.
template <Kind KIND>
static void multiply(const Matrix& matrix, const float* x, int64_t M, float* y, const float* rest, int thread,
                     int threads) {
  constexpr int UNIT = KIND == PAIRED ? 2 : 1;
  const int64_t panels = (matrix.outputs + LANES - 1) / LANES, blocks = (M + MOST_ROWS - 1) / MOST_ROWS;
  const int64_t last = panels * (thread + 1) / threads * UNIT, wide = width((M + blocks - 1) / blocks) / UNIT * UNIT;
  for (int64_t panel = panels * thread / threads * UNIT; panel < last; panel += wide)
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t from = M * block / blocks, rows = M * (block + 1) / blocks - from, at = from * matrix.outputs;
      sweep_of<KIND>(rows, std::make_integer_sequence<int, MOST_ROWS>())(
          matrix, x + from * matrix.inputs, panel, std::min(wide, last - panel), y + at, rest ? rest + at : nullptr);
    }
}

// (rows of `size`) y = x w / sqrt(mean(x^2) + e)
static void normalise(const float* x, const float* weight, float epsilon, int64_t size, float* y) {
  vec squares = {};
  int64_t at = 0;
  for (; at + LANES <= size; at += LANES) squares += load(x + at) * load(x + at);
  float total = sum(squares);
  for (; at < size; at++) total += x[at] * x[at];
  const float scale = 1.0f / std::sqrt(total / size + epsilon);
  for (at = 0; at < size; at++) y[at] = x[at] * scale * weight[at];
}

// A head's D values, normalised if there is a weight, and rotated: the sine's first half is negated.
static void turn(const float* x, const float* weight, float epsilon, const float* cosine, const float* sine,
                 float factor, int64_t D, float* y) {
  float normed[MOST_HEAD];
  if (weight) {
    normalise(x, weight, epsilon, D, normed);
    x = normed;
  }
  const int64_t half = D / 2;
  for (int64_t at = 0; at < half; at++) y[at] = (x[at] * cosine[at] + x[at + half] * sine[at]) * factor;
  for (int64_t at = half; at < D; at++) y[at] = (x[at] * cosine[at] + x[at - half] * sine[at]) * factor;
}

// Attention of up to QUERIES queries (D,), scaled beforehand, over S slots. VECTORS: D / LANES where it is a constant
// without remainder, else 0.
template <int VECTORS>
static void attend(const float* const* queries, const float* const* masks, int count, const float* keys,
                   const float* values, int64_t row, int64_t slots, int64_t D, float* scores, float* const* outputs) {
  const int vectors = VECTORS ? VECTORS : D / LANES;
  const int64_t rest = VECTORS ? D : vectors * LANES, padded = (slots + LANES - 1) / LANES * LANES;
  for (int64_t slot = 0; slot < slots; slot++) {
    const float* key = keys + slot * row;
    for (int q = 0; q < count; q++) {
      vec products = {};
      for (int v = 0; v < vectors; v++) products += load(queries[q] + v * LANES) * load(key + v * LANES);
      float score = sum(products);
      for (int64_t at = rest; at < D; at++) score += queries[q][at] * key[at];
      scores[q * padded + slot] = masks[q] ? score + masks[q][slot] : score;
    }
  }
  float totals[QUERIES];
  for (int q = 0; q < count; q++) {
    float* own = scores + q * padded;
    const float most = *std::max_element(own, own + slots);
    std::fill(own + slots, own + padded, -INFINITY);
    vec total = {};
    for (int64_t slot = 0; slot < padded; slot += LANES) {
      vec share = exponential(load(own + slot) - most);
      if (slot + LANES > slots)
        for (int lane = slots - slot; lane < LANES; lane++) share[lane] = 0;
      store(own + slot, share);
      total += share;
    }
    totals[q] = sum(total);
  }
  for (int q = 0; q < count; q += 2) {
    const int second = std::min(q + 1, count - 1);
    const float *shares = scores + q * padded, *others = scores + second * padded;
    vec sums[2][VECTORS ? VECTORS : MOST_HEAD / LANES] = {};
    for (int64_t slot = 0; slot < slots; slot++)
      for (int v = 0; v < vectors; v++) {
        vec value = load(values + slot * row + v * LANES);
        sums[0][v] += shares[slot] * value;
        sums[1][v] += others[slot] * value;
      }
    for (int v = 0; v < vectors; v++) {
      store(outputs[q] + v * LANES, sums[0][v] / totals[q]);
      store(outputs[second] + v * LANES, sums[second - q][v] / totals[second]);
    }
    for (int64_t at = rest; at < D; at++) {
      float own = 0, other = 0;
      for (int64_t slot = 0; slot < slots; slot++) {
        own += shares[slot] * values[slot * row + at];
        other += others[slot] * values[slot * row + at];
      }
      outputs[q][at] = own / totals[q];
      outputs[second][at] = other / totals[second];
    }
  }
}

static decltype(&attend<0>) attention_of(int64_t D) {
  switch (D % LANES ? 0 : D / LANES) {
    case 2: return attend<2>;
    case 4: return attend<4>;
    case 8: return attend<8>;
    default: return attend<0>;
  }
}

// Buffers of a layer's rows, kept from call to call.
struct Workspace {
  std::vector<float> normed, wide, attended;
  void fit(const Layer& layer, int64_t M) {
    grow(normed, M * layer.size);
    grow(wide, M * std::max(layer.joined.outputs, layer.gates.outputs));
    grow(attended, M * layer.query_heads * layer.head);
  }
  static void grow(std::vector<float>& buffer, int64_t size) {
    if ((int64_t)buffer.size() < size) buffer.resize(size);
  }
};

extern "C" {

int64_t firp_lanes() { return LANES; }

// y (M, N) = x (M, K) W^T + b, all contiguous.
void firp_product(const Matrix* matrix, const float* x, int64_t M, float* y, int threads) {
#pragma omp parallel num_threads(threads)
  multiply<PLAIN>(*matrix, x, M, y, nullptr, omp_get_thread_num(), omp_get_num_threads());
}

// The first part of a decoder layer: norm, queries, keys and values, rotated.
void firp_before(const Layer* given, const Step* step, int threads) {
  static thread_local Workspace space;
  const Layer& layer = *given;
  const Step& s = *step;
  const int64_t M = s.batch * s.rows, size = layer.size, D = layer.head, group = layer.query_heads / layer.key_heads;
  const int64_t heads = layer.query_heads + 2 * layer.key_heads;
  space.fit(layer, M);
  float *normed = space.normed.data(), *joined = space.wide.data();
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    for (int64_t m = thread; m < M; m += team)
      normalise(s.hidden + m * size, layer.first_norm, layer.first_epsilon, size, normed + m * size);
#pragma omp barrier
    multiply<PLAIN>(layer.joined, normed, M, joined, nullptr, thread, team);
#pragma omp barrier
    for (int64_t item = thread; item < M * heads; item += team) {
      const int64_t m = item / heads, head = item % heads, sequence = m / s.rows, row = m % s.rows;
      const float* x = joined + item * D;
      const int64_t angle = sequence * s.angle_sequence + row * s.angle_row;
      const float *cosine = s.cosine + angle, *sine = s.sine + angle;
      if (head < layer.query_heads) {  // queries of one key head are adjacent
        const int64_t place = ((sequence * layer.key_heads + head / group) * s.rows + row) * group + head % group;
        turn(x, layer.query_norm, layer.query_epsilon, cosine, sine, layer.scaling, D, s.queries + place * D);
        continue;
      }
      const int64_t own = (head - layer.query_heads) % layer.key_heads;
      const int64_t place = sequence * s.own_sequence + own * s.own_head + row * s.own_row;
      if (head < layer.query_heads + layer.key_heads)
        turn(x, layer.key_norm, layer.key_epsilon, cosine, sine, 1.0f, D, s.own_keys + place);
      else
        memcpy(s.own_values + place, x, D * sizeof(float));
    }
  }
}

// The second part of a decoder layer: attention, and the feed-forward gated by silu, each added to the rows.
void firp_after(const Layer* given, const Step* step, int threads) {
  static thread_local Workspace space;
  const Layer& layer = *given;
  const Step& s = *step;
  const int64_t M = s.batch * s.rows, size = layer.size, D = layer.head, group = layer.query_heads / layer.key_heads;
  const int64_t all = s.rows * group, chunks = (all + QUERIES - 1) / QUERIES;
  const auto attend_chunk = attention_of(D);
  space.fit(layer, M);
  float *normed = space.normed.data(), *gated = space.wide.data(), *attended = space.attended.data();
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    static thread_local std::vector<float> scores;
    Workspace::grow(scores, QUERIES * (s.slots + LANES));
    for (int64_t item = thread; item < s.batch * layer.key_heads * chunks; item += team) {
      const int64_t sequence = item / chunks / layer.key_heads, head = item / chunks % layer.key_heads;
      const int64_t first = item % chunks * QUERIES;
      const int count = std::min<int64_t>(QUERIES, all - first);
      const float *queries[QUERIES], *masks[QUERIES];
      float* outputs[QUERIES];
      for (int q = 0; q < count; q++) {
        const int64_t row = (first + q) / group, query_head = head * group + (first + q) % group;
        queries[q] = s.queries + ((sequence * layer.key_heads + head) * all + first + q) * D;
        masks[q] = s.mask ? s.mask + sequence * s.mask_sequence + row * s.mask_row : nullptr;
        outputs[q] = attended + ((sequence * s.rows + row) * layer.query_heads + query_head) * D;
      }
      const int64_t from = sequence * s.key_sequence + head * s.key_head;
      attend_chunk(queries, masks, count, s.keys + from, s.values + from, s.key_row, s.slots, D, scores.data(), outputs);
    }
#pragma omp barrier
    multiply<ADDED>(layer.output, attended, M, s.output, s.hidden, thread, team);
#pragma omp barrier
    for (int64_t m = thread; m < M; m += team)
      normalise(s.output + m * size, layer.second_norm, layer.second_epsilon, size, normed + m * size);
#pragma omp barrier
    multiply<PAIRED>(layer.gates, normed, M, gated, nullptr, thread, team);
#pragma omp barrier
    multiply<ADDED>(layer.down, gated, M, s.output, s.output, thread, team);
  }
}

// `count` layers, one after the other. The step's keys and values are those of the first layer; each next
// layer's follow `stride` floats later.
void firp_layers(const Layer* const* layers, int64_t count, const Step* given, int64_t stride, int threads) {
  Step step = *given;
  for (int64_t number = 0; number < count; number++) {
    firp_before(layers[number], &step, threads);
    firp_after(layers[number], &step, threads);
    step.hidden = step.output;
    step.own_keys += stride, step.own_values += stride, step.keys += stride, step.values += stride;
  }
}
}
