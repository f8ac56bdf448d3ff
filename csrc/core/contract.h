#pragma once

#include <concepts>
#include <cstdint>

#include "core/cumulative.h"
#include "core/grid.h"
#include "core/option.h"

// The interface of a rule, as concepts. Each header under observers/ ends with a static_assert of
// one of them.
namespace torch_ext::core {

// Every rule: its name, what it reads of the statistic, the most bits of a grid it is defined for,
// its options.
template <class R>
concept Rule = requires {
  { R::name } -> std::convertible_to<const char*>;
  { R::needs } -> std::convertible_to<Needs>;
  { R::max_bits } -> std::convertible_to<int>;
  { R::options } -> std::convertible_to<const Option*>;
  { R::option_count } -> std::convertible_to<int32_t>;
};

// Closed: the range is computed from the view directly.
template <class R>
concept ClosedRule =
    Rule<R> && requires(const View& view, const Grid& grid, const double* options) {
      { R::solve(view, grid, options) } -> std::same_as<Range>;
    };

// Search: candidates are prepared once per channel, their objectives are computed independently of
// each other, and the smallest objective wins. An objective that is certainly more than `bound`
// may be given as infinite; `bounded` says whether that saves time. kLanes is how many candidates,
// or levels of one, a loop may process side by side: 16 on the CPU, where that vectorises, 1 in a
// GPU thread. The results have the same bits for any kLanes.
template <class R>
concept SearchRule =
    Rule<R> && requires(const View& view, const Grid& grid, const double* options, int64_t* words,
                        const typename R::Search& search, double* out, HistogramLayout layout) {
      { R::search_words(layout, grid, options) } -> std::same_as<int64_t>;
      { R::max_candidates(layout) } -> std::same_as<int64_t>;
      { R::prepare(view, grid, options, words) } -> std::same_as<typename R::Search>;
      { search.count } -> std::convertible_to<int64_t>;
      { search.last_wins } -> std::convertible_to<bool>;
      { search.bounded } -> std::convertible_to<bool>;
      {
        R::template objectives<1>(search, int64_t{}, int64_t{}, double{}, out)
      } -> std::same_as<void>;
      { R::threshold(search, int64_t{}) } -> std::same_as<double>;
    };

// Composite: closed, but computed from the results of search rules, which the driver provides:
// thresholds.template operator()<OtherRule>(options) is that rule's threshold on the same view.
struct AnyThresholds {
  template <class R>
  TE_HD double threshold(const double*) const {
    return 0;
  }
};
template <class R>
concept CompositeRule = Rule<R> && requires(const View& view, const Grid& grid,
                                            const double* options, AnyThresholds t) {
  { R::solve(view, grid, options, t) } -> std::same_as<Range>;
};

template <class R>
concept AnyRule = ClosedRule<R> || SearchRule<R> || CompositeRule<R>;

// Optional: R::only_integers, a text that tells why the rule takes no float format.

// Optional: what is wrong with options that are each within their own bounds, or with the grid.
template <class R>
concept ChecksOptions = requires(const Grid& grid, HistogramLayout layout, const double* options) {
  { R::complaint(grid, layout, options) } -> std::same_as<Complaint>;
};

// Optional: scale and zero point that are options, not computed from the range.
template <class R>
concept GivesQParams = requires(const Grid& grid, const double* options) {
  { R::qparams(grid, options) } -> std::same_as<QParams>;
};

}  // namespace torch_ext::core
