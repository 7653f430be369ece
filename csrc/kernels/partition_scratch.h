// The memory that the row loops put the entries of a partition in order in.
#ifndef EMBAX_KERNELS_PARTITION_SCRATCH_H_
#define EMBAX_KERNELS_PARTITION_SCRATCH_H_

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
  // for more entries or samples than 32 bits can number.
  void Serve(PartitionTask& task, const RowKernels& kernels, int64_t dim = 0) {
    const int64_t entries = kernels.count_entries(task);
    if (entries >= UINT32_MAX || task.num_samples * (task.num_sources / task.num_minibatches) > UINT32_MAX) {
      throw std::length_error("a partition has more entries, or a stack more samples, than 2**32 - 2; use smaller batches");
    }
    const int64_t keys = entries + 1;
    Shrink();
    uint64_t* memory = numbers_.Reserve(3 * keys);
    task.scratch = {memory, memory + keys, memory + 2 * keys, ends_.Reserve(task.num_sources), sum_.Reserve(dim)};
  }

 private:
  void Shrink() { numbers_.Shrink(int64_t{8} << 20); }

  Buffer<uint64_t> numbers_;
  Buffer<uint32_t> ends_;
  Buffer<float> sum_;
};

}  // namespace embax

#endif  // EMBAX_KERNELS_PARTITION_SCRATCH_H_
