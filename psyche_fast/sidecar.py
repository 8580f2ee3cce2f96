"""A sidecar: one rank after the first, driven by our own core or by Psyche's.

`python -m psyche_fast.sidecar --parent-pid PID --backend nccl|gloo --init-method tcp://HOST:PORT
--world-size N --rank R [--device D] [--secret-file FILE]`; Psyche's core says `python -m
psyche.sidecar`, which is `main_for_psyche`.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from psyche_fast.errors import explain
from psyche_fast.start import early, signals
from psyche_fast.start.knock import read_secret
from psyche_fast.start.libraries import stay_awake
from psyche_fast.start.logs import quiet_terminal
from psyche_fast.start.network import use_interface
from psyche_fast.start.parent import LIFE, SPAWNED, TIMEOUT, die_with_parent

if TYPE_CHECKING:
    import torch

log = logging.getLogger("psyche_fast.sidecar")

DEFAULT_TIMEOUT = 600
"""Seconds, where `TIMEOUT` is not set."""
PSYCHES_TIMEOUT = 7200
"""The same with Psyche's core, which loads and warms up at its leisure."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses Psyche's arguments of a sidecar (argparse: this has to start fast)."""
    parser = argparse.ArgumentParser(prog="python -m psyche_fast.sidecar", description=__doc__)
    parser.add_argument("--parent-pid", type=int, help="exit when this process is gone")
    parser.add_argument("--backend", choices=("nccl", "gloo"), required=True)
    parser.add_argument("--init-method", required=True, help="tcp://HOST:PORT of rank 0's store")
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True, help="1 .. world size - 1")
    parser.add_argument("--device", type=int, help="CUDA index; absent on CPU")
    parser.add_argument("--secret-file", help="lets it in where the core has one")
    args = parser.parse_args(argv)
    if not 1 <= args.rank < args.world_size:
        parser.error(f"--rank must be in 1 .. {args.world_size - 1}, got {args.rank}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Runs a sidecar until `exit`; status 0 then, 1 after an error that was said."""
    words = sys.argv[1:] if argv is None else argv
    stay_awake(os.environ)
    if words[:1] == [early.FLAG]:
        words = early.wait(int(words[1]), _import)
    run(parse(words))


def _import() -> None:
    """What `serve` imports with our own core, and what that does: some seconds of it."""
    from psyche_fast.rank import serve, topology  # noqa: F401
    from psyche_fast.start import store  # noqa: F401


def main_for_psyche(argv: list[str] | None = None) -> None:
    """`main` as Psyche's core starts it: patient, and with a `--device` that may be of no use.

    The core aborts when a sidecar ends unasked, with status 0 too.
    """
    os.environ.setdefault(TIMEOUT, str(PSYCHES_TIMEOUT))
    args = parse(argv)
    if args.backend == "gloo" and args.device is not None:
        import torch

        if torch.cuda.device_count() == 0:
            args.device = None  # it always gives one
    run(args)


def run(args: argparse.Namespace) -> None:
    """`main` for arguments that are parsed."""
    quiet_terminal()
    # Whoever spawned it has set the interface: its own address need not be the store's.
    args.chooses_interface = SPAWNED not in os.environ
    if SPAWNED in os.environ:
        signals.leave_to_core()
    elif signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Ctrl-C acts at once, as SIGTERM does, inside a collective too: nothing is to be saved.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if args.parent_pid is not None:
        die_with_parent(args.parent_pid)
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format=f"%(asctime)s rank {args.rank} %(levelname)s %(message)s",
    )
    try:
        serve(args)
    except Exception as error:  # the last resort: nobody else would say it
        if isinstance(error, ValueError) and sys.stderr.isatty():
            logging.getLogger().handlers[0].setLevel(logging.ERROR)  # the trace is for a log file
        log.info("where it happened:", exc_info=True)
        log.error("%s", explain(error))
        sys.stderr.flush()
        # No clean-up of the process group: it would wait for ranks that are gone.
        os._exit(1)


def serve(args: argparse.Namespace) -> None:
    """Connects, looks which core it is, and serves that until the end of the run.

    Raises:
        ValueError: what rank 0 sent is not understood.
    """
    from datetime import timedelta

    import torch.distributed as dist

    from psyche_fast.psyche.store import FIRST_KEY as PSYCHES
    from psyche_fast.rank.protocol import FIRST_KEY as OURS
    from psyche_fast.rank.topology import join
    from psyche_fast.start.devices import processor
    from psyche_fast.start.store import StoreClient, introduce

    address = urlsplit(args.init_method)
    if address.scheme != "tcp" or not address.hostname or not address.port:
        raise ValueError(f"--init-method: wanted tcp://HOST:PORT, got {args.init_method!r}")
    if args.chooses_interface:
        use_interface(address.hostname)
    secret = None if args.secret_file is None else read_secret(args.secret_file)
    device = choose_device(args.backend, args.device, args.rank)
    timeout = timedelta(seconds=int(os.environ.get(TIMEOUT, DEFAULT_TIMEOUT)))
    host, port = address.hostname, address.port
    client = StoreClient(host, port, args.world_size, timeout, rank=args.rank, secret=secret)
    life = os.environ.get(LIFE)
    introduce(client.store, args.rank, processor(device), life or "")
    if life is not None:
        from psyche_fast.rank.elastic import Start
        from psyche_fast.rank.serve import serve as serve_own

        serve_own(client, device, Start(args.backend, args.rank, life, timeout))
        dist.destroy_process_group()
        return
    join(args.backend, client.store, args.world_size, args.rank, device, timeout)
    if client.first_of((OURS, PSYCHES)) == OURS:
        from psyche_fast.rank import serve as own

        own.serve(client, device)
    else:
        from psyche_fast.psyche import serving

        serving.serve(client, device)
    dist.destroy_process_group()


def choose_device(backend: str, index: int | None, rank: int) -> torch.device:
    """The device of a sidecar.

    Raises:
        ValueError: nccl without a GPU, or a GPU that does not exist.
    """
    import torch

    if backend == "gloo" and index is None:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError(f"--backend {backend}: no CUDA device on this machine")
    if index is None:
        index = rank % count
    if index >= count:
        raise ValueError(f"--device {index}: this machine has {count} CUDA devices")
    return torch.device("cuda", index)


if __name__ == "__main__":
    main()
