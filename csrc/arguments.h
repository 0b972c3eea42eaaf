// Converts the arguments of a Python call, tuples of addresses and sizes, to the argument records of the kernels. The
// callers in rewardops/cpp have checked the arguments and allocated the outputs.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include "rewardops/advantages.h"
#include "rewardops/entropy.h"
#include "rewardops/logits.h"
#include "rewardops/prefix_tree.h"
#include "rewardops/returns.h"
#include "rewardops/rows.h"
#include "rewardops/scopes.h"
#include "rewardops/td.h"

namespace rewardops {

namespace py = pybind11;

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// An element of a call's arguments. Numbers are read without pybind11's casters, which take as long as a small kernel.
template <typename V>
V converted(py::handle value) {
  if constexpr (std::is_same_v<V, double>) {
    const double x = PyFloat_AsDouble(value.ptr());
    if (x == -1 && PyErr_Occurred()) throw py::error_already_set();
    return x;
  } else if constexpr (std::is_integral_v<V> && !std::is_same_v<V, bool>) {
    const long long x = PyLong_AsLongLong(value.ptr());
    if (x == -1 && PyErr_Occurred()) throw py::error_already_set();
    const V narrow = static_cast<V>(x);
    if (static_cast<long long>(narrow) != x || (std::is_unsigned_v<V> && x < 0))
      throw py::type_error("got " + std::to_string(x) + ", want a number that fits the argument");
    return narrow;
  } else if constexpr (std::is_enum_v<V>) {
    return static_cast<V>(converted<int>(value));
  } else {
    return value.cast<V>();
  }
}

// The arguments of a call, each as the type that the function takes.
template <typename... A, size_t... i>
void call_with(void (*f)(A...), const py::args& args, std::index_sequence<i...>) {
  if (args.size() != sizeof...(A))
    throw py::type_error("got " + std::to_string(args.size()) + " arguments, want " + std::to_string(sizeof...(A)));
  f(converted<std::decay_t<A>>(PyTuple_GET_ITEM(args.ptr(), i))...);
}

template <typename... A>
void call_with(void (*f)(A...), const py::args& args) {
  call_with(f, args, std::index_sequence_for<A...>());
}

// A function as pybind11 sees it. It is of one type for all of them, because pybind11 is slow to compile for each.
template <auto f>
void call(const py::args& args) {
  call_with(f, args);
}

// A cursor over a Python tuple, from its first element to its last. It reads numbers, enums and addresses itself;
// nested tuples are read by the functions of the same name below.
class Reader {
 public:
  explicit Reader(py::handle tuple) : tuple_(tuple) {}

  template <typename V>
  V next() {
    return converted<V>(next());
  }
  // An address; 0 is null.
  template <typename T>
  T* pointer() {
    return at<T>(next<Address>());
  }
  template <typename T, size_t N>
  void pointers(T* (&out)[N]) {
    for (T*& p : out) p = pointer<T>();
  }
  template <typename T>
  Tokens<T> tokens();
  LogitsRows logits_rows();

 private:
  py::handle next() {
    const py::handle value = PyTuple_GetItem(tuple_.ptr(), index_++);
    if (!value) throw py::error_already_set();
    return value;
  }

  py::handle tuple_;
  Py_ssize_t index_ = 0;
};

// (address, row stride)
template <typename T>
Tokens<T> tokens(const py::handle& tuple) {
  Reader r(tuple);
  Tokens<T> out{};
  out.data = r.pointer<T>();
  out.stride = r.next<int64_t>();
  return out;
}

// (batch, width, address of cu_seqlens, number of packed tokens, true if the offsets are int64)
inline Rows rows(const py::handle& tuple) {
  Reader r(tuple);
  Rows out{};
  out.batch = r.next<int64_t>();
  out.width = r.next<int64_t>();
  out.cu = r.pointer<const void>();
  out.total = r.next<int64_t>();
  out.wide = r.next<bool>();
  return out;
}

// (address, dtype, inner, outer stride, inner stride)
inline LogitsRows logits_rows(const py::handle& tuple) {
  Reader r(tuple);
  LogitsRows out{};
  out.data = r.pointer<const void>();
  out.dtype = r.next<DType>();
  out.inner = r.next<int64_t>();
  out.stride_outer = r.next<int64_t>();
  out.stride_inner = r.next<int64_t>();
  return out;
}

template <typename T>
Tokens<T> Reader::tokens() {
  return rewardops::tokens<T>(next());
}
inline LogitsRows Reader::logits_rows() { return rewardops::logits_rows(next()); }

// ---- logits -------------------------------------------------------------------------------------------------

// problem: (number of rows, the fields of LogitsArgs in order)
inline int64_t logits_count(const py::tuple& problem) { return Reader(problem).next<int64_t>(); }

inline LogitsArgs logits_args(const py::tuple& problem) {
  Reader r(problem);
  r.next<int64_t>();  // the number of rows
  LogitsArgs a{};
  a.logits = r.logits_rows();
  a.tokens = r.pointer<const int64_t>();
  a.ref_logits = r.logits_rows();
  a.mask = r.pointer<const uint8_t>();
  a.temperatures = r.pointer<const double>();
  a.temperature = r.next<double>();
  a.softcap = r.next<double>();
  a.first = r.next<int64_t>();
  a.vocab = r.next<int64_t>();
  a.beta = r.next<double>();
  return a;
}

// ---- advantages ---------------------------------------------------------------------------------------------

// relative: (groups, baseline_values, lengths, baseline, quantile, scale, eps, ddof, raw)
template <typename T>
AdvantagesArgs<T> advantages_args(const py::tuple& shape, bool tokens_given, const py::tuple& mask, Address rewards,
                                  const py::tuple& relative) {
  AdvantagesArgs<T> a{};
  a.rows = rows(shape);
  a.tokens_given = tokens_given;
  a.mask = tokens<const uint8_t>(mask);
  a.rewards = at<const T>(rewards);
  Reader r(relative);
  a.groups = r.pointer<const int64_t>();
  a.baseline_values = r.pointer<const T>();
  a.lengths = r.pointer<const T>();
  a.baseline = r.next<Baseline>();
  a.quantile = r.next<double>();
  a.scale = r.next<Scale>();
  a.eps = r.next<double>();
  a.ddof = r.next<int>();
  a.raw = r.next<bool>();
  return a;
}

// Adds the outputs of the forward pass.
template <typename T>
void advantages_outputs(AdvantagesArgs<T>& a, Address advantages, Address inv_scale, Address numerators,
                        const py::tuple& out) {
  a.advantages = at<T>(advantages);
  a.inv_scale = at<T>(inv_scale);
  a.numerators = at<T>(numerators);
  a.out = tokens<T>(out);
}

// Adds the arguments of the backward pass. saved: (inv_scale, numerators) of the forward pass; sums: (address, parts)
template <typename T>
void advantages_gradients(AdvantagesArgs<T>& a, const py::tuple& grad, Address grad_inv_scale, const py::tuple& saved,
                          const py::tuple& sums, Address grad_rewards, Address grad_baseline) {
  a.grad = tokens<const T>(grad);
  a.grad_inv_scale = at<const T>(grad_inv_scale);
  Reader s(saved);
  a.inv_scale = s.pointer<T>();
  a.numerators = s.pointer<T>();
  Reader r(sums);
  a.sums = r.pointer<double>();
  a.parts = r.next<int64_t>();
  a.grad_rewards = at<T>(grad_rewards);
  a.grad_baseline = at<T>(grad_baseline);
}

// ---- returns ------------------------------------------------------------------------------------------------

// steps: (kind, flags or ids); flag: `mean` of the soft-min returns, `through_weights` of the soft-min rewards
template <typename T>
ReturnsArgs<T> returns_args(const py::tuple& shape, const py::tuple& mask, const py::tuple& rewards,
                            const py::tuple& steps, const py::tuple& grad, const py::tuple& returns, bool largest,
                            double temperature, bool flag, const py::tuple& log_sums, const py::tuple& out) {
  ReturnsArgs<T> a{};
  a.rows = rows(shape);
  a.mask = tokens<const uint8_t>(mask);
  a.rewards = tokens<const T>(rewards);
  Reader s(steps);
  a.kind = s.next<Steps>();
  if (a.kind == Steps::flags) a.flags = s.tokens<const uint8_t>();
  if (a.kind == Steps::ids) a.ids = s.tokens<const int64_t>();
  a.grad = tokens<const T>(grad);
  a.returns = tokens<const T>(returns);
  a.largest = largest;
  a.temperature = temperature;
  a.through_weights = a.mean = flag;
  a.log_sums = tokens<double>(log_sums);
  a.out = tokens<T>(out);
  return a;
}

// ---- scopes -------------------------------------------------------------------------------------------------

template <typename T>
GtpoArgs<T> gtpo_args(const py::tuple& shape, const py::tuple& mask, Address rewards, const py::tuple& entropy,
                      const py::tuple& grad, const py::tuple& out) {
  GtpoArgs<T> a{};
  a.rewards = at<const T>(rewards);
  a.entropy = tokens<const T>(entropy);
  a.mask = tokens<const uint8_t>(mask);
  a.rows = rows(shape);
  a.grad = tokens<const T>(grad);
  a.out = tokens<T>(out);
  return a;
}

// inputs: (values, weights, grad); scope: (number of scopes, groups, outcomes, threshold)
// options: (eps, ddof, of_variance, rounded, shifted), or (form, rate, floor), or ()
template <typename T>
ScopesArgs<T> scopes_args(int op, const py::tuple& shape, const py::tuple& mask, const py::tuple& inputs,
                          const py::tuple& scope, const py::tuple& options, Address statistics, const py::tuple& out) {
  ScopesArgs<T> a{};
  a.op = static_cast<Scoped>(op);
  a.rows = rows(shape);
  a.mask = tokens<const uint8_t>(mask);
  Reader i(inputs);
  a.values = i.tokens<const T>();
  a.weights = i.tokens<const T>();
  a.grad = i.tokens<const T>();
  Reader s(scope);
  a.scopes = s.next<int64_t>();
  a.groups = s.pointer<const int64_t>();
  a.outcomes = s.pointer<const T>();
  a.threshold = s.next<double>();
  Reader o(options);
  if (a.op == Scoped::standardize || a.op == Scoped::standardize_backward) {
    a.eps = o.next<double>();
    a.ddof = o.next<int64_t>();
    a.of_variance = o.next<bool>();
    a.rounded = o.next<bool>();
    a.shifted = o.next<bool>();
  } else if (a.op != Scoped::covary) {
    a.form = o.next<Form>();
    a.rate = o.next<double>();
    a.floor = o.next<double>();
  }
  a.statistics = at<double>(statistics);
  a.out = tokens<T>(out);
  return a;
}

// ---- td -----------------------------------------------------------------------------------------------------

// inputs: (rewards, values, rho, trace, gammas, lambdas); per_row: (gammas, lambdas, bootstrap)
// outputs: forward (out, returns), backward (grad, grad_returns, grad_rewards, grad_values)
template <typename T>
TdArgs<T> td_args(const py::tuple& shape, const py::tuple& mask, const py::tuple& inputs, const py::tuple& per_row,
                  double gamma, double lam, bool decay, bool backward, const py::tuple& outputs,
                  Address grad_bootstrap) {
  TdArgs<T> a{};
  a.rows = rows(shape);
  a.mask = tokens<const uint8_t>(mask);
  Reader i(inputs);
  a.rewards = i.tokens<const T>();
  a.values = i.tokens<const T>();
  a.rho = i.tokens<const T>();
  a.trace = i.tokens<const T>();
  a.gammas = i.tokens<const double>();
  a.lambdas = i.tokens<const double>();
  Reader r(per_row);
  a.row_gammas = r.pointer<const double>();
  a.row_lambdas = r.pointer<const double>();
  a.bootstrap = r.pointer<const T>();
  a.gamma = gamma;
  a.lam = lam;
  a.decay = decay;
  a.backward = backward;
  Reader o(outputs);
  if (backward) {
    a.grad = o.tokens<const T>();
    a.grad_returns = o.tokens<const T>();
    a.grad_rewards = o.tokens<T>();
    a.grad_values = o.tokens<T>();
    a.grad_bootstrap = at<T>(grad_bootstrap);
  } else {
    a.out = o.tokens<T>();
    a.returns = o.tokens<T>();
  }
  return a;
}

// ---- prefix_tree --------------------------------------------------------------------------------------------

// rows: [5, B], order, leaf, first, length, shared; nodes: [4, 2B], begin, end, depth, parent
template <typename I>
Tree<I> tree(int64_t batch, Address rows, Address nodes) {
  I* r = at<I>(rows);
  I* n = at<I>(nodes);
  const int64_t m = 2 * batch;
  return {batch, r, r + batch, r + 2 * batch, r + 3 * batch, r + 4 * batch, n, n + m, n + 2 * m, n + 3 * m};
}

template <typename Token>
PrefixTreeArgs<Token> prefix_tree_args(const py::tuple& shape, const py::tuple& mask, const py::tuple& ids,
                                       Address groups, Address tree_rows, Address nodes, bool skip) {
  const Rows r = rows(shape);
  return {tokens<const Token>(ids),
          at<const int64_t>(groups),
          tokens<const uint8_t>(mask),
          r,
          skip,
          tree<int64_t>(r.batch, tree_rows, nodes)};
}

inline PrefixLcpArgs prefix_lcp_args(int64_t batch, Address tree_rows, Address groups, int64_t most, Address members,
                                     Address lcp) {
  return {tree<const int64_t>(batch, tree_rows, 0), at<const int64_t>(groups), most, at<int32_t>(members),
          at<int32_t>(lcp)};
}

// node_values: (values, scaled_values, row_bias, row_factor); gradients: of these four, or ()
// on_tokens: the output, or with gradients the upstream gradient
template <typename T>
NodeTokensArgs<T> node_tokens(const py::tuple& shape, const py::tuple& mask, Address tree_rows, Address nodes,
                              int64_t channels, int64_t plane, const py::tuple& node_values, int where, double gamma,
                              bool skip, const py::tuple& on_tokens, const py::tuple& gradients) {
  NodeTokensArgs<T> a{};
  a.rows = rows(shape);
  a.mask = tokens<const uint8_t>(mask);
  a.tree = tree<const int64_t>(a.rows.batch, tree_rows, nodes);
  a.channels = channels;
  a.plane = plane;
  Reader v(node_values);
  a.values = v.pointer<const double>();
  a.scaled_values = v.pointer<const double>();
  a.row_bias = v.pointer<const double>();
  a.row_factor = v.pointer<const double>();
  a.at = static_cast<At>(where);
  a.gamma = gamma;
  a.skip = skip;
  if (gradients.empty()) {
    a.out = tokens<T>(on_tokens);
  } else {
    a.grad = tokens<const T>(on_tokens);
    Reader g(gradients);
    a.grad_values = g.pointer<double>();
    a.grad_scaled = g.pointer<double>();
    a.grad_bias = g.pointer<double>();
    a.grad_factor = g.pointer<double>();
  }
  return a;
}

}  // namespace rewardops
