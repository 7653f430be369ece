// The row kernels against loops that are too simple to be wrong, on sound entries and on damaged ones.
#include "kernels/order_scratch.h"
#include "kernels/rows.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/format.h"

namespace {

using embax::Entries;
using embax::FeatureRows;
using embax::LookupTask;
using embax::RowKernels;
using embax::UpdateTask;

int failures = 0;

void Expect(bool ok, const std::string& what) {
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  ++failures;
}

bool Near(float a, float b) { return std::fabs(a - b) <= 1e-4f * (1.0f + std::fabs(b)); }

// Packed entries of `sources` SparseCores that look up in `partitions` others.
struct Batch {
  int64_t sources, partitions, rows, samples, capacity;
  std::vector<int32_t> row_pointers, ids, sample_ids;
  std::vector<float> gains;

  Entries Of(int64_t source) const {
    const int64_t start = source * capacity;
    return {row_pointers.data() + source * partitions, ids.data() + start, sample_ids.data() + start,
            gains.data() + start, capacity, 0};
  }
};

// Sorted entries, some rows named several times; every 10th partition is empty.
Batch Sound(std::mt19937& random, int64_t sources, int64_t partitions, int64_t rows, int64_t samples) {
  Batch batch{sources, partitions, rows, samples, 0, {}, {}, {}, {}};
  batch.capacity = partitions * embax::kPartitionAlignment * 4;
  batch.row_pointers.resize(sources * partitions);
  batch.ids.assign(sources * batch.capacity, embax::kPaddingId);
  batch.sample_ids.assign(sources * batch.capacity, embax::kPaddingId);
  batch.gains.assign(sources * batch.capacity, NAN);
  std::uniform_int_distribution<int32_t> step(0, 2), sample(0, static_cast<int32_t>(samples) - 1);
  std::uniform_real_distribution<float> gain(-1, 1);
  for (int64_t s = 0; s < sources; ++s) {
    int64_t position = 0;
    for (int64_t p = 0; p < partitions; ++p) {
      int32_t id = step(random);
      const int64_t count = (s + p) % 10 == 9 ? 0 : 1 + random() % (4 * embax::kPartitionAlignment);
      for (int64_t i = 0; i < count && id < rows; ++i, id += step(random)) {
        const int64_t entry = s * batch.capacity + position++;
        batch.ids[entry] = id;
        batch.sample_ids[entry] = sample(random);
        batch.gains[entry] = gain(random);
      }
      batch.row_pointers[s * partitions + p] = static_cast<int32_t>(position);
      position = (position + embax::kPartitionAlignment - 1) / embax::kPartitionAlignment * embax::kPartitionAlignment;
    }
  }
  return batch;
}

Batch Damaged(std::mt19937& random, Batch batch) {
  const int32_t extremes[] = {INT32_MIN, -7, -1, 0, 1, 5, 100, INT32_MAX};
  for (auto* values : {&batch.row_pointers, &batch.ids, &batch.sample_ids}) {
    for (int32_t& value : *values) {
      if (random() % 3 == 0) value = extremes[random() % 8];
    }
  }
  return batch;
}

std::vector<float> Draw(std::mt19937& random, int64_t size) {
  std::uniform_real_distribution<float> value(-1, 1);
  std::vector<float> values(size);
  for (float& v : values) v = value(random);
  return values;
}

template <typename Visit>  // visit(source, partition, id, sample, gain)
void ForEachEntry(const Batch& batch, Visit visit) {
  for (int64_t s = 0; s < batch.sources; ++s) {
    int64_t begin = 0;
    for (int64_t p = 0; p < batch.partitions; ++p) {
      const int64_t end = batch.row_pointers[s * batch.partitions + p];
      for (int64_t e = s * batch.capacity + begin; e < s * batch.capacity + end; ++e) {
        visit(s, p, batch.ids[e], batch.sample_ids[e], batch.gains[e]);
      }
      begin = (end + embax::kPartitionAlignment - 1) / embax::kPartitionAlignment * embax::kPartitionAlignment;
    }
  }
}

// Arrays of features, each an allocation of its own: the samples of a SparseCore are cut into several, one has none, and the last
// has one row less than the SparseCores have samples of it.
class FeatureArrays {
 public:
  FeatureArrays(int64_t samples, int64_t sparsecores, int64_t dim) : dim_(dim) {
    const int64_t cuts[] = {0, samples / 3, samples / 3, samples - 2, samples};
    for (int k = 0; k + 1 < 5; ++k) {
      const int64_t size = cuts[k + 1] - cuts[k], rows = size * sparsecores - (k == 3);
      arrays_.emplace_back(rows * dim, 99.0f);
      features_.push_back({cuts[k], size, rows, arrays_.back().data()});
    }
  }

  const std::vector<FeatureRows>& features() const { return features_; }
  std::vector<std::vector<float>>& arrays() { return arrays_; }

  // The row of a sample on a SparseCore; null if it has none.
  float* Row(int64_t sparsecore, int64_t sample) const {
    for (const FeatureRows& one : features_) {
      const int64_t row = sparsecore * one.samples + sample - one.begin;
      if (sample >= one.begin && sample < one.begin + one.samples) return row < one.rows ? one.data + row * dim_ : nullptr;
    }
    return nullptr;
  }

 private:
  int64_t dim_;
  std::vector<std::vector<float>> arrays_;
  std::vector<FeatureRows> features_;
};

// The sources are SparseCores of `minibatches` minibatches each. Features are looked up all at once, or in two groups, whose rows
// are below and from `cut` on.
void TestLookup(const RowKernels& kernels, std::mt19937& random, int64_t dim, int64_t minibatches, bool damaged, int64_t cut) {
  Batch batch = Sound(random, 3, 3, 40, 7);
  if (damaged) batch = Damaged(random, batch);
  const std::vector<float> table = Draw(random, batch.partitions * batch.rows * dim);
  const int64_t sparsecores = batch.sources / minibatches;
  FeatureArrays got(batch.samples, sparsecores, dim), of_samples(batch.samples, sparsecores, dim);
  std::vector<Entries> entries;
  for (int64_t s = 0; s < batch.sources; ++s) entries.push_back(batch.Of(s));
  std::vector<float> sum(dim);
  std::vector<embax::SampleScratch::Entry> scratch(minibatches * batch.capacity), few(1);
  std::vector<uint32_t> starts(batch.samples + 1), ends(batch.samples);
  struct Group {
    int64_t first_feature, num_features, first_row, end_row;
  };
  const std::vector<Group> groups =
      cut == 0 ? std::vector<Group>{{0, 4, 0, batch.rows}} : std::vector<Group>{{0, 1, 0, cut}, {1, 3, cut, batch.rows}};
  const int64_t first_samples[] = {0, batch.samples / 3};
  for (int64_t number = 0; number < sparsecores * static_cast<int64_t>(groups.size()); ++number) {
    const int64_t s = number / groups.size(), which = number % groups.size();
    const Group& group = groups[which];
    LookupTask task{};
    task.minibatches = entries.data() + s * minibatches;
    task.num_minibatches = minibatches;
    task.num_partitions = batch.partitions;
    task.table = table.data();
    task.rows_per_partition = task.partition_stride = batch.rows;
    task.dim = dim;
    task.sparsecore = s;
    task.num_features = group.num_features;
    task.first_row = group.first_row;
    task.end_row = group.end_row;
    task.first_sample = first_samples[which];
    task.num_samples = groups.size() > 1 && which == 0 ? first_samples[1] : batch.samples - task.first_sample;
    task.features = got.features().data() + group.first_feature;
    kernels.lookup(task);
    task.features = of_samples.features().data() + group.first_feature;
    task.scratch = {scratch.data(), static_cast<int64_t>(scratch.size()), starts.data(), ends.data(), sum.data()};
    kernels.lookup(task);
    LookupTask chosen = task;
    chosen.scratch = {};
    embax::LookupScratch::OfThread().Serve(chosen, batch.samples, batch.partitions * batch.rows);
    kernels.lookup(chosen);
    // There are more entries than said, as if row pointers had changed meanwhile.
    task.scratch.entries = few.data();
    task.scratch.count = 1;
    kernels.lookup(task);
  }
  if (damaged) return;  // The sanitizers and the end of this process tell whether memory was left.
  const std::string what = std::string(kernels.isa) + ": lookup, dim " + std::to_string(dim) + ", rows cut at " + std::to_string(cut);
  Expect(got.arrays() == of_samples.arrays(), what + ", in the order of rows and of samples, bit for bit");
  FeatureArrays wanted(batch.samples, sparsecores, dim);
  for (std::vector<float>& array : wanted.arrays()) std::fill(array.begin(), array.end(), 0.0f);
  ForEachEntry(batch, [&](int64_t s, int64_t p, int32_t id, int32_t sample, float gain) {
    float* row = wanted.Row(s / minibatches, sample);
    if (row == nullptr || (cut > 0 && (id < cut) != (sample < first_samples[1]))) return;
    for (int64_t i = 0; i < dim; ++i) row[i] += gain * table[(p * batch.rows + id) * dim + i];
  });
  for (size_t feature = 0; feature < wanted.arrays().size(); ++feature) {
    for (size_t i = 0; i < wanted.arrays()[feature].size(); ++i) {
      if (!Near(got.arrays()[feature][i], wanted.arrays()[feature][i])) return Expect(false, what);
    }
  }
}

// Hyperparameters to run a rule with: each set takes another branch of it.
std::vector<std::vector<float>> HyperparametersOf(const std::string& rule) {
  if (rule == "adagrad_momentum") return {{0.5f, 0.9f, 1.0f, 1e-3f, 2.0f, 0.0f}, {0.5f, 0.9f, 0.7f, 1e-3f, 3.0f, 1.0f}};
  if (rule == "adam") return {{0.5f, 0.9f, 0.7f, 1e-3f}};
  if (rule == "ftrl") return {{0.5f, -0.5f, 0.3f, 0.1f, 0.2f, 0.0f}, {0.5f, -0.7f, 0.3f, 0.1f, 0.2f, 1.0f}};
  if (rule == "laprop") return {{0.5f, 0.9f, 0.7f, 1e-3f}};
  if (rule == "f2a") return {{0.5f, 0.7f, 0.1f, 0.2f, 2.0f, 9.0f}};
  if (rule == "row_wise_adagrad") return {{0.5f, 1e-3f}};
  if (rule == "row_wise_adam") return {{0.5f, 0.9f, 0.7f, 1e-3f}};
  return {{0.5f}};
}

// The formulas: new [table, slots...] of an element from its gradient, the mean of the squares of the row's, and the old ones;
// empty for an unknown rule.
std::vector<double> Formula(const std::string& rule, const std::vector<float>& h, double g, double mean_square,
                            const std::vector<double>& s) {
  if (rule == "sgd") return {s[0] - h[0] * g};
  if (rule == "adagrad") return {s[0] - h[0] * g / std::sqrt(s[1] + g * g), s[1] + g * g};
  if (rule == "adagrad_momentum") {
    const double a = h[2] == 1 ? s[1] + g * g : h[2] * s[1] + (1 - h[2]) * g * g;
    const double step = g * std::pow(a + h[3], -1.0 / h[4]), m = h[1] * s[2] + step;
    return {s[0] - h[0] * (h[5] != 0 ? h[1] * m + step : m), a, m};
  }
  if (rule == "adam") {
    const double m = h[1] * s[1] + (1 - h[1]) * g, v = h[2] * s[2] + (1 - h[2]) * g * g;
    return {s[0] - h[0] * m / (std::sqrt(v) + h[3]), m, v};
  }
  if (rule == "ftrl") {
    const double a = s[1] + g * g, p = std::pow(a, -h[1]), q = std::pow(s[1], -h[1]), rate = h[0];
    const bool multiply = h[5] != 0;
    const double l = multiply ? s[2] + rate * g - (p - q) * s[0] : s[2] + g - (p - q) / rate * s[0];
    const double l1 = multiply ? rate * h[2] : h[2];
    const double denominator = multiply ? p + 2 * rate * h[3] + h[4] : (p + h[4]) / rate + 2 * h[3];
    return {(std::fmin(std::fmax(l, -l1), l1) - l) / denominator, a, l};
  }
  if (rule == "laprop") {
    const double nu = h[2] * s[2] + (1 - h[2]) * (g * g + h[3]);
    const double mu = h[1] * s[1] + std::sqrt(1.0 - h[1] * h[1]) * g / std::sqrt(nu);
    return {s[0] - h[0] * mu, mu, nu};
  }
  if (rule == "f2a") {
    const double n = s[2] + 1, a = s[1] + g * g, f = std::fmin(std::pow(h[5] / n, h[1]), h[4]);
    const double sign = (s[0] > 0) - (s[0] < 0);
    return {s[0] - h[0] * (f * g / std::sqrt(a) + h[2] * sign + h[3] * s[0]), a, n};
  }
  if (rule == "row_wise_adagrad") {
    const double a = s[1] + mean_square;
    return {s[0] - h[0] * g / (std::sqrt(a) + h[1]), a};
  }
  if (rule == "row_wise_adam") {
    const double m = h[1] * s[1] + (1 - h[1]) * g, v = h[2] * s[2] + (1 - h[2]) * mean_square;
    return {s[0] - h[0] * m / (std::sqrt(v) + h[3]), m, v};
  }
  return {};
}

constexpr float kNone = INFINITY;

void TestUpdate(const RowKernels& kernels, const embax::RowRule& rule, std::mt19937& random, int64_t dim,
                int64_t minibatches, bool damaged, std::vector<float> hyperparameters,
                const embax::RowOptions& options = {}) {
  Batch batch = Sound(random, 3, 3, 40, 7);
  if (damaged) batch = Damaged(random, batch);
  const int64_t size = batch.partitions * batch.rows * dim;
  FeatureArrays gradient(batch.samples, batch.sources / minibatches, dim);
  for (std::vector<float>& array : gradient.arrays()) {
    const std::vector<float> values = Draw(random, array.size());
    std::copy(values.begin(), values.end(), array.begin());
  }
  hyperparameters.resize(embax::kMaxHyperparameters);
  // The last column is padding: no gradient has it, and what it holds must not matter.
  const int64_t width = dim > 2 ? dim - 1 : dim;
  std::vector<std::vector<float>> state(1 + rule.num_slots, Draw(random, size));
  const auto columns = [&](int k) { return embax::StateColumns(rule.row_wise, k, dim); };
  for (std::vector<float>& array : gradient.arrays()) {
    for (size_t i = width; i < array.size() && width < dim; i += dim) array[i] = 0;
  }
  for (int64_t i = width; i < size && width < dim; i += dim) state[0][i] = NAN;
  for (int k = 1; k <= rule.num_slots; ++k) state[k].assign(size / dim * columns(k), 0.25f);
  if (rule.num_slots == 2 && rule.row_wise == 0) {  // Elements of some rows of equal slots, elements of others of different ones.
    for (int64_t i = 0; i < size; ++i) state[2][i] = i / dim % 2 ? 0.25f : static_cast<float>(i % 3);
  }
  std::vector<std::vector<float>> wanted = state;
  std::vector<Entries> entries;
  for (int64_t s = 0; s < batch.sources; ++s) entries.push_back(batch.Of(s));
  constexpr int64_t kParts = 3;
  for (int64_t part = 0; part < batch.partitions * kParts; ++part) {
    const int64_t p = part / kParts;
    UpdateTask task{};
    task.part = part % kParts;
    task.num_parts = kParts;
    task.entries = entries.data();
    task.num_sources = batch.sources;
    task.num_minibatches = minibatches;
    task.partition = p;
    task.gradients = gradient.features().data();
    task.num_features = gradient.features().size();
    for (int k = 0; k <= rule.num_slots; ++k) task.state[k] = state[k].data() + p * batch.rows * columns(k);
    task.rows_per_partition = batch.rows;
    task.dim = dim;
    task.width = width;
    task.options = options;
    task.hyperparameters = hyperparameters.data();
    // Memory for no entries, as if row pointers had changed after these were counted.
    std::vector<Entries> none = entries;
    for (Entries& one : none) one.capacity = 0;
    UpdateTask small = task;
    small.entries = none.data();
    embax::PartitionScratch of_none;
    of_none.Serve(small, kernels, dim);
    small.entries = entries.data();
    rule.update(small);
    embax::PartitionScratch scratch;  // Of its own, so that the sanitizers see where it ends.
    scratch.Serve(task, kernels, dim);
    rule.update(task);
  }
  if (damaged) return;
  std::vector<float> sums(size, 0.0f);
  std::vector<bool> touched(batch.partitions * batch.rows);
  ForEachEntry(batch, [&](int64_t s, int64_t p, int32_t id, int32_t sample, float gain) {
    const float* row = gradient.Row(s / minibatches, sample);
    if (row == nullptr) return;
    touched[p * batch.rows + id] = true;
    for (int64_t i = 0; i < dim; ++i) sums[(p * batch.rows + id) * dim + i] += gain * row[i];
  });
  const std::string name = rule.name;
  for (int64_t r = 0; r < size / dim; ++r) {
    bool ok = true;
    std::vector<double> g(sums.begin() + r * dim, sums.begin() + (r + 1) * dim);
    double square = 0, mean_square = 0;
    for (double& x : g) {
      x = std::fmin(std::fmax(x, -options.clip_value), options.clip_value);
      square += x * x;
    }
    for (int64_t i = 0; i < width; ++i) {
      if (std::sqrt(square) > options.clip_norm) g[i] *= options.clip_norm / std::sqrt(square);
      g[i] += options.l2 * wanted[0][r * dim + i];
      mean_square += g[i] * g[i] / width;
    }
    for (int64_t i = 0; i < width; ++i) {
      std::vector<double> before;
      for (int k = 0; k <= rule.num_slots; ++k) before.push_back(wanted[k][r * columns(k) + (columns(k) == 1 ? 0 : i)]);
      std::vector<double> after = before;
      if (touched[r]) {
        after[0] -= options.decay * after[0];
        after = Formula(name, hyperparameters, g[i], mean_square, after);
        ok = ok && after.size() == before.size();
        if (!ok) break;
        after[0] = std::fmin(std::fmax(after[0], options.min), options.max);
      }
      for (int k = 0; k <= rule.num_slots; ++k) {
        const float got = state[k][r * columns(k) + (columns(k) == 1 ? 0 : i)], value = static_cast<float>(after[k]);
        ok = ok && (touched[r] ? Near(got, value) : got == value);
      }
    }
    if (!ok) return Expect(false, std::string(kernels.isa) + ": " + name + ", dim " + std::to_string(dim));
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  const RowKernels& kernels = embax::SelectRowKernels();
  for (const int64_t dim : {1, 3, 8, 16, 20, 32, 64, 128, 129}) {
    for (int repetition = 0; repetition < 8; ++repetition) {
      const int64_t minibatches = repetition % 2 == 0 ? 1 : 3;
      for (const bool damaged : {false, true}) {
        TestLookup(kernels, random, dim, minibatches, damaged, repetition % 4 < 2 ? 0 : 12);
        for (int rule = 0; rule < kernels.num_rules; ++rule) {
          for (const auto& hyperparameters : HyperparametersOf(kernels.rules[rule].name)) {
            const embax::RowRule& r = kernels.rules[rule];
            TestUpdate(kernels, r, random, dim, minibatches, damaged, hyperparameters);
            TestUpdate(kernels, r, random, dim, minibatches, damaged, hyperparameters, {0.6f, 1.5f, 0.2f, -0.4f, 0.5f, 0.1f});
            TestUpdate(kernels, r, random, dim, minibatches, damaged, hyperparameters, {kNone, 0.3f, 0, -kNone, 0.2f, 0});
          }
        }
      }
    }
  }
  std::printf("%s: %s\n", kernels.isa, failures == 0 ? "passed" : "FAILED");
  return failures != 0;
}
