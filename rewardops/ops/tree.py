"""Ops of the tree family."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..core.dispatch import define
from ..core.records import schema_of
from ..reference.tree import TreeArgs

# ---- nodes by index ----------------------------------------------------------------------------------------


def _gradient_sums(ctx, grad):  # type: ignore[no-untyped-def]
    return {"grad": at_nodes(grad, *ctx.saved_tensors)}


# The sums of terms at each node, in order: also by itself, with the gradient that belongs to it.
sums_at_nodes = define(
    "tree",
    "at_nodes_backward(Tensor grad, Tensor index, SymInt size) -> Tensor",
    tensors={"grad": Annotated[Tensor, "real", "N", "C"], "index": Annotated[Tensor, "int64", "N"]},
    fake=lambda grad, index, size: grad.new_empty(size, grad.shape[1]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
    backward=_gradient_sums,
)


def _setup_at(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    values, index = inputs
    ctx.save_for_backward(index)
    ctx.size = values.shape[0]


# A separate op, so that a compiler does not turn its gradient into atomic additions.
at_nodes = define(
    "tree",
    "at_nodes(Tensor values, Tensor index) -> Tensor",
    tensors={"values": Annotated[Tensor, "real", "M", "C"], "index": Annotated[Tensor, "int64", "N"]},
    fake=lambda values, index: values.new_empty(index.shape[0], values.shape[1]),
    setup_context=_setup_at,
    backward=lambda ctx, grad: {"values": sums_at_nodes(grad, ctx.saved_tensors[0], ctx.size)},
)

# An op, so that the number of steps, which depends on the number of nodes, is not part of a compiled graph.
path_ends = define(
    "tree",
    "path_ends(Tensor step) -> Tensor",
    tensors={"step": Annotated[Tensor, "int64", "M"]},
    fake=torch.empty_like,
)


sibling_labels = define(
    "tree",
    "sibling_labels(Tensor parent) -> Tensor",
    tensors={"parent": Annotated[Tensor, "int64", "M"]},
    fake=torch.empty_like,
)


# ---- TreeRL ------------------------------------------------------------------------------------------------

_ON_NODES = {"parent": Annotated[Tensor, "int64", "M"], "leaves": Annotated[Tensor, "float64", "M"]}

_tree_rl_backward = define(
    "tree",
    "tree_rl_backward(Tensor grad, Tensor parent, Tensor leaves, Tensor root, str form) -> Tensor",
    tensors={
        "grad": Annotated[Tensor, "float64", "M", "C"],
        **_ON_NODES,
        "root": Annotated[Tensor, "int64", "M"],
    },
    fake=lambda grad, parent, leaves, root, form: grad.new_empty(grad.shape),
)


def _setup_tree_rl(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    _, parent, leaves, form = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(parent, leaves, output[1])
    ctx.form = form


tree_rl = define(
    "tree",
    "tree_rl(Tensor values, Tensor parent, Tensor leaves, str form) -> (Tensor out, Tensor root)",
    tensors={"values": Annotated[Tensor, "float64", "M", "C"], **_ON_NODES},
    fake=lambda values, parent, leaves, form: (
        values.new_empty(values.shape),
        parent.new_empty(parent.shape),
    ),
    setup_context=_setup_tree_rl,
    backward=lambda ctx, grad, _: {"values": _tree_rl_backward(grad, *ctx.saved_tensors, ctx.form)},
)


# ---- values from the leaves up -----------------------------------------------------------------------------

_tree_values_backward = define(
    "tree",
    "tree_values_backward(Tensor grad, Tensor parent, Tensor slope) -> Tensor",
    tensors={
        "grad": Annotated[Tensor, "float64", "M"],
        "parent": Annotated[Tensor, "int64", "M"],
        "slope": Annotated[Tensor, "float64", "M"],
    },
    fake=lambda grad, parent, slope: slope.new_empty(slope.shape),
)


def _setup_values(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    (args,) = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(args.parent, output[1])


tree_values = define(
    "tree",
    f"tree_values({schema_of(TreeArgs)}) -> (Tensor values, Tensor slope)",
    record=TreeArgs,
    fake=lambda args: (
        args.rewards.new_empty(args.rewards.shape),
        args.rewards.new_empty(args.rewards.shape),
    ),
    setup_context=_setup_values,
    backward=lambda ctx, grad, _: {"rewards": _tree_values_backward(grad, *ctx.saved_tensors)},
)
