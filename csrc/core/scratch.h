// What a task works in, and where the gains of its entries are meanwhile.
#ifndef EMBAX_CORE_SCRATCH_H_
#define EMBAX_CORE_SCRATCH_H_

#include <cstdint>

#include "core/pack.h"

namespace embax {

// A buffer above this is given back to the system rather than kept for the next batch.
constexpr int64_t kMaxKeptBytes = int64_t{64} << 20;

// Where the gain of an entry comes from while it is sorted.
enum class Gains {
  kUnit,       // It is 1. The payload is the sample.
  kSample,     // It depends on the sample alone. The payload is the sample.
  kEntry,      // Each entry has its own. The payload is the number of the entry as it was read.
};

// Memory of one thread, for one task at a time.
struct Scratch {
  Buffer<uint64_t> entries;
  Buffer<uint32_t> histograms;
  Buffer<uint32_t> keys;
  Buffer<float> sample_gains;
  Buffer<float> entry_gains;
  Buffer<uint32_t> entry_samples;
  Buffer<int64_t> positions;
  Buffer<int64_t> targets;

  void Shrink() {
    entries.Shrink(kMaxKeptBytes / 8);
    sample_gains.Shrink(kMaxKeptBytes / 16);
    entry_gains.Shrink(kMaxKeptBytes / 16);
    entry_samples.Shrink(kMaxKeptBytes / 16);
    targets.Shrink(kMaxKeptBytes / 8);
  }
};

inline Scratch& ThreadScratch() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace embax

#endif  // EMBAX_CORE_SCRATCH_H_
