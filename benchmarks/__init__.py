"""Microbenchmarks: every op against the plain formula, eager and compiled, on the same data."""
