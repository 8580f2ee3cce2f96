"""How many ranks a run has, what each does, and where they run, as options."""

from __future__ import annotations

from typing import Annotated, Literal

from psyche_fast.options import Count, Port, Positive, Section, flag
from psyche_fast.options import describe as _help


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


class Machines(Section, frozen=True, kw_only=True):
    """Where the ranks run, for `start`."""

    device: Annotated[str, _help("auto, cpu, cuda, cuda:N or cuda:X,Y (one per rank)")] = "auto"
    threads: Annotated[Count, _help("CPU threads per rank; 0 = the cores shared evenly")] = 0
    host: Annotated[
        str, _help("address on which the core listens; another one needs --secret-file")
    ] = "127.0.0.1"  # fmt: skip
    secret_file: Annotated[
        str | None, _help("what ranks on other machines have to know to come in: a file of theirs")
    ] = None  # fmt: skip
    tls_key: Annotated[
        str | None, _help("this machine's private key, for gloo by TLS; with --tls-cert, --tls-ca")
    ] = None  # fmt: skip
    tls_cert: Annotated[str | None, _help("this machine's certificate")] = None
    tls_ca: Annotated[
        str | None, _help("certificate of who has signed those of all machines")
    ] = None  # fmt: skip
    port: Annotated[Port, _help("port of the core's store; 0 = a free one")] = 0
    local_ranks: Annotated[
        Count, _help("ranks on this machine, the rest by `sidecar`; 0 = all")
    ] = 0
    timeout: Annotated[
        Positive,
        _help("seconds to wait for a rank at most; 10 usual steps, or 30, once those are known"),
    ] = 600
