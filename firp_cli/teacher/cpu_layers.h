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

// Attention of up to SHARED queries (D,), scaled beforehand, over S slots. VECTORS: D / LANES where it is a constant
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
  float totals[SHARED];
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
  const int64_t all = s.rows * group, chunks = (all + SHARED - 1) / SHARED;
  const auto attend_chunk = attention_of(D);
  space.fit(layer, M);
  float *normed = space.normed.data(), *gated = space.wide.data(), *attended = space.attended.data();
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    static thread_local std::vector<float> scores;
    grow(scores, SHARED * (s.slots + LANES));
    for (int64_t item = thread; item < s.batch * layer.key_heads * chunks; item += team) {
      const int64_t sequence = item / chunks / layer.key_heads, head = item / chunks % layer.key_heads;
      const int64_t first = item % chunks * SHARED;
      const int count = std::min<int64_t>(SHARED, all - first);
      const float *queries[SHARED], *masks[SHARED];
      float* outputs[SHARED];
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
