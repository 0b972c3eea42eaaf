// The submodule of the CUDA C++ kernels as a module of its own, its kernels run by the harness.
#include "cuda/bindings.h"

PYBIND11_MODULE(cuda_on_host, m) { rewardops::cuda::define(m); }
