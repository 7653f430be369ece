// Lookup and update of all stacks of a step, one call each. The work on one SparseCore of one stack is one task; tasks
// write disjoint memory and sum in a fixed order, so the result does not depend on the number of threads.
#include "kernels/ffi.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/format.h"
#include "core/parallel.h"
#include "kernels/rows.h"
#include "xla/ffi/api/ffi.h"

namespace embax {
namespace {

namespace ffi = xla::ffi;

using Int32s = ffi::Buffer<ffi::S32, 1>;
using Floats = ffi::Buffer<ffi::F32, 1>;
using Matrix = ffi::Buffer<ffi::F32, 2>;
using Int64Span = ffi::Span<const int64_t>;
using ResultMatrix = ffi::Result<Matrix>;
using FloatSpan = ffi::Span<const float>;

// Below this many bytes of rows the hand-off to other threads costs more than it gains.
constexpr int64_t kInlineBytes = 256 << 10;

ffi::Error Invalid(const std::string& what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "embax: " + what);
}

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

// Threads that a kernel may use: those of XLA's pool, or fewer if EMBAX_NUM_THREADS says so, which is read once: other
// threads may change the environment later.
int64_t NumThreads(ffi::ThreadPool pool) {
  static const int64_t asked = [] {
    const char* limit = std::getenv("EMBAX_NUM_THREADS");
    return limit != nullptr ? std::atoll(limit) : 0;
  }();
  const int64_t available = std::max<int64_t>(pool.num_threads(), 1);
  return asked > 0 ? std::min<int64_t>(asked, available) : available;
}

// A handler that runs `kHandler`; memory that cannot be had becomes an error of the computation.
template <auto kHandler>
struct Guarded;
template <typename... Args, ffi::Error (*kHandler)(Args...)>
struct Guarded<kHandler> {
  static ffi::Error Run(Args... args) {
    try {
      return kHandler(args...);
    } catch (const std::exception& error) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string("embax: ") + error.what());
    }
  }
};

// Runs one task for each stack and SparseCore of the device on XLA's threads; `bytes` are the bytes of rows that all of them
// touch.
template <typename Task>
ffi::Error RunTasks(ffi::ThreadPool threads, const PackedBatch& batch, int64_t bytes, Task&& task) {
  const int64_t helpers = bytes < kInlineBytes ? 0 : NumThreads(threads) - 1;
  const int64_t sparsecores = batch.sparsecores_per_device();
  ParallelFor([&](std::function<void()> work) { threads.Schedule(std::move(work)); }, helpers,
              batch.num_stacks() * sparsecores, [&](int64_t i) { task(i / sparsecores, i % sparsecores); });
  return ffi::Error::Success();
}

// An array [rows, columns], or [rows], which is one column; without data where a buffer is neither, or not float32.
struct Columns {
  float* data = nullptr;
  int64_t rows = 0, columns = 0;

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

  bool SameShape(const Columns& other) const { return rows == other.rows && columns == other.columns; }

 private:
  static Columns Of(const ffi::AnyBuffer& buffer) {
    const auto shape = buffer.dimensions();
    if (buffer.element_type() != ffi::F32 || shape.size() < 1 || shape.size() > 2) return {};
    return {static_cast<float*>(buffer.untyped_data()), shape[0], shape.size() == 2 ? shape[1] : 1};
  }
};

ffi::Error Lookup(ffi::ThreadPool threads, Int32s row_pointers, Int32s ids, Int32s samples, Floats gains,
                  Int32s num_minibatches, ffi::RemainingArgs tables, ffi::RemainingRets activations,
                  int64_t num_sparsecores, int64_t sparsecores_per_device, int64_t max_minibatches, Int64Span stacks,
                  bool gathered, FloatSpan quantization) {
  const PackedBatch batch(row_pointers, ids, samples, gains, num_minibatches, num_sparsecores, sparsecores_per_device,
                          max_minibatches, stacks);
  if (const std::string problem = batch.Problem(); !problem.empty()) return Invalid(problem);
  const int64_t n = batch.num_stacks();
  if (static_cast<int64_t>(tables.size()) != n || static_cast<int64_t>(activations.size()) != n ||
      static_cast<int64_t>(quantization.size()) != 3 * n) {
    return Invalid("lookup: as many tables and activations as stacks are expected");
  }
  std::vector<LookupTask> tasks(n);
  int64_t bytes = 0;
  for (int64_t k = 0; k < n; ++k) {
    const Columns table = Columns::Of(tables, k), out = Columns::Of(activations, k);
    if (table.data == nullptr || out.data == nullptr) return Invalid("lookup: tables must be float32 of rank 1 or 2");
    const int64_t samples_per_sparsecore = batch.stack(k).samples_per_sparsecore;
    if ((!gathered && table.rows % num_sparsecores != 0) ||
        out.rows != samples_per_sparsecore * sparsecores_per_device || out.columns != table.columns) {
      return Invalid("lookup: the shapes of table and activations of stack " + std::to_string(k) + " do not match");
    }
    LookupTask& t = tasks[k];
    t.num_partitions = num_sparsecores;
    t.table = table.data;
    t.rows_per_partition = gathered ? table.rows : table.rows / num_sparsecores;
    t.partition_stride = gathered ? 0 : t.rows_per_partition;
    t.dim = table.columns;
    t.out = out.data;
    t.num_samples = samples_per_sparsecore;
    t.quantization = {quantization[3 * k], quantization[3 * k + 1], quantization[3 * k + 2]};
    bytes += sizeof(float) * t.dim * (batch.NumEntries(k) + out.rows);
  }
  const RowKernels& kernels = SelectRowKernels();
  return RunTasks(threads, batch, bytes, [&](int64_t stack, int64_t sparsecore) {
    LookupTask t = tasks[stack];
    std::vector<Entries> minibatches;
    batch.Append(stack, sparsecore, minibatches);
    t.minibatches = minibatches.data();
    t.num_minibatches = batch.num_minibatches();
    t.out += sparsecore * t.num_samples * t.dim;
    kernels.lookup(t);
  });
}

// Operands after the packed arrays: hyperparameters of all stacks, one gradient a stack, table and slots of each stack,
// then any number that are not read: they order the update after what computes them. Results: tables and slots, in place.
ffi::Error Update(ffi::ThreadPool threads, Int32s row_pointers, Int32s ids, Int32s samples, Floats gains,
                  Int32s num_minibatches, Floats hyperparameters, ffi::RemainingArgs operands,
                  ffi::RemainingRets results, int64_t num_sparsecores, int64_t sparsecores_per_device,
                  int64_t max_minibatches, Int64Span stacks, Int64Span rules, Int64Span num_hyperparameters, FloatSpan options) {
  const PackedBatch batch(row_pointers, ids, samples, gains, num_minibatches, num_sparsecores, sparsecores_per_device,
                          max_minibatches, stacks);
  if (const std::string problem = batch.Problem(); !problem.empty()) return Invalid(problem);
  if (sparsecores_per_device != num_sparsecores) return Invalid("update: the rows of several devices");
  const RowKernels& kernels = SelectRowKernels();
  const int64_t n = batch.num_stacks();
  if (static_cast<int64_t>(rules.size()) != n || static_cast<int64_t>(num_hyperparameters.size()) != n ||
      static_cast<int64_t>(options.size()) != 6 * n) {
    return Invalid("update: one rule with its options for each stack is expected");
  }
  struct StackUpdate {
    UpdateTask task;
    const RowRule* rule;
  };
  std::vector<StackUpdate> updates(n);
  int64_t bytes = 0, next_state = 0, next_hyperparameter = 0;
  for (int64_t k = 0; k < n; ++k) {
    if (rules[k] < 0 || rules[k] >= kernels.num_rules) return Invalid("update: unknown rule");
    const RowRule& rule = kernels.rules[rules[k]];
    UpdateTask& t = updates[k].task;
    updates[k].rule = &rule;
    if (next_state + rule.num_slots >= static_cast<int64_t>(results.size()) ||
        n + next_state + rule.num_slots >= static_cast<int64_t>(operands.size()) ||
        num_hyperparameters[k] < rule.num_hyperparameters || num_hyperparameters[k] > rule.num_hyperparameters + 1 ||
        num_hyperparameters[k] > static_cast<int64_t>(hyperparameters.element_count()) - next_hyperparameter) {
      return Invalid("update: stack " + std::to_string(k) + " lacks operands or results");
    }
    const Columns gradient = Columns::Of(operands, k);
    if (gradient.data == nullptr) return Invalid("update: gradients must be float32 of rank 1 or 2");
    t.dim = gradient.columns;
    t.gradient = gradient.data;
    t.num_samples = batch.stack(k).samples_per_sparsecore;
    t.num_minibatches = batch.num_minibatches();
    t.num_sources = num_sparsecores * t.num_minibatches;
    if (gradient.rows != t.num_samples * num_sparsecores) {
      return Invalid("update: the gradient of stack " + std::to_string(k) + " has another number of samples");
    }
    for (int slot = 0; slot <= rule.num_slots; ++slot, ++next_state) {
      const Columns before = Columns::Of(operands, n + next_state), after = Columns::Of(results, next_state);
      if (before.data == nullptr || after.data == nullptr) {
        return Invalid("update: tables and slots must be float32 of rank 1 or 2");
      }
      if (slot == 0) t.rows_per_partition = before.rows / num_sparsecores;
      if (before.rows != t.rows_per_partition * num_sparsecores ||
          before.columns != StateColumns(rule.row_wise, slot, t.dim) || !after.SameShape(before)) {
        return Invalid("update: the shapes of table, slots and gradient of stack " + std::to_string(k) + " do not match");
      }
      t.state[slot] = after.data;
      if (after.data != before.data) std::copy_n(before.data, before.rows * before.columns, after.data);
    }
    t.hyperparameters = hyperparameters.typed_data() + next_hyperparameter;
    next_hyperparameter += num_hyperparameters[k];
    const float* o = options.begin() + 6 * k;
    t.options = {o[0], o[1], o[2], o[3], o[4]};
    // Behind those of the rule, where rows decay apart from it.
    if (num_hyperparameters[k] > rule.num_hyperparameters) t.options.decay = t.hyperparameters[rule.num_hyperparameters];
    t.width = std::clamp<int64_t>(static_cast<int64_t>(o[5]), 1, t.dim);
    bytes += sizeof(float) * t.dim * batch.NumEntries(k) * (2 + rule.num_slots);
  }
  return RunTasks(threads, batch, bytes, [&](int64_t stack, int64_t partition) {
    UpdateTask t = updates[stack].task;
    std::vector<Entries> sources;
    sources.reserve(t.num_sources);
    for (int64_t s = 0; s < num_sparsecores; ++s) batch.Append(stack, s, sources);
    std::vector<Cursor> cursors(t.num_sources);
    std::vector<float> sum(t.dim);
    t.entries = sources.data();
    t.cursors = cursors.data();
    t.sum = sum.data();
    t.partition = partition;
    const RowRule& rule = *updates[stack].rule;
    for (int slot = 0; slot <= rule.num_slots; ++slot) {
      t.state[slot] += partition * t.rows_per_partition * StateColumns(rule.row_wise, slot, t.dim);
    }
    rule.update(t);
  });
}

// Every row of the result is `row`. Rows of a table are read at random: huge pages, asked for before the memory is first
// touched, spare most of the page table walks.
ffi::Error Fill(ffi::ThreadPool threads, Floats row, ResultMatrix table) {
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto shape = table->dimensions();
  const int64_t rows = shape[0], dim = shape[1];
  if (static_cast<int64_t>(row.element_count()) != dim) return Invalid("fill: the row has another length than the table");
  float* data = table->typed_data();
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data + rows * dim) / kHugePage * kHugePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // Only a wish: may fail.
#endif
  const int64_t rows_per_task = std::max<int64_t>(1, kHugePage / (sizeof(float) * std::max<int64_t>(dim, 1)));
  const int64_t tasks = (rows + rows_per_task - 1) / rows_per_task;
  ParallelFor([&](std::function<void()> work) { threads.Schedule(std::move(work)); }, NumThreads(threads) - 1, tasks,
              [&](int64_t task) {
                const int64_t last = std::min(rows, (task + 1) * rows_per_task);
                for (int64_t r = task * rows_per_task; r < last; ++r) std::copy_n(row.typed_data(), dim, data + r * dim);
              });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kLookup, Guarded<Lookup>::Run,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Int32s>()
                           .Arg<Int32s>()
                           .Arg<Int32s>()
                           .Arg<Floats>()
                           .Arg<Int32s>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attr<int64_t>("num_sparsecores")
                           .Attr<int64_t>("sparsecores_per_device")
                           .Attr<int64_t>("max_minibatches")
                           .Attr<Int64Span>("stacks")
                           .Attr<bool>("gathered")
                           .Attr<FloatSpan>("quantization"));

XLA_FFI_DEFINE_HANDLER(kUpdate, Guarded<Update>::Run,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Int32s>()
                           .Arg<Int32s>()
                           .Arg<Int32s>()
                           .Arg<Floats>()
                           .Arg<Int32s>()
                           .Arg<Floats>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attr<int64_t>("num_sparsecores")
                           .Attr<int64_t>("sparsecores_per_device")
                           .Attr<int64_t>("max_minibatches")
                           .Attr<Int64Span>("stacks")
                           .Attr<Int64Span>("rules")
                           .Attr<Int64Span>("num_hyperparameters")
                           .Attr<FloatSpan>("options"));

XLA_FFI_DEFINE_HANDLER(kFill, Guarded<Fill>::Run,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Ret<Matrix>());

}  // namespace

const FfiHandler kFfiHandlers[] = {
    {"embax_lookup", kLookup}, {"embax_update", kUpdate}, {"embax_fill", kFill}, {nullptr, nullptr}};

}  // namespace embax
