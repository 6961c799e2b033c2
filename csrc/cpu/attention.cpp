#include "pop/attention.h"

#include <vector>

#include "cpu/attention_values.h"
#include "cpu/head.h"

namespace pop::cpu::POP_ISA {
namespace {

// Flash attention on the main loop of gemm.h. A task is some query tokens of a sequence with one key/value head; its
// rows are those tokens' query heads of the group, so that keys and values, packed once per task, serve them all. Keys
// pass by in blocks: scores of six rows, their running softmax, and the weighted values, all in cache. With few queries
// (decode) a task takes all heads, so that the cache is read as it lies, one block ahead; and where tasks are fewer
// than threads would have, they share the context out.

constexpr int64_t kTaskRows = 384;
template <typename T>
constexpr int64_t kBlockKeys = kTiles<T> ? 128 : 256;  // scores and probs of kTileRows<T> rows stay in L1
// Lanes of k in a block of a score's sum: a score's error is a relative error of its probability.
template <typename T>
constexpr int64_t kScoreLanes = std::is_same_v<T, float> ? 16 : kSumLanes;
constexpr int64_t kBlockKeysAllHeads = 64;
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
  static int64_t floats(int64_t rows, int64_t value_stride) { return rows * (1 + kLanes + value_stride); }
  Partial(float* data, int64_t rows, int64_t stride)
      : maximum(data), sums(data + rows), values(data + rows * (1 + kLanes)), value_stride(stride) {}
  void advance(int64_t rows) { maximum += rows, sums += rows * kLanes, values += rows * value_stride; }
};

constexpr float kInfinity = __builtin_inff();

/// Some keys of one head with their values: where they lie, and packed for multiply_tile unless they are read there.
template <typename T>
struct KeyBlock {
  int64_t first;
  int count;
  bool packed;
  const T* keys[kBlockKeys<T>];
  const T* values[kBlockKeys<T>];
  float *key_panels, *value_panels;
  static constexpr int64_t kValueLanes = lanes_of<T>(kBlockKeys<T>);
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
    for (int64_t i = 0; i < count; ++i) {
      std::vector<Partial> parts;
      for (int64_t split = 0; split < splits; ++split) parts.push_back(partial(i, split));
      finish(tasks[i], parts.data(), splits);
    }
  }

 private:
  std::vector<Task> plan() const {
    std::vector<Task> tasks;
    const int64_t step = std::max<int64_t>(1, kTaskRows / group_);
    for (int64_t s = 0; s < p_.sequences; ++s) {
      const int64_t queries = p_.cu_seqlens_q[s + 1] - p_.cu_seqlens_q[s], context = p_.seqlens_k[s];
      const int64_t heads = queries * p_.query_heads <= kTaskRows ? p_.key_cache.heads : 1;
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
    const T* rows[kBlockKeys<T>];
    locate(cache, task, task.first_head, first, count, rows);
    for (int j = 0; j < count; ++j)
      for (int64_t h = 0; h < task.heads; ++h)
        for (int64_t e = 0; e < size_; e += 64 / sizeof(T)) __builtin_prefetch(rows[j] + h * cache.head_stride + e);
  }

  void accumulate(const Task& task, int64_t first_key, int64_t last_key, Partial state) const {
    struct QueryTag;
    struct KeyTag;
    struct ValueTag;
    const int64_t rows = rows_of(task), head_rows = task.queries * group_;
    KeyBlock<T> keys;
    keys.packed = head_rows > kDirectRows;
    const int64_t query_stride = kConverted<T> && !keys.packed ? round_up(size_, 2 * kLanes) : key_lanes_ * kPerLane<T>;
    Factor<T>* query = scratch<QueryTag, Factor<T>>((rows + tile::kRows) * query_stride);
    gather_queries(task, query, query_stride, !keys.packed);
    std::fill_n(state.maximum, rows, -kInfinity);
    std::fill_n(state.sums, rows * kLanes, 0.0f);
    std::fill_n(state.values, rows * value_stride_, 0.0f);

    if (keys.packed) {
      keys.key_panels = scratch<KeyTag, float>(kBlockKeys<T> * key_depth_);
      keys.value_panels = scratch<ValueTag, float>(value_stride_ * keys.kValueLanes);
    }
    const int64_t block = task.heads > 1 ? kBlockKeysAllHeads : kBlockKeys<T>;
    const auto keys_from = [&](int64_t key) { return static_cast<int>(std::clamp<int64_t>(last_key - key, 0, block)); };
    const auto prefetch_from = [&](int64_t key) {
      prefetch(p_.key_cache, task, key, keys_from(key));
      prefetch(p_.value_cache, task, key, keys_from(key));
    };
    prefetch_from(first_key);
    for (int64_t key = first_key; key < last_key; key += block) {
      keys.first = key, keys.count = keys_from(key);
      if (key + block < last_key) prefetch_from(key + block);
      Partial head_state = state;
      for (int64_t h = 0; h < task.heads; ++h, head_state.advance(head_rows)) {
        locate(p_.key_cache, task, task.first_head + h, key, keys.count, keys.keys);
        locate(p_.value_cache, task, task.first_head + h, key, keys.count, keys.values);
        if (keys.packed) pack(keys);
        for (int64_t r = 0; r < head_rows; r += kTileRows<T>)
          step(task, head_state, r, static_cast<int>(std::min<int64_t>(kTileRows<T>, head_rows - r)),
               query + (h * head_rows + r) * query_stride, query_stride, keys);
      }
    }
  }

  void pack(const KeyBlock<T>& keys) const {
    for (int j = 0; j < keys.count; j += kTileColumns)
      pack_panel<T>(keys.keys + j, std::min(kTileColumns, keys.count - j), size_, keys.key_panels + j * key_depth_,
                    kTileColumns);
    const T* values[kBlockKeys<T>];
    for (int64_t e = 0; e < size_; e += kTileColumns) {
      for (int j = 0; j < keys.count; ++j) values[j] = keys.values[j] + e;
      pack_values<T>(values, keys.count, std::min<int64_t>(kTileColumns, size_ - e),
                     keys.value_panels + e * keys.kValueLanes, kTileColumns);
    }
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

  /// Rows [r, r + count) of one head meet a block of keys.
  void step(const Task& task, Partial state, int64_t r, int count, const Factor<T>* query, int64_t query_stride,
            const KeyBlock<T>& block) const {
    const int64_t base = p_.seqlens_k[task.sequence] -
                         (p_.cu_seqlens_q[task.sequence + 1] - p_.cu_seqlens_q[task.sequence]) + task.first_query;
    const int64_t first = base + r / group_, last = base + (r + count - 1) / group_;  // positions of the rows
    const int64_t key = block.first;
    const int keys = p_.spans ? block.count : static_cast<int>(std::min<int64_t>(block.count, last - key + 1));
    if (keys <= 0 || (p_.window_size > 0 && key + keys - 1 <= first - p_.window_size)) return;

    constexpr int64_t kStride = kBlockKeys<T>;
    alignas(64) float scores[kTileRows<T> * kStride], rescale[round_up(kTileRows<T>, kLanes)] = {};
    if (block.packed) {
      for (int j = 0; j < keys; j += kTileColumns)
        multiply_tile<T>(count, std::min(kTileColumns, keys - j), query, query_stride,
                         block.key_panels + j * key_depth_, kTileColumns, key_lanes_, nullptr, scores + j, kStride,
                         kScoreLanes<T>);
    } else {
      multiply_dots<T>(count, keys, query, query_stride, block.keys, size_, scores, kStride);
    }
    const bool all_visible = !p_.spans && keys % kLanes == 0 && key + keys - 1 <= first &&
                             (p_.window_size == 0 || key > last - p_.window_size);
    if (!all_visible)
      for (int i = 0; i < count; ++i) mask(task, base + (r + i) / group_, key, keys, scores + i * kStride);

    if (!block.packed) {
      softmax(state, r, count, keys, scores, scores, rescale);
      add_weighted(count, keys, scores, block.values, rescale, state.values + r * value_stride_);
      return;
    }
    alignas(64) Factor<T> probs[kTileRows<T> * kStride];
    softmax(state, r, count, keys, scores, probs, rescale);
    for (int64_t e = 0; e < size_; e += kTileColumns)
      multiply_tile<T>(count, static_cast<int>(std::min<int64_t>(kTileColumns, size_ - e)), probs, kStride,
                       block.value_panels + e * block.kValueLanes, kTileColumns, lanes_of<T>(keys), rescale,
                       state.values + r * value_stride_ + e, value_stride_);
  }

  /// From scores to the keys' unnormalised probabilities. Updates the rows' maxima and sums; what the rows have summed
  /// so far is to be multiplied by `rescale`.
  template <typename Prob>
  void softmax(Partial state, int64_t r, int count, int keys, const float* scores, Prob* probs, float* rescale) const {
    constexpr int64_t kStride = kBlockKeys<T>;
    const float scale = p_.softmax_scale * kLog2E;
    float row_max[kTileRows<T>];
    for (int i = 0; i < count; ++i) {
      const float* score = scores + i * kStride;
      Vec top = load(score);
      for (int j = kLanes; j < keys; j += kLanes) top = max(top, load(score + j));
      const float before = state.maximum[r + i], maximum = std::max(before, reduce_max(top));
      state.maximum[r + i] = maximum;
      row_max[i] = maximum == -kInfinity ? 0.0f : maximum;
      rescale[i] = (before - row_max[i]) * scale;
    }
    for (int i = 0; i < count; i += kLanes) store(rescale + i, exp2(load(rescale + i)));
    for (int i = 0; i < count; ++i) {
      const float* score = scores + i * kStride;
      Vec sum = load(state.sums + (r + i) * kLanes) * rescale[i];
      for (int j = 0; j < keys; j += kLanes) {
        const Vec prob = exp2((load(score + j) - row_max[i]) * scale);  // in this order: at the maximum exactly 1
        sum += prob;
        store(probs + i * kStride + j, prob);
      }
      store(state.sums + (r + i) * kLanes, sum);
    }
  }

  void add_weighted(int count, int keys, const float* probs, const T* const* values, const float* rescale,
                    float* sums) const {
    static constexpr decltype(&add_values<T, 1>) kAddValues[] = {add_values<T, 1>, add_values<T, 2>, add_values<T, 3>,
                                                                 add_values<T, 4>};
    for (int r = 0; r < count; r += 4)
      kAddValues[std::min(4, count - r) - 1](probs + r * kBlockKeys<T>, kBlockKeys<T>, keys, values, size_, rescale + r,
                                             sums + r * value_stride_, value_stride_);
  }

  /// -inf for the keys that the query at `position` does not see, and behind the last key up to a whole vector.
  void mask(const Task& task, int64_t position, int64_t key, int keys, float* score) const {
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
