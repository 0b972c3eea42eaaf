// What Python hands over, as the kernels take it: addresses and sizes in tuples. Arguments were checked, and outputs
// allocated, by the callers in rewardops/cpp.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "rewardops/advantages.h"
#include "rewardops/logits.h"
#include "rewardops/prefix_tree.h"
#include "rewardops/returns.h"
#include "rewardops/rows.h"

namespace rewardops {

namespace py = pybind11;

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// A per-token array comes as (address, row stride); address 0 for one that is not given.
template <typename T>
Tokens<T> tokens(const py::handle& pair) {
  const auto strided = pair.cast<py::tuple>();
  return {at<T>(strided[0].cast<Address>()), strided[1].cast<int64_t>()};
}

// (batch, width, address of cu_seqlens or 0, number of packed tokens, whether the offsets are int64)
inline Rows rows(const py::tuple& r) {
  return {r[0].cast<int64_t>(), r[1].cast<int64_t>(), at<const void>(r[2].cast<Address>()), r[3].cast<int64_t>(),
          r[4].cast<bool>()};
}

// (address, dtype, inner, outer stride, inner stride); address 0 for rows that are not given.
inline LogitsRows logits_rows(const py::handle& r) {
  const auto t = r.cast<py::tuple>();
  return {at<const void>(t[0].cast<Address>()), static_cast<DType>(t[1].cast<int>()), t[2].cast<int64_t>(),
          t[3].cast<int64_t>(), t[4].cast<int64_t>()};
}

// As rewardops.cpp.logits._problem makes it; the number of rows, which comes first, aside.
inline LogitsArgs logits_args(const py::tuple& p) {
  return {logits_rows(p[1]),
          logits_rows(p[2]),
          p[3].cast<int64_t>(),
          p[4].cast<int64_t>(),
          at<const int64_t>(p[5].cast<Address>()),
          at<const uint8_t>(p[6].cast<Address>()),
          p[7].cast<double>(),
          at<const double>(p[8].cast<Address>()),
          p[9].cast<double>(),
          p[10].cast<double>()};
}

// What a row's advantage is relative to: (groups, given, lengths, baseline, quantile, scale, eps, ddof, raw).
template <typename T>
AdvantagesArgs<T> advantages_args(const py::tuple& shape, bool tokens_given, const py::tuple& mask, Address rewards,
                                  const py::tuple& relative) {
  AdvantagesArgs<T> a{};
  a.rows = rows(shape);
  a.tokens_given = tokens_given;
  a.mask = tokens<const uint8_t>(mask);
  a.rewards = at<const T>(rewards);
  a.groups = at<const int64_t>(relative[0].cast<Address>());
  a.given = at<const T>(relative[1].cast<Address>());
  a.lengths = at<const T>(relative[2].cast<Address>());
  a.baseline = static_cast<Baseline>(relative[3].cast<int>());
  a.quantile = relative[4].cast<double>();
  a.scale = static_cast<Scale>(relative[5].cast<int>());
  a.eps = relative[6].cast<double>();
  a.ddof = relative[7].cast<int>();
  a.raw_singletons = relative[8].cast<bool>();
  return a;
}

// What the forward pass adds: outputs per row, and per token where the rewards belong to rows of tokens.
template <typename T>
void advantages_outputs(AdvantagesArgs<T>& a, Address advantages, Address inv_scale, Address numerators,
                        const py::tuple& out) {
  a.advantages = at<T>(advantages);
  a.inv_scale = at<T>(inv_scale);
  a.numerators = at<T>(numerators);
  a.out = tokens<T>(out);
}

// And the backward pass; kept: (1 / scale, numerators) of the forward one; sums: (address, parts of a row).
template <typename T>
void advantages_gradients(AdvantagesArgs<T>& a, const py::tuple& grad, Address grad_inv_scale, const py::tuple& kept,
                          const py::tuple& sums, Address out, Address grad_given) {
  a.grad = tokens<const T>(grad);
  a.grad_inv_scale = at<const T>(grad_inv_scale);
  a.inv_scale = at<T>(kept[0].cast<Address>());
  a.numerators = at<T>(kept[1].cast<Address>());
  a.sums = at<double>(sums[0].cast<Address>());
  a.parts = sums[1].cast<int64_t>();
  a.grad_rewards = at<T>(out);
  a.grad_given = at<T>(grad_given);
}

// steps: (kind, (address, stride)); `flag` is the mean of soft-min returns, or the weights' gradient of its rewards.
template <typename T>
ReturnsArgs<T> returns_args(const py::tuple& shape, const py::tuple& mask, const py::tuple& rewards,
                            const py::tuple& steps, const py::tuple& grad, const py::tuple& found, bool largest,
                            double temperature, bool flag, const py::tuple& log_sums, const py::tuple& out) {
  ReturnsArgs<T> a{};
  a.rows = rows(shape);
  a.mask = tokens<const uint8_t>(mask);
  a.rewards = tokens<const T>(rewards);
  a.kind = static_cast<Steps>(steps[0].cast<int>());
  if (a.kind == Steps::flags) a.flags = tokens<const uint8_t>(steps[1]);
  if (a.kind == Steps::ids) a.ids = tokens<const int64_t>(steps[1]);
  a.grad = tokens<const T>(grad);
  a.returns = tokens<const T>(found);
  a.largest = largest;
  a.temperature = temperature;
  a.through_weights = a.mean = flag;
  a.log_sums = tokens<double>(log_sums);
  a.out = tokens<T>(out);
  return a;
}

// inputs: rewards, values, rho, trace, gammas, lambdas per token; per_row: gammas, lambdas, bootstrap.
// outputs: forward out, returns; backward grad, grad_returns, grad_rewards, grad_values.
template <typename T>
TdArgs<T> td_args(const py::tuple& shape, const py::tuple& mask, const py::tuple& inputs, const py::tuple& per_row,
                  double gamma, double lambda, bool decay, bool backward, const py::tuple& outputs,
                  Address grad_bootstrap) {
  TdArgs<T> a{};
  a.rows = rows(shape);
  a.mask = tokens<const uint8_t>(mask);
  a.rewards = tokens<const T>(inputs[0]);
  a.values = tokens<const T>(inputs[1]);
  a.rho = tokens<const T>(inputs[2]);
  a.trace = tokens<const T>(inputs[3]);
  a.gammas = tokens<const double>(inputs[4]);
  a.lambdas = tokens<const double>(inputs[5]);
  a.row_gammas = at<const double>(per_row[0].cast<Address>());
  a.row_lambdas = at<const double>(per_row[1].cast<Address>());
  a.bootstrap = at<const T>(per_row[2].cast<Address>());
  a.gamma = gamma;
  a.lambda = lambda;
  a.decay = decay;
  a.backward = backward;
  if (backward) {
    a.grad = tokens<const T>(outputs[0]);
    a.grad_returns = tokens<const T>(outputs[1]);
    a.grad_rewards = tokens<T>(outputs[2]);
    a.grad_values = tokens<T>(outputs[3]);
    a.grad_bootstrap = at<T>(grad_bootstrap);
  } else {
    a.out = tokens<T>(outputs[0]);
    a.returns = tokens<T>(outputs[1]);
  }
  return a;
}

// From the addresses of rewardops.prefix_tree's two arrays.
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
  return {r, tokens<const uint8_t>(mask), tokens<const Token>(ids), at<const int64_t>(groups),
          tree<int64_t>(r.batch, tree_rows, nodes), skip};
}

inline PrefixLcpArgs prefix_lcp_args(int64_t batch, Address tree_rows, Address groups, int64_t most, Address members,
                                     Address lcp) {
  return {tree<const int64_t>(batch, tree_rows, 0), at<const int64_t>(groups), most, at<int32_t>(members),
          at<int32_t>(lcp)};
}

// given: values, along, base, factor. on_tokens is the output, or, where there are gradients of these four, the
// gradient.
template <typename T>
NodeTokensArgs<T> node_tokens(const py::tuple& shape, const py::tuple& mask, Address tree_rows, Address nodes,
                              int64_t channels, int64_t plane, const py::tuple& given, int where, double gamma,
                              bool skip, const py::tuple& on_tokens, const py::tuple& gradients) {
  NodeTokensArgs<T> a{};
  a.rows = rows(shape);
  a.tree = tree<const int64_t>(a.rows.batch, tree_rows, nodes);
  a.mask = tokens<const uint8_t>(mask);
  a.channels = channels;
  a.plane = plane;
  a.values = at<const double>(given[0].cast<Address>());
  a.along = at<const double>(given[1].cast<Address>());
  a.base = at<const double>(given[2].cast<Address>());
  a.factor = at<const double>(given[3].cast<Address>());
  a.at = static_cast<At>(where);
  a.gamma = gamma;
  a.skip = skip;
  if (gradients.empty()) {
    a.out = tokens<T>(on_tokens);
  } else {
    a.grad = tokens<const T>(on_tokens);
    a.grad_values = at<double>(gradients[0].cast<Address>());
    a.grad_along = at<double>(gradients[1].cast<Address>());
    a.grad_base = at<double>(gradients[2].cast<Address>());
    a.grad_factor = at<double>(gradients[3].cast<Address>());
  }
  return a;
}

}  // namespace rewardops
