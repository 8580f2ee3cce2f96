"""Ranks started by torchrun or srun, and ranks on machines of their own: network namespaces."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from psyche_fast import cli
from psyche_fast.start import devices, network
from psyche_fast.start.cluster import Launched, first_host, launched
from tests.groups import Command, run_command
from tests.processes import free_port, wait_until
from tests.tiny import save_llama, save_tokens


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launched")
    save_llama(folder / "model")
    save_tokens(folder / "data")
    return folder


def flags(place: Path, output: Path, replicas: int = 2, steps: int = 3) -> list[str]:
    return [
        "train", "--model", str(place / "model"), "--data-path", str(place / "data"),
        "--device", "cpu", "--sequence-length", "16", "--micro-batch", "2", "--total-batch", "6",
        "--total-steps", str(steps), "--param-dtype", "float32", "--threads", "1", "--distro",
        "--replicas", str(replicas), "--compression-chunk", "16", "--output", str(output),
    ]  # fmt: skip


def losses(output: Path) -> list[float]:
    return [json.loads(s)["loss"] for s in (output / "metrics.jsonl").read_text().splitlines()]


TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "2",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_PROCID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1",
}  # fmt: skip


def test_torchruns_variables_are_understood_and_go_first() -> None:
    there = Launched(5, 8, 1, 4, "node1", None, ("node1", 29500, "psyche_fast/2"))
    assert launched(TORCHRUN) == launched({**SLURM, **TORCHRUN}) == there
    assert launched({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}).host is None  # type: ignore[union-attr]
    alone = launched({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "False"})
    assert alone == Launched(5, 8, 1, 4, "node1", 29500, None)
    with pytest.raises(ValueError, match="RANK: wanted a number in the environment, got 'x'"):
        launched({**TORCHRUN, "RANK": "x"})


def test_sruns_variables_are_understood() -> None:
    found = launched(SLURM)
    assert found is not None
    assert (found.rank, found.world_size, found.local_rank) == (3, 4, 1)
    assert (found.local_world_size, found.host, found.meeting) == (2, "gpu003", None)
    assert found.port == launched({**SLURM, "SLURM_PROCID": "0"}).port  # type: ignore[union-attr]
    assert 20_000 <= found.port < 30_000
    # A batch script, or one task, is no launch.
    assert launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None
    assert launched({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert launched({}) is None


@pytest.mark.parametrize(
    ("text", "node", "here"),
    [("2(x2),1", "0", 2), ("2(x2),1", "1", 2), ("2(x2),1", "2", 1), ("1,4", "1", 4), ("5", "0", 5)],
)
def test_slurms_uneven_allocations_are_counted_by_machine(text: str, node: str, here: int) -> None:
    step = {**SLURM, "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": text}
    found = launched({**step, "SLURM_NODEID": node})
    assert found is not None
    assert found.local_world_size == here


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x"}, r"wanted numbers such as 4\(x2\),3, got '2\(x'"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2,1"}, "2,1 are 3 tasks, but the step has 4"),
        ({"SLURM_STEP_TASKS_PER_NODE": "3,1"}, "SLURM_NODEID: wanted a number"),
        ({"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_NODEID": "2"}, "names 2 machines"),
    ],
)
def test_slurms_counts_have_to_fit(changes: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        launched({**SLURM, **changes})


@pytest.mark.parametrize(
    ("variables", "visible", "device"),
    [
        ({"SLURM_GPUS_PER_TASK": "1"}, 1, 0),
        ({"SLURM_TRES_PER_TASK": "cpu=4,gres/gpu=1"}, 1, 0),
        ({"SLURM_GPUS_ON_NODE": "2"}, 1, 0),  # --gpu-bind=single:1
        ({"SLURM_STEP_GPUS": "4,5"}, 1, 0),
        ({"SLURM_GPUS_PER_TASK": "2"}, 2, 1),  # of two that are its own, either will do
        ({}, 8, 1),
        ({"SLURM_GPUS_ON_NODE": "1"}, 1, None),  # one GPU for two tasks
        ({}, 1, None),
    ],
)
def test_tasks_with_gpus_of_their_own_take_their_first(
    variables: dict[str, str], visible: int, device: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    task = launched({**SLURM, **variables})
    assert task is not None
    if device is None:
        with pytest.raises(ValueError, match="2 ranks on this machine need 2 GPUs, there are 1"):
            devices.device_of_launched("auto", task)
    else:
        assert devices.device_of_launched("auto", task) == (torch.device("cuda", device), "nccl")
        assert devices.device_of_launched("cuda", task)[0].index == device
    assert devices.device_of_launched("cpu", task) == (torch.device("cpu"), "gloo")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[01-04],g1", "n01"), ("n[7]", "n7"), ("a-b[2,5]", "a-b2")],
)
def test_the_first_of_slurms_hosts(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.fixture(scope="module")
def one_machine(place: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of two replicas whose second rank the first one starts."""
    output = tmp_path_factory.mktemp("one") / "run"
    (done,) = run_command(*flags(place, output))
    assert done.returncode == 0, done.stderr
    return losses(output)


@pytest.mark.slow
@pytest.mark.processes
def test_two_torchruns_make_one_run(place: Path, one_machine: list[float], tmp_path: Path) -> None:
    port = str(free_port())
    agents = [
        Command(
            "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node), "--master-addr",
            "127.0.0.1", "--master-port", port, "-m", "psyche_fast",
            *flags(place, tmp_path / "run"), program="torch.distributed.run:main",
        )
        for node in range(2)
    ]  # fmt: skip
    said = [agent.communicate()[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert losses(tmp_path / "run") == one_machine


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("shared", [True, False])
def test_torchrun_starts_ranks_again_that_go_on(place: Path, tmp_path: Path, shared: bool) -> None:
    """Whether or not torchrun lends its store, which remembers the life before."""
    run = tmp_path / "run"
    agent = Command(
        "--standalone", "--nproc-per-node", "2", "--max-restarts", "2", "-m", "psyche_fast",
        *flags(place, run, steps=400), "--checkpoint-every", "10", "--resume", "auto",
        program="torch.distributed.run:main",
        environment={} if shared else {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )  # fmt: skip
    metrics = run / "metrics.jsonl"
    lines = lambda: metrics.read_bytes().count(b"\n")  # noqa: E731
    wait_until(lambda: metrics.exists() and lines() > 12, 90)
    psutil.Process(agent.pid).children()[1].kill()
    log = run / "logs" / "rank-0.log"
    wait_until(lambda: log.read_text().count("training begins") == 2, 90)
    wait_until(lambda: lines() > 30, 90)
    agent.send_signal(signal.SIGTERM)
    agent.wait(60)
    steps = [json.loads(s)["step"] for s in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)), "none lost, none twice"


@pytest.mark.slow
@pytest.mark.processes
def test_srun_makes_one_run_and_counts_ranks(
    place: Path, one_machine: list[float], tmp_path: Path
) -> None:
    said = run_command(*flags(place, tmp_path / "run"), ranks=2)
    assert [rank.returncode for rank in said] == [0, 0], said
    assert losses(tmp_path / "run") == one_machine
    assert "rank 1 INFO loaded" in (tmp_path / "run" / "logs" / "rank-1.log").read_text()
    for rank in run_command(*flags(place, tmp_path / "other", replicas=3), ranks=2):
        assert rank.returncode == 2
        assert "2 ranks were started, but --replicas 3 x" in rank.stderr


@pytest.mark.parametrize(
    "launcher", [TORCHRUN | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, SLURM]
)
@pytest.mark.parametrize("rank", ["0", "3"])
def test_several_machines_want_a_secret(
    launcher: dict[str, str], rank: str, place: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On every rank: none waits for one that has been refused."""
    for name, value in {**launcher, "RANK": rank, "SLURM_PROCID": rank}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        cli.main([*flags(place, tmp_path / "run", 4), "--dry-run"])
    assert ended.value.code == 2
    (line,) = [s for s in capsys.readouterr().err.splitlines() if "error" in s]
    assert "other machines come in only by a secret" in line
    assert "--secret-file FILE on each" in line


def test_the_interface_is_the_one_that_leads_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that what is set below goes again
        monkeypatch.delenv(name)
    network.use_interface("0.0.0.0")
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    network.use_interface("127.0.0.1")
    addresses = psutil.net_if_addrs()[os.environ["GLOO_SOCKET_IFNAME"]]
    assert "127.0.0.1" in [entry.address for entry in addresses]
    assert "NCCL_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    network.use_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"


@contextmanager
def hosts(count: int) -> Iterator[list[str]]:
    """Names of network namespaces, each with the address 10.99.7.(number + 1)."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    tag = f"pf{os.getpid() % 100_000}"
    names = [f"{tag}h{n}" for n in range(count)]
    switch = f"{tag}s"  # a namespace of its own, so that nothing is left behind
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for n, name in enumerate(names):
            ip("netns", "add", name)
            ip("-n", name, "link", "add", "wan0", "type", "veth", "peer", f"to{n}", "netns", switch)
            ip("-n", switch, "link", "set", f"to{n}", "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"10.99.7.{n + 1}/24", "dev", "wan0")
            ip("-n", name, "link", "set", "wan0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in [*names, switch]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@contextmanager
def hosts_or_skip(count: int) -> Iterator[list[str]]:
    """`hosts`; skips the test where there can be none."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    with ExitStack() as stack:
        try:
            names = stack.enter_context(hosts(count))
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        yield names


@pytest.fixture
def three_hosts() -> Iterator[list[str]]:
    with hosts_or_skip(3) as names:
        yield names


@pytest.fixture
def secret(tmp_path: Path) -> str:
    path = tmp_path / "secret"
    path.touch(0o600)
    path.write_text("0123456789abcdef" * 2)
    return str(path)


def run_on(
    names: list[str], run: list[str], timeout: int, secret: str, *more: str
) -> list[Command]:
    network = ["--host", "10.99.7.1", "--port", "34567", "--local-ranks", "1"]
    network += ["--secret-file", secret]
    core = Command(*run, *network, "--timeout", str(timeout), host=names[0])
    return [core] + [
        Command(
            "sidecar", "--main-host", "10.99.7.1", "--port", "34567", "--world-size",
            str(len(names)), "--start-rank", str(rank), "--backend", "gloo",
            "--secret-file", secret, *more, host=name,
        )
        for rank, name in enumerate(names[1:], start=1)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.processes
def test_three_hosts_make_one_run(
    place: Path, three_hosts: list[str], secret: str, tmp_path: Path
) -> None:
    processes = run_on(three_hosts, flags(place, tmp_path / "run", 3), timeout=60, secret=secret)
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    run_command(*flags(place, tmp_path / "alone", 3), ranks=3)
    assert losses(tmp_path / "run") == losses(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.processes
def test_a_host_that_is_cut_off_ends_the_run_in_one_line(
    place: Path, three_hosts: list[str], secret: str, tmp_path: Path
) -> None:
    output, timeout = tmp_path / "run", 5
    run = [*flags(place, output, 3, steps=1_000_000), "--checkpoint-every", "5"]
    processes = run_on(three_hosts, run, timeout, secret)
    checkpoint = output / "checkpoints" / "step-000005"
    wait_until(lambda: processes[0].poll() is not None or checkpoint.exists(), 90)
    assert processes[0].poll() is None, processes[0].communicate()
    subprocess.run(["ip", "-n", three_hosts[2], "link", "set", "wan0", "down"], check=True)
    began = time.monotonic()
    _, said = processes[0].communicate(timeout=60)
    assert time.monotonic() - began < timeout + 15
    assert processes[0].returncode == 1
    last = said.strip().splitlines()[-1]
    assert last.startswith("psyche-fast: error: ")
    known = ("another rank did not answer", "lost another rank", "has not been heard of")
    assert any(words in last for words in known)
    for process in processes[1:]:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "another rank" in said
    assert len(losses(output)) >= 5
    assert (checkpoint / "model.safetensors").exists()
    assert not list((output / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.processes
def test_of_two_halves_of_a_network_one_goes_on(place: Path, secret: str, tmp_path: Path) -> None:
    """Two hosts on each side: those apart from rank 0 see each other, and end all the same."""
    output, timeout = tmp_path / "run", 5

    def members() -> int:
        path = output / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return int(json.loads(lines[-1])["members"]) if lines else 0

    with hosts_or_skip(4) as names:
        run = [*flags(place, output, 4, steps=1_000_000), "--elastic", "--check-every", "1"]
        core, near, *far = run_on(names, run, timeout, secret, "--elastic")
        wait_until(lambda: core.poll() is not None or members() == 4, 90)
        switch = names[0].removesuffix("h0") + "s"
        subprocess.run(["ip", "-n", switch, "link", "add", "far", "type", "bridge"], check=True)
        subprocess.run(["ip", "-n", switch, "link", "set", "far", "up"], check=True)
        for n in (2, 3):
            moved = ["ip", "-n", switch, "link", "set", f"to{n}", "master", "far"]
            subprocess.run(moved, check=True)
        began = time.monotonic()
        for process in far:
            _, said = process.communicate(timeout=60)
            assert process.returncode == 1
            assert "lost another rank" in said
        wait_until(lambda: core.poll() is not None or members() == 2, 60)
        assert time.monotonic() - began < timeout + 15
        assert core.poll() is None, core.communicate()
        core.send_signal(signal.SIGTERM)
        _, said = core.communicate(timeout=60)
        assert core.returncode == 128 + signal.SIGTERM, said
        assert near.wait(30) == 0
        assert "replica 2 is gone" in said
        assert "replica 3 is gone" in said
