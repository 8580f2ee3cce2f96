"""The `psyche-fast` command: parses, then one call.

Nothing heavy is imported before a command runs, so that `--help` is instant. The flags of
`train` come from the fields of its configuration.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import click

from psyche_fast import commands, looking
from psyche_fast.completion import places
from psyche_fast.config import ARCHITECTURES, FLAGS, Flag, RunConfig, beneath, flag, read_toml
from psyche_fast.errors import check_name, exit_status
from psyche_fast.launching import OURSELVES, as_launched, serve, supervised
from psyche_fast.presets import values_of
from psyche_fast.start import tls
from psyche_fast.start.cluster import Launched, launched
from psyche_fast.start.early import early
from psyche_fast.start.libraries import stay_awake
from psyche_fast.start.logs import quiet_terminal

if TYPE_CHECKING:
    from psyche_fast.core.profile import Profile

TRACE = "PSYCHE_FAST_TRACE"
"""Environment variable: set, an error is raised with its trace instead of said in one line."""

F = TypeVar("F", bound=Callable[..., Any])


def _say_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from psyche_fast.version import version_lines

        for line in version_lines():
            click.echo(line)
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_say_version,
              help="show version, commit and libraries, and exit")  # fmt: skip
def cli() -> None:
    """Train LLMs over slow links with DisTrO, on one box or many."""


for _command in (*commands.COMMANDS, *looking.COMMANDS):
    cli.add_command(_command)


_UNTYPED = {click.core.ParameterSource.DEFAULT, None}


class _Words(click.ParamType):
    """The value of an option for which there are words."""

    def __init__(self, known: Flag) -> None:
        self._known, self.name = known, known.kind.__name__

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """What the words stand for."""
        assert self._known.parse is not None
        if not isinstance(value, str):
            return value
        try:
            return self._known.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def config_options(function: F, only: tuple[str, ...] | None = None) -> F:
    """Adds one option for each of the configuration's `FLAGS`, or for `only` some."""
    for name, known in reversed(list(FLAGS.items())):
        if only is not None and name not in only:
            continue
        names = [flag(name)]
        options: dict[str, Any] = {"help": known.help, "default": known.default}
        options["show_default"] = known.default is not None
        if known.kind is bool:
            names = [f"{flag(name)}/{flag('no_' + name)}"]
            options["show_default"] = False
        elif get_origin(known.kind) is Literal:
            words = get_args(known.kind)
            options["type"] = click.Choice(words) if isinstance(words[0], str) else type(words[0])
        elif get_origin(known.kind) is tuple:
            options |= {"type": get_args(known.kind)[0], "multiple": True, "show_default": False}
        else:
            options["type"] = known.kind if known.parse is None else _Words(known)
            if known.kind is str:
                options["shell_complete"] = places
        function = click.option(*names, name, **options)(function)
    return function


def _resolve(
    context: click.Context,
    run_file: str | None,
    config: str | None,
    flags: dict[str, Any],
    *,
    presets: tuple[str, ...] = (),
    trains: bool = True,
    says: bool = True,
) -> RunConfig:
    """Defaults, then `--preset`, `--run-file`, `--config` and typed flags, each over those.

    Args:
        context: the command's.
        run_file: Psyche's, or None.
        config: ours, or None.
        flags: all of the command's by name.
        presets: names.
        trains: whether model and data are wanted, which a run file may not be able to give.
        says: whether this rank is the one that says what is ignored.
    """
    values = {} if config is None else read_toml(config)
    typed = {n: v for n, v in flags.items() if context.get_parameter_source(n) not in _UNTYPED}
    values = beneath(values, typed)
    if run_file is not None:
        from psyche_fast.runfile import read_run_file

        file = read_run_file(run_file)
        if trains:
            file.check(values)
        if trains and says:
            click.echo(file.ignored_line(), err=True)
        values = file.under(values)
    return RunConfig.of(**beneath(values_of(presets, values), values))


def _run_options(function: F) -> F:
    """Adds all that says what a run is: files, presets, and a flag for each field."""
    for option in (
        click.option("--preset", "presets", multiple=True, metavar="NAME",
                     help="20M 125M 350M 1B, slow medium fast: for a model, for a link"),
        click.option("--run-file", type=click.Path(), metavar="state.toml",
                     help="Psyche's; --config and flags go over it"),
        click.option("--config", type=click.Path(), metavar="FILE.toml",
                     help="fields by name; flags go over them"),
    ):  # fmt: skip
        function = option(function)
    return function


@cli.command()
@_run_options
@click.option("--dry-run", is_flag=True, help="resolve, check, print, exit")
@click.option("--max-restarts", type=click.IntRange(min=0), default=0, show_default=True,
              help="start a run that fails again, from its last checkpoint")  # fmt: skip
@click.option("--python", is_flag=True, help="accepted for Psyche's command line: always on")
@config_options
@click.pass_context
def train(
    context: click.Context,
    config: str | None,
    run_file: str | None,
    presets: tuple[str, ...],
    dry_run: bool,
    max_restarts: int,
    python: bool,
    **flags: Any,
) -> None:
    """Train a model, as Psyche's train example does."""
    launch = launched()
    first = launch is None or launch.rank == 0
    resolved = _resolve(context, run_file, config, flags, presets=presets, says=first)
    if max_restarts and not dry_run:
        if launch is not None:
            raise ValueError(
                "--max-restarts under torchrun or Slurm: restart the job by theirs, with "
                "--resume auto"
            )
        sys.exit(supervised(resolved, max_restarts))
    _lead(resolved, launch, dry_run)


def _lead(
    resolved: RunConfig, launch: Launched | None, dry_run: bool, profile: Profile | None = None
) -> None:
    """A run, as this rank has to take part in it, to its end."""
    if launch is not None:
        resolved = as_launched(resolved, launch)
        if launch.rank > 0:
            if not dry_run:
                serve(resolved, launch)
            return
    count = 0 if dry_run or launch is not None else resolved.ranks_here - 1
    machines = resolved.machines
    with early(count, resolved.ranks_here, machines.device, machines.threads) as sidecars:
        from psyche_fast.core.plan import make_plan

        plan = make_plan(
            resolved, ranks_on_this_machine=None if launch is None else launch.local_world_size
        )
        from psyche_fast.metrics.console import print_card

        print_card(plan.summary)
        if dry_run:
            click.echo(resolved.to_toml(), nl=False)
            return
        from psyche_fast.core.run import run

        result = run(plan if profile is None else profile.part(plan), launch, sidecars, profile)
    with suppress(OSError):  # a terminal that has been closed
        click.echo(f"run         {result.output}")
        click.echo(f"checkpoint  {result.checkpoint}")
        if not result.is_complete and result.signal is None:
            total = plan.config.schedule.total_steps
            click.echo(
                f"ended       at step {result.last_step} of {total} by --max-time; "
                f"--output {result.output} --resume auto goes on"
            )
    for line in [] if profile is None else profile.lines():
        click.echo(line)
    if result.signal is not None:
        sys.exit(128 + result.signal)


@cli.command()
@_run_options
@click.option("--steps", type=click.IntRange(min=1), default=3, show_default=True,
              help="to profile, after two that warm up")  # fmt: skip
@click.option("--nvtx", is_flag=True, help="ranges for Nsight Systems in place of a trace")
@config_options
@click.pass_context
def profile(
    context: click.Context,
    config: str | None,
    run_file: str | None,
    presets: tuple[str, ...],
    steps: int,
    nvtx: bool,
    **flags: Any,
) -> None:
    """Profile some steps of a training run: a trace, time by phase, memory. Options are train's."""
    launch = launched()
    leads = launch is None or launch.rank == 0
    resolved = _resolve(context, run_file, config, flags, presets=presets, says=leads)
    output = resolved.run.output or datetime.now().strftime("runs/profile-%Y%m%d-%H%M%S")
    resolved = resolved.replace(output=output)
    looks = None
    if leads:
        from psyche_fast.core.profile import Profile

        looks = Profile(steps, Path(output, "profile"), nvtx=nvtx)
    _lead(resolved, launch, dry_run=False, profile=looks)


@cli.command()
@click.option("--max-steps", type=click.IntRange(min=1), help="steps to train (default: all)")
@click.option("--output", type=click.Path(path_type=Path), help="default: runs/demo-DATE-TIME")
@click.option("--replicas", type=click.IntRange(min=1), default=2, show_default=True,
              help="DisTrO peers")  # fmt: skip
@click.option("--data-parallelism", type=click.IntRange(min=1), default=1, show_default=True,
              help="ranks that share each replica's model (FSDP2)")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="as of train")
def demo(**options: Any) -> None:
    """Train a small Llama on Python's own standard library, with DisTrO at 1 bit."""
    ranks = options["replicas"] * options["data_parallelism"]
    with early(ranks - 1, ranks, options["device"], threads=0) as sidecars:
        from psyche_fast.core.showcase import run_demo

        run_demo(**options, early=sidecars)


_ESTIMATED = (
    "model", "sequence_length", "micro_batch", "total_batch", "total_steps",
    "tensor_parallelism", "data_parallelism", "replicas",
    "grad_accum_in_fp32", "compression_chunk", "compression_topk", "delta_dtype", "offload_delta",
    "distro", "distro_quantization", "attn_implementation", "param_dtype", "master_dtype",
    "activation_checkpointing",
    *(name for name, known in FLAGS.items() if known.section == "exchange" and name != "link"),
)  # fmt: skip


@cli.command()
@click.option("--bandwidth", default="1Gbit", show_default=True, help="of a host's link, a second")
@click.option("--uplink", help="of what a host sends (default: --bandwidth)")
@click.option("--downlink", help="of what it receives (default: --bandwidth)")
@click.option("--latency-ms", type=click.FloatRange(min=0), default=50.0, show_default=True)
@click.option("--link", metavar="LINK",
              help="all of that as RATE[/DOWN],LATENCY; or HOST[:PORT], where `psyche-fast link` "
              "runs, to measure it")  # fmt: skip
@click.option("--step-seconds", type=click.FloatRange(min=0, min_open=True),
              help="of a step without exchanges: what is lost, and settings that hide")  # fmt: skip
@click.option("--ranks-per-host", type=click.IntRange(min=1),
              help="ranks that share a link (default: a replica's, at most 8)")  # fmt: skip
@click.option("--device-type", type=click.Choice(["cuda", "cpu"]), default="cuda",
              show_default=True, help="kernels on a CPU need memory of their own")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of a table")
@partial(config_options, only=_ESTIMATED)
@click.pass_context
def estimate(
    context: click.Context,
    link: str | None,
    step_seconds: float | None,
    ranks_per_host: int | None,
    device_type: str,
    as_json: bool,
    **flags: Any,
) -> None:
    """Say what a run would need: memory, bytes a step, time. Reads only the model's config."""
    quiet_terminal()
    names = ("bandwidth", "uplink", "downlink", "latency_ms")
    rates = {name: flags.pop(name) for name in names}
    typed = [n for n in names if context.get_parameter_source(n) not in _UNTYPED]
    if link is not None and typed:
        raise ValueError(f"--link and {flag(typed[0])}: give one of them")
    run = RunConfig.of(**flags)
    from psyche_fast.core import estimate as estimates
    from psyche_fast.core import estimate_lines as said

    model = estimates.read_model(run.model.model)
    over = said.link_of(link, **rates)
    ranks = ranks_per_host or min(run.parallelism.ranks_per_replica, 8)
    need = estimates.estimate(model, run, device_type, link=over, ranks=ranks, step=step_seconds)
    if as_json:
        click.echo(json.dumps(said.as_json(need, over)))
        return
    for line in said.lines(need, over, ranks, step_seconds):
        click.echo(line)


_SCHEDULED = (
    "sequence_length", "total_batch", "total_batch_start", "batch_warmup_tokens",
    *(name for name, known in FLAGS.items() if known.section == "schedule"),
)  # fmt: skip


@cli.command()
@click.option("--run-file", type=click.Path(), metavar="state.toml",
              help="Psyche's; --config and flags go over it")  # fmt: skip
@click.option("--config", type=click.Path(), metavar="FILE.toml",
              help="fields by name; flags go over them")  # fmt: skip
@click.option("--every", type=click.IntRange(min=1), help="steps from line to line (default: few)")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), default="schedule.png",
              show_default=True, help="file that takes the plot")  # fmt: skip
@partial(config_options, only=_SCHEDULED)
@click.pass_context
def schedule(
    context: click.Context,
    run_file: str | None,
    config: str | None,
    every: int | None,
    plot: Path,
    **flags: Any,
) -> None:
    """Print and plot learning rate and batch size by step."""
    from psyche_fast.metrics.schedule import lines, plot_schedule

    run = _resolve(context, run_file, config, flags, trains=False)
    for line in lines(run, every):
        click.echo(line)
    plot_schedule(run, plot)
    click.echo(f"plot     {plot}", err=True)


@cli.command()
@click.option("--main-host", envvar="PSYCHE_MAIN_HOST", required=True, show_envvar=True,
              help="address of the core")  # fmt: skip
@click.option("--port", type=click.IntRange(1, 65535), default=34567, show_default=True,
              help="port of the core")  # fmt: skip
@click.option("--world-size", type=int, envvar="PSYCHE_WORLD_SIZE", required=True,
              show_envvar=True, help="all ranks of the run")  # fmt: skip
@click.option("--start-rank", type=int, envvar="PSYCHE_START_RANK", required=True,
              show_envvar=True, help="first rank on this machine")  # fmt: skip
@click.option("--start-device", default=0, show_default=True, help="CUDA index of the first rank")
@click.option("--num-local-ranks", type=int, help="ranks to run (default: one per GPU, 1 on CPU)")
@click.option("--backend", type=click.Choice(["nccl", "gloo"]), default="nccl", show_default=True)
@click.option("--secret-file", help="the core's, copied to this machine; see train")
@click.option("--python-arch", metavar="MODULE:FUNCTION",
              help="what the core may have these ranks import, if anything")  # fmt: skip
@click.option("--max-restarts", type=click.IntRange(min=0), default=0, show_default=True,
              help="wait for the core again after a failure, as often")  # fmt: skip
@click.option("--elastic", is_flag=True, help="replicas of an elastic run, all of their ranks here")
@partial(config_options, only=tls.FLAGS)
def sidecar(
    num_local_ranks: int | None,
    start_device: int,
    backend: str,
    max_restarts: int,
    python_arch: str | None,
    tls_key: str | None,
    tls_cert: str | None,
    tls_ca: str | None,
    **options: Any,
) -> None:
    """Run this machine's ranks of a run whose core is on another machine."""
    tls.check(tls_key, tls_cert, tls_ca)
    # These ranks', and those of later lives.
    os.environ.update(tls.variables(tls_key, tls_cert, tls_ca))
    if python_arch is not None:
        os.environ[ARCHITECTURES] = python_arch
    if max_restarts:
        from psyche_fast.start.supervise import supervise

        given = {**options, "start_device": start_device, "backend": backend}
        if num_local_ranks is not None:
            given["num_local_ranks"] = num_local_ranks
        elastic = given.pop("elastic")
        arguments = [word for n, v in given.items() if v is not None for word in (flag(n), str(v))]
        arguments += ["--elastic"] if elastic else []
        sys.exit(supervise(lambda life: [*OURSELVES, "sidecar", *arguments], max_restarts, None))
    from psyche_fast.start.spawn import launch_host

    if num_local_ranks is None:
        num_local_ranks = 1
        if backend == "nccl":
            import torch

            num_local_ranks = torch.cuda.device_count() - start_device
    launch_host(
        start_device=start_device, num_local_ranks=num_local_ranks, backend=backend, **options
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point: status 0, 1 after an error of the run, 2 after one of the user's."""
    stay_awake(os.environ)
    run_command(cli, "psyche-fast", argv)


def run_command(command: click.Command, name: str, argv: list[str] | None) -> None:
    """Runs a command of this project; an error of the run or of the user's is said in one line."""
    try:
        for argument in sys.argv[1:] if argv is None else argv:
            check_name(argument)
        command.main(args=argv, prog_name=name, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except Exception as error:
        status = exit_status(error)
        if status is None:
            raise
        _fail(str(error), status, error)


def _fail(message: str, status: int, error: Exception | None = None) -> None:
    if error is not None and os.environ.get(TRACE):
        raise error
    click.echo(f"psyche-fast: error: {message}", err=True)
    sys.exit(status)
