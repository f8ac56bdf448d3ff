#pragma once

#include "core/affine.h"
#include "core/host_device.h"

namespace torch_ext::fake_quant {

// Quantize-dequantize with the straight-through gradient. T is the computing type.
struct FakeQuant {
  static constexpr const char* name = "fake_quant";

  template <typename T>
  TE_HD static T forward(T x, const core::Affine<T>& affine, core::Rounding rounding) {
    return core::dequantize(core::quantize(x, affine, rounding), affine);
  }

  // Whether the gradient passes: all that backward needs of x. Apart from forward, because loops
  // over a struct of both are not always vectorised; the compiler computes what they share once.
  template <typename T>
  TE_HD static bool passes(T x, const core::Affine<T>& affine, core::Rounding rounding,
                           core::Mask mask) {
    return core::is_in_mask(x, affine, rounding, mask);
  }

  // A select, not a product: a NaN or infinite gradient outside the mask gives 0 as well.
  template <typename T>
  TE_HD static T backward(T grad, bool passes) {
    return passes ? grad : T{};
  }
};

}  // namespace torch_ext::fake_quant
