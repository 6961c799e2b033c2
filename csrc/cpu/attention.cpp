#include "pop/attention.h"

#include <vector>

#include "cpu/attention_values.h"
#include "cpu/head.h"

namespace pop::cpu::POP_ISA {
namespace {

// Flash attention on the main loop of gemm.h. A task is some query tokens of a sequence with one key/value head; its
// rows are those tokens' query heads of the group, so that keys and values, packed once per task, serve them all. Keys
// pass by in chunks: scores of six rows (on tiles 32), their running softmax, and the weighted values, all in cache.
// With few queries (decode) a task takes all heads, so that the cache is read as it lies, one chunk ahead; and where
// tasks are fewer than threads would have, they share the context out.

template <typename T>
constexpr int64_t kTaskRows = kTiles<T> ? 768 : 384;
constexpr int64_t kAllHeadsRows = 384;  // up to here a task takes all heads
constexpr int64_t kChunkKeys = 256;     // scores of kTileRows<T> rows stay in L1
template <typename T>
constexpr int64_t kScoreStride = kChunkKeys + (kTiles<T> ? kLanes : 0);  // a power of two would crowd few sets of L1
// Lanes of k in a block of a score's sum: a score's error is a relative error of its probability.
template <typename T>
constexpr int64_t kScoreLanes = std::is_same_v<T, float> ? 16 : kSumLanes;
constexpr int64_t kChunkKeysAllHeads = 64;
constexpr int64_t kDirectRows = 8;  // of a head; up to here keys and values are read as they lie, without packing
constexpr int64_t kMinSplitKeys = 128;

struct Task {
  int64_t sequence, first_head, heads, first_query, queries;  // queries count from the sequence's first
  int64_t first_key, last_key;                                // what any of its queries may see, [first, last)
};

/// Softmax state of rows: the running maximum, the lane-wise sums, and the weighted sum of values.
struct Partial {
  float *maximum, *sums, *values;
  int64_t value_stride;
  static int64_t floats(int64_t rows, int64_t value_stride) {
    return round_up(rows, 16) + rows * (kLanes + value_stride);  // each begins at a line of the cache
  }
  Partial(float* data, int64_t rows, int64_t stride)
      : maximum(data), sums(data + round_up(rows, 16)), values(sums + rows * kLanes), value_stride(stride) {}
  void advance(int64_t rows) { maximum += rows, sums += rows * kLanes, values += rows * value_stride; }
};

constexpr float kInfinity = __builtin_inff();

/// Some keys of one head with their values: where they lie, or packed for multiply_tile.
template <typename T>
struct Chunk {
  int64_t first;
  int count;
  const T *const *keys, *const *values;  // or null
  float *key_panels, *value_panels;
  static constexpr int64_t kValueLanes = lanes_of<T>(kChunkKeys);
};

/// Rows [first, first + count) of a head as they meet a chunk: they see some of its first `keys` keys. Scores
/// become probabilities where they lie, of Factor<T> where values are packed.
template <typename T>
struct Rows {
  int64_t first;
  int count, keys;
  alignas(64) float scores[kTileRows<T> * kScoreStride<T>];
  alignas(64) float rescale[round_up(kTileRows<T>, kLanes)] = {};  // by which to multiply what they have summed

  float* row(int i) { return scores + i * kScoreStride<T>; }
};

template <typename T>
class Kernel {
 public:
  explicit Kernel(const Attention& p)
      : p_(p),
        size_(p.key_cache.head_size),
        group_(p.query_heads / p.key_cache.heads),
        key_lanes_(lanes_of<T>(size_)),
        key_depth_(panel_lanes<T>(size_)),
        value_stride_(round_up(size_, kTileColumns)) {}

  void run(const Threads& threads) {
    const std::vector<Task> tasks = plan();
    int64_t longest = 0, most_rows = 0;
    for (const Task& task : tasks) {
      longest = std::max(longest, task.last_key - task.first_key);
      most_rows = std::max(most_rows, rows_of(task));
    }
    const int64_t count = tasks.size(), wanted = threads.count > 1 ? 4 * threads.count : 1;
    const int64_t splits =
        std::clamp<int64_t>(wanted / std::max<int64_t>(1, count), 1, std::max<int64_t>(1, longest / kMinSplitKeys));
    if (splits == 1) {
      parallel_for<TileScope<T>>(threads, count, [&](int64_t i) {
        struct Tag;
        Partial partial(scratch<Tag, float>(Partial::floats(most_rows, value_stride_)), rows_of(tasks[i]),
                        value_stride_);
        accumulate(tasks[i], tasks[i].first_key, tasks[i].last_key, partial);
        finish(tasks[i], &partial, 1);
      });
      return;
    }
    const int64_t floats = round_up(Partial::floats(most_rows, value_stride_), 16);
    struct Tag;
    float* workspace = scratch<Tag, float>(count * splits * floats);
    const auto partial = [&](int64_t i, int64_t split) {
      return Partial(workspace + (i * splits + split) * floats, rows_of(tasks[i]), value_stride_);
    };
    parallel_for<TileScope<T>>(threads, count * splits, [&](int64_t item) {
      const Task& task = tasks[item / splits];
      const int64_t keys = round_up((task.last_key - task.first_key + splits - 1) / splits, kLanes);
      const int64_t first = std::min(task.last_key, task.first_key + item % splits * keys);
      accumulate(task, first, std::min(first + keys, task.last_key), partial(item / splits, item % splits));
    });
    parallel_for(threads, count, [&](int64_t i) {
      std::vector<Partial> parts;
      for (int64_t split = 0; split < splits; ++split) parts.push_back(partial(i, split));
      finish(tasks[i], parts.data(), splits);
    });
  }

 private:
  std::vector<Task> plan() const {
    std::vector<Task> tasks;
    const int64_t step = std::max<int64_t>(1, kTaskRows<T> / group_);
    for (int64_t s = 0; s < p_.sequences; ++s) {
      const int64_t queries = p_.cu_seqlens_q[s + 1] - p_.cu_seqlens_q[s], context = p_.seqlens_k[s];
      const int64_t heads = queries * p_.query_heads <= kAllHeadsRows ? p_.key_cache.heads : 1;
      for (int64_t first = (queries - 1) / step * step; queries > 0 && first >= 0;
           first -= step) {  // the longest first
        const int64_t count = std::min(step, queries - first), position = context - queries + first;
        const int64_t first_key = p_.window_size > 0 ? std::max<int64_t>(0, position - p_.window_size + 1) : 0;
        const int64_t last_key = p_.spans ? context : position + count;
        for (int64_t head = 0; head < p_.key_cache.heads; head += heads)
          tasks.push_back({s, head, heads, first, count, first_key, last_key});
      }
    }
    return tasks;
  }

  int64_t rows_of(const Task& task) const { return task.heads * task.queries * group_; }

  /// rows[j] = where key (or value) first + j of a head lies.
  void locate(const PagedCache& cache, const Task& task, int64_t head, int64_t first, int count, const T** rows) const {
    const int32_t* table = p_.block_tables + task.sequence * p_.block_table_stride;
    const T* data = static_cast<const T*>(cache.data) + head * cache.head_stride;
    int64_t block = first / cache.block_size, offset = first % cache.block_size;
    for (int j = 0; j < count; ++block, offset = 0) {
      const T* from = data + table[block] * cache.block_stride;
      for (; j < count && offset < cache.block_size; ++j, ++offset) rows[j] = from + offset * cache.token_stride;
    }
  }

  void prefetch(const PagedCache& cache, const Task& task, int64_t first, int count) const {
    const T* rows[kChunkKeys];
    locate(cache, task, task.first_head, first, count, rows);
    for (int j = 0; j < count; ++j)
      for (int64_t h = 0; h < task.heads; ++h)
        for (int64_t e = 0; e < size_; e += 64 / sizeof(T)) __builtin_prefetch(rows[j] + h * cache.head_stride + e);
  }

  void accumulate(const Task& task, int64_t first_key, int64_t last_key, Partial state) const {
    struct QueryTag;
    const int64_t rows = rows_of(task), head_rows = task.queries * group_;
    const bool packed = head_rows > kDirectRows;
    const int64_t query_stride = kConverted<T> && !packed ? round_up(size_, 2 * kLanes) : key_lanes_ * kPerLane<T>;
    Factor<T>* query = scratch<QueryTag, Factor<T>>((rows + tile::kRows) * query_stride);
    gather_queries(task, query, query_stride, !packed);
    std::fill_n(state.maximum, rows, -kInfinity);
    std::fill_n(state.sums, rows * kLanes, 0.0f);
    std::fill_n(state.values, rows * value_stride_, 0.0f);

    // Packed on tiles, a stretch of keys stays in the second cache and serves all rows in turn.
    constexpr int64_t kStretchFloats = 192 * 1024;
    const int64_t chunk = task.heads > 1 ? kChunkKeysAllHeads : kChunkKeys;
    const int64_t chunks = kTiles<T> && packed ? std::max<int64_t>(1, kStretchFloats / chunk_floats()) : 1;
    const auto keys_from = [&](int64_t key) { return static_cast<int>(std::clamp<int64_t>(last_key - key, 0, chunk)); };
    const auto prefetch_from = [&](int64_t key) {
      prefetch(p_.key_cache, task, key, keys_from(key));
      prefetch(p_.value_cache, task, key, keys_from(key));
    };
    prefetch_from(first_key);
    struct StretchTag;
    Chunk<T>* stretch = scratch<StretchTag, Chunk<T>>(chunks);
    const T *keys[kChunkKeys], *values[kChunkKeys];
    for (int64_t begin = first_key; begin < last_key; begin += chunks * chunk) {
      const int64_t end = std::min(last_key, begin + chunks * chunk);
      Partial head_state = state;
      for (int64_t h = 0; h < task.heads; ++h, head_state.advance(head_rows)) {
        int64_t count = 0;
        for (int64_t key = begin; key < end; key += chunk) {
          if (h == 0 && key + chunk < last_key) prefetch_from(key + chunk);
          locate(p_.key_cache, task, task.first_head + h, key, keys_from(key), keys);
          locate(p_.value_cache, task, task.first_head + h, key, keys_from(key), values);
          stretch[count] = {key, keys_from(key), keys, values, nullptr, nullptr};
          if (packed) pack(stretch[count], count, chunks);
          ++count;
        }
        meet(task, head_state, query + h * head_rows * query_stride, query_stride, stretch, count);
      }
    }
  }

  int64_t chunk_floats() const { return kChunkKeys * key_depth_ + value_stride_ * Chunk<T>::kValueLanes; }

  /// Packs the i-th chunk of some.
  void pack(Chunk<T>& chunk, int64_t i, int64_t chunks) const {
    struct Tag;
    chunk.key_panels = scratch<Tag, float>(chunks * chunk_floats()) + i * chunk_floats();
    chunk.value_panels = chunk.key_panels + kChunkKeys * key_depth_;
    for (int j = 0; j < chunk.count; j += kTileColumns)
      pack_panel<T>(chunk.keys + j, std::min(kTileColumns, chunk.count - j), size_, chunk.key_panels + j * key_depth_,
                    kTileColumns);
    const T* values[kChunkKeys];
    for (int64_t e = 0; e < size_; e += kTileColumns) {
      for (int j = 0; j < chunk.count; ++j) values[j] = chunk.values[j] + e;
      pack_values<T>(values, chunk.count, std::min<int64_t>(kTileColumns, size_ - e),
                     chunk.value_panels + e * chunk.kValueLanes, kTileColumns);
    }
    chunk.keys = chunk.values = nullptr;
  }

  /// Row r of a task: the token's index among all queries, and its query head.
  std::pair<int64_t, int64_t> locate_row(const Task& task, int64_t r) const {
    const int64_t head_rows = task.queries * group_, in_head = r % head_rows;
    return {p_.cu_seqlens_q[task.sequence] + task.first_query + in_head / group_,
            (task.first_head + r / head_rows) * group_ + in_head % group_};
  }

  void gather_queries(const Task& task, Factor<T>* to, int64_t stride, bool for_dots) const {
    for (int64_t r = 0; r < rows_of(task); ++r, to += stride) {
      const auto [token, head] = locate_row(task, r);
      const T* from = static_cast<const T*>(p_.query) + token * p_.query_token_stride + head * p_.query_head_stride;
      if constexpr (kConverted<T>) {
        if (for_dots) {
          dot_factors(from, size_, to);
          continue;
        }
      }
      copy_row<T>(from, size_, to);
    }
  }

  /// The rows of one head meet chunks of keys: each row all of them before the next.
  void meet(const Task& task, Partial state, const Factor<T>* query, int64_t query_stride, const Chunk<T>* chunks,
            int64_t count) const {
    const int64_t head_rows = task.queries * group_;
    Rows<T> rows;
    for (int64_t r = 0; r < head_rows; r += kTileRows<T>) {
      rows.first = r, rows.count = static_cast<int>(std::min<int64_t>(kTileRows<T>, head_rows - r));
      for (int64_t i = 0; i < count; ++i) {
        const Chunk<T>& chunk = chunks[i];
        rows.keys = visible_keys(task, rows, chunk);
        if (rows.keys == 0) continue;
        score(rows, query + r * query_stride, query_stride, chunk);
        mask(task, rows, chunk);
        chunk.keys ? softmax<float>(state, rows) : softmax<Factor<T>>(state, rows);
        weigh(state, rows, chunk);
      }
    }
  }

  int64_t position(const Task& task, int64_t row) const {
    const int64_t queries = p_.cu_seqlens_q[task.sequence + 1] - p_.cu_seqlens_q[task.sequence];
    return p_.seqlens_k[task.sequence] - queries + task.first_query + row / group_;
  }

  /// How many of the chunk's keys, from its first on, the rows may see.
  int visible_keys(const Task& task, const Rows<T>& rows, const Chunk<T>& chunk) const {
    const int64_t first = position(task, rows.first), last = position(task, rows.first + rows.count - 1);
    const int keys = p_.spans ? chunk.count : static_cast<int>(std::min<int64_t>(chunk.count, last - chunk.first + 1));
    const bool passed = p_.window_size > 0 && chunk.first + keys - 1 <= first - p_.window_size;
    return keys <= 0 || passed ? 0 : keys;
  }

  void score(Rows<T>& rows, const Factor<T>* query, int64_t query_stride, const Chunk<T>& chunk) const {
    if (chunk.keys) {
      multiply_dots<T>(rows.count, rows.keys, query, query_stride, chunk.keys, size_, rows.scores, kScoreStride<T>);
      return;
    }
    for (int j = 0; j < rows.keys; j += kTileColumns)
      multiply_tile<T>(rows.count, std::min(kTileColumns, rows.keys - j), query, query_stride,
                       chunk.key_panels + j * key_depth_, kTileColumns, key_lanes_, nullptr, rows.scores + j,
                       kScoreStride<T>, kScoreLanes<T>);
  }

  /// -inf where rows do not see keys.
  void mask(const Task& task, Rows<T>& rows, const Chunk<T>& chunk) const {
    const int64_t first = position(task, rows.first), last = position(task, rows.first + rows.count - 1);
    const int64_t key = chunk.first;
    const bool all_visible = !p_.spans && rows.keys % kLanes == 0 && key + rows.keys - 1 <= first &&
                             (p_.window_size == 0 || key > last - p_.window_size);
    if (all_visible) return;
    for (int i = 0; i < rows.count; ++i) mask_row(task, position(task, rows.first + i), key, rows.keys, rows.row(i));
  }

  /// From scores to the keys' unnormalised probabilities. Updates the rows' maxima and sums, and says by what to
  /// rescale.
  template <typename Prob>
  void softmax(Partial state, Rows<T>& rows) const {
    const float scale = p_.softmax_scale * kLog2E;
    float row_max[kTileRows<T>];
    for (int i = 0; i < rows.count; ++i) {
      const float* score = rows.row(i);
      Vec top = load(score);
      for (int j = kLanes; j < rows.keys; j += kLanes) top = max(top, load(score + j));
      const float before = state.maximum[rows.first + i], maximum = std::max(before, reduce_max(top));
      state.maximum[rows.first + i] = maximum;
      row_max[i] = maximum == -kInfinity ? 0.0f : maximum;
      rows.rescale[i] = (before - row_max[i]) * scale;
    }
    for (int i = 0; i < rows.count; i += kLanes) store(rows.rescale + i, exp2(load(rows.rescale + i)));
    for (int i = 0; i < rows.count; ++i) {
      const float* score = rows.row(i);
      auto* prob = reinterpret_cast<Prob*>(rows.row(i));  // behind the scores that are read
      Vec sum = load(state.sums + (rows.first + i) * kLanes) * rows.rescale[i];
      const auto of = [&](int j) {
        constexpr int kDegree = std::is_same_v<Prob, bf16> ? 4 : 6;
        const Vec p = exp2<kDegree>((load(score + j) - row_max[i]) * scale);  // in this order: at the maximum exactly 1
        sum += p;
        return p;
      };
      int j = 0;
      for (; j + 2 * kLanes <= rows.keys; j += 2 * kLanes) {
        const Vec first = of(j);
        store_two(prob + j, first, of(j + kLanes));
      }
      for (; j < rows.keys; j += kLanes) store(prob + j, of(j));
      store(state.sums + (rows.first + i) * kLanes, sum);
    }
  }

  /// Adds the values, weighted by the rows' probabilities.
  void weigh(Partial state, Rows<T>& rows, const Chunk<T>& chunk) const {
    float* sums = state.values + rows.first * value_stride_;
    if (chunk.keys) return add_weighted(rows.count, rows.keys, rows.scores, chunk.values, rows.rescale, sums);
    constexpr int64_t kStride = kScoreStride<T> * sizeof(float) / sizeof(Factor<T>);
    const auto* probs = reinterpret_cast<const Factor<T>*>(rows.scores);
    for (int64_t e = 0; e < size_; e += kTileColumns)
      multiply_tile<T>(rows.count, static_cast<int>(std::min<int64_t>(kTileColumns, size_ - e)), probs, kStride,
                       chunk.value_panels + e * chunk.kValueLanes, kTileColumns, lanes_of<T>(rows.keys), rows.rescale,
                       sums + e, value_stride_);
  }

  void add_weighted(int count, int keys, const float* probs, const T* const* values, const float* rescale,
                    float* sums) const {
    static constexpr decltype(&add_values<T, 1>) kAddValues[] = {add_values<T, 1>, add_values<T, 2>, add_values<T, 3>,
                                                                 add_values<T, 4>};
    for (int r = 0; r < count; r += 4)
      kAddValues[std::min(4, count - r) - 1](probs + r * kScoreStride<T>, kScoreStride<T>, keys, values, size_,
                                             rescale + r, sums + r * value_stride_, value_stride_);
  }

  /// -inf for the keys that the query at `position` does not see, and behind the last key up to a whole vector.
  void mask_row(const Task& task, int64_t position, int64_t key, int keys, float* score) const {
    Int lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    const int32_t* spans = p_.spans ? p_.spans + task.sequence * p_.span_stride : nullptr;
    const int32_t low =
        p_.window_size > 0 ? static_cast<int32_t>(std::max<int64_t>(-1, position - p_.window_size - key)) : -1;
    for (int j = 0; j < keys; j += kLanes) {
      const Int index = lane + j;
      Int visible = index <= static_cast<int32_t>(position - key);
      if (spans && spans[position] >= 0) {
        Int same{};
        for (int i = 0; i < std::min(kLanes, keys - j); ++i) same[i] = -(spans[key + j + i] == spans[position]);
        visible |= same;
      }
      visible &= (index > low) & (index < keys);
      store(score + j, select(visible, load(score + j), broadcast(-kInfinity)));
    }
  }

  /// Adds up the parts of a task (their maxima may differ) and writes its rows of the output.
  void finish(const Task& task, Partial* parts, int64_t count) const {
    for (int64_t r = 0; r < rows_of(task); ++r) {
      float maximum = -kInfinity, sum = 0;
      for (int64_t i = 0; i < count; ++i) maximum = std::max(maximum, parts[i].maximum[r]);
      for (int64_t i = 0; i < count; ++i) {
        float& weight = parts[i].maximum[r];  // from here on the part's weight
        weight = exp2(broadcast((weight - maximum) * p_.softmax_scale * kLog2E))[0];
        sum += weight * reduce_add(load(parts[i].sums + r * kLanes));
      }
      const auto [token, head] = locate_row(task, r);
      T* out = static_cast<T*>(p_.out) + (token * p_.query_heads + head) * size_;
      for_each_vector(size_, [&](int64_t e, auto n) {
        Vec v{};
        for (int64_t i = 0; i < count; ++i) v += load(parts[i].values + r * value_stride_ + e, n) * parts[i].maximum[r];
        store(out + e, v * (1.0f / sum), n);
      });
    }
  }

  const Attention& p_;
  const int64_t size_, group_, key_lanes_, key_depth_, value_stride_;
};

}  // namespace

void attention(const Attention& p, const Threads& threads) {
  if (p.dtype == DType::kFloat32) return Kernel<float>(p).run(threads);
  Kernel<bf16>(p).run(threads);
}

}  // namespace pop::cpu::POP_ISA
