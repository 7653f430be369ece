// The arrays of a packed batch, and other operands, as the FFI handlers read them.
#ifndef EMBAX_KERNELS_PACKED_BATCH_H_
#define EMBAX_KERNELS_PACKED_BATCH_H_

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/format.h"
#include "core/parallel.h"
#include "kernels/ffi_common.h"
#include "kernels/rows.h"

namespace embax {

// Below this many bytes of rows the hand-off to other threads costs more than it gains.
constexpr int64_t kInlineBytes = 256 << 10;

// The arrays of a packed batch and where each stack lies in them (embax/_ops/geometry.py).
class PackedBatch {
 public:
  struct Stack {
    int64_t row_pointers_start, entries_start, capacity, samples_per_sparsecore;
  };

  // `num_sparsecores` are those of all devices, which own the rows; `max_minibatches` is 0 where the device's SparseCores have
  // equal shares of a buffer, else what there are row pointers for.
  PackedBatch(const Int32s& row_pointers, const Int32s& ids, const Int32s& samples, const Floats& gains,
              const Int32s& num_minibatches, int64_t num_sparsecores, int64_t sparsecores_per_device,
              int64_t max_minibatches, Int64Span stacks)
      : row_pointers_(row_pointers.typed_data()),
        ids_(ids.typed_data()),
        samples_(samples.typed_data()),
        gains_(gains.typed_data()),
        num_row_pointers_(row_pointers.element_count()),
        num_entries_(std::min({ids.element_count(), samples.element_count(), gains.element_count()})),
        num_sparsecores_(num_sparsecores),
        sparsecores_per_device_(sparsecores_per_device),
        row_pointers_per_segment_(std::max(num_sparsecores, kMinRowPointers)),
        shared_(max_minibatches > 0),
        max_minibatches_(std::clamp<int64_t>(max_minibatches, 1, kBuckets)),
        num_minibatches_(num_minibatches.element_count() == 1
                             ? std::clamp<int64_t>(num_minibatches.typed_data()[0], 1, max_minibatches_)
                             : 1),
        stacks_(reinterpret_cast<const Stack*>(stacks.begin())),
        num_stacks_(stacks.size() / (sizeof(Stack) / sizeof(int64_t))) {}

  int64_t num_stacks() const { return num_stacks_; }
  int64_t num_sparsecores() const { return num_sparsecores_; }
  int64_t sparsecores_per_device() const { return sparsecores_per_device_; }
  int64_t num_minibatches() const { return num_minibatches_; }
  const Stack& stack(int64_t k) const { return stacks_[k]; }

  std::string Problem() const {
    // Compared by subtraction and division, which cannot overflow.
    if (sparsecores_per_device_ < 1 || num_sparsecores_ < sparsecores_per_device_ || num_sparsecores_ > num_row_pointers_ ||
        num_sparsecores_ % sparsecores_per_device_ != 0) {
      return "the number of SparseCores is wrong";
    }
    const int64_t row_pointers = sparsecores_per_device_ * max_minibatches_ * row_pointers_per_segment_;
    for (int64_t k = 0; k < num_stacks_; ++k) {
      const Stack& s = stacks_[k];
      const bool fits = s.row_pointers_start >= 0 && s.entries_start >= 0 && s.capacity >= 0 &&
                        s.samples_per_sparsecore >= 0 && s.samples_per_sparsecore <= INT32_MAX &&
                        row_pointers <= num_row_pointers_ - s.row_pointers_start &&
                        s.capacity <= num_entries_ - s.entries_start;
      if (!fits) return "stack " + std::to_string(k) + " does not lie in the packed arrays";
    }
    return "";
  }

  // The entries of a SparseCore, appended minibatch by minibatch.
  void Append(int64_t stack, int64_t sparsecore, std::vector<Entries>& to) const {
    const Stack& s = stacks_[stack];
    const int32_t* row_pointers = row_pointers_ + s.row_pointers_start;
    const int64_t share = s.capacity / sparsecores_per_device_;
    const int64_t start = s.entries_start + (shared_ ? 0 : sparsecore * share);
    for (int64_t segment = sparsecore * num_minibatches_, m = 0; m < num_minibatches_; ++m, ++segment) {
      const int64_t capacity = shared_ ? s.capacity : share;
      const int64_t begin = shared_ && segment > 0 ? SegmentEnd(row_pointers, segment - 1, capacity) : 0;
      to.push_back({row_pointers + segment * row_pointers_per_segment_, ids_ + start, samples_ + start, gains_ + start,
                    capacity, begin});
    }
  }

  // Entries of a stack, gaps included, as the row pointers say.
  int64_t NumEntries(int64_t stack) const {
    const Stack& s = stacks_[stack];
    const int32_t* row_pointers = row_pointers_ + s.row_pointers_start;
    if (shared_) return SegmentEnd(row_pointers, sparsecores_per_device_ * num_minibatches_ - 1, s.capacity);
    const int64_t share = s.capacity / sparsecores_per_device_;
    int64_t entries = 0;
    for (int64_t i = 0; i < sparsecores_per_device_; ++i) entries += SegmentEnd(row_pointers, i, share);
    return entries;
  }

 private:
  // The end of the last partition of a segment, rounded up to where the next segment begins.
  int64_t SegmentEnd(const int32_t* row_pointers, int64_t segment, int64_t capacity) const {
    const int64_t end = row_pointers[segment * row_pointers_per_segment_ + num_sparsecores_ - 1];
    return std::clamp<int64_t>((end + kPartitionAlignment - 1) / kPartitionAlignment * kPartitionAlignment, 0, capacity);
  }

  const int32_t* row_pointers_;
  const int32_t* ids_;
  const int32_t* samples_;
  const float* gains_;
  int64_t num_row_pointers_, num_entries_, num_sparsecores_, sparsecores_per_device_, row_pointers_per_segment_;
  bool shared_;
  int64_t max_minibatches_, num_minibatches_;
  const Stack* stacks_;
  int64_t num_stacks_;
};

// The begin of the binding of a handler that takes a packed batch: its arrays.
inline auto BindPacked() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Int32s>().Arg<Int32s>().Arg<Int32s>().Arg<Floats>().Arg<Int32s>();
}

// A binding with the attributes that say where the stacks lie in these.
template <typename Binding>
auto WithLayout(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Attr<int64_t>("num_sparsecores")
      .template Attr<int64_t>("sparsecores_per_device")
      .template Attr<int64_t>("max_minibatches")
      .template Attr<Int64Span>("stacks");
}

// Runs task(0), ..., task(count - 1) on the threads that a kernel may use; `bytes` are the bytes of rows that all of them touch.
template <typename Task>
ffi::Error RunTasks(ffi::ThreadPool threads, int64_t count, int64_t bytes, Task&& task) {
  const int64_t helpers = bytes < kInlineBytes ? 0 : NumThreads(threads) - 1;
  ParallelFor(helpers, count, task);
  return ffi::Error::Success();
}

// An array [rows, columns], or [rows], which is one column; not valid where a buffer is neither, or not float32.
struct Columns {
  float* data = nullptr;  // May be null where there are no elements.
  int64_t rows = 0, columns = -1;

  bool valid() const { return columns >= 0; }

  template <typename Buffers>
  static Columns Of(const Buffers& buffers, int64_t k) {
    auto buffer = buffers.template get<ffi::AnyBuffer>(k);
    if (!buffer.has_value()) return {};
    if constexpr (std::is_same_v<Buffers, ffi::RemainingRets>) {
      return Of(**buffer);
    } else {
      return Of(*buffer);
    }
  }

  static Columns Of(const ffi::AnyBuffer& buffer) {
    const auto shape = buffer.dimensions();
    if (buffer.element_type() != ffi::F32 || shape.size() < 1 || shape.size() > 2) return {};
    return {static_cast<float*>(buffer.untyped_data()), shape[0], shape.size() == 2 ? shape[1] : 1};
  }

  bool SameShape(const Columns& other) const { return rows == other.rows && columns == other.columns; }
};

}  // namespace embax

#endif  // EMBAX_KERNELS_PACKED_BATCH_H_
