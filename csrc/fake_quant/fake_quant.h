#pragma once

#include "core/host_device.h"
#include "core/unit_grid.h"

namespace torch_ext::fake_quant {

// Quantize-dequantize with the straight-through gradient. T is the computing type.
struct FakeQuant {
  static constexpr const char* name = "fake_quant";

  template <typename T>
  TE_HD static T forward(T x, const core::UnitGrid<T>& grid) {
    return core::dequantize(core::quantize(x, grid), grid);
  }

  // Whether the gradient passes, which is all that backward needs of x. A function of its own,
  // because loops over a struct of both results are not always vectorised; the compiler still
  // computes the common terms once.
  template <typename T>
  TE_HD static bool passes(T x, const core::UnitGrid<T>& grid, core::Mask mask) {
    return core::is_in_mask(x, grid, mask);
  }

  // Selects instead of multiplying: outside the mask a NaN or infinite gradient gives 0 too.
  template <typename T>
  TE_HD static T backward(T grad, bool passes) {
    return passes ? grad : T{};
  }
};

}  // namespace torch_ext::fake_quant
