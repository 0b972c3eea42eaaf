// The submodule of the CUDA C++ kernels.
#pragma once

#include <pybind11/pybind11.h>

namespace rewardops::cuda {

void define(pybind11::module_& m);

}  // namespace rewardops::cuda
