#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

// The six linear-histogram KL searches, straight from their definitions: build P, build Q, sum, for
// every candidate, in long double. Slow on purpose; the fast header is compared with these.
namespace kl_plain {

using Real = long double;
using Counts = std::vector<int64_t>;

constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

struct Curve {
  int64_t first;            // the candidate that value[0] belongs to
  std::vector<Real> value;  // divergence per candidate, +inf = not a candidate
};

inline Real sum(const Counts& counts, int64_t begin, int64_t end) {
  Real total = 0;
  for (int64_t j = begin; j < end; ++j) total += counts[j];
  return total;
}

inline Real sum(const std::vector<Real>& values) {
  Real total = 0;
  for (const Real value : values) total += value;
  return total;
}

// Both normalised here, as scipy.stats.entropy does. P > 0 with Q = 0: infinite.
inline Real divergence(const std::vector<Real>& p, const std::vector<Real>& q) {
  const Real p_total = sum(p);
  const Real q_total = sum(q);
  if (!(p_total > 0) || !(q_total > 0)) return kInfinity;
  Real total = 0;
  for (size_t j = 0; j < p.size(); ++j) {
    if (p[j] == 0) continue;
    if (!(q[j] > 0)) return kInfinity;
    total += p[j] / p_total * logl((p[j] / p_total) / (q[j] / q_total));
  }
  return total;
}

// Q of slides, ModelOpt and Horizon: bin j of m goes to group floor(j*levels/m); every non-empty
// bin of a group gets the mean over the group's non-empty bins.
inline std::vector<Real> group_means(const Counts& counts, int64_t m, int64_t levels) {
  std::vector<Real> total(levels, 0);
  std::vector<Real> filled(levels, 0);
  for (int64_t j = 0; j < m; ++j) {
    if (counts[j] == 0) continue;
    total[j * levels / m] += counts[j];
    filled[j * levels / m] += 1;
  }
  std::vector<Real> q(m, 0);
  for (int64_t j = 0; j < m; ++j) {
    if (counts[j] != 0) q[j] = total[j * levels / m] / filled[j * levels / m];
  }
  return q;
}

// The first m bins, the mass beyond them added to the last one.
inline std::vector<Real> clipped(const Counts& counts, int64_t m) {
  std::vector<Real> p(counts.begin(), counts.begin() + m);
  p[m - 1] += sum(counts, m, static_cast<int64_t>(counts.size()));
  return p;
}

inline Curve slides(const Counts& counts, int64_t levels) {
  Curve curve{levels, {}};
  for (int64_t m = levels; m < static_cast<int64_t>(counts.size()); ++m) {
    curve.value.push_back(divergence(clipped(counts, m), group_means(counts, m, levels)));
  }
  return curve;
}

inline Curve modelopt(Counts counts, int64_t levels) {
  if (counts.size() > 1) counts[0] = counts[1];
  Curve curve{levels, {}};
  for (int64_t m = levels; m <= static_cast<int64_t>(counts.size()); ++m) {
    curve.value.push_back(divergence(clipped(counts, m), group_means(counts, m, levels)));
  }
  return curve;
}

// ncnn (current): fractional groups, counts normalised once, 1e-4 added to every bin, nothing
// renormalised.
inline Curve ncnn(const Counts& counts, int64_t levels) {
  const auto bins = static_cast<int64_t>(counts.size());
  const Real total = sum(counts, 0, bins);
  std::vector<Real> h(counts.begin(), counts.end());
  for (Real& value : h) value /= total;
  Curve curve{levels, {}};
  for (int64_t m = levels; m < bins; ++m) {
    if (total == 0) {
      curve.value.push_back(kInfinity);
      continue;
    }
    std::vector<Real> p(h.begin(), h.begin() + m);
    p[m - 1] += std::accumulate(h.begin() + m, h.end(), Real{0});
    for (Real& value : p) value += 1e-4L;
    std::vector<Real> q(m, 1e-4L);
    for (int64_t g = 0; g < levels; ++g) {
      // Bin j's share of the group is the overlap of [j, j+1) with [g*m/levels, (g+1)*m/levels).
      const int64_t left = g * m;
      const int64_t right = (g + 1) * m;  // in units of 1/levels
      Real group = 0;
      for (int pass = 0; pass < 2; ++pass) {
        for (int64_t j = left / levels; j * levels < right; ++j) {
          const int64_t from = std::max(left, j * levels);
          const int64_t to = std::min(right, (j + 1) * levels);
          const Real share = static_cast<Real>(to - from) / levels;
          if (pass == 0) group += share * h[j];
          if (pass == 1) q[j] += share * group;
        }
        if (pass == 0) group /= static_cast<Real>(m) / levels;
      }
    }
    Real value = 0;
    for (int64_t j = 0; j < m; ++j) value += p[j] * logl(p[j] / q[j]);
    curve.value.push_back(value);
  }
  return curve;
}

// 1e-4 moved from the non-zero entries to the zero ones. False: not a distribution any more.
inline bool smooth(std::vector<Real>& values) {
  Real zeros = 0;
  for (const Real value : values) zeros += value == 0;
  const Real filled = static_cast<Real>(values.size()) - zeros;
  if (filled == 0) return false;
  const Real taken = 1e-4L * zeros / filled;
  if (taken >= 1) return false;
  for (Real& value : values) value = value == 0 ? 1e-4L : value - taken;
  return true;
}

// TVM and ONNX Runtime: a signed histogram, the candidate i keeps bins [centre-i, centre+i].
inline Curve signed_search(const Counts& counts, int64_t levels, bool tvm) {
  const auto bins = static_cast<int64_t>(counts.size());
  const int64_t centre = bins / 2;
  Curve curve{levels / 2, {}};
  for (int64_t i = levels / 2; i <= centre; ++i) {
    const int64_t begin = centre - i;
    const int64_t end = std::min(centre + i + 1, bins);
    const int64_t size = end - begin;
    if (size < levels) {  // an even number of bins, an odd one of levels: fewer bins than groups
      curve.value.push_back(kInfinity);
      continue;
    }
    std::vector<Real> kept(counts.begin() + begin, counts.begin() + end);
    std::vector<Real> p = kept;
    p.front() += sum(counts, 0, begin);
    p.back() += sum(counts, end, bins);
    if (tvm) kept.front() = 0;
    const int64_t merged = size / levels;
    std::vector<Real> q(size, 0);
    for (int64_t g = 0; g < levels; ++g) {
      const int64_t from = g * merged;
      const int64_t whole = from + merged;
      const int64_t to =
          g + 1 == levels ? size : whole;  // the remainder goes to the last group's sum
      Real total = 0;
      Real filled = 0;
      for (int64_t j = from; j < to; ++j) total += kept[j];
      if (tvm) {
        for (int64_t j = from; j < to; ++j) filled += kept[j] != 0;
        for (int64_t j = from; j < to; ++j) q[j] = filled > 0 && p[j] != 0 ? total / filled : 0;
      } else {
        for (int64_t j = from; j < whole; ++j) filled += p[j] != 0;
        for (int64_t j = from; j < whole; ++j) q[j] = filled > 0 ? floorl(total / filled) : 0;
      }
    }
    const bool p_valid = smooth(p);
    const bool q_valid = smooth(q);
    curve.value.push_back(p_valid && q_valid ? divergence(p, q) : kInfinity);
  }
  return curve;
}

inline Curve tvm(const Counts& counts, int64_t levels) {
  return signed_search(counts, levels, true);
}

inline Curve onnxruntime(const Counts& counts, int64_t levels) {
  return signed_search(counts, levels, false);
}

inline Curve horizon(Counts counts, int64_t levels) {
  if (counts.size() > 1) counts[0] = counts[1];
  const auto bins = static_cast<int64_t>(counts.size());
  std::vector<Real> single;
  for (int64_t m = levels; m <= bins; ++m) {
    const std::vector<Real> p = clipped(counts, m);
    const std::vector<Real> q = group_means(counts, m, levels);
    const Real p_total = sum(p);
    const Real q_total = sum(q);
    Real value = p_total > 0 && q_total > 0 ? 0 : kInfinity;
    for (int64_t j = 0; j < m && value != kInfinity; ++j) {
      if (p[j] != 0) value += p[j] / p_total * logl((p[j] / p_total) / (q[j] / q_total + 1e-10L));
    }
    single.push_back(value);
  }
  Curve curve{levels + 4, {}};
  for (size_t k = 0; k + 10 < single.size(); ++k) {
    Real window = 0;
    for (size_t w = 0; w < 9; ++w) window += single[k + w];
    curve.value.push_back(window);
  }
  return curve;
}

}  // namespace kl_plain
