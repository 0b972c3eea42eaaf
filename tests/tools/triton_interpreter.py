"""Triton's interpreter with the same results, in a fraction of the time."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def hasten() -> None:
    """Patch the interpreter of this process; kernels compute the same, except for the order of scans.

    The interpreter patches the language at each call of a device function, which is half of its time: once per
    launch suffices. It scans and reduces element by element, a warp by doubling. It computes every sum and product
    of integers a second time to see an overflow, and ignores what it sees. And it makes the type, the shape and
    the number of elements of every value anew: they are kept here.
    """
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    keep_types()
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(fn):
        if fn.__module__ in patched:
            return None
        patched.add(fn.__module__)
        return patch(fn)

    def launch_anew(*args, **kwargs):
        patched.clear()
        return launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
    interpreter.ScanOps.generic_scan, interpreter.ReduceOps.generic_reduce = _scan, _reduce


def keep_types() -> None:
    """Make equal types and shapes once, and leave values alone that have the wanted type or shape already."""
    unwrap, same, broadcast = (
        core._unwrap_if_constexpr,
        core.dtype.__eq__,
        TritonSemantic.broadcast_impl_value,
    )
    cast, common = TritonSemantic.cast, TritonSemantic.computation_type_impl
    of_numpy, new_block = interpreter._get_np_dtype, core.block_type.__init__
    block_types, numpy_types, commons = {}, {}, {}
    plain = frozenset((int, bool, float, str, type(None), core.tensor, core.dtype))

    @functools.cache
    def shape_of(sizes):
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

    def unwrap_if_constexpr(x):
        if type(x) is core.constexpr:
            return x.value
        return x if type(x) in plain else unwrap(x)

    def equal(self, other):
        return self is other or same(self, other)

    def block_type(self, element_ty, shape):
        key = tuple(map(unwrap_if_constexpr, shape)), element_ty.name
        if key not in block_types:
            new_block(self, element_ty, shape)
            block_types[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = block_types[key]

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_of(tuple(type.shape.values) if type.is_block() else ())

    def np_dtype(type):
        name = type.name
        if name not in numpy_types:
            numpy_types[name] = of_numpy(type)
        return numpy_types[name]

    def computation_type(self, a, a_is_scalar, b, b_is_scalar, div_or_mod):
        key = a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod
        if key not in commons:
            commons[key] = common(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return commons[key]

    def cast_unless_equal(self, input, dst_ty, fp_downcast_rounding=None):
        return input if input.dtype is dst_ty else cast(self, input, dst_ty, fp_downcast_rounding)

    def broadcast_unless_equal(self, lhs, rhs):
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    def patch_attr(obj, name, member, builder, scope):
        def call(*args, **kwargs):
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return member(*args, **kwargs)

        scope.set_attr(obj, name, call)

    core._unwrap_if_constexpr, core.dtype.__eq__ = unwrap_if_constexpr, equal
    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    TritonSemantic.computation_type_impl, TritonSemantic.cast = computation_type, cast_unless_equal
    TritonSemantic.broadcast_impl_value = broadcast_unless_equal
    interpreter._get_np_dtype, interpreter._patch_attr = np_dtype, patch_attr


def _scan(self, tensors):
    """``ScanOps.generic_scan``: Hillis and Steele's scan; each step calls the combination once on whole blocks."""
    arrays, dtypes = [x.handle.data for x in tensors], [x.dtype for x in tensors]
    place = np.indices(arrays[0].shape)[self.axis]
    distance = 1
    while distance < arrays[0].shape[self.axis]:
        both = [np.roll(x, distance, self.axis) for x in arrays] + arrays
        both = self.combine_fn.fn(*map(self.to_tensor, both, dtypes * 2))
        both = both if isinstance(both, tuple) else (both,)
        arrays = [np.where(place < distance, x, y.handle.data) for x, y in zip(arrays, both, strict=True)]
        distance *= 2
    return [self.to_tensor(*x) for x in zip(arrays, dtypes, strict=True)]


def _reduce(self, tensors):
    """``ReduceOps.generic_reduce``: the last element of a scan."""
    if self.axis is None or self.keep_dims:
        raise NotImplementedError("tl.reduce of all axes, or with keep_dims")
    last = [np.take(x.handle.data, -1, self.axis) for x in _scan(self, tensors)]
    return [self.to_tensor(*x) for x in zip(last, (x.dtype for x in tensors), strict=True)]
