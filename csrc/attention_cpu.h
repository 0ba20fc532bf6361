// Attention of packed rows: groups of a prompt and its completions lie one after the other, a completion sees its prompt and
// itself. Nothing is padded and no mask is read. Tensors are float or bfloat16; what is between them is float, but for the words
// that products read.
//
// As in the head, lanes are queries and a tile's rows are keys: the largest score, the mass and the gradients of a query are
// taken lane by lane, and weights leave the scores in the form in which the products with V, K and dO read them.
#pragma once

#include <cmath>
#include <limits>
#include <utility>

#include "gemm.h"

namespace bpo {

// [M, heads, S, D] numbers whose D are neighbors.
template <class T>
struct Heads {
  T* data;
  int64_t row, head, token;  // strides

  T* at(int64_t m, int64_t h, int64_t t) const { return data + m * row + h * head + t * token; }
};

template <class O, class T>
struct PackedAttention {
  using Op = O;
  using Number = T;
  using Word = typename Op::Word;
  static constexpr int64_t kPack = Op::kPack;
  static constexpr bool kScaled = kPack == 1;  // operands take the scale; in bfloat16 it would round them anew, and results do
  static_assert(kRows % kPack == 0);

  Heads<T> q, k, v;
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
  int64_t words() const { return (width + kPack - 1) / kPack; }  // of D
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

  template <class A>
  PromptGroup(const A& a, int64_t task) {
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

  template <class A>
  Queries(const A& a, int64_t from, int64_t lanes, int64_t own, int64_t shared)
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
  template <class A>
  std::pair<int64_t, int64_t> seeing(const A& a, int64_t key) const {
    if (key >= shared && (key < own || key >= from + lanes)) return {0, 0};
    const int64_t low = key < shared ? 0 : key - from;
    const int64_t distance = key < shared ? position(0) - key : from - key;  // of lane 0
    return {low, a.window ? a.window - distance : lanes};
  }

  // Whether all queries see all keys of a block.
  template <class A>
  bool all_seen(const A& a, int64_t block) const {
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
template <class A, class F>
void each_panel(const A& a, const PromptGroup& g, const F& f) {
  for (int64_t s = g.first; s < g.end; ++s) {
    const int64_t own = a.bounds[s] - g.begin, end = a.bounds[s + 1] - g.begin;
    for (int64_t from = own; from < end; from += kPanel)
      f(Queries(a, from, std::min<int64_t>(kPanel, end - from), own, s == g.first ? 0 : g.prompt));
  }
}

// Keys or values of a group -> [blocks][words of D][kRows]: the left operand of products along D. `room` is scratch of kPanel
// rows of words.
template <class A>
void pack_heads_along(const A& a, const PromptGroup& g, const Heads<typename A::Number>& heads, typename A::Word* room,
                      typename A::Word* out) {
  pack_along<typename A::Op>(heads.at(g.m, g.kv_head, g.begin), heads.token, g.count, a.width, room, out);
}

// The same -> [D / kRows][words of keys][kRows]: the left operand of products along the keys.
template <class A>
void pack_heads_across(const A& a, const PromptGroup& g, const Heads<typename A::Number>& heads, typename A::Word* out) {
  using Op = typename A::Op;
  using T = typename A::Number;
  static const T kZeros[kRows] = {};
  for (int64_t d = 0; d < a.padded(); d += kRows) {
    const int64_t count = std::min<int64_t>(kRows, a.width - d);
    for (int64_t t = 0; t < g.padded(); t += A::kPack, out += kRows) {
      const auto key = [&](int64_t u) { return u < g.count ? heads.at(g.m, g.kv_head, g.begin + u) + d : kZeros; };
      const T *first = key(t), *second = key(t + A::kPack - 1);
      for (int64_t i = 0; i < count; ++i) out[i] = Op::word(first[i], second[i]);
      std::fill(out + count, out + kRows, typename A::Word{});
    }
  }
}

// Rows of queries -> [words of D][kPanel], the right operand along D; lanes past the end are zero. `room` is scratch of kPanel
// rows of words.
template <class A>
void pack_lanes(const A& a, const typename A::Number* src, int64_t stride, int64_t lanes, typename A::Word* room,
                typename A::Word* out) {
  if (lanes < kPanel) std::fill_n(out, a.words() * kPanel, typename A::Word{});
  const auto words = word_rows<typename A::Op>(src, stride, lanes, a.width, room);
  transpose(words.data, words.stride, lanes, a.words(), out, kPanel);
}

// The same, times a factor if operands take the scale -> [D / kPanel][words of kPanel queries][kPanel], the right operand along
// queries.
template <class A>
void pack_rows(const A& a, const typename A::Number* src, int64_t stride, int64_t lanes, float factor, typename A::Word* out) {
  using Op = typename A::Op;
  using T = typename A::Number;
  static const T kZeros[kPanel] = {};
  for (int64_t d = 0; d < a.width; d += kPanel)
    for (int64_t i = 0; i < kPanel; i += A::kPack, out += kPanel) {
      const int64_t count = i < lanes ? std::min<int64_t>(kPanel, a.width - d) : 0;
      const auto query = [&](int64_t lane) { return lane < lanes ? src + lane * stride + d : kZeros; };
      const T *first = query(i), *second = query(i + A::kPack - 1);
      for (int64_t j = 0; j < count; ++j)
        out[j] = A::kScaled ? Op::word(to_float(first[j]) * factor, 0.0f) : Op::word(first[j], second[j]);
      std::fill(out + count, out + kPanel, typename A::Word{});
    }
}

// A row of floats in the type of a tensor.
template <class T>
void round_row(const float* src, int64_t width, T* out) {
  for (int64_t d = 0; d < width; d += kLanes) {
    const int64_t some = std::min<int64_t>(kLanes, width - d);
    store_some(out + d, load_some(src + d, some), some);
  }
}

// Sums [D][kPanel] of queries -> their rows. `room` is scratch of kPanel x D floats.
template <class T>
void unpack_lanes(const float* sums, int64_t lanes, int64_t width, float* room, T* out, int64_t stride) {
  if constexpr (std::is_same_v<T, float>) {
    transpose(sums, kPanel, width, lanes, out, stride);
  } else {
    transpose(sums, kPanel, width, lanes, room, width);
    for (int64_t i = 0; i < lanes; ++i) round_row(room + i * width, width, out + i * stride);
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
template <class A>
void score_block(const A& a, const Queries& queries, int64_t block, const typename A::Word* keys, const typename A::Word* lanes,
                 float* scores) {
  tile<typename A::Op>(keys + block * a.words() * kRows, lanes, a.words(), scores, kPanel, false);
  if constexpr (!A::kScaled)
    for (int64_t at = 0; at < kRows * kPanel; at += kLanes) store(scores + at, load(scores + at) * a.scale);
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
template <class A>
void sum_over_keys(const A& a, const PromptGroup& g, const Queries& queries, const typename A::Word* across,
                   const typename A::Word* weights, float* out) {
  constexpr int64_t kBlock = kRows / A::kPack;  // words of a block of keys
  const int64_t depth[2] = {(queries.end[0] - queries.begin[0]) * kBlock, (queries.end[1] - queries.begin[1]) * kBlock};
  for (int64_t d = 0; d < a.padded(); d += kRows, across += g.padded() / A::kPack * kRows, out += kRows * kPanel) {
    tile<typename A::Op>(across + queries.begin[0] * kBlock * kRows, weights, depth[0], out, kPanel, false);
    tile<typename A::Op>(across + queries.begin[1] * kBlock * kRows, weights + depth[0] * kPanel, depth[1], out, kPanel, true);
  }
}

// out [keys][D] += weights @ rows, for the keys that the queries see.
template <class A>
void add_to_keys(const A& a, const Queries& queries, const typename A::Word* weights, const typename A::Word* rows, float* out) {
  constexpr int64_t kWords = kPanel / A::kPack;  // of a row of weights
  for (int64_t d = 0; d < a.paneled(); d += kPanel, rows += kWords * kPanel)
    queries.each_block([&](int64_t block, int64_t place) {
      const auto* part = weights + place * kRows * kWords;
      tile_of_parts<typename A::Op, kWords>(&part, 1, 0, rows, out + block * kRows * a.paneled() + d, a.paneled(), true);
    });
}

// Numbers of a block of keys [kRows][kPanel] as words of neighboring keys, lane by lane.
template <class A>
void words_across(const float* block, typename A::Word* out) {
  for (int64_t r = 0; r < kRows; r += A::kPack, out += kPanel)
    for (int half = 0; half < 2; ++half) {
      Vec rows[A::kPack];
      for (int64_t i = 0; i < A::kPack; ++i) rows[i] = load(block + (r + i) * kPanel + half * kLanes);
      A::Op::across(out + half * kLanes, rows);
    }
}

// Outputs [M, heads, S, D] of the tasks [begin, end); each query's largest score and the inverse of its mass above that, which
// give weights without the rounding of one large logarithm: twice [M, heads, S].
template <class A>
void attend(const A& a, int64_t begin, int64_t end, const Heads<typename A::Number>& out, float* tops, float* inverses) {
  using Word = typename A::Word;
  const int64_t keys = a.longest();
  const Vec scale[2] = {splat(a.scale), splat(a.scale)};
  const auto along = make_array<Word>(keys * a.words()), across = make_array<Word>(keys / A::kPack * a.padded());
  const auto lanes = make_array<Word>(a.words() * kPanel), room = make_array<Word>(a.words() * kPanel);
  const auto scores = make_buffer((keys + kRows) * kPanel), sums = make_buffer(a.padded() * kPanel);
  const auto rows = make_buffer(a.width * kPanel);
  for (int64_t task = begin; task < end; ++task) {
    const PromptGroup g(a, task);
    pack_heads_along(a, g, a.k, room.get(), along.get());
    pack_heads_across(a, g, a.v, across.get());
    for (int64_t h = g.kv_head * a.repeats(); h < (g.kv_head + 1) * a.repeats(); ++h)
      each_panel(a, g, [&](const Queries& queries) {
        const int64_t token = g.begin + queries.from;
        pack_lanes(a, a.q.at(g.m, h, token), a.q.token, queries.lanes, room.get(), lanes.get());
        if constexpr (A::kScaled) scale_lanes(lanes.get(), a.width, scale);
        Vec top[2] = {splat(-std::numeric_limits<float>::infinity()), splat(-std::numeric_limits<float>::infinity())};
        queries.each_block([&](int64_t block, int64_t place) {
          float* score = scores.get() + place * kRows * kPanel;
          score_block(a, queries, block, along.get(), lanes.get(), score);
          for (int r = 0; r < kRows; ++r)
            for (int half = 0; half < 2; ++half) {
              const Vec of_row = load(score + r * kPanel + half * kLanes);
              top[half] = of_row > top[half] ? of_row : top[half];
            }
        });
        Vec mass[2] = {};
        Word* weights = reinterpret_cast<Word*>(scores.get());  // which take the place of scores that are read already
        for (float* row = scores.get(); row < scores.get() + queries.num_keys() * kPanel; row += A::kPack * kPanel)
          for (int half = 0; half < 2; ++half) {
            Vec weight[A::kPack];
            for (int64_t i = 0; i < A::kPack; ++i) {
              weight[i] = exp(load(row + i * kPanel + half * kLanes) - top[half]);
              mass[half] += weight[i];
            }
            A::Op::across(weights + (row - scores.get()) / A::kPack + half * kLanes, weight);
          }
        sum_over_keys(a, g, queries, across.get(), weights, sums.get());
        const Vec factor[2] = {1.0f / mass[0], 1.0f / mass[1]};
        scale_lanes(sums.get(), a.width, factor);
        unpack_lanes(sums.get(), queries.lanes, a.width, rows.get(), out.at(g.m, h, token), out.token);
        const int64_t at = (g.m * a.num_heads + h) * a.num_tokens + token;
        for (int64_t i = 0; i < queries.lanes; ++i) {
          tops[at + i] = top[i / kLanes][i % kLanes];
          inverses[at + i] = factor[i / kLanes][i % kLanes];
        }
      });
  }
}

// dQ, dK and dV of the tasks [begin, end).
template <class A>
void attend_backward(const A& a, int64_t begin, int64_t end, const Heads<typename A::Number>& out, const float* tops,
                     const float* inverses, const Heads<typename A::Number>& dout, const Heads<typename A::Number>& dq,
                     const Heads<typename A::Number>& dk, const Heads<typename A::Number>& dv) {
  using Word = typename A::Word;
  constexpr int64_t kWords = kPanel / A::kPack;  // of a row of weights
  const int64_t keys = a.longest(), stride = a.paneled();
  const Vec scale[2] = {splat(a.scale), splat(a.scale)};
  const auto k_along = make_array<Word>(keys * a.words()), v_along = make_array<Word>(keys * a.words());
  const auto k_across = make_array<Word>(keys / A::kPack * a.padded());
  const auto lanes = make_array<Word>(a.words() * kPanel), dout_lanes = make_array<Word>(a.words() * kPanel);
  const auto rows = make_array<Word>(stride * kWords), dout_rows = make_array<Word>(stride * kWords);
  // a tile of parts asks for what lies behind it
  const auto weights = make_array<Word>((keys + 2 * kRows) * kWords), slopes = make_array<Word>((keys + 2 * kRows) * kWords);
  const auto across = make_array<Word>(A::kPack == 1 ? 0 : (keys + kRows) / A::kPack * kPanel);
  const auto room = make_array<Word>(a.words() * kPanel);
  const auto score = make_buffer(kRows * kPanel), change = make_buffer(kRows * kPanel), dq_rows = make_buffer(a.width * kPanel);
  const auto sums = make_buffer(a.padded() * kPanel), k_sums = make_buffer(keys * stride), v_sums = make_buffer(keys * stride);
  for (int64_t task = begin; task < end; ++task) {
    const PromptGroup g(a, task);
    pack_heads_along(a, g, a.k, room.get(), k_along.get());
    pack_heads_along(a, g, a.v, room.get(), v_along.get());
    pack_heads_across(a, g, a.k, k_across.get());
    std::fill_n(k_sums.get(), g.padded() * stride, 0.0f);
    std::fill_n(v_sums.get(), g.padded() * stride, 0.0f);
    for (int64_t h = g.kv_head * a.repeats(); h < (g.kv_head + 1) * a.repeats(); ++h)
      each_panel(a, g, [&](const Queries& queries) {
        const int64_t token = g.begin + queries.from;
        const auto *q = a.q.at(g.m, h, token), *slope = dout.at(g.m, h, token), *value = out.at(g.m, h, token);
        pack_lanes(a, q, a.q.token, queries.lanes, room.get(), lanes.get());
        if constexpr (A::kScaled) scale_lanes(lanes.get(), a.width, scale);
        pack_rows(a, q, a.q.token, queries.lanes, a.scale, rows.get());
        pack_lanes(a, slope, dout.token, queries.lanes, room.get(), dout_lanes.get());
        pack_rows(a, slope, dout.token, queries.lanes, 1.0f, dout_rows.get());
        float top[kPanel] = {}, inverse[kPanel] = {}, mean[kPanel] = {};
        const int64_t first = (g.m * a.num_heads + h) * a.num_tokens + token;
        std::copy_n(tops + first, queries.lanes, top);
        std::copy_n(inverses + first, queries.lanes, inverse);
        for (int64_t i = 0; i < queries.lanes; ++i)
          for (int64_t d = 0; d < a.width; ++d)
            mean[i] += to_float(slope[i * dout.token + d]) * to_float(value[i * out.token + d]);
        queries.each_block([&](int64_t block, int64_t place) {
          score_block(a, queries, block, k_along.get(), lanes.get(), score.get());
          const Word* values = v_along.get() + block * a.words() * kRows;
          tile<typename A::Op>(values, dout_lanes.get(), a.words(), change.get(), kPanel, false);
          for (int64_t at = 0; at < kRows * kPanel; at += kPanel) {
            Vec p[2], ds[2];
            for (int half = 0; half < 2; ++half) {
              const int64_t lane = half * kLanes;
              const Vec raw = load(score.get() + at + lane);
              p[half] = exp(raw - load(top + lane)) * load(inverse + lane);
              ds[half] = p[half] * (load(change.get() + at + lane) - load(mean + lane));
              if (a.softcap != 0.0f) {
                const Vec share = raw * (1.0f / a.softcap);
                ds[half] = p[half] > 0.0f ? ds[half] * (1.0f - share * share) : Vec{};  // hidden ones are infinite
              }
              if constexpr (A::kPack > 1) store(change.get() + at + lane, ds[half]);
            }
            A::Op::along(weights.get() + (place * kRows * kPanel + at) / A::kPack, p[0], p[1]);
            A::Op::along(slopes.get() + (place * kRows * kPanel + at) / A::kPack, ds[0], ds[1]);
          }
          if constexpr (A::kPack > 1) words_across<A>(change.get(), across.get() + place * kRows * kPanel / A::kPack);
        });
        // floats are words of neighboring keys and of neighboring queries alike
        sum_over_keys(a, g, queries, k_across.get(), A::kPack > 1 ? across.get() : slopes.get(), sums.get());
        scale_lanes(sums.get(), a.width, scale);
        unpack_lanes(sums.get(), queries.lanes, a.width, dq_rows.get(), dq.at(g.m, h, token), dq.token);
        add_to_keys(a, queries, slopes.get(), rows.get(), k_sums.get());
        add_to_keys(a, queries, weights.get(), dout_rows.get(), v_sums.get());
      });
    if constexpr (!A::kScaled)
      for (int64_t at = 0; at < g.padded() * stride; at += kLanes) store(k_sums.get() + at, load(k_sums.get() + at) * a.scale);
    for (int64_t t = 0; t < g.count; ++t) {
      round_row(k_sums.get() + t * stride, a.width, dk.at(g.m, g.kv_head, g.begin + t));
      round_row(v_sums.get() + t * stride, a.width, dv.at(g.m, g.kv_head, g.begin + t));
    }
  }
}

// One new token of each row, which sees the prompt that it shares with other rows and what was written behind it.
template <class T>
struct DecodedRows {
  Heads<T> q, out;               // [B, heads, 1, D]
  Heads<T> prompt_k, prompt_v;   // [1, key-value heads, S, D]
  Heads<T> k, v;                 // [B, key-value heads, N, D], the new token's the last
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

// Dot products of a query, padded with zeros, and `count` keys.
template <class T>
void dot_keys(const float* query, const T* keys, int64_t stride, int64_t count, int64_t width, float* out) {
  for (int64_t j = 0; j < count; ++j, keys += stride) {
    Vec sum = {};
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) sum += load(query + d) * load(keys + d);
    if (d < width) sum += load(query + d) * load_some(keys + d, width - d);
    out[j] = total(sum);
  }
}

// out, padded, += the sum of `count` values times their weights.
template <class T>
void add_values(const float* weights, const T* values, int64_t stride, int64_t count, int64_t width, float* out) {
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
template <class T>
void attend_decoded(const DecodedRows<T>& a, int64_t begin, int64_t end, int64_t longest) {
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
        for (int64_t d = 0; d < a.width; ++d) query[d] = to_float(a.q.at(row, head, 0)[d]) * a.scale;
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
        for (int64_t d = 0; d < padded; d += kLanes) store(sums.get() + d, load(sums.get() + d) * factor);
        round_row(sums.get(), a.width, a.out.at(row, head, 0));
      }
  }
}

}  // namespace bpo
