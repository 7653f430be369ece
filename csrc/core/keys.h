// Ids as sort keys: where the row of an id lies among those of all SparseCores.
#ifndef EMBAX_CORE_KEYS_H_
#define EMBAX_CORE_KEYS_H_

#include <cstdint>
#include <type_traits>

#include "core/pack.h"

namespace embax {

constexpr uint32_t kPaddingKey = UINT32_MAX;

inline uint32_t Key(uint64_t entry) { return static_cast<uint32_t>(entry >> 32); }
inline uint32_t Payload(uint64_t entry) { return static_cast<uint32_t>(entry); }
inline uint64_t Entry(uint32_t key, uint32_t payload) { return static_cast<uint64_t>(key) << 32 | payload; }

// Bits of the keys of a stack of so many rows, at most 31.
inline int KeyBits(int64_t num_rows) {
  int bits = 0;
  while ((int64_t{1} << bits) < num_rows) ++bits;
  return bits;
}

// From an id to its key, partition * rows of a SparseCore + id on the SparseCore.
struct KeyMap {
  int64_t vocabulary;
  uint32_t num_sparsecores;
  uint32_t shift;       // Added to the SparseCore, modulo their number.
  uint32_t col_row;     // Added to the id on the SparseCore.
  uint32_t col_remainder;
  uint32_t rows;        // Of a SparseCore.
  bool power_of_two;    // And col_remainder is 0.
  int log2;
  uint64_t reciprocal;  // ceil(2^64 / N): the high half of its product with a 32-bit number is the exact quotient.
  uint32_t mask;        // Of the bits that keys are sorted by.

  KeyMap(const PackFeature& feature, int64_t rows_per_sparsecore, int64_t n)
      : vocabulary(feature.vocabulary),
        num_sparsecores(static_cast<uint32_t>(n)),
        shift(static_cast<uint32_t>(((feature.col_shift % n) + n) % n)),
        col_row(static_cast<uint32_t>(feature.col_offset / n)),
        col_remainder(static_cast<uint32_t>(feature.col_offset % n)),
        rows(static_cast<uint32_t>(rows_per_sparsecore)),
        power_of_two((n & (n - 1)) == 0 && feature.col_offset % n == 0),
        log2(0),
        reciprocal(UINT64_MAX / static_cast<uint64_t>(n) + 1),
        mask((uint32_t{1} << KeyBits(n * rows_per_sparsecore)) - 1) {
    while ((int64_t{1} << log2) < n) ++log2;
  }
};

inline uint32_t HighProduct(uint64_t a, uint32_t b) {
  const uint64_t low = (a & UINT32_MAX) * b, high = (a >> 32) * b;
  return static_cast<uint32_t>((high + (low >> 32)) >> 32);
}

// What a block of ids holds.
constexpr uint32_t kHasPadding = 1, kHasBad = 2;

// Turns ids into keys; -1 becomes kPaddingKey. Branchless, so that compilers vectorize the common case. Unless kCheck, bad
// ids are not looked for, and get any key that can be sorted: one that cannot would displace good ones.
template <typename Id, bool kCheck>
uint32_t MakeKeys(const KeyMap& map, const Id* ids, int64_t count, uint32_t* keys) {
  using Unsigned = std::make_unsigned_t<Id>;
  [[maybe_unused]] const Unsigned last = static_cast<Unsigned>(map.vocabulary - 1);
  uint32_t padding = 0;
  [[maybe_unused]] Unsigned outside = 0;  // Its sign bit: some id is below -1 or above the last.
  if (map.power_of_two) {
    const uint32_t last_sparsecore = map.num_sparsecores - 1, shift = map.shift, rows = map.rows, col_row = map.col_row;
    const int log2 = map.log2;
    for (int64_t i = 0; i < count; ++i) {
      const Unsigned id = static_cast<Unsigned>(ids[i]);
      const uint32_t low = static_cast<uint32_t>(id);
      const uint32_t is_padding = low == UINT32_MAX ? UINT32_MAX : 0;
      const uint32_t key = ((low + shift) & last_sparsecore) * rows + (low >> log2) + col_row;
      keys[i] = (kCheck ? key : key & map.mask) | is_padding;
      padding |= is_padding;
      if constexpr (kCheck) outside |= (last - id) | (id + 1);
    }
  } else {
    const uint32_t n = map.num_sparsecores;
    for (int64_t i = 0; i < count; ++i) {
      const Unsigned id = static_cast<Unsigned>(ids[i]);
      const uint32_t low = static_cast<uint32_t>(id);
      const uint32_t is_padding = low == UINT32_MAX ? UINT32_MAX : 0;
      uint32_t row = n == 1 ? low : HighProduct(map.reciprocal, low);
      uint32_t partition = low - row * n + map.shift;
      partition -= partition >= n ? n : 0;
      partition += map.col_remainder;
      row += partition >= n ? 1 : 0;
      partition -= partition >= n ? n : 0;
      const uint32_t key = partition * map.rows + row + map.col_row;
      keys[i] = (kCheck ? key : key & map.mask) | is_padding;
      padding |= is_padding;
      if constexpr (kCheck) outside |= (last - id) | (id + 1);
    }
  }
  return (padding ? kHasPadding : 0) | (outside >> (8 * sizeof(Id) - 1) ? kHasBad : 0);
}

}  // namespace embax

#endif  // EMBAX_CORE_KEYS_H_
