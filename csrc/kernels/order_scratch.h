// The memory that the row loops put entries in order in.
#ifndef EMBAX_KERNELS_ORDER_SCRATCH_H_
#define EMBAX_KERNELS_ORDER_SCRATCH_H_

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "core/pack.h"
#include "kernels/rows.h"

namespace embax {

// Memory of one thread, for one task at a time. It is kept for the next task, unless it is large.
class PartitionScratch {
 public:
  static PartitionScratch& OfThread() {
    thread_local PartitionScratch scratch;
    return scratch;
  }

  // Gives memory to a task, whose other fields are set, for rows of `dim` columns. Throws std::bad_alloc, and std::length_error
  // for more entries than 32 bits can number.
  void Serve(PartitionTask& task, const RowKernels& kernels, int64_t dim = 0) {
    const int64_t entries = kernels.count_entries(task);
    if (entries >= UINT32_MAX) throw std::length_error("a partition has more entries than 2**32 - 2; use smaller batches");
    const int64_t keys = entries + 1;
    Shrink();
    uint64_t* memory = numbers_.Reserve(3 * keys);
    float* const floats = floats_.Reserve(keys + dim);
    task.scratch = {entries, memory, memory + keys, memory + 2 * keys, ends_.Reserve(task.num_sources), floats, floats + keys};
  }

 private:
  void Shrink() {
    numbers_.Shrink(int64_t{8} << 20);
    floats_.Shrink(int64_t{2} << 20);
  }

  Buffer<uint64_t> numbers_;
  Buffer<uint32_t> ends_;
  Buffer<float> floats_;
};

// Memory of one thread for lookups in the order of samples.
class LookupScratch {
 public:
  static LookupScratch& OfThread() {
    thread_local LookupScratch scratch;
    return scratch;
  }

  // Gives memory to a task, whose other fields are set, if that order is the faster one for its stack, which has so many samples
  // on a SparseCore. Throws std::bad_alloc.
  void Serve(LookupTask& task, int64_t samples_per_sparsecore, int64_t table_rows) {
    // The order of rows reads and writes a sum for each entry, rows in a row where they are the same; this one does so for each
    // sample, after entries were moved.
    constexpr int64_t kFewestColumns = 128, kFewestEntriesPerSample = 4;
    int64_t count = 0;
    for (int64_t m = 0; m < task.num_minibatches; ++m) count += MostEntries(task.minibatches[m], task.num_partitions);
    if (task.dim < kFewestColumns || count < kFewestEntriesPerSample * samples_per_sparsecore || count >= UINT32_MAX ||
        table_rows > UINT32_MAX) {
      return;
    }
    entries_.Shrink(int64_t{8} << 20);
    uint32_t* const starts = places_.Reserve(2 * task.num_samples + 1);
    task.scratch = {entries_.Reserve(count), count, starts, starts + task.num_samples + 1, sum_.Reserve(task.dim)};
  }

 private:
  static int64_t MostEntries(const Entries& entries, int64_t num_partitions) {
    int64_t end = entries.begin;
    for (int64_t partition = 0; partition < num_partitions; ++partition) {
      end = std::max(end, std::min<int64_t>(entries.row_pointers[partition], entries.capacity));
    }
    return end - entries.begin;
  }

  Buffer<SampleScratch::Entry> entries_;
  Buffer<uint32_t> places_;
  Buffer<float> sum_;
};

}  // namespace embax

#endif  // EMBAX_KERNELS_ORDER_SCRATCH_H_
