// Where the partitions of a SparseCore's entries lie, whatever row pointers say. Compiled once for each instruction set.
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

}  // namespace EMBAX_ISA
}  // namespace embax

#endif  // EMBAX_KERNELS_PARTITIONS_H_
