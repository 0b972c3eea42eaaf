"""Microbenchmarks: every op against the plain formula, eager and under torch.compile, on the same data."""
