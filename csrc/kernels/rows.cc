// Compiled once for each instruction set, with EMBAX_ISA naming it.
#include "kernels/rows.h"

#include <cmath>
#include <cstring>

#include "core/format.h"
#include "kernels/optimizers.h"

namespace embax {
namespace EMBAX_ISA {
namespace {

// Entries that a row is asked for ahead of its use, and the bytes of it: far enough to cover a memory access (about 100 ns)
// with the work on the rows between, near enough to stay in the first level cache.
constexpr int64_t kPrefetchEntries = 8;
constexpr int64_t kCacheLine = 64;
constexpr int64_t kPrefetchBytes = 1024;

// The standard library's templates are kept out of this file: what is not inlined would be merged across the instruction
// sets by the linker, and run on processors that lack them.
inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t Clamp(int64_t value, int64_t low, int64_t high) { return value < low ? low : Min(value, high); }

template <int kDim>
inline void PrefetchRow(const float* row, int64_t dim) {
  const int64_t bytes = Min(Length<kDim>(dim) * static_cast<int64_t>(sizeof(float)), kPrefetchBytes);
  const char* p = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(p + i, 0, 3);
  if (reinterpret_cast<uintptr_t>(p) % kCacheLine) __builtin_prefetch(p + bytes - 1, 0, 3);
}

inline bool InRange(int32_t index, int64_t size) { return static_cast<uint64_t>(static_cast<int64_t>(index)) < static_cast<uint64_t>(size); }

inline int64_t PartitionEnd(const Entries& entries, int64_t partition, int64_t begin) {
  return Clamp(entries.row_pointers[partition], begin, entries.capacity);
}

inline int64_t NextPartition(const Entries& entries, int64_t end) {
  return Min((end + kPartitionAlignment - 1) / kPartitionAlignment * kPartitionAlignment, entries.capacity);
}

// First entry of a partition: the aligned end of the one before it.
inline int64_t PartitionBegin(const Entries& entries, int64_t partition) {
  if (partition == 0) return entries.begin;
  return NextPartition(entries, Clamp(entries.row_pointers[partition - 1], 0, entries.capacity));
}

template <int kDim, bool kQuantize>
void LookupMinibatch(const LookupTask& t, const Entries& entries) {
  const int64_t dim = Length<kDim>(t.dim);
  const float inverse_step = kQuantize ? 1.0f / t.quantization.step : 0.0f;
  for (int64_t partition = 0, begin = entries.begin; partition < t.num_partitions; ++partition) {
    const float* table = t.table + partition * t.partition_stride * dim;
    const int64_t end = PartitionEnd(entries, partition, begin);
    for (int64_t e = begin; e < end; ++e) {
      if (e + kPrefetchEntries < end && InRange(entries.ids[e + kPrefetchEntries], t.rows_per_partition)) {
        PrefetchRow<kDim>(table + entries.ids[e + kPrefetchEntries] * dim, dim);
      }
      const int32_t id = entries.ids[e], sample = entries.samples[e];
      if (!InRange(id, t.rows_per_partition) || !InRange(sample, t.num_samples)) continue;
      const float* __restrict row = table + id * dim;
      float* __restrict out = t.out + sample * dim;
      const float gain = entries.gains[e];
      if constexpr (kQuantize) {
        const Quantization q = t.quantization;
        for (int64_t i = 0; i < dim; ++i) {
          const float clipped = row[i] < q.min ? q.min : row[i] > q.max ? q.max : row[i];
          out[i] += gain * (__builtin_nearbyintf((clipped - q.min) * inverse_step) * q.step + q.min);
        }
      } else {
        for (int64_t i = 0; i < dim; ++i) out[i] += gain * row[i];
      }
    }
    begin = NextPartition(entries, end);
  }
}

template <int kDim, bool kQuantize>
void LookupRows(const LookupTask& t) {
  std::memset(t.out, 0, sizeof(float) * t.num_samples * Length<kDim>(t.dim));
  for (int64_t m = 0; m < t.num_minibatches; ++m) LookupMinibatch<kDim, kQuantize>(t, t.minibatches[m]);
}

// Clips the gradient of a row and adds what its decay asks for (RowOptions).
inline void PrepareRow(const RowOptions& options, float* __restrict g, float* __restrict w, int64_t dim) {
  if (options.clip_value < HUGE_VALF) {
    const float limit = options.clip_value;
    for (int64_t i = 0; i < dim; ++i) g[i] = g[i] < -limit ? -limit : g[i] > limit ? limit : g[i];
  }
  if (options.clip_norm < HUGE_VALF) {
    float largest = 0;
    for (int64_t i = 0; i < dim; ++i) {
      const float size = std::fabs(g[i]);
      if (size > largest) largest = size;
    }
    // A power of two that keeps the squares from overflow, and those that matter from vanishing.
    const float factor = largest > 0x1p60f ? 0x1p-70f : largest < 0x1p-60f ? 0x1p70f : 1.0f;
    float sum = 0;
    for (int64_t i = 0; i < dim; ++i) sum += g[i] * factor * (g[i] * factor);
    const float norm = std::sqrt(sum);
    if (norm > options.clip_norm * factor) {
      for (int64_t i = 0; i < dim; ++i) g[i] = g[i] * factor * (options.clip_norm / norm);
    }
  }
  if (options.l2 != 0) {
    for (int64_t i = 0; i < dim; ++i) g[i] += options.l2 * w[i];
  }
  if (options.decay != 0) {
    for (int64_t i = 0; i < dim; ++i) w[i] -= options.decay * w[i];
  }
}

// Walks through the entries of a partition row by row, in ascending order: `entry(entries, first_sample, e, end, is_first)` for
// each valid entry of a row, those of one source after those of another, and after the last of a row `row(id)`. The samples of
// a source count from `first_sample` among those of the device.
template <typename OnEntry, typename OnRow>
inline __attribute__((always_inline)) void ForEachRow(const PartitionTask& t, OnEntry entry, OnRow row) {
  for (int64_t s = 0; s < t.num_sources; ++s) {
    const int64_t begin = PartitionBegin(t.entries[s], t.partition);
    t.cursors[s] = {begin, PartitionEnd(t.entries[s], t.partition, begin)};
  }
  for (;;) {
    // The entries of each source are sorted by id, so the next row is the smallest id that any of them is at.
    bool found = false;
    int32_t id = INT32_MAX;
    for (int64_t s = 0; s < t.num_sources; ++s) {
      const Cursor cursor = t.cursors[s];
      if (cursor.next == cursor.end) continue;
      const int32_t candidate = t.entries[s].ids[cursor.next];
      if (candidate < id) id = candidate;
      found = true;
    }
    if (!found) return;
    const bool exists = InRange(id, t.rows_per_partition);
    bool touched = false;
    for (int64_t s = 0; s < t.num_sources; ++s) {
      const Entries& entries = t.entries[s];
      const int64_t end = t.cursors[s].end;
      int64_t e = t.cursors[s].next;
      if (e == end || entries.ids[e] != id) continue;
      const int64_t first_sample = s / t.num_minibatches * t.num_samples;
      for (; e < end && entries.ids[e] == id; ++e) {
        if (!exists || !InRange(entries.samples[e], t.num_samples)) continue;
        entry(entries, first_sample, e, end, !touched);
        touched = true;
      }
      t.cursors[s].next = e;
    }
    if (touched) row(id);
  }
}

int64_t ListRows(const ListTask& t) {
  int64_t count = 0;
  int32_t last = -1;
  const auto listed = [&](int32_t id) { return id > last && count < t.max_rows; };
  ForEachRow(
      t,
      [&](const Entries& entries, int64_t, int64_t e, int64_t, bool) {
        if (t.slots != nullptr && listed(entries.ids[e])) {
          t.slots[entries.ids - t.ids_base + e] = static_cast<int32_t>(t.first_slot + count);
        }
      },
      [&](int32_t id) {
        if (!listed(id)) return;
        if (t.rows != nullptr) t.rows[count] = t.first_row + id;
        ++count;
        last = id;
      });
  return count;
}

// Adds an entry to the gradient of its row.
template <int kDim>
inline __attribute__((always_inline)) void AddGradient(const GradientTask& t, const Entries& entries, int64_t first_sample,
                                                       int64_t e, bool is_first) {
  const int64_t dim = Length<kDim>(t.dim);
  const float* __restrict gradient = t.gradient + (first_sample + entries.samples[e]) * dim;
  const float gain = entries.gains[e];
  float* __restrict sum = t.sum;
  if (is_first) {
    for (int64_t i = 0; i < dim; ++i) sum[i] = gain * gradient[i];
  } else {
    for (int64_t i = 0; i < dim; ++i) sum[i] += gain * gradient[i];
  }
}

template <int kDim>
int64_t SumRows(const SumTask& t) {
  const int64_t dim = Length<kDim>(t.dim);
  int64_t count = 0;
  int32_t last = -1;
  ForEachRow(
      t,
      [&](const Entries& entries, int64_t first_sample, int64_t e, int64_t, bool is_first) {
        AddGradient<kDim>(t, entries, first_sample, e, is_first);
      },
      [&](int32_t id) {
        if (id <= last || count == t.max_rows) return;
        last = id;
        t.rows[count] = t.first_row + id;
        float* __restrict out = t.sums + count * dim;
        for (int64_t i = 0; i < dim; ++i) out[i] = t.sum[i];
        ++count;
      });
  return count;
}

template <typename Rule, int kDim>
void UpdateRows(const UpdateTask& t) {
  const int64_t dim = Length<kDim>(t.dim);
  const Rule rule(t.hyperparameters, t.width);
  const RowOptions options = t.options;
  const bool prepares = options.clip_value < HUGE_VALF || options.clip_norm < HUGE_VALF || options.l2 != 0 || options.decay != 0;
  const bool limits = options.min > -HUGE_VALF || options.max < HUGE_VALF;
  const auto prefetch = [&](int64_t id) {
    for (int k = 0; k <= Rule::kSlots; ++k) {
      if (StateColumns(Rule::kRowWise, k, 0) == 1) {
        __builtin_prefetch(t.state[k] + id, 0, 3);
      } else {
        PrefetchRow<kDim>(t.state[k] + id * dim, dim);
      }
    }
  };
  ForEachRow(
      t,
      [&](const Entries& entries, int64_t first_sample, int64_t e, int64_t end, bool is_first) {
        if (e + kPrefetchEntries < end && InRange(entries.ids[e + kPrefetchEntries], t.rows_per_partition)) {
          prefetch(entries.ids[e + kPrefetchEntries]);
        }
        AddGradient<kDim>(t, entries, first_sample, e, is_first);
      },
      [&](int32_t id) {
        float* rows[1 + kMaxSlots];
        for (int k = 0; k <= Rule::kSlots; ++k) rows[k] = t.state[k] + id * StateColumns(Rule::kRowWise, k, dim);
        // Columns of padding may hold anything, and a rule of whole rows must not see it.
        if (prepares) PrepareRow(options, t.sum, rows[0], t.width);
        rule.template Row<kDim>(t.sum, rows, dim);
        if (limits) {
          float* __restrict w = rows[0];
          for (int64_t i = 0; i < t.width; ++i) w[i] = w[i] < options.min ? options.min : w[i] > options.max ? options.max : w[i];
        }
      });
}

// Calls F<kDim> with kDim the length of a row if there is a loop compiled for it, else 0.
#define EMBAX_DISPATCH_DIM(dim, F, ...) \
  switch (dim) {                        \
    case 8: return F<__VA_ARGS__ 8>;    \
    case 16: return F<__VA_ARGS__ 16>;  \
    case 32: return F<__VA_ARGS__ 32>;  \
    case 64: return F<__VA_ARGS__ 64>;  \
    case 128: return F<__VA_ARGS__ 128>; \
    default: return F<__VA_ARGS__ 0>;   \
  }

template <int kDim>
void LookupPlain(const LookupTask& t) { LookupRows<kDim, false>(t); }

using LookupFunction = void (*)(const LookupTask&);
LookupFunction LookupFor(int64_t dim) { EMBAX_DISPATCH_DIM(dim, LookupPlain, ) }

void Lookup(const LookupTask& t) {
  if (t.quantization.step != 0.0f) return LookupRows<0, true>(t);
  LookupFor(t.dim)(t);
}

int64_t Sum(const SumTask& t) {
  using SumFunction = int64_t (*)(const SumTask&);
  const auto choose = [](int64_t dim) -> SumFunction { EMBAX_DISPATCH_DIM(dim, SumRows, ) };
  return choose(t.dim)(t);
}

using UpdateFunction = void (*)(const UpdateTask&);
template <typename Rule>
UpdateFunction UpdateFor(int64_t dim) { EMBAX_DISPATCH_DIM(dim, UpdateRows, Rule, ) }

template <typename Rule>
void Update(const UpdateTask& t) {
  static_assert(Rule::kSlots <= kMaxSlots && Rule::kHyperparameters <= kMaxHyperparameters);
  UpdateFor<Rule>(t.dim)(t);
}

#define EMBAX_RULE(Rule) {Rule::kName, Rule::kSlots, Rule::kRowWise, Rule::kHyperparameters, &Update<Rule>},
constexpr RowRule kRules[] = {EMBAX_ROW_RULES(EMBAX_RULE)};

#define EMBAX_STRING_(x) #x
#define EMBAX_STRING(x) EMBAX_STRING_(x)

}  // namespace

extern const RowKernels kKernels;
const RowKernels kKernels = {EMBAX_STRING(EMBAX_ISA), &Lookup, &ListRows, &Sum, kRules, sizeof(kRules) / sizeof(kRules[0])};

}  // namespace EMBAX_ISA
}  // namespace embax
