// The XLA FFI handlers of the native lowering.
#ifndef EMBAX_KERNELS_FFI_H_
#define EMBAX_KERNELS_FFI_H_

#include "xla/ffi/api/ffi.h"

namespace embax {

XLA_FFI_DECLARE_HANDLER_SYMBOL(EmbaxLookup);
XLA_FFI_DECLARE_HANDLER_SYMBOL(EmbaxUpdate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(EmbaxApplyRows);
XLA_FFI_DECLARE_HANDLER_SYMBOL(EmbaxDistinctRows);
XLA_FFI_DECLARE_HANDLER_SYMBOL(EmbaxRowGradients);
XLA_FFI_DECLARE_HANDLER_SYMBOL(EmbaxTakeRows);
XLA_FFI_DECLARE_HANDLER_SYMBOL(EmbaxPack);

struct FfiHandler {
  const char* name;
  XLA_FFI_Handler* handler;
};

// All handlers, ended by one without a name.
extern const FfiHandler kFfiHandlers[];

}  // namespace embax

#endif  // EMBAX_KERNELS_FFI_H_
