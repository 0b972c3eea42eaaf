"""The specification: every op in plain PyTorch, one file per family, exact in float64.

Each forward is written to be read; each ``*_backward`` is the formula that the fast backends implement and
is itself held to autograd through the forward by the tests. May synchronise with the device.
"""
