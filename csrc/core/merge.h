// From sorted entries to the merged entries of each partition.
#ifndef EMBAX_CORE_MERGE_H_
#define EMBAX_CORE_MERGE_H_

#include <algorithm>
#include <cstdint>

#include "core/keys.h"
#include "core/scratch.h"

namespace embax {

// The first entry from `begin` on whose key is at least `key`: doubling steps, then bisection, so that many partitions
// cost little more than their entries.
inline int64_t FirstAtLeast(const uint64_t* entries, int64_t begin, int64_t count, uint64_t key) {
  int64_t step = 1, low = begin;
  while (low + step <= count && (entries[low + step - 1] >> 32) < key) {
    low += step;
    step *= 2;
  }
  const int64_t high = std::min(low + step, count);
  return std::partition_point(entries + low, entries + high, [key](uint64_t entry) { return (entry >> 32) < key; }) -
         entries;
}

// Merges equal (key, sample) of one partition into out[0...], adding gains in the order in which they were read. Writing
// over the entries themselves is fine, since `out` is never ahead. With kCount, `multiplicities` tells of how many each one
// was made. Returns how many are left.
template <Gains kGains, bool kCount>
int64_t Merge(const uint64_t* entries, int64_t count, const Scratch& scratch, uint64_t* out, float* out_gains,
              int32_t* multiplicities, int32_t* unique) {
  const float* sample_gains = scratch.sample_gains.data();
  const float* entry_gains = scratch.entry_gains.data();
  const uint32_t* entry_samples = scratch.entry_samples.data();
  int64_t last = -1;
  uint64_t previous = UINT64_MAX;  // No entry: its key is that of padding.
  float gain = 0;
  int32_t distinct = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t entry = entries[i];
    float own = 1;
    if constexpr (kGains == Gains::kSample) own = sample_gains[Payload(entry)];
    if constexpr (kGains == Gains::kEntry) {
      own = entry_gains[Payload(entry)];
      entry = Entry(Key(entry), entry_samples[Payload(entry)]);
    }
    const bool same = entry == previous;
    gain = same ? gain + own : own;
    last += same ? 0 : 1;
    distinct += Key(entry) != Key(previous) ? 1 : 0;
    out[last] = entry;
    out_gains[last] = gain;
    if constexpr (kCount) multiplicities[last] = same ? multiplicities[last] + 1 : 1;
    previous = entry;
  }
  *unique = distinct;
  return last + 1;
}

// For entries that all differ and have gain 1.
inline int32_t CountUnique(const uint64_t* entries, int64_t count) {
  if (count == 0) return 0;
  int32_t distinct = 1;
  for (int64_t i = 1; i < count; ++i) distinct += Key(entries[i]) != Key(entries[i - 1]) ? 1 : 0;
  return distinct;
}

using MergeFunction = decltype(&Merge<Gains::kUnit, false>);

inline MergeFunction MergeFor(Gains gains, bool count) {
  switch (gains) {
    case Gains::kUnit: return count ? &Merge<Gains::kUnit, true> : &Merge<Gains::kUnit, false>;
    case Gains::kSample: return count ? &Merge<Gains::kSample, true> : &Merge<Gains::kSample, false>;
    default: return count ? &Merge<Gains::kEntry, true> : &Merge<Gains::kEntry, false>;
  }
}

}  // namespace embax

#endif  // EMBAX_CORE_MERGE_H_
