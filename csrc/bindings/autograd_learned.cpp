#include <ATen/ops/add.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/reshape.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>

#include "bindings/arguments.h"
#include "bindings/autograd.h"

// Gradients of the learned fake-quants, of any order. The map that is differentiated is the
// straight-through one: its output is x plus a constant times the scale inside the grid, and
// (end - zero_point) * |scale| outside (lsq), or +-|alpha| (pact). So its derivative J does not
// depend on x, and depends on the parameter and on the zero point only where both occur in one
// product. J is the op _learned_fake_quant_tangent, its transpose _learned_fake_quant_backward;
// both are linear in their gradients or tangents, so each is the derivative of the other.
namespace torch_ext::bindings {
namespace {

using Optional = std::optional<at::Tensor>;

at::Tensor defined_or_none(const Optional& t) { return t.value_or(at::Tensor()); }
Optional optional_of(const at::Tensor& t) { return t.defined() ? Optional(t) : std::nullopt; }

// A zero point that is given as a float is learned; integers have no gradient.
bool is_learned(const at::Tensor& zero_point) {
  return zero_point.defined() && zero_point.is_floating_point();
}

// Gradients with regard to, or tangents of, x, the parameter and the zero point. `mixed` belongs to
// the derivative of J: the gradient of the zero point divided by |scale|, that is minus the sum of
// the upstream gradient outside the grid, with the factor of the parameter's gradient. Undefined
// ones are zero.
struct Derivative {
  at::Tensor x, parameter, zero_point, mixed;

  bool any() const {
    return x.defined() || parameter.defined() || zero_point.defined() || mixed.defined();
  }
};

// What is not wanted has no elements in the result.
Derivative transposed(const at::Tensor& grad, const LearnedArguments& a, bool of_x = true,
                      bool of_parameters = true) {
  auto [x, parameter, zero_point, mixed] =
      call_op<LearnedBackwardOp>(grad, a.x, a.method, a.parameter, a.zero_point, a.grid, a.ch_axis,
                                 a.use_grad_scaling, a.batch_axis, of_x, of_parameters);
  return {x, parameter, zero_point, mixed};
}
at::Tensor mixed_of(const at::Tensor& grad, const LearnedArguments& a) {
  return transposed(grad, a, /*of_x=*/false).mixed;
}

at::Tensor applied(const Derivative& d, const LearnedArguments& a) {
  return call_learned<LearnedTangentOp>(a, optional_of(d.x), optional_of(d.parameter),
                                        optional_of(d.zero_point), optional_of(d.mixed));
}

at::Tensor sum_of(const at::Tensor& a, const at::Tensor& b) {
  return !a.defined() ? b : !b.defined() ? a : at::add(a, b);
}
at::Tensor product_of(const at::Tensor& a, const at::Tensor& b) {
  return a.defined() && b.defined() ? at::mul(a, b) : at::Tensor();
}

at::Tensor product_or_zeros(const at::Tensor& a, const at::Tensor& b) {
  return a.defined() ? at::mul(a, b) : at::zeros_like(b);
}

// The parameter and the zero point where J depends on them, else undefined. What a gradient does
// not depend on is no input of its node: compiled autograd cannot add an undefined gradient.
variable_list factors_of(const at::Tensor& parameter, const at::Tensor& zero_point) {
  return is_learned(zero_point) ? variable_list{parameter, zero_point} : variable_list(2);
}

// The arguments without tangents.
class Primal {
 public:
  explicit Primal(const LearnedArguments& a)
      : x_(primal_of(a.x)),
        parameter_(primal_of(a.parameter)),
        zero_point_(optional_of(primal_of(defined_or_none(a.zero_point)))),
        arguments{x_,     a.method,  parameter_,         zero_point_,
                  a.grid, a.ch_axis, a.use_grad_scaling, a.batch_axis} {}

 private:
  const at::Tensor x_, parameter_;
  const Optional zero_point_;

 public:
  const LearnedArguments arguments;
};

// The arguments of a forward, kept in a context from `first` of its saved tensors on.
class Kept {
 public:
  static void keep(AutogradContext& context, variable_list tensors, const LearnedArguments& a) {
    tensors.insert(tensors.end(), {a.x, a.parameter, defined_or_none(a.zero_point)});
    context.save_for_backward(std::move(tensors));
    context.saved_data["method"] = std::string(a.method);
    context.saved_data["grid"] = std::string(a.grid);
    context.saved_data["ch_axis"] = a.ch_axis;
    context.saved_data["use_grad_scaling"] = a.use_grad_scaling;
    context.saved_data["batch_axis"] = a.batch_axis;
  }
  Kept(AutogradContext& context, size_t first)
      : saved_(context.get_saved_variables()),
        zero_point_(optional_of(saved_[first + 2])),
        arguments{saved_[first],
                  context.saved_data["method"].toStringView(),
                  saved_[first + 1],
                  zero_point_,
                  context.saved_data["grid"].toStringView(),
                  context.saved_data["ch_axis"].toInt(),
                  context.saved_data["use_grad_scaling"].toBool(),
                  context.saved_data["batch_axis"].toInt()} {}
  const at::Tensor& operator[](size_t i) const { return saved_[i]; }

 private:
  const variable_list saved_;
  const Optional zero_point_;

 public:
  const LearnedArguments arguments;
};

// Whether the engine asks for the gradient of each of `inputs`, of which some may be undefined.
std::vector<bool> needs_of(AutogradContext& context, const variable_list& inputs) {
  std::vector<bool> needs;
  size_t edge = 0;
  for (const at::Tensor& input : inputs)
    needs.push_back(input.defined() && context.needs_input_grad(edge++));
  return needs;
}

// y = f(x, parameter, zero_point).
struct OfForward {
  static constexpr bool is_traceable = true;

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list gradients(3);
    if (!grads[0].defined()) return gradients;
    const Kept kept(*context, 0);
    const std::vector<bool> needs = needs_of(*context, {kept[0], kept[1], kept[2]});
    const bool of_zero_point = needs[2] && is_learned(kept[2]);
    if (!needs[0] && !needs[1] && !of_zero_point) return gradients;
    const Derivative d = transposed(grads[0], kept.arguments, needs[0], needs[1] || of_zero_point);
    if (needs[0]) gradients[0] = d.x;
    if (needs[1]) gradients[1] = d.parameter;
    if (of_zero_point) gradients[2] = d.zero_point;
    return gradients;
  }
};

at::Tensor learned_fake_quant(const LearnedArguments& a) {
  const at::Tensor given = defined_or_none(a.zero_point);
  // A single value has shape [] or [1]; below, all that belongs to the channels has one shape.
  if (given.defined() && given.dim() != a.parameter.dim() && given.dim() + a.parameter.dim() == 1 &&
      given.sym_numel() == a.parameter.sym_numel()) {
    const Optional alike = at::reshape_symint(given, a.parameter.sym_sizes());
    return call_op<LearnedOp>(a.x, a.method, a.parameter, alike, a.grid, a.ch_axis,
                              a.use_grad_scaling, a.batch_axis);
  }
  const at::Tensor out = [&] {
    const at::AutoDispatchBelowAutograd below;
    return call_learned<LearnedOp>(a);
  }();
  const at::Tensor zero_point = defined_or_none(a.zero_point);
  record<OfForward>({a.x, a.parameter, zero_point}, {out},
                    [&](AutogradContext& context) { Kept::keep(context, {}, a); });
  const Derivative tangents{tangent_of(a.x),
                            tangent_of(a.parameter),
                            is_learned(zero_point) ? tangent_of(zero_point) : at::Tensor(),
                            {}};
  if (tangents.any()) set_tangent(out, applied(tangents, Primal(a).arguments));
  return out;
}

// The four gradients, as a linear map of `grad`.
struct OfBackward {
  static constexpr bool is_traceable = true;

  static variable_list backward(AutogradContext* context, const variable_list& ups) {
    const Kept kept(*context, 1);
    const at::Tensor &grad = kept[0], &parameter = kept[2], &zero_point = kept[3];
    const variable_list factors = factors_of(parameter, zero_point);
    const std::vector<bool> needs = needs_of(*context, {grad, factors[0], factors[1]});
    const bool of_x = context->saved_data["of_x"].toBool(),
               of_parameters = context->saved_data["of_parameters"].toBool();
    const auto where = [](bool used, const at::Tensor& t) { return used ? t : at::Tensor(); };
    const bool of_zero_point = of_parameters && is_learned(zero_point);
    const Derivative up{where(of_x, ups[0]), where(of_parameters, ups[1]),
                        where(of_zero_point, ups[2]), where(of_zero_point, ups[3])};
    variable_list gradients(3);  // of grad, parameter, zero_point
    if (needs[0] && up.any()) gradients[0] = applied(up, kept.arguments);
    if (needs[1] || needs[2]) {
      const at::Tensor mixed = mixed_of(grad, kept.arguments);
      if (needs[1]) gradients[1] = product_or_zeros(up.zero_point, mixed);
      if (needs[2]) gradients[2] = product_or_zeros(up.parameter, mixed);
    }
    return gradients;
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const LearnedBackwardArguments& b) {
  const LearnedArguments& a = b.forward;
  const auto of = [&](const at::Tensor& grad, const LearnedArguments& arguments) {
    return transposed(grad, arguments, b.of_x, b.of_parameters);
  };
  const Derivative d = [&] {
    const at::AutoDispatchBelowAutograd below;
    return of(b.grad, a);
  }();
  const at::Tensor zero_point = defined_or_none(a.zero_point);
  const variable_list factors = factors_of(a.parameter, zero_point);
  record<OfBackward>({b.grad, factors[0], factors[1]}, {d.x, d.parameter, d.zero_point, d.mixed},
                     [&](AutogradContext& context) {
                       Kept::keep(context, {b.grad}, a);
                       context.saved_data["of_x"] = b.of_x;
                       context.saved_data["of_parameters"] = b.of_parameters;
                     });
  const at::Tensor of_grad = tangent_of(b.grad), of_parameter = tangent_of(a.parameter),
                   of_zero_point = is_learned(zero_point) ? tangent_of(zero_point) : at::Tensor();
  const bool scales = is_learned(zero_point) && (of_parameter.defined() || of_zero_point.defined());
  if (!of_grad.defined() && !scales) return {d.x, d.parameter, d.zero_point, d.mixed};
  const Primal primal(a);
  Derivative tangents;
  if (of_grad.defined()) tangents = of(of_grad, primal.arguments);
  if (scales && b.of_parameters) {
    const at::Tensor mixed = mixed_of(primal_of(b.grad), primal.arguments);
    tangents.parameter = sum_of(tangents.parameter, product_of(of_zero_point, mixed));
    tangents.zero_point = sum_of(tangents.zero_point, product_of(of_parameter, mixed));
  }
  if (tangents.x.defined()) set_tangent(d.x, tangents.x);
  if (tangents.parameter.defined()) set_tangent(d.parameter, tangents.parameter);
  if (tangents.zero_point.defined()) set_tangent(d.zero_point, tangents.zero_point);
  if (tangents.mixed.defined()) set_tangent(d.mixed, tangents.mixed);
  return {d.x, d.parameter, d.zero_point, d.mixed};
}

// The output's tangent, as a linear map of the four tangents.
struct OfTangent {
  static constexpr bool is_traceable = true;

  static variable_list backward(AutogradContext* context, const variable_list& ups) {
    variable_list gradients(6);  // of the four tangents, parameter, zero_point
    if (!ups[0].defined()) return gradients;
    const Kept kept(*context, 4);
    const variable_list factors = factors_of(kept[5], kept[6]);
    const std::vector<bool> needs =
        needs_of(*context, {kept[0], kept[1], kept[2], kept[3], factors[0], factors[1]});
    const bool of_parameters =
        std::any_of(needs.begin() + 1, needs.end(), [](bool need) { return need; });
    const Derivative d = transposed(ups[0], kept.arguments, needs[0], of_parameters);
    if (needs[0]) gradients[0] = d.x;
    if (needs[1]) gradients[1] = d.parameter;
    if (needs[2]) gradients[2] = d.zero_point;
    if (needs[3]) gradients[3] = d.mixed;
    if (needs[4]) gradients[4] = product_or_zeros(kept[2], d.mixed);
    if (needs[5]) gradients[5] = product_or_zeros(kept[1], d.mixed);
    return gradients;
  }
};

at::Tensor tangent(const LearnedTangentArguments& t) {
  const LearnedArguments& a = t.forward;
  const at::Tensor zero_point = defined_or_none(a.zero_point);
  const Derivative given{defined_or_none(t.x_tangent), defined_or_none(t.parameter_tangent),
                         defined_or_none(t.zero_point_tangent), defined_or_none(t.mixed_tangent)};
  const at::Tensor out = [&] {
    const at::AutoDispatchBelowAutograd below;
    return call_learned<LearnedTangentOp>(a, t.x_tangent, t.parameter_tangent, t.zero_point_tangent,
                                          t.mixed_tangent);
  }();
  const variable_list tangents{given.x, given.parameter, given.zero_point, given.mixed};
  const variable_list factors = factors_of(a.parameter, zero_point);
  record<OfTangent>(
      {given.x, given.parameter, given.zero_point, given.mixed, factors[0], factors[1]}, {out},
      [&](AutogradContext& context) { Kept::keep(context, tangents, a); });
  Derivative second{tangent_of(given.x), tangent_of(given.parameter), tangent_of(given.zero_point),
                    tangent_of(given.mixed)};
  if (is_learned(zero_point))
    second.mixed = sum_of(second.mixed,
                          sum_of(product_of(primal_of(given.zero_point), tangent_of(a.parameter)),
                                 product_of(primal_of(given.parameter), tangent_of(zero_point))));
  if (second.any()) set_tangent(out, applied(second, Primal(a).arguments));
  return out;
}

}  // namespace

void register_learned_autograd(torch::Library& m) {
  impl<LearnedOp, learned_fake_quant>(m);
  impl<LearnedBackwardOp, backward>(m);
  impl<LearnedTangentOp, tangent>(m);
}

}  // namespace torch_ext::bindings
