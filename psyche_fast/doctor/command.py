"""`psyche-fast doctor`: carries out all checks and says what they found."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click

from psyche_fast.doctor.finding import Check, Finding, carry_out


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default="runs", show_default=True,
              help="where runs are to write")  # fmt: skip
@click.option("--port", type=click.IntRange(1, 65535), default=34567, show_default=True,
              help="on which the core is to listen for other machines")  # fmt: skip
@click.option(
    "--link",
    metavar="HOST[:PORT]",
    help="also measure the way to another machine, on which `link` runs",
)
@click.option("--self-test/--no-self-test", default=True,
              help="also load torch and run each hot path against float64: 20 seconds")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="print JSON, for a report")
def doctor(output: Path, port: int, link: str | None, self_test: bool, as_json: bool) -> None:
    """Look whether this machine is set up: ok, warning or problem, and what to do; status 1."""
    if link is not None:
        from psyche_fast.start.probe import parse_host

        parse_host(link)
    counts = {"ok": 0, "warning": 0, "problem": 0}
    entries, began, group = [], time.time(), None
    for name, finding in look(output, port, link, self_test=self_test):
        counts[finding.status] += 1
        if as_json:
            entries.append({"group": name, "name": finding.name, "status": finding.status,
                            "text": finding.text, "remedy": finding.remedy})  # fmt: skip
            continue
        if name != group:
            group = name
            click.secho(name, bold=True)
        for line in _lines(finding):
            click.echo(line)
    if as_json:
        from psyche_fast.version import version_lines

        taken = round(time.time() - began, 1)
        about = {"version": version_lines(), "seconds": taken, **counts, "findings": entries}
        click.echo(json.dumps(about, indent=1))
    else:
        plural = "" if counts["problem"] == 1 else "s"
        warnings = f"{counts['warning']} warning{'' if counts['warning'] == 1 else 's'}"
        click.echo(f"{counts['problem']} problem{plural}, {warnings}, {counts['ok']} ok")
    if counts["problem"]:
        sys.exit(1)


_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


def _lines(finding: Finding) -> Iterator[str]:
    status = click.style(f"{finding.status:<7}", fg=_COLOURS[finding.status])
    yield f"  {status}  {finding.name}: {finding.text}"
    if finding.remedy:
        yield f"           -> {finding.remedy}"


def look(
    output: Path, port: int, link: str | None, *, self_test: bool
) -> Iterator[tuple[str, Finding]]:
    """Carries out the checks; gives what they find, each with its kind, as it comes.

    Args:
        output: where runs are to write.
        port: that the core is to listen on.
        link: another machine, or None.
        self_test: whether torch is loaded and the hot paths run.
    """
    from psyche_fast.doctor import gpus, machine, network, software

    has_gpu = gpus.is_there()
    state: list[gpus.Driver] = []

    def driver() -> Iterator[Finding]:
        state.append(gpus.ask())
        yield from gpus.driver(state[0])
        yield from gpus.links(state[0])

    checks: dict[str, tuple[Check, ...]] = {
        "software": (
            software.python, software.packages, partial(software.compiler, has_gpu),
            partial(software.environment, has_gpu), software.hub, software.running,
        ),
        "machine": (
            machine.system, machine.cores, machine.memory, machine.limits, machine.shared_memory,
            partial(machine.disks, output), machine.clock,
        ),
        "GPUs": (driver,),
        "network": (network.interfaces, network.own_name, partial(network.ports, port)),
    }  # fmt: skip
    if link is not None:
        checks[f"way to {link}"] = (partial(network.way_to, link),)
    for group, members in checks.items():
        for check in members:
            for finding in carry_out(_name(check), check, 40.0):
                yield group, finding
    if self_test:
        from psyche_fast.doctor.trial import read

        for finding in read():
            yield "self-test", finding


def _name(check: Check) -> str:
    plain = check.func if isinstance(check, partial) else check
    return str(getattr(plain, "__name__", "check")).replace("_", " ")
