#pragma once

#include <cstdint>

namespace torch_ext::core {

// Element types of the data. The values index the tables of CPU kernels.
enum class DType : int32_t { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

constexpr int kDTypeCount = 4;

}  // namespace torch_ext::core
