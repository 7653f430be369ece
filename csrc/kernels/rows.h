// The row loops of lookup and update for one SparseCore, and their choice by instruction set.
//
// They read buffers that may hold anything: a row pointer, id or sample outside its range makes the loops skip the
// entry, never leave an array.
#ifndef EMBAX_KERNELS_ROWS_H_
#define EMBAX_KERNELS_ROWS_H_

#include <cmath>
#include <cstdint>

namespace embax {

constexpr int kMaxSlots = 4;
constexpr int kMaxHyperparameters = 8;

// The packed entries of one SparseCore in a stack, or of one minibatch on it.
struct Entries {
  const int32_t* row_pointers;  // [num_partitions]: end of each partition
  const int32_t* ids;           // [capacity]: row on the SparseCore that owns it
  const int32_t* samples;       // [capacity]: sample on this SparseCore
  const float* gains;           // [capacity]
  int64_t capacity;
  int64_t begin;  // Where the first partition begins.
};

// The samples of a feature: from `begin` on `samples` of them on each SparseCore. Those of all SparseCores, one after the other,
// have the rows of an array, as many as there are.
struct FeatureRows {
  int64_t begin, samples;
  int64_t rows;
  float* data;  // [rows, dim]
};

// Rows are clipped to [min, max] and rounded to equally spaced values as they are read; step 0 means not at all.
struct Quantization {
  float min = 0, max = 0, step = 0;
};

// What the entries of a SparseCore are put in the order of their samples in.
struct SampleScratch {
  struct Entry {
    uint32_t row;  // Of the table.
    float gain;
  };
  Entry* entries = nullptr;    // [count]
  int64_t count = 0;           // At least the number of entries.
  uint32_t* starts = nullptr;  // [num_samples + 1]
  uint32_t* ends = nullptr;    // [num_samples]
  float* sum = nullptr;        // [dim]
};

// The row of a sample = sum over its entries of gain * table[partition * partition_stride + id], for the samples of some features
// of a stack on one SparseCore.
struct LookupTask {
  const Entries* minibatches;  // [num_minibatches]
  int64_t num_minibatches;
  int64_t num_partitions;
  const float* table;  // [.., dim]
  int64_t rows_per_partition;  // What ids must be below.
  int64_t partition_stride;    // Rows from a partition to the next; 0 where ids are rows of the table.
  int64_t dim;
  const FeatureRows* features;  // [num_features], in the order of their samples
  int64_t num_features;
  int64_t sparsecore;  // Of the device.
  int64_t first_sample, num_samples;  // Of these features.
  // Of a partition: those of these features. What lies outside is not looked for where ids ascend.
  int64_t first_row, end_row;
  Quantization quantization;
  // Without entries they are looked up in the order of their rows, which is faster where rows are short or samples have few
  // entries. The sums are the same: the entries of a sample keep their order.
  SampleScratch scratch;
};

// What is done to a row whatever its rule: the gradient is clipped, by value and by Euclidean norm; `l2 * row` is added to it;
// the row decays to `row - decay * row`; after the rule its elements are clipped to [min, max].
struct RowOptions {
  float clip_value = HUGE_VALF, clip_norm = HUGE_VALF, l2 = 0, min = -HUGE_VALF, max = HUGE_VALF, decay = 0;
};

// What the entries of a partition are put in order in: `count` of them, as RowKernels::count_entries says.
struct OrderScratch {
  int64_t count;
  uint64_t* keys;        // [count + 1]
  uint64_t* other_keys;  // [count + 1]
  uint64_t* what;        // [count + 1]
  uint32_t* ends;        // [num_sources]
  float* gains;          // [count + 1], for sums of gradients.
  float* sum;            // [dim], for updates.
};

// The entries of one partition, or of a part of its rows, of all SparseCores of the device.
struct PartitionTask {
  const Entries* entries;  // [num_sources], of each minibatch of each SparseCore of the device
  int64_t num_sources;
  int64_t num_minibatches;
  int64_t partition;
  int64_t rows_per_partition;  // What ids must be below.
  // The part of the partition's rows that the task is about: of `num_parts` with about as many entries each.
  int64_t part = 0, num_parts = 1;
  OrderScratch scratch;  // See PartitionScratch.
};

// Lists the rows that entries name, each once, ascending; returns their number. Rows that do not ascend, which no packing
// makes, and those beyond `max_rows` are left out.
struct ListTask : PartitionTask {
  int64_t num_samples;      // Of a SparseCore.
  int64_t max_rows;
  int32_t first_row;        // Of the partition.
  int32_t first_slot;       // Place in the list of the first row.
  int32_t* rows;            // The list from first_slot on, or null: count them only.
  const int32_t* ids_base;  // What `Entries::ids` point into; may be null where there are no slots.
  int32_t* slots;           // Parallel to `ids_base`: for each entry the place of its row in the list. May be null.
};

// The gradient of a row is the sum over its entries, SparseCore by SparseCore, of gain * the sample's row of the gradients.
struct GradientTask : PartitionTask {
  const FeatureRows* gradients;  // [num_features], in the order of their samples; these are not written.
  int64_t num_features;
  int64_t dim;
};

// Lists rows as ListTask does, and their gradients; returns their number.
struct SumTask : GradientTask {
  int64_t max_rows;
  int32_t first_row;
  int32_t* rows;  // The list, from the first row of the partition on.
  float* sums;    // Likewise, [.., dim].
};

// Changes each row that an entry names once, by the rule and the row's gradient.
struct UpdateTask : GradientTask {
  // Table and slots: the [rows_per_partition, dim] of this partition, [rows_per_partition] of a slot of one value a row.
  float* state[1 + kMaxSlots];
  int64_t width;  // Columns that are not padding.
  RowOptions options;
  const float* hyperparameters;
};

struct RowRule {
  const char* name;
  int num_slots;
  unsigned row_wise;  // Bit k is set if slot k has one value a row.
  int num_hyperparameters;
  void (*update)(const UpdateTask&);
};

// Columns of the table (0) or of slot `state - 1` of a rule. Static: each instruction set has a copy of its own.
static inline int64_t StateColumns(unsigned row_wise, int state, int64_t dim) {
  return state > 0 && (row_wise >> (state - 1) & 1) ? 1 : dim;
}

struct RowKernels {
  const char* isa;
  void (*lookup)(const LookupTask&);
  int64_t (*count_entries)(const PartitionTask&);  // At least the number of them.
  int64_t (*list_rows)(const ListTask&);
  int64_t (*sum_rows)(const SumTask&);
  const RowRule* rules;
  int num_rules;
};

// The fastest kernels that this processor runs. The environment variable EMBAX_SIMD=baseline|avx2|avx512, read once, asks
// for slower ones; what the processor lacks is not chosen.
const RowKernels& SelectRowKernels();

}  // namespace embax

#endif  // EMBAX_KERNELS_ROWS_H_
