"""The Triton backend: a file per family, and files by theme; imported as ``rewardops.triton_kernels``."""
