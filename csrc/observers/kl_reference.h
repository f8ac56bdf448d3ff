#pragma once

#include "observers/kl_reference_grouped.h"
#include "observers/kl_reference_signed.h"

// The KL threshold searches of six public systems on a linear histogram. Each minimises the
// divergence between the histogram clipped at a candidate (P) and the same histogram quantized to
// `levels` groups (Q), over all candidates. The result is that of the original, evaluated without
// rounding errors.
//
//   variant      histogram          candidates (bins kept)  ties   threshold for w = bin width
//   slides       |x|                levels .. bins-1        first  (kept + 1/2) w
//   modelopt     |x|, bin 0 := 1    levels .. bins          last   kept w
//   ncnn         |x|                levels .. bins-1        first  (kept + 1/2) w
//   tvm          x, centered        levels/2 .. bins/2      first  right edge of the window
//   onnxruntime  x, centered        levels/2 .. bins/2      first  right edge of the window
//   horizon      |x|, bin 0 := 1    levels+4 .. bins-6      last   kept w
//
// A centered histogram has 0 in bin bins/2 (odd bins) or at its left edge (even); kept counts the
// bins on one side of that bin, and the window's right edge is (kept + 1/2) w, for even bins (kept
// + 1) w, at most the histogram's end. ONNX Runtime returns both edges; this is the larger one,
// before its clamp to the data. horizon minimises the sum over 9 neighbouring candidates, the
// middle one giving `kept`. There are two differences from the originals, in cases where these
// crash or where their result is arbitrary: without a candidate of finite divergence (no values,
// too few bins, all mass in one bin of `slides`) the whole histogram is kept; the first candidate
// is `levels` where the original has its literal 128.
namespace torch_ext::observers {

struct KlReference {
  // A prepared search over `count` candidates, numbered from 0.
  struct Search {
    kl_reference::Tables tables;
    KlVariant variant;
    int64_t count;
    bool last_wins;
  };

  // Doubles of scratch memory that `prepare` needs.
  TE_HD static int64_t scratch_size(KlVariant variant, int64_t bins) {
    return kl_reference::arrays(variant) * (bins + 2);
  }

  // Bins kept by candidate 0.
  TE_HD static int64_t first_kept(KlVariant variant, int64_t levels) {
    if (kl_reference::is_signed(variant)) return levels / 2;
    return variant == KlVariant::horizon ? levels + kWindow / 2 : levels;
  }
  TE_HD static int64_t candidate_count(KlVariant variant, int64_t bins, int64_t levels) {
    const int64_t divergences = bins - levels + 1;  // of m = levels .. bins
    int64_t count = divergences;
    if (kl_reference::is_signed(variant)) count = bins / 2 - levels / 2 + 1;
    if (variant == KlVariant::slides || variant == KlVariant::ncnn) count = divergences - 1;
    if (variant == KlVariant::horizon) count = divergences - 10;
    return count > 0 ? count : 0;
  }

  // bins >= 1, levels >= 2. Counts below 0 are taken as 0. `scratch` is used as long as the search
  // is.
  TE_HD static Search prepare(KlVariant variant, const int64_t* counts, int64_t bins,
                              int64_t levels, double* scratch) {
    const bool last_wins = variant == KlVariant::modelopt || variant == KlVariant::horizon;
    return {kl_reference::make_tables(variant, counts, bins, levels, scratch), variant,
            candidate_count(variant, bins, levels), last_wins};
  }

  // Divergences of the candidates [begin, end) into out[0 .. end-begin); +inf where one cannot win.
  // The bits are the same for any `Lanes`, any partition into ranges and any device.
  template <int Lanes>
  TE_HD static void objectives(const Search& search, int64_t begin, int64_t end, double* out) {
    if (search.variant == KlVariant::horizon) {
      windowed<Lanes>(search, begin, end, out);
      return;
    }
    double block[Lanes];
    for (int64_t i = begin; i < end; i += Lanes) {
      divergences<Lanes>(search, i, search.count - 1, block);
      for (int64_t lane = 0; lane < Lanes && i + lane < end; ++lane)
        out[i + lane - begin] = block[lane];
    }
  }

  // Bins kept by candidate i; all bins for i = -1, no candidate.
  TE_HD static int64_t kept(const Search& search, int64_t i) {
    if (i >= 0) return first_kept(search.variant, search.tables.levels) + i;
    return kl_reference::is_signed(search.variant) ? search.tables.bins / 2 : search.tables.bins;
  }

  TE_HD static double threshold(const Search& search, int64_t i, double bin_width) {
    const auto bins = static_cast<double>(kept(search, i));
    switch (search.variant) {
      case KlVariant::slides:
      case KlVariant::ncnn:
        return (bins + 0.5) * bin_width;
      case KlVariant::tvm:
      case KlVariant::onnxruntime: {
        const int64_t edge = search.tables.bins / 2 + kept(search, i) + 1;
        const int64_t last = search.tables.bins;
        return (static_cast<double>(edge < last ? edge : last) - 0.5 * static_cast<double>(last)) *
               bin_width;
      }
      default:
        return bins * bin_width;
    }
  }

 private:
  // Number of neighbouring candidates that horizon sums.
  static constexpr int kWindow = 9;

  template <int Lanes>
  TE_HD static void divergences(const Search& search, int64_t i, int64_t last, double* out) {
    namespace kl = kl_reference;
    const kl::Tables& tables = search.tables;
    const int64_t first = kl::is_signed(search.variant) ? tables.levels / 2 : tables.levels;
    switch (search.variant) {
      case KlVariant::ncnn:
        kl::divergences<kl::SplitBins<Lanes>, Lanes>(tables, 0.0, first + i, first + last, out);
        break;
      case KlVariant::tvm:
        kl::signed_divergences<kl::TvmCandidates<Lanes>, Lanes>(tables, first + i, first + last,
                                                                out);
        break;
      case KlVariant::onnxruntime:
        kl::signed_divergences<kl::OnnxCandidates<Lanes>, Lanes>(tables, first + i, first + last,
                                                                 out);
        break;
      default:
        kl::divergences<kl::WholeBins<Lanes>, Lanes>(
            tables, search.variant == KlVariant::horizon ? kl::kHorizonFloor : 0.0, first + i,
            first + last, out);
    }
  }

  // Candidate i of horizon is the sum of the divergences i .. i+8, added in this order.
  template <int Lanes>
  TE_HD static void windowed(const Search& search, int64_t begin, int64_t end, double* out) {
    const int64_t last = search.tables.bins - search.tables.levels;
    double single[2 * Lanes + kWindow - 1];
    int64_t ready = 0;
    for (int64_t i = begin; i < end; i += Lanes) {
      for (; ready < Lanes + kWindow - 1; ready += Lanes)
        divergences<Lanes>(search, i + ready, last, single + ready);
      for (int64_t lane = 0; lane < Lanes && i + lane < end; ++lane) {
        double sum = single[lane];
        for (int k = 1; k < kWindow; ++k) sum += single[lane + k];
        out[i + lane - begin] = sum;
      }
      ready -= Lanes;
      for (int64_t k = 0; k < ready; ++k) single[k] = single[k + Lanes];
    }
  }
};

}  // namespace torch_ext::observers
