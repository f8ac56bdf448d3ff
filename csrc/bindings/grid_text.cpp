#include "bindings/grid_text.h"

#include <charconv>
#include <string>

#include "bindings/checks.h"

namespace torch_ext::bindings {
namespace {

// In the order of core::Rounding.
constexpr const char* kRoundings[] = {"half_even", "half_away", "floor_half_up"};
// The format that scales can have.
constexpr const core::NamedFormat& kScaleFormat = *core::format_named("float8_e4m3");
// In the order of core::ScaleRule.
constexpr const char* kScaleRules[] = {"grid", "tvm", "floor", "even"};

const char* name_of(core::ScaleRule rule) { return kScaleRules[static_cast<int32_t>(rule)]; }

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

std::string known_formats() {
  std::string known;
  for (const core::NamedFormat& entry : core::kFloatFormats) {
    if (!known.empty()) known += ", ";
    known += entry.name;
  }
  return known;
}

[[noreturn]] void refuse(const GridSource& source, std::string_view have) {
  TORCH_CHECK(
      false, source.op, ": expected grid to be [quant_min,quant_max] or a float format (",
      known_formats(),
      ") and words among symmetric, affine, scale_rule=, power_of_two, scale_dtype=, rounding=, "
      "each kind once, such as \"[-128,127] symmetric\", got ",
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
  for (int32_t i = 0; i < 4; ++i)
    if (name == kScaleRules[i]) return static_cast<core::ScaleRule>(i);
  expect_of(false, source, "scale_rule", "one of grid, tvm, floor, even", shown(name));
  return core::ScaleRule::grid;
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
  if (has_value && key == "scale_dtype") {
    expect_of(value == kScaleFormat.name, source, "scale_dtype", kScaleFormat.name, shown(value));
    grid.scale_format = kScaleFormat.format;
    return 16;
  }
  refuse(source, word);
}

core::Codes codes_of(const ParsedGrid& grid) {
  return {static_cast<int32_t>(grid.quant_min), static_cast<int32_t>(grid.quant_max), grid.format};
}

// Reads the integers or the float format that the text begins with.
void parse_values(const GridSource& source, std::string_view& rest, ParsedGrid& grid) {
  if (!rest.empty() && rest[0] == '[') {
    rest.remove_prefix(1);
    grid.quant_min = take_integer(source, rest, ',');
    grid.quant_max = take_integer(source, rest, ']');
    return;
  }
  const std::string_view name = rest.substr(0, rest.find(' '));
  const core::NamedFormat* const entry = core::format_named(name);
  if (entry == nullptr) refuse(source, rest);
  grid.format = entry->format;
  grid.quant_max = static_cast<int64_t>(entry->format.largest);
  grid.quant_min = -grid.quant_max;
  rest.remove_prefix(name.size());
}

// Raises for words that a float format does not take.
void check_float_words(const GridSource& source, const ParsedGrid& grid) {
  expect_of(grid.symmetric.value_or(true), source, "grid",
            "symmetric, as a float format has no zero point", "affine");
  expect_of(grid.scale_rule != core::ScaleRule::tvm, source, "scale_rule",
            "grid, floor or even on a float format", "tvm");
  expect_of(grid.rounding == core::Rounding::half_even, source, "rounding",
            "half_even on a float format", kRoundings[static_cast<int32_t>(grid.rounding)]);
}

// Raises for words that rounded scales do not take.
void check_scale_words(const GridSource& source, const ParsedGrid& grid) {
  if (grid.scale_format.bits == 0) return;
  expect_of(grid.symmetric.value_or(true), source, "grid", "symmetric with scale_dtype", "affine");
  expect_of(grid.scale_rule == core::ScaleRule::grid, source, "scale_rule", "grid with scale_dtype",
            name_of(grid.scale_rule));
  expect_of(!grid.power_of_two, source, "power_of_two", "left out with scale_dtype", "both");
}

}  // namespace

const char* name_of(const core::FloatFormat& format) {
  for (const core::NamedFormat& entry : core::kFloatFormats)
    if (entry.format == format) return entry.name;
  return "integers";
}

ParsedGrid parse_grid(const GridSource& source) {
  ParsedGrid grid{};
  std::string_view rest = source.text;
  parse_values(source, rest, grid);
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
  if (grid.is_float()) check_float_words(source, grid);
  const bool is_affine = grid.symmetric.has_value() && !*grid.symmetric;
  expect_of(!is_affine || grid.scale_rule == core::ScaleRule::grid, source, "scale_rule",
            "grid on an affine grid", name_of(grid.scale_rule));
  expect_of(grid.is_float() || grid.scale_rule != core::ScaleRule::even, source, "scale_rule",
            "grid, tvm or floor on integers, which have no mantissa", "even");
  if (grid.power_of_two) {
    expect_of(grid.scale_rule != core::ScaleRule::floor, source, "power_of_two",
              "left out with scale_rule=floor", "both");
    expect_of(grid.scale_rule != core::ScaleRule::even, source, "power_of_two",
              "left out with scale_rule=even", "both");
  }
  check_scale_words(source, grid);
  return grid;
}

QuantizingGrid check_quantizing_grid(const GridSource& source) {
  const ParsedGrid grid = parse_grid(source);
  if (grid.is_float()) return {codes_of(grid), grid.rounding};
  expect_of(grid.quant_min >= -32768 && grid.quant_min <= 65535, source, "quant_min",
            "between -32768 and 65535", grid.quant_min);
  expect_of(grid.quant_max > grid.quant_min && grid.quant_max <= 65535, source, "quant_max",
            "more than quant_min and at most 65535", grid.quant_max);
  return {codes_of(grid), grid.rounding};
}

core::Codes check_learned_grid(const GridSource& source) {
  const ParsedGrid grid = parse_grid(source);
  if (grid.is_float()) return codes_of(grid);
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
  if (grid.is_float())
    return {{codes_of(grid), true, grid.scale_rule, grid.power_of_two, grid.scale_format},
            grid.rounding};
  expect_of(grid.quant_min >= -32768 && grid.quant_min <= 0, source, "quant_min",
            "between -32768 and 0", grid.quant_min);
  expect_of(grid.quant_max >= 0 && grid.quant_max <= 65535, source, "quant_max",
            "between 0 and 65535", grid.quant_max);
  expect_of(grid.quant_min < grid.quant_max, source, "quant_max", "more than quant_min",
            grid.quant_max);
  expect_of(grid.quant_max - grid.quant_min <= 65535, source, "quant_max",
            "at most quant_min + 65535", grid.quant_max);
  expect_of(grid.symmetric.has_value(), source, "grid", "symmetric or affine", "neither");
  return {{codes_of(grid), *grid.symmetric, grid.scale_rule, grid.power_of_two, grid.scale_format},
          grid.rounding};
}

}  // namespace torch_ext::bindings
