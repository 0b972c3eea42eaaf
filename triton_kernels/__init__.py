"""The Triton backend: files per family, and files of shared code; imported as ``rewardops.triton_kernels``."""
