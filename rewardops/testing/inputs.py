"""Generators of awkward inputs: ragged rows, holes, groups in any order, shared prefixes, odd logits."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Whatever torch's default dtype and device: float32, where the generator is.


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device=generator.device)


def _uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float32, device=generator.device)


def random_mask(
    batch: int, width: int, generator: torch.Generator, *, holes: bool = True, empty_row: bool = True
) -> Tensor:
    """A bool mask of ragged rows with holes; one row has no valid token.

    Args:
        batch: B, rows.
        width: T, tokens of a row, padding included.
        generator: the source of chance; the mask lies on its device.
        holes: mask about a quarter of the tokens within rows too.
        empty_row: give one row of several no valid token.

    Returns:
        ``[batch, width]``, bool.

    Raises:
        RuntimeError: a negative size.

    Example:
        >>> from rewardops.testing import random_mask
        >>> mask = random_mask(3, 5, torch.Generator().manual_seed(0))
        >>> mask.shape, mask[1].any().item()
        (torch.Size([3, 5]), False)
    """
    device = generator.device
    length = torch.randint(0, width + 1, (batch,), generator=generator, device=device)
    mask = torch.arange(width, device=device) < length[:, None]
    if holes:
        mask &= _uniform((batch, width), generator) > 0.25
    if empty_row and batch > 1:
        mask[batch // 2] = False
    return mask


def random_groups(batch: int, generator: torch.Generator) -> Tensor:
    """Ragged groups in random order, with labels of any size and sign; one group has a single row.

    Args:
        batch: B, rows.
        generator: the source of chance; the labels lie on its device.

    Returns:
        ``[batch]``, int64.

    Raises:
        RuntimeError: a negative size.

    Example:
        >>> from rewardops.testing import random_groups
        >>> groups = random_groups(6, torch.Generator().manual_seed(0))
        >>> groups.dtype, (groups == -(2**50)).sum().item()
        (torch.int64, 1)
    """
    device = generator.device
    labels = torch.tensor([7, -3, 2**40, 0, 5], dtype=torch.int64, device=device)
    groups = labels[torch.randint(0, len(labels), (batch,), generator=generator, device=device)]
    if batch:
        groups[torch.randint(0, batch, (), generator=generator, device=device)] = -(2**50)
    return groups


def pack(padded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Concatenate padded rows, ``padded[b, :lengths[b]]``.

    Args:
        padded: ``[B, T]`` or ``[B, T, ...]``, any dtype.
        lengths: ``[B]``, integer, tokens of each row, at most T.

    Returns:
        The packed rows ``[N, ...]``, differentiable in ``padded``, and their ``cu_seqlens`` ``[B + 1]``,
        int32.

    Raises:
        IndexError: another number of lengths than of rows, or ``padded`` of one dimension.

    Example:
        >>> from rewardops.testing import pack
        >>> packed, cu_seqlens = pack(torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1]))
        >>> packed.tolist(), cu_seqlens.tolist()
        ([1, 2, 3], [0, 2, 3])
    """
    inside = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
    cu = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=padded.device)
    cu[1:] = lengths.cumsum(0)
    return padded[inside], cu


def unpack(packed: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Padded rows of packed values, the inverse of :func:`pack`.

    Args:
        packed: ``[N]``, any dtype.
        lengths: ``[B]``, integer, tokens of each row; their sum is N.
        width: T, tokens of a padded row.

    Returns:
        ``[B, width]``, with zeros after each row. Differentiable in ``packed``.

    Raises:
        RuntimeError: lengths that do not sum to N, or exceed the width.

    Example:
        >>> from rewardops.testing import unpack
        >>> unpack(torch.tensor([1, 2, 3]), torch.tensor([2, 1]), width=2).tolist()
        [[1, 2], [3, 0]]
    """
    inside = torch.arange(width, device=packed.device) < lengths[:, None]
    out = packed.new_zeros((len(lengths), width))
    out[inside] = packed
    return out


def shared_prefix_tokens(groups: Tensor, width: int, generator: torch.Generator, *, vocab: int = 3) -> Tensor:
    """Tokens whose rows branch off one another at random depths within their group.

    Args:
        groups: ``[B]``, integer labels.
        width: T, tokens of a row.
        generator: the source of chance; the tokens lie on its device.
        vocab: ids run from 0 to ``vocab - 1``.

    Returns:
        ``[B, width]``, int64.

    Raises:
        RuntimeError: no vocabulary, or a negative width.

    Example:
        >>> from rewardops.testing import shared_prefix_tokens
        >>> tokens = shared_prefix_tokens(torch.tensor([0, 0, 1]), 5, torch.Generator().manual_seed(0))
        >>> tokens.shape
        torch.Size([3, 5])
    """
    device = generator.device
    tokens = torch.randint(0, vocab, (len(groups), width), generator=generator, device=device)
    for i in range(1, len(groups)):
        earlier = (groups[:i] == groups[i]).nonzero()[:, 0]
        if len(earlier):
            j = earlier[torch.randint(0, len(earlier), (), generator=generator, device=device)]
            depth = int(torch.randint(0, width + 1, (), generator=generator, device=device))
            tokens[i, :depth] = tokens[j, :depth]
    return tokens


# ---- logits ------------------------------------------------------------------------------------------------

LOGITS = (
    "normal",
    "far above zero",
    "far below zero",
    "peaked",
    "equal",
    "tiny",
    "minus infinity",
    "one column",
)


def adversarial_logits(kind: str, rows: int, vocab: int, generator: torch.Generator) -> Tensor:
    """Rows of logits of one of the kinds ``LOGITS``: numerically difficult for kernels.

    ``far above zero`` and ``far below zero`` are offset by 1e4: sums not relative to the largest logit lose
    their digits; a maximum that starts from 0, or padding columns of value 0, give wrong results. ``peaked``
    rows have an entropy near 0. ``minus infinity`` has -inf in a tenth of the columns and in the first half
    of the last row; ``one column`` in all columns but one.

    Args:
        kind: one of ``LOGITS``.
        rows: number of rows.
        vocab: V, columns, at least 1.
        generator: the source of chance; the logits lie on its device.

    Returns:
        ``[rows, vocab]``, float32.

    Raises:
        ValueError: an unknown kind.
        RuntimeError: no column.

    Example:
        >>> from rewardops.testing import adversarial_logits
        >>> logits = adversarial_logits("one column", 2, 4, torch.Generator().manual_seed(0))
        >>> logits.isfinite().sum(1).tolist()
        [1, 1]
    """
    if kind not in LOGITS:
        raise ValueError(f"kind: got {kind!r}, want one of {', '.join(repr(k) for k in LOGITS)}")
    x = _normal((rows, vocab), generator) * 3
    column = torch.randint(0, vocab, (rows, 1), generator=generator, device=generator.device)
    if kind.startswith("far"):
        x += 1e4 if kind == "far above zero" else -1e4
    elif kind == "peaked":
        x.scatter_(1, column, 40.0)
    elif kind == "equal":
        x = x[:, :1].expand(rows, vocab).clone()
    elif kind == "tiny":
        x *= 1e-30
    elif kind == "minus infinity":
        x[_uniform((rows, vocab), generator) < 0.1] = -torch.inf
        x[-1:, : vocab // 2] = -torch.inf
        x.scatter_(1, column.clamp(min=vocab // 2), 1.0)  # every row has a finite logit
    elif kind == "one column":
        x = torch.full_like(x, -torch.inf).scatter_(1, column, 2.0)
    return x


def far_rows(x: Tensor) -> Tensor:
    """Copy rows into a view whose last row begins more than 2^31 elements after the first.

    Offsets in 32 bits wrap around, to addresses before the first row: that memory is allocated and holds
    zeros. On the CPU only touched pages use memory; on a GPU all of it is allocated (2^32 elements and more).

    Args:
        x: ``[rows, width]``, any dtype and device.

    Returns:
        The view, of the shape, dtype and device of ``x``, without its gradient.

    Raises:
        ValueError: a tensor of another number of dimensions.

    Example:
        >>> from rewardops.testing import far_rows
        >>> far = far_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> far.tolist(), far.stride(0) > 2**31
        ([[1.0, 2.0], [3.0, 4.0]], True)
    """
    rows, width = x.shape
    stride = 2**31 // max(rows - 1, 1) + 4096
    before = 2**31 + 4096
    total = before + (rows - 1) * stride + width
    if x.device.type == "cpu":
        buffer = _unreserved(total * x.element_size()).view(x.dtype)
    else:
        buffer = torch.zeros(total, dtype=x.dtype, device=x.device)
    view = buffer.as_strided((rows, width), (stride, 1), before)
    with torch.no_grad():
        view.copy_(x)
    return view


def _unreserved(size: int) -> Tensor:
    """Zeroed memory of which the system allocates only touched pages."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.uint8)


def logit_cases(
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    vocabs: Sequence[int] = (1, 7, 1000, 4099),
    rows: int = 5,
    seed: int = 0,
    device: torch.device | str = "cpu",
    far: bool = True,
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Cases of logits and sampled tokens for :func:`check_op`.

    Every kind of :func:`adversarial_logits` in every dtype, vocabularies that are no multiple of a block,
    rows with a stride, and with ``far`` :func:`far_rows` (on a GPU only where 40 GiB are free).

    Args:
        dtypes: of the logits.
        vocabs: numbers of columns; rows with a stride and far rows have the last.
        rows: number of rows.
        seed: of the generator.
        device: of the tensors.
        far: True adds rows 2^31 elements apart.

    Returns:
        An iterator of ``(name, (logits [rows, V], tokens [rows]))``, tokens in int64.

    Raises:
        RuntimeError: a vocabulary without a column.

    Example:
        >>> from rewardops.testing import logit_cases
        >>> cases = logit_cases(dtypes=[torch.bfloat16], vocabs=[7], far=False)
        >>> name, (logits, tokens) = next(cases)
        >>> name, logits.shape, tokens.shape
        ('normal, bfloat16, V=7', torch.Size([5, 7]), torch.Size([5]))
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def tokens(logits: Tensor) -> Tensor:
        return logits.float().argmax(1)  # a column with a finite logit

    for dtype in dtypes:
        short = str(dtype).removeprefix("torch.")
        for vocab in vocabs:
            for kind in LOGITS:
                logits = adversarial_logits(kind, rows, vocab, generator).to(device, dtype)
                yield f"{kind}, {short}, V={vocab}", (logits, tokens(logits))
        wide = _normal((rows, 2 * vocabs[-1]), generator).to(device, dtype)
        logits = wide[:, : vocabs[-1]]
        yield f"strided rows, {short}", (logits, tokens(logits))
    if far and (torch.device(device).type == "cpu" or torch.cuda.mem_get_info()[0] > 40 * 2**30):
        logits = far_rows(_normal((rows, vocabs[-1]), generator).to(device, dtypes[0]))
        yield "rows 2^31 elements apart", (logits, tokens(logits))


def reward_cases(
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    batch: int = 24,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Cases of rewards and group labels for :func:`check_op`.

    Groups in any order with one of a single row, all rewards equal, rewards of 0 and 1, rewards far from 0
    and close together, one outlier, and an empty batch.

    Args:
        dtypes: of the rewards.
        batch: B, rows.
        seed: of the generator.
        device: of the tensors.

    Returns:
        An iterator of ``(name, (rewards [B], groups [B]))``, groups in int64.

    Raises:
        RuntimeError: a negative batch.

    Example:
        >>> from rewardops.testing import reward_cases
        >>> [name for name, _ in reward_cases(dtypes=[torch.float32])][:3]
        ['normal, float32', 'zero or one, float32', 'equal, float32']
    """
    g = torch.Generator("cpu").manual_seed(seed)
    groups = random_groups(batch, g)
    groups[: batch // 2] = groups[batch // 2 :]
    outlier = torch.arange(batch, device=g.device) == 0
    kinds = {
        "normal": _normal((batch,), g),
        "zero or one": (_uniform((batch,), g) > 0.5).to(torch.float32),
        "equal": torch.full((batch,), 0.7, dtype=torch.float32, device=g.device),
        "far from zero": 1e4 + _normal((batch,), g),
        "an outlier": torch.where(outlier, 1e6, _normal((batch,), g)),
        "empty": torch.zeros(0, dtype=torch.float32, device=g.device),
    }
    for dtype in dtypes:
        for kind, rewards in kinds.items():
            labels = groups[: len(rewards)]
            yield (
                f"{kind}, {str(dtype).removeprefix('torch.')}",
                (rewards.to(device, dtype), labels.to(device)),
            )
