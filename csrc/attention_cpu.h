// Attention of packed rows: groups of a prompt and its completions lie one after the other, a completion sees its prompt and
// itself. Nothing is padded and no mask is read.
//
// As in the head, lanes are queries and a tile's rows are keys: the largest score, the mass and the gradients of a query are
// taken lane by lane, and weights leave the scores in the form in which the products with V, K and dO read them.
#pragma once

#include <cmath>
#include <limits>
#include <utility>

#include "gemm.h"

namespace bpo {

// [M, heads, S, D] floats whose D are neighbors.
struct Heads {
  float* data;
  int64_t row, head, token;  // strides

  float* at(int64_t m, int64_t h, int64_t t) const { return data + m * row + h * head + t * token; }
};

struct PackedAttention {
  Heads q, k, v;
  int64_t num_rows, num_heads, num_kv_heads, num_tokens, width;
  const int32_t* bounds;  // of the sequences among the tokens of a row
  const int32_t* firsts;  // each group's first sequence, its prompt; the number of sequences at the end
  int64_t num_groups;
  float scale, softcap;  // 0: none
  int64_t window;        // 0: none

  int64_t num_tasks() const { return num_rows * num_groups * num_kv_heads; }
  int64_t repeats() const { return num_heads / num_kv_heads; }
  int64_t padded() const { return round_up(width, kRows); }  // D as rows of tiles
  int64_t paneled() const { return round_up(width, kPanel); }  // D as lanes
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t g = 0; g < num_groups; ++g) most = std::max<int64_t>(most, bounds[firsts[g + 1]] - bounds[firsts[g]]);
    return round_up(most, kRows);
  }
};

// A group under one head of keys and values; tokens count from the group's first.
struct PromptGroup {
  int64_t m, kv_head, first, end;  // sequences [first, end), the prompt first
  int64_t begin, count, prompt;    // its first token in the row, its tokens, those of its prompt

  PromptGroup(const PackedAttention& a, int64_t task) {
    kv_head = task % a.num_kv_heads;
    const int64_t g = task / a.num_kv_heads % a.num_groups;
    m = task / a.num_kv_heads / a.num_groups;
    first = a.firsts[g];
    end = a.firsts[g + 1];
    begin = a.bounds[first];
    count = a.bounds[end] - begin;
    prompt = a.bounds[first + 1] - begin;
  }
  int64_t padded() const { return round_up(count, kRows); }
};

// Queries [from, from + lanes) of a sequence that begins at `own` and sees the first `shared` keys before it.
struct Queries {
  int64_t from, lanes, own, shared;
  int64_t begin[2], end[2];  // blocks of kRows keys that some query sees: of what is shared, then of the sequence itself

  Queries(const PackedAttention& a, int64_t from, int64_t lanes, int64_t own, int64_t shared)
      : from(from), lanes(lanes), own(own), shared(shared) {
    const int64_t back = a.window ? a.window - 1 : std::numeric_limits<int32_t>::max();
    const int64_t first_shared = std::max<int64_t>(0, position(0) - back), first_own = std::max(own, from - back);
    begin[0] = end[0] = 0;
    if (first_shared < shared) begin[0] = first_shared / kRows, end[0] = (shared + kRows - 1) / kRows;
    begin[1] = std::max(first_own / kRows, end[0]);
    end[1] = std::max(begin[1], (from + lanes + kRows - 1) / kRows);
  }
  int64_t position(int64_t lane) const { return shared + from + lane - own; }
  int64_t num_keys() const { return (end[0] - begin[0] + end[1] - begin[1]) * kRows; }

  // The lanes [low, high) that see a key.
  std::pair<int64_t, int64_t> seeing(const PackedAttention& a, int64_t key) const {
    if (key >= shared && (key < own || key >= from + lanes)) return {0, 0};
    const int64_t low = key < shared ? 0 : key - from;
    const int64_t distance = key < shared ? position(0) - key : from - key;  // of lane 0
    return {low, a.window ? a.window - distance : lanes};
  }

  // Whether all queries see all keys of a block.
  bool all_seen(const PackedAttention& a, int64_t block) const {
    const int64_t first = block * kRows, last = first + kRows - 1;
    return (last < shared || (first >= own && last <= from)) && seeing(a, first).second >= lanes;
  }

  // Calls f(block, its place among those that are seen).
  template <class F>
  void each_block(const F& f) const {
    int64_t place = 0;
    for (int part = 0; part < 2; ++part)
      for (int64_t block = begin[part]; block < end[part]; ++block) f(block, place++);
  }
};

// Calls f(queries) for all panels of queries of a group.
template <class F>
void each_panel(const PackedAttention& a, const PromptGroup& g, const F& f) {
  for (int64_t s = g.first; s < g.end; ++s) {
    const int64_t own = a.bounds[s] - g.begin, end = a.bounds[s + 1] - g.begin;
    for (int64_t from = own; from < end; from += kPanel)
      f(Queries(a, from, std::min<int64_t>(kPanel, end - from), own, s == g.first ? 0 : g.prompt));
  }
}

// Keys or values of a group -> [blocks][D][kRows]: the left operand of products along D.
inline void pack_heads_along(const PackedAttention& a, const PromptGroup& g, const Heads& heads, float* out) {
  for (int64_t t = 0; t < g.count; t += kRows, out += a.width * kRows)
    pack_left(heads.at(g.m, g.kv_head, g.begin + t), heads.token, static_cast<int>(std::min<int64_t>(kRows, g.count - t)),
              a.width, out);
}

// The same -> [D / kRows][keys][kRows]: the left operand of products along the keys.
inline void pack_heads_across(const PackedAttention& a, const PromptGroup& g, const Heads& heads, float* out) {
  for (int64_t d = 0; d < a.padded(); d += kRows) {
    const int64_t count = std::min<int64_t>(kRows, a.width - d);
    for (int64_t t = 0; t < g.padded(); ++t, out += kRows) {
      const int64_t copied = t < g.count ? count : 0;
      if (copied) std::copy_n(heads.at(g.m, g.kv_head, g.begin + t) + d, copied, out);
      std::fill(out + copied, out + kRows, 0.0f);
    }
  }
}

// [rows][columns], `stride` apart -> its transpose, `apart`.
inline void transpose(const float* src, int64_t stride, int64_t rows, int64_t columns, float* dst, int64_t apart) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) transpose4(src + i * stride + j, stride, dst + j * apart + i, apart);
    for (; j < columns; ++j)
      for (int64_t k = i; k < i + 4; ++k) dst[j * apart + k] = src[k * stride + j];
  }
  for (; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) dst[j * apart + i] = src[i * stride + j];
}

// Rows of queries -> [D][kPanel], the right operand along D; lanes past the end are zero.
inline void pack_lanes(const float* src, int64_t stride, int64_t lanes, int64_t width, float* out) {
  if (lanes < kPanel) std::fill_n(out, width * kPanel, 0.0f);
  transpose(src, stride, lanes, width, out, kPanel);
}

// The same -> [D / kPanel][kPanel queries][kPanel], the right operand along queries.
inline void pack_rows(const float* src, int64_t stride, int64_t lanes, int64_t width, float factor, float* out) {
  for (int64_t d = 0; d < width; d += kPanel)
    for (int64_t i = 0; i < kPanel; ++i, out += kPanel) {
      const int64_t count = i < lanes ? std::min<int64_t>(kPanel, width - d) : 0;
      for (int64_t j = 0; j < count; ++j) out[j] = src[i * stride + d + j] * factor;
      std::fill(out + count, out + kPanel, 0.0f);
    }
}

// [D][kPanel] times a factor a lane.
inline void scale_lanes(float* panel, int64_t width, const Vec (&factor)[2]) {
  for (int64_t d = 0; d < width; ++d, panel += kPanel) {
    store(panel, load(panel) * factor[0]);
    store(panel + kLanes, load(panel + kLanes) * factor[1]);
  }
}

// Scores of a block of keys, capped, -inf where a query does not see a key: [kRows][kPanel].
inline void score_block(const PackedAttention& a, const Queries& queries, int64_t block, const float* keys,
                        const float* lanes, float* scores) {
  tile<Floats>(keys + block * a.width * kRows, lanes, a.width, scores, kPanel, false);
  if (a.softcap != 0.0f)
    for (int64_t at = 0; at < kRows * kPanel; at += kLanes) store(scores + at, capped(load(scores + at), a.softcap));
  if (queries.all_seen(a, block)) return;
  IVec lane[2];
  for (int i = 0; i < kPanel; ++i)
    lane[i / kLanes][i % kLanes] = static_cast<int32_t>(std::min<int64_t>(i, queries.lanes - 1));
  for (int r = 0; r < kRows; ++r) {
    float* row = scores + r * kPanel;
    const auto [low, high] = queries.seeing(a, block * kRows + r);
    for (int half = 0; half < 2; ++half) {
      const IVec hidden = (lane[half] < static_cast<int32_t>(low)) | (lane[half] >= static_cast<int32_t>(high));
      const Vec score = load(row + half * kLanes);
      store(row + half * kLanes, hidden ? splat(-std::numeric_limits<float>::infinity()) : score);
    }
  }
}

// [D][kPanel] = across @ weights, over the keys that the queries see.
inline void sum_over_keys(const PackedAttention& a, const PromptGroup& g, const Queries& queries, const float* across,
                          const float* weights, float* out) {
  const int64_t depth[2] = {(queries.end[0] - queries.begin[0]) * kRows, (queries.end[1] - queries.begin[1]) * kRows};
  for (int64_t d = 0; d < a.padded(); d += kRows, across += g.padded() * kRows, out += kRows * kPanel) {
    tile<Floats>(across + queries.begin[0] * kRows * kRows, weights, depth[0], out, kPanel, false);
    tile<Floats>(across + queries.begin[1] * kRows * kRows, weights + depth[0] * kPanel, depth[1], out, kPanel, true);
  }
}

// out [keys][D] += weights @ rows, for the keys that the queries see.
inline void add_to_keys(const PackedAttention& a, const Queries& queries, const float* weights, const float* rows, float* out) {
  for (int64_t d = 0; d < a.paneled(); d += kPanel, rows += kPanel * kPanel)
    queries.each_block([&](int64_t block, int64_t place) {
      const float* part = weights + place * kRows * kPanel;
      tile_of_parts<Floats, kPanel>(&part, 1, 0, rows, out + block * kRows * a.paneled() + d, a.paneled(), true);
    });
}

// Outputs [M, heads, S, D] of the tasks [begin, end); each query's largest score and the inverse of its mass above that, which
// give weights without the rounding of one large logarithm: twice [M, heads, S].
inline void attend(const PackedAttention& a, int64_t begin, int64_t end, const Heads& out, float* tops, float* inverses) {
  const int64_t keys = a.longest();
  const Vec scale[2] = {splat(a.scale), splat(a.scale)};
  const auto along = make_buffer(keys * a.width), across = make_buffer(keys * a.padded());
  const auto lanes = make_buffer(a.width * kPanel), weights = make_buffer((keys + kRows) * kPanel);
  const auto sums = make_buffer(a.padded() * kPanel);
  for (int64_t task = begin; task < end; ++task) {
    const PromptGroup g(a, task);
    pack_heads_along(a, g, a.k, along.get());
    pack_heads_across(a, g, a.v, across.get());
    for (int64_t h = g.kv_head * a.repeats(); h < (g.kv_head + 1) * a.repeats(); ++h)
      each_panel(a, g, [&](const Queries& queries) {
        const int64_t token = g.begin + queries.from;
        pack_lanes(a.q.at(g.m, h, token), a.q.token, queries.lanes, a.width, lanes.get());
        scale_lanes(lanes.get(), a.width, scale);
        Vec top[2] = {splat(-std::numeric_limits<float>::infinity()), splat(-std::numeric_limits<float>::infinity())};
        queries.each_block([&](int64_t block, int64_t place) {
          float* scores = weights.get() + place * kRows * kPanel;
          score_block(a, queries, block, along.get(), lanes.get(), scores);
          for (int r = 0; r < kRows; ++r)
            for (int half = 0; half < 2; ++half) {
              const Vec score = load(scores + r * kPanel + half * kLanes);
              top[half] = score > top[half] ? score : top[half];
            }
        });
        Vec mass[2] = {};
        for (float* row = weights.get(); row < weights.get() + queries.num_keys() * kPanel; row += kPanel)
          for (int half = 0; half < 2; ++half) {
            const Vec weight = exp(load(row + half * kLanes) - top[half]);
            mass[half] += weight;
            store(row + half * kLanes, weight);
          }
        sum_over_keys(a, g, queries, across.get(), weights.get(), sums.get());
        const Vec factor[2] = {1.0f / mass[0], 1.0f / mass[1]};
        scale_lanes(sums.get(), a.width, factor);
        transpose(sums.get(), kPanel, a.width, queries.lanes, out.at(g.m, h, token), out.token);
        const int64_t at = (g.m * a.num_heads + h) * a.num_tokens + token;
        for (int64_t i = 0; i < queries.lanes; ++i) {
          tops[at + i] = top[i / kLanes][i % kLanes];
          inverses[at + i] = factor[i / kLanes][i % kLanes];
        }
      });
  }
}

// dQ, dK and dV of the tasks [begin, end).
inline void attend_backward(const PackedAttention& a, int64_t begin, int64_t end, const Heads& out, const float* tops,
                            const float* inverses, const Heads& dout, const Heads& dq, const Heads& dk, const Heads& dv) {
  const int64_t keys = a.longest(), stride = a.paneled();
  const Vec scale[2] = {splat(a.scale), splat(a.scale)};
  const auto k_along = make_buffer(keys * a.width), v_along = make_buffer(keys * a.width);
  const auto k_across = make_buffer(keys * a.padded());
  const auto lanes = make_buffer(a.width * kPanel), dout_lanes = make_buffer(a.width * kPanel);
  const auto rows = make_buffer(stride * kPanel), dout_rows = make_buffer(stride * kPanel);
  // a tile of parts asks for what lies behind it
  const auto weights = make_buffer((keys + 2 * kRows) * kPanel), slopes = make_buffer((keys + 2 * kRows) * kPanel);
  const auto sums = make_buffer(a.padded() * kPanel), k_sums = make_buffer(keys * stride), v_sums = make_buffer(keys * stride);
  for (int64_t task = begin; task < end; ++task) {
    const PromptGroup g(a, task);
    pack_heads_along(a, g, a.k, k_along.get());
    pack_heads_along(a, g, a.v, v_along.get());
    pack_heads_across(a, g, a.k, k_across.get());
    std::fill_n(k_sums.get(), g.padded() * stride, 0.0f);
    std::fill_n(v_sums.get(), g.padded() * stride, 0.0f);
    for (int64_t h = g.kv_head * a.repeats(); h < (g.kv_head + 1) * a.repeats(); ++h)
      each_panel(a, g, [&](const Queries& queries) {
        const int64_t token = g.begin + queries.from;
        const float *q = a.q.at(g.m, h, token), *slope = dout.at(g.m, h, token), *value = out.at(g.m, h, token);
        pack_lanes(q, a.q.token, queries.lanes, a.width, lanes.get());
        scale_lanes(lanes.get(), a.width, scale);
        pack_rows(q, a.q.token, queries.lanes, a.width, a.scale, rows.get());
        pack_lanes(slope, dout.token, queries.lanes, a.width, dout_lanes.get());
        pack_rows(slope, dout.token, queries.lanes, a.width, 1.0f, dout_rows.get());
        float top[kPanel] = {}, inverse[kPanel] = {}, mean[kPanel] = {};
        const int64_t first = (g.m * a.num_heads + h) * a.num_tokens + token;
        std::copy_n(tops + first, queries.lanes, top);
        std::copy_n(inverses + first, queries.lanes, inverse);
        for (int64_t i = 0; i < queries.lanes; ++i)
          for (int64_t d = 0; d < a.width; ++d) mean[i] += slope[i * dout.token + d] * value[i * out.token + d];
        queries.each_block([&](int64_t block, int64_t place) {
          float *weight = weights.get() + place * kRows * kPanel, *change = slopes.get() + place * kRows * kPanel;
          score_block(a, queries, block, k_along.get(), lanes.get(), weight);
          tile<Floats>(v_along.get() + block * a.width * kRows, dout_lanes.get(), a.width, change, kPanel, false);
          for (int64_t at = 0; at < kRows * kPanel; at += kLanes) {
            const Vec score = load(weight + at), p = exp(score - load(top + at % kPanel)) * load(inverse + at % kPanel);
            Vec ds = p * (load(change + at) - load(mean + at % kPanel));
            if (a.softcap != 0.0f) {
              const Vec share = score * (1.0f / a.softcap);
              ds = p > 0.0f ? ds * (1.0f - share * share) : Vec{};  // hidden ones are infinite
            }
            store(weight + at, p);
            store(change + at, ds);
          }
        });
        sum_over_keys(a, g, queries, k_across.get(), slopes.get(), sums.get());
        scale_lanes(sums.get(), a.width, scale);
        transpose(sums.get(), kPanel, a.width, queries.lanes, dq.at(g.m, h, token), dq.token);
        add_to_keys(a, queries, slopes.get(), rows.get(), k_sums.get());
        add_to_keys(a, queries, weights.get(), dout_rows.get(), v_sums.get());
      });
    for (int64_t t = 0; t < g.count; ++t) {
      std::copy_n(k_sums.get() + t * stride, a.width, dk.at(g.m, g.kv_head, g.begin + t));
      std::copy_n(v_sums.get() + t * stride, a.width, dv.at(g.m, g.kv_head, g.begin + t));
    }
  }
}

// One new token of each row, which sees the prompt that it shares with other rows and what was written behind it.
struct DecodedRows {
  Heads q, out;                // [B, heads, 1, D]
  Heads prompt_k, prompt_v;    // [1, key-value heads, S, D]
  Heads k, v;                  // [B, key-value heads, N, D], the new token's the last
  int64_t num_heads, num_kv_heads, num_written, width;
  const int32_t* bounds;       // of the prompts among the S
  const int64_t *rows, *firsts;  // rows in the order of their prompts, and each prompt's first among them
  float scale, softcap;        // 0: none

  int64_t repeats() const { return num_heads / num_kv_heads; }
};

template <int n>
struct Lanes {
  typedef float Type __attribute__((vector_size(n * sizeof(float))));
};

template <int n = kLanes>
float total(typename Lanes<n>::Type v) {
  if constexpr (n == 2) {
    return v[0] + v[1];
  } else {
    typename Lanes<n / 2>::Type low, high;
    std::memcpy(&low, &v, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return total<n / 2>(low + high);
  }
}

inline Vec load_some(const float* p, int64_t count) {
  float some[kLanes] = {};
  std::copy_n(p, count, some);
  return load(some);
}

// Dot products of a query, padded with zeros, and `count` keys.
inline void dot_keys(const float* query, const float* keys, int64_t stride, int64_t count, int64_t width, float* out) {
  for (int64_t j = 0; j < count; ++j, keys += stride) {
    Vec sum = {};
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) sum += load(query + d) * load(keys + d);
    if (d < width) sum += load(query + d) * load_some(keys + d, width - d);
    out[j] = total(sum);
  }
}

// out, padded, += the sum of `count` values times their weights.
inline void add_values(const float* weights, const float* values, int64_t stride, int64_t count, int64_t width, float* out) {
  constexpr int64_t kTogether = 4 * kLanes;
  int64_t d = 0;
  for (; d + kTogether <= width; d += kTogether) {
    Vec sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = load(out + d + i * kLanes);
    for (int64_t j = 0; j < count; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sums[i] += load(values + j * stride + d + i * kLanes) * weights[j];
    for (int i = 0; i < 4; ++i) store(out + d + i * kLanes, sums[i]);
  }
  for (; d < width; d += kLanes) {
    const int64_t some = std::min<int64_t>(kLanes, width - d);
    Vec sum = load(out + d);
    for (int64_t j = 0; j < count; ++j) sum += load_some(values + j * stride + d, some) * weights[j];
    store(out + d, sum);
  }
}

// Outputs of the tasks [begin, end): a prompt under one head of keys and values, which its rows take from cache. A row's
// numbers do not depend on the rows that share its prompt.
inline void attend_decoded(const DecodedRows& a, int64_t begin, int64_t end, int64_t longest) {
  const int64_t room = round_up(longest + a.num_written, kLanes), padded = round_up(a.width, kLanes);
  const auto query = make_buffer(padded), sums = make_buffer(padded), weights = make_buffer(room);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t prompt = task / a.num_kv_heads, kv = task % a.num_kv_heads, first = a.bounds[prompt];
    const int64_t shared = a.bounds[prompt + 1] - first, keys = shared + a.num_written;
    for (int64_t place = a.firsts[prompt]; place < a.firsts[prompt + 1]; ++place)
      for (int64_t head = kv * a.repeats(); head < (kv + 1) * a.repeats(); ++head) {
        const int64_t row = a.rows[place];
        float* w = weights.get();
        std::fill_n(query.get(), padded, 0.0f);
        for (int64_t d = 0; d < a.width; ++d) query[d] = a.q.at(row, head, 0)[d] * a.scale;
        dot_keys(query.get(), a.prompt_k.at(0, kv, first), a.prompt_k.token, shared, a.width, w);
        dot_keys(query.get(), a.k.at(row, kv, 0), a.k.token, a.num_written, a.width, w + shared);
        if (a.softcap != 0.0f)
          for (int64_t j = 0; j < keys; j += kLanes) store(w + j, capped(load(w + j), a.softcap));
        std::fill(w + keys, w + round_up(keys, kLanes), -std::numeric_limits<float>::infinity());
        const float top = *std::max_element(w, w + keys);
        Vec mass = {};
        for (int64_t j = 0; j < keys; j += kLanes) {
          const Vec weight = exp(load(w + j) - top);
          mass += weight;
          store(w + j, weight);
        }
        std::fill_n(sums.get(), padded, 0.0f);
        add_values(w, a.prompt_v.at(0, kv, first), a.prompt_v.token, shared, a.width, sums.get());
        add_values(w + shared, a.v.at(row, kv, 0), a.v.token, a.num_written, a.width, sums.get());
        const float factor = 1.0f / total(mass);
        for (int64_t d = 0; d < a.width; ++d) a.out.at(row, head, 0)[d] = sums[d] * factor;
      }
  }
}

}  // namespace bpo
