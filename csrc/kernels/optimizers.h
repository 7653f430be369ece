// The row rules: how an optimizer changes one row of a table and of its slots, one struct each.
//
// A rule is a type with
//   kName                                the name that the Python spec gives as `native_rule`
//   kSlots, kHyperparameters             how many slot rows and float hyperparameters it takes
//   kRowWise                             bit k is set if slot k has one value a row (0 by ElementWise)
//   Rule(const float* h, int64_t width)  from its hyperparameters, in the order of the spec's get_hyperparameters, and the
//                                        columns of a row that are not padding
//   template <int kDim> void Row(const float* g, float* const* rows, int64_t dim) const
//                                        new rows from the gradient g; rows[0] is the table's, then the slots'
// and is listed once, in EMBAX_ROW_RULES.
#ifndef EMBAX_KERNELS_OPTIMIZERS_H_
#define EMBAX_KERNELS_OPTIMIZERS_H_

#include <cmath>
#include <cstdint>

#define EMBAX_ROW_RULES(X) \
  X(Sgd)                   \
  X(Adagrad)               \
  X(AdagradMomentum)       \
  X(Adam)                  \
  X(Ftrl)                  \
  X(LaProp)                \
  X(F2a)                   \
  X(RowWiseAdagrad)        \
  X(RowWiseAdam)

// Each instruction set compiles its own copy of everything below; the inner namespace keeps the linker from mixing them.
namespace embax {
namespace EMBAX_ISA {

// Stands before a loop over the elements of a row that do not depend on each other; one that adds them up says so by a pragma of
// its own. Without it GCC unrolls short loops before it could make vector instructions of them.
#define EMBAX_SIMD_LOOP _Pragma("omp simd")

// The length of a row as a constant where the loop was compiled for it (kDim > 0), so that it unrolls.
template <int kDim>
inline int64_t Length(int64_t dim) {
  return kDim > 0 ? kDim : dim;
}

// The sum of the squares of a row, added up in an order that depends on the instruction set alone.
template <int kDim>
inline float SumOfSquares(const float* __restrict g, int64_t dim) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < Length<kDim>(dim); ++i) sum += g[i] * g[i];
  return sum;
}

struct ElementWise {
  static constexpr unsigned kRowWise = 0;
};

// w -= lr * g
struct Sgd : ElementWise {
  static constexpr char kName[] = "sgd";
  static constexpr int kSlots = 0;
  static constexpr int kHyperparameters = 1;
  float learning_rate;

  Sgd(const float* h, int64_t) : learning_rate(h[0]) {}

  template <int kDim>
  void Row(const float* __restrict g, float* const* rows, int64_t dim) const {
    float* __restrict w = rows[0];
    EMBAX_SIMD_LOOP
    for (int64_t i = 0; i < Length<kDim>(dim); ++i) w[i] -= learning_rate * g[i];
  }
};

// a += g^2; w -= lr * g / sqrt(a); no step where a is still 0
struct Adagrad : ElementWise {
  static constexpr char kName[] = "adagrad";
  static constexpr int kSlots = 1;
  static constexpr int kHyperparameters = 1;
  float learning_rate;

  Adagrad(const float* h, int64_t) : learning_rate(h[0]) {}

  template <int kDim>
  void Row(const float* __restrict g, float* const* rows, int64_t dim) const {
    float* __restrict w = rows[0];
    float* __restrict a = rows[1];
    EMBAX_SIMD_LOOP
    for (int64_t i = 0; i < Length<kDim>(dim); ++i) {
      const float sum = a[i] + g[i] * g[i];
      a[i] = sum;
      const float step = learning_rate * g[i] / std::sqrt(sum);
      w[i] -= sum == 0.0f ? 0.0f : step;
    }
  }
};

// a = beta2 * a + share * g^2; s = g * (a + eps)^(-1/exponent), 0 where a + eps is 0; m = k * m + s;
// w -= lr * (k * m + s with Nesterov, else m). The share is 1 - beta2, but 1 where beta2 is 1.
struct AdagradMomentum : ElementWise {
  static constexpr char kName[] = "adagrad_momentum";
  static constexpr int kSlots = 2;
  static constexpr int kHyperparameters = 6;
  float learning_rate, decay, beta2, share, epsilon, power;
  bool nesterov;

  AdagradMomentum(const float* h, int64_t)
      : learning_rate(h[0]), decay(h[1]), beta2(h[2]), share(h[2] == 1.0f ? 1.0f : 1.0f - h[2]), epsilon(h[3]),
        power(-1.0f / h[4]), nesterov(h[5] != 0.0f) {}

  // The square root of its own loop is 15 times as fast as a call of pow for each element, for which nothing vectorizes.
  template <int kDim>
  void Row(const float* __restrict g, float* const* rows, int64_t dim) const {
    if (power == -0.5f) return Elements<kDim, true>(g, rows, dim);
    Elements<kDim, false>(g, rows, dim);
  }

 private:
  template <int kDim, bool kSquareRoot>
  void Elements(const float* __restrict g, float* const* rows, int64_t dim) const {
    float* __restrict w = rows[0];
    float* __restrict a = rows[1];
    float* __restrict m = rows[2];
    EMBAX_SIMD_LOOP
    for (int64_t i = 0; i < Length<kDim>(dim); ++i) {
      const float sum = beta2 * a[i] + share * g[i] * g[i];
      a[i] = sum;
      const float base = sum + epsilon;
      const float scaled = kSquareRoot ? g[i] / std::sqrt(base) : g[i] * std::pow(base, power);
      const float s = base == 0.0f ? 0.0f : scaled;
      const float momentum = decay * m[i] + s;
      m[i] = momentum;
      w[i] -= learning_rate * (nesterov ? decay * momentum + s : momentum);
    }
  }
};

// m += (1 - b1) * (g - m); v += (1 - b2) * (g^2 - v); w -= alpha * m / (sqrt(v) + eps), no step where that divides by 0
struct Adam : ElementWise {
  static constexpr char kName[] = "adam";
  static constexpr int kSlots = 2;
  static constexpr int kHyperparameters = 4;
  float alpha, rate_1, rate_2, epsilon;

  Adam(const float* h, int64_t) : alpha(h[0]), rate_1(1.0f - h[1]), rate_2(1.0f - h[2]), epsilon(h[3]) {}

  template <int kDim>
  void Row(const float* __restrict g, float* const* rows, int64_t dim) const {
    float* __restrict w = rows[0];
    float* __restrict m = rows[1];
    float* __restrict v = rows[2];
    EMBAX_SIMD_LOOP
    for (int64_t i = 0; i < Length<kDim>(dim); ++i) {
      const float momentum = m[i] + rate_1 * (g[i] - m[i]);
      const float velocity = v[i] + rate_2 * (g[i] * g[i] - v[i]);
      m[i] = momentum;
      v[i] = velocity;
      const float denominator = std::sqrt(velocity) + epsilon;
      const float step = alpha * momentum / denominator;
      w[i] -= denominator == 0.0f ? 0.0f : step;
    }
  }
};

// A = a + g^2; L = l + scale * g - (A^-p - a^-p) * per_rate * w; den = (A^-p + beta) * per_rate + 2 * scale * l2;
// w = (clip(L, -scale * l1, scale * l1) - L) / den, as it was where den is 0; a, l = A, L.
// The linear term is in units of the gradient times the scale, which is lr or 1.
struct Ftrl : ElementWise {
  static constexpr char kName[] = "ftrl";
  static constexpr int kSlots = 2;
  static constexpr int kHyperparameters = 6;
  float scale, per_rate, power, threshold, twice_l2, beta;

  Ftrl(const float* h, int64_t)
      : scale(h[5] != 0.0f ? h[0] : 1.0f), per_rate(h[5] != 0.0f ? 1.0f : 1.0f / h[0]), power(-h[1]),
        threshold(scale * h[2]), twice_l2(2.0f * scale * h[3]), beta(h[4]) {}

  // As for AdagradMomentum.
  template <int kDim>
  void Row(const float* __restrict g, float* const* rows, int64_t dim) const {
    if (power == 0.5f) return Elements<kDim, true>(g, rows, dim);
    Elements<kDim, false>(g, rows, dim);
  }

 private:
  template <int kDim, bool kSquareRoot>
  void Elements(const float* __restrict g, float* const* rows, int64_t dim) const {
    float* __restrict w = rows[0];
    float* __restrict a = rows[1];
    float* __restrict l = rows[2];
    EMBAX_SIMD_LOOP
    for (int64_t i = 0; i < Length<kDim>(dim); ++i) {
      const float sum = a[i] + g[i] * g[i];
      const float root = kSquareRoot ? std::sqrt(sum) : std::pow(sum, power);
      const float old_root = kSquareRoot ? std::sqrt(a[i]) : std::pow(a[i], power);
      const float linear = l[i] + scale * g[i] - (root - old_root) * per_rate * w[i];
      a[i] = sum;
      l[i] = linear;
      const float denominator = (root + beta) * per_rate + twice_l2;
      const float clipped = linear < -threshold ? -threshold : linear > threshold ? threshold : linear;
      const float solution = (clipped - linear) / denominator;
      w[i] = denominator == 0.0f ? w[i] : solution;
    }
  }
};

// nu = d * nu + (1 - d) * (g^2 + eps); mu = b1 * mu + sqrt(1 - b1^2) * g / sqrt(nu), its second term 0 where nu is 0;
// w -= lr * mu
struct LaProp : ElementWise {
  static constexpr char kName[] = "laprop";
  static constexpr int kSlots = 2;
  static constexpr int kHyperparameters = 4;
  float learning_rate, b1, share, decay, epsilon;

  LaProp(const float* h, int64_t)
      : learning_rate(h[0]), b1(h[1]), share(std::sqrt((1.0f - h[1]) * (1.0f + h[1]))), decay(h[2]), epsilon(h[3]) {}

  template <int kDim>
  void Row(const float* __restrict g, float* const* rows, int64_t dim) const {
    float* __restrict w = rows[0];
    float* __restrict mu = rows[1];
    float* __restrict nu = rows[2];
    EMBAX_SIMD_LOOP
    for (int64_t i = 0; i < Length<kDim>(dim); ++i) {
      const float mean = decay * nu[i] + (1.0f - decay) * (g[i] * g[i] + epsilon);
      nu[i] = mean;
      const float scaled = share * g[i] / std::sqrt(mean);
      const float momentum = b1 * mu[i] + (mean == 0.0f ? 0.0f : scaled);
      mu[i] = momentum;
      w[i] -= learning_rate * momentum;
    }
  }
};

// n += 1; f = min((max(t, 1) / n)^rho, max_multiplier); a += g^2;
// w -= lr * (f * g / sqrt(a) + l1 * sign(w) + l2 * w), the first term 0 where a is 0
struct F2a : ElementWise {
  static constexpr char kName[] = "f2a";
  static constexpr int kSlots = 2;
  static constexpr int kHyperparameters = 6;
  float learning_rate, rho, l1, l2, max_multiplier, step;

  F2a(const float* h, int64_t)
      : learning_rate(h[0]), rho(h[1]), l1(h[2]), l2(h[3]), max_multiplier(h[4]), step(h[5] < 1.0f ? 1.0f : h[5]) {}

  // A row is updated as a whole, so its elements count the same steps, unless it was loaded otherwise: one power for all.
  template <int kDim>
  void Row(const float* __restrict g, float* const* rows, int64_t dim) const {
    const float* __restrict n = rows[2];
    int32_t others = 0;
#pragma omp simd reduction(+ : others)
    for (int64_t i = 0; i < Length<kDim>(dim); ++i) others += n[i] != n[0];
    if (others == 0) return Elements<kDim, true>(g, rows, dim);
    Elements<kDim, false>(g, rows, dim);
  }

 private:
  float Multiplier(float n) const {
    const float multiplier = std::pow(step / n, rho);
    return multiplier > max_multiplier ? max_multiplier : multiplier;
  }

  template <int kDim, bool kSame>
  void Elements(const float* __restrict g, float* const* rows, int64_t dim) const {
    float* __restrict w = rows[0];
    float* __restrict a = rows[1];
    float* __restrict n = rows[2];
    const float of_all = kSame ? Multiplier(n[0] + 1.0f) : 0.0f;
    EMBAX_SIMD_LOOP
    for (int64_t i = 0; i < Length<kDim>(dim); ++i) {
      n[i] += 1.0f;
      const float sum = a[i] + g[i] * g[i];
      a[i] = sum;
      const float scaled = (kSame ? of_all : Multiplier(n[i])) * g[i] / std::sqrt(sum);
      const float sign = w[i] > 0.0f ? 1.0f : w[i] < 0.0f ? -1.0f : 0.0f;
      w[i] -= learning_rate * ((sum == 0.0f ? 0.0f : scaled) + l1 * sign + l2 * w[i]);
    }
  }
};

// a += mean(g^2), of the row; w -= lr * g / (sqrt(a) + eps), no step where that divides by 0
struct RowWiseAdagrad {
  static constexpr char kName[] = "row_wise_adagrad";
  static constexpr int kSlots = 1;
  static constexpr unsigned kRowWise = 1;
  static constexpr int kHyperparameters = 2;
  float learning_rate, epsilon, width;

  RowWiseAdagrad(const float* h, int64_t width) : learning_rate(h[0]), epsilon(h[1]), width(static_cast<float>(width)) {}

  template <int kDim>
  void Row(const float* __restrict g, float* const* rows, int64_t dim) const {
    float* __restrict w = rows[0];
    const float sum = *rows[1] + SumOfSquares<kDim>(g, dim) / width;
    *rows[1] = sum;
    const float denominator = std::sqrt(sum) + epsilon;
    const float rate = denominator == 0.0f ? 0.0f : learning_rate / denominator;
    EMBAX_SIMD_LOOP
    for (int64_t i = 0; i < Length<kDim>(dim); ++i) w[i] -= rate * g[i];
  }
};

// m += (1 - b1) * (g - m); v += (1 - b2) * (mean(g^2) - v), of the row; w -= alpha * m / (sqrt(v) + eps), no step where that
// divides by 0
struct RowWiseAdam {
  static constexpr char kName[] = "row_wise_adam";
  static constexpr int kSlots = 2;
  static constexpr unsigned kRowWise = 2;
  static constexpr int kHyperparameters = 4;
  float alpha, rate_1, rate_2, epsilon, width;

  RowWiseAdam(const float* h, int64_t width)
      : alpha(h[0]), rate_1(1.0f - h[1]), rate_2(1.0f - h[2]), epsilon(h[3]), width(static_cast<float>(width)) {}

  template <int kDim>
  void Row(const float* __restrict g, float* const* rows, int64_t dim) const {
    float* __restrict w = rows[0];
    float* __restrict m = rows[1];
    const float velocity = *rows[2] + rate_2 * (SumOfSquares<kDim>(g, dim) / width - *rows[2]);
    *rows[2] = velocity;
    const float denominator = std::sqrt(velocity) + epsilon;
    const float rate = denominator == 0.0f ? 0.0f : alpha / denominator;
    EMBAX_SIMD_LOOP
    for (int64_t i = 0; i < Length<kDim>(dim); ++i) {
      const float momentum = m[i] + rate_1 * (g[i] - m[i]);
      m[i] = momentum;
      w[i] -= rate * momentum;
    }
  }
};

}  // namespace EMBAX_ISA
}  // namespace embax

#endif  // EMBAX_KERNELS_OPTIMIZERS_H_
