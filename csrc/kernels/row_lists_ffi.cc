// The rows that a batch names, each once, and the sums of their gradients, for exchange between devices.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/ffi.h"
#include "kernels/ffi_common.h"
#include "kernels/packed_batch.h"
#include "kernels/order_scratch.h"
#include "kernels/prefetch.h"
#include "kernels/rows.h"

namespace embax {
namespace {

// The partitions of a stack are divided into at most so many parts, for the threads to share.
constexpr int64_t kParts = 64;

// The partitions of all stacks, in parts, and where the rows of each partition lie in the list of its stack.
class RowLists {
 public:
  // `num_rows` are the rows of each table on a device.
  RowLists(const PackedBatch& batch, Int64Span num_rows)
      : batch_(batch), num_rows_(num_rows), per_part_((batch.num_sparsecores() + kParts - 1) / kParts) {}

  std::string Problem() const {
    if (static_cast<int64_t>(num_rows_.size()) != batch_.num_stacks()) return "the rows of each table are expected";
    for (const int64_t rows : num_rows_) {
      if (rows < 0 || rows > INT32_MAX || rows % batch_.sparsecores_per_device() != 0) return "a table has a wrong number of rows";
    }
    return "";
  }

  int64_t num_tasks() const { return batch_.num_stacks() * parts(); }
  int64_t stack_of(int64_t task) const { return task / parts(); }

  // Calls body(partition task) for each partition of a task.
  template <typename Body>
  void ForEachPartition(int64_t task, Body&& body) const {
    const RowKernels& kernels = SelectRowKernels();
    const int64_t stack = stack_of(task), begin = task % parts() * per_part_;
    std::vector<Entries> sources;
    for (int64_t s = 0; s < batch_.sparsecores_per_device(); ++s) batch_.Append(stack, s, sources);
    PartitionTask t;
    t.entries = sources.data();
    t.num_sources = static_cast<int64_t>(sources.size());
    t.num_minibatches = batch_.num_minibatches();
    t.rows_per_partition = num_rows_[stack] / batch_.sparsecores_per_device();
    const int64_t end = std::min(begin + per_part_, batch_.num_sparsecores());
    for (t.partition = begin; t.partition < end; ++t.partition) {
      PartitionScratch::OfThread().Serve(t, kernels);
      body(t);
    }
  }

  // The first row of a partition on the device that owns it.
  int32_t FirstRow(const PartitionTask& t) const {
    return static_cast<int32_t>(t.partition % batch_.sparsecores_per_device() * t.rows_per_partition);
  }

  // Counts the rows of all partitions.
  ffi::Error Count(ffi::ThreadPool threads) {
    const RowKernels& kernels = SelectRowKernels();
    starts_.assign(batch_.num_stacks() * (batch_.num_sparsecores() + 1), 0);
    ffi::Error error = RunTasks(threads, num_tasks(), Bytes(1), [&](int64_t task) {
      int64_t* counts = Starts(stack_of(task)) + 1;
      ForEachPartition(task, [&](const PartitionTask& partition) {
        ListTask t{};
        static_cast<PartitionTask&>(t) = partition;
        t.num_samples = batch_.stack(stack_of(task)).samples_per_sparsecore;
        t.max_rows = t.rows_per_partition;
        counts[t.partition] = kernels.list_rows(t);
      });
    });
    for (int64_t k = 0; k < batch_.num_stacks(); ++k) {
      int64_t* starts = Starts(k);
      // Row pointers that do not ascend may name more rows than there are entries.
      const int64_t capacity = batch_.stack(k).capacity;
      for (int64_t p = 0; p < batch_.num_sparsecores(); ++p) starts[p + 1] = std::min(starts[p] + starts[p + 1], capacity);
    }
    return error;
  }

  // [num_sparsecores + 1]: where the rows of each partition of a stack begin in its list, after Count.
  int64_t* Starts(int64_t stack) { return starts_.data() + stack * (batch_.num_sparsecores() + 1); }
  const int64_t* Starts(int64_t stack) const { return starts_.data() + stack * (batch_.num_sparsecores() + 1); }
  // The rows of a partition.
  int64_t count(int64_t stack, int64_t partition) const { return Starts(stack)[partition + 1] - Starts(stack)[partition]; }
  int64_t size(int64_t stack) const { return Starts(stack)[batch_.num_sparsecores()]; }

  // Writes what the list of a stack has beside its rows.
  void Finish(int64_t stack, int32_t* rows, int64_t capacity, int32_t* ends, int64_t num_owners) const {
    const int64_t per_owner = batch_.sparsecores_per_device();
    for (int64_t owner = 0; owner < num_owners; ++owner) ends[owner] = static_cast<int32_t>(Starts(stack)[(owner + 1) * per_owner]);
    std::fill(rows + size(stack), rows + capacity, INT32_MAX);
  }

  // About the bytes that all tasks read for entries of so many numbers.
  int64_t Bytes(int64_t numbers) const {
    int64_t entries = 0;
    for (int64_t k = 0; k < batch_.num_stacks(); ++k) entries += batch_.NumEntries(k);
    return entries * numbers * static_cast<int64_t>(sizeof(float));
  }

 private:
  int64_t parts() const { return (batch_.num_sparsecores() + per_part_ - 1) / per_part_; }

  const PackedBatch& batch_;
  const Int64Span num_rows_;
  const int64_t per_part_;
  std::vector<int64_t> starts_;
};

// Whether a result holds int32 numbers, `size` of them.
int32_t* Int32Result(const ffi::RemainingRets& results, int64_t k, int64_t size) {
  auto buffer = results.get<Int32s>(k);
  if (!buffer.has_value() || static_cast<int64_t>((*buffer)->element_count()) != size) return nullptr;
  return (*buffer)->typed_data();
}

// Results: for each entry the place of its row in the list of its stack, -1 where there is none; and of each stack the list
// of its rows and where those of each owner end.
ffi::Error DistinctRows(ffi::ThreadPool threads, Int32s row_pointers, Int32s ids, Int32s samples, Floats gains,
                        Int32s num_minibatches, ffi::RemainingRets results, int64_t num_sparsecores,
                        int64_t sparsecores_per_device, int64_t max_minibatches, Int64Span stacks, Int64Span num_rows) {
  const PackedBatch batch(row_pointers, ids, samples, gains, num_minibatches, num_sparsecores, sparsecores_per_device,
                          max_minibatches, stacks);
  RowLists lists(batch, num_rows);
  if (const std::string problem = batch.Problem(); !problem.empty()) return Invalid("distinct_rows: " + problem);
  if (const std::string problem = lists.Problem(); !problem.empty()) return Invalid("distinct_rows: " + problem);
  const int64_t n = batch.num_stacks(), num_owners = num_sparsecores / sparsecores_per_device;
  const int64_t num_entries = ids.element_count();
  int32_t* slots = Int32Result(results, 0, num_entries);
  std::vector<int32_t*> rows(n), ends(n);
  for (int64_t k = 0; k < n; ++k) {
    rows[k] = Int32Result(results, 1 + 2 * k, batch.stack(k).capacity);
    ends[k] = Int32Result(results, 2 + 2 * k, num_owners);
    if (rows[k] == nullptr || ends[k] == nullptr) return Invalid("distinct_rows: a result has a wrong size");
  }
  if (slots == nullptr) return Invalid("distinct_rows: a result has a wrong size");
  if (ffi::Error error = lists.Count(threads); error.failure()) return error;
  for (int64_t k = 0; k < n; ++k) lists.Finish(k, rows[k], batch.stack(k).capacity, ends[k], num_owners);
  std::fill_n(slots, num_entries, -1);
  const RowKernels& kernels = SelectRowKernels();
  return RunTasks(threads, lists.num_tasks(), lists.Bytes(2), [&](int64_t task) {
    const int64_t stack = lists.stack_of(task);
    lists.ForEachPartition(task, [&](const PartitionTask& partition) {
      ListTask t{};
      static_cast<PartitionTask&>(t) = partition;
      t.num_samples = batch.stack(stack).samples_per_sparsecore;
      t.max_rows = lists.count(stack, t.partition);
      t.first_row = lists.FirstRow(t);
      t.first_slot = static_cast<int32_t>(lists.Starts(stack)[t.partition]);
      t.rows = rows[stack] + t.first_slot;
      t.ids_base = ids.typed_data();
      t.slots = slots;
      kernels.list_rows(t);
    });
  });
}

// Operands after the packed arrays: one gradient a stack. Results of each stack: its rows, where those of each owner end, and
// their gradients.
ffi::Error RowGradients(ffi::ThreadPool threads, Int32s row_pointers, Int32s ids, Int32s samples, Floats gains,
                        Int32s num_minibatches, ffi::RemainingArgs gradients, ffi::RemainingRets results,
                        int64_t num_sparsecores, int64_t sparsecores_per_device, int64_t max_minibatches, Int64Span stacks,
                        Int64Span num_rows) {
  const PackedBatch batch(row_pointers, ids, samples, gains, num_minibatches, num_sparsecores, sparsecores_per_device,
                          max_minibatches, stacks);
  RowLists lists(batch, num_rows);
  if (const std::string problem = batch.Problem(); !problem.empty()) return Invalid("row_gradients: " + problem);
  if (const std::string problem = lists.Problem(); !problem.empty()) return Invalid("row_gradients: " + problem);
  const int64_t n = batch.num_stacks(), num_owners = num_sparsecores / sparsecores_per_device;
  if (static_cast<int64_t>(gradients.size()) != n) return Invalid("row_gradients: one gradient for each stack is expected");
  struct Stack {
    Columns gradient, sums;
    int32_t *rows, *ends;
    FeatureRows gradient_rows{};
  };
  std::vector<Stack> each(n);
  int64_t columns = 1;
  for (int64_t k = 0; k < n; ++k) {
    Stack& stack = each[k];
    const int64_t capacity = batch.stack(k).capacity;
    stack = {Columns::Of(gradients, k), Columns::Of(results, 3 * k + 2), Int32Result(results, 3 * k, capacity),
             Int32Result(results, 3 * k + 1, num_owners)};
    if (!stack.gradient.valid() || !stack.sums.valid() || stack.rows == nullptr || stack.ends == nullptr ||
        stack.sums.rows != capacity || stack.sums.columns != stack.gradient.columns ||
        stack.gradient.rows != batch.stack(k).samples_per_sparsecore * sparsecores_per_device) {
      return Invalid("row_gradients: an operand or a result of stack " + std::to_string(k) + " has a wrong size");
    }
    stack.gradient_rows = {0, batch.stack(k).samples_per_sparsecore, stack.gradient.rows, stack.gradient.data};
    columns = std::max(columns, stack.gradient.columns);
  }
  if (ffi::Error error = lists.Count(threads); error.failure()) return error;
  for (int64_t k = 0; k < n; ++k) {
    lists.Finish(k, each[k].rows, batch.stack(k).capacity, each[k].ends, num_owners);
    const Columns& sums = each[k].sums;
    std::fill(sums.data + lists.size(k) * sums.columns, sums.data + sums.rows * sums.columns, 0.0f);
  }
  const RowKernels& kernels = SelectRowKernels();
  return RunTasks(threads, lists.num_tasks(), lists.Bytes(2 * columns), [&](int64_t task) {
    const int64_t stack = lists.stack_of(task);
    const Stack& own = each[stack];
    lists.ForEachPartition(task, [&](const PartitionTask& partition) {
      const int64_t start = lists.Starts(stack)[partition.partition];
      SumTask t{};
      static_cast<PartitionTask&>(t) = partition;
      t.gradients = &own.gradient_rows;
      t.num_features = 1;
      t.dim = own.gradient.columns;
      t.max_rows = lists.count(stack, t.partition);
      t.first_row = lists.FirstRow(t);
      t.rows = own.rows + start;
      t.sums = own.sums.data + start * t.dim;
      kernels.sum_rows(t);
    });
  });
}

// result[i] = array[places[i]], and 0 where there is no such row.
ffi::Error TakeRows(ffi::ThreadPool threads, ffi::AnyBuffer array, Int32s places, ffi::Result<ffi::AnyBuffer> result) {
  constexpr int64_t kRowsPerTask = 1024;
  const Columns from = Columns::Of(array), to = Columns::Of(*result);
  const int64_t count = places.element_count(), columns = from.columns;
  if (!from.valid() || !to.valid() || to.rows != count || to.columns != columns) {
    return Invalid("take_rows: the array, the places and the result do not match");
  }
  const int32_t* wanted = places.typed_data();
  const auto exists = [&](int64_t i) { return wanted[i] >= 0 && wanted[i] < from.rows; };
  const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(float));
  return RunTasks(threads, (count + kRowsPerTask - 1) / kRowsPerTask, count * row_bytes, [&](int64_t task) {
    const int64_t end = std::min(count, (task + 1) * kRowsPerTask);
    for (int64_t i = task * kRowsPerTask; i < end; ++i) {
      if (i + kPrefetchAhead < end && exists(i + kPrefetchAhead)) {
        PrefetchBytes(from.data + wanted[i + kPrefetchAhead] * columns, row_bytes);
      }
      if (exists(i)) {
        std::copy_n(from.data + wanted[i] * columns, columns, to.data + i * columns);
      } else {
        std::fill_n(to.data + i * columns, columns, 0.0f);
      }
    }
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(EmbaxTakeRows, Guarded<TakeRows>::Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Int32s>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(EmbaxDistinctRows, Guarded<DistinctRows>::Run,
                              WithLayout(BindPacked().RemainingRets()).Attr<Int64Span>("num_rows"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(EmbaxRowGradients, Guarded<RowGradients>::Run,
                              WithLayout(BindPacked().RemainingArgs().RemainingRets()).Attr<Int64Span>("num_rows"));

}  // namespace embax
