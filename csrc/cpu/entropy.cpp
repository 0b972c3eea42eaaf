#include "entropy.h"

#include "groups.h"
#include "parallel.h"
#include "rewardops/cpu/kernels.h"

namespace rewardops::cpu {

template <typename T>
void launch_gtpo(GtpoArgs<T> a, const int64_t* labels, int64_t longest, int threads) {
  const GroupIndex index(labels, a.rows.batch);
  a.groups = index.view();
  const TypedKernels<T>& k = kernels().of<T>();
  a.blocks = (longest + kGtpoBlock - 1) / kGtpoBlock;
  const auto kernel = a.grad.data ? k.gtpo_backward : k.gtpo;
  parallel_for(a.groups.count * a.blocks, 1, threads, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

template void launch_gtpo<float>(GtpoArgs<float>, const int64_t*, int64_t, int);
template void launch_gtpo<double>(GtpoArgs<double>, const int64_t*, int64_t, int);

}  // namespace rewardops::cpu
