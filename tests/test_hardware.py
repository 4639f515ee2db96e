import sys
from types import SimpleNamespace

import pytest

from local_tinker import hardware

GIB = 2**30


class FakeError(Exception):
    pass


def fake_nvml(cards, *, broken=False):
    """The nvidia-ml-py calls that are used, over a list of (name, total, free, capability)."""

    def init():
        if broken:
            raise FakeError("Driver Not Loaded")

    return SimpleNamespace(
        NVMLError=FakeError,
        nvmlInit=init,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(cards),
        nvmlDeviceGetHandleByIndex=lambda i: cards[i],
        nvmlDeviceGetHandleByUUID=lambda u: {f"GPU-{i}": card for i, card in enumerate(cards)}[u],
        nvmlDeviceGetMemoryInfo=lambda card: SimpleNamespace(total=card[1], free=card[2]),
        nvmlDeviceGetCudaComputeCapability=lambda card: card[3],
        nvmlDeviceGetName=lambda card: card[0].encode(),
        nvmlSystemGetDriverVersion=lambda: "580.95",
    )


TWO_CARDS = [("RTX 4090", 24 * GIB, 23 * GIB, (8, 9)), ("RTX 2080", 8 * GIB, 7 * GIB, (7, 5))]


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lambda cards, **kw: monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(cards, **kw))


def test_the_first_card_is_described(machine):
    machine(TWO_CARDS)
    card = hardware.detect()
    assert (card.kind, card.name, card.capability, card.bf16) == ("cuda", "RTX 4090", (8, 9), True)
    assert (card.total_bytes, card.free_bytes, card.driver, card.count) == (24 * GIB, 23 * GIB, "580.95", 2)


@pytest.mark.parametrize("visible", ["1", "GPU-1", " 1 "])
def test_cuda_visible_devices_chooses_by_index_or_uuid(machine, monkeypatch, visible):
    machine(TWO_CARDS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    card = hardware.detect()
    assert (card.name, card.bf16, card.count) == ("RTX 2080", False, 1)


@pytest.mark.parametrize(
    "visible, reason",
    [("", "hides every card"), ("-1", "hides every card"), ("7", "names card 7, the driver lists 2")],
)
def test_hidden_or_missing_cards_leave_the_cpu_and_say_why(machine, monkeypatch, visible, reason):
    machine(TWO_CARDS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = hardware.detect()
    assert found.kind == "cpu" and reason in found.note


def test_without_a_driver_the_cpu_is_used_and_the_reason_kept(machine):
    machine([], broken=True)
    found = hardware.detect()
    assert found.kind == "cpu" and "Driver Not Loaded" in found.note
    assert 0 < found.free_bytes <= found.total_bytes


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = "MemTotal:       16777216 kB\nMemFree:  1048576 kB\nMemAvailable:   8388608 kB\n"


def test_memory_is_the_machines_without_a_container(tmp_path):
    write(tmp_path, {"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": "max\n"})
    assert hardware.memory(root=tmp_path) == (16 * GIB, 8 * GIB)


def test_a_cgroup_v2_limit_on_a_parent_group_counts_and_page_cache_is_free(tmp_path):
    write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/box/job\n",
            "sys/fs/cgroup/box/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/box/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/box/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            "sys/fs/cgroup/box/job/memory.max": "max\n",
        },
    )
    assert hardware.memory(root=tmp_path) == (4 * GIB, 2 * GIB)


def test_a_cgroup_v1_limit_counts_and_its_no_limit_number_does_not(tmp_path):
    files = {
        "proc/meminfo": MEMINFO,
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "0\n",
    }
    write(tmp_path, files)
    assert hardware.memory(root=tmp_path) == (16 * GIB, 8 * GIB)
    write(tmp_path, {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n"})
    assert hardware.memory(root=tmp_path) == (2 * GIB, 2 * GIB)
