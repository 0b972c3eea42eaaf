"""The CPU backend: allocates outputs and hands addresses to the compiled module, one file per family."""
