// Compiled once for each instruction set, with EMBAX_ISA naming it. The standard library's templates are kept out of this file and
// of the headers that are compiled with it: what is not inlined would be merged across the instruction sets by the linker, and
// run on processors that lack them.
#include "kernels/rows.h"

#include <cmath>
#include <cstring>

#include "kernels/optimizers.h"
#include "kernels/partitions.h"
#include "kernels/prefetch.h"
#include "kernels/row_order.h"
#include "kernels/sample_rows.h"

namespace embax {
namespace EMBAX_ISA {
namespace {

template <int kDim>
inline __attribute__((always_inline)) void PrefetchRow(const float* row, int64_t dim) {
  PrefetchBytes(row, Length<kDim>(dim) * static_cast<int64_t>(sizeof(float)));
}

template <int kDim, bool kQuantize>
void LookupMinibatch(const LookupTask& t, const Entries& entries) {
  const int64_t dim = Length<kDim>(t.dim);
  const float inverse_step = kQuantize ? 1.0f / t.quantization.step : 0.0f;
  SampleRows outs(t.features, t.num_features, t.sparsecore, dim);
  ForEachPartition(t, entries, [&](int64_t partition, int64_t begin, int64_t end) __attribute__((always_inline)) {
    const float* table = t.table + partition * t.partition_stride * dim;
    const auto prefetch = [&](int64_t e) __attribute__((always_inline)) {
      if (e < end && InRange(entries.ids[e], t.rows_per_partition)) PrefetchRow<kDim>(table + entries.ids[e] * dim, dim);
    };
    for (int64_t e = begin; e < begin + kPrefetchAhead; ++e) prefetch(e);
    for (int64_t e = begin; e < end; ++e) {
      prefetch(e + kPrefetchAhead);
      const int32_t id = entries.ids[e], sample = entries.samples[e];
      if (!InRange(id, t.rows_per_partition) || !outs.Has(sample)) continue;
      const float* __restrict row = table + id * dim;
      float* __restrict out = outs.Of(sample, dim);
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
  });
}

template <int kDim, bool kQuantize>
void LookupRows(const LookupTask& t) {
  const int64_t dim = Length<kDim>(t.dim);
  for (int64_t k = 0; k < t.num_features; ++k) {
    const Range rows = RowsOnSparseCore(t.features[k], t.sparsecore);
    if (rows.size() > 0) std::memset(t.features[k].data + rows.begin * dim, 0, sizeof(float) * rows.size() * dim);
  }
  for (int64_t m = 0; m < t.num_minibatches; ++m) LookupMinibatch<kDim, kQuantize>(t, t.minibatches[m]);
}

// Puts the entries that name rows and samples which exist in the order of these samples: behind this those of a sample lie between
// its start and its end. False if there are more of them than said. If somebody changes the arrays meanwhile, which are gone
// through twice, entries are lost, no more.
inline bool OrderSamples(const LookupTask& t) {
  const SampleScratch& scratch = t.scratch;
  const auto for_each = [&](auto use) __attribute__((always_inline)) {
    for (int64_t m = 0; m < t.num_minibatches; ++m) {
      const Entries& entries = t.minibatches[m];
      ForEachPartition(t, entries, [&](int64_t partition, int64_t begin, int64_t end) __attribute__((always_inline)) {
        for (int64_t e = begin; e < end; ++e) {
          const int32_t id = entries.ids[e];
          const int64_t sample = entries.samples[e] - t.first_sample;
          if (InRange(id, t.rows_per_partition) && sample >= 0 && sample < t.num_samples) {
            use(sample, partition * t.partition_stride + id, entries.gains[e]);
          }
        }
      });
    }
  };
  std::memset(scratch.starts, 0, sizeof(uint32_t) * (t.num_samples + 1));
  for_each([&](int64_t sample, int64_t, float) __attribute__((always_inline)) { ++scratch.starts[sample + 1]; });
  for (int64_t sample = 0; sample < t.num_samples; ++sample) {
    scratch.ends[sample] = scratch.starts[sample];
    scratch.starts[sample + 1] += scratch.starts[sample];
  }
  if (scratch.starts[t.num_samples] > scratch.count) return false;
  for_each([&](int64_t sample, int64_t row, float gain) __attribute__((always_inline)) {
    const uint32_t place = scratch.ends[sample];
    if (place == scratch.starts[sample + 1]) return;
    scratch.entries[place] = {static_cast<uint32_t>(row), gain};
    scratch.ends[sample] = place + 1;
  });
  return true;
}

template <int kDim>
void LookupSamples(const LookupTask& t) {
  if (!OrderSamples(t)) return LookupRows<kDim, false>(t);
  const int64_t dim = Length<kDim>(t.dim);
  const SampleScratch::Entry* const entries = t.scratch.entries;
  const int64_t num_entries = t.scratch.starts[t.num_samples];
  const auto prefetch = [&](int64_t e) __attribute__((always_inline)) {
    if (e < num_entries) PrefetchRow<kDim>(t.table + entries[e].row * dim, dim);
  };
  for (int64_t e = 0; e < kPrefetchAhead; ++e) prefetch(e);
  float of_constant_length[kDim > 0 ? kDim : 1];  // Which the compiler keeps in registers.
  float* __restrict const sum = kDim > 0 ? of_constant_length : t.scratch.sum;
  for (int64_t k = 0; k < t.num_features; ++k) {
    const FeatureRows& feature = t.features[k];
    const Range rows = RowsOnSparseCore(feature, t.sparsecore);
    for (int64_t number = 0; number < rows.size(); ++number) {
      const int64_t sample = feature.begin - t.first_sample + number;
      EMBAX_SIMD_LOOP
      for (int64_t i = 0; i < dim; ++i) sum[i] = 0;
      for (int64_t e = t.scratch.starts[sample]; e < t.scratch.ends[sample]; ++e) {
        prefetch(e + kPrefetchAhead);
        const float* __restrict row = t.table + entries[e].row * dim;
        const float gain = entries[e].gain;
        EMBAX_SIMD_LOOP
        for (int64_t i = 0; i < dim; ++i) sum[i] += gain * row[i];
      }
      float* __restrict out = feature.data + (rows.begin + number) * dim;
      EMBAX_SIMD_LOOP
      for (int64_t i = 0; i < dim; ++i) out[i] = sum[i];
    }
  }
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

int64_t ListRows(const ListTask& t) {
  const RowOrder order = OrderRows(t, [&](const Entries& entries, int64_t) {
    return [&](int64_t e, uint64_t& what, uint32_t) {
      what = t.slots == nullptr ? 0 : static_cast<uint64_t>(entries.ids - t.ids_base + e);
      return InRange(entries.samples[e], t.num_samples);
    };
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

// The entries of a partition that have a gradient: what is known of each is its address, and in the scratch its gain.
inline RowOrder OrderGradients(const GradientTask& t) {
  return OrderRows(t, [&](const Entries& source, int64_t sparsecore) {
    return [samples = source.samples, from = source.gains, gains = t.scratch.gains, dim = t.dim,
            rows = SampleRows(t.gradients, t.num_features, sparsecore, t.dim)](int64_t e, uint64_t& what, uint32_t n) mutable {
      const int32_t sample = samples[e];  // Read once: somebody may change it meanwhile.
      const bool has_row = rows.Has(sample);
      what = has_row ? reinterpret_cast<uintptr_t>(rows.Of(sample, dim)) : 0;
      gains[n] = from[e];
      return has_row;
    };
  });
}

inline const float* GradientOf(const RowOrder& order, int64_t i) { return reinterpret_cast<const float*>(order.of(i)); }

// Asks for the gradient that the i-th entry names, if there is one.
template <int kDim>
inline __attribute__((always_inline)) void PrefetchGradient(const GradientTask& t, const RowOrder& order, int64_t i) {
  if (i < order.num_entries) PrefetchRow<kDim>(GradientOf(order, i), Length<kDim>(t.dim));
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
    const float* __restrict gradient = GradientOf(order, i);
    const float gain = t.scratch.gains[order.entry(i)];
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
  if (t.scratch.entries != nullptr) return t.dim == 128 ? LookupSamples<128>(t) : LookupSamples<0>(t);
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
