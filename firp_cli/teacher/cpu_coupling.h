// The children of tree nodes that a coupling scores (predictors/coupling.py). Letters beside those of cpu_products.h: B
// sequences, F nodes of one depth, C candidates, V vocabulary, d hidden size, w width.

#pragma once

#include "cpu_products.h"

extern "C" {
// A coupling whose head is the same for all steps, and the vocabulary matrix (V, d) that scores tokens, with its bias
// (V,) or null. `cap` limits scores where it is not 0.
struct Coupling {
  Matrix node, output;
  const float *vocabulary, *bias;
  float cap, epsilon;
  int64_t size, width, recurrent, activated;
};

// Nodes of one depth and their best children. Strides count elements; the last dimension is contiguous.
struct Nodes {
  int64_t batch, nodes, candidates, count;
  const float *embedded, *previous, *context;  // (B, F, d), (B, F, d) or null for the root, (B, c)
  const int64_t* tokens;                       // (B, C)
  const float* first;                          // (B,)
  int64_t previous_stride, previous_row_stride, context_stride, tokens_stride, first_stride;
  int64_t* children;         // (B, F, count)
  float *scores, *adjusted;  // (B, F, count), (B, F, d)
};
}

// Products of R rows (d,) with one row of the vocabulary matrix.
template <int R>
static void score(const float* row, const float* states, int64_t d, float* results) {
  vec sums[R] = {};
  int64_t at = 0;
  for (; at + LANES <= d; at += LANES) {
    const vec value = load(row + at);
    for (int r = 0; r < R; r++) sums[r] += value * load(states + r * d + at);
  }
  for (int r = 0; r < R; r++) {
    results[r] = sum(sums[r]);
    for (int64_t rest = at; rest < d; rest++) results[r] += row[rest] * states[r * d + rest];
  }
}

template <int... ROWS>
static decltype(&score<1>) score_of(int64_t rows, std::integer_sequence<int, ROWS...>) {
  static constexpr decltype(&score<1>) all[] = {score<ROWS + 1>...};
  return all[rows - 1];
}

// log(sum(e^x)) of (C,)
static float log_sum(const float* x, int64_t C) {
  const float most = *std::max_element(x, x + C);
  vec total = {};
  int64_t at = 0;
  for (; at + LANES <= C; at += LANES) total += exponential(load(x + at) - most);
  float rest = 0;
  for (; at < C; at++) rest += std::exp(x[at] - most);
  return most + std::log(sum(total) + rest);
}

extern "C" {

// The children of nodes: their states adjusted, the candidates scored by them, the `count` best of each node.
void firp_children(const Coupling* given, const Nodes* asked, int threads) {
  static thread_local std::vector<float> kept_inputs, kept_hidden, kept_scores;
  const Coupling& coupling = *given;
  const Nodes& a = *asked;
  const int64_t M = a.batch * a.nodes, d = coupling.size, w = coupling.width, C = a.candidates;
  const int64_t K = coupling.recurrent ? 2 * d : d, groups = (a.nodes + SHARED - 1) / SHARED;
  grow(kept_inputs, M * K), grow(kept_hidden, M * w), grow(kept_scores, M * C);
  float *inputs = kept_inputs.data(), *hidden = kept_hidden.data(), *scores = kept_scores.data();
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    for (int64_t m = thread; m < M; m += team) {
      const int64_t sequence = m / a.nodes;
      memcpy(inputs + m * K, a.embedded + m * d, d * sizeof(float));
      if (!coupling.recurrent) continue;
      const float* above = a.previous ? a.previous + sequence * a.previous_stride + m % a.nodes * a.previous_row_stride
                                      : a.context + sequence * a.context_stride + d + w;
      const float scale = inverse_root_mean_square(above, coupling.epsilon, d);
      for (int64_t at = 0; at < d; at++) inputs[m * K + d + at] = above[at] * scale;
    }
#pragma omp barrier
    multiply<PLAIN>(coupling.node, inputs, M, hidden, nullptr, thread, team);
#pragma omp barrier
    for (int64_t m = thread; m < M; m += team) {
      const float *context = a.context + m / a.nodes * a.context_stride, *features = context + d;
      float* own = hidden + m * w;
      int64_t at = 0;
      if (coupling.activated)
        for (; at + LANES <= w; at += LANES) {
          const vec value = load(own + at) + load(features + at);
          store(own + at, value / (exponential(-value) + 1.0f));
        }
      for (; at < w; at++) {
        const float value = own[at] + features[at];
        own[at] = coupling.activated ? value / (std::exp(-value) + 1.0f) : value;
      }
      memcpy(a.adjusted + m * d, context, d * sizeof(float));
    }
#pragma omp barrier
    multiply<ADDED>(coupling.output, hidden, M, a.adjusted, a.adjusted, thread, team);
#pragma omp barrier
    for (int64_t item = thread; item < a.batch * C; item += team) {
      const int64_t sequence = item / C, candidate = item % C;
      const int64_t* tokens = a.tokens + sequence * a.tokens_stride;
      const int64_t token = tokens[candidate];
      const float* ahead = coupling.vocabulary + tokens[std::min(candidate + 2 * team, C - 1)] * d;
      for (int64_t at = 0; at < d; at += 16) __builtin_prefetch(ahead + at);
      for (int64_t group = 0; group < groups; group++) {
        const int64_t from = sequence * a.nodes + group * SHARED;
        const int count = std::min<int64_t>(SHARED, a.nodes - group * SHARED);
        float results[SHARED];
        const auto score_rows = score_of(count, std::make_integer_sequence<int, SHARED>());
        score_rows(coupling.vocabulary + token * d, a.adjusted + from * d, d, results);
        for (int q = 0; q < count; q++) {
          float value = coupling.bias ? results[q] + coupling.bias[token] : results[q];
          scores[(from + q) * C + candidate] = coupling.cap ? coupling.cap * std::tanh(value / coupling.cap) : value;
        }
      }
    }
#pragma omp barrier
    static thread_local std::vector<int32_t> order;
    order.resize(C);
    for (int64_t m = thread; m < M; m += team) {
      const int64_t sequence = m / a.nodes;
      const float *own = scores + m * C, *context = a.context + sequence * a.context_stride;
      const int64_t over_first = d + w + (coupling.recurrent ? d : 0);  // place in the context
      const float known = std::min(a.first[sequence * a.first_stride] + context[over_first], 0.0f);
      const float change = known - log_sum(own, C);
      for (int64_t place = 0; place < C; place++) order[place] = place;
      std::partial_sort(order.begin(), order.begin() + a.count, order.end(), [own](int32_t one, int32_t other) {
        return own[one] > own[other] || (own[one] == own[other] && one < other);
      });
      for (int64_t place = 0; place < a.count; place++) {
        a.children[m * a.count + place] = a.tokens[sequence * a.tokens_stride + order[place]];
        a.scores[m * a.count + place] = own[order[place]] + change;
      }
    }
  }
}
}
