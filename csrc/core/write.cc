// Lays the entries of a sorted batch out in the arrays that lookups read.
#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "core/keys.h"
#include "core/pack.h"
#include "core/pack_tasks.h"

namespace embax {

void SortedBatch::WriteTask(const Task& task, int64_t number, int64_t start, PackLayout layout, const PackTarget& target) const {
  const PackPlacement& placement = target.placements[task.stack];
  const PackArrays& arrays = target.arrays;
  const int64_t num_pointers = std::max(num_sparsecores_, kMinRowPointers);
  int32_t* row_pointers = arrays.row_pointers + task.device * arrays.row_pointers_per_device +
                          placement.row_pointers_start + task.sparsecore * num_minibatches_ * num_pointers;
  const int64_t first = task.device * arrays.entries_per_device + placement.entries_start + start;
  int32_t* ids = arrays.ids + first;
  int32_t* samples = arrays.samples + first;
  float* gains = arrays.gains + first;
  const uint64_t* entries = entries_.data() + task.start;
  const float* entry_gains = task.unit_gains ? nullptr : gains_.data() + task.start;
  const int32_t* counts = CountsOf(number);
  const int32_t* kept = KeptOf(number);
  const uint32_t rows = static_cast<uint32_t>(stacks_[task.stack].rows);

  int64_t end = layout == PackLayout::kShares ? 0 : start;
  for (int64_t minibatch = 0; minibatch < num_minibatches_; ++minibatch, row_pointers += num_pointers) {
    for (int64_t partition = 0; partition < num_sparsecores_; ++partition) {
      const int64_t count = *kept++;
      const uint32_t first_key = static_cast<uint32_t>(partition) * rows;
      for (int64_t i = 0; i < count; ++i) {
        ids[i] = static_cast<int32_t>(Key(entries[i]) - first_key);
        samples[i] = static_cast<int32_t>(Payload(entries[i]));
      }
      if (entry_gains != nullptr) {
        std::copy_n(entry_gains, count, gains);
        entry_gains += *counts;
      } else {
        std::fill_n(gains, count, 1.0f);
      }
      const int64_t padded = RoundUp(count);
      for (int64_t i = count; i < padded; ++i) {
        ids[i] = kPaddingId;
        samples[i] = kPaddingId;
        gains[i] = std::numeric_limits<float>::quiet_NaN();
      }
      row_pointers[partition] = static_cast<int32_t>(end + count);
      entries += *counts++;
      ids += padded;
      samples += padded;
      gains += padded;
      end += padded;
    }
    for (int64_t i = num_sparsecores_; i < num_pointers; ++i) row_pointers[i] = static_cast<int32_t>(end);
  }
}

bool SortedBatch::IsSound(const PackTarget& target, PackLayout layout) const {
  const PackArrays& arrays = target.arrays;
  if (target.placements.size() != stacks_.size() || (layout == PackLayout::kShares && num_minibatches_ != 1)) return false;
  const int64_t segments = sparsecores_per_device_ * num_minibatches_;
  const int64_t num_pointers = segments * std::max(num_sparsecores_, kMinRowPointers);
  int64_t pointers_end = 0, entries_end = 0;
  for (const PackPlacement& placement : target.placements) {
    if (placement.row_pointers_start < pointers_end || placement.entries_start < entries_end || placement.capacity < 0 ||
        (layout == PackLayout::kMinibatches && placement.capacity > INT32_MAX) ||  // Row pointers count them.
        placement.capacity > arrays.entries_per_device - placement.entries_start ||
        num_pointers > arrays.row_pointers_per_device - placement.row_pointers_start) {
      return false;
    }
    pointers_end = placement.row_pointers_start + num_pointers;
    entries_end = placement.entries_start + placement.capacity;
  }
  return true;
}

bool SortedBatch::Write(const PackTarget& target, PackLayout layout, int64_t threads) const {
  if (!IsSound(target, layout)) return false;
  if (layout == PackLayout::kShares && all_written_.load(std::memory_order_relaxed) &&
      target.arrays == written_.arrays && target.placements == written_.placements) {
    return true;
  }
  // Where each task begins in the part of its stack.
  std::vector<int64_t> starts(tasks_.size());
  int64_t end = 0;
  for (size_t number = 0; number < tasks_.size(); ++number) {
    const Task& task = tasks_[number];
    const int64_t capacity = target.placements[task.stack].capacity, share = capacity / sparsecores_per_device_;
    if (layout == PackLayout::kShares) {
      end = task.sparsecore * share;
    } else if (task.sparsecore == 0) {
      end = 0;
    }
    starts[number] = end;
    end += required_[number];
    if (end > (layout == PackLayout::kShares ? starts[number] + share : capacity)) return false;
  }
  ParallelFor(HelpersFor(threads, total_bound_), static_cast<int64_t>(tasks_.size()), [&](int64_t i) {
    const int32_t number = order_[i];
    WriteTask(tasks_[number], number, starts[number], layout, target);
  });
  return true;
}

}  // namespace embax
