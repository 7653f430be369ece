// Where the partitions of a SparseCore's entries lie, whatever row pointers say, and what in them names certain rows. Compiled once
// for each instruction set.
#ifndef EMBAX_KERNELS_PARTITIONS_H_
#define EMBAX_KERNELS_PARTITIONS_H_

#include <cstdint>

#include "core/format.h"
#include "kernels/rows.h"

namespace embax {
namespace EMBAX_ISA {

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t Clamp(int64_t value, int64_t low, int64_t high) { return value < low ? low : Min(value, high); }

inline bool InRange(int32_t index, int64_t size) { return static_cast<uint64_t>(static_cast<int64_t>(index)) < static_cast<uint64_t>(size); }

inline int64_t PartitionEnd(const Entries& entries, int64_t partition, int64_t begin) {
  return Clamp(entries.row_pointers[partition], begin, entries.capacity);
}

inline int64_t NextPartition(const Entries& entries, int64_t end) {
  return Min((end + kPartitionAlignment - 1) / kPartitionAlignment * kPartitionAlignment, entries.capacity);
}

// First entry of a partition: the aligned end of the one before it.
inline int64_t PartitionBegin(const Entries& entries, int64_t partition) {
  if (partition == 0) return entries.begin;
  return NextPartition(entries, Clamp(entries.row_pointers[partition - 1], 0, entries.capacity));
}

struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// The first entry of ascending ones with at least this id.
inline int64_t FirstAtLeast(const int32_t* ids, Range range, int64_t id) {
  int64_t begin = range.begin;
  for (int64_t size = range.size(); size > 0;) {
    const int64_t half = size / 2;
    const bool below = ids[begin + half] < id;
    begin += below ? half + 1 : 0;
    size = below ? size - half - 1 : half;
  }
  return begin;
}

// Those of ascending entries that name rows from `rows.begin` to `rows.end`.
inline Range InRows(const Entries& entries, Range range, Range rows) {
  const int64_t begin = FirstAtLeast(entries.ids, range, rows.begin);
  return {begin, FirstAtLeast(entries.ids, {begin, range.end}, rows.end)};
}

// Calls use(partition, begin, end) with the entries of each partition that may name the rows of a task.
template <typename Use>
inline __attribute__((always_inline)) void ForEachPartition(const LookupTask& t, const Entries& entries, Use use) {
  const bool all = t.first_row == 0 && t.end_row == t.rows_per_partition;
  for (int64_t partition = 0, begin = entries.begin; partition < t.num_partitions; ++partition) {
    const Range range = {begin, PartitionEnd(entries, partition, begin)};
    const Range wanted = all ? range : InRows(entries, range, {t.first_row, t.end_row});
    use(partition, wanted.begin, wanted.end);
    begin = NextPartition(entries, range.end);
  }
}

}  // namespace EMBAX_ISA
}  // namespace embax

#endif  // EMBAX_KERNELS_PARTITIONS_H_
