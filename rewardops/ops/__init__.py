"""Definitions of every op for ``torch.library``: schema, fake and gradient, one file per family."""
