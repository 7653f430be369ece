#include "core/buffer_pool.h"

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace embax {
namespace {

constexpr int64_t kAlignment = 64;

// As many batches as a prefetching pipeline usually has under way.
constexpr int kKept = 4;

// Larger buffers go back to the system.
constexpr int64_t kMaxKeptBytes = int64_t{128} << 20;

// Lies before the bytes that are handed out.
struct Header {
  int64_t bytes;
};
static_assert(sizeof(Header) <= kAlignment);

// A slot is taken and given by exchange: no lock that a fork could leave locked.
std::atomic<Header*> kept[kKept];
std::atomic<unsigned> next_victim{0};

void Free(Header* header) { std::free(header); }

// What fits, and does not waste more than it uses.
bool Suits(const Header& header, int64_t bytes) { return header.bytes >= bytes && header.bytes / 2 <= bytes; }

void* BytesOf(Header* header) { return reinterpret_cast<std::byte*>(header) + kAlignment; }

}  // namespace

void* TakeBuffer(int64_t bytes) {
  for (auto& slot : kept) {
    Header* header = slot.exchange(nullptr, std::memory_order_acq_rel);
    if (header == nullptr) continue;
    if (Suits(*header, bytes)) return BytesOf(header);
    GiveBuffer(BytesOf(header));
  }
  if (bytes < 0 || bytes > INT64_MAX - 2 * kAlignment) throw std::bad_alloc();
  const int64_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, static_cast<size_t>(size + kAlignment));
  if (memory == nullptr) throw std::bad_alloc();
  return BytesOf(new (memory) Header{size});
}

void GiveBuffer(void* data) {
  auto* header = reinterpret_cast<Header*>(static_cast<std::byte*>(data) - kAlignment);
  if (header->bytes > kMaxKeptBytes) return Free(header);
  for (auto& slot : kept) {
    Header* empty = nullptr;
    if (slot.compare_exchange_strong(empty, header, std::memory_order_acq_rel)) return;
  }
  // The oldest ones go: sizes that batches no longer have must not stay.
  auto& slot = kept[next_victim.fetch_add(1, std::memory_order_relaxed) % kKept];
  if (Header* victim = slot.exchange(header, std::memory_order_acq_rel)) Free(victim);
}

}  // namespace embax
