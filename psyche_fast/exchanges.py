"""How many replicas there are and how they learn from each other, as options of a run."""

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
    outer_rate: Annotated[Amount | None, _help("method: rate of the outer step")] = None
    outer_momentum: Annotated[Share | None, _help("method: momentum of the outer step")] = None
    link: Annotated[
        str | None,
        _help("with --simulate: a virtual clock for this link, RATE,LATENCY as in 10Mbit,100ms"),
    ] = None  # fmt: skip

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        for name in self.__struct_fields__:
            if name in ("method", "link") or getattr(self, name) is None:
                continue
            if self.method is None:
                raise ValueError(f"{flag(name)} needs --method")
            if self.method == "distro":
                raise ValueError(
                    f"{flag(name)} is of other methods; DisTrO's options are --compression-topk, "
                    "--compression-chunk, --compression-decay and --distro-quantization"
                )

    def check(
        self, *, distro: bool, elastic: bool, simulate: int, ranks_per_replica: int,
        has_masters: bool,
    ) -> None:  # fmt: skip
        """Checks that a method goes with a run's other options.

        Raises:
            ValueError: it does not.
        """
        method = self.method
        if self.link is not None:
            if not simulate:
                raise ValueError("--link needs --simulate, whose virtual clock it is for")
            Link.parse(self.link)
        if method is None or (method == "distro" and distro):
            return
        if distro or method == "distro":
            raise ValueError(f"--distro and --method {method}: give one of them")
        if ranks_per_replica > 1 and self.values == "codebook4":
            raise ValueError(
                "--values codebook4 codes all values of a parameter together, of which each rank "
                "has a part by --data-parallelism or --tensor-parallelism; 2bit goes by chunks"
            )
        if elastic:
            raise ValueError(f"--elastic wants --method distro, got {method}")
        if not has_masters:
            raise ValueError(
                f"--method {method} adds to float32 parameters or masters, what bfloat16 would "
                "round away: it wants --master-dtype float32, got bfloat16"
            )


class Parallelism(Section, frozen=True, kw_only=True):
    """How many ranks do what, for `rank.topology`."""

    replicas: Annotated[
        Positive, _help("DisTrO peers; ranks = replicas x data x tensor parallelism")
    ] = 1
    simulate: Annotated[
        Count,
        _help("in place of --replicas: so many in one process, which take turns on one device"),
    ] = 0
    data_parallelism: Annotated[Positive, _help("ranks that shard one replica with FSDP2")] = 1
    tensor_parallelism: Annotated[Positive, _help("ranks that share each layer of one replica")] = 1
    elastic: Annotated[
        bool, _help("go on without a replica that dies, and with one that comes back or joins")
    ] = False  # fmt: skip
    max_replicas: Annotated[
        Count, _help("with --elastic: the most replicas, with those that join; 0 = --replicas")
    ] = 0  # fmt: skip
    device_backend: Annotated[
        Literal["auto", "nccl", "split"],
        _help(
            "between replicas on GPUs: nccl, or gloo (split); auto = split on several machines"
        ),
    ] = "auto"  # fmt: skip

    @property
    def copies(self) -> int:
        """Replicas, each in ranks of its own or all in one."""
        return self.simulate or self.replicas

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that together hold one copy of the model."""
        return self.data_parallelism * self.tensor_parallelism

    @property
    def world_size(self) -> int:
        """All ranks that the run begins with, the core's own included."""
        return self.replicas * self.ranks_per_replica

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.simulate:
            self._check_simulated()
        if not self.elastic:
            if self.max_replicas:
                raise ValueError("--max-replicas needs --elastic")
            return
        if self.replicas == 1:
            raise ValueError("--elastic needs --replicas of at least 2: rank 0's own has to stay")
        if 0 < self.max_replicas < self.replicas:
            raise ValueError(
                f"--max-replicas {self.max_replicas} is less than --replicas {self.replicas}"
            )
        if self.device_backend == "nccl":
            raise ValueError(
                "--elastic with --device-backend nccl: what goes between replicas that may die "
                "goes over gloo; leave it out"
            )

    def _check_simulated(self) -> None:
        given = {
            "replicas": self.replicas > 1, "data_parallelism": self.data_parallelism > 1,
            "tensor_parallelism": self.tensor_parallelism > 1, "elastic": self.elastic,
        }  # fmt: skip
        for name, is_given in given.items():
            if is_given:
                raise ValueError(
                    f"--simulate {self.simulate} is one process that has whole replicas, with no "
                    f"other ranks: leave out {flag(name)}"
                )
