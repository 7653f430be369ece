// The factors that combiners give the ids of a row. Sums run one after another in float32, as the format defines.
#ifndef EMBAX_CORE_GAINS_H_
#define EMBAX_CORE_GAINS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/pack.h"

namespace embax {

// Gathers whether any of some numbers is infinite or NaN, in operations that compilers vectorize.
class FiniteCheck {
 public:
  void Add(float value, bool counts = true) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    // Only an exponent of ones carries into the sign bit.
    signs_ |= counts ? (bits & 0x7f800000u) + 0x00800000u : 0;
  }
  bool all() const { return signs_ >> 31 == 0; }

 private:
  uint32_t signs_ = 0;
};

inline bool IsFinite(float value) {
  FiniteCheck check;
  check.Add(value);
  return check.all();
}

inline bool AreFinite(const float* values, int64_t count) {
  FiniteCheck check;
  for (int64_t i = 0; i < count; ++i) check.Add(values[i]);
  return check.all();
}

// The combiner's divisor of a row of `count` ids of weight 1, as a sequential sum in float32 gives it.
inline float UnitDivisor(Combiner combiner, int64_t count) {
  const float sum = static_cast<float>(std::min<int64_t>(count, 1 << 24));
  return combiner == Combiner::kSqrtn ? std::sqrt(sum) : sum;
}

// sum + weight^2, the square not rounded, as a fused multiply-add has it. In double, which every machine rounds alike.
inline float AddSquare(float sum, float weight) {
  return static_cast<float>(static_cast<double>(weight) * weight + sum);
}

// The combiner's divisor of a row: its weights, or their squares, are summed one after another in float32.
inline float Divisor(Combiner combiner, const float* weights, int64_t count) {
  float sum = 0;
  if (combiner == Combiner::kMean) {
    for (int64_t i = 0; i < count; ++i) sum += weights[i];
    return sum;
  }
  for (int64_t i = 0; i < count; ++i) sum = AddSquare(sum, weights[i]);
  return std::sqrt(sum);
}

// Whether the divisor is what the weights have, rather than beyond the range of float32. A mean may sum to 0; squares do so
// only by being too small.
inline bool IsSound(Combiner combiner, float divisor, const float* weights, int64_t count) {
  if (!IsFinite(divisor)) return false;
  return combiner != Combiner::kSqrtn || divisor != 0 ||
         std::all_of(weights, weights + count, [](float weight) { return weight == 0; });
}

// A row whose weights sum to 0 contributes nothing.
inline float Gain(float weight, float divisor) { return divisor == 0 ? 0.0f : weight / divisor; }

}  // namespace embax

#endif  // EMBAX_CORE_GAINS_H_
