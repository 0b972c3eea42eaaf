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
    """A bool mask of ragged rows with holes; one row has no valid token."""
    device = generator.device
    length = torch.randint(0, width + 1, (batch,), generator=generator, device=device)
    mask = torch.arange(width, device=device) < length[:, None]
    if holes:
        mask &= _uniform((batch, width), generator) > 0.25
    if empty_row and batch > 1:
        mask[batch // 2] = False
    return mask


def random_groups(batch: int, generator: torch.Generator) -> Tensor:
    """Ragged groups in random order, with labels of any size and sign; one group has a single row."""
    device = generator.device
    labels = torch.tensor([7, -3, 2**40, 0, 5], dtype=torch.int64, device=device)
    groups = labels[torch.randint(0, len(labels), (batch,), generator=generator, device=device)]
    if batch:
        groups[torch.randint(0, batch, (), generator=generator, device=device)] = -(2**50)
    return groups


def pack(padded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Concatenated rows ``padded[b, :lengths[b]]``, and their ``cu_seqlens`` (int32)."""
    inside = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
    cu = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=padded.device)
    cu[1:] = lengths.cumsum(0)
    return padded[inside], cu


def unpack(packed: Tensor, lengths: Tensor, width: int) -> Tensor:
    """The inverse of :func:`pack`, with zeros after each row."""
    inside = torch.arange(width, device=packed.device) < lengths[:, None]
    out = packed.new_zeros((len(lengths), width))
    out[inside] = packed
    return out


def shared_prefix_tokens(groups: Tensor, width: int, generator: torch.Generator, *, vocab: int = 3) -> Tensor:
    """Tokens ``[B, width]`` whose rows branch off one another at random depths within their group."""
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
    """Rows of logits ``[rows, vocab]``, float32, of one of the kinds ``LOGITS``: numerically difficult for kernels.

    ``far above zero`` and ``far below zero`` are offset by 1e4: sums not relative to the largest logit lose their
    digits; a maximum that starts from 0, or padding columns of value 0, give wrong results. ``peaked`` rows have
    an entropy near 0. ``minus infinity`` has -inf in a tenth of the columns and in the first half of the last
    row; ``one column`` in all columns but one.
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
    """The rows of ``x`` ``[rows, width]`` in a view whose last row begins more than 2^31 elements after the first.

    Offsets in 32 bits wrap around, to addresses before the first row: that memory is allocated and holds zeros.
    On the CPU only touched pages use memory; on a GPU all of it is allocated (2^32 elements and more).
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
    """Cases ``(name, (logits [rows, vocab], tokens [rows]))`` for :func:`check_op`.

    Every kind of :func:`adversarial_logits` in every dtype, vocabularies that are no multiple of a block, rows
    with a stride, and with ``far`` :func:`far_rows` (on a GPU only where 40 GiB are free).
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
    """Cases ``(name, (rewards [B], groups [B]))`` for :func:`check_op`.

    Groups in any order with one of a single row, all rewards equal, rewards of 0 and 1, rewards far from 0 and
    close together, one outlier, and an empty batch.
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
