"""Installations and environments that mislead, each made so."""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
from importlib import metadata

import pytest

from psyche_fast import version
from psyche_fast.doctor import software
from psyche_fast.start import network
from tests.doctor.support import program, worst


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in list(os.environ):
        upper = name.upper()
        if upper.startswith(("HF_", "PSYCHE_FAST_", "SLURM_", "TORCHELASTIC", "TRITON_")) or (
            upper.endswith("_PROXY")
        ):
            monkeypatch.delenv(name)


@pytest.fixture
def installed(monkeypatch):
    """Has packages be installed in other versions, None for not at all."""
    real = metadata.version

    def have(**versions):
        def look(name):
            wanted = versions.get(name.replace("-", "_"), name)
            if wanted is None:
                raise metadata.PackageNotFoundError(name)
            return real(name) if wanted is name else wanted

        monkeypatch.setattr(metadata, "version", look)

    return have


def test_this_installation_meets_its_requirements():
    assert worst(software.packages())["packages"].status == "ok"


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"torch": "2.10.1"}, "torch 2.10.1 is installed, <2.15,>=2.11 is wanted"),
        ({"torch": "2.99.0+cu130"}, "torch 2.99.0+cu130"),
        ({"transformers": "4.57.0"}, "transformers 4.57.0"),
        ({"tomli_w": None}, "tomli-w is not installed"),
        ({"numpy": "strange"}, "numpy strange is no version"),
    ],
)
def test_a_version_out_of_range(installed, versions, said):
    installed(**versions)
    wanted = ["torch>=2.11,<2.15", "transformers<6,>=5.17", "tomli-w>=1.0", "numpy>=2.2",
              'msgspec>=99; extra == "none"']  # fmt: skip
    found = worst(software.requirements(wanted))["packages"]
    assert found.status == "problem"
    assert said in found.text
    assert found.remedy.startswith("pip install '")


def test_builds_and_pre_releases_of_a_version_are_that_version(installed):
    installed(torch="2.13.0+cu130")
    assert worst(software.requirements(["torch>=2.11,<2.15"]))["packages"].status == "ok"
    installed(torch="2.14.0.dev20260101")
    assert worst(software.requirements(["torch>=2.11,<2.15"]))["packages"].status == "ok"


def test_a_package_of_an_extra_that_is_too_old(installed):
    installed(wandb="0.10.0", trackio=None)
    wanted = ["wandb>=0.20; extra == 'trackers'", "trackio>=0.5; extra == 'trackers'"]
    found = [one for one in software.requirements(wanted) if one.status != "ok"]
    assert [one.status for one in found] == ["warning"]
    assert "psyche-fast[trackers]" in found[0].remedy


@pytest.mark.parametrize(("have", "status"), [("3.6.0", "problem"), ("3.7.1", None)])
def test_a_triton_that_is_not_torchs(monkeypatch, installed, have, status):
    monkeypatch.setattr(
        metadata, "requires", lambda name: ["triton==3.7.1; sys_platform == 'linux'"]
    )
    installed(triton=have)
    found = worst(software.requirements([])).get("torch and triton")
    assert (None if found is None else found.status) == status


def test_not_installed_at_all(monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert worst(software.packages())["packages"].status == "warning"


@pytest.mark.parametrize(
    ("this", "status"),
    [((3, 10, 1), "problem"), ((3, 11, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "warning")],
)
def test_another_python(monkeypatch, this, status):
    monkeypatch.setattr(sys, "version_info", this)
    first = next(iter(software.python()))
    assert (first.name, first.status) == ("Python", status)


@pytest.mark.parametrize("name", ["torch.py", "random.py", "transformers/__init__.py"])
def test_a_file_that_hides_a_library(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert worst(software.python())["Python"].status == "ok"
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    found = worst(software.python())["Python"]
    assert (found.status, name.partition("/")[0] in found.text) == ("problem", True)


@pytest.mark.parametrize(("has_gpu", "status"), [(True, "problem"), (False, "warning")])
def test_no_compiler(tmp_path, monkeypatch, has_gpu, status):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    found = worst(software.compiler(has_gpu))["compiler"]
    assert (found.status, "apt-get install gcc" in found.remedy) == (status, True)
    program(tmp_path, "clang", "")
    assert worst(software.compiler(has_gpu))["compiler"].status == "ok"
    monkeypatch.setenv("CC", "icc -O2")
    assert "CC=icc" in worst(software.compiler(has_gpu))["compiler"].text


def test_no_headers_of_python(tmp_path, monkeypatch):
    paths = {**sysconfig.get_paths(), "include": str(tmp_path), "platinclude": str(tmp_path)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    found = worst(software.compiler(True))["compiler"]
    assert (found.status, "-dev" in found.remedy) == ("problem", True)


@pytest.mark.parametrize("variable", ["TRITON_CACHE_DIR", "TRITON_HOME", "HOME"])
def test_a_cache_that_kernels_cannot_be_written_to(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, str(tmp_path / "cache"))
    assert str(tmp_path) in worst(software.compiler(True))["kernels' cache"].text

    def refuse(**options):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "NamedTemporaryFile", refuse)
        found = worst(software.compiler(True))["kernels' cache"]
        assert (found.status, "TRITON_CACHE_DIR" in found.remedy) == ("problem", True)
    real = os.statvfs(tmp_path)
    fields = [*real[:8], real.f_flag | os.ST_NOEXEC, real.f_namemax]
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
    assert "noexec" in worst(software.compiler(True))["kernels' cache"].text


@pytest.mark.parametrize(
    ("name", "value", "group", "status"),
    [
        ("CUDA_LAUNCH_BLOCKING", "1", "environment", "warning"),
        ("NCCL_P2P_DISABLE", "1", "environment", "warning"),
        ("TORCH_DISTRIBUTED_DEBUG", "detail", "environment", "warning"),
        ("PSYCHE_FAST_KERNELS", "interpret", "environment", "warning"),
        ("PSYCHE_FAST_KERNAL", "triton", "environment", "warning"),
        ("PSYCHE_FAST_TIMEOUT", "ten", "environment", "problem"),
        ("PSYCHE_FAST_TUNING", "/missing.toml", "environment", "problem"),
        ("REQUESTS_CA_BUNDLE", "/missing.pem", "environment", "warning"),
        ("SSL_CERT_DIR", "/missing", "environment", "warning"),
        ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1", "environment", "warning"),
        ("SLURM_STEP_NUM_TASKS", "4", "launcher", "problem"),  # nothing else of a step is there
        ("TORCHELASTIC_RUN_ID", "none", "launcher", "problem"),
    ],
)
def test_a_variable_that_slows_or_misleads(monkeypatch, name, value, group, status):
    assert worst(software.environment(True))["environment"].status == "ok"
    monkeypatch.setenv(name, value)
    found = worst(software.environment(True))[group]
    assert found.status == status
    assert name in found.text + found.remedy


def test_a_shell_in_a_job_of_several_ranks(monkeypatch):
    step = {"NUM_TASKS": "2", "NUM_NODES": "1", "NODELIST": "node1", "TASKS_PER_NODE": "2"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_STEP_{name}", value)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    found = worst(software.environment(False))["launcher"]
    assert (found.status, "rank 0 of 2" in found.text) == ("warning", True)


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_the_hub_is_not_asked(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(software, "reaches", lambda *_: pytest.fail("asked"))
    found = worst(software.hub())["hub"]
    assert (found.status, name in found.remedy) == ("warning", True)


def test_a_hub_that_does_not_answer_and_one_that_does(monkeypatch):
    with network.listen("127.0.0.1", 0) as here:
        port = here.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        assert worst(software.hub())["hub"].status == "ok"
    found = worst(software.hub())["hub"]
    assert (found.status, "refused" in found.text) == ("warning", True)
    monkeypatch.setenv("HF_ENDPOINT", "huggingface.co")
    assert worst(software.hub())["hub"].status == "problem"


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_that_is_not_there_is_named_without_its_password(monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with network.listen("127.0.0.1", 0) as here:
        port = here.getsockname()[1]
        monkeypatch.setenv(name, f"http://someone:secret@127.0.0.1:{port}")
        assert worst(software.hub())["proxy"].status == "ok"
    found = worst(software.hub())["proxy"]
    assert (found.status, name in found.text) == ("warning", True)
    assert "secret" not in str(list(software.hub()))
    monkeypatch.setenv(name, "http://[broken")
    assert worst(software.hub())["proxy"].status == "warning"


def test_the_version_has_commit_and_libraries(monkeypatch, tmp_path):
    first, second = version.version_lines()
    assert first.startswith("psyche-fast ")
    assert all(f"{name} {metadata.version(name)}" in second for name in ("torch", "transformers"))
    # A wheel has its commit in a file; without file and repository there is none to say.
    monkeypatch.setattr(version, "COMMIT_FILE", tmp_path / "commit.txt")
    (tmp_path / "commit.txt").write_text("0123456789ab\n")
    version.commit.cache_clear()
    assert version.version_lines()[0].endswith("(0123456789ab)")
    version.commit.cache_clear()
    (tmp_path / "commit.txt").unlink()
    monkeypatch.setattr(version, "__file__", str(tmp_path / "site-packages" / "p" / "version.py"))
    assert version.commit() is None
    version.commit.cache_clear()
