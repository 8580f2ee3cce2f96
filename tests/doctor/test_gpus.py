"""Drivers and GPUs that are broken, as an `nvidia-smi` of a test's says it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from psyche_fast.doctor import devices, gpus
from tests.doctor.support import program, worst

HEALTHY = {
    "mig": "Disabled",
    "width": "16x",
    "mode": "Default",
    "uncorrectable": "0",
    "pending": "No",
    "failure": "No",
    "thermal": "Not Active",
    "brake": "Not Active",
    "fabric": "N/A",
    "used": "4 MiB",
    "processes": "",
}
GPU = """
<gpu id="00000000:0B:00.0"><product_name>NVIDIA H100 80GB HBM3</product_name>
<mig_mode><current_mig>{mig}</current_mig></mig_mode>
<pci><pci_gpu_link_info><link_widths><max_link_width>16x</max_link_width>
<current_link_width>{width}</current_link_width></link_widths></pci_gpu_link_info></pci>
<fb_memory_usage><total>81559 MiB</total><used>{used}</used></fb_memory_usage>
<compute_mode>{mode}</compute_mode><fabric><state>{fabric}</state></fabric>
<ecc_errors><volatile><dram_uncorrectable>{uncorrectable}</dram_uncorrectable></volatile></ecc_errors>
<remapped_rows><remapped_row_pending>{pending}</remapped_row_pending>
<remapped_row_failure>{failure}</remapped_row_failure></remapped_rows>
<clocks_event_reasons><clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
<clocks_event_reason_hw_thermal_slowdown>{thermal}</clocks_event_reason_hw_thermal_slowdown>
<clocks_event_reason_hw_power_brake_slowdown>{brake}</clocks_event_reason_hw_power_brake_slowdown>
</clocks_event_reasons><processes>{processes}</processes></gpu>
"""
TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tmlx5_0\tCPU Affinity\x1b[0m
GPU0\t X \t{a}\t{b}\tPIX\t0-47
GPU1\t{a}\t X \t{b}\tPXB\t0-47
GPU2\t{b}\t{b}\t X \tSYS\t48-95
mlx5_0\tPIX\tPXB\tSYS\t X

Legend:
  SYS  = Connection traversing PCIe as well as the SMP interconnect
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A PATH on which `nvidia-smi` is a script; the function writes it."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def have(*cards: dict[str, str], cuda="13.0", topology="", script=None):
        text = "".join(GPU.format(**{**HEALTHY, **card}) for card in cards)
        head = f"<driver_version>580.65</driver_version><cuda_version>{cuda}</cuda_version>"
        (tmp_path / "said").write_text(f"<nvidia_smi_log>{head}{text}</nvidia_smi_log>")
        (tmp_path / "topology").write_text(topology)
        answer = (
            f'case "$1" in topo) /bin/cat {tmp_path}/topology;; *) /bin/cat {tmp_path}/said;; esac'
        )
        program(tmp_path / "bin", "nvidia-smi", script or answer)
        return gpus.ask()

    return have


def test_healthy_gpus_are_ok_and_counted_with_their_memory(machine):
    found = list(gpus.driver(machine({}, {})))
    assert {one.status for one in found} == {"ok"}
    assert "580.65, for CUDA up to 13.0" in found[0].text
    assert [one.text for one in found[1:]] == ["NVIDIA H100 80GB HBM3, 80 GiB"] * 2


@pytest.mark.parametrize(
    ("fault", "status", "said", "remedy"),
    [
        ({"uncorrectable": "3"}, "problem", "3 uncorrectable errors", "restart"),
        ({"failure": "Yes"}, "problem", "could not be replaced", "changed"),
        ({"pending": "Yes"}, "warning", "wait to be replaced", "restart"),
        ({"mig": "Enabled"}, "warning", "MIG is on", "-mig 0"),
        ({"mode": "Prohibited"}, "problem", "Prohibited", "-c DEFAULT"),
        ({"mode": "Exclusive_Process"}, "warning", "one process", "-c DEFAULT"),
        ({"fabric": "In Progress"}, "problem", "fabric", "nvidia-fabricmanager"),
        ({"width": "4x"}, "warning", "4 lanes wide of 16", "seat"),
        ({"thermal": "Active"}, "warning", "too hot", "fans"),
        ({"brake": "Active"}, "warning", "power supply", "power supply"),
        ({"used": "9000 MiB"}, "warning", "not seen from here, 8.8 GiB", "--device"),
        (
            {"processes": "<process_info><type>C</type><process_name>python</process_name>"
                          "</process_info>"},
            "warning", "in use by python", "--device",
        ),
    ],
)  # fmt: skip
def test_a_fault_of_the_second_gpu_is_said_of_it(machine, fault, status, said, remedy):
    found = worst(gpus.driver(machine({}, fault)))
    assert found["GPU 0"].status == "ok"
    assert found["GPU 1"].status == status
    assert said in found["GPU 1"].text
    assert remedy in found["GPU 1"].remedy


def test_a_desktop_on_a_gpu_is_nobody_who_computes(machine):
    desktop = "<process_info><type>G</type><process_name>Xorg</process_name></process_info>"
    assert worst(gpus.driver(machine({"processes": desktop})))["GPU 0"].status == "ok"


@pytest.mark.parametrize(
    ("script", "remedy"),
    [
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", "restart"),
        ("echo 'Failed to initialize NVML: Unknown Error'; exit 255", "--gpus all"),
        (
            'echo "NVIDIA-SMI has failed because it couldn\'t communicate with the NVIDIA driver.";'
            " exit 9",
            "modprobe",
        ),
        ("echo 'no XML'", "dmesg"),
        ("exit 3", "dmesg"),
        ("exec sleep 5", "a GPU hangs"),
    ],
)
def test_a_driver_that_does_not_answer(machine, monkeypatch, script, remedy):
    monkeypatch.setattr(gpus, "_SECONDS", 0.3)
    (found,) = gpus.driver(machine(script=script))
    assert (found.name, found.status) == ("GPUs", "problem")
    assert found.text
    assert remedy in found.remedy


def test_a_driver_without_gpus(machine):
    assert worst(gpus.driver(machine()))["GPUs"].status == "problem"


@pytest.mark.parametrize(
    ("text", "status"),
    [("", "warning"), ("-1", "warning"), ("0,1", "ok"), ("0,2", "problem"), ("GPU-8f2", "ok")],
)
def test_cuda_visible_devices(machine, monkeypatch, text, status):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    assert worst(gpus.driver(machine({}, {})))["CUDA_VISIBLE_DEVICES"].status == status


@pytest.mark.parametrize(
    ("a", "b", "status"),
    [("NV18", "NV18", "ok"), ("PIX", "SYS", "warning"), ("NV4", "SYS", "ok"), ("PHB", "PHB", "ok")],
)
def test_links_between_gpus(machine, a, b, status):
    state = machine({}, {}, {}, topology=TOPOLOGY.format(a=a, b=b))
    (found,) = gpus.links(state)
    assert found.status == status
    expected = {a: 3} if a == b else {a: 1, b: 2}
    assert all(f"{count} pairs by {kind}" in found.text for kind, count in expected.items())


def test_links_that_nvidia_smi_does_not_say(machine):
    assert [one.status for one in gpus.links(machine({}, {}))] == ["warning"]
    assert list(gpus.links(machine({}))) == []


def fake_torch(*, cuda="13.0", available=True, capabilities=((9, 0),), compiled=None, hip=None,
               init="", peers=True):  # fmt: skip
    """A torch that says it was built so."""

    def fail():
        raise RuntimeError(init)

    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda, hip=hip),
        cuda=SimpleNamespace(
            is_available=lambda: available,
            init=fail,
            get_arch_list=lambda: compiled or ["sm_80", "sm_90", "compute_90"],
            device_count=lambda: len(capabilities),
            get_device_capability=lambda index: capabilities[index],
            get_device_name=lambda index: "a card",
            can_device_access_peer=lambda one, other: peers,
        ),
    )


def test_a_torch_for_the_cpu_on_a_machine_with_a_gpu(machine):
    torch = fake_torch(cuda=None, available=False)
    found = worst(devices.builds(torch, machine({}, cuda="12.8")))["torch"]
    assert (found.status, found.remedy.count("whl/cu128")) == ("problem", 1)
    none = gpus.Driver(None, None, (), "there is no nvidia-smi")
    assert worst(devices.builds(torch, none))["torch"].status == "ok"


@pytest.mark.parametrize(
    ("built", "driver", "status"),
    [("13.0", "12.4", "problem"), ("12.8", "12.4", "ok"), ("12.8", "13.0", "ok")],
)
def test_a_driver_too_old_for_the_torch(machine, built, driver, status):
    found = worst(devices.builds(fake_torch(cuda=built), machine({}, cuda=driver)))["torch"]
    assert found.status == status
    assert status == "ok" or "update the driver" in found.remedy


def test_a_torch_that_does_not_find_the_gpu_says_why(machine):
    torch = fake_torch(available=False, init="CUDA unknown error - set up incorrectly\nmore")
    found = worst(devices.builds(torch, machine({})))["torch"]
    assert found.status == "problem"
    assert found.text.endswith("CUDA unknown error - set up incorrectly")


@pytest.mark.parametrize(
    ("capability", "compiled", "status"),
    [
        ((9, 0), None, "ok"),
        ((8, 6), None, "ok"),  # code for 8.0 runs
        ((12, 0), None, "ok"),  # by translation
        ((12, 0), ["sm_80", "sm_90"], "problem"),
        ((7, 5), ["sm_75"], "warning"),
        ((7, 0), ["sm_70"], "problem"),
        ((10, 3), ["sm_100", "sm_120"], "ok"),
    ],
)
def test_a_gpu_that_torch_has_no_code_for(machine, capability, compiled, status):
    torch = fake_torch(capabilities=[capability], compiled=compiled)
    assert worst(devices.builds(torch, machine({})))["GPU 0"].status == status


def test_rocm_has_not_been_tried(machine):
    found = worst(devices.builds(fake_torch(cuda=None, hip="6.4"), machine()))["torch"]
    assert (found.status, "ROCm" in found.text) == ("warning", True)


def test_flash_attention_of_another_torch(monkeypatch):
    assert worst(devices.flash_attention())["flash-attention"].status == "ok"
    monkeypatch.setattr(devices.metadata, "version", lambda name: "2.8.3")

    def load(name):
        raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c10")

    monkeypatch.setattr(devices, "import_module", load)
    found = worst(devices.flash_attention())["flash-attention"]
    assert (found.status, "undefined symbol" in found.text) == ("problem", True)
    assert "--no-build-isolation" in found.remedy
