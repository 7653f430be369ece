// The row rules: how an optimizer changes one row of a table and of its slots, one struct each.
//
// A rule is a type with
//   kName                                the name that the Python spec gives as `native_rule`
//   kSlots, kHyperparameters             how many slot rows and float hyperparameters it takes
//   explicit Rule(const float* h)        from its hyperparameters, in the order of the spec's get_hyperparameters
//   template <int kDim> void Row(const float* g, float* const* rows, int64_t dim) const
//                                        new rows from the gradient g; rows[0] is the table's, then the slots'
// and is listed once, in EMBAX_ROW_RULES.
#ifndef EMBAX_KERNELS_OPTIMIZERS_H_
#define EMBAX_KERNELS_OPTIMIZERS_H_

#include <cmath>
#include <cstdint>

#define EMBAX_ROW_RULES(X) \
  X(Sgd)                   \
  X(Adagrad)

// Each instruction set compiles its own copy of everything below; the inner namespace keeps the linker from mixing them.
namespace embax {
namespace EMBAX_ISA {

// The length of a row as a constant where the loop was compiled for it (kDim > 0), so that it unrolls.
template <int kDim>
inline int64_t Length(int64_t dim) {
  return kDim > 0 ? kDim : dim;
}

// w -= lr * g
struct Sgd {
  static constexpr char kName[] = "sgd";
  static constexpr int kSlots = 0;
  static constexpr int kHyperparameters = 1;
  float learning_rate;

  explicit Sgd(const float* h) : learning_rate(h[0]) {}

  template <int kDim>
  void Row(const float* __restrict g, float* const* rows, int64_t dim) const {
    float* __restrict w = rows[0];
    for (int64_t i = 0; i < Length<kDim>(dim); ++i) w[i] -= learning_rate * g[i];
  }
};

// a += g^2; w -= lr * g / sqrt(a); no step where a is still 0
struct Adagrad {
  static constexpr char kName[] = "adagrad";
  static constexpr int kSlots = 1;
  static constexpr int kHyperparameters = 1;
  float learning_rate;

  explicit Adagrad(const float* h) : learning_rate(h[0]) {}

  template <int kDim>
  void Row(const float* __restrict g, float* const* rows, int64_t dim) const {
    float* __restrict w = rows[0];
    float* __restrict a = rows[1];
    for (int64_t i = 0; i < Length<kDim>(dim); ++i) {
      const float sum = a[i] + g[i] * g[i];
      a[i] = sum;
      const float step = learning_rate * g[i] / std::sqrt(sum);
      w[i] -= sum == 0.0f ? 0.0f : step;
    }
  }
};

}  // namespace EMBAX_ISA
}  // namespace embax

#endif  // EMBAX_KERNELS_OPTIMIZERS_H_
