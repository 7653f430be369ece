// Tables of one row, and the list of all handlers.
#include "kernels/ffi.h"

#include <algorithm>
#include <cstdint>

#include "core/parallel.h"
#include "kernels/ffi_common.h"
#include "kernels/huge_pages.h"

namespace embax {
namespace {

using Matrix = ffi::Buffer<ffi::F32, 2>;
using ResultMatrix = ffi::Result<Matrix>;

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

XLA_FFI_DEFINE_HANDLER(kFill, Guarded<Fill>::Run,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Ret<Matrix>());

}  // namespace

const FfiHandler kFfiHandlers[] = {
    {"embax_lookup", &EmbaxLookup},
    {"embax_update", &EmbaxUpdate},
    {"embax_apply_rows", &EmbaxApplyRows},
    {"embax_distinct_rows", &EmbaxDistinctRows},
    {"embax_row_gradients", &EmbaxRowGradients},
    {"embax_take_rows", &EmbaxTakeRows},
    {"embax_pack", &EmbaxPack},
    {"embax_fill", kFill},
    {nullptr, nullptr},
};

}  // namespace embax
