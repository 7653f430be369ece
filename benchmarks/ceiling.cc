// What this machine's memory gives: sequential reads, and distinct random rows that are read, or read, modified and written.
//
// Usage: ceiling BYTES THREADS, where BYTES, a power of two, is the size of each of two arrays. Then each line of the input is
// a command "KIND ROW_BYTES DISTANCE LEVEL COUNT ORDER", answered by the seconds that it took:
//   sequential  all of one array is read; the numbers do not matter
//   read        COUNT distinct random rows of ROW_BYTES are read, in the ORDER "scattered" or "ascending"
//   write       ... are read, modified and written
//   write_two   ... and so are the same rows of a second array, as for an optimizer with a slot as large as the table
// Rows are prefetched DISTANCE rows ahead, into the cache of the first or second LEVEL. Arrays lie in huge pages where the system
// has them. Threads share the rows evenly. Just before, the same threads do the same with as many other rows, which is not timed:
// a processor that has slept is slow at first.

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

enum class Kind { kRead, kWrite, kWriteTwo };

float* allocate(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("mmap");
    std::exit(1);
  }
  madvise(memory, bytes, MADV_HUGEPAGE);
  float* values = static_cast<float*>(memory);
  std::fill(values, values + bytes / sizeof(float), 0.01f);
  return values;
}

// A bijection of the numbers below 2^bits without visible order, so that rows are distinct.
uint32_t scattered(uint32_t number, uint32_t seed, int bits) {
  const uint32_t mask = (uint32_t{1} << bits) - 1;
  uint32_t x = (number + seed) & mask;
  for (uint32_t odd : {0x9E3779B1u, 0x85EBCA6Bu}) {
    x = (x * odd) & mask;
    x ^= x >> (bits / 2);
  }
  return x;
}

template <size_t kRowBytes, bool kForWrite, int kLevel>
inline void prefetch(const float* row) {
  for (size_t line = 0; line < kRowBytes; line += 64) {
    const char* address = reinterpret_cast<const char*>(row) + line;
    if constexpr (kLevel == 2) {
      __builtin_prefetch(address, 0, 2);
    } else {
      __builtin_prefetch(address, kForWrite, 3);
    }
  }
}

template <Kind kKind, size_t kRowBytes, int kLevel>
uint64_t pass(float* table, float* slot, const uint32_t* rows, size_t count, size_t distance) {
  constexpr size_t kWidth = kRowBytes / sizeof(float);
  constexpr bool kForWrite = kKind != Kind::kRead;
  uint64_t sums[kRowBytes / 8] = {};
  for (size_t i = 0; i < count; ++i) {
    const size_t ahead = rows[std::min(i + distance, count - 1)] * kWidth;
    prefetch<kRowBytes, kForWrite, kLevel>(table + ahead);
    if constexpr (kKind == Kind::kWriteTwo) prefetch<kRowBytes, true, kLevel>(slot + ahead);
    float* __restrict row = table + rows[i] * kWidth;
    if constexpr (kKind == Kind::kRead) {
      const uint64_t* words = reinterpret_cast<const uint64_t*>(row);
      for (size_t j = 0; j < kRowBytes / 8; ++j) sums[j] += words[j];
    } else if constexpr (kKind == Kind::kWrite) {
      for (size_t j = 0; j < kWidth; ++j) row[j] += 1.0f;
    } else {
      float* __restrict other = slot + rows[i] * kWidth;
      for (size_t j = 0; j < kWidth; ++j) {
        other[j] += 1.0f;
        row[j] += other[j];
      }
    }
  }
  uint64_t sum = 0;
  for (uint64_t value : sums) sum += value;
  return sum;
}

template <Kind kKind, size_t kRowBytes>
uint64_t pass_by(size_t level, float* table, float* slot, const uint32_t* rows, size_t count, size_t distance) {
  return level == 2 ? pass<kKind, kRowBytes, 2>(table, slot, rows, count, distance)
                    : pass<kKind, kRowBytes, 1>(table, slot, rows, count, distance);
}

template <Kind kKind>
uint64_t pass_of(size_t row_bytes, size_t level, float* table, float* slot, const uint32_t* rows, size_t count, size_t distance) {
  switch (row_bytes) {
    case 64: return pass_by<kKind, 64>(level, table, slot, rows, count, distance);
    case 128: return pass_by<kKind, 128>(level, table, slot, rows, count, distance);
    case 256: return pass_by<kKind, 256>(level, table, slot, rows, count, distance);
    case 512: return pass_by<kKind, 512>(level, table, slot, rows, count, distance);
  }
  std::fprintf(stderr, "rows have 64, 128, 256 or 512 bytes, not %zu\n", row_bytes);
  std::exit(1);
}

uint64_t read_all(const float* table, size_t bytes) {
  const uint64_t* words = reinterpret_cast<const uint64_t*>(table);
  uint64_t sums[64] = {};
  for (size_t i = 0; i < bytes / 8; i += 64) {
    for (size_t j = 0; j < 64; ++j) sums[j] += words[i + j];
  }
  uint64_t sum = 0;
  for (uint64_t value : sums) sum += value;
  return sum;
}

// Seconds from when all threads have done work(thread, 0) until the last has done its part of work(thread, 1).
template <class Work>
double seconds(int num_threads, const Work& work) {
  std::atomic<int> ready{0};
  std::atomic<uint64_t> sink{0};
  std::vector<Clock::time_point> ends(num_threads);
  Clock::time_point start;
  const auto run = [&](int thread) {
    sink += work(thread, 0);
    if (++ready == num_threads) start = Clock::now();
    while (ready.load() < num_threads) {
    }
    sink += work(thread, 1);
    ends[thread] = Clock::now();
  };
  std::vector<std::thread> threads;
  for (int thread = 1; thread < num_threads; ++thread) threads.emplace_back(run, thread);
  run(0);
  for (auto& thread : threads) thread.join();
  const double result = std::chrono::duration<double>(*std::max_element(ends.begin(), ends.end()) - start).count();
  return sink.load() == 1 ? -result : result;  // So that the sums are needed.
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s BYTES THREADS\n", argv[0]);
    return 2;
  }
  const size_t bytes = std::strtoull(argv[1], nullptr, 10);
  const int num_threads = std::atoi(argv[2]);
  float* table = allocate(bytes);
  // Not at the same place within pages as the table: processors take loads and stores at equal places for dependent.
  float* slot = allocate(bytes + 4096) + 2560 / sizeof(float);
  std::vector<uint32_t> rows;
  uint32_t seed = 0;
  char kind[16], order[16];
  size_t row_bytes, distance, level, count;
  while (std::scanf("%15s %zu %zu %zu %zu %15s", kind, &row_bytes, &distance, &level, &count, order) == 6) {
    const std::string name = kind;
    double result;
    if (name == "sequential") {
      const size_t part = bytes / num_threads / 512 * 512;
      result = seconds(num_threads, [&](int t, int) { return read_all(table + t * part / sizeof(float), part); });
    } else {
      int bits = 0;
      while ((row_bytes << (bits + 1)) <= bytes) ++bits;
      rows.resize(2 * count);
      seed += 0x632BE5ABu;
      for (size_t i = 0; i < 2 * count; ++i) rows[i] = scattered(static_cast<uint32_t>(i), seed, bits);
      if (std::string(order) == "ascending") {
        std::sort(rows.begin(), rows.begin() + count);
        std::sort(rows.begin() + count, rows.end());
      }
      result = seconds(num_threads, [&](int t, int turn) {
        const size_t first = count * t / num_threads, last = count * (t + 1) / num_threads;
        const uint32_t* mine = rows.data() + turn * count + first;
        if (name == "read") return pass_of<Kind::kRead>(row_bytes, level, table, slot, mine, last - first, distance);
        if (name == "write") return pass_of<Kind::kWrite>(row_bytes, level, table, slot, mine, last - first, distance);
        return pass_of<Kind::kWriteTwo>(row_bytes, level, table, slot, mine, last - first, distance);
      });
    }
    std::printf("%.9f\n", result);
    std::fflush(stdout);
  }
}
