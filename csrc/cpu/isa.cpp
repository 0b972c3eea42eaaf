// The choice of the instruction set whose kernels this process runs.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "rewardops/cpu/kernels.h"

namespace rewardops::cpu {

#ifdef REWARDOPS_HAS_PORTABLE
namespace portable {
extern const Kernels table;
}
#endif
#ifdef REWARDOPS_HAS_AVX2
namespace avx2 {
extern const Kernels table;
}
#endif
#ifdef REWARDOPS_HAS_AVX512
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

const Kernels& choose() {
  const char* wanted = std::getenv("REWARDOPS_ISA");
  const auto allowed = [&](const Kernels& k) { return !wanted || !*wanted || !std::strcmp(wanted, k.name); };
#ifdef REWARDOPS_HAS_AVX512
  if (allowed(avx512::table) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return avx512::table;
#endif
#ifdef REWARDOPS_HAS_AVX2
  if (allowed(avx2::table) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::table;
#endif
#ifdef REWARDOPS_HAS_PORTABLE
  if (allowed(portable::table)) return portable::table;
#endif
  throw std::runtime_error(std::string("REWARDOPS_ISA: got '") + (wanted ? wanted : "") +
                           "', which this build or this machine does not have");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace rewardops::cpu
