// Bindings of the launchers, like csrc/bindings.cpp for the CPU. The stream follows the arguments of the CPU
// function.
#include "cuda/bindings.h"

#include <string>
#include <type_traits>

#include "arguments.h"
#include "cuda/advantages.h"
#include "cuda/logits.h"
#include "cuda/prefix_tree.h"
#include "cuda/returns.h"

namespace rewardops::cuda {
namespace {

void* stream_of(Address stream) { return at<void>(stream); }

ScanLaunch scan_launch(Address stream, int threads, int64_t chunks, Address state) {
  return {threads, chunks, at<void>(state), stream_of(stream)};
}

template <typename T>
void td(const py::tuple& shape, int64_t, const py::tuple& mask, const py::tuple& inputs, const py::tuple& per_row,
        double gamma, double lambda, bool decay, bool backward, const py::tuple& outputs, Address grad_bootstrap,
        Address stream, int threads, int64_t chunks, Address state) {
  const auto a = td_args<T>(shape, mask, inputs, per_row, gamma, lambda, decay, backward, outputs, grad_bootstrap);
  const py::gil_scoped_release release;
  td_scan(a, scan_launch(stream, threads, chunks, state));
}

template <typename T>
void step_returns(const py::tuple& shape, int64_t, const py::tuple& mask, const py::tuple& rewards,
                  const py::tuple& steps, const py::tuple& grad, const py::tuple& saved, bool largest,
                  double temperature, bool flag, const py::tuple& log_sums, const py::tuple& out,
                  const std::string& which, Address stream, int threads, int64_t chunks, Address state) {
  const auto a = returns_args<T>(shape, mask, rewards, steps, grad, saved, largest, temperature, flag, log_sums, out);
  const Returns kind = which == "extremes"            ? Returns::extremes
                       : which == "extremes_backward" ? Returns::extremes_backward
                       : which == "softmin_returns"   ? Returns::softmin_returns
                                                      : Returns::softmin_returns_backward;
  const py::gil_scoped_release release;
  returns(kind, a, scan_launch(stream, threads, chunks, state));
}

template <typename T>
void advantages(const py::tuple& shape, bool tokens_given, const py::tuple& mask, Address rewards,
                const py::tuple& relative, Address out, Address inv_scale, Address numerators, const py::tuple& tokens,
                Address stream) {
  auto a = advantages_args<T>(shape, tokens_given, mask, rewards, relative);
  advantages_outputs(a, out, inv_scale, numerators, tokens);
  const py::gil_scoped_release release;
  group_advantages(a, stream_of(stream));
}

template <typename T>
void advantages_backward(const py::tuple& shape, bool tokens_given, const py::tuple& mask, Address rewards,
                         const py::tuple& relative, const py::tuple& grad, Address grad_inv_scale,
                         const py::tuple& saved, const py::tuple& sums, Address out, Address grad_baseline,
                         Address stream) {
  auto a = advantages_args<T>(shape, tokens_given, mask, rewards, relative);
  advantages_gradients(a, grad, grad_inv_scale, saved, sums, out, grad_baseline);
  const py::gil_scoped_release release;
  group_advantages_backward(a, stream_of(stream));
}

void stats_and_grad(const py::tuple& problem, const py::tuple& outputs, const py::tuple& coefficients, int64_t width,
                    const py::tuple& grad, int blocks, Address stream) {
  TokenStatsAndGradArgs a{};
  a.in = logits_args(problem);
  a.count = problem[0].cast<int64_t>();
  for (int o = 0; o < kPolicyOutputs; ++o) {
    a.outputs[o] = at<float>(outputs[o].cast<Address>());
    a.coefficients[o] = at<const float>(coefficients[o].cast<Address>());
  }
  a.width = width;
  a.grad = logits_rows(grad);
  const py::gil_scoped_release release;
  token_stats_and_grad(a, blocks, stream_of(stream));
}

// ---- prefix trees; the arguments in front of the stream are work space --------------------------------------

void by_label(Address groups, int64_t batch, Address out, Address stream) {
  const py::gil_scoped_release release;
  rows_by_label(at<const int64_t>(groups), batch, at<int64_t>(out), stream_of(stream));
}

ByLabel by_label_of(Address rows, Address begin, Address end) {
  return {at<const int64_t>(rows), at<const int64_t>(begin), at<const int64_t>(end)};
}

template <typename Token>
void trees(const py::tuple& shape, const py::tuple& mask, const py::tuple& ids, Address groups, Address tree_rows,
           Address nodes, bool skip, Address members, Address begin, Address end, Address codes, Address moved,
           Address stream) {
  const auto a = prefix_tree_args<Token>(shape, mask, ids, groups, tree_rows, nodes, skip);
  const py::gil_scoped_release release;
  prefix_tree(a, by_label_of(members, begin, end), at<int64_t>(codes), at<Token>(moved), stream_of(stream));
}

void common_prefixes(int64_t batch, Address tree_rows, Address groups, int64_t most, Address members, Address lcp,
                     Address by_label, Address begin, Address end, Address stream) {
  const auto a = prefix_lcp_args(batch, tree_rows, groups, most, members, lcp);
  const py::gil_scoped_release release;
  prefix_lcp(a, by_label_of(by_label, begin, end), stream_of(stream));
}

// The backward op if there are `gradients`, else the forward op.
template <typename T>
void on_tokens(const py::tuple& shape, const py::tuple& mask, Address tree_rows, Address nodes, int64_t channels,
               int64_t plane, const py::tuple& given, int where, double gamma, bool skip, const py::tuple& tokens,
               const py::tuple& gradients, Address moved, Address stream) {
  const auto a =
      node_tokens<T>(shape, mask, tree_rows, nodes, channels, plane, given, where, gamma, skip, tokens, gradients);
  const bool backward = !gradients.empty();
  const py::gil_scoped_release release;
  if constexpr (std::is_floating_point_v<T>)
    if (backward) return nodes_to_tokens_backward(a, at<T>(moved), stream_of(stream));
  nodes_to_tokens(a, stream_of(stream));
}

template <typename T>
void define_typed(py::module_& m, const char* suffix) {
  const auto name = [&](const char* base) { return std::string(base) + suffix; };
  m.def(name("group_advantages").c_str(), advantages<T>);
  m.def(name("group_advantages_backward").c_str(), advantages_backward<T>);
  m.def(name("td_scan").c_str(), td<T>);
  m.def(name("returns").c_str(), step_returns<T>);
  m.def(name("nodes_to_tokens").c_str(), on_tokens<T>);
}

void define_trees(py::module_& m) {
  m.def("rows_by_label", by_label);
  m.def("prefix_tree_i32", trees<int32_t>);
  m.def("prefix_tree_i64", trees<int64_t>);
  m.def("prefix_lcp", common_prefixes);
  m.def("nodes_to_tokens_i32", on_tokens<int32_t>);
}

}  // namespace

void define(py::module_& m) {
  m.def("blocks_of_a_row", blocks_of_a_row);
  m.def("multiprocessors", multiprocessors);
  m.def("scan_state", scan_state);
  m.def("scan_tile", scan_tile);
  m.def("token_stats_and_grad", stats_and_grad);
  define_trees(m);
  define_typed<float>(m, "_f32");
  define_typed<double>(m, "_f64");
}

}  // namespace rewardops::cuda
