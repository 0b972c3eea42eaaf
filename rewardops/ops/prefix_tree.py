"""Ops of the prefix_tree family."""

from __future__ import annotations

import functools
from typing import Annotated

import torch
from torch import Tensor

from ..core.dispatch import define
from ..core.kinds import IdRows
from ..core.precision import widest
from ..core.records import save_record, saved_record, schema_of
from ..reference.prefix_tree import (
    NodeTokensArgs,
    NodeValues,
    PrefixTreeArgs,
    SubtreeArgs,
    TreeRows,
)

_SUBTREES, _NODE_TOKENS = schema_of(SubtreeArgs), schema_of(NodeTokensArgs)


# ---- the tree ----------------------------------------------------------------------------------------------

prefix_tree = define(
    "prefix_tree",
    f"prefix_tree({schema_of(PrefixTreeArgs)}) -> (Tensor rows, Tensor nodes)",
    record=PrefixTreeArgs,
    fake=lambda args: (
        args.groups.new_empty(5, args.groups.shape[0]),
        args.groups.new_empty(4, 2 * args.groups.shape[0]),
    ),
)

prefix_lcp = define(
    "prefix_tree",
    "prefix_lcp(Tensor rows, Tensor groups, SymInt most) -> (Tensor members, Tensor lcp)",
    tensors={"rows": TreeRows, "groups": IdRows},
    fake=lambda rows, groups, most: tuple(
        groups.new_empty((groups.shape[0], most), dtype=torch.int32) for _ in range(2)
    ),
)


# ---- statistics of the rows of nodes -----------------------------------------------------------------------

subtree_statistics_backward = define(
    "prefix_tree",
    f"subtree_statistics_backward(Tensor grad, Tensor out, Tensor total, Tensor centre, {_SUBTREES})"
    " -> (Tensor, Tensor)",
    record=SubtreeArgs,
    tensors={
        "grad": NodeValues,
        "out": NodeValues,
        "total": Annotated[Tensor, "float64", "2B", "1"],
        "centre": NodeValues,
    },
    fake=lambda grad, out, total, centre, args: (
        args.x.new_empty(args.x.shape),
        grad.new_empty(0) if args.weights is None else args.weights.new_empty(args.weights.shape),
    ),
)


def _setup_statistics(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    save_record(ctx, *inputs, *output)


def _gradient_statistics(ctx, grad, *_):  # type: ignore[no-untyped-def]
    args, results = saved_record(ctx)
    on_x, on_weights = subtree_statistics_backward(grad, *results, *args)
    return {"x": on_x, "weights": None if args.weights is None else on_weights}


def _fake_statistics(args: SubtreeArgs) -> tuple[Tensor, Tensor, Tensor]:
    nodes, channels = args.nodes.shape[1], args.x.shape[1]
    make = functools.partial(args.x.new_empty, dtype=widest(args.x.device))
    return make(nodes, channels), make(nodes, 1), make(nodes, channels)


subtree_statistics = define(
    "prefix_tree",
    f"subtree_statistics({_SUBTREES}) -> (Tensor out, Tensor total, Tensor centre)",
    record=SubtreeArgs,
    fake=_fake_statistics,
    setup_context=_setup_statistics,
    backward=_gradient_statistics,
)


# ---- node values on tokens ---------------------------------------------------------------------------------

nodes_to_tokens_backward = define(
    "prefix_tree",
    f"nodes_to_tokens_backward(Tensor grad, {_NODE_TOKENS}) -> (Tensor, Tensor, Tensor, Tensor)",
    record=NodeTokensArgs,
    tensors={"grad": Annotated[Tensor, "real", "C", "..."]},
    fake=lambda grad, args: args.zero_gradients(grad),
)


def _setup_tokens(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    args, _ = inputs
    save_record(ctx, args)


def _gradient_tokens(ctx, grad):  # type: ignore[no-untyped-def]
    if not grad.dtype.is_floating_point:
        return {}
    args, _ = saved_record(ctx)
    grads = nodes_to_tokens_backward(grad, *args)
    terms = zip(NodeTokensArgs._fields, args, grads, strict=False)
    return {name: None if term is None else g for name, term, g in terms}


def _fake_tokens(args: NodeTokensArgs, dtype: torch.dtype) -> Tensor:
    return args.rows.new_empty((args.channels, *args.shape), dtype=dtype)


nodes_to_tokens = define(
    "prefix_tree",
    f"nodes_to_tokens({_NODE_TOKENS}, ScalarType dtype) -> Tensor",
    record=NodeTokensArgs,
    fake=_fake_tokens,
    setup_context=_setup_tokens,
    backward=_gradient_tokens,
)
