// Puts the entries of a partition, which come from several SparseCores, in the order of their rows. Compiled once for each
// instruction set.
#ifndef EMBAX_KERNELS_ROW_ORDER_H_
#define EMBAX_KERNELS_ROW_ORDER_H_

#include <cstdint>

#include "kernels/partitions.h"
#include "kernels/rows.h"

namespace embax {
namespace EMBAX_ISA {

// The entries of a partition that name rows and samples which exist, in the order of the rows, and of the sources where rows
// are the same. `key` is the row and in its low half the number of an entry as it was gathered, `what` is known of that number.
struct RowOrder {
  const uint64_t* keys;
  const uint64_t* what;
  const uint32_t* starts;  // [num_rows + 1]: where each row begins among the keys.
  int64_t num_rows, num_entries;

  int32_t row(int64_t number) const { return static_cast<int32_t>(keys[starts[number]] >> 32); }
  uint32_t entry(int64_t i) const { return static_cast<uint32_t>(keys[i]); }
  uint64_t of(int64_t i) const { return what[entry(i)]; }
};

// Two ascending runs that are being merged.
struct Merge {
  const uint64_t *a, *a_end, *b, *b_end;
  uint64_t* out;

  bool both() const { return a != a_end && b != b_end; }

  // Takes the lesser of the next two, without a branch.
  void Step() {
    const uint64_t x = *a, y = *b;
    const bool second = y < x;
    *out++ = second ? y : x;
    b += second;
    a += !second;
  }

  void Finish() {
    while (both()) Step();
    while (a != a_end) *out++ = *a++;
    while (b != b_end) *out++ = *b++;
  }
};

// Merges two ascending runs of different numbers. Each step waits for the one before it, so two halves are merged at once.
inline void MergeRuns(const uint64_t* a, const uint64_t* a_end, const uint64_t* b, const uint64_t* b_end, uint64_t* out) {
  // The first half is of the first `of_a` numbers of a, and of b.
  const int64_t half = ((a_end - a) + (b_end - b)) / 2;
  int64_t of_a = half - Min(half, b_end - b), most = Min(half, a_end - a);
  while (of_a < most) {
    const int64_t middle = (of_a + most) / 2;
    const bool more = a[middle] < b[half - middle - 1];
    of_a = more ? middle + 1 : of_a;
    most = more ? most : middle;
  }
  const uint64_t *a_half = a + of_a, *b_half = b + (half - of_a);
  Merge first = {a, a_half, b, b_half, out}, second = {a_half, a_end, b_half, b_end, out + half};
  while (first.both() && second.both()) {
    first.Step();
    second.Step();
  }
  first.Finish();
  second.Finish();
}

// The entries of a source in a partition.
inline Range InPartition(const PartitionTask& t, const Entries& entries) {
  const int64_t begin = PartitionBegin(entries, t.partition);
  return {begin, PartitionEnd(entries, t.partition, begin)};
}

// The rows of the task's part. Parts are cut at ids of the source that has most entries, and never overlap, whatever these are.
inline Range RowsOf(const PartitionTask& t) {
  if (t.num_parts == 1) return {0, t.rows_per_partition};
  const int32_t* ids = nullptr;
  Range most = {0, 0};
  for (int64_t s = 0; s < t.num_sources; ++s) {
    const Range range = InPartition(t, t.entries[s]);
    if (range.size() <= most.size()) continue;
    most = range;
    ids = t.entries[s].ids;
  }
  Range rows = {0, 0};
  for (int64_t part = 0; part <= t.part; ++part) {
    rows.begin = rows.end;
    const bool last = part + 1 == t.num_parts || ids == nullptr;
    const int64_t cut = last ? t.rows_per_partition : ids[most.begin + most.size() * (part + 1) / t.num_parts];
    rows.end = Clamp(cut, rows.begin, t.rows_per_partition);
  }
  return rows;
}

// The entries of a source that name rows of a part.
inline Range InPart(const PartitionTask& t, const Entries& entries, Range rows) {
  const Range range = InPartition(t, entries);
  return t.num_parts == 1 ? range : InRows(entries, range, rows);
}

inline int64_t CountEntries(const PartitionTask& t) {
  const Range rows = RowsOf(t);
  int64_t count = 0;
  for (int64_t s = 0; s < t.num_sources; ++s) count += InPart(t, t.entries[s], rows).size();
  return count;
}

// Puts the entries of a partition in order. `of_source(entries, sparsecore)` makes a function that gets the number of an entry in
// its source, where to write what is to be known of it, and its number as it is gathered; it returns whether the entry counts.
template <typename OfSource>
inline __attribute__((always_inline)) RowOrder OrderRows(const PartitionTask& t, OfSource of_source) {
  const Range part = RowsOf(t);
  uint64_t* keys = t.scratch.keys;
  uint64_t* other = t.scratch.other_keys;
  uint64_t* what = t.scratch.what;
  uint32_t* ends = t.scratch.ends;
  uint32_t n = 0;
  int64_t runs = 0;
  for (int64_t s = 0; s < t.num_sources; ++s) {
    const Entries& entries = t.entries[s];
    Range range = InPart(t, entries, part);
    // If somebody changes the arrays after entries were counted, some are lost, no more.
    range.end = Min(range.end, range.begin + (t.scratch.count - n));
    auto describe = of_source(entries, s / t.num_minibatches);
    const uint32_t first = n;
    for (int64_t e = range.begin; e < range.end; ++e) {
      const int32_t id = entries.ids[e];
      const bool in_part = id >= part.begin && id < part.end;
      keys[n] = static_cast<uint64_t>(static_cast<uint32_t>(id)) << 32 | n;
      n += in_part & describe(e, what[n], n);
    }
    if (n != first) ends[runs++] = n;
  }
  while (runs > 1) {
    int64_t merged = 0;
    uint32_t begin = 0;
    for (int64_t r = 0; r < runs; r += 2) {
      const uint32_t middle = ends[r], end = r + 1 < runs ? ends[r + 1] : middle;
      MergeRuns(keys + begin, keys + middle, keys + middle, keys + end, other + begin);
      ends[merged++] = begin = end;
    }
    runs = merged;
    uint64_t* const swapped = keys;
    keys = other;
    other = swapped;
  }
  uint32_t* starts = reinterpret_cast<uint32_t*>(other);
  int64_t rows = 0;
  starts[0] = 0;
  if (n > 0) keys[n] = ~keys[n - 1];  // Of another row than the last one.
  for (uint32_t i = 0; i < n; ++i) {
    starts[rows + 1] = i + 1;
    rows += keys[i] >> 32 != keys[i + 1] >> 32;
  }
  return {keys, what, starts, rows, n};
}

}  // namespace EMBAX_ISA
}  // namespace embax

#endif  // EMBAX_KERNELS_ROW_ORDER_H_
