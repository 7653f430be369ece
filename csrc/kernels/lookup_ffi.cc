// Lookup in all stacks of a step, in one call. The features that share rows, on one SparseCore, are one task; tasks write disjoint
// memory and sum in a fixed order, so the result does not depend on the number of threads.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/ffi.h"
#include "kernels/ffi_common.h"
#include "kernels/huge_pages.h"
#include "kernels/order_scratch.h"
#include "kernels/packed_batch.h"
#include "kernels/rows.h"
#include "kernels/stack_features.h"

namespace embax {
namespace {

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

// Features of a stack whose rows no others of it have.
struct Group {
  int64_t stack, table_rows;
  LookupTask task;
  Columns largest;  // Of their activations.
};

// Appends the groups of stack `k`. `t` is of its table and all of its features. Where one begins, a first row is given: where its
// rows begin. Returns what is wrong, if anything.
std::string AppendGroups(const StackFeatures& features, int64_t k, int64_t table_rows, const LookupTask& t, bool gathered,
                         const int64_t* first_rows, std::vector<Group>& groups) {
  for (int64_t feature = features.first(k); feature < features.first(k + 1); ++feature) {
    const FeatureRows& rows = *features.rows(feature);
    const Columns& activations = features.arrays()[feature];
    const bool first = feature == features.first(k);
    if (first || first_rows[feature] >= 0) {
      Group group = {k, table_rows, t, activations};
      if (!first) {
        if (gathered) return "gathered rows do not ascend";
        LookupTask& before = groups.back().task;
        group.task.first_row = before.end_row = first_rows[feature];
        if (before.end_row < before.first_row || before.end_row > t.rows_per_partition) {
          return "the first rows of stack " + std::to_string(k) + " do not ascend within it";
        }
      }
      group.task.features = &rows;
      group.task.first_sample = rows.begin;
      groups.push_back(group);
    }
    Group& group = groups.back();
    group.task.num_features += 1;
    group.task.num_samples += rows.samples;
    if (activations.rows > group.largest.rows) group.largest = activations;
  }
  return "";
}

// Divides activations, `parts` of each group, among tasks: the first part of each task, and the number of all. A thread clears a new
// page that it touches, even while another one clears it too. So where there are many pages for each thread, of `bytes` in all,
// and parts are smaller, those that begin in one page are one task.
std::vector<int64_t> FirstOfPages(const std::vector<Group>& groups, int64_t bytes, int64_t parts, int64_t threads) {
  constexpr int64_t kPagesPerThread = 8;
  const bool many = bytes / static_cast<int64_t>(kHugePage) >= kPagesPerThread * threads;
  std::vector<int64_t> firsts;
  uintptr_t last = 0;
  for (size_t k = 0; k < groups.size(); ++k) {
    const Columns& one = groups[k].largest;
    for (int64_t part = 0; part < parts; ++part) {
      const uintptr_t page = reinterpret_cast<uintptr_t>(one.data + one.rows / parts * part * one.columns) / kHugePage;
      if (!many || page != last || firsts.empty()) firsts.push_back(static_cast<int64_t>(k) * parts + part);
      last = page;
    }
  }
  firsts.push_back(static_cast<int64_t>(groups.size()) * parts);
  return firsts;
}

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
  std::vector<Group> groups;
  int64_t bytes_of_rows = 0, bytes_of_activations = 0;
  for (int64_t k = 0; k < n; ++k) {
    const Columns table = Columns::Of(tables, k);
    if (!table.valid()) return Invalid("lookup: tables must be float32 of rank 1 or 2");
    if ((!gathered && table.rows % num_sparsecores != 0) || features.columns(k) != table.columns) {
      return Invalid("lookup: the shapes of table and activations of stack " + std::to_string(k) + " do not match");
    }
    LookupTask t{};
    t.num_partitions = num_sparsecores;
    t.table = table.data;
    t.rows_per_partition = t.end_row = gathered ? table.rows : table.rows / num_sparsecores;
    t.partition_stride = gathered ? 0 : t.rows_per_partition;
    t.dim = table.columns;
    t.quantization = {quantization[3 * k], quantization[3 * k + 1], quantization[3 * k + 2]};
    const std::string problem = AppendGroups(features, k, table.rows, t, gathered, first_rows.begin(), groups);
    if (!problem.empty()) return Invalid("lookup: " + problem);
    bytes_of_rows += sizeof(float) * t.dim * batch.NumEntries(k);
  }
  for (const Columns& one : features.arrays()) bytes_of_activations += sizeof(float) * one.rows * one.columns;
  const std::vector<int64_t> firsts = FirstOfPages(groups, bytes_of_activations, sparsecores_per_device, NumThreads(threads));
  AdviseFor(features.arrays());
  const RowKernels& kernels = SelectRowKernels();
  const int64_t num_tasks = static_cast<int64_t>(firsts.size()) - 1;
  return RunTasks(threads, num_tasks, bytes_of_rows + bytes_of_activations, [&](int64_t number) {
    for (int64_t part = firsts[number]; part < firsts[number + 1]; ++part) {
      const Group& group = groups[part / sparsecores_per_device];
      LookupTask t = group.task;
      t.sparsecore = part % sparsecores_per_device;
      std::vector<Entries> minibatches;
      batch.Append(group.stack, t.sparsecore, minibatches);
      t.minibatches = minibatches.data();
      t.num_minibatches = batch.num_minibatches();
      LookupScratch::OfThread().Serve(t, batch.stack(group.stack).samples_per_sparsecore, group.table_rows);
      kernels.lookup(t);
    }
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(EmbaxLookup, Guarded<Lookup>::Run,
                       WithLayout(BindPacked().RemainingArgs().RemainingRets())
                           .Attr<bool>("gathered")
                           .Attr<FloatSpan>("quantization")
                           .Attr<Int64Span>("num_features")
                           .Attr<Int64Span>("first_rows"));

}  // namespace embax
