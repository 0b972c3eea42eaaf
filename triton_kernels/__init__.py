"""The Triton backend, one file per family; imported as ``rewardops.triton_kernels``."""
