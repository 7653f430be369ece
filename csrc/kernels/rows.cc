// Compiled once for each instruction set, with EMBAX_ISA naming it.
#include "kernels/rows.h"

#include <cmath>
#include <cstring>

#include "core/format.h"
#include "kernels/optimizers.h"
#include "kernels/prefetch.h"

namespace embax {
namespace EMBAX_ISA {
namespace {

// The standard library's templates are kept out of this file: what is not inlined would be merged across the instruction
// sets by the linker, and run on processors that lack them.
inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t Clamp(int64_t value, int64_t low, int64_t high) { return value < low ? low : Min(value, high); }

template <int kDim>
inline __attribute__((always_inline)) void PrefetchRow(const float* row, int64_t dim) {
  PrefetchBytes(row, Length<kDim>(dim) * static_cast<int64_t>(sizeof(float)));
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
    const auto prefetch = [&](int64_t e) __attribute__((always_inline)) {
      if (e < end && InRange(entries.ids[e], t.rows_per_partition)) PrefetchRow<kDim>(table + entries.ids[e] * dim, dim);
    };
    for (int64_t e = begin; e < begin + kPrefetchAhead; ++e) prefetch(e);
    for (int64_t e = begin; e < end; ++e) {
      prefetch(e + kPrefetchAhead);
      const int32_t id = entries.ids[e], sample = entries.samples[e];
      if (!InRange(id, t.rows_per_partition) || !InRange(sample, t.num_samples)) continue;
      const float* __restrict row = table + id * dim;
      float* __restrict out = t.out + sample * dim;
      const float gain = entries.gains[e];
      if constexpr (kQuantize) {
        const Quantization q = t.quantization;
        EMBAX_SIMD_LOOP
        for (int64_t i = 0; i < dim; ++i) {
          const float clipped = row[i] < q.min ? q.min : row[i] > q.max ? q.max : row[i];
          out[i] += gain * (__builtin_nearbyintf((clipped - q.min) * inverse_step) * q.step + q.min);
        }
      } else {
        EMBAX_SIMD_LOOP
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
    EMBAX_SIMD_LOOP
    for (int64_t i = 0; i < dim; ++i) g[i] = g[i] < -limit ? -limit : g[i] > limit ? limit : g[i];
  }
  if (options.clip_norm < HUGE_VALF) {
    float largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < dim; ++i) {
      const float size = std::fabs(g[i]);
      if (size > largest) largest = size;
    }
    // A power of two that keeps the squares from overflow, and those that matter from vanishing.
    const float factor = largest > 0x1p60f ? 0x1p-70f : largest < 0x1p-60f ? 0x1p70f : 1.0f;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < dim; ++i) sum += g[i] * factor * (g[i] * factor);
    const float norm = std::sqrt(sum);
    if (norm > options.clip_norm * factor) {
      EMBAX_SIMD_LOOP
      for (int64_t i = 0; i < dim; ++i) g[i] = g[i] * factor * (options.clip_norm / norm);
    }
  }
  if (options.l2 != 0) {
    EMBAX_SIMD_LOOP
    for (int64_t i = 0; i < dim; ++i) g[i] += options.l2 * w[i];
  }
  if (options.decay != 0) {
    EMBAX_SIMD_LOOP
    for (int64_t i = 0; i < dim; ++i) w[i] -= options.decay * w[i];
  }
}

// The entries of a partition that name rows and samples which exist, in the order of the rows, and of the sources where rows
// are the same. `key` is the row and in its low half the number of an entry as it was gathered, `what` is known of that number.
struct RowOrder {
  const uint64_t* keys;
  const uint64_t* what;
  const uint32_t* starts;  // [num_rows + 1]: where each row begins among the keys.
  int64_t num_rows, num_entries;

  int32_t row(int64_t number) const { return static_cast<int32_t>(keys[starts[number]] >> 32); }
  uint64_t of(int64_t i) const { return what[static_cast<uint32_t>(keys[i])]; }
};

// Two ascending runs that are being merged.
struct Merge {
  const uint64_t *a, *a_end, *b, *b_end;
  uint64_t* out;

  bool both() const { return a != a_end && b != b_end; }

  // Takes the lesser of the next two, without a branch.
  void Step() {
    const uint64_t x = *a, y = *b;
    const bool second = y < x;
    *out++ = second ? y : x;
    b += second;
    a += !second;
  }

  void Finish() {
    while (both()) Step();
    while (a != a_end) *out++ = *a++;
    while (b != b_end) *out++ = *b++;
  }
};

// Merges two ascending runs of different numbers. Each step waits for the one before it, so two halves are merged at once.
inline void MergeRuns(const uint64_t* a, const uint64_t* a_end, const uint64_t* b, const uint64_t* b_end, uint64_t* out) {
  // The first half is of the first `of_a` numbers of a, and of b.
  const int64_t half = ((a_end - a) + (b_end - b)) / 2;
  int64_t of_a = half - Min(half, b_end - b), most = Min(half, a_end - a);
  while (of_a < most) {
    const int64_t middle = (of_a + most) / 2;
    const bool more = a[middle] < b[half - middle - 1];
    of_a = more ? middle + 1 : of_a;
    most = more ? most : middle;
  }
  const uint64_t *a_half = a + of_a, *b_half = b + (half - of_a);
  Merge first = {a, a_half, b, b_half, out}, second = {a_half, a_end, b_half, b_end, out + half};
  while (first.both() && second.both()) {
    first.Step();
    second.Step();
  }
  first.Finish();
  second.Finish();
}

struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// The first entry of sorted ones with at least this id.
inline int64_t FirstAtLeast(const int32_t* ids, Range range, int64_t id) {
  int64_t begin = range.begin;
  for (int64_t size = range.size(); size > 0;) {
    const int64_t half = size / 2;
    const bool below = ids[begin + half] < id;
    begin += below ? half + 1 : 0;
    size = below ? size - half - 1 : half;
  }
  return begin;
}

// The entries of a source in a partition.
inline Range InPartition(const PartitionTask& t, const Entries& entries) {
  const int64_t begin = PartitionBegin(entries, t.partition);
  return {begin, PartitionEnd(entries, t.partition, begin)};
}

// The rows of the task's part. Parts are cut at ids of the source that has most entries, and never overlap, whatever these are.
Range RowsOf(const PartitionTask& t) {
  if (t.num_parts == 1) return {0, t.rows_per_partition};
  const int32_t* ids = nullptr;
  Range most = {0, 0};
  for (int64_t s = 0; s < t.num_sources; ++s) {
    const Range range = InPartition(t, t.entries[s]);
    if (range.size() <= most.size()) continue;
    most = range;
    ids = t.entries[s].ids;
  }
  Range rows = {0, 0};
  for (int64_t part = 0; part <= t.part; ++part) {
    rows.begin = rows.end;
    const bool last = part + 1 == t.num_parts || ids == nullptr;
    const int64_t cut = last ? t.rows_per_partition : ids[most.begin + most.size() * (part + 1) / t.num_parts];
    rows.end = Clamp(cut, rows.begin, t.rows_per_partition);
  }
  return rows;
}

// The entries of a source that name rows of a part.
inline Range InPart(const PartitionTask& t, const Entries& entries, Range rows) {
  const Range range = InPartition(t, entries);
  if (t.num_parts == 1) return range;
  const int64_t begin = FirstAtLeast(entries.ids, range, rows.begin);
  return {begin, FirstAtLeast(entries.ids, {begin, range.end}, rows.end)};
}

int64_t CountEntries(const PartitionTask& t) {
  const Range rows = RowsOf(t);
  int64_t count = 0;
  for (int64_t s = 0; s < t.num_sources; ++s) count += InPart(t, t.entries[s], rows).size();
  return count;
}

// Puts the entries of a partition in order; `describe(entries, first_sample, e)` is what is to be known of each. The samples of
// a source count from `first_sample` among those of the device.
template <typename Describe>
inline __attribute__((always_inline)) RowOrder OrderRows(const PartitionTask& t, Describe describe) {
  uint64_t* keys = t.scratch.keys;
  uint64_t* other = t.scratch.other_keys;
  uint64_t* what = t.scratch.what;
  uint32_t* ends = t.scratch.ends;
  const Range part = RowsOf(t);
  uint32_t n = 0;
  int64_t runs = 0;
  for (int64_t s = 0; s < t.num_sources; ++s) {
    const Entries& entries = t.entries[s];
    const Range range = InPart(t, entries, part);
    const int64_t first_sample = s / t.num_minibatches * t.num_samples;
    const uint32_t first = n;
    for (int64_t e = range.begin; e < range.end; ++e) {
      const bool valid = entries.ids[e] >= part.begin && entries.ids[e] < part.end && InRange(entries.samples[e], t.num_samples);
      keys[n] = static_cast<uint64_t>(static_cast<uint32_t>(entries.ids[e])) << 32 | n;
      what[n] = describe(entries, first_sample, e);
      n += valid;
    }
    if (n != first) ends[runs++] = n;
  }
  while (runs > 1) {
    int64_t merged = 0;
    uint32_t begin = 0;
    for (int64_t r = 0; r < runs; r += 2) {
      const uint32_t middle = ends[r], end = r + 1 < runs ? ends[r + 1] : middle;
      MergeRuns(keys + begin, keys + middle, keys + middle, keys + end, other + begin);
      ends[merged++] = begin = end;
    }
    runs = merged;
    uint64_t* const swapped = keys;
    keys = other;
    other = swapped;
  }
  uint32_t* starts = reinterpret_cast<uint32_t*>(other);
  int64_t rows = 0;
  starts[0] = 0;
  if (n > 0) keys[n] = ~keys[n - 1];  // Of another row than the last one.
  for (uint32_t i = 0; i < n; ++i) {
    starts[rows + 1] = i + 1;
    rows += keys[i] >> 32 != keys[i + 1] >> 32;
  }
  return {keys, what, starts, rows, n};
}

int64_t ListRows(const ListTask& t) {
  const RowOrder order = OrderRows(t, [&](const Entries& entries, int64_t, int64_t e) {
    return t.slots == nullptr ? 0 : static_cast<uint64_t>(entries.ids - t.ids_base + e);
  });
  int64_t count = 0;
  int32_t last = -1;
  for (int64_t number = 0; number < order.num_rows && count < t.max_rows; ++number) {
    const int32_t row = order.row(number);
    if (row <= last) continue;
    last = row;
    if (t.rows != nullptr) t.rows[count] = t.first_row + row;
    if (t.slots != nullptr) {
      for (uint32_t i = order.starts[number]; i < order.starts[number + 1]; ++i) {
        t.slots[order.of(i)] = static_cast<int32_t>(t.first_slot + count);
      }
    }
    ++count;
  }
  return count;
}

// The entries of a partition with their samples among those of the device, and gains.
inline RowOrder OrderGradients(const GradientTask& t) {
  return OrderRows(t, [](const Entries& entries, int64_t first_sample, int64_t e) {
    uint32_t gain;
    std::memcpy(&gain, entries.gains + e, sizeof(gain));
    return static_cast<uint64_t>(first_sample + entries.samples[e]) << 32 | gain;
  });
}

// Asks for the gradient that the i-th entry names, if there is one.
template <int kDim>
inline __attribute__((always_inline)) void PrefetchGradient(const GradientTask& t, const RowOrder& order, int64_t i) {
  const int64_t dim = Length<kDim>(t.dim);
  if (i < order.num_entries) PrefetchRow<kDim>(t.gradient + static_cast<int64_t>(order.of(i) >> 32) * dim, dim);
}

template <int kDim>
inline __attribute__((always_inline)) void PrefetchFirstGradients(const GradientTask& t, const RowOrder& order) {
  for (int64_t i = 0; i < kPrefetchAhead; ++i) PrefetchGradient<kDim>(t, order, i);
}

// Adds up the gradient of a row.
template <int kDim>
inline __attribute__((always_inline)) void SumGradients(const GradientTask& t, const RowOrder& order, int64_t number,
                                                        float* __restrict sum) {
  const int64_t dim = Length<kDim>(t.dim);
  const int64_t begin = order.starts[number], end = order.starts[number + 1];
  for (int64_t i = begin; i < end; ++i) {
    PrefetchGradient<kDim>(t, order, i + kPrefetchAhead);
    const uint64_t what = order.of(i);
    const float* __restrict gradient = t.gradient + static_cast<int64_t>(what >> 32) * dim;
    const uint32_t bits = static_cast<uint32_t>(what);
    float gain;
    std::memcpy(&gain, &bits, sizeof(gain));
    if (i == begin) {
      EMBAX_SIMD_LOOP
      for (int64_t k = 0; k < dim; ++k) sum[k] = gain * gradient[k];
    } else {
      EMBAX_SIMD_LOOP
      for (int64_t k = 0; k < dim; ++k) sum[k] += gain * gradient[k];
    }
  }
}

template <int kDim>
int64_t SumRows(const SumTask& t) {
  const int64_t dim = Length<kDim>(t.dim);
  const RowOrder order = OrderGradients(t);
  PrefetchFirstGradients<kDim>(t, order);
  int64_t count = 0;
  int32_t last = -1;
  for (int64_t number = 0; number < order.num_rows && count < t.max_rows; ++number) {
    const int32_t row = order.row(number);
    if (row <= last) continue;
    last = row;
    t.rows[count] = t.first_row + row;
    SumGradients<kDim>(t, order, number, t.sums + count * dim);
    ++count;
  }
  return count;
}

template <typename Rule, int kDim>
void UpdateRows(const UpdateTask& t) {
  const int64_t dim = Length<kDim>(t.dim);
  const Rule rule(t.hyperparameters, t.width);
  const RowOptions options = t.options;
  const bool prepares = options.clip_value < HUGE_VALF || options.clip_norm < HUGE_VALF || options.l2 != 0 || options.decay != 0;
  const bool limits = options.min > -HUGE_VALF || options.max < HUGE_VALF;
  const RowOrder order = OrderGradients(t);
  float* const sum = t.scratch.sum;
  const auto prefetch = [&](int64_t number) __attribute__((always_inline)) {
    if (number >= order.num_rows) return;
    const int64_t row = order.row(number);
    for (int k = 0; k <= Rule::kSlots; ++k) {
      if (StateColumns(Rule::kRowWise, k, 0) == 1) {
        Prefetch(t.state[k] + row);
      } else {
        PrefetchRow<kDim>(t.state[k] + row * dim, dim);
      }
    }
  };
  for (int64_t number = 0; number < kPrefetchAhead; ++number) prefetch(number);
  PrefetchFirstGradients<kDim>(t, order);
  for (int64_t number = 0; number < order.num_rows; ++number) {
    prefetch(number + kPrefetchAhead);
    SumGradients<kDim>(t, order, number, sum);
    const int64_t row = order.row(number);
    float* rows[1 + kMaxSlots];
    for (int k = 0; k <= Rule::kSlots; ++k) rows[k] = t.state[k] + row * StateColumns(Rule::kRowWise, k, dim);
    // Columns of padding may hold anything, and a rule of whole rows must not see it.
    if (prepares) PrepareRow(options, sum, rows[0], t.width);
    rule.template Row<kDim>(sum, rows, dim);
    if (limits) {
      float* __restrict w = rows[0];
      EMBAX_SIMD_LOOP
      for (int64_t i = 0; i < t.width; ++i) w[i] = w[i] < options.min ? options.min : w[i] > options.max ? options.max : w[i];
    }
  }
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
const RowKernels kKernels = {EMBAX_STRING(EMBAX_ISA), &Lookup, &CountEntries, &ListRows, &Sum, kRules, sizeof(kRules) / sizeof(kRules[0])};

}  // namespace EMBAX_ISA
}  // namespace embax
