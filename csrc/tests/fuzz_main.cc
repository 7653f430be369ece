// Stands in for libFuzzer where the compiler has none: makes inputs from a seed and mutates those that it kept.
//
//   <program> [--seconds N | --runs N] [--seed N]   the same inputs for the same seed and number of runs
//   <program> FILE...                               runs inputs again, such as the one that a failure leaves behind
//
// Where the code under test was compiled with -fsanitize-coverage=trace-pc, inputs that reach new code are kept, else all.
#include <atomic>
#include <chrono>
#include <cinttypes>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

// So that what a sanitizer finds ends in a signal, which leaves the input behind.
#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED const char* __asan_default_options() { return "abort_on_error=1"; }
EXPORTED const char* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }
EXPORTED const char* __tsan_default_options() { return "abort_on_error=1:halt_on_error=1"; }

namespace {

using Input = std::vector<uint8_t>;

constexpr size_t kMaxSize = 1024;  // Requests take a few bytes a choice; what lies beyond is hardly read.
constexpr size_t kMaxKept = 4096;
constexpr size_t kEdges = 1 << 16;
constexpr const char* kFailure = "fuzz-failure.bin";

Input current;
bool finished = true;
std::atomic<uint8_t> edges[kEdges];
std::atomic<bool> new_edge{false}, traced{false};
thread_local uintptr_t previous = 0;

// Leaves the input behind.
void SaveFailure() {
  if (finished) return;
  finished = true;
  std::ofstream(kFailure, std::ios::binary).write(reinterpret_cast<const char*>(current.data()), current.size());
  std::fprintf(stderr, "The input that failed is in %s; pass that file as argument to run it again.\n", kFailure);
}

void Run(const Input& input) {
  current = input;
  current.shrink_to_fit();  // So that reading past its end is seen.
  finished = false;
  previous = 0;
  LLVMFuzzerTestOneInput(current.data(), current.size());
  finished = true;
}

uint8_t AnyByte(std::mt19937_64& random) {
  const uint8_t edge_cases[] = {0, 1, 2, 7, 8, 31, 63, 127, 128, 255};
  return random() % 2 == 0 ? static_cast<uint8_t>(random()) : edge_cases[random() % sizeof(edge_cases)];
}

Input Fresh(std::mt19937_64& random) {
  Input input(1 + random() % 256);
  for (uint8_t& byte : input) byte = static_cast<uint8_t>(random());
  return input;
}

void Mutate(std::mt19937_64& random, const std::vector<Input>& kept, Input& input) {
  for (int64_t left = 1 + random() % 4; left > 0; --left) {
    if (input.empty()) input.push_back(0);
    const size_t at = random() % input.size();
    switch (random() % 4) {
      case 0: input[at] = AnyByte(random); break;
      case 1: input.insert(input.begin() + at, AnyByte(random)); break;
      case 2: input.erase(input.begin() + at); break;
      case 3: {  // The rest from another input.
        const Input& other = kept[random() % kept.size()];
        input.resize(at);
        if (at < other.size()) input.insert(input.end(), other.begin() + at, other.end());
        break;
      }
    }
  }
  if (input.size() > kMaxSize) input.resize(kMaxSize);
}

// The number behind an option; ends the program if it is none.
uint64_t Number(const char* option, const char* text) {
  char* end = nullptr;
  const uint64_t value = text == nullptr ? 0 : std::strtoull(text, &end, 10);
  if (text == nullptr || end == text || *end != '\0') {
    std::fprintf(stderr, "%s takes a number\n", option);
    std::exit(2);
  }
  return value;
}

}  // namespace

// Called at every edge of instrumented code. A pair of neighbouring edges is told by a hash, as AFL does.
extern "C" void __sanitizer_cov_trace_pc() {
  const uintptr_t here = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  const size_t slot = ((here * 0x9e3779b97f4a7c15u >> 40) ^ previous) % kEdges;
  previous = slot >> 1;
  if (edges[slot].load(std::memory_order_relaxed) != 0) return;
  edges[slot].store(1, std::memory_order_relaxed);
  new_edge.store(true, std::memory_order_relaxed);
  traced.store(true, std::memory_order_relaxed);
}

int main(int argc, char** argv) {
  std::signal(SIGABRT, [](int) { SaveFailure(); });
  uint64_t seed = 1, seconds = 0, runs = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--seed") {
      seed = Number("--seed", argv[++i]);
    } else if (argument == "--seconds") {
      seconds = Number("--seconds", argv[++i]);
    } else if (argument == "--runs") {
      runs = Number("--runs", argv[++i]);
    } else {
      std::ifstream file(argument, std::ios::binary);
      if (!file) {
        std::fprintf(stderr, "cannot read %s\n", argv[i]);
        return 2;
      }
      Run(Input(std::istreambuf_iterator<char>(file), {}));
      std::printf("%s passes\n", argv[i]);
    }
  }
  if (seconds == 0 && runs == 0) return 0;

  std::mt19937_64 random(seed);
  std::vector<Input> kept = {Input()};
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  uint64_t done = 0;
  while (seconds > 0 ? std::chrono::steady_clock::now() < deadline : done < runs) {
    Input input = random() % 4 == 0 ? Fresh(random) : kept[random() % kept.size()];
    Mutate(random, kept, input);
    new_edge = false;
    Run(input);
    ++done;
    if (traced && !new_edge) continue;
    if (kept.size() < kMaxKept) {
      kept.push_back(std::move(input));
    } else {
      kept[random() % kept.size()] = std::move(input);
    }
  }
  std::printf("seed %" PRIu64 ": %" PRIu64 " runs, %zu inputs kept%s\n", seed, done, kept.size(),
              traced ? " for the code that they reach" : "");
  return 0;
}
