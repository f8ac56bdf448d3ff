#pragma once

#include <cstdint>

#include "core/contract.h"
#include "fake_quant/fake_quant.h"
#include "observers/aciq.h"
#include "observers/clip.h"
#include "observers/clip_std.h"
#include "observers/fixed_scale.h"
#include "observers/kl.h"
#include "observers/min_max.h"
#include "observers/mix.h"
#include "observers/mse.h"
#include "observers/percentile.h"

// What exists. An observer or a fake-quant is added by its header and its line here; ops, Python,
// saving, documentation tests and law tests find it through these lists. The order is the order
// users see.
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
    observers::Aciq>;

using FakeQuants = List<fake_quant::FakeQuant>;

}  // namespace torch_ext
