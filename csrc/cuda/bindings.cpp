// From Python to the launchers, as csrc/bindings.cpp does for the CPU; the last argument is the stream.
#include "cuda/bindings.h"

#include <string>

#include "arguments.h"
#include "cuda/returns.h"

namespace rewardops::cuda {
namespace {

template <typename T>
void define_typed(py::module_& m, const char* suffix) {
  const auto name = [&](const char* base) { return std::string(base) + suffix; };
  (void)name;
}

}  // namespace

void define(py::module_& m) {
  define_typed<float>(m, "_f32");
  define_typed<double>(m, "_f64");
}

}  // namespace rewardops::cuda
