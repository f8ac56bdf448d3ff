#pragma once

// What a quantizer does in each state. The only such table: Python reads it through the module _C.
namespace torch_ext::core {

struct StateRow {
  const char* name;
  bool accumulate;     // add the input to the observer's statistic
  bool follow;         // move the range towards the range of this batch
  bool quantize;       // output fake-quantized values; otherwise the input itself
  bool differentiate;  // the method's learned parameters receive gradients
};

constexpr StateRow kStates[] = {
    {"calibration", true, false, false, false},
    {"qat", false, true, true, true},
    {"validation", false, false, true, false},
    {"float", false, false, false, false},
};

}  // namespace torch_ext::core
