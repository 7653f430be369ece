// Minibatches: where a partition holds more than its limits, the ids are divided into buckets by a hash, and runs of buckets
// become minibatches. All copies of an id are in one minibatch, on whichever SparseCore or host they are.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

#include "core/keys.h"
#include "core/pack.h"
#include "core/pack_tasks.h"
#include "core/scratch.h"

namespace embax {
namespace {

using Buckets = std::array<int64_t, kBuckets>;

// The finalizer of MurmurHash3 (public domain), of whose bits the highest are taken.
inline uint32_t BucketOf(uint32_t column) {
  uint32_t hash = column;
  hash = (hash ^ (hash >> 16)) * 0x85ebca6bu;
  hash = (hash ^ (hash >> 13)) * 0xc2b2ae35u;
  hash ^= hash >> 16;
  static_assert(kBuckets == 64);
  return hash >> 26;
}

// The id in its stack, which all hosts agree on.
inline uint32_t ColumnOf(uint32_t key, uint32_t partition, uint32_t rows, uint32_t num_sparsecores) {
  return (key - partition * rows) * num_sparsecores + partition;
}

// Bits of the boundaries that the buckets of one partition need: level by level, two neighbouring groups of buckets are
// parted if together they exceed the limit. A group stands for its largest part from then on. So every run of buckets between
// boundaries is within the limit, or a single bucket; more boundaries, as others may ask for, change nothing about that.
uint64_t BoundariesOf(Buckets counts, int64_t limit) {
  uint64_t boundaries = 0;
  for (int64_t width = 1; width < kBuckets; width *= 2) {
    for (int64_t left = 0; left < kBuckets; left += 2 * width) {
      const int64_t right = left + width;
      if (counts[left] + counts[right] > limit) {
        boundaries |= uint64_t{1} << (right - 1);
        counts[left] = std::max(counts[left], counts[right]);
      } else {
        counts[left] += counts[right];
      }
    }
  }
  return boundaries;
}

}  // namespace

uint64_t SortedBatch::MinibatchBoundaries(const std::vector<PackLimits>& limits, int64_t threads) const {
  std::atomic<uint64_t> boundaries{0};
  ParallelFor(HelpersFor(threads, total_bound_), static_cast<int64_t>(tasks_.size()), [&](int64_t i) {
    const int64_t number = order_[i];
    const Task& task = tasks_[number];
    const uint32_t rows = static_cast<uint32_t>(stacks_[task.stack].rows);
    const PackLimits& limit = limits[task.stack];
    const uint64_t* entries = entries_.data() + task.start;
    uint64_t own = 0;
    for (int64_t partition = 0; partition < num_sparsecores_; ++partition) {
      const int64_t count = CountsOf(number)[partition];
      Buckets ids{}, unique_ids{};
      for (int64_t e = 0; e < count; ++e) {
        const uint32_t key = Key(entries[e]);
        const uint32_t bucket =
            BucketOf(ColumnOf(key, static_cast<uint32_t>(partition), rows, static_cast<uint32_t>(num_sparsecores_)));
        ++ids[bucket];
        unique_ids[bucket] += e == 0 || key != Key(entries[e - 1]) ? 1 : 0;
      }
      own |= BoundariesOf(ids, limit.max_ids) | BoundariesOf(unique_ids, limit.max_unique_ids);
      entries += count;
    }
    boundaries.fetch_or(own, std::memory_order_relaxed);
  });
  return boundaries.load();
}

int64_t SortedBatch::FormMinibatches(uint64_t boundaries, int64_t threads) {
  boundaries &= ~(uint64_t{1} << (kBuckets - 1));  // Nothing is behind the last bucket.
  int64_t minibatches = 1;
  for (uint64_t rest = boundaries; rest != 0; rest &= rest - 1) ++minibatches;
  if (minibatches == 1 || num_minibatches_ != 1 || dropped_) return num_minibatches_;
  Buffer<int32_t> counts, unique_counts;
  counts.Reserve(static_cast<int64_t>(tasks_.size()) * minibatches * num_sparsecores_);
  unique_counts.Reserve(static_cast<int64_t>(tasks_.size()) * minibatches * num_sparsecores_);
  std::array<uint8_t, kBuckets> minibatch_of{};
  for (int64_t bucket = 1; bucket < kBuckets; ++bucket) {
    minibatch_of[bucket] = static_cast<uint8_t>(minibatch_of[bucket - 1] + (boundaries >> (bucket - 1) & 1));
  }
  ParallelFor(HelpersFor(threads, total_bound_), static_cast<int64_t>(tasks_.size()), [&](int64_t i) {
    const int64_t number = order_[i], size = minibatches * num_sparsecores_;
    FormTask(tasks_[number], number, minibatch_of.data(), size, counts.data() + number * size,
             unique_counts.data() + number * size);
  });
  num_minibatches_ = minibatches;
  all_written_.store(false, std::memory_order_relaxed);
  counts_ = std::move(counts);
  unique_counts_ = std::move(unique_counts);
  Summarize();
  return minibatches;
}

// A stable sort of the entries of a task by minibatch, so that each one's entries stay sorted by partition, id and sample.
void SortedBatch::FormTask(const Task& task, int64_t number, const uint8_t* minibatch_of, int64_t size, int32_t* counts,
                           int32_t* unique_counts) {
  Scratch& scratch = ThreadScratch();
  const uint32_t rows = static_cast<uint32_t>(stacks_[task.stack].rows), n = static_cast<uint32_t>(num_sparsecores_);
  const int32_t* old_counts = CountsOf(number);
  int64_t total = 0;
  for (uint32_t partition = 0; partition < n; ++partition) total += old_counts[partition];
  std::fill_n(counts, size, 0);
  std::fill_n(unique_counts, size, 0);

  // The minibatch of each entry, and how many there are in each partition of it.
  uint32_t* minibatches = scratch.entry_samples.Reserve(total);
  uint64_t* entries = entries_.data() + task.start;
  const auto for_each = [&](auto&& visit) {
    int64_t e = 0;
    for (uint32_t partition = 0; partition < n; ++partition) {
      for (const int64_t end = e + old_counts[partition]; e < end; ++e) visit(e, partition);
    }
  };
  for_each([&](int64_t e, uint32_t partition) {
    minibatches[e] = minibatch_of[BucketOf(ColumnOf(Key(entries[e]), partition, rows, n))];
    const int64_t place = minibatches[e] * static_cast<int64_t>(n) + partition;
    ++counts[place];
    const bool first = e == 0 || Key(entries[e]) != Key(entries[e - 1]);
    unique_counts[place] += first ? 1 : 0;
  });

  int64_t* next = scratch.positions.Reserve(size);
  for (int64_t place = 0, sum = 0; place < size; ++place) {
    next[place] = sum;
    sum += counts[place];
  }
  int64_t* target = scratch.targets.Reserve(total);
  for_each([&](int64_t e, uint32_t partition) {
    target[e] = next[minibatches[e] * static_cast<int64_t>(n) + partition]++;
  });
  const auto reorder = [&](auto* values, auto* copy) {
    std::copy_n(values, total, copy);
    for (int64_t e = 0; e < total; ++e) values[target[e]] = copy[e];
  };
  reorder(entries, scratch.entries.Reserve(total));
  if (!task.unit_gains) {
    reorder(gains_.data() + task.start, scratch.entry_gains.Reserve(total));
    if (count_merged_) {
      reorder(multiplicities_.data() + task.start, reinterpret_cast<int32_t*>(scratch.entry_samples.Reserve(total)));
    }
  }
  scratch.Shrink();
}

}  // namespace embax
