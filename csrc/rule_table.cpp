#include "rule_table.h"

#include <algorithm>
#include <vector>

#include "registry.h"

namespace torch_ext {
namespace {

template <class R>
constexpr RuleRow row_of() {
  RuleRow row{};
  row.name = R::name;
  row.needs = R::needs;
  row.composite = core::CompositeRule<R>;
  row.max_bits = R::max_bits;
  if constexpr (requires { R::only_integers; }) row.only_integers = R::only_integers;
  row.options = {static_cast<const core::Option*>(R::options), size_t{R::option_count}};
  if constexpr (core::SearchRule<R>) {
    row.search_words = [](core::HistogramLayout layout, const core::Grid& grid,
                          const double* options) { return R::search_words(layout, grid, options); };
    row.max_candidates = [](core::HistogramLayout layout) { return R::max_candidates(layout); };
  }
  if constexpr (core::ChecksOptions<R>)
    row.complaint = [](const core::Grid& grid, core::HistogramLayout layout,
                       const double* options) { return R::complaint(grid, layout, options); };
  if constexpr (core::GivesQParams<R>)
    row.given_qparams = [](const core::Grid& grid, const double* options) {
      return R::qparams(grid, options);
    };
  return row;
}

template <class List>
struct Rows;
template <class... R>
struct Rows<List<R...>> {
  static constexpr RuleRow rules[] = {row_of<R>()...};
};
template <class F>
constexpr FakeQuantRow fake_quant_row() {
  FakeQuantRow row{F::name, -1, "", false, 0, nullptr};
  if constexpr (core::LearnedFakeQuant<F>) {
    LearnedFakeQuants::for_each([&]<class Other>(int32_t index) {
      if (std::is_same_v<F, Other>) row.learned = index;
    });
    row.parameter = F::parameter;
    row.per_channel = F::per_channel;
    row.start = F::start;
    row.scale = [](float parameter, const core::Codes& codes) {
      return F::template unit_grid<float>(parameter, 0, codes).scale;
    };
  }
  return row;
}
template <class List>
struct FakeQuantRows;
template <class... F>
struct FakeQuantRows<List<F...>> {
  static constexpr FakeQuantRow rows[] = {fake_quant_row<F>()...};
};

}  // namespace

std::span<const RuleRow> rules() { return Rows<Observers>::rules; }

std::span<const FakeQuantRow> fake_quants() { return FakeQuantRows<FakeQuants>::rows; }

int64_t work_words(int32_t rule, core::HistogramLayout layout, const core::Grid& grid,
                   const double* options) {
  const RuleRow& row = rules()[rule];
  if (row.search_words != nullptr) return row.search_words(layout, grid, options);
  if (!row.composite) return 0;
  int64_t words = 0;
  for (const RuleRow& other : rules()) {
    if (other.search_words == nullptr) continue;
    std::vector<double> defaults;
    for (const core::Option& option : other.options) defaults.push_back(option.value);
    words = std::max(
        words, other.search_words(layout, grid, defaults.data()) + other.max_candidates(layout));
  }
  return words;
}

}  // namespace torch_ext
