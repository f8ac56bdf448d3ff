#pragma once

#include "core/affine.h"
#include "core/host_device.h"

namespace torch_ext::fake_quant {

// A mapped element, and whether the gradient passes through it.
template <typename T>
struct Masked {
  T value;
  bool in_mask;
};

// Quantize-dequantize with the straight-through gradient. T is the computing type.
struct FakeQuant {
  static constexpr const char* name = "fake_quant";

  template <typename T>
  TE_HD static Masked<T> forward(T x, const core::Affine<T>& affine, core::Rounding rounding,
                                 core::Mask mask) {
    return {core::dequantize(core::quantize(x, affine, rounding), affine),
            core::is_in_mask(x, affine, rounding, mask)};
  }

  // A select, not a product: a NaN or infinite gradient outside the mask gives 0 as well.
  template <typename T>
  TE_HD static T backward(T grad, bool in_mask) {
    return in_mask ? grad : T{};
  }
};

}  // namespace torch_ext::fake_quant
