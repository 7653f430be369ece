// The update of all stacks of a step, in one call, in place. A part of the rows that a SparseCore owns is one task; tasks write
// disjoint memory and sum in a fixed order, so the result does not depend on the number of threads.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/keys.h"
#include "core/radix_sort.h"
#include "kernels/ffi.h"
#include "kernels/ffi_common.h"
#include "kernels/order_scratch.h"
#include "kernels/packed_batch.h"
#include "kernels/rows.h"
#include "kernels/stack_features.h"

namespace embax {
namespace {

// The update of one stack, but for its entries and gradients.
struct StackUpdate {
  UpdateTask task;
  const RowRule* rule = nullptr;
};

// What the update handlers get behind their own operands and the gradients: table and slots of each stack from
// operands[first_state] on, then any number that are not read: they order the update after what computes them. Results: tables
// and slots, in place.
class StackUpdates {
 public:
  StackUpdates(const Floats& hyperparameters, const ffi::RemainingArgs& operands, const ffi::RemainingRets& results,
               int64_t first_state, const std::vector<int64_t>& columns, Int64Span rules, Int64Span num_hyperparameters,
               FloatSpan options)
      : updates_(columns.size()) {
    problem_ = Read(hyperparameters, operands, results, first_state, columns, rules, num_hyperparameters, options);
  }

  const std::string& problem() const { return problem_; }
  StackUpdate& operator[](int64_t k) { return updates_[k]; }
  // Rows of the table of a stack.
  int64_t table_rows(int64_t k) const { return table_rows_[k]; }

 private:
  std::string Read(const Floats& hyperparameters, const ffi::RemainingArgs& operands, const ffi::RemainingRets& results,
                   int64_t first_state, const std::vector<int64_t>& columns, Int64Span rules, Int64Span num_hyperparameters,
                   FloatSpan options) {
    const RowKernels& kernels = SelectRowKernels();
    const int64_t n = static_cast<int64_t>(updates_.size());
    if (static_cast<int64_t>(rules.size()) != n || static_cast<int64_t>(num_hyperparameters.size()) != n ||
        static_cast<int64_t>(options.size()) != 6 * n) {
      return "one rule with its options for each stack is expected";
    }
    int64_t next_state = 0, next_hyperparameter = 0;
    for (int64_t k = 0; k < n; ++k) {
      const std::string stack = "stack " + std::to_string(k);
      if (rules[k] < 0 || rules[k] >= kernels.num_rules) return "unknown rule";
      const RowRule& rule = kernels.rules[rules[k]];
      UpdateTask& t = updates_[k].task;
      updates_[k].rule = &rule;
      if (next_state + rule.num_slots >= static_cast<int64_t>(results.size()) ||
          first_state + next_state + rule.num_slots >= static_cast<int64_t>(operands.size()) ||
          num_hyperparameters[k] < rule.num_hyperparameters || num_hyperparameters[k] > rule.num_hyperparameters + 1 ||
          num_hyperparameters[k] > static_cast<int64_t>(hyperparameters.element_count()) - next_hyperparameter) {
        return stack + " lacks operands or results";
      }
      t.dim = columns[k];
      for (int slot = 0; slot <= rule.num_slots; ++slot, ++next_state) {
        const Columns before = Columns::Of(operands, first_state + next_state), after = Columns::Of(results, next_state);
        if (!before.valid() || !after.valid()) return "tables and slots must be float32 of rank 1 or 2";
        if (slot == 0) table_rows_.push_back(before.rows);
        if (before.rows != table_rows_.back() || before.columns != StateColumns(rule.row_wise, slot, t.dim) ||
            !after.SameShape(before)) {
          return "the shapes of table, slots and gradient of " + stack + " do not match";
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
    }
    return "";
  }

  std::vector<StackUpdate> updates_;
  std::vector<int64_t> table_rows_;
  std::string problem_;
};

ffi::Error Update(ffi::ThreadPool threads, Int32s row_pointers, Int32s ids, Int32s samples, Floats gains,
                  Int32s num_minibatches, Floats hyperparameters, ffi::RemainingArgs operands,
                  ffi::RemainingRets results, int64_t num_sparsecores, int64_t sparsecores_per_device,
                  int64_t max_minibatches, Int64Span stacks, Int64Span rules, Int64Span num_hyperparameters,
                  FloatSpan options, Int64Span num_features) {
  const PackedBatch batch(row_pointers, ids, samples, gains, num_minibatches, num_sparsecores, sparsecores_per_device,
                          max_minibatches, stacks);
  if (const std::string problem = batch.Problem(); !problem.empty()) return Invalid(problem);
  if (sparsecores_per_device != num_sparsecores) return Invalid("update: the rows of several devices");
  const int64_t n = batch.num_stacks();
  const StackFeatures gradients(operands, batch, num_features);
  if (!gradients.problem().empty()) return Invalid("update: " + gradients.problem());
  std::vector<int64_t> columns;
  for (int64_t k = 0; k < n; ++k) columns.push_back(gradients.columns(k));
  StackUpdates updates(hyperparameters, operands, results, gradients.first(n), columns, rules, num_hyperparameters, options);
  if (!updates.problem().empty()) return Invalid("update: " + updates.problem());
  // One part of a partition is one task: with so many entries what a thread works in stays in its caches.
  constexpr int64_t kEntriesPerPart = 4096;
  struct Part {
    int64_t stack, partition, number;
  };
  std::vector<Part> parts;
  int64_t bytes = 0;
  for (int64_t k = 0; k < n; ++k) {
    UpdateTask& t = updates[k].task;
    t.gradients = gradients.rows(gradients.first(k));
    t.num_features = gradients.count(k);
    t.num_minibatches = batch.num_minibatches();
    t.num_sources = num_sparsecores * t.num_minibatches;
    t.rows_per_partition = updates.table_rows(k) / num_sparsecores;
    t.num_parts = std::max<int64_t>(1, batch.NumEntries(k) / (num_sparsecores * kEntriesPerPart));
    if (updates.table_rows(k) != t.rows_per_partition * num_sparsecores) {
      return Invalid("update: the table of stack " + std::to_string(k) + " has another number of rows");
    }
    bytes += sizeof(float) * t.dim * batch.NumEntries(k) * (2 + updates[k].rule->num_slots);
    for (int64_t partition = 0; partition < num_sparsecores; ++partition) {
      for (int64_t number = 0; number < t.num_parts; ++number) parts.push_back({k, partition, number});
    }
  }
  const RowKernels& kernels = SelectRowKernels();
  return RunTasks(threads, static_cast<int64_t>(parts.size()), bytes, [&](int64_t task) {
    const Part part = parts[task];
    UpdateTask t = updates[part.stack].task;
    std::vector<Entries> sources;
    sources.reserve(t.num_sources);
    for (int64_t s = 0; s < num_sparsecores; ++s) batch.Append(part.stack, s, sources);
    t.entries = sources.data();
    t.partition = part.partition;
    t.part = part.number;
    const RowRule& rule = *updates[part.stack].rule;
    for (int slot = 0; slot <= rule.num_slots; ++slot) {
      t.state[slot] += t.partition * t.rows_per_partition * StateColumns(rule.row_wise, slot, t.dim);
    }
    PartitionScratch::OfThread().Serve(t, kernels, t.dim);
    rule.update(t);
  });
}

// Rows that are given one by one, sorted, as the entries of one source.
class SortedRows {
 public:
  // What is not in [0, num_rows) is left out.
  SortedRows(const int32_t* rows, int64_t count, int64_t num_rows) {
    std::vector<uint64_t> entries(count), other(count);
    int64_t kept = 0;
    bool sorted = true;
    for (int64_t i = 0; i < count; ++i) {
      if (rows[i] < 0 || rows[i] >= num_rows) continue;
      entries[kept] = Entry(static_cast<uint32_t>(rows[i]), static_cast<uint32_t>(i));
      sorted = sorted && (kept == 0 || entries[kept - 1] < entries[kept]);
      ++kept;
    }
    const uint64_t* in_order = entries.data();
    if (!sorted) {
      Digits digits = ChooseDigits(kept, KeyBits(num_rows));
      std::vector<uint32_t> histograms(digits.passes * static_cast<size_t>(digits.size()), 0);
      digits.histograms = histograms.data();
      for (int pass = 0; pass < digits.passes; ++pass) {
        uint32_t* histogram = digits.histograms + pass * static_cast<size_t>(digits.size());
        const int shift = 32 + pass * digits.bits;
        for (int64_t i = 0; i < kept; ++i) ++histogram[(entries[i] >> shift) & (digits.size() - 1)];
      }
      in_order = RadixSort(digits, kept, entries.data(), other.data());
    }
    size_ = static_cast<int32_t>(kept);
    ids_.resize(kept);
    samples_.resize(kept);
    gains_.assign(kept, 1.0f);
    for (int64_t i = 0; i < kept; ++i) {
      ids_[i] = static_cast<int32_t>(in_order[i] >> 32);
      samples_[i] = static_cast<int32_t>(in_order[i]);
    }
  }

  Entries entries() const { return {&size_, ids_.data(), samples_.data(), gains_.data(), size_, 0}; }

 private:
  int32_t size_;
  std::vector<int32_t> ids_, samples_;
  std::vector<float> gains_;
};

// Operands: hyperparameters, the rows of each stack, their gradients, and as StackUpdates says.
ffi::Error ApplyRows(ffi::ThreadPool threads, Floats hyperparameters, ffi::RemainingArgs operands,
                     ffi::RemainingRets results, Int64Span rules, Int64Span num_hyperparameters, FloatSpan options) {
  // Parts that the rows of a stack are divided into, for the threads to share.
  constexpr int64_t kParts = 16;
  const int64_t n = static_cast<int64_t>(rules.size());
  std::vector<Int32s> rows;
  std::vector<FeatureRows> gradients;
  std::vector<int64_t> columns;
  for (int64_t k = 0; k < n; ++k) {
    const Columns gradient = Columns::Of(operands, n + k);
    if (!gradient.valid()) return Invalid("apply_rows: gradients must be float32 of rank 1 or 2");
    auto buffer = operands.get<Int32s>(k);
    if (!buffer.has_value() || static_cast<int64_t>(buffer->element_count()) != gradient.rows || gradient.rows > INT32_MAX) {
      return Invalid("apply_rows: one row for each gradient of stack " + std::to_string(k) + " is expected");
    }
    rows.push_back(*buffer);
    gradients.push_back({0, gradient.rows, gradient.rows, gradient.data});
    columns.push_back(gradient.columns);
  }
  StackUpdates updates(hyperparameters, operands, results, 2 * n, columns, rules, num_hyperparameters, options);
  if (!updates.problem().empty()) return Invalid("apply_rows: " + updates.problem());
  int64_t bytes = 0;
  for (int64_t k = 0; k < n; ++k) {
    UpdateTask& t = updates[k].task;
    t.gradients = &gradients[k];
    t.num_features = 1;
    t.num_minibatches = t.num_sources = 1;
    t.num_parts = kParts;
    t.rows_per_partition = updates.table_rows(k);
    bytes += sizeof(float) * t.dim * gradients[k].rows * (2 + updates[k].rule->num_slots);
  }
  std::vector<std::unique_ptr<SortedRows>> sorted(n);
  ffi::Error error = RunTasks(threads, n, bytes, [&](int64_t k) {
    sorted[k] = std::make_unique<SortedRows>(rows[k].typed_data(), rows[k].element_count(), updates.table_rows(k));
  });
  if (error.failure()) return error;
  const RowKernels& kernels = SelectRowKernels();
  return RunTasks(threads, n * kParts, bytes, [&](int64_t task) {
    const int64_t stack = task / kParts;
    const Entries entries = sorted[stack]->entries();
    UpdateTask t = updates[stack].task;
    t.entries = &entries;
    t.partition = 0;
    t.part = task % kParts;
    PartitionScratch::OfThread().Serve(t, kernels, t.dim);
    updates[stack].rule->update(t);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(EmbaxUpdate, Guarded<Update>::Run,
                       WithLayout(BindPacked().Arg<Floats>().RemainingArgs().RemainingRets())
                           .Attr<Int64Span>("rules")
                           .Attr<Int64Span>("num_hyperparameters")
                           .Attr<FloatSpan>("options")
                           .Attr<Int64Span>("num_features"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(EmbaxApplyRows, Guarded<ApplyRows>::Run,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Floats>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attr<Int64Span>("rules")
                           .Attr<Int64Span>("num_hyperparameters")
                           .Attr<FloatSpan>("options"));

}  // namespace embax
