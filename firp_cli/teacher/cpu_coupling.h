// The children of tree nodes that a coupling scores (predictors/coupling.py), and the dynamic trees of them. Letters
// beside those of cpu_products.h: B sequences, F nodes of one depth, N nodes of a tree, k steps, C candidates, V
// vocabulary, d hidden size, w width, c columns of a context.

#pragma once

#include <functional>
#include <numeric>

#include "cpu_products.h"

extern "C" {
// A coupling whose head is the same for all steps, and the vocabulary matrix (V, d) that scores tokens, with its bias
// (V,) or null. `cap` limits scores where it is not 0. `scale` multiplies embeddings.
struct Coupling {
  Matrix node, output;
  const float *vocabulary, *bias;
  float cap, epsilon, scale;
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

// Drafts and the dynamic trees of their best N nodes; C >= N - 1. Strides count elements.
struct Drafts {
  int64_t batch, steps, candidates, nodes;
  const int64_t *root, *tokens;                         // (B,), (B, k, C)
  const float *log_probs, *context, *embedding;         // (B, k, C), (B, k, c), (V, d)
  int64_t tokens_stride, tokens_step, log_probs_stride, log_probs_step, context_stride, context_step;
  int64_t *node_tokens, *parents, *depth, *paths;       // (B, N) three times, (B, N, k + 1)
  bool* ancestors;                                      // (B, N, N)
  float* scores;                                        // (B, N)
};
}

// Candidates of a sequence's step, and its rows among those of all sequences. `first`: the logarithm of the first
// candidate's probability without the coupling.
struct Candidates {
  const int64_t* tokens;
  const float* context;
  float first;
  int64_t from, rows;
};

// A node whose children are wanted. `above`: its own adjusted state; null for the root.
struct Node {
  const float *embedded, *above;
  int64_t sequence;
};

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

// Places of the `count` largest of (C,), in descending order; of equals the first.
static void largest(const float* x, int64_t C, int64_t count, std::vector<int32_t>& order) {
  order.resize(C);
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [x](int32_t one, int32_t other) {
    return x[one] > x[other] || (x[one] == x[other] && one < other);
  });
}

// The children of M nodes: their states adjusted (M, d), the C candidates of their step scored by them, the `count` best
// of each node (M, count).
static void expand(const Coupling& coupling, const std::vector<Candidates>& steps, const std::vector<Node>& nodes, int64_t C,
                   int64_t count, int64_t* children, float* scores, float* adjusted, int threads) {
  static thread_local std::vector<float> kept_inputs, kept_hidden, kept_all;
  const int64_t M = nodes.size(), d = coupling.size, w = coupling.width, K = coupling.recurrent ? 2 * d : d;
  grow(kept_inputs, M * K), grow(kept_hidden, M * w), grow(kept_all, M * C);
  float *inputs = kept_inputs.data(), *hidden = kept_hidden.data(), *all = kept_all.data();
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    for (int64_t m = thread; m < M; m += team) {
      const Node& node = nodes[m];
      for (int64_t at = 0; at < d; at++) inputs[m * K + at] = node.embedded[at] * coupling.scale;
      if (!coupling.recurrent) continue;
      const float* above = node.above ? node.above : steps[node.sequence].context + d + w;
      const float scale = inverse_root_mean_square(above, coupling.epsilon, d);
      for (int64_t at = 0; at < d; at++) inputs[m * K + d + at] = above[at] * scale;
    }
#pragma omp barrier
    multiply<PLAIN>(coupling.node, inputs, M, hidden, nullptr, thread, team);
#pragma omp barrier
    for (int64_t m = thread; m < M; m += team) {
      const float *context = steps[nodes[m].sequence].context, *features = context + d;
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
      memcpy(adjusted + m * d, context, d * sizeof(float));
    }
#pragma omp barrier
    multiply<ADDED>(coupling.output, hidden, M, adjusted, adjusted, thread, team);
#pragma omp barrier
    for (int64_t item = thread; item < (int64_t)steps.size() * C; item += team) {
      const Candidates& step = steps[item / C];
      const int64_t candidate = item % C, token = step.tokens[candidate];
      const float* ahead = coupling.vocabulary + step.tokens[std::min(candidate + 2 * team, C - 1)] * d;
      for (int64_t at = 0; at < d; at += 16) __builtin_prefetch(ahead + at);
      for (int64_t from = step.from; from < step.from + step.rows; from += SHARED) {
        const int rows = std::min<int64_t>(SHARED, step.from + step.rows - from);
        float results[SHARED];
        const auto score_rows = score_of(rows, std::make_integer_sequence<int, SHARED>());
        score_rows(coupling.vocabulary + token * d, adjusted + from * d, d, results);
        for (int r = 0; r < rows; r++) {
          const float value = coupling.bias ? results[r] + coupling.bias[token] : results[r];
          all[(from + r) * C + candidate] = coupling.cap ? coupling.cap * std::tanh(value / coupling.cap) : value;
        }
      }
    }
#pragma omp barrier
    static thread_local std::vector<int32_t> order;
    for (int64_t m = thread; m < M; m += team) {
      const Candidates& step = steps[nodes[m].sequence];
      const float* own = all + m * C;
      const float over_first = step.context[d + w + (coupling.recurrent ? d : 0)];
      const float change = std::min(step.first + over_first, 0.0f) - log_sum(own, C);
      largest(own, C, count, order);
      for (int64_t place = 0; place < count; place++) {
        children[m * count + place] = step.tokens[order[place]];
        scores[m * count + place] = own[order[place]] + change;
      }
    }
  }
}

// The value, or -inf for NaN, which no order of scores holds.
static inline float numbered(float value) { return value == value ? value : -INFINITY; }

// A tree while it grows: candidates for its nodes, level by level, the root first.
struct Growing {
  std::vector<int64_t> tokens, parents, depths;
  std::vector<float> scores;
  std::vector<int64_t> frontier, rows;  // candidates of the last level that are extended; the rows that made them

  // Add the `limit` best children of the frontier. `from`: its first row in `children` and `scores` (rows, limit).
  void extend(const int64_t* children, const float* found, int64_t from, int64_t limit, int64_t depth) {
    static thread_local std::vector<float> joint;
    static thread_local std::vector<int32_t> order;
    const int64_t F = frontier.size();
    joint.resize(F * limit);
    for (int64_t f = 0; f < F; f++)
      for (int64_t place = 0; place < limit; place++)
        joint[f * limit + place] = numbered(scores[frontier[f]] + found[(from + f) * limit + place]);
    largest(joint.data(), F * limit, limit, order);
    std::vector<int64_t> next;
    rows.clear();
    for (int64_t place = 0; place < limit; place++) {
      const int64_t pick = order[place], row = from + pick / limit;
      next.push_back(tokens.size());
      rows.push_back(row);
      tokens.push_back(children[row * limit + pick % limit]);
      parents.push_back(frontier[pick / limit]);
      depths.push_back(depth);
      scores.push_back(joint[pick]);
    }
    frontier = next;
  }

  // Keep the part of the frontier that may be among the `limit` best of all levels; its scores descend.
  void prune(int64_t limit) {
    static thread_local std::vector<float> sorted;
    sorted.assign(scores.begin() + 1, scores.end());
    std::nth_element(sorted.begin(), sorted.begin() + limit - 1, sorted.end(), std::greater<float>());
    while (!frontier.empty() && scores[frontier.back()] < sorted[limit - 1]) frontier.pop_back();
    rows.resize(frontier.size());
  }
};

// Write the N - 1 best candidates of a tree and the root. A child's score is at most its parent's, which comes first.
static void write_tree(const Growing& tree, const Drafts& drafts, int64_t sequence) {
  static thread_local std::vector<int32_t> order;
  const int64_t N = drafts.nodes, length = drafts.steps + 1;
  int64_t *tokens = drafts.node_tokens + sequence * N, *parents = drafts.parents + sequence * N;
  int64_t *depth = drafts.depth + sequence * N, *paths = drafts.paths + sequence * N * length;
  bool* ancestors = drafts.ancestors + sequence * N * N;
  largest(tree.scores.data() + 1, tree.scores.size() - 1, N - 1, order);
  std::vector<int64_t> node_of(tree.tokens.size(), 0);
  memset(ancestors, 0, N * N);
  for (int64_t node = 0; node < N; node++) {
    const int64_t candidate = node ? order[node - 1] + 1 : 0;
    node_of[candidate] = node;
    tokens[node] = tree.tokens[candidate];
    parents[node] = node_of[tree.parents[candidate]];
    depth[node] = tree.depths[candidate];
    drafts.scores[sequence * N + node] = tree.scores[candidate];
    if (node) {
      memcpy(paths + node * length, paths + parents[node] * length, length * sizeof(int64_t));
      memcpy(ancestors + node * N, ancestors + parents[node] * N, N);
    }
    for (int64_t at = depth[node]; at < length; at++) paths[node * length + at] = node;
    ancestors[node * N + node] = true;
  }
}

extern "C" {

void firp_children(const Coupling* coupling, const Nodes* asked, int threads) {
  const Nodes& a = *asked;
  const int64_t d = coupling->size;
  std::vector<Candidates> steps;
  std::vector<Node> nodes;
  for (int64_t sequence = 0; sequence < a.batch; sequence++) {
    steps.push_back({a.tokens + sequence * a.tokens_stride, a.context + sequence * a.context_stride,
                     a.first[sequence * a.first_stride], sequence * a.nodes, a.nodes});
    for (int64_t f = 0; f < a.nodes; f++) {
      const float* above = a.previous + sequence * a.previous_stride + f * a.previous_row_stride;
      nodes.push_back({a.embedded + (sequence * a.nodes + f) * d, a.previous ? above : nullptr, sequence});
    }
  }
  expand(*coupling, steps, nodes, a.candidates, a.count, a.children, a.scores, a.adjusted, threads);
}

// The trees of N nodes, as decoding/tree_build.py builds them level by level.
void firp_tree(const Coupling* coupling, const Drafts* given, int threads) {
  const Drafts& a = *given;
  const int64_t d = coupling->size, limit = a.nodes - 1;
  std::vector<Growing> trees(a.batch);
  for (int64_t sequence = 0; sequence < a.batch; sequence++)
    trees[sequence] = {{a.root[sequence]}, {0}, {0}, {0.0f}, {0}, {0}};
  static thread_local std::vector<float> adjusted[2], scores;
  static thread_local std::vector<int64_t> children;
  std::vector<Candidates> steps;
  std::vector<Node> nodes;
  for (int64_t depth = 1; depth <= a.steps; depth++) {
    steps.clear(), nodes.clear();
    const float* above = adjusted[(depth + 1) % 2].data();
    for (int64_t sequence = 0; sequence < a.batch; sequence++) {
      const Growing& tree = trees[sequence];
      const int64_t from = nodes.size();
      for (size_t f = 0; f < tree.frontier.size(); f++)
        nodes.push_back({a.embedding + tree.tokens[tree.frontier[f]] * d,
                         depth > 1 ? above + tree.rows[f] * d : nullptr, sequence});
      steps.push_back({a.tokens + sequence * a.tokens_stride + (depth - 1) * a.tokens_step,
                       a.context + sequence * a.context_stride + (depth - 1) * a.context_step,
                       a.log_probs[sequence * a.log_probs_stride + (depth - 1) * a.log_probs_step], from,
                       (int64_t)nodes.size() - from});
    }
    if (nodes.empty()) break;
    std::vector<float>& own = adjusted[depth % 2];
    grow(own, nodes.size() * d), grow(scores, nodes.size() * limit);
    if (children.size() < nodes.size() * limit) children.resize(nodes.size() * limit);
    expand(*coupling, steps, nodes, a.candidates, limit, children.data(), scores.data(), own.data(), threads);
    for (int64_t sequence = 0; sequence < a.batch; sequence++) {
      if (trees[sequence].frontier.empty()) continue;
      trees[sequence].extend(children.data(), scores.data(), steps[sequence].from, limit, depth);
      trees[sequence].prune(limit);
    }
  }
  for (int64_t sequence = 0; sequence < a.batch; sequence++) write_tree(trees[sequence], a, sequence);
}
}
