// The parts of a decoding step around its forward: the accepted path of a tree (decoding/accept.py), the next draft
// (decoding/step.py), and the K/V that the step keeps (teacher/kv_cache.py). Letters beside those of cpu_coupling.h: P
// nodes of the longest path, A nodes with pseudo rows, S tokens among which drafts are chosen.

#pragma once

#include "cpu_coupling.h"

extern "C" {
// Trees (B, N) and the logits (B, N, V) of their nodes, or the tokens that the teacher puts after them. Where the next
// draft has k steps: the nodes with pseudo rows (B, A), null for all of them, and the rows from one of these, and from a
// step, to the next one. Strides count elements.
struct Descent {
  int64_t batch, nodes, vocabulary, longest, steps, anchors;
  const float* logits;                                        // or null
  int64_t* targets;                                           // (B, N); written where there are logits
  const int64_t *tokens, *parents, *depth, *paths, *anchored;
  int64_t logits_stride, paths_stride, paths_row, anchor_rows, step_rows, row_stride;
  int64_t *root, *row;                                        // (B,), (B, 1 + P): count and emitted tokens
  int64_t *kept, *path, *node;                                // (B,), (B, P), (B,) the deepest accepted node
  int64_t *picks, *ahead;                                     // (B, k) rows of the next draft, and their steps from 0
  float* floor;                                               // (B, k) -inf where no row reaches
};

// What drafts: the head (S, d), the tokens of its rows (S,) (null: all tokens), the final norm (d,), and of a coupling
// its product of the states (w, d) (null: none) and its bias (k, w).
struct Drafter {
  Matrix head, features;
  const int64_t* known;
  const float *norm, *bias;
  float cap, norm_epsilon, epsilon;
  int64_t size, width, coupled, recurrent;
};

// Rows of the next draft of C tokens for each step: `states` (B, R, d), and their logits (B, R, S) where these are known.
// `raw`: states before the final norm. `picks`: (B, k) the steps' rows; null: the first k. `final`: (B, N, d), of which
// `node` (B,) is the accepted one.
struct Next {
  int64_t batch, steps, candidates, raw;
  const float *states, *logits, *final, *floor;
  const int64_t *picks, *ahead, *node;
  int64_t states_stride, logits_stride, final_stride;
  int64_t* tokens;                  // (B, k, C)
  float *log_probs, *context;       // (B, k, C), (B, k, c)
};

// K/V (items, B, H, slots, D) of `bytes` bytes for each slot; `path` (B, P) of which `kept` (B,) rows stay.
struct Commit {
  int64_t items, batch, heads, bytes, first, scratch, capacity;
  int64_t item_stride, batch_stride, head_stride, path_stride;  // of K/V in bytes; of the path in elements
  char* store;
  const int64_t *path, *kept;
  int64_t* lengths;
};
}

// Place of the largest of (C,), of equals the first; -1 where any is NaN or infinity, or all are -infinity.
static int64_t place_of_largest(const float* x, int64_t C) {
  vec most = vec{} - INFINITY;
  ints block = {}, finite = ints{} - 1;
  int64_t at = 0;
  for (; at + LANES <= C; at += LANES) {
    const vec value = load(x + at);
    const ints more = value > most;
    finite &= value < INFINITY;
    most = more ? value : most;
    block = more ? ints{} + (int32_t)(at / LANES) : block;
  }
  int64_t best = -1;
  float value = -INFINITY;
  for (int lane = 0; lane < LANES && lane < C; lane++) {
    if (!finite[lane]) return -1;
    const int64_t place = (int64_t)block[lane] * LANES + lane;
    if (most[lane] > value || (most[lane] == value && place < best)) value = most[lane], best = place;
  }
  for (; at < C; at++) {
    if (!(x[at] < INFINITY)) return -1;
    if (x[at] > value) value = x[at], best = at;
  }
  return best;
}

// Places of the `count` largest of (C,), in descending order; of equals the first. The `count`-th largest maximum of
// LANES values each is a bound, below which few values have to be looked at.
static void largest_of_many(const float* x, int64_t C, int64_t count, std::vector<int32_t>& order) {
  const int64_t blocks = C / LANES;
  if (blocks < 2 * count) return largest(x, C, count, order);
  static thread_local std::vector<float> maxima, sorted;
  maxima.resize(blocks);
  for (int64_t block = 0; block < blocks; block++) {
    float most = -INFINITY;  // NaN, which no order holds, is never above it
    for (int lane = 0; lane < LANES; lane++) most = std::max(most, x[block * LANES + lane]);
    maxima[block] = most;
  }
  sorted = maxima;
  std::nth_element(sorted.begin(), sorted.begin() + count - 1, sorted.end(), std::greater<float>());
  const float bound = sorted[count - 1];
  order.clear();
  for (int64_t block = 0; block < blocks; block++) {
    if (maxima[block] < bound) continue;
    for (int64_t at = block * LANES; at < (block + 1) * LANES; at++)
      if (x[at] >= bound) order.push_back(at);
  }
  for (int64_t at = blocks * LANES; at < C; at++)
    if (x[at] >= bound) order.push_back(at);
  if ((int64_t)order.size() < count) return largest(x, C, count, order);  // most values are NaN
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [x](int32_t one, int32_t other) {
    return x[one] > x[other] || (x[one] == x[other] && one < other);
  });
}

// A sequence's accepted path, and the rows of its next draft.
static void descend(const Descent& a, int64_t sequence) {
  const int64_t N = a.nodes, *targets = a.targets + sequence * N, *tokens = a.tokens + sequence * N;
  const int64_t *parents = a.parents + sequence * N, *depth = a.depth + sequence * N;
  int64_t node = 0;
  for (int64_t child = 1; child < N; child++)  // children come after their parents
    if (parents[child] == node && tokens[child] == targets[node]) node = child;
  const int64_t count = depth[node], *way = a.paths + sequence * a.paths_stride + node * a.paths_row;
  int64_t *path = a.path + sequence * a.longest, *row = a.row + sequence * a.row_stride;
  *row = count;
  for (int64_t at = 0; at < a.longest; at++) path[at] = way[at], row[1 + at] = targets[way[at]];
  a.root[sequence] = std::max<int64_t>(targets[node], 0), a.kept[sequence] = count + 1, a.node[sequence] = node;
  int64_t place = node, passed = 0;
  if (a.anchored) {
    const int64_t* anchored = a.anchored + sequence * a.anchors;
    for (int64_t at = count; at >= 0; at--) {
      place = std::find(anchored, anchored + a.anchors, path[at]) - anchored;
      passed = count - at;
      if (place < a.anchors) break;
    }
  }
  for (int64_t step = 0; step < a.steps; step++) {
    const int64_t own = std::min(passed + step, a.steps - 1), at = sequence * a.steps + step;
    a.picks[at] = place * a.anchor_rows + own * a.step_rows;
    a.ahead[at] = own;
    a.floor[at] = passed + step < a.steps ? 0.0f : -INFINITY;
  }
}

// The C most probable of S tokens, and what the coupling reads of a step.
static void write_draft(const Drafter& drafter, const Next& a, int64_t item, const float* logits, const float* state,
                        const float* features) {
  static thread_local std::vector<int32_t> order;
  const int64_t S = drafter.head.outputs, C = a.candidates, d = drafter.size, w = drafter.width;
  const float total = log_sum(logits, S), floor = a.floor ? a.floor[item] : 0.0f;
  largest_of_many(logits, S, C, order);
  float* log_probs = a.log_probs + item * C;
  for (int64_t at = 0; at < C; at++) {
    a.tokens[item * C + at] = drafter.known ? drafter.known[order[at]] : order[at];
    log_probs[at] = std::min(logits[order[at]] - total, 0.0f);
  }
  if (drafter.coupled) {
    const int64_t columns = d + w + (drafter.recurrent ? d : 0) + 2, sequence = item / a.steps, step = a.ahead[item];
    float* to = a.context + item * columns;
    memcpy(to, state, d * sizeof(float));
    for (int64_t at = 0; at < w; at++) to[d + at] = drafter.bias[step * w + at] + (features ? features[at] : 0.0f);
    if (drafter.recurrent)
      memcpy(to + d + w, a.final + sequence * a.final_stride + a.node[sequence] * d, d * sizeof(float));
    to[columns - 2] = log_sum(log_probs, C) - log_probs[0];
    to[columns - 1] = step;
  }
  for (int64_t at = 0; at < C; at++) log_probs[at] += floor;
}

extern "C" {

void firp_accept(const Descent* given, int threads) {
  const Descent& a = *given;
  const int64_t rows = a.batch * a.nodes;
  if (a.logits) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      const int64_t sequence = row / a.nodes, node = row % a.nodes;
      a.targets[row] = place_of_largest(a.logits + sequence * a.logits_stride + node * a.vocabulary, a.vocabulary);
    }
  }
  for (int64_t sequence = 0; sequence < a.batch; sequence++) descend(a, sequence);
}

void firp_draft(const Drafter* drafter, const Next* asked, int threads) {
  static thread_local std::vector<float> kept_states, kept_inputs, kept_features, kept_logits;
  const Next& a = *asked;
  const int64_t rows = a.batch * a.steps, d = drafter->size, w = drafter->width, S = drafter->head.outputs;
  const bool features = drafter->coupled && drafter->features.panels;
  grow(kept_states, rows * d), grow(kept_inputs, rows * d), grow(kept_features, rows * w);
  if (!a.logits) grow(kept_logits, rows * S);
  float *states = kept_states.data(), *inputs = kept_inputs.data(), *made = kept_features.data();
  float* logits = kept_logits.data();
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    for (int64_t item = thread; item < rows; item += team) {
      const int64_t sequence = item / a.steps, pick = a.picks ? a.picks[item] : item % a.steps;
      const float* from = a.states + sequence * a.states_stride + pick * d;
      float *state = states + item * d, *input = inputs + item * d;
      if (a.raw)
        normalise(from, drafter->norm, drafter->norm_epsilon, d, state);
      else
        memcpy(state, from, d * sizeof(float));
      if (!features) continue;
      const float scale = inverse_root_mean_square(state, drafter->epsilon, d);
      for (int64_t at = 0; at < d; at++) input[at] = state[at] * scale;
    }
#pragma omp barrier
    if (!a.logits) multiply<PLAIN>(drafter->head, states, rows, logits, nullptr, thread, team);
    if (features) multiply<PLAIN>(drafter->features, inputs, rows, made, nullptr, thread, team);
#pragma omp barrier
    for (int64_t item = thread; item < rows; item += team) {
      const int64_t sequence = item / a.steps, pick = a.picks ? a.picks[item] : item % a.steps;
      const float* own = a.logits ? a.logits + sequence * a.logits_stride + pick * S : logits + item * S;
      if (drafter->cap && !a.logits)
        for (int64_t at = item * S; at < (item + 1) * S; at++)
          logits[at] = drafter->cap * std::tanh(logits[at] / drafter->cap);
      write_draft(*drafter, a, item, own, states + item * d, features ? made + item * w : nullptr);
    }
  }
}

void firp_commit(const Commit* given, int threads) {
  const Commit& a = *given;
  const int64_t all = a.items * a.batch * a.heads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < all; item++) {
    const int64_t head = item % a.heads, sequence = item / a.heads % a.batch, outer = item / a.heads / a.batch;
    char* slots = a.store + outer * a.item_stride + sequence * a.batch_stride + head * a.head_stride;
    for (int64_t at = 0; at < a.kept[sequence]; at++)
      memcpy(slots + (a.scratch + a.lengths[sequence] + at) * a.bytes,
             slots + (a.first + a.path[sequence * a.path_stride + at]) * a.bytes, a.bytes);
  }
  for (int64_t sequence = 0; sequence < a.batch; sequence++)
    a.lengths[sequence] = std::min(a.lengths[sequence] + a.kept[sequence], a.capacity);
}
}
