// A stable sort of (key, payload) entries by key, least significant digit first.
#ifndef EMBAX_CORE_RADIX_SORT_H_
#define EMBAX_CORE_RADIX_SORT_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>

#include "core/keys.h"

namespace embax {

// Below this many entries an insertion sort beats the clearing and summing of histograms.
constexpr int64_t kInsertionSort = 40;

// 2^11 write positions still fit the first-level cache and its address translations.
constexpr int kMaxDigitBits = 11;
constexpr int kMaxPasses = 3;  // 3 * 11 bits hold any key, which is below 2^31.

inline int64_t CeilDiv(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// How the digits of keys are cut, and the histogram of each.
struct Digits {
  int passes = 0;
  int bits = 1;
  uint32_t* histograms = nullptr;  // [passes, 2^bits]

  uint32_t size() const { return 1u << bits; }
};

// The cheapest way to sort `count` keys of `key_bits` bits: a pass costs a move of each entry and a sweep of a histogram.
inline Digits ChooseDigits(int64_t count, int key_bits) {
  Digits digits;
  if (count <= kInsertionSort) return digits;
  int64_t best = std::numeric_limits<int64_t>::max();
  for (int passes = 1; passes <= kMaxPasses; ++passes) {
    const int bits = std::max(1, static_cast<int>(CeilDiv(key_bits, passes)));
    if (bits > kMaxDigitBits) continue;
    const int64_t cost = passes * (count + (int64_t{1} << bits));
    if (cost < best) {
      best = cost;
      digits.passes = passes;
      digits.bits = bits;
    }
  }
  return digits;
}

// Appends entries while it counts their digits.
template <int kPasses>
class Appender {
 public:
  Appender(const Digits& digits, uint64_t* entries)
      : entries_(entries), histograms_(digits.histograms), bits_(digits.bits), mask_(digits.size() - 1) {}

  int64_t size() const { return size_; }

  void Append(uint32_t key, uint32_t payload) {
    entries_[size_++] = Entry(key, payload);
    Count(key, 1);
  }

  // Appends nothing if the key is padding, without a branch.
  void AppendUnlessPadding(uint32_t key, uint32_t payload) {
    const uint32_t valid = key != kPaddingKey ? 1 : 0;
    entries_[size_] = Entry(key, payload);
    size_ += valid;
    Count(key, valid);
  }

 private:
  void Count(uint32_t key, uint32_t number) {
    if constexpr (kPasses > 0) histograms_[key & mask_] += number;
    if constexpr (kPasses > 1) histograms_[(size_t{1} << bits_) + ((key >> bits_) & mask_)] += number;
    if constexpr (kPasses > 2) histograms_[(size_t{2} << bits_) + ((key >> (2 * bits_)) & mask_)] += number;
  }

  uint64_t* const entries_;
  uint32_t* const histograms_;
  const int bits_;
  const uint32_t mask_;
  int64_t size_ = 0;
};

// Stable. Binary insertion would not pay for so few.
inline void InsertionSort(uint64_t* entries, int64_t count) {
  for (int64_t i = 1; i < count; ++i) {
    const uint64_t entry = entries[i];
    int64_t j = i;
    for (; j > 0 && entries[j - 1] > entry; --j) entries[j] = entries[j - 1];
    entries[j] = entry;
  }
}

// Sorts by key, least significant digit first; entries come in the order of their payloads and stay so. Returns the one of
// the two buffers that holds the result.
inline uint64_t* RadixSort(const Digits& digits, int64_t count, uint64_t* from, uint64_t* to) {
  if (digits.passes == 0) {
    InsertionSort(from, count);
    return from;
  }
  const uint32_t mask = digits.size() - 1;
  for (int pass = 0; pass < digits.passes && count > 0; ++pass) {
    uint32_t* histogram = digits.histograms + pass * static_cast<size_t>(digits.size());
    const int shift = 32 + pass * digits.bits;
    if (histogram[(from[0] >> shift) & mask] == count) continue;
    uint32_t sum = 0;
    for (uint32_t digit = 0; digit <= mask; ++digit) {
      const uint32_t number = histogram[digit];
      histogram[digit] = sum;
      sum += number;
    }
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t entry = from[i];
      to[histogram[(entry >> shift) & mask]++] = entry;
    }
    std::swap(from, to);
  }
  return from;
}

}  // namespace embax

#endif  // EMBAX_CORE_RADIX_SORT_H_
