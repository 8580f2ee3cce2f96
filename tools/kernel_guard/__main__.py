"""`make kernels`: compile the kernels for all GPUs, say what they cost, hold them to limits."""

from __future__ import annotations

from typing import Any

import click

from psyche_fast.cli import run_command


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--target", "targets", multiple=True, metavar="GPU",
              help="sm_80, sm_90, sm_100, sm_120 or gfx942; left out: all")  # fmt: skip
@click.option("--kernel", "kernels", multiple=True, metavar="TEXT",
              help="only kernels with this in their name")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of tables")
@click.option("--check", is_flag=True, help="compare with the limits; status 1 if one is exceeded")
@click.option("--update-limits", is_flag=True, help="set the limits to what is measured")
@click.option("--lines", metavar="TEXT", help="instructions of one kernel by line of its source")
def guard(**options: Any) -> None:
    """Compile the kernels and print what they cost on GPUs. Needs none."""
    from tools.kernel_guard.report import report

    report(**options)


def main(argv: list[str] | None = None) -> None:
    """Entry point; statuses as those of `psyche-fast`."""
    run_command(guard, "kernel_guard", argv)


if __name__ == "__main__":
    main()
