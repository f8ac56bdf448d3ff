#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "core/log.h"

// Common to the searches of kl_reference.h: prefix sums of a histogram, with which a candidate
// takes O(levels) steps, however many bins it keeps.
namespace torch_ext::observers {

// Index of the choice in the `variant` option of kl_threshold.
enum class KlVariant : int32_t {
  log_linear = 0,  // searches the statistic itself (kl.h), not a linear histogram
  slides = 1,
  modelopt = 2,
  ncnn = 3,
  tvm = 4,
  onnxruntime = 5,
  horizon = 6,
};

namespace kl_reference {

TE_HD bool is_signed(KlVariant variant) {
  return variant == KlVariant::tvm || variant == KlVariant::onnxruntime;
}

// 1e-4, which ncnn adds to every normalised bin, and TVM and ONNX Runtime, in counts, to every
// empty one.
constexpr double kSmoothing = 1e-4;
// What Horizon adds to every bin of the normalised Q.
constexpr double kHorizonFloor = 1e-10;
// Sums of counts up to here are exact in float64.
constexpr int64_t kMaxCounts = int64_t{1} << 53;
// Powers of 1/count kept for the series in smoothed_entropy.
constexpr int kInverses = 4;
// The least operand of a logarithm. Where both operands of a ratio are clamped to it the logarithm
// is 0, and so is its weight.
constexpr double kTiny = 0x1p-1000;

TE_HD double at_least_tiny(double x) { return x > kTiny ? x : kTiny; }
TE_HD double larger(double a, double b) { return a > b ? a : b; }

// x ln x, 0 at 0.
TE_HD double entropy_of(double x) { return x > 0 ? x * core::log(x) : 0.0; }

// Neumaier's compensated sum. Divergences are differences of large, nearly equal prefix sums of x
// ln x.
struct CompensatedSum {
  double sum = 0;
  double lost = 0;
  TE_HD void add(double x) {
    const double next = sum + x;
    const bool keeps_sum = __builtin_fabs(sum) >= __builtin_fabs(x);
    lost += keeps_sum ? (sum - next) + x : (x - next) + sum;
    sum = next;
  }
  TE_HD double value() const { return sum + lost; }
};

// One histogram, prepared. Masses are counts times `unit`, a power of two that makes the mean
// logarithm of a mass near 0 (divergences do not change, and their rounding errors get small).
// Entry j of a prefix array covers the bins below j.
struct Tables {
  int64_t bins;
  int64_t levels;
  double unit;
  double total;
  double smoothing;       // kSmoothing in masses (ncnn: of the total)
  const double* mass;     // [bins + 2]; ncnn: each bin with its smoothing
  const double* entropy;  // [bins + 2], sum of x ln x
  const double* counted;  // [bins + 2], ncnn only: mass without the smoothing
  const double* filled;   // [bins + 2], all but ncnn: bins that are not empty
  // Signed searches only, over non-empty bins:
  const double* logs;                // [bins + 2], sum of ln x
  const double* inverse[kInverses];  // [bins + 2], sums of 1/x .. 1/x^4
  const double* present;             // [bins], the masses themselves, in order
};

// Prefix arrays per variant.
TE_HD int64_t arrays(KlVariant variant) { return is_signed(variant) ? 4 + kInverses + 1 : 3; }

// 2^power for a power within +-1000.
TE_HD double power_of_two(int power) {
  return __builtin_bit_cast(double, static_cast<uint64_t>(1023 + power) << 52);
}

// Writes mass[1..bins], and unit, total and smoothing of the tables.
TE_HD void fill_masses(Tables& tables, KlVariant variant, const int64_t* counts, double* mass) {
  const bool copies_second = variant == KlVariant::modelopt || variant == KlVariant::horizon;
  double total = 0, octaves = 0;  // octaves: sum of count * log2(count), roughly
  for (int64_t j = 0; j < tables.bins; ++j) {
    const int64_t from = copies_second && j == 0 && tables.bins > 1 ? 1 : j;
    const double count = counts[from] > 0 ? static_cast<double>(counts[from]) : 0.0;
    const auto exponent = static_cast<int>(__builtin_bit_cast(uint64_t, count) >> 52) - 1023;
    mass[j + 1] = count;
    total += count;
    octaves += count > 0 ? count * exponent : 0.0;
  }
  tables.unit = power_of_two(total > 0 ? -static_cast<int>(octaves / total) : 0);
  tables.total = total * tables.unit;
  tables.smoothing = kSmoothing * (variant == KlVariant::ncnn ? tables.total : tables.unit);
  for (int64_t j = 0; j < tables.bins; ++j) mass[j + 1] *= tables.unit;
}

// Replaces the values of the bins in array[1..bins] by prefix sums.
TE_HD void accumulate(double* array, int64_t bins) {
  CompensatedSum running;
  array[0] = 0;
  for (int64_t j = 1; j <= bins; ++j) {
    running.add(array[j]);
    array[j] = running.value();
  }
  array[bins + 1] = array[bins];
}

// ln x, 1/x .. 1/x^4 and the list of the masses, for the signed searches.
TE_HD void fill_signed(Tables& tables, const double* mass, double* scratch) {
  const int64_t stride = tables.bins + 2;
  double* present = scratch + (1 + kInverses) * stride;
  int64_t filled_bins = 0;
  for (int64_t j = 1; j <= tables.bins; ++j) {
    const double x = mass[j] > 0 ? mass[j] : 1.0;
    const double inverse = (mass[j] > 0 ? 1.0 : 0.0) / x;
    scratch[j] = core::log(x);
    double power = inverse;
    for (int k = 1; k <= kInverses; ++k) {
      scratch[k * stride + j] = power;
      power *= inverse;
    }
    if (mass[j] > 0) present[filled_bins++] = mass[j];
  }
  for (int k = 0; k <= kInverses; ++k) accumulate(scratch + k * stride, tables.bins);
  tables.logs = scratch;
  for (int k = 0; k < kInverses; ++k) tables.inverse[k] = scratch + (k + 1) * stride;
  tables.present = present;
}

// `scratch` has arrays(variant) * (bins + 2) doubles and lives as long as the tables.
TE_HD Tables make_tables(KlVariant variant, const int64_t* counts, int64_t bins, int64_t levels,
                         double* scratch) {
  const int64_t stride = bins + 2;
  const bool smooths_all = variant == KlVariant::ncnn;
  double* mass = scratch;
  double* entropy = mass + stride;
  double* third = entropy + stride;
  Tables tables = {bins, levels, 0, 0, 0, mass, entropy, nullptr, nullptr, nullptr, {}, nullptr};
  (smooths_all ? tables.counted : tables.filled) = third;
  fill_masses(tables, variant, counts, mass);
  const double added = smooths_all ? tables.smoothing : 0.0;
  for (int64_t j = 1; j <= bins; ++j) {
    const double x = mass[j] + added;
    entropy[j] = x * core::log(x > 0 ? x : 1.0);
  }
  accumulate(entropy, bins);
  if (is_signed(variant)) fill_signed(tables, mass, third + stride);

  // Sums of counts are exact up to 2^53; ncnn's smoothing is added to them with one rounding, not
  // j.
  double below = 0, filled_below = 0;
  mass[0] = third[0] = 0;
  for (int64_t j = 1; j <= bins; ++j) {
    below += mass[j];
    filled_below += mass[j] > 0 ? 1.0 : 0.0;
    mass[j] = below + added * static_cast<double>(j);
    third[j] = smooths_all ? below : filled_below;
  }
  mass[bins + 1] = mass[bins];
  third[bins + 1] = third[bins];
  return tables;
}

}  // namespace kl_reference
}  // namespace torch_ext::observers
