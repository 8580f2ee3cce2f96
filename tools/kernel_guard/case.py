"""What the compile guard compiles: one kernel, for one set of types, constants and options.

Each module with kernels has one of its name in `cases`, with `compile_cases() -> list[Case]`;
`make kernels` compiles them for every GPU that the project supports, without having one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Loop:
    """A loop of a kernel as its author means it, so that executed instructions can be counted.

    Sibling loops are listed in the order of the source. A loop that the compiler unrolls whole
    (a short constant count) is absent from the binary, its instructions part of the body around it.

    Attributes:
        name: for messages, for example "rounds".
        trips: iterations per execution of the body around it. For the loop of a persistent kernel
            over its tiles give a typical number (100), which spreads the prologue over them.
        inner: the loops in its body.
        marker: (part of an opcode, how many of these one iteration has outside of inner loops), for
            example ("LDG", 1): by it a loop that the compiler has unrolled by a factor is
            recognised, and one that it has left out. Without one a loop in the binary is assumed to
            be not unrolled.
    """

    name: str
    trips: float
    inner: tuple[Loop, ...] = ()
    marker: tuple[str, int] | None = None


@dataclass(frozen=True)
class Case:
    """One kernel to compile, with everything that decides its machine code.

    Attributes:
        kernel: name of the kernel as it is shown, for example "encode".
        variant: the rest of the name, for example "64x64 k=8 fp32 delta, fp32 gradient". The two
            together are unique.
        fn: the `triton.jit` function.
        signature: type of every argument that is no constant, as Triton writes types: "*fp32",
            "*i64", "i32", "fp32".
        constexprs: value of every `tl.constexpr` argument.
        options: launch options (`num_warps`, `num_stages`, `maxnreg`, `enable_fp_fusion`); those
            that only NVIDIA's backend knows are left out for AMD.
        aligned: arguments that the launcher guarantees to be divisible by 16: pointers by address,
            integers by value. None: all pointers and no integers.
        loops: the outermost loops.
        tiles: how many tiles one program does, with the trips of `loops` (100 trips of a loop
            over batches of 4 tiles: 400).
        elements: elements of one tile.
        tags: what else the guard holds it to: "64x64" (the spill ceiling of 64 bytes on sm_90 where
            k <= 32), "rounds" (its loop named "rounds" contains no barrier).
    """

    kernel: str
    variant: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] | None = None
    loops: tuple[Loop, ...] = ()
    tiles: float = 1
    elements: int = 4096
    tags: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """`kernel` and `variant`."""
        return f"{self.kernel} {self.variant}".rstrip()
