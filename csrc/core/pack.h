// Packs raw ids into the CSR-wrapped COO form that lookups read: partitioned by owner, sorted, duplicates merged, padded.
//
// Packing runs in phases, so that a caller can look at the counts (and size its buffers) in between without sorting twice:
// SortedBatch::Sort reads, checks and sorts the ids, SortedBatch::Write lays them out; between the two, the entries may be
// put into minibatches, and those that are beyond limits dropped. A caller that expects no change in between says so at once:
// then what is sorted is laid out while it is in the caches, and Write has nothing left to do. Both split their work into one
// task for each (stack, local device, SparseCore); the result does not depend on the number of threads.
#ifndef EMBAX_CORE_PACK_H_
#define EMBAX_CORE_PACK_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "core/format.h"

namespace embax {

enum class Combiner : int32_t { kSum = 0, kMean = 1, kSqrtn = 2 };

// What becomes of ids outside their vocabulary, and of weights that are not finite.
enum class Validation : int32_t {
  kRaise = 0,  // A fault.
  kDrop = 1,   // Left out, and counted.
  kTrust = 2,  // Not looked for: such an id names some row or none, such a weight is used.
};

// The ids of one feature on all local devices.
struct PackFeature {
  const void* ids = nullptr;            // [batch, valency], where -1 is padding; with row_splits [num_ids].
  bool wide_ids = false;                // int64 rather than int32.
  const float* weights = nullptr;       // Like ids, or null: all ones.
  const int64_t* row_splits = nullptr;  // [batch + 1], or null: dense.
  int64_t num_ids = 0;
  int64_t batch = 0;
  int64_t valency = 0;  // Of dense ids.
  int64_t vocabulary = 0;
  int64_t col_offset = 0;
  int64_t col_shift = 0;
};

// Features whose samples follow one another, looked up in one stacked table.
struct PackStack {
  Combiner combiner = Combiner::kSum;
  int64_t num_rows = 0;  // Of all SparseCores together.
  std::vector<int32_t> features;
};

struct PackRequest {
  std::vector<PackFeature> features;  // In the order in which faults are reported.
  std::vector<PackStack> stacks;
  int64_t num_local_devices = 1;
  int64_t sparsecores_per_device = 1;
  int64_t num_sparsecores = 1;  // Of all devices.
  Validation validation = Validation::kRaise;
  bool count_merged = false;  // Remember of how many ids each entry was made, for SortedBatch::Drop.
};

enum class PackFault : int32_t {
  kNone = 0,
  kId = 1,           // `value` is outside the vocabulary.
  kWeight = 2,       // `number` is not finite.
  kGain = 3,         // The combiner divides by `number`, and the result is not finite.
  kFirstSplit = 4,   // The first row split is `value` rather than 0.
  kSplit = 5,        // Row split sample + 1 is `value`, below the one before it.
  kLastSplit = 6,    // The last row split is `value` rather than num_ids.
  kTooManyIds = 7,   // One SparseCore has `value` ids, more than int32 can count.
  kRequest = 8,      // The request contradicts itself: `value` tells where.
  kChanged = 9,      // The arrays changed while they were read.
  kMergedGain = 10,  // The gains of the equal ids `value` of a sample add up to `number`, which is not finite.
};

struct PackError {
  PackFault fault = PackFault::kNone;
  int32_t feature = -1;
  int64_t sample = -1;
  int64_t position = -1;
  int64_t value = 0;
  double number = 0;
};

// What the buffers of a stack hold.
struct PackLimits {
  int64_t max_ids = 0;         // Entries of a partition.
  int64_t max_unique_ids = 0;  // Distinct ids of a partition.
  int64_t capacity = 0;        // Entries of a device, gaps included.
};

// Where the entries of the SparseCores of a device lie in its part of a stack.
enum class PackLayout : int32_t {
  kShares = 0,       // Each has an equal share, and row pointers count from its start.
  kMinibatches = 1,  // One after another, minibatch by minibatch, and row pointers count from the start of the stack.
};

// Where a stack lies in the part of a device.
struct PackPlacement {
  int64_t row_pointers_start = 0;
  int64_t entries_start = 0;
  int64_t capacity = 0;  // A multiple of the SparseCores of a device, each of which owns an equal share.

  bool operator==(const PackPlacement& other) const {
    return row_pointers_start == other.row_pointers_start && entries_start == other.entries_start && capacity == other.capacity;
  }
};

// The arrays of all stacks; each device has an equal part of each.
struct PackArrays {
  int32_t* row_pointers = nullptr;
  int32_t* ids = nullptr;
  int32_t* samples = nullptr;
  float* gains = nullptr;
  int64_t row_pointers_per_device = 0;
  int64_t entries_per_device = 0;

  bool operator==(const PackArrays& other) const {
    return row_pointers == other.row_pointers && ids == other.ids && samples == other.samples && gains == other.gains &&
           row_pointers_per_device == other.row_pointers_per_device && entries_per_device == other.entries_per_device;
  }
};

// Where all stacks lie in which arrays.
struct PackTarget {
  std::vector<PackPlacement> placements;
  PackArrays arrays;
};

// Memory without initial values that only ever grows, until Shrink.
template <typename T>
class Buffer {
 public:
  T* Reserve(int64_t size) {
    if (size > capacity_) {
      data_.reset();
      capacity_ = 0;
      const int64_t capacity = size + size / 4;
      data_.reset(new T[capacity]);
      capacity_ = capacity;
    }
    return data_.get();
  }
  T* data() const { return data_.get(); }
  void Shrink(int64_t max_bytes) {
    if (capacity_ > max_bytes / static_cast<int64_t>(sizeof(T))) {
      data_.reset();
      capacity_ = 0;
    }
  }

 private:
  std::unique_ptr<T[]> data_;
  int64_t capacity_ = 0;
};

// The sorted entries of a batch and their counts. Memory is reused when the object is.
class SortedBatch {
 public:
  // Takes a batch with memory from an earlier one if there is one; the deleter keeps it for the next. Safe to call from
  // any thread and after a fork.
  struct Recycle {
    void operator()(SortedBatch* batch) const;
  };
  using Ptr = std::unique_ptr<SortedBatch, Recycle>;
  static Ptr New();

  // Reads, checks and sorts the ids with up to `threads` threads. Reports the first fault in the order (feature, sample,
  // position), whatever the threads did. Throws std::bad_alloc. Where `expected` is given, entries are written there by
  // shares as far as they fit: the arrays must live, and nobody else may use them, until Write was called or will not be.
  PackError Sort(const PackRequest& request, int64_t threads, const PackTarget* expected = nullptr);

  // Where the buckets of ids, kBuckets of them, must be parted so that no partition of a minibatch exceeds the limits of its
  // stack, unless by the ids of one bucket: bit i says that buckets i and i + 1 belong to different minibatches. The bits of
  // several batches may be joined by a bitwise or. `limits` has one element a stack.
  uint64_t MinibatchBoundaries(const std::vector<PackLimits>& limits, int64_t threads) const;

  // Puts the entries into minibatches, whose number it returns. At most once after Sort, and before Drop.
  int64_t FormMinibatches(uint64_t boundaries, int64_t threads);

  // Drops what is beyond the limits: of each partition of each minibatch the entries behind max_ids, those of the distinct
  // ids behind max_unique_ids, and all that the capacity does not hold. Returns for each feature how many ids those entries
  // were made of. The request must have asked for count_merged.
  std::vector<int64_t> Drop(const std::vector<PackLimits>& limits, PackLayout layout);

  // Writes the entries. False, with nothing written, if the arrays do not hold them. What lies behind the last partition
  // of a SparseCore is left as it is. kShares has no room for several minibatches. What Sort has written there is not written
  // again.
  bool Write(const PackTarget& target, PackLayout layout, int64_t threads) const;

  int64_t num_local_devices() const { return num_local_devices_; }
  int64_t num_stacks() const { return static_cast<int64_t>(stacks_.size()); }

  // For each stack, local device and destination SparseCore, the maximum over the device's SparseCores (and minibatches) of
  // the entries (of the distinct ids) that they send there. What is dropped counts.
  const std::vector<int32_t>& max_ids() const { return max_ids_; }
  const std::vector<int32_t>& max_unique_ids() const { return max_unique_ids_; }
  // For each stack, local device and SparseCore of it, the entries that it needs, partitions rounded up.
  const std::vector<int32_t>& required() const { return required_; }
  // Limits that hold the batch as it is.
  std::vector<PackLimits> Needs(PackLayout layout) const;
  // For each feature, the ids that Validation::kDrop left out.
  const std::vector<int64_t>& invalid() const { return invalid_; }

 private:
  struct StackShape {
    int64_t rows = 0;     // Of a SparseCore.
    int64_t samples = 0;  // Of a SparseCore.
    std::vector<int32_t> features;
    std::vector<int64_t> shares;  // Samples of each feature on a SparseCore.

    // The feature that a sample of the stack on a SparseCore belongs to.
    int32_t FeatureOf(int64_t sample) const {
      size_t number = 0;
      while (number + 1 < shares.size() && sample >= shares[number]) sample -= shares[number++];
      return features[number];
    }
  };
  struct Task {
    int32_t stack = 0;
    int32_t device = 0;
    int32_t sparsecore = 0;
    bool unit_gains = false;  // All gains are 1, and none is stored.
    int64_t start = 0;        // In entries_ and gains_.
    int64_t bound = 0;        // At least the number of entries.
  };

  PackError Prepare(const PackRequest& request);
  // Whether the parts of the target lie in its arrays and do not overlap.
  bool IsSound(const PackTarget& target, PackLayout layout) const;
  bool CheckMerged(const Task& task, int64_t count, Validation validation);
  bool SortTask(const PackRequest& request, Task& task, int64_t number);
  void FormTask(const Task& task, int64_t number, const uint8_t* minibatch_of, int64_t size, int32_t* counts,
                int32_t* unique_counts);
  void WriteTask(const Task& task, int64_t number, int64_t start, PackLayout layout, const PackTarget& target) const;
  void Summarize();

  // Partitions of a task, minibatch by minibatch.
  int64_t partitions() const { return num_minibatches_ * num_sparsecores_; }
  const int32_t* CountsOf(int64_t task) const { return counts_.data() + task * partitions(); }
  const int32_t* UniqueCountsOf(int64_t task) const { return unique_counts_.data() + task * partitions(); }
  // Entries to be written of each partition of a task: the first ones.
  const int32_t* KeptOf(int64_t task) const { return (dropped_ ? kept_ : counts_).data() + task * partitions(); }

  int64_t num_local_devices_ = 0;
  int64_t sparsecores_per_device_ = 0;
  int64_t num_sparsecores_ = 0;
  int64_t num_minibatches_ = 1;
  int64_t total_bound_ = 0;
  bool count_merged_ = false;
  bool dropped_ = false;
  PackTarget written_;                    // Where Sort has written what fits,
  std::atomic<bool> all_written_{false};  // which is all of the batch as it is now.
  std::vector<StackShape> stacks_;
  std::vector<Task> tasks_;
  std::vector<int32_t> order_;    // Of the tasks, the largest first.
  Buffer<uint64_t> entries_;      // (partition * rows per SparseCore + id) << 32 | sample.
  Buffer<float> gains_;
  Buffer<int32_t> multiplicities_;  // Of how many ids each entry was made, if count_merged_.
  Buffer<int32_t> counts_;        // By task, minibatch and partition.
  Buffer<int32_t> unique_counts_;
  Buffer<int32_t> kept_;
  std::vector<int32_t> max_ids_;
  std::vector<int32_t> max_unique_ids_;
  std::vector<int32_t> required_;
  std::vector<int64_t> invalid_;
  std::mutex invalid_mutex_;
};

}  // namespace embax

#endif  // EMBAX_CORE_PACK_H_
