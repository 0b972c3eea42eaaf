"""CUDA C++ kernels: the callers of ``rewardops.cpp``, on a stream; one file per family with such kernels."""
