#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/lattice.h"
#include "kl_plain.h"
#include "observers/kl_reference.h"

// The searches under test, and the histograms they are tested on.
namespace kl_testing {

using kl_plain::Counts;
using kl_plain::Curve;
using kl_plain::Real;
using torch_ext::observers::KlReference;
using torch_ext::observers::KlVariant;

struct Variant {
  KlVariant id;
  const char* name;
  std::function<Curve(const Counts&, int64_t)> plain;
  bool last_wins;
};

inline const std::vector<Variant>& variants() {
  static const std::vector<Variant> all = {
      {KlVariant::slides, "slides", kl_plain::slides, false},
      {KlVariant::modelopt, "modelopt", kl_plain::modelopt, true},
      {KlVariant::ncnn, "ncnn", kl_plain::ncnn, false},
      {KlVariant::tvm, "tvm", kl_plain::tvm, false},
      {KlVariant::onnxruntime, "onnxruntime", kl_plain::onnxruntime, false},
      {KlVariant::horizon, "horizon", kl_plain::horizon, true},
  };
  return all;
}

inline const Variant& variant(const std::string& name) {
  for (const Variant& each : variants()) {
    if (each.name == name) return each;
  }
  throw std::invalid_argument(name);
}

struct Solved {
  std::vector<double> objective;
  int64_t winner;
  int64_t index;
  double threshold;
};

template <int Lanes = 16>
Solved solve(const Variant& which, const Counts& counts, int64_t levels, double width = 1.0) {
  const auto bins = static_cast<int64_t>(counts.size());
  // NaN at first: nothing may be read that was not written.
  std::vector<double> scratch(KlReference::scratch_size(which.id, bins), std::nan(""));
  const auto search = KlReference::prepare(which.id, counts.data(), bins, levels, scratch.data());
  Solved solved{std::vector<double>(search.count), -1, -1, std::nan("")};
  KlReference::objectives<Lanes>(search, 0, search.count, solved.objective.data());
  solved.winner = torch_ext::core::argmin(solved.objective.data(), search.count, search.last_wins);
  solved.index = KlReference::kept(search, solved.winner);
  solved.threshold = KlReference::threshold(search, solved.winner, width);
  return solved;
}

// ---- golden vectors: integer formulas, no random numbers
// -------------------------------------------

inline int64_t golden_count(char name, int64_t j, bool last, int64_t ramp) {
  const int64_t p = 1000000000 / (1000 + j * j);
  switch (name) {
    case 'P':
      return p;
    case 'Q':
      return ramp - j;
    case 'U':
      return 1000;
    case 'R':
      return j < 256 ? 1000 : last ? 1 : 0;
    case 'S':
      return int64_t{1000000} >> (j / 64);
    case 'T':
      return j == 0 ? 1000000000 : p;
    case 'V':
      return std::max<int64_t>(10000000000000 / (10000000 + j * j * j * j), last ? 1 : 0);
    default:  // W
      return 1000000 * (128 - j % 64) / 128 >> (j / 64);
  }
}

// `bins` bins of |x|.
inline Counts golden(char name, int64_t bins, int64_t ramp) {
  Counts counts(bins);
  for (int64_t j = 0; j < bins; ++j) counts[j] = golden_count(name, j, j == bins - 1, ramp);
  return counts;
}
inline Counts golden(char name) { return golden(name, 2048, 2048); }

inline Counts sums_of(const Counts& counts, int64_t bins_per_sum) {
  Counts sums(counts.size() / bins_per_sum);
  for (size_t j = 0; j < counts.size(); ++j) sums[j / bins_per_sum] += counts[j];
  return sums;
}

// 8001 signed bins, mirrored about bin 4000.
inline Counts golden_signed(char name) {
  const Counts half = golden(name, 4001, 4001);
  Counts counts(8001);
  for (int64_t k = 0; k <= 4000; ++k) counts[4000 + k] = counts[4000 - k] = half[k];
  return counts;
}

// An even number of signed bins, 0 between the two middle ones.
inline Counts mirrored(const Counts& half) {
  Counts counts(half.rbegin(), half.rend());
  counts.insert(counts.end(), half.begin(), half.end());
  return counts;
}

// Kind 0..9: Gauss, Laplace, uniform, sparse, one bin, all zero, 50 discrete values, decaying with
// noise, huge counts, tiny counts with holes.
inline Counts random_histogram(std::mt19937_64& random, int64_t bins, int kind, bool centered,
                               bool outlier) {
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  Counts counts(bins);
  const double width = static_cast<double>(bins) * (0.02 + 0.6 * uniform(random));
  const double size = std::exp2(4 + 30 * uniform(random));
  for (int64_t j = 0; j < bins; ++j) {
    const double t = std::fabs(static_cast<double>(j - (centered ? bins / 2 : 0))) / width;
    const std::vector<double> value = {size * std::exp(-t * t),
                                       size * std::exp(-3 * t),
                                       1000,
                                       uniform(random) < 0.05 ? 100 * t + 1 : 0,
                                       0,
                                       0,
                                       0,
                                       size * std::exp(-2 * t) * uniform(random),
                                       std::exp2(34 + 8 * uniform(random)),
                                       3 * uniform(random)};
    counts[j] = static_cast<int64_t>(value[kind]);
  }
  if (kind == 4) counts[random() % bins] = 1 + static_cast<int64_t>(random() % 1000);
  if (kind == 6) {
    for (int i = 0; i < 50; ++i)
      counts[random() % bins] += 1 + static_cast<int64_t>(random() % 1000);
  }
  if (outlier && kind != 5) counts[bins - 1] += 1;
  return counts;
}

}  // namespace kl_testing
