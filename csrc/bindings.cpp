// The Python module. Its functions take addresses and sizes and return nothing; they release the interpreter lock while
// a kernel runs.
#include <cstdint>
#include <string>
#include <vector>

#include "arguments.h"
#include "cpu/advantages.h"
#include "cpu/entropy.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/prefix_tree.h"
#include "cpu/scopes.h"
#include "cpu/segments.h"
#include "cpu/selection.h"
#include "cpu/tree.h"
#include "rewardops/cpu/kernels.h"
#ifdef REWARDOPS_HAS_CUDA
#include "cuda/bindings.h"
#endif

using namespace rewardops;
using namespace rewardops::cpu;

namespace {

// Rows per range, so that the work of a range outweighs waking a thread.
int64_t row_grain(int64_t row_bytes) {
  constexpr int64_t kWorth = 32768;
  return row_bytes >= kWorth ? 1 : kWorth / (row_bytes + 1) + 1;
}

int64_t token_rows_grain(const Rows& r) {
  const int64_t n = r.cu ? r.total / (r.batch > 0 ? r.batch : 1) : r.width;
  return row_grain(n * 8);
}

// ---- logits -------------------------------------------------------------------------------------------------

void token_stats(const py::tuple& problem, const py::tuple& outputs, Address saved, Address record, int terms,
                 int threads) {
  TokenStatsArgs a{};
  a.in = logits_args(problem);
  a.count = logits_count(problem);
  Reader(outputs).pointers(a.outputs);
  a.saved = at<double>(saved);
  a.record = at<double>(record);
  a.terms = terms;
  const py::gil_scoped_release release;
  parallel_for(a.count, row_grain(a.in.vocab * 4), threads,
               [&](int64_t begin, int64_t end) { kernels().token_stats(a, begin, end); });
}

void token_stats_backward(const py::tuple& problem, const py::tuple& grads, Address saved, Address grad_record,
                          Address record, int64_t width, const py::tuple& grad_logits, const py::tuple& grad_ref,
                          int threads) {
  TokenStatsBackwardArgs a{};
  a.in = logits_args(problem);
  a.count = logits_count(problem);
  Reader(grads).pointers(a.grads);
  a.saved = at<const double>(saved);
  a.grad_record = at<const double>(grad_record);
  a.record = at<const double>(record);
  a.width = width;
  a.grad_logits = logits_rows(grad_logits);
  a.grad_ref = logits_rows(grad_ref);
  const py::gil_scoped_release release;
  parallel_for(a.count, row_grain(a.in.vocab * 4), threads,
               [&](int64_t begin, int64_t end) { kernels().token_stats_backward(a, begin, end); });
}

// ---- kl -----------------------------------------------------------------------------------------------------

// inputs: (logprob, ref_logprob, mask, old_logprob, rewards, grad)
// options: (estimator, largest_d, largest_value, scale, ratio_grad, ratio_cap)
template <typename T>
void token_kl(const py::tuple& inputs, const py::tuple& options, Address out, Address out_ref, int64_t count,
              int threads) {
  TokenKlArgs<T> a{};
  Reader i(inputs);
  a.logprob = i.pointer<const T>();
  a.ref_logprob = i.pointer<const T>();
  a.mask = i.pointer<const uint8_t>();
  a.old_logprob = i.pointer<const T>();
  a.rewards = i.pointer<const T>();
  a.grad = i.pointer<const T>();
  Reader o(options);
  a.estimator = o.next<KlEstimator>();
  a.largest_d = static_cast<T>(o.next<double>());
  a.largest_value = static_cast<T>(o.next<double>());
  a.scale = static_cast<T>(o.next<double>());
  a.ratio_grad = o.next<bool>();
  a.ratio_cap = static_cast<T>(o.next<double>());
  a.stream = too_large_for_caches(count * static_cast<int64_t>(sizeof(T)));
  a.out = at<T>(out);
  a.out_ref = at<T>(out_ref);
  const auto kernel = kernels().of<T>().token_kl;
  const py::gil_scoped_release release;
  parallel_for(count, 8192, threads, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

// ---- advantages ---------------------------------------------------------------------------------------------

template <typename T>
void group_advantages(const py::tuple& shape, bool tokens_given, const py::tuple& mask, Address rewards,
                      const py::tuple& relative, Address advantages, Address inv_scale, Address numerators,
                      const py::tuple& out, int threads) {
  AdvantagesArgs<T> a = advantages_args<T>(shape, tokens_given, mask, rewards, relative);
  advantages_outputs(a, advantages, inv_scale, numerators, out);
  const RowsToTokensArgs<T> to_tokens{a.advantages, a.mask, a.rows, a.out};
  const py::gil_scoped_release release;
  rewardops::cpu::group_advantages(a, threads);
  if (tokens_given)
    parallel_for(a.rows.batch, token_rows_grain(a.rows), threads,
                 [&](int64_t begin, int64_t end) { kernels().of<T>().rows_to_tokens(to_tokens, begin, end); });
}

template <typename T>
void group_advantages_backward(const py::tuple& shape, bool tokens_given, const py::tuple& mask, Address rewards,
                               const py::tuple& relative, const py::tuple& grad, Address grad_inv_scale,
                               const py::tuple& saved, const py::tuple& sums, Address grad_rewards,
                               Address grad_baseline, int threads) {
  AdvantagesArgs<T> a = advantages_args<T>(shape, tokens_given, mask, rewards, relative);
  advantages_gradients(a, grad, grad_inv_scale, saved, sums, grad_rewards, grad_baseline);
  const py::gil_scoped_release release;
  rewardops::cpu::group_advantages_backward(a, threads);
}

// ---- scans along rows: td and returns -----------------------------------------------------------------------

// The number of chunks in which rows are scanned. It depends on the shape alone, so that results do not depend on the
// number of threads.
int64_t chunks_of(const Rows& r, int64_t longest) {
  return r.batch <= 16 && longest >= 2 * kScanChunk ? (longest + kScanChunk - 1) / kScanChunk : 1;
}

// Divides a scan of rows of up to `longest` tokens into chunks. Returns the memory that `a.state` points to.
template <typename Args>
std::vector<double> plan_scan(Args& a, int64_t longest) {
  a.stream = too_large_for_caches(a.rows.batch * longest * static_cast<int64_t>(sizeof(*a.rewards.data)));
  a.chunks = chunks_of(a.rows, longest);
  std::vector<double> state(a.chunks > 1 ? 2 * a.rows.batch * a.chunks : 0);
  a.state = state.data();
  return state;
}

template <typename Args>
void run_scan(const Scan<Args>& scan, const Args& a, int threads) {
  const auto over = [&](void (*kernel)(const Args&, int64_t, int64_t), int64_t items, int64_t grain) {
    if (kernel) parallel_for(items, grain, threads, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  };
  if (a.chunks <= 1) return over(scan.rows, a.rows.batch, token_rows_grain(a.rows));
  over(scan.aggregates, a.rows.batch * a.chunks, 1);
  over(scan.carries, a.rows.batch, 1);
  over(scan.chunks, a.rows.batch * a.chunks, 1);
  over(scan.joins, a.rows.batch, 1);
}

template <typename T>
void td_scan(const py::tuple& shape, int64_t longest, const py::tuple& mask, const py::tuple& inputs,
             const py::tuple& per_row, double gamma, double lambda, bool decay, bool backward, const py::tuple& outputs,
             Address grad_bootstrap, int threads) {
  auto a = td_args<T>(shape, mask, inputs, per_row, gamma, lambda, decay, backward, outputs, grad_bootstrap);
  const std::vector<double> state = plan_scan(a, longest);
  const py::gil_scoped_release release;
  const TypedKernels<T>& k = kernels().of<T>();
  run_scan<TdArgs<T>>({k.td_rows, k.td_aggregates, k.td_carries, k.td_chunks, k.td_joins}, a, threads);
}

template <typename T>
void returns(const py::tuple& shape, int64_t longest, const py::tuple& mask, const py::tuple& rewards,
             const py::tuple& steps, const py::tuple& grad, const py::tuple& returns, bool largest, double temperature,
             bool flag, const py::tuple& log_sums, const py::tuple& out, const std::string& which, int threads) {
  auto a = returns_args<T>(shape, mask, rewards, steps, grad, returns, largest, temperature, flag, log_sums, out);
  const std::vector<double> state = plan_scan(a, longest);
  const TypedKernels<T>& k = kernels().of<T>();
  const py::gil_scoped_release release;
  if (which == "extremes") {
    // An extreme is exact for any number of chunks: several are used only where whole rows would leave threads idle.
    if (a.rows.batch >= threads) a.chunks = 1;
    return run_scan<ReturnsArgs<T>>(
        {k.extremes_rows, k.extremes_aggregates, k.extremes_carries, k.extremes_chunks, nullptr}, a, threads);
  }
  if (which == "extremes_backward")
    return run_scan<ReturnsArgs<T>>({k.extremes_backward_rows, k.extremes_backward_aggregates,
                                     k.extremes_backward_carries, k.extremes_backward_chunks, nullptr},
                                    a, threads);
  const auto kernel = which == "softmin"            ? k.softmin_rewards
                      : which == "softmin_backward" ? k.softmin_rewards_backward
                      : which == "softmin_returns"  ? k.softmin_returns
                                                    : k.softmin_returns_backward;
  parallel_for(a.rows.batch, token_rows_grain(a.rows), threads,
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

// ---- prefix_tree --------------------------------------------------------------------------------------------

template <typename Token>
void prefix_tree(const py::tuple& shape, const py::tuple& mask, const py::tuple& ids, Address groups, Address tree_rows,
                 Address nodes, bool skip, int threads) {
  const auto a = prefix_tree_args<Token>(shape, mask, ids, groups, tree_rows, nodes, skip);
  const py::gil_scoped_release release;
  rewardops::cpu::prefix_tree(a, threads);
}

void prefix_lcp(int64_t batch, Address tree_rows, Address groups, int64_t most, Address members, Address lcp,
                int threads) {
  const auto a = prefix_lcp_args(batch, tree_rows, groups, most, members, lcp);
  const py::gil_scoped_release release;
  rewardops::cpu::prefix_lcp(a, threads);
}

// Backward where grad is not null.
void subtree_statistics(int64_t batch, Address tree_rows, Address nodes, int64_t channels, Address x, Address weights,
                        double gamma, Statistic statistic, int64_t ddof, const py::tuple& results, Address grad,
                        Address grad_x, Address grad_weights, int threads) {
  Reader r(results);
  SubtreeArgs a{};
  a.x = at<const double>(x);
  a.weights = at<const double>(weights);
  a.tree = tree<const int64_t>(batch, tree_rows, nodes);
  a.gamma = gamma;
  a.statistic = statistic;
  a.ddof = ddof;
  a.channels = channels;
  a.out = r.pointer<double>();
  a.total = r.pointer<double>();
  a.centre = r.pointer<double>();
  a.grad = at<const double>(grad);
  a.grad_x = at<double>(grad_x);
  a.grad_weights = at<double>(grad_weights);
  const py::gil_scoped_release release;
  if (a.grad) rewardops::cpu::subtree_statistics_backward(a, threads);
  else rewardops::cpu::subtree_statistics(a, threads);
}

// Backward where there are gradients.
template <typename T>
void nodes_to_tokens(const py::tuple& shape, const py::tuple& mask, Address tree_rows, Address nodes, int64_t channels,
                     int64_t plane, const py::tuple& node_values, int where, double gamma, bool skip,
                     const py::tuple& on_tokens, const py::tuple& gradients, int threads) {
  const auto a = node_tokens<T>(shape, mask, tree_rows, nodes, channels, plane, node_values, where, gamma, skip,
                                on_tokens, gradients);
  const bool backward = !gradients.empty();
  const py::gil_scoped_release release;
  if constexpr (std::is_floating_point_v<T>)
    if (backward) return rewardops::cpu::nodes_to_tokens_backward(a, threads);
  rewardops::cpu::nodes_to_tokens(a, threads);
}

// ---- tree ---------------------------------------------------------------------------------------------------

void tree_values(int64_t nodes, Address parent, Address rewards, Address visits, int reduce, double temperature,
                 Address values, Address slope) {
  const TreeArgs a{at<const int64_t>(parent),
                   at<const double>(rewards),
                   at<const double>(visits),
                   static_cast<TreeReduce>(reduce),
                   temperature,
                   nodes,
                   at<double>(values),
                   at<double>(slope)};
  const py::gil_scoped_release release;
  rewardops::cpu::tree_values(a);
}

void tree_values_backward(int64_t nodes, Address parent, Address slope, Address grad, Address out) {
  const py::gil_scoped_release release;
  rewardops::cpu::tree_values_backward(nodes, at<const int64_t>(parent), at<const double>(slope),
                                       at<const double>(grad), at<double>(out));
}

bool path_ends(int64_t nodes, Address step, Address out) {
  const py::gil_scoped_release release;
  return rewardops::cpu::path_ends(nodes, at<const int64_t>(step), at<int64_t>(out));
}

// ---- entropy ------------------------------------------------------------------------------------------------

// Backward where grad is not null.
template <typename T>
void gtpo_rewards(const py::tuple& shape, const py::tuple& mask, Address rewards, const py::tuple& entropy,
                  Address groups, double alpha1, double alpha2, double threshold, double floor, const py::tuple& grad,
                  const py::tuple& out, int64_t longest, int threads) {
  GtpoArgs<T> a = gtpo_args<T>(shape, mask, rewards, entropy, grad, out);
  a.alpha1 = alpha1;
  a.alpha2 = alpha2;
  a.threshold = threshold;
  a.floor = floor;
  const int64_t* labels = at<const int64_t>(groups);
  const py::gil_scoped_release release;
  rewardops::cpu::launch_gtpo(a, labels, longest, threads);
}

// ---- scopes -------------------------------------------------------------------------------------------------

template <typename T>
void scopes(int op, const py::tuple& shape, const py::tuple& mask, const py::tuple& inputs, const py::tuple& scope,
            const py::tuple& options, Address statistics, const py::tuple& out, int threads) {
  const ScopesArgs<T> a = scopes_args<T>(op, shape, mask, inputs, scope, options, statistics, out);
  const py::gil_scoped_release release;
  rewardops::cpu::launch_scopes(a, threads);
}

// ---- segments -----------------------------------------------------------------------------------------------

template <typename T>
void row_sums(const py::tuple& shape, const py::tuple& mask, const py::tuple& values, Address out, int threads) {
  const RowSumsArgs<T> a{tokens<const T>(values), tokens<const uint8_t>(mask), rows(shape), at<T>(out)};
  const py::gil_scoped_release release;
  parallel_for(a.rows.batch, token_rows_grain(a.rows), threads,
               [&](int64_t begin, int64_t end) { kernels().of<T>().row_sums(a, begin, end); });
}

// steps: (flags, ids); to tokens: (values or gradients of steps, on_tokens, ends), or () for a reduction
template <typename T>
void segment_reduce(const py::tuple& shape, const py::tuple& mask, const py::tuple& steps, const py::tuple& values,
                    int64_t num_steps, int op, Address out, Address kept, const py::tuple& to_tokens, int threads) {
  SegmentsArgs<T> a{};
  a.values = tokens<const T>(values);
  Reader s(steps);
  a.flags = s.tokens<const uint8_t>();
  a.ids = s.tokens<const int64_t>();
  a.mask = tokens<const uint8_t>(mask);
  a.rows = rows(shape);
  a.num_steps = num_steps;
  a.op = static_cast<Reduce>(op);
  a.out = at<T>(out);
  a.kept = at<double>(kept);
  if (!to_tokens.empty()) {
    Reader t(to_tokens);
    a.grad = t.pointer<const T>();
    a.on_tokens = t.tokens<T>();
    a.ends = t.tokens<uint8_t>();
  }
  const py::gil_scoped_release release;
  if (to_tokens.empty()) rewardops::cpu::segment_reduce(a, threads);
  else rewardops::cpu::steps_to_tokens(a, threads);
}

// ---- selection ----------------------------------------------------------------------------------------------

template <typename T>
void largest(const py::tuple& shape, const py::tuple& mask, const py::tuple& values, Address scopes, Address wanted,
             const py::tuple& out, int threads) {
  const LargestArgs<T> a{tokens<const T>(values),   tokens<const uint8_t>(mask), rows(shape),
                         at<const int64_t>(scopes), at<const int64_t>(wanted),   tokens<uint8_t>(out)};
  const py::gil_scoped_release release;
  rewardops::cpu::largest(a, threads);
}

// ---- the module ---------------------------------------------------------------------------------------------

template <typename T>
void define_typed(py::module_& m, const char* suffix) {
  const auto name = [&](const char* base) { return std::string(base) + suffix; };
  m.def(name("token_kl").c_str(), call<token_kl<T>>);
  m.def(name("group_advantages").c_str(), call<group_advantages<T>>);
  m.def(name("group_advantages_backward").c_str(), call<group_advantages_backward<T>>);
  m.def(name("gtpo_rewards").c_str(), call<gtpo_rewards<T>>);
  m.def(name("returns").c_str(), call<returns<T>>);
  m.def(name("td_scan").c_str(), call<td_scan<T>>);
  m.def(name("row_sums").c_str(), call<row_sums<T>>);
  m.def(name("scopes").c_str(), call<scopes<T>>);
  m.def(name("segment_reduce").c_str(), call<segment_reduce<T>>);
  m.def(name("largest").c_str(), call<largest<T>>);
  m.def(name("nodes_to_tokens").c_str(), call<nodes_to_tokens<T>>);
}

void define_trees(py::module_& m) {
  m.def("prefix_tree_i32", call<prefix_tree<int32_t>>);
  m.def("prefix_tree_i64", call<prefix_tree<int64_t>>);
  m.def("prefix_lcp", call<prefix_lcp>);
  m.def("subtree_statistics", call<subtree_statistics>);
  m.def("tree_values", call<tree_values>);
  m.def("tree_values_backward", call<tree_values_backward>);
  m.def("path_ends", path_ends);
  m.def("nodes_to_tokens_i32", call<nodes_to_tokens<int32_t>>);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of rewardops; called by rewardops.cpp";
  m.def("isa", [] { return kernels().name; });
  m.def("use_team", [](Address team) { use_team(reinterpret_cast<Team>(team)); });
  m.def("prefer_huge_pages", [](Address begin, int64_t size) { prefer_huge_pages(at<void>(begin), size); });
  m.def("token_stats", call<token_stats>);
  m.def("token_stats_backward", call<token_stats_backward>);
  define_trees(m);
  define_typed<float>(m, "_f32");
  define_typed<double>(m, "_f64");
#ifdef REWARDOPS_HAS_CUDA
  auto cuda = m.def_submodule("cuda", "CUDA C++ kernels; called by rewardops.cuda");
  rewardops::cuda::define(cuda);
#endif
}
