#pragma once

#include <cstdint>
#include <type_traits>

#include "core/contract.h"
#include "core/job.h"
#include "fake_quant/fake_quant.h"
#include "fake_quant/lsq.h"
#include "fake_quant/pact.h"
#include "observers/aciq.h"
#include "observers/clip.h"
#include "observers/clip_std.h"
#include "observers/fixed_scale.h"
#include "observers/kl.h"
#include "observers/mean_abs.h"
#include "observers/min_max.h"
#include "observers/mix.h"
#include "observers/mse.h"
#include "observers/percentile.h"

// The lists of all observers and fake-quants. A new one is added with its header and a line here;
// ops, Python, files, documentation tests and law tests find it through these lists. Users see them
// in this order.
namespace torch_ext {

template <class... T>
struct List {
  static constexpr int32_t size = sizeof...(T);

  // visit.template operator()<T>(index) for every entry.
  template <class Visit>
  TE_HD static constexpr void for_each(const Visit& visit) {
    int32_t index = 0;
    (visit.template operator()<T>(index++), ...);
  }
  // The same for a visitor that only runs on the host.
  template <class Visit>
  static void for_each_on_host(const Visit& visit) {
    int32_t index = 0;
    (visit.template operator()<T>(index++), ...);
  }
};

using Observers = List<     //
    observers::MinMax,      //
    observers::FixedScale,  //
    observers::Clip,        //
    observers::Percentile,  //
    observers::ClipStd,     //
    observers::Kl,          //
    observers::Mse,         //
    observers::Mix,         //
    observers::Aciq,        //
    observers::MeanAbs>;

using FakeQuants = List<    //
    fake_quant::FakeQuant,  //
    fake_quant::Lsq,        //
    fake_quant::Pact>;

template <class... Lists>
struct Joined;
template <class Only>
struct Joined<Only> {
  using type = Only;
};
template <class... A, class... B, class... Rest>
struct Joined<List<A...>, List<B...>, Rest...> {
  using type = Joined<List<A..., B...>, Rest...>::type;
};
template <class>
struct Learned;
template <class... F>
struct Learned<List<F...>> {
  using type = Joined<std::conditional_t<core::LearnedFakeQuant<F>, List<F>, List<>>...>::type;
};

// The fake-quants with a learned parameter.
using LearnedFakeQuants = Learned<FakeQuants>::type;

// The grid of a channel of a job. C is the computing type.
template <typename C>
TE_HD core::UnitGrid<C> unit_grid_of(const core::FakeQuantJob& job, int64_t channel) {
  const float parameter = job.scale[channel];
  const int32_t zero_point = core::zero_point_of(job, channel);
  core::UnitGrid<C> grid = core::make_unit_grid<C>(parameter, zero_point, job.codes, job.rounding);
  if (job.learned < 0) return grid;
  LearnedFakeQuants::for_each([&]<class F>(int32_t index) {
    if (index == job.learned) grid = F::template unit_grid<C>(parameter, zero_point, job.codes);
  });
  return grid;
}

// `sum` times what the gradient of a channel's parameter is multiplied by: the gradient scale and
// the sign of the parameter.
template <class F, class Job>
TE_HD double scaled_gradient(const Job& job, int64_t channel, double sum) {
  const double scale =
      job.elements > 0 ? F::gradient_scale(job.elements, job.codes.highest()) : 1.0;
  return F::sign(job.parameter[channel]) * (sum * scale);
}

// Stores the gradients of a channel's parameters, given the sums of its elements' terms.
TE_HD void store_gradients(const core::LearnedJob& job, int64_t channel, double parameter,
                           double clipped) {
  LearnedFakeQuants::for_each([&]<class F>(int32_t index) {
    if (index != job.method) return;
    const float own = job.parameter[channel];
    job.d_parameter[channel] =
        static_cast<float>(scaled_gradient<F>(job, channel, parameter / F::unit(own)));
    if (job.d_zero_point != nullptr)
      job.d_zero_point[channel] =
          static_cast<float>(0.0 - static_cast<double>(F::effective(own)) * clipped);
    if (job.d_mixed != nullptr)
      job.d_mixed[channel] = static_cast<float>(scaled_gradient<F>(job, channel, 0.0 - clipped));
  });
}

// The derivative of method F on the elements of one channel. C is the computing type.
template <class F, typename C>
struct ChannelTangent {
  core::UnitGrid<C> grid;
  C effective;
  double parameter, clipped;  // the tangents of the sums that store_gradients() takes

  TE_HD ChannelTangent(const core::TangentJob& job, int64_t c)
      : grid(F::template unit_grid<C>(job.parameter[c], core::zero_point_of(job, c), job.codes)),
        effective(static_cast<C>(F::effective(job.parameter[c]))) {
    const auto at = [c](const float* t) { return t == nullptr ? 0.0 : static_cast<double>(t[c]); };
    parameter = scaled_gradient<F>(job, c, at(job.parameter_tangent)) / F::unit(job.parameter[c]);
    clipped = -(at(job.zero_point_tangent) * static_cast<double>(effective) +
                scaled_gradient<F>(job, c, at(job.mixed_tangent)));
  }
  TE_HD ChannelTangent(const core::UnitGrid<C>& grid, C effective, double parameter, double clipped)
      : grid(grid), effective(effective), parameter(parameter), clipped(clipped) {}

  // The tangent of the output at x, given that of x.
  TE_HD C of(C x, C x_tangent) const {
    const core::Terms<C> unit = F::backward(x, C{1}, grid, effective);
    const C own = unit.dx != C{0} ? x_tangent : C{};
    return static_cast<C>(static_cast<double>(own) + parameter * unit.parameter +
                          clipped * unit.clipped);
  }
};

}  // namespace torch_ext
