// Memory of packed batches, kept when a batch is gone: fresh memory of that size costs more, page by page, than packing.
#ifndef EMBAX_CORE_BUFFER_POOL_H_
#define EMBAX_CORE_BUFFER_POOL_H_

#include <cstdint>

namespace embax {

// At least `bytes` bytes without initial values, at a multiple of 64. Throws std::bad_alloc.
void* TakeBuffer(int64_t bytes);

// Gives back what TakeBuffer returned. From any thread, and after a fork.
void GiveBuffer(void* data);

}  // namespace embax

#endif  // EMBAX_CORE_BUFFER_POOL_H_
