// The passes over an output head on the CPU, for one element type. Notation as in bpo_fast_kernels/rows.py.
//
// Threads own runs of token panels and sweep the vocabulary block by block: a block's logits stay in cache, become E there
// and, for dX, are multiplied by the same block of W at once. No [T, V] array exists unless the caller asks for E.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "gemm.h"

namespace bpo {

constexpr int64_t kPackBytes = 512 * 1024;          // both packed forms of a W block, to stay in L2
constexpr int64_t kMaxBlock = 112;                  // logits of a block and a panel, to stay in L1
constexpr int64_t kGroupBytes = 8 * 1024 * 1024;    // X and dX panels of a group, to stay in L3
constexpr int64_t kChain = 512;                     // numbers of a row behind one chain of a logit: its error grows with it
constexpr double kOverflow = 1e30;                  // row sums past this are done again with the largest logit as shift

// `Number` is the inputs' type, `Logits` and `Grads` the words of the products that make logits, and dX and dW.
template <class Number_, class Logits_, class Grads_>
struct Head {
  using Number = Number_;
  using Logits = Logits_;
  using Grads = Grads_;
  using Kept = typename Grads::Number;

  const Number* hidden;
  const Number* weight;
  const int64_t* targets;
  int64_t num_rows, width, vocab;
  float scale, softcap;  // softcap 0: none

  int64_t block() const {
    const int64_t row_bytes = (4 / Logits::kPack + 4 / Grads::kPack) * std::max<int64_t>(width, 1);
    return std::clamp<int64_t>(kPackBytes / row_bytes / kRows * kRows, kRows, kMaxBlock / kRows * kRows);
  }
  int64_t row_words() const { return (width + Logits::kPack - 1) / Logits::kPack; }
  int64_t padded_vocab() const { return round_up(vocab, kRows); }
  int64_t padded_width() const { return round_up(width, kRows); }
  int64_t num_panels() const { return (num_rows + kPanel - 1) / kPanel; }
};

// Words of a column of `rows` rows.
template <class H>
int64_t column_words(int64_t rows) {
  return (rows + H::Grads::kPack - 1) / H::Grads::kPack;
}

// [4][T]: the fields of RowStats.
struct Stats {
  float *logps, *shift, *inv_sum, *push;
  Stats(float* base, int64_t n) : logps(base), shift(base + n), inv_sum(base + 2 * n), push(base + 3 * n) {}
};

// Where E lives: the first panels in dW, as long as nothing was summed there, the others [panel][padded_vocab][kPanel].
template <class H>
struct Store {
  using Kept = typename H::Kept;
  Kept *inside, *beside;
  int64_t num_inside, pitch, panel_size;  // pitch: of a row of dW

  Store(const H& h, Kept* in, Kept* out, int64_t panels_inside, int64_t row_bytes)
      : inside(in),
        beside(out),
        num_inside(panels_inside),
        pitch(row_bytes / static_cast<int64_t>(sizeof(Kept))),
        panel_size(h.padded_vocab() * kPanel) {}

  int64_t stride(int64_t panel) const { return panel < num_inside ? pitch : kPanel; }
  // The panel's numbers [kPanel] of vocabulary row `v`.
  Kept* at(int64_t panel, int64_t v) const {
    if (panel < num_inside) return inside + v * pitch + panel * kPanel;
    return beside + (panel - num_inside) * panel_size + v * kPanel;
  }
};

// What a panel carries through a sweep.
struct Panel {
  alignas(64) float shift[kPanel];
  alignas(64) float top[kPanel];  // largest logit but the target's
  alignas(64) int32_t target[kPanel];
  alignas(64) float target_logit[kPanel];
  double sum[kPanel];  // S'
};

template <class T>
float dot(const T* a, const T* b, int64_t n) {
  constexpr int kParts = std::max(kPanel, 16);  // the fewer, the longer their chains
  float part[kParts] = {};
  int64_t k = 0;
  for (; k + kParts <= n; k += kParts)
    for (int i = 0; i < kParts; ++i) part[i] += to_float(a[k + i]) * to_float(b[k + i]);
  double sum = 0;
  for (int i = 0; i < kParts; ++i) sum += part[i];
  for (; k < n; ++k) sum += static_cast<double>(to_float(a[k])) * to_float(b[k]);
  return static_cast<float>(sum);
}

// The logit of one vocabulary row for one row of hidden states.
template <class H>
float one_logit(const H& head, int64_t row, int64_t v) {
  float z = dot(head.hidden + row * head.width, head.weight + v * head.width, head.width);
  if (head.softcap > 0) z = head.softcap * std::tanh(z / head.softcap);
  return z * head.scale;
}

template <class H>
void start_panel(const H& head, int64_t panel, Panel& out) {
  for (int lane = 0; lane < kPanel; ++lane) {
    const int64_t row = panel * kPanel + lane;
    const bool live = row < head.num_rows;
    out.target[lane] = live ? static_cast<int32_t>(head.targets[row]) : -1;
    out.target_logit[lane] = out.shift[lane] = live ? one_logit(head, row, head.targets[row]) : 0.0f;
    out.top[lane] = -std::numeric_limits<float>::infinity();
    out.sum[lane] = 0;
  }
}

// Raw products of a block [rows][kPanel] -> E in place (times the slope of the cap), zero at the target; adds to S'.
template <class H>
void exp_block(const H& head, float* z, int64_t first, int64_t rows, Panel& panel) {
  const Vec zero{};
  for (int half = 0; half < kPanel; half += kLanes) {
    IVec target;
    std::memcpy(&target, panel.target + half, sizeof(target));
    target -= static_cast<int32_t>(first);
    const Vec shift = load(panel.shift + half);
    Vec sum{};
    for (int64_t v = 0; v < rows; ++v) {
      float* p = z + v * kPanel + half;
      Vec slope = splat(1.0f), logit = load(p);
      if (head.softcap > 0) {
        const Vec t = tanh(logit * (1.0f / head.softcap));
        slope -= t * t;
        logit = t * head.softcap;
      }
      Vec e = exp(logit * head.scale - shift);
      e = target == static_cast<int32_t>(v) ? zero : e;
      sum += e;
      store(p, head.softcap > 0 ? e * slope : e);
    }
    for (int i = 0; i < kLanes; ++i) panel.sum[half + i] += sum[i];
  }
}

// Raw products of a block -> the largest logit of each lane, the target's left out.
template <class H>
void top_block(const H& head, const float* z, int64_t first, int64_t rows, Panel& panel) {
  for (int64_t v = 0; v < rows; ++v) {
    for (int lane = 0; lane < kPanel; ++lane) {
      float x = z[v * kPanel + lane];
      if (head.softcap > 0) x = head.softcap * std::tanh(x / head.softcap);
      if (panel.target[lane] != first + v) panel.top[lane] = std::max(panel.top[lane], x * head.scale);
    }
  }
}

// E of a block [rows][kPanel] -> the right operand of dX [words of a column][kPanel].
template <class H>
const typename H::Grads::Word* column_pairs(float* e, int64_t rows, typename H::Grads::Word* out) {
  if constexpr (H::Grads::kPack == 1) {
    return e;
  } else {
    for (int64_t k = 0; k < column_words<H>(rows); ++k) {
      const float* first = e + 2 * k * kPanel;
      const float* second = first + kPanel;
      if (2 * k + 1 == rows) std::fill_n(e + rows * kPanel, kPanel, 0.0f);
      for (int i = 0; i < kPanel; ++i) out[k * kPanel + i] = H::Grads::word(first[i], second[i]);
    }
    return out;
  }
}

// The same from E as it was kept, rows `stride` apart.
template <class H>
const typename H::Grads::Word* kept_pairs(const typename H::Kept* e, int64_t stride, int64_t rows,
                                          typename H::Grads::Word* out) {
  if constexpr (H::Grads::kPack == 1) {
    if (stride == kPanel) return e;
    for (int64_t v = 0; v < rows; ++v) std::copy_n(e + v * stride, kPanel, out + v * kPanel);
    return out;
  } else {
    const typename H::Kept none[kPanel] = {};
    for (int64_t k = 0; k < column_words<H>(rows); ++k) {
      const auto* first = e + 2 * k * stride;
      const auto* second = 2 * k + 1 == rows ? none : first + stride;
      for (int i = 0; i < kPanel; ++i) out[k * kPanel + i] = H::Grads::word(first[i], second[i]);
    }
    return out;
  }
}

// dX of a panel before its scaling += W^T E, for one block: `left` from pack_across, `right` E in words.
template <class H>
void add_dx(const H& head, const typename H::Grads::Word* left, const typename H::Grads::Word* right, int64_t rows,
            float* pull) {
  const int64_t depth = column_words<H>(rows);
  for (int64_t h = 0; h < head.width; h += kRows) {
    float* c = pull + h * kPanel;
    if (h + kRows < head.width) prefetch_tile(c + kRows * kPanel, kPanel, kRows);
    tile<typename H::Grads>(left + h * depth, right, depth, c, kPanel, true);
  }
}

// One vocabulary block as the left operand of logits, of `panels` at most, and of dX; and the scratch for a panel's logits.
template <class H>
struct Block {
  using Along = typename H::Logits::Word;
  using Across = typename H::Grads::Word;
  bool meets_tokens, standing;
  const Along* rows_standing = nullptr;
  Array<Along> along, row_words;
  Array<Across> across, lines, pairs;
  Buffer logits;

  Block(const H& h, int64_t panels, bool dx)
      : meets_tokens(panels > 0),
        standing(meets_tokens && rows_stand<typename H::Logits>(h.weight, h.width, panels)),
        along(make_array<Along>(meets_tokens ? (standing ? kRows : h.block()) * h.row_words() : 0)),
        row_words(make_array<Along>(meets_tokens ? kRows * h.row_words() : 0)),
        across(make_array<Across>(dx ? column_words<H>(h.block()) * h.padded_width() : 0)),
        lines(make_array<Across>(dx ? kLines * h.padded_width() : 0)),
        pairs(make_array<Across>(column_words<H>(h.block()) * kPanel)),
        logits(make_buffer((h.block() + 1) * kPanel)) {}

  // Packs all rows or, where they stand, those past the last whole tile.
  void pack_logits(const H& h, int64_t first, int64_t rows) {
    if (!meets_tokens) return;
    const auto* from = h.weight + first * h.width;
    const int64_t whole = standing ? rows / kRows * kRows : 0;
    if (standing) rows_standing = reinterpret_cast<const Along*>(from);
    pack_along<typename H::Logits>(from + whole * h.width, h.width, rows - whole, h.width, row_words.get(), along.get());
  }
  void pack_dx(const H& h, int64_t first, int64_t rows) {
    pack_across<typename H::Grads>(h.weight + first * h.width, rows, h.width, lines.get(), across.get());
  }
  // Raw products of the block with one panel of tokens, in `logits`; the `first` panel that meets the block waits for its rows.
  void multiply(const H& h, const Along* tokens, int64_t rows, bool first) {
    constexpr int64_t kChainWords = kChain / H::Logits::kPack;
    const int64_t words = h.row_words(), whole = standing ? rows / kRows * kRows : 0;
    float* out = logits.get();
    for (int64_t v = 0; v < rows; v += kRows, out += kRows * kPanel)
      for (int64_t k = 0; k < words; k += kChainWords) {
        const int64_t depth = std::min(kChainWords, words - k);
        const Along* b = tokens + k * kPanel;
        if (v < whole)
          tile_of_rows<typename H::Logits>(rows_standing + v * words + k, words, b, depth, out, kPanel, k > 0, first);
        else
          tile<typename H::Logits>(along.get() + (v - whole) * words + k * kRows, b, depth, out, kPanel, k > 0);
      }
  }
};

// One thread's panels with their packed rows.
template <class H>
struct Group {
  using Token = typename H::Logits::Word;
  const H& head;
  int64_t first_panel, count;
  bool wants_dx;
  const Store<H>* kept;  // null: E is not kept
  Array<Token> x;
  Buffer pull;
  Block<H> block;
  std::vector<Panel> panels;

  Group(const H& h, int64_t first, int64_t n, bool dx, const Store<H>* e)
      : head(h),
        first_panel(first),
        count(n),
        wants_dx(dx),
        kept(e),
        x(make_array<Token>(n * h.row_words() * kPanel)),
        pull(make_buffer(dx ? n * h.padded_width() * kPanel : 0)),
        block(h, n, dx),
        panels(n) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = (first + i) * kPanel;
      const auto* rows = h.hidden + row * h.width;
      pack_tokens<typename H::Logits>(rows, h.num_rows - row, h.width, block.row_words.get(), x_panel(i));
      start_panel(h, first + i, panels[i]);
    }
  }

  Token* x_panel(int64_t i) { return x.get() + i * head.row_words() * kPanel; }
  float* pull_panel(int64_t i) { return pull.get() + i * head.padded_width() * kPanel; }
};

// dX of a row: `push` times its target's row of the head, and `factor` times its column of a panel's W^T E.
template <class H>
void write_dx(const H& head, int64_t row, float push, float factor, const float* pull, float* dx) {
  const auto* w = head.weight + head.targets[row] * head.width;
  for (int64_t h = 0; h < head.width; ++h) dx[row * head.width + h] = push * to_float(w[h]) + factor * pull[h * kPanel];
}

// Of every lane of a panel and the vocabulary blocks [begin, end): the largest logit, and the sum of exp(logit - largest).
// `tokens` are packed panels, `tops` and `sums` [blocks][lanes of all panels].
template <class H>
void block_masses(const H& head, const typename H::Logits::Word* tokens, int64_t begin, int64_t end, float* tops, float* sums) {
  Block<H> block(head, head.num_panels(), false);
  const int64_t lanes = head.num_panels() * kPanel;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * head.block(), rows = std::min(head.block(), head.vocab - first);
    block.pack_logits(head, first, rows);
    for (int64_t lane = 0; lane < lanes; lane += kPanel) {
      block.multiply(head, tokens + lane * head.row_words(), rows, lane == 0);
      for (int half = 0; half < kPanel; half += kLanes) {
        float* z = block.logits.get() + half;
        Vec top = splat(-std::numeric_limits<float>::infinity()), sum{};
        for (int64_t v = 0; v < rows; ++v) {
          const Vec logit = capped(load(z + v * kPanel), head.softcap) * head.scale;
          top = logit > top ? logit : top;
          store(z + v * kPanel, logit);
        }
        for (int64_t v = 0; v < rows; ++v) sum += exp(load(z + v * kPanel) - top);
        store(tops + b * lanes + lane + half, top);
        store(sums + b * lanes + lane + half, sum);
      }
    }
  }
}

enum class Pass { kExp, kTop };

// Sweep the vocabulary over the panels of `which`: E and S' (and dX before its scaling), or the largest logits.
template <class H>
void sweep(Group<H>& g, const std::vector<int64_t>& which, Pass pass) {
  const H& head = g.head;
  const bool dx = g.wants_dx && pass == Pass::kExp, keep = g.kept != nullptr && pass == Pass::kExp;
  float* z = g.block.logits.get();
  for (int64_t i : which)
    if (dx) std::fill_n(g.pull_panel(i), head.padded_width() * kPanel, 0.0f);
  for (int64_t first = 0; first < head.vocab; first += head.block()) {
    const int64_t rows = std::min(head.block(), head.vocab - first);
    g.block.pack_logits(head, first, rows);
    if (dx) g.block.pack_dx(head, first, rows);
    for (int64_t i : which) {
      g.block.multiply(head, g.x_panel(i), rows, i == which.front());
      if (pass == Pass::kTop) {
        top_block(head, z, first, rows, g.panels[i]);
        continue;
      }
      exp_block(head, z, first, rows, g.panels[i]);
      if (keep) {
        auto* out = g.kept->at(g.first_panel + i, first);
        const int64_t stride = g.kept->stride(g.first_panel + i);
        for (int64_t v = 0; v < rows; ++v)
          for (int64_t j = 0; j < kPanel; ++j) assign(out[v * stride + j], z[v * kPanel + j]);
      }
      if (dx) add_dx(head, g.block.across.get(), column_pairs<H>(z, rows, g.block.pairs.get()), rows, g.pull_panel(i));
    }
  }
}

// Rows whose sum left the safe range: their largest logit becomes the shift, and their panel is swept again.
template <class H>
void redo_overflows(Group<H>& g) {
  std::vector<int64_t> bad;
  const auto over = [](double sum) { return !(sum <= kOverflow); };
  for (int64_t i = 0; i < g.count; ++i)
    if (std::any_of(g.panels[i].sum, g.panels[i].sum + kPanel, over)) bad.push_back(i);
  if (bad.empty()) return;
  sweep(g, bad, Pass::kTop);
  for (int64_t i : bad) {
    Panel& p = g.panels[i];
    for (int lane = 0; lane < kPanel; ++lane) {
      if (over(p.sum[lane])) p.shift[lane] = std::max(p.top[lane], p.target_logit[lane]);
      p.sum[lane] = 0;
    }
  }
  sweep(g, bad, Pass::kExp);
}

template <class H>
float target_slope(const H& head, float scaled_logit) {
  if (head.softcap <= 0) return 1.0f;
  const float t = scaled_logit / (head.scale * head.softcap);
  return 1.0f - t * t;
}

// Statistics and dX of a swept panel.
template <class H>
void finish_panel(Group<H>& g, int64_t i, Stats& stats, float* unit_dx) {
  const H& head = g.head;
  const Panel& p = g.panels[i];
  for (int lane = 0; lane < kPanel; ++lane) {
    const int64_t row = (g.first_panel + i) * kPanel + lane;
    if (row >= head.num_rows) break;
    const double gap = static_cast<double>(p.target_logit[lane]) - p.shift[lane];
    const double total = p.sum[lane] + std::exp(gap);
    stats.logps[row] = static_cast<float>(gap == 0 ? -std::log1p(p.sum[lane]) : gap - std::log(total));
    stats.shift[row] = p.shift[lane];
    stats.inv_sum[row] = static_cast<float>(1.0 / total);
    stats.push[row] = static_cast<float>(p.sum[lane] / total) * target_slope(head, p.target_logit[lane]);
    if (!unit_dx) continue;
    const float factor = -head.scale * stats.inv_sum[row];
    write_dx(head, row, head.scale * stats.push[row], factor, g.pull_panel(i) + lane, unit_dx);
  }
}

// Statistics of the panels [begin, end); d logp / d hidden and E where the caller gives room for them.
template <class H>
void score_panels(const H& head, int64_t begin, int64_t end, Stats stats, float* unit_dx, const Store<H>* kept) {
  const int64_t panel_bytes = 2 * kPanel * sizeof(float) * std::max<int64_t>(head.width, 1);
  const int64_t step = std::max<int64_t>(4, kGroupBytes / panel_bytes);
  for (int64_t first = begin; first < end; first += step) {
    Group<H> group(head, first, std::min(step, end - first), unit_dx != nullptr, kept);
    std::vector<int64_t> all(group.count);
    for (int64_t i = 0; i < group.count; ++i) all[i] = i;
    sweep(group, all, Pass::kExp);
    redo_overflows(group);
    for (int64_t i : all) finish_panel(group, i, stats, unit_dx);
  }
}

// Panels of [begin, end) with a factor that is not 0.
template <class H>
std::vector<int64_t> live_panels(const H& head, const float* factor, int64_t begin, int64_t end) {
  std::vector<int64_t> live;
  for (int64_t p = begin; p < end; ++p) {
    const float* rows = factor + p * kPanel;
    const int64_t count = std::min<int64_t>(kPanel, head.num_rows - p * kPanel);
    if (std::any_of(rows, rows + count, [](float f) { return f != 0; })) live.push_back(p);
  }
  return live;
}

// dX of the panels [begin, end) from kept E; panels whose rows all have factor 0 are skipped.
template <class H>
void kept_dx_panels(const H& head, const Store<H>& kept, const float* factor, const float* push, int64_t begin, int64_t end,
                    float* dx) {
  const std::vector<int64_t> live = live_panels(head, factor, begin, end);
  const int64_t panel_size = head.padded_width() * kPanel;
  Buffer pull = make_buffer(live.size() * panel_size);
  Block<H> block(head, 0, true);
  std::fill_n(pull.get(), live.size() * panel_size, 0.0f);
  for (int64_t first = 0; first < head.vocab && !live.empty(); first += head.block()) {
    const int64_t rows = std::min(head.block(), head.vocab - first);
    block.pack_dx(head, first, rows);
    for (size_t i = 0; i < live.size(); ++i) {
      const auto* e = kept_pairs<H>(kept.at(live[i], first), kept.stride(live[i]), rows, block.pairs.get());
      add_dx(head, block.across.get(), e, rows, pull.get() + i * panel_size);
    }
  }
  std::fill_n(dx + begin * kPanel * head.width, (std::min(end * kPanel, head.num_rows) - begin * kPanel) * head.width, 0.0f);
  for (size_t i = 0; i < live.size(); ++i) {
    for (int lane = 0; lane < kPanel && live[i] * kPanel + lane < head.num_rows; ++lane) {
      const int64_t row = live[i] * kPanel + lane;
      write_dx(head, row, push[row], factor[row], pull.get() + i * panel_size + lane, dx);
    }
  }
}

}  // namespace bpo
