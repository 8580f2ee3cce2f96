"""How replicas learn from each other, as options of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from psyche_fast.links import Link
from psyche_fast.options import Amount, Count, Positive, Section, Share, flag
from psyche_fast.options import describe as _help


class Exchange(Section, frozen=True, kw_only=True):
    """How replicas learn from each other, for `rank.method`; None is what the method has."""

    method: Annotated[
        str | None,
        _help("distro, demo, demo-v2, sparseloco, diloco, streaming-diloco, muloco, random-k, dense"
              ", or one of a package: how replicas learn"),
    ] = None  # fmt: skip
    every: Annotated[Positive | None, _help("method: local steps until a part's turn")] = None
    fragments: Annotated[Positive | None, _help("method: parts of it that take turns")] = None
    delay: Annotated[Count | None, _help("method: steps from sending to applying")] = None
    mix: Annotated[
        str | None, _help("method: share of its own that a replica keeps then, or rebase")
    ] = None  # fmt: skip
    chunk: Annotated[Positive | None, _help("method: side of a chunk")] = None
    topk: Annotated[Positive | None, _help("method: entries sent per chunk")] = None
    values: Annotated[
        Literal["sign", "2bit", "4bit", "8bit", "codebook4", "bf16", "parameter"] | None,
        _help("method: as what they are sent"),
    ] = None  # fmt: skip
    beta: Annotated[Share | None, _help("method: decay of momentum or feedback")] = None
    subtract: Annotated[
        Amount | None, _help("method: share of what was sent that is taken out of it")
    ] = None  # fmt: skip
    merge: Annotated[
        Literal["named", "mean"] | None,
        _help("method: mean over the replicas that name an entry, or over all"),
    ] = None  # fmt: skip
    norm_clip: Annotated[
        Literal["none", "median"] | None, _help("method: scale replicas to the median norm")
    ] = None  # fmt: skip
    reduce: Annotated[
        Literal["auto", "gather", "owners"] | None,
        _help("method: replicas get all results, or each owns chunks and merges them for all"),
    ] = None  # fmt: skip
    link: Annotated[
        str | None,
        _help("method, DisTrO: auto (measured at the start) or RATE[/RATE down],LATENCY between "
              "replicas: choose topk, every and delay so that exchanges hide behind compute; with "
              "--simulate a virtual clock"),
    ] = None  # fmt: skip
    outer_rate: Annotated[Amount | None, _help("method: rate of the outer step")] = None
    outer_momentum: Annotated[Share | None, _help("method: momentum of the outer step")] = None

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        for name in self.__struct_fields__:
            if name in ("method", "link") or getattr(self, name) is None:
                continue
            if self.method is None:
                raise ValueError(f"{flag(name)} needs --method")
            if self.method == "distro" and self.subtract is None:
                raise ValueError(
                    f"{flag(name)} is of other methods; DisTrO's options are --compression-topk, "
                    "--compression-chunk, --compression-decay and --distro-quantization (with "
                    "--subtract it has --topk, --chunk, --beta and --values)"
                )

    def check(
        self, *, distro: bool, elastic: bool, simulate: int, replicas: int, ranks_per_replica: int,
        has_masters: bool,
    ) -> None:  # fmt: skip
        """Checks that a method goes with a run's other options.

        Raises:
            ValueError: it does not.
        """
        method = self.method
        if self.link is not None:
            if self.link != "auto":
                Link.parse(self.link)
            elif simulate:
                raise ValueError("--link auto measures a link, which --simulate has none of")
            if not distro and method is None:
                raise ValueError("--link needs --distro or --method, whose exchanges go over it")
            if replicas < 2:
                asked = "--replicas or --simulate"
                raise ValueError(f"--link needs {asked} of at least 2: one exchanges nothing")
            if elastic:
                raise ValueError("--link with --elastic: replicas that join may have other links")
        if method is None or (method == "distro" and distro):
            return
        if distro:
            raise ValueError(f"--distro and --method {method}: give one of them")
        if ranks_per_replica > 1 and self.values == "codebook4":
            raise ValueError(
                "--values codebook4 codes all values of a parameter together, of which each rank "
                "has a part by --data-parallelism or --tensor-parallelism; 2bit goes by chunks"
            )
        if elastic:
            got = method if method != "distro" else "it with --subtract"
            raise ValueError(f"--elastic wants --method distro, got {got}")
        if not has_masters:
            raise ValueError(
                f"--method {method} adds to float32 parameters or masters, what bfloat16 would "
                "round away: it wants --master-dtype float32, got bfloat16"
            )
