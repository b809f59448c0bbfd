// A decoder layer in two parts. Letters beside those of cpu_products.h: D head size, S key/value slots in view.

#pragma once

#include "cpu_products.h"

constexpr int MOST_HEAD = 512;  // values of a head

extern "C" {
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

// Scores (S, LANES) of S slots' keys for the queries of a lane each, from `turned` (D, LANES). Lanes are queries, so that
// no sum runs across a vector.
static void score_slots(const float* turned, const float* keys, int64_t row, int64_t slots, int64_t D, float* scores) {
  constexpr int TOGETHER = 8;  // slots; their sums do not wait for each other
  int64_t slot = 0;
  for (; slot + TOGETHER <= slots; slot += TOGETHER) {
    vec sums[TOGETHER] = {};
    for (int64_t at = 0; at < D; at++) {
      const vec values = load(turned + at * LANES);
      for (int s = 0; s < TOGETHER; s++) sums[s] += keys[(slot + s) * row + at] * values;
    }
    for (int s = 0; s < TOGETHER; s++) store(scores + (slot + s) * LANES, sums[s]);
  }
  for (; slot < slots; slot++) {
    vec sum = {};
    for (int64_t at = 0; at < D; at++) sum += keys[slot * row + at] * load(turned + at * LANES);
    store(scores + slot * LANES, sum);
  }
}

// Add a row's mask (S,) to the scores of query q. Most of it is 0.
static void add_mask(const float* mask, int64_t slots, int q, float* scores) {
  int64_t last = slots - slots % LANES;
  for (; last; last -= LANES) {
    const ints some = load(mask + last - LANES) != 0.0f;
    int32_t any = 0;
    for (int lane = 0; lane < LANES; lane++) any |= some[lane];
    if (any) break;
  }
  for (int64_t slot = 0; slot < last; slot++) scores[slot * LANES + q] += mask[slot];
  for (int64_t slot = slots - slots % LANES; slot < slots; slot++) scores[slot * LANES + q] += mask[slot];
}

// Attention of up to LANES queries (D,), scaled beforehand, over S slots. `work`: (S + D, LANES). VECTORS: D / LANES
// where it is a constant without remainder, else 0.
template <int VECTORS>
static void attend(const float* const* queries, const float* const* masks, int count, const float* keys,
                   const float* values, int64_t row, int64_t slots, int64_t D, float* work, float* const* outputs) {
  constexpr int TOGETHER = VECTORS ? std::max(2, REGISTERS / 2 / std::max(VECTORS, 1)) : 2;  // queries
  const int vectors = VECTORS ? VECTORS : D / LANES;
  const int64_t rest = VECTORS ? D : vectors * LANES;
  float *scores = work, *turned = work + slots * LANES;
  for (int64_t at = 0; at < D; at++)
    for (int q = 0; q < LANES; q++) turned[at * LANES + q] = q < count ? queries[q][at] : 0.0f;
  score_slots(turned, keys, row, slots, D, scores);
  for (int q = 0; q < count; q++)
    if (masks[q]) add_mask(masks[q], slots, q, scores);
  vec most = load(scores), total = {};
  for (int64_t slot = 1; slot < slots; slot++) {
    const vec score = load(scores + slot * LANES);
    most = score > most ? score : most;
  }
  for (int64_t slot = 0; slot < slots; slot++) {
    const vec share = exponential(load(scores + slot * LANES) - most);
    store(scores + slot * LANES, share);
    total += share;
  }
  for (int q = 0; q < count; q += TOGETHER) {
    int own[TOGETHER];
    for (int at = 0; at < TOGETHER; at++) own[at] = std::min(q + at, count - 1);
    vec sums[TOGETHER][VECTORS ? VECTORS : MOST_HEAD / LANES] = {};
    for (int64_t slot = 0; slot < slots; slot++)
      for (int v = 0; v < vectors; v++) {
        const vec value = load(values + slot * row + v * LANES);
        for (int at = 0; at < TOGETHER; at++) sums[at][v] += scores[slot * LANES + own[at]] * value;
      }
    for (int at = 0; at < TOGETHER && q + at < count; at++) {
      for (int v = 0; v < vectors; v++) store(outputs[q + at] + v * LANES, sums[at][v] / total[q + at]);
      for (int64_t place = rest; place < D; place++) {
        float sum = 0;
        for (int64_t slot = 0; slot < slots; slot++) sum += scores[slot * LANES + q + at] * values[slot * row + place];
        outputs[q + at][place] = sum / total[q + at];
      }
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
};

extern "C" {

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
  const int64_t all = s.rows * group, chunks = (all + LANES - 1) / LANES;
  const auto attend_chunk = attention_of(D);
  space.fit(layer, M);
  float *normed = space.normed.data(), *gated = space.wide.data(), *attended = space.attended.data();
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    static thread_local std::vector<float> scores;
    grow(scores, LANES * (s.slots + D));
    for (int64_t item = thread; item < s.batch * layer.key_heads * chunks; item += team) {
      const int64_t sequence = item / chunks / layer.key_heads, head = item / chunks % layer.key_heads;
      const int64_t first = item % chunks * LANES;
      const int count = std::min<int64_t>(LANES, all - first);
      const float *queries[LANES], *masks[LANES];
      float* outputs[LANES];
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
