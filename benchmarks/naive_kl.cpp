// The KL threshold search as its published versions run it: for every candidate build P, build Q,
// add up the divergence. Plain loops in the precision of the originals (float) or in double;
// scratch memory is allocated once, which they do not do. Each returns the number of bins kept.
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

template <class Real>
Real sum_of(const Real* values, int64_t begin, int64_t end) {
  Real total = 0;
  for (int64_t j = begin; j < end; ++j) total += values[j];
  return total;
}

// The candidate of the least divergence, the first of equals.
template <class Real>
struct Least {
  Real value = std::numeric_limits<Real>::infinity();
  int64_t kept;
  void offer(Real candidate, int64_t bins) {
    if (!(candidate < value)) return;
    value = candidate;
    kept = bins;
  }
};

// GTC 2017 slides: m bins in `levels` groups, the mass beyond m in P's last bin.
template <class Real>
int64_t slides(const int64_t* counts, int64_t bins, int64_t levels) {
  const std::vector<Real> h(counts, counts + bins);
  std::vector<Real> p(bins), q(bins);
  Least<Real> least{.kept = bins};
  for (int64_t m = levels; m < bins; ++m) {
    for (int64_t j = 0; j < m; ++j) p[j] = h[j];
    p[m - 1] += sum_of(h.data(), m, bins);
    for (int64_t g = 0; g < levels; ++g) {
      // Bin j is in group floor(j * levels / m).
      const int64_t from = (g * m + levels - 1) / levels, to = ((g + 1) * m + levels - 1) / levels;
      Real total = 0, filled = 0;
      for (int64_t j = from; j < to; ++j) {
        total += h[j];
        filled += h[j] != 0 ? 1 : 0;
      }
      for (int64_t j = from; j < to; ++j) q[j] = h[j] != 0 ? total / filled : 0;
    }
    const Real p_total = sum_of(p.data(), 0, m), q_total = sum_of(q.data(), 0, m);
    Real divergence = 0;
    for (int64_t j = 0; j < m; ++j) {
      if (p[j] == 0) continue;
      if (q[j] == 0) {
        divergence = std::numeric_limits<Real>::infinity();
        break;
      }
      divergence += p[j] / p_total * std::log(p[j] / p_total / (q[j] / q_total));
    }
    least.offer(divergence, m);
  }
  return least.kept;
}

// ncnn: groups of m / levels bins, a bin cut by a border shared in proportion; 1e-4 added
// everywhere.
template <class Real>
int64_t ncnn(const int64_t* counts, int64_t bins, int64_t levels) {
  const Real floor_value = Real(1e-4);
  std::vector<Real> h(counts, counts + bins), p(bins), q(bins);
  const Real all = sum_of(h.data(), 0, bins);
  for (Real& value : h) value /= all;
  Least<Real> least{.kept = bins};
  for (int64_t m = levels; m < bins; ++m) {
    for (int64_t j = 0; j < m; ++j) p[j] = h[j];
    p[m - 1] += sum_of(h.data(), m, bins);
    for (int64_t j = 0; j < m; ++j) {
      p[j] += floor_value;
      q[j] = floor_value;
    }
    const Real width = static_cast<Real>(m) / static_cast<Real>(levels);
    for (int64_t g = 0; g < levels; ++g) {
      const Real left = g * width, right = left + width;
      const int64_t begin = static_cast<int64_t>(left);
      const int64_t ceiling = static_cast<int64_t>(std::ceil(right));
      const int64_t end = ceiling < m ? ceiling : m;
      const auto share = [&](int64_t j) {
        const Real from = j > left ? static_cast<Real>(j) : left;
        const Real to = j + 1 < right ? static_cast<Real>(j + 1) : right;
        return to - from;
      };
      Real group = 0;
      for (int64_t j = begin; j < end; ++j) group += share(j) * h[j];
      group /= width;
      for (int64_t j = begin; j < end; ++j) q[j] += share(j) * group;
    }
    Real divergence = 0;
    for (int64_t j = 0; j < m; ++j) divergence += p[j] * std::log(p[j] / q[j]);
    least.offer(divergence, m);
  }
  return least.kept;
}

// Takes 1e-4 for each zero from the others; false where they do not have that much.
template <class Real>
bool smooth(Real* values, int64_t n) {
  int64_t zeros = 0;
  for (int64_t j = 0; j < n; ++j) zeros += values[j] == 0 ? 1 : 0;
  if (zeros == n) return false;
  const Real taken = Real(1e-4) * static_cast<Real>(zeros) / static_cast<Real>(n - zeros);
  if (taken >= 1) return false;
  for (int64_t j = 0; j < n; ++j) values[j] = values[j] == 0 ? Real(1e-4) : values[j] - taken;
  return true;
}

// TVM: a histogram of x centred on 0; the first kept bin does not enter Q.
template <class Real>
int64_t tvm(const int64_t* counts, int64_t bins, int64_t levels) {
  const int64_t centre = bins / 2;
  const std::vector<Real> h(counts, counts + bins);
  std::vector<Real> p(bins), q(bins);
  Least<Real> least{.kept = centre};
  for (int64_t i = levels / 2; i <= centre; ++i) {
    const int64_t begin = centre - i, end = centre + i + 1 < bins ? centre + i + 1 : bins;
    const int64_t n = end - begin, merged = n / levels;
    for (int64_t j = 0; j < n; ++j) p[j] = h[begin + j];
    p[0] += sum_of(h.data(), 0, begin);
    p[n - 1] += sum_of(h.data(), end, bins);
    for (int64_t g = 0; g < levels; ++g) {
      const int64_t from = g * merged, to = g + 1 == levels ? n : from + merged;
      Real total = 0, filled = 0;
      for (int64_t j = from; j < to; ++j) {
        const Real value = j == 0 ? 0 : h[begin + j];
        total += value;
        filled += value != 0 ? 1 : 0;
      }
      for (int64_t j = from; j < to; ++j) q[j] = filled > 0 && p[j] != 0 ? total / filled : 0;
    }
    if (!smooth(p.data(), n) || !smooth(q.data(), n)) continue;
    const Real p_total = sum_of(p.data(), 0, n), q_total = sum_of(q.data(), 0, n);
    Real divergence = 0;
    for (int64_t j = 0; j < n; ++j)
      if (p[j] != 0 && q[j] != 0)
        divergence += p[j] / p_total * std::log(p[j] / p_total / (q[j] / q_total));
    least.offer(divergence, i);
  }
  return least.kept;
}

}  // namespace

#define NAIVE(variant)                                                            \
  int64_t variant##_float(const int64_t* counts, int64_t bins, int64_t levels) {  \
    return variant<float>(counts, bins, levels);                                  \
  }                                                                               \
  int64_t variant##_double(const int64_t* counts, int64_t bins, int64_t levels) { \
    return variant<double>(counts, bins, levels);                                 \
  }

extern "C" {
NAIVE(slides)
NAIVE(ncnn)
NAIVE(tvm)
}
