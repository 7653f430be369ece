// Dropping of what is beyond limits.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/keys.h"
#include "core/pack.h"
#include "core/pack_tasks.h"

namespace embax {
namespace {

// Of sorted entries, how many come before the first one of distinct id number `limit`.
int64_t EntriesOfFirstIds(const uint64_t* entries, int64_t count, int64_t limit) {
  int64_t distinct = 0;
  for (int64_t e = 0; e < count; ++e) {
    if (e == 0 || Key(entries[e]) != Key(entries[e - 1])) ++distinct;
    if (distinct > limit) return e;
  }
  return count;
}

}  // namespace

// One thread does it: it only looks at entries where something is beyond a limit.
std::vector<int64_t> SortedBatch::Drop(const std::vector<PackLimits>& limits, PackLayout layout) {
  std::vector<int64_t> dropped(invalid_.size(), 0);
  kept_.Reserve(static_cast<int64_t>(tasks_.size()) * partitions());
  int64_t end = 0;
  for (size_t number = 0; number < tasks_.size(); ++number) {
    const Task& task = tasks_[number];
    const PackLimits& limit = limits[task.stack];
    const StackShape& stack = stacks_[task.stack];
    const bool shares = layout == PackLayout::kShares;
    // Partitions begin at multiples of kPartitionAlignment, also the one behind the last entry that has room.
    const int64_t room = RoundDown(shares ? limit.capacity / sparsecores_per_device_ : limit.capacity);
    if (shares || task.sparsecore == 0) end = 0;
    const int64_t start = end;
    const uint64_t* entries = entries_.data() + task.start;
    const int32_t* multiplicities = task.unit_gains || !count_merged_ ? nullptr : multiplicities_.data() + task.start;
    const int32_t* counts = CountsOf(number);
    const int32_t* unique_counts = UniqueCountsOf(number);
    int32_t* kept = kept_.data() + static_cast<int64_t>(number) * partitions();
    int64_t first = 0;
    for (int64_t partition = 0; partition < partitions(); ++partition) {
      const int64_t count = counts[partition];
      int64_t keep = std::min({count, limit.max_ids, room - end});
      if (unique_counts[partition] > limit.max_unique_ids) {
        keep = EntriesOfFirstIds(entries + first, keep, limit.max_unique_ids);
      }
      for (int64_t e = first + keep; e < first + count; ++e) {
        dropped[stack.FeatureOf(Payload(entries[e]))] += multiplicities != nullptr ? multiplicities[e] : 1;
      }
      kept[partition] = static_cast<int32_t>(keep);
      end += RoundUp(keep);
      first += count;
    }
    required_[number] = static_cast<int32_t>(end - start);
  }
  dropped_ = true;
  all_written_.store(false, std::memory_order_relaxed);
  return dropped;
}

}  // namespace embax
