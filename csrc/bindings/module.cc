#include <nanobind/nanobind.h>
#include "kernels/ffi.h"
#include "kernels/rows.h"
namespace nb = nanobind;
NB_MODULE(_native, m) {
  m.def("ffi_handlers", [] {
    nb::dict handlers;
    for (const embax::FfiHandler* h = embax::kFfiHandlers; h->name != nullptr; ++h) {
      handlers[h->name] = nb::capsule(reinterpret_cast<void*>(h->handler));
    }
    return handlers;
  });
  m.def("row_rules", [] {
    const embax::RowKernels& kernels = embax::SelectRowKernels();
    nb::dict rules;
    for (int i = 0; i < kernels.num_rules; ++i) {
      const embax::RowRule& rule = kernels.rules[i];
      rules[rule.name] = nb::make_tuple(i, rule.num_slots, rule.num_hyperparameters);
    }
    return rules;
  });
  m.def("simd", [] { return embax::SelectRowKernels().isa; });
}
