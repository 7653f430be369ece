// Lookup and update of all stacks of a step, one call each. The work on one SparseCore of one stack, or on a part of its rows, is
// one task; tasks write disjoint memory and sum in a fixed order, so the result does not depend on the number of threads.
#include "kernels/ffi.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/keys.h"
#include "core/parallel.h"
#include "core/radix_sort.h"
#include "kernels/ffi_common.h"
#include "kernels/huge_pages.h"
#include "kernels/packed_batch.h"
#include "kernels/order_scratch.h"
#include "kernels/rows.h"

namespace embax {
namespace {

using Matrix = ffi::Buffer<ffi::F32, 2>;
using ResultMatrix = ffi::Result<Matrix>;
using FloatSpan = ffi::Span<const float>;

// Asks for huge pages for the activations of all stacks. XLA takes such memory anew from the system for each call, so that each
// page of it costs a fault; those of several stacks lie side by side, and together are large enough for huge pages.
void AdviseFor(std::vector<Columns> activations) {
  constexpr int64_t kGap = 64 / sizeof(float);  // XLA aligns arrays.
  std::sort(activations.begin(), activations.end(), [](const Columns& a, const Columns& b) { return a.data < b.data; });
  const float* begin = nullptr;
  const float* end = nullptr;
  for (const Columns& one : activations) {
    if (end == nullptr || one.data < end || one.data - end > kGap) {
      AdviseHugePages(begin, end);
      begin = one.data;
    }
    end = one.data + one.rows * one.columns;
  }
  AdviseHugePages(begin, end);
}

// Divides activations, `parts` of each, among tasks: the first part of each task, and the number of all. A thread clears a new page
// that it touches, even while another one clears it too. So where there are many pages for each thread, and parts are smaller,
// those that begin in one page are one task.
std::vector<int64_t> FirstOfPages(const std::vector<Columns>& activations, int64_t parts, int64_t threads) {
  constexpr int64_t kPagesPerThread = 8;
  int64_t bytes = 0;
  for (const Columns& one : activations) bytes += sizeof(float) * one.rows * one.columns;
  const bool many = bytes / static_cast<int64_t>(kHugePage) >= kPagesPerThread * threads;
  std::vector<int64_t> firsts;
  uintptr_t last = 0;
  for (size_t k = 0; k < activations.size(); ++k) {
    const Columns& one = activations[k];
    for (int64_t part = 0; part < parts; ++part) {
      const uintptr_t page = reinterpret_cast<uintptr_t>(one.data + one.rows / parts * part * one.columns) / kHugePage;
      if (!many || page != last || firsts.empty()) firsts.push_back(static_cast<int64_t>(k) * parts + part);
      last = page;
    }
  }
  firsts.push_back(static_cast<int64_t>(activations.size()) * parts);
  return firsts;
}

// The arrays of the features of all stacks, one after the other among some buffers.
class StackFeatures {
 public:
  template <typename Buffers>
  StackFeatures(const Buffers& buffers, const PackedBatch& batch, Int64Span num_features) {
    problem_ = Read(buffers, batch, num_features);
  }

  const std::string& problem() const { return problem_; }
  // The first feature of a stack; that of the stack behind the last is the number of all.
  int64_t first(int64_t k) const { return firsts_[k]; }
  int64_t count(int64_t k) const { return firsts_[k + 1] - firsts_[k]; }
  int64_t columns(int64_t k) const { return arrays_[firsts_[k]].columns; }
  const FeatureRows* rows(int64_t feature) const { return &rows_[feature]; }
  const std::vector<Columns>& arrays() const { return arrays_; }

 private:
  template <typename Buffers>
  std::string Read(const Buffers& buffers, const PackedBatch& batch, Int64Span num_features) {
    if (static_cast<int64_t>(num_features.size()) != batch.num_stacks()) return "the features of each stack are expected";
    firsts_.push_back(0);
    for (int64_t k = 0; k < batch.num_stacks(); ++k) {
      const std::string stack = "stack " + std::to_string(k);
      const int64_t left = static_cast<int64_t>(buffers.size()) - firsts_.back();
      if (num_features[k] < 1 || num_features[k] > left) return stack + " lacks arrays of its features";
      firsts_.push_back(firsts_.back() + num_features[k]);
      int64_t samples = 0;
      for (int64_t feature = firsts_[k]; feature < firsts_[k + 1]; ++feature) {
        const Columns array = Columns::Of(buffers, feature);
        if (array.data == nullptr) return "the arrays of features must be float32 of rank 1 or 2";
        arrays_.push_back(array);
        if (array.columns != columns(k)) return "the features of " + stack + " have different columns";
        const int64_t sparsecores = batch.sparsecores_per_device();
        rows_.push_back({samples, (array.rows + sparsecores - 1) / sparsecores, array.rows, array.data});
        samples += rows_.back().samples;
      }
      if (samples != batch.stack(k).samples_per_sparsecore) return "the features of " + stack + " have another number of samples";
    }
    return "";
  }

  std::vector<int64_t> firsts_;
  std::vector<Columns> arrays_;
  std::vector<FeatureRows> rows_;
  std::string problem_;
};

ffi::Error Lookup(ffi::ThreadPool threads, Int32s row_pointers, Int32s ids, Int32s samples, Floats gains,
                  Int32s num_minibatches, ffi::RemainingArgs tables, ffi::RemainingRets activations,
                  int64_t num_sparsecores, int64_t sparsecores_per_device, int64_t max_minibatches, Int64Span stacks,
                  bool gathered, FloatSpan quantization, Int64Span num_features, Int64Span first_rows) {
  const PackedBatch batch(row_pointers, ids, samples, gains, num_minibatches, num_sparsecores, sparsecores_per_device,
                          max_minibatches, stacks);
  if (const std::string problem = batch.Problem(); !problem.empty()) return Invalid(problem);
  const int64_t n = batch.num_stacks();
  if (static_cast<int64_t>(tables.size()) != n || static_cast<int64_t>(quantization.size()) != 3 * n) {
    return Invalid("lookup: as many tables as stacks are expected");
  }
  const StackFeatures features(activations, batch, num_features);
  if (!features.problem().empty()) return Invalid("lookup: " + features.problem());
  if (features.first(n) != static_cast<int64_t>(activations.size()) || first_rows.size() != activations.size()) {
    return Invalid("lookup: a first row, or none, is expected of each feature");
  }
  // Features whose rows no others of their stack have.
  struct Group {
    int64_t stack;
    LookupTask task;
  };
  std::vector<Group> groups;
  std::vector<Columns> outs;  // The first of each group.
  int64_t bytes = 0;
  for (int64_t k = 0; k < n; ++k) {
    const Columns table = Columns::Of(tables, k);
    if (table.data == nullptr) return Invalid("lookup: tables must be float32 of rank 1 or 2");
    if ((!gathered && table.rows % num_sparsecores != 0) || features.columns(k) != table.columns) {
      return Invalid("lookup: the shapes of table and activations of stack " + std::to_string(k) + " do not match");
    }
    LookupTask t{};
    t.num_partitions = num_sparsecores;
    t.table = table.data;
    t.rows_per_partition = gathered ? table.rows : table.rows / num_sparsecores;
    t.partition_stride = gathered ? 0 : t.rows_per_partition;
    t.dim = table.columns;
    t.quantization = {quantization[3 * k], quantization[3 * k + 1], quantization[3 * k + 2]};
    t.end_row = t.rows_per_partition;
    const size_t first_group = groups.size();
    for (int64_t feature = features.first(k); feature < features.first(k + 1); ++feature) {
      const FeatureRows& rows = *features.rows(feature);
      const bool begins = feature == features.first(k) || first_rows[feature] >= 0;
      if (begins) {
        const int64_t least = groups.size() == first_group ? 0 : groups.back().task.first_row;
        if (groups.size() > first_group) groups.back().task.end_row = first_rows[feature];
        t.first_row = groups.size() == first_group ? 0 : first_rows[feature];
        if (t.first_row < least || t.first_row > t.rows_per_partition) {
          return Invalid("lookup: the first rows of stack " + std::to_string(k) + " do not ascend within it");
        }
        t.first_sample = rows.begin;
        t.features = &rows;
        groups.push_back({k, t});
        outs.push_back(features.arrays()[feature]);
      }
      groups.back().task.num_features += 1;
      groups.back().task.num_samples += rows.samples;
      bytes += sizeof(float) * t.dim * rows.rows;
    }
    bytes += sizeof(float) * t.dim * batch.NumEntries(k);
  }
  const std::vector<int64_t> firsts = FirstOfPages(outs, sparsecores_per_device, NumThreads(threads));
  AdviseFor(features.arrays());
  const RowKernels& kernels = SelectRowKernels();
  return RunTasks(threads, static_cast<int64_t>(firsts.size()) - 1, bytes, [&](int64_t number) {
    for (int64_t part = firsts[number]; part < firsts[number + 1]; ++part) {
      const Group& group = groups[part / sparsecores_per_device];
      LookupTask t = group.task;
      t.sparsecore = part % sparsecores_per_device;
      std::vector<Entries> minibatches;
      batch.Append(group.stack, t.sparsecore, minibatches);
      t.minibatches = minibatches.data();
      t.num_minibatches = batch.num_minibatches();
      LookupScratch::OfThread().Serve(t, batch.stack(group.stack).samples_per_sparsecore, Columns::Of(tables, group.stack).rows);
      kernels.lookup(t);
    }
  });
}

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
        if (before.data == nullptr || after.data == nullptr) return "tables and slots must be float32 of rank 1 or 2";
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
    t.num_samples = batch.stack(k).samples_per_sparsecore;
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
    if (gradient.data == nullptr) return Invalid("apply_rows: gradients must be float32 of rank 1 or 2");
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
    t.num_samples = gradients[k].rows;
    t.num_minibatches = t.num_sources = 1;
    t.num_parts = kParts;
    t.rows_per_partition = updates.table_rows(k);
    bytes += sizeof(float) * t.dim * t.num_samples * (2 + updates[k].rule->num_slots);
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

// Every row of the result is `row`. Rows of a table are read at random: huge pages, asked for before the memory is first
// touched, spare most of the page table walks.
ffi::Error Fill(ffi::ThreadPool threads, Floats row, ResultMatrix table) {
  const auto shape = table->dimensions();
  const int64_t rows = shape[0], dim = shape[1];
  if (static_cast<int64_t>(row.element_count()) != dim) return Invalid("fill: the row has another length than the table");
  float* data = table->typed_data();
  AdviseHugePages(data, data + rows * dim);
  const int64_t rows_per_task = std::max<int64_t>(1, kHugePage / (sizeof(float) * std::max<int64_t>(dim, 1)));
  const int64_t tasks = (rows + rows_per_task - 1) / rows_per_task;
  ParallelFor(NumThreads(threads) - 1, tasks, [&](int64_t task) {
    const int64_t last = std::min(rows, (task + 1) * rows_per_task);
    for (int64_t r = task * rows_per_task; r < last; ++r) std::copy_n(row.typed_data(), dim, data + r * dim);
  });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kLookup, Guarded<Lookup>::Run,
                       WithLayout(BindPacked().RemainingArgs().RemainingRets())
                           .Attr<bool>("gathered")
                           .Attr<FloatSpan>("quantization")
                           .Attr<Int64Span>("num_features")
                           .Attr<Int64Span>("first_rows"));

XLA_FFI_DEFINE_HANDLER(kUpdate, Guarded<Update>::Run,
                       WithLayout(BindPacked().Arg<Floats>().RemainingArgs().RemainingRets())
                           .Attr<Int64Span>("rules")
                           .Attr<Int64Span>("num_hyperparameters")
                           .Attr<FloatSpan>("options")
                           .Attr<Int64Span>("num_features"));

XLA_FFI_DEFINE_HANDLER(kApplyRows, Guarded<ApplyRows>::Run,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Floats>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attr<Int64Span>("rules")
                           .Attr<Int64Span>("num_hyperparameters")
                           .Attr<FloatSpan>("options"));

XLA_FFI_DEFINE_HANDLER(kFill, Guarded<Fill>::Run,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Ret<Matrix>());

}  // namespace

const FfiHandler kFfiHandlers[] = {
    {"embax_lookup", kLookup},
    {"embax_update", kUpdate},
    {"embax_apply_rows", kApplyRows},
    {"embax_distinct_rows", &EmbaxDistinctRows},
    {"embax_row_gradients", &EmbaxRowGradients},
    {"embax_take_rows", &EmbaxTakeRows},
    {"embax_pack", &EmbaxPack},
    {"embax_fill", kFill},
    {nullptr, nullptr},
};

}  // namespace embax
