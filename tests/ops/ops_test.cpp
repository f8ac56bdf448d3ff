#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <utility>

#include "dispatch.h"

// The op library linked into a C++ program: no Python anywhere.
namespace {

using namespace dispatch;

// float32, by rows.
at::Tensor floats(const std::vector<float>& values, at::IntArrayRef shape = {}) {
  const at::Tensor flat = at::tensor(values, at::kFloat);
  return shape.empty() ? flat : flat.reshape(shape);
}

testing::AssertionResult same(const at::Tensor& have, const at::Tensor& want) {
  if (have.scalar_type() == want.scalar_type() && at::equal(have, want))
    return testing::AssertionSuccess();
  return testing::AssertionFailure() << "have\n" << have << "\nwant\n" << want;
}

TEST(Ops, ObserveCounts) {
  const State state = observed(floats({1, -2, 0, INFINITY, NAN, 3, 1e-20f, 1}));
  EXPECT_TRUE(same(state.extrema, floats({-2, 3}, {1, 2})));
  EXPECT_TRUE(same(state.tally, at::tensor({6, 1, 1, 1, 1}, at::kLong).view({1, 5})));
  // -2 and 3 are in octave 1, the ones in octave 0; 3 = 2 (1 + 512/1024).
  EXPECT_EQ(state.counts[0][0][1][0].item<int64_t>(), 1);
  EXPECT_EQ(state.counts[0][1][1][512].item<int64_t>(), 1);
  EXPECT_EQ(state.counts[0][1][0][0].item<int64_t>(), 2);
  EXPECT_EQ(state.counts.sum().item<int64_t>(), 4);
}

TEST(Ops, ObserveReadsAnyLayoutAndType) {
  const at::Tensor x = at::randn({6, 5, 40, 30});
  const at::Tensor last = x.contiguous(at::MemoryFormat::ChannelsLast);
  EXPECT_TRUE(equal(observed(last), observed(x)));
  EXPECT_TRUE(equal(observed(last, 1), observed(x, 1)));
  EXPECT_TRUE(equal(observed(x.transpose(0, 2), 3), observed(x, 3)));
  EXPECT_TRUE(equal(observed(x.to(at::kDouble), 1), observed(x, 1)));
  for (const at::ScalarType type : {at::kHalf, at::kBFloat16})
    EXPECT_TRUE(equal(observed(x.to(type), 0), observed(x.to(type).to(at::kFloat), 0)));
  for (int64_t c = 0; c < 5; ++c)
    EXPECT_TRUE(
        same(observed(x, 1).extrema[c], at::stack({x.select(1, c).min(), x.select(1, c).max()})));
}

TEST(Ops, MergeIsObservingBoth) {
  const at::Tensor a = at::randn({100, 7}), b = 300 * at::randn({50, 7});
  const State whole = observed(at::cat({a, b}), 1), other = observed(b, 1);
  State merged = observed(a, 1);
  call("merge_",
       {merged.extrema, merged.tally, merged.counts, other.extrema, other.tally, other.counts});
  EXPECT_TRUE(equal(merged, whole));
}

TEST(Ops, SolveAppliesARule) {
  const State state = observed(at::arange(1, 101, at::kFloat));
  EXPECT_TRUE(
      same(solve("percentile", state, "[-128,127] symmetric", {90}), floats({1, 90}, {1, 2})));
  EXPECT_TRUE(same(solve("percentile", state, "[0,255] affine", {90}), floats({6, 95}, {1, 2})));
  EXPECT_TRUE(same(solve("min_max", state, "[-128,127] symmetric", {}), floats({1, 100}, {1, 2})));
}

TEST(Ops, QParamsFollowFromTheRange) {
  const at::Tensor range = floats({-1, 2, 0, 0}, {2, 2});
  const auto symmetric = call("qparams", {range, grid(-128, 127, true)});
  EXPECT_TRUE(same(symmetric.at(0).toTensor(), floats({4.0f / 255, 1})));
  EXPECT_TRUE(same(symmetric.at(1).toTensor(), at::zeros({2}, at::kInt)));
  const auto affine = call("qparams", {range, grid(0, 255, false)});
  EXPECT_TRUE(same(affine.at(0).toTensor(), floats({3.0f / 255, 1})));
  EXPECT_TRUE(same(affine.at(1).toTensor(), at::tensor({85, 0}, at::kInt)));
}

// One call for several quantizers, of different rules, grids and numbers of channels.
TEST(Ops, SolveManyIsSolveAndQParamsOfEach) {
  c10::List<std::string> names, grids;
  c10::List<at::Tensor> extrema, tally, counts;
  std::vector<double> options;
  std::vector<State> states;
  const std::vector<Rule> all = rules();
  for (size_t i = 0; i < all.size(); ++i) {
    states.push_back(i % 2 == 0 ? observed(at::randn({2000})) : observed(at::rand({50, 9}), 1));
    names.push_back(all[i].name);
    extrema.push_back(states[i].extrema);
    tally.push_back(states[i].tally);
    counts.push_back(states[i].counts);
    grids.push_back(grid(i % 3 == 0 ? 0 : -8, i % 3 == 0 ? 255 : 7, i % 3 == 1, i % 4 == 3));
    options.insert(options.end(), all[i].options.begin(), all[i].options.end());
  }
  const auto many = call("solve_many", {names, extrema, tally, counts, grids, options});
  for (size_t i = 0; i < all.size(); ++i) {
    SCOPED_TRACE(all[i].name);
    const at::Tensor range = solve(all[i].name, states[i], grids.get(i), all[i].options);
    EXPECT_TRUE(same(many.at(0).toTensorVector()[i], range));
    if (all[i].name == "fixed_scale") continue;  // its qparams do not follow from the range
    const auto q = call("qparams", {range, std::string(grids.get(i))});
    EXPECT_TRUE(same(many.at(1).toTensorVector()[i], q.at(0).toTensor()));
    EXPECT_TRUE(same(many.at(2).toTensorVector()[i], q.at(1).toTensor()));
  }
}

struct Followed {
  at::Tensor range = at::zeros({1, 2}), scale = at::ones({1}),
             zero_point = at::zeros({1}, at::kInt), solved = at::zeros({1}, at::kByte);

  void by(const at::Tensor& x, double averaging_constant) {
    call("follow_", {x, range, scale, zero_point, solved, averaging_constant,
                     std::string("min_max"), grid(0, 255, false)});
  }
};

TEST(Ops, FollowMovesTheRange) {
  Followed f;
  f.by(floats({NAN, INFINITY}), 0.25);  // no finite value: nothing changes
  EXPECT_EQ(f.solved.item<int>(), 0);
  EXPECT_TRUE(same(f.range, floats({0, 0}, {1, 2})));
  f.by(floats({-1, 2}), 0.25);  // the first batch sets it
  EXPECT_EQ(f.solved.item<int>(), 1);
  EXPECT_TRUE(same(f.range, floats({-1, 2}, {1, 2})));
  EXPECT_TRUE(same(f.scale, floats({3.0f / 255})));
  EXPECT_TRUE(same(f.zero_point, at::tensor({85}, at::kInt)));
  f.by(floats({-5, 4}), 0.25);
  EXPECT_TRUE(same(f.range, floats({-2, 2.5f}, {1, 2})));
  EXPECT_TRUE(same(f.scale, floats({4.5f / 255})));
  f.by(floats({-50, 40}), 0);  // frozen
  EXPECT_TRUE(same(f.range, floats({-2, 2.5f}, {1, 2})));
  f.by(floats({-50, 40}), 1);
  EXPECT_TRUE(same(f.range, floats({-50, 40}, {1, 2})));
}

// Scale 1/2 on [-4, 3]: the grid represents -2 .. 1.5. Halves round to even.
TEST(Ops, FakeQuantForwardAndBackward) {
  at::Tensor x = floats({-9, -2.2f, -2, -0.25f, 0.25f, 0.3f, 0.75f, 1.5f, 1.76f, 9, NAN});
  x.requires_grad_();
  const at::Tensor out =
      tensor("fake_quant", {x, floats({0.5f}), at::zeros({1}, at::kInt), std::string("[-4,3]")});
  const at::Tensor want = floats({-2, -2, -2, 0, 0, 0.5f, 1, 1.5f, 1.5f, 1.5f});
  EXPECT_TRUE(same(out.detach().slice(0, 0, 10), want));
  EXPECT_TRUE(std::isnan(out[10].item<float>()));
  const at::Tensor grad = at::arange(1, 12, at::kFloat);
  out.backward(grad);
  // -2.2 rounds to -4, inside; 1.76 to 4, outside.
  EXPECT_TRUE(same(x.grad(), floats({0, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0})));
}

TEST(Ops, FakeQuantPerChannelDifferentiatesInAChain) {
  at::Tensor weight = at::randn({4, 3, 2});
  weight.requires_grad_();
  const at::Tensor scale = floats({0.01f, 0.02f, 1}), zero_point = at::tensor({0, 3, -2}, at::kInt);
  const at::Tensor out =
      tensor("fake_quant", {2 * weight, scale, zero_point, std::string("[-8,7]"), 1});
  (out * out).sum().backward();
  const at::Tensor x = 2 * weight.detach(), s = scale.view({3, 1}), z = zero_point.view({3, 1});
  const at::Tensor q = (x / s).round() + z;
  const at::Tensor y = (q.clamp(-8, 7) - z) * s;
  EXPECT_TRUE(same(out.detach(), y));
  const at::Tensor inside = q.ge(-8).logical_and(q.le(7));
  EXPECT_TRUE(same(weight.grad(), 4 * y * inside));
  EXPECT_GT(inside.sum().item<int64_t>(), 0);
  EXPECT_LT(inside.sum().item<int64_t>(), inside.numel());
}

// Levels 2. Row 0: nothing is lost at 2 bins already. Row 1: P = 1, 1, 5 and Q the same at 3 bins.
TEST(Ops, KlThresholdSearchesEachRow) {
  const at::Tensor counts = at::tensor({1, 1, 0, 0, 1, 1, 5, 0}, at::kLong).view({2, 4});
  const auto result = call("kl_threshold", {counts, at::tensor({0.5, 2.0}, at::kDouble), 2});
  EXPECT_TRUE(same(result.at(0).toTensor(), at::tensor({2, 3}, at::kLong)));
  EXPECT_TRUE(same(result.at(1).toTensor(), at::tensor({1.25, 7.0}, at::kDouble)));
}

TEST(Ops, ARuleOnATensorIsObserveAndSolve) {
  const at::Tensor x = at::randn({6, 700}).mul_(at::arange(1, 7).view({6, 1}));
  const std::vector<Rule> all = rules();
  EXPECT_GE(all.size(), 9u);
  for (const Rule& rule : all) {
    SCOPED_TRACE(rule.name);
    EXPECT_TRUE(same(tensor(rule.name, {x}),
                     solve(rule.name, observed(x), grid(-128, 127, true), rule.options)));
    EXPECT_TRUE(same(tensor(rule.name, {x, grid(0, 15, false), 0}),
                     solve(rule.name, observed(x, 0), grid(0, 15, false), rule.options)));
  }
}

TEST(Ops, ARuleKnowsItsShapeWithoutData) {
  const at::Tensor x = at::empty({6, 70}, at::TensorOptions().device(at::kMeta));
  for (const Rule& rule : rules()) {
    EXPECT_EQ(tensor(rule.name, {x}).sizes(), at::IntArrayRef({1, 2})) << rule.name;
    EXPECT_EQ(tensor(rule.name, {x, grid(-8, 7, true), 1}).sizes(), at::IntArrayRef({70, 2}))
        << rule.name;
  }
}

TEST(Ops, BrokenClausesAreNamed) {
  const at::Tensor x = at::ones({3}), scale = at::ones({1}), zero_point = at::zeros({1}, at::kInt);
  const State s = observed(x);
  const std::string int8 = grid(-128, 127, true);
  const auto expect_error = [](const std::string& have, const std::string& want) {
    EXPECT_EQ(have.substr(0, want.size()), want);
  };
  expect_error(error("fake_quant", {x, -scale, zero_point, int8}),
               "fake_quant: expected scale to be positive and finite, got -1 in channel 0");
  expect_error(error("fake_quant", {x.to(at::kLong), scale, zero_point, int8}),
               "fake_quant: expected x to be float32, float64, float16 or bfloat16, got Long");
  expect_error(error("fake_quant", {x, scale, zero_point, int8, 1}),
               "fake_quant: expected ch_axis to be -1 or an axis of the 1-dimensional x, got 1");
  expect_error(error("observe_", {x, s.extrema.to(at::kDouble), s.tally, s.counts}),
               "observe_: expected extrema to be Float, got Double");
  expect_error(
      error("merge_", {s.extrema, s.tally, s.counts, s.extrema, s.tally.slice(1, 0, 4), s.counts}),
      "merge_: expected other_tally to be ");
  expect_error(error("qparams", {floats({2, 1}, {1, 2}), int8}),
               "qparams: expected range to be finite and in order, got 2 to 1 in channel 0");
  expect_error(error("kl", {x, grid(-32768, 32767, true)}),
               "kl: expected the grid to be of at most 8 bits for kl (beyond that there is nothing "
               "to search), got [-32768, 32767]");
  expect_error(error("percentile", {x, int8, -1, 101.0}),
               "percentile: expected percentile to be between 1e-07 and 100, got 101");
}

TEST(Ops, UnknownRulesListTheKnown) {
  const State s = observed(at::ones({3}));
  const std::string text = error(
      "solve", {std::string("histogram"), s.extrema, s.tally, s.counts, grid(-128, 127, true)});
  EXPECT_NE(text.find("unknown observer \"histogram\"; known: "), std::string::npos) << text;
  for (const Rule& rule : rules()) EXPECT_NE(text.find(rule.name), std::string::npos) << rule.name;
}

// Sums of such counts would overflow, with a plausible result.
TEST(Ops, CountsThatCannotBeSummedAreRefused) {
  constexpr int64_t largest = INT64_MAX;
  for (const Rule& rule : rules()) {
    for (const int64_t channels : {1, 50}) {
      SCOPED_TRACE(rule.name + ", " + std::to_string(channels) + " channels");
      const auto solved = [&](const State& s) {
        return error("solve", {rule.name, s.extrema, s.tally, s.counts, grid(-128, 127, true),
                               rule.options});
      };
      const State s = observed(at::randn({100, channels}), channels == 1 ? -1 : 1);
      if (solved(State{s.extrema, s.tally, at::zeros_like(s.counts)}).empty()) continue;
      // The last bins that hold values.
      int64_t* const counts = s.counts[channels - 1].data_ptr<int64_t>();
      int64_t* const tally = s.tally[channels - 1].data_ptr<int64_t>();
      int64_t used[3] = {-1, -1, -1};
      for (int64_t i = 0; i < s.counts[0].numel(); ++i)
        if (counts[i] != 0) used[2] = std::exchange(used[1], std::exchange(used[0], i));
      const int64_t before = counts[used[0]], finite = tally[0];
      const auto give = [&](int64_t count, int64_t values) {
        counts[used[0]] = count;
        tally[0] = values;
        return solved(s);
      };
      EXPECT_EQ(give(before + (largest - finite), largest), "");
      for (const int64_t count : {-before, largest, -largest}) {
        const std::string text = give(count, finite);
        EXPECT_EQ(text.rfind("solve: expected counts to be, with zeros and tiny, the ", 0), 0u)
            << text;
      }
      // Three that wrap to the right sum, modulo 2^64.
      const int64_t others[2] = {counts[used[1]], counts[used[2]]};
      counts[used[1]] = largest;
      counts[used[2]] = before + others[0] + others[1] + 2;
      EXPECT_NE(give(largest, finite), "");
      counts[used[1]] = others[0], counts[used[2]] = others[1];
      // Two that cancel.
      counts[used[1]] -= largest;
      EXPECT_NE(give(before + largest, finite), "");
      counts[used[1]] += largest;
      counts[used[0]] = before;
      for (const int column : {1, 2}) {
        const int64_t was = tally[column];
        tally[0] = finite;
        for (const int64_t wrong : {int64_t{-1}, largest, INT64_MIN}) {
          tally[column] = wrong;
          EXPECT_NE(solved(s), "") << column << ", " << wrong;
        }
        tally[column] = was;
      }
      EXPECT_EQ(solved(s), "");
    }
  }
}

// What merging statistics with more than 2^63 - 1 values gives.
TEST(Ops, ATallyThatHasWrappedIsRefused) {
  for (const Rule& rule : rules()) {
    if (rule.name == "fixed_scale") continue;
    const State s = observed(at::randn({100}));
    s.tally[0][0] = INT64_MAX;
    call("merge_", {s.extrema, s.tally, s.counts, s.extrema, s.tally, s.counts});
    const std::string text = error(
        "solve", {rule.name, s.extrema, s.tally, s.counts, grid(-128, 127, true), rule.options});
    EXPECT_EQ(text,
              "solve: expected tally to be of at most 2^63 - 1 finite values, got -2 in channel 0");
  }
}

// A statistic may come from a file or user code. fixed_scale reads none.
TEST(Ops, AStatisticThatContradictsItselfIsRefused) {
  for (const Rule& rule : rules()) {
    if (rule.name == "fixed_scale") continue;
    for (const int64_t channels : {1, 50}) {
      SCOPED_TRACE(rule.name + ", " + std::to_string(channels) + " channels");
      State s = observed(at::randn({100, channels}), channels == 1 ? -1 : 1);
      s.extrema[channels - 1][0] = 1e30f;
      const std::string text = error(
          "solve", {rule.name, s.extrema, s.tally, s.counts, grid(-128, 127, true), rule.options});
      EXPECT_EQ(text.rfind("solve: expected extrema to be finite and in order, got ", 0), 0u)
          << text;
    }
  }
}

}  // namespace
