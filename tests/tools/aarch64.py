"""The compiled module as it runs on AArch64: cross-compiled, and served by an emulator.

The module becomes a program without Python (`tests/aarch64`). In a process that calls :func:`load`, the backend
`cpp` sends it every call together with the memory that the addresses lie in, and takes that memory back.
``python tests/tools/aarch64.py`` takes the arguments of pytest, such as ``tests/ops -k cpp``.
"""

from __future__ import annotations

import ctypes
import fcntl
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from compiled import tool

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "aarch64"
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def why_not() -> str | None:
    """The reason why nothing of AArch64 can run here; None if it can."""
    if COMPILER is None:
        return "no aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)"
    if EMULATOR is None:
        return "no qemu-aarch64 (Debian: qemu-user)"
    return None if tool("cmake") and tool("ninja") else "no cmake, or no ninja"


def build() -> Path:
    """Build the program, recompiling changed sources; safe to call from several processes at once."""
    BUILD.mkdir(parents=True, exist_ok=True)
    configure = [
        str(tool("cmake")), "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",  # the emulator needs no libraries of that machine
        f"-Dpybind11_DIR={ROOT / 'tests' / 'aarch64'}", f"-DCMAKE_MODULE_PATH={ROOT / 'tests' / 'aarch64'}",
        "-DREWARDOPS_CUDA=0",
    ]  # fmt: skip
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [str(tool("cmake")), "--build", str(BUILD)]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(" ".join(command) + "\n" + (done.stdout + done.stderr)[-8000:])
    return BUILD / "_C"


class Remote:
    """Stands in for ``rewardops._C``. Addresses are those that tensors have told since it was made."""

    def __init__(self, program: Path) -> None:
        self.process = subprocess.Popen(
            [str(EMULATOR), str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.calls: dict[str, int] = {}
        self.memory: dict[int, tuple[int, int]] = {}  # by address: begin and size of the tensor's storage
        data_ptr = torch.Tensor.data_ptr

        def told(tensor: torch.Tensor) -> int:
            address = data_ptr(tensor)
            storage = tensor.untyped_storage()
            self.memory[address] = storage.data_ptr(), storage.nbytes()
            return address

        torch.Tensor.data_ptr = told  # type: ignore[method-assign]

    def use_team(self, team: int) -> None:
        """Nothing: OpenMP is on this side."""

    def prefer_huge_pages(self, begin: int, size: int) -> None:
        """Nothing: the memory is on this side."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "cuda":
            raise AttributeError(name)
        return lambda *arguments: self.call(name, arguments)

    def call(self, name: str, arguments: tuple[Any, ...]) -> int | str:
        self.calls[name] = self.calls.get(name, 0) + 1
        blocks: list[tuple[int, int]] = []
        encoded = self.encode(arguments, blocks)
        to, back = self.process.stdin, self.process.stdout
        assert to is not None
        assert back is not None
        to.write(text(name) + struct.pack("q", len(blocks)))
        for begin, size in blocks:
            to.write(struct.pack("qq", begin, size) + ctypes.string_at(begin, size))
        to.write(encoded)
        to.flush()
        number, length = struct.unpack("qq", exactly(back, 16))
        characters = exactly(back, length).decode()
        for begin, size in blocks:
            ctypes.memmove(begin, exactly(back, size), size)
        return characters or number

    def encode(self, x: Any, blocks: list[tuple[int, int]]) -> bytes:
        """A value as `tests/aarch64/main.cpp` reads it; adds the blocks of memory that it refers to."""
        if isinstance(x, tuple):
            return b"t" + struct.pack("q", len(x)) + b"".join(self.encode(y, blocks) for y in x)
        if isinstance(x, str):
            return b"s" + text(x)
        if isinstance(x, float):
            return b"d" + struct.pack("d", x)
        if x == 0 or x not in self.memory:
            return b"i" + struct.pack("q", x)
        block = self.memory[x]
        if block not in blocks:
            blocks.append(block)
        return b"p" + struct.pack("qq", blocks.index(block), x - block[0])


def text(x: str) -> bytes:
    return struct.pack("q", len(x)) + x.encode()


def exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise RuntimeError("the program for AArch64 has ended: see its message above")
    return data


def load() -> Remote:
    """Use the program as ``rewardops._C``, before the first import."""
    sys.modules["rewardops._C"] = remote = Remote(build())  # type: ignore[assignment]
    return remote


def main(arguments: Sequence[str]) -> int:
    if why := why_not():
        print(why)
        return 1
    import pytest

    load()
    return pytest.main(list(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
