#include "bindings/grid_text.h"

#include <charconv>
#include <string>

#include "bindings/checks.h"

namespace torch_ext::bindings {
namespace {

// In the order of core::Rounding.
constexpr const char* kRoundings[] = {"half_even", "half_away", "floor_half_up"};

// A text of any length as a part of a message. It is cut between characters of UTF-8, as Python
// decodes the message.
std::string shown(std::string_view text) {
  constexpr size_t kLongest = 100;
  if (text.size() <= kLongest) return std::string(text);
  size_t end = kLongest;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return std::string(text.substr(0, end)) + "...";
}

// Where in the call a value stands that is not as wanted.
std::string place_of(const GridSource& source) {
  std::string place = " in grid";
  if (source.index >= 0) place += "s[" + std::to_string(source.index) + "]";
  return place + " \"" + shown(source.text) + '"';
}

template <class Have>
void expect_of(bool holds, const GridSource& source, const char* part, const char* want,
               const Have& have) {
  if (!holds) expect(false, source.op, part, want, have, place_of(source));
}

[[noreturn]] void refuse(const GridSource& source, std::string_view have) {
  TORCH_CHECK(false, source.op,
              ": expected grid to be [quant_min,quant_max] and words among symmetric, affine, "
              "scale_rule=, power_of_two, rounding=, each kind once, such as \"[-128,127] "
              "symmetric\", got ",
              have.empty() ? "nothing" : shown(have), place_of(source));
}

// The integer that the text begins with, and takes it from there. Raises unless `end` follows.
int64_t take_integer(const GridSource& source, std::string_view& rest, char end) {
  int64_t value = 0;
  const char* const last = rest.data() + rest.size();
  const auto [stop, error] = std::from_chars(rest.data(), last, value);
  if (error != std::errc() || stop == last || *stop != end) refuse(source, rest);
  rest.remove_prefix(static_cast<size_t>(stop - rest.data()) + 1);
  return value;
}

core::ScaleRule parse_scale_rule(const GridSource& source, std::string_view name) {
  if (name == "grid") return core::ScaleRule::grid;
  expect_of(name == "tvm", source, "scale_rule", "one of grid, tvm", shown(name));
  return core::ScaleRule::tvm;
}

core::Rounding parse_rounding(const GridSource& source, std::string_view name) {
  for (int32_t i = 0; i < 3; ++i)
    if (name == kRoundings[i]) return static_cast<core::Rounding>(i);
  expect_of(false, source, "rounding", "one of half_even, half_away, floor_half_up", shown(name));
  return core::Rounding::half_even;
}

// Reads one word, and returns the bit of its kind.
uint32_t parse_word(const GridSource& source, std::string_view word, ParsedGrid& grid) {
  if (word == "symmetric" || word == "affine") {
    grid.symmetric = word == "symmetric";
    return 1;
  }
  if (word == "power_of_two") {
    grid.power_of_two = true;
    return 2;
  }
  const size_t equals = word.find('=');
  const std::string_view key = word.substr(0, equals);
  const bool has_value = equals != std::string_view::npos;
  const std::string_view value = has_value ? word.substr(equals + 1) : std::string_view();
  if (has_value && key == "scale_rule") {
    grid.scale_rule = parse_scale_rule(source, value);
    return 4;
  }
  if (has_value && key == "rounding") {
    grid.rounding = parse_rounding(source, value);
    return 8;
  }
  refuse(source, word);
}

core::Codes codes_of(const ParsedGrid& grid) {
  return {static_cast<int32_t>(grid.quant_min), static_cast<int32_t>(grid.quant_max)};
}

}  // namespace

ParsedGrid parse_grid(const GridSource& source) {
  ParsedGrid grid{};
  std::string_view rest = source.text;
  if (rest.empty() || rest[0] != '[') refuse(source, rest);
  rest.remove_prefix(1);
  grid.quant_min = take_integer(source, rest, ',');
  grid.quant_max = take_integer(source, rest, ']');
  uint32_t kinds = 0;
  while (!rest.empty()) {
    if (rest[0] != ' ') refuse(source, rest);
    rest.remove_prefix(1);
    const std::string_view word = rest.substr(0, rest.find(' '));
    const uint32_t kind = parse_word(source, word, grid);
    if ((kinds & kind) != 0) refuse(source, word);
    kinds |= kind;
    rest.remove_prefix(word.size());
  }
  const bool is_affine = grid.symmetric.has_value() && !*grid.symmetric;
  expect_of(!is_affine || grid.scale_rule == core::ScaleRule::grid, source, "scale_rule",
            "grid on an affine grid", "tvm");
  return grid;
}

QuantizingGrid check_quantizing_grid(const GridSource& source) {
  const ParsedGrid grid = parse_grid(source);
  expect_of(grid.quant_min >= -32768 && grid.quant_min <= 65535, source, "quant_min",
            "between -32768 and 65535", grid.quant_min);
  expect_of(grid.quant_max > grid.quant_min && grid.quant_max <= 65535, source, "quant_max",
            "more than quant_min and at most 65535", grid.quant_max);
  return {codes_of(grid), grid.rounding};
}

core::Codes check_learned_grid(const GridSource& source) {
  const ParsedGrid grid = parse_grid(source);
  expect_of(grid.quant_min >= -32768 && grid.quant_min <= 0, source, "quant_min",
            "between -32768 and 0", grid.quant_min);
  expect_of(grid.quant_max >= 1 && grid.quant_max <= 65535, source, "quant_max",
            "between 1 and 65535", grid.quant_max);
  expect_of(grid.rounding == core::Rounding::half_even, source, "rounding",
            "half_even for a learned method", kRoundings[static_cast<int32_t>(grid.rounding)]);
  return codes_of(grid);
}

SolvingGrid check_solving_grid(const GridSource& source) {
  const ParsedGrid grid = parse_grid(source);
  expect_of(grid.quant_min >= -32768 && grid.quant_min <= 0, source, "quant_min",
            "between -32768 and 0", grid.quant_min);
  expect_of(grid.quant_max >= 0 && grid.quant_max <= 65535, source, "quant_max",
            "between 0 and 65535", grid.quant_max);
  expect_of(grid.quant_min < grid.quant_max, source, "quant_max", "more than quant_min",
            grid.quant_max);
  expect_of(grid.quant_max - grid.quant_min <= 65535, source, "quant_max",
            "at most quant_min + 65535", grid.quant_max);
  expect_of(grid.symmetric.has_value(), source, "grid", "symmetric or affine", "neither");
  return {{codes_of(grid), *grid.symmetric, grid.scale_rule, grid.power_of_two}, grid.rounding};
}

}  // namespace torch_ext::bindings
