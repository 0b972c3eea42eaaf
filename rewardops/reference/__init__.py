"""The specification: every op in plain PyTorch, one file per family, exact in float64.

Each forward pass is written for reading. Each ``*_backward`` is the formula that the fast backends implement; the
tests compare it with autograd through the forward pass. The ops may synchronise with the device.
"""
