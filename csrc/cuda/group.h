#pragma once

#include <cstdint>

#include "core/job.h"
#include "cuda/values.h"
#include "fake_quant/fake_quant.h"
#include "gpu.h"

// Eight elements, those of one byte of the mask, are processed by one thread.
namespace torch_ext::cuda {

constexpr int kGroup = 8;

// Eight elements in registers, loaded and stored in accesses of 16 bytes.
template <class T>
struct Group {
  static constexpr int kPackets = kGroup / kPerPacket<T>;
  gpu::Packet packets[kPackets];

  TE_GPU void load(const T* from) {
    for (int i = 0; i < kPackets; ++i) packets[i] = gpu::load(from + i * kPerPacket<T>);
  }
  TE_GPU void store(T* to) const {
    for (int i = 0; i < kPackets; ++i) gpu::store(to + i * kPerPacket<T>, packets[i]);
  }
  TE_GPU T get(int i) const { return element<T>(packets[i / kPerPacket<T>], i % kPerPacket<T>); }
  TE_GPU void set(int i, T value) {
    set_element(packets[i / kPerPacket<T>], i % kPerPacket<T>, value);
  }
};

// Fake-quantizes element i of a group; sets its bit if the gradient passes. kDefault: on integers,
// with the default rounding and mask, as compile-time constants.
template <class T, bool kDefault>
TE_GPU T map_element(const core::FakeQuantJob& job, T element,
                     core::UnitGrid<core::compute_t<T>> grid, int i, uint32_t& bits) {
  using fake_quant::FakeQuant;
  if (kDefault) {
    grid.rounding = core::Rounding::half_even;
    grid.step.lift = 0;
  }
  const core::Mask mask = kDefault ? core::Mask::rounded : job.mask_kind;
  const core::compute_t<T> x = core::widen(element);
  if (job.mask != nullptr && FakeQuant::passes(x, grid, mask)) bits |= 1u << i;
  return core::narrow<T>(FakeQuant::forward(x, grid));
}
inline bool is_default(const core::FakeQuantJob& job) {
  return !job.codes.is_float() && job.rounding == core::Rounding::half_even &&
         (job.mask == nullptr || job.mask_kind == core::Mask::rounded);
}

// Calls use<T>() for the element type.
template <class Use>
void with_type(core::DType dtype, const Use& use) {
  switch (dtype) {
    case core::DType::f32:
      return use.template operator()<float>();
    case core::DType::f64:
      return use.template operator()<double>();
    case core::DType::f16:
      return use.template operator()<core::half>();
    case core::DType::bf16:
      return use.template operator()<core::bfloat16>();
  }
}

}  // namespace torch_ext::cuda
