// The numbers that packing and the kernels must agree on. Included by code that is compiled for several instruction sets:
// nothing but constants.
#ifndef EMBAX_CORE_FORMAT_H_
#define EMBAX_CORE_FORMAT_H_

#include <cstdint>

namespace embax {

constexpr int32_t kPaddingId = INT32_MAX;  // Id and sample of an entry that only fills up a partition.
constexpr int64_t kPartitionAlignment = 8;  // Partitions start at multiples of this many entries.
constexpr int64_t kMinRowPointers = 8;      // A SparseCore has at least so many row pointers in a stack.
constexpr int64_t kBuckets = 64;            // Buckets of ids that minibatches are made of: so many there can be.

}  // namespace embax

#endif  // EMBAX_CORE_FORMAT_H_
