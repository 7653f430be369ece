// Where the samples of a stack have their rows in the arrays of its features. Compiled once for each instruction set.
#ifndef EMBAX_KERNELS_SAMPLE_ROWS_H_
#define EMBAX_KERNELS_SAMPLE_ROWS_H_

#include <cstdint>

#include "kernels/partitions.h"
#include "kernels/rows.h"

namespace embax {
namespace EMBAX_ISA {

// The rows that a feature's samples on a SparseCore have.
inline Range RowsOnSparseCore(const FeatureRows& feature, int64_t sparsecore) {
  const int64_t begin = Min(sparsecore * feature.samples, feature.rows);
  return {begin, Min(begin + feature.samples, feature.rows)};
}

// Neighbouring samples of a SparseCore whose rows are neighbours too.
struct Neighbours {
  int64_t begin = 0;
  uint64_t count = 0;
  float* first = nullptr;  // The row of the sample `begin`.

  bool Has(int64_t sample) const { return static_cast<uint64_t>(sample - begin) < count; }
};

// The samples of the last of some features that begins at or before a sample; there is at least one.
inline __attribute__((noinline)) Neighbours FindFeature(const FeatureRows* features, int64_t num_features, int64_t sparsecore,
                                                        int64_t dim, int64_t sample) {
  int64_t found = 0;
  for (int64_t size = num_features; size > 1;) {
    const int64_t half = size / 2;
    found += features[found + half].begin <= sample ? half : 0;
    size -= half;
  }
  const Range rows = RowsOnSparseCore(features[found], sparsecore);
  return {features[found].begin, static_cast<uint64_t>(rows.size()), features[found].data + rows.begin * dim};
}

// Where samples of a SparseCore have their rows. A sample of the feature that the one before was of is found at once.
class SampleRows {
 public:
  SampleRows(const FeatureRows* features, int64_t num_features, int64_t sparsecore, int64_t dim)
      : features_(features), num_features_(num_features), sparsecore_(sparsecore), dim_(dim) {}

  // Whether a sample has a row.
  inline __attribute__((always_inline)) bool Has(int64_t sample) {
    if (__builtin_expect(!now_.Has(sample), 0)) {
      // By value: for a function that changed it, it would lie in memory, and be read again after whatever a loop writes.
      now_ = FindFeature(features_, num_features_, sparsecore_, dim_, sample);
      return now_.Has(sample);
    }
    return true;
  }

  // The row of the sample that was asked for last, if it has one; some address otherwise. `dim` are its columns.
  float* Of(int64_t sample, int64_t dim) const { return now_.first + (sample - now_.begin) * dim; }

 private:
  const FeatureRows* features_;
  int64_t num_features_, sparsecore_, dim_;
  Neighbours now_;
};

}  // namespace EMBAX_ISA
}  // namespace embax

#endif  // EMBAX_KERNELS_SAMPLE_ROWS_H_
