import json
from types import SimpleNamespace

import pytest

from local_tinker.cli import app, doctor
from local_tinker.cli.doctor import Check
from local_tinker.hardware import Hardware

GIB = 2**30
CARD = Hardware(
    kind="cuda", name="RTX 5090", total_bytes=32 * GIB, free_bytes=31 * GIB, capability=(12, 0), bf16=True, driver="580"
)
CPU = Hardware(kind="cpu", name="EPYC", total_bytes=16 * GIB, free_bytes=12 * GIB, note="no driver")


def torch_build(*, cuda, available=True, archs=("sm_90", "sm_120")):
    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(is_available=lambda: available, get_arch_list=lambda: list(archs)),
    )


@pytest.mark.parametrize(
    "built_for, capability, runs",
    [
        (["sm_80"], (8, 9), True),
        (["sm_89"], (8, 6), False),
        (["sm_80", "sm_90"], (12, 0), False),
        (["sm_80", "compute_90"], (12, 0), True),
        (["compute_120"], (9, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_120"], (12, 0), True),
        ([], (8, 0), False),
    ],
)
def test_a_build_runs_on_its_major_version_or_through_ptx(built_for, capability, runs):
    assert doctor.runs_on(built_for, capability) == runs


@pytest.mark.parametrize(
    "build, says",
    [
        (torch_build(cuda=None), "built for CPU, which cannot use RTX 5090"),
        (torch_build(cuda="13.0", available=False), "driver 580 is older than that build needs"),
        (torch_build(cuda="12.4", archs=("sm_80", "sm_90")), "without sm_120 of RTX 5090"),
    ],
)
def test_a_torch_that_cannot_drive_the_card_fails_with_a_command(build, says):
    check = doctor.check_torch(CARD, build)
    assert check.state == "fail" and says in check.detail
    assert "uv pip install --reinstall torch --torch-backend=auto" in check.fix


def test_a_torch_that_can_drive_the_card_is_fine_and_a_cpu_build_is_fine_on_a_cpu():
    assert doctor.check_torch(CARD, torch_build(cuda="13.0")).state == "ok"
    assert doctor.check_torch(CPU, torch_build(cuda=None)).state == "ok"


def test_a_package_that_is_missing_or_old_gives_its_install_line(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.9.1")
    assert doctor.check_package("thing", (5, 10)) == Check(
        "thing", "fail", "5.9.1 is too old", 'pip install --upgrade "thing>=5.10"'
    )
    assert doctor.check_package("thing", (5, 9)).state == "ok"
    monkeypatch.undo()
    missing = doctor.check_package("no-such-package-of-ours", (1, 0))
    assert (missing.state, missing.fix) == ("fail", 'pip install "no-such-package-of-ours>=1.0"')


def test_the_quantiser_is_really_tried():
    check = doctor.check_quantizer(CPU, usable_torch=True)
    assert check.state == "ok" and "NF4 tried on the cpu" in check.detail


def test_a_quantiser_that_breaks_or_returns_nonsense_fails(monkeypatch):
    answers = iter([("", "ImportError: libbitsandbytes.so", 1), ("0.7\n", "", 0), ("nan\n", "", 0)])

    def run(*args, **kwargs):
        out, err, code = next(answers)
        return SimpleNamespace(stdout=out, stderr=err, returncode=code)

    monkeypatch.setattr("subprocess.run", run)
    for says in ("libbitsandbytes.so", "error 0.7", "error nan"):
        check = doctor.check_quantizer(CPU, usable_torch=True)
        assert check.state == "fail" and says in check.detail and 'quantize="none"' in check.fix


def test_a_card_without_bf16_or_with_a_neighbour_is_a_warning():
    from dataclasses import replace

    assert doctor.check_hardware(CARD).state == "ok"
    assert "no bfloat16" in doctor.check_hardware(replace(CARD, bf16=False)).detail
    assert "another program holds memory" in doctor.check_hardware(replace(CARD, free_bytes=20 * GIB)).detail
    assert doctor.check_hardware(CPU).state == "warn"


def test_caches_list_what_is_in_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LOCAL_TINKER_CACHE", str(tmp_path / "own"))
    whole = tmp_path / "hub" / "models--a--whole" / "snapshots" / "1"
    whole.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (whole / name).write_text("{}")
    (tmp_path / "hub" / "models--a--half" / "snapshots").mkdir(parents=True)
    (tmp_path / "own" / "models" / "tiny-1").mkdir(parents=True)
    hub, own = doctor.check_caches()
    assert "1 models (a/whole), 1 incomplete" in hub.detail and "1 models (tiny-1)" in own.detail


def test_little_disk_is_a_warning_with_a_way_out(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2 * GIB))
    assert all(c.state == "warn" and "HF_HOME" in c.fix for c in doctor.check_caches())


def test_hub_settings_are_told_and_the_token_is_not(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.check_hub().fix == "unset HF_HUB_OFFLINE to allow downloads"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    check = doctor.check_hub()
    assert (
        check.state == "ok" and "https://mirror.example; a token is set" in check.detail and "secret" not in str(check)
    )


def answers(monkeypatch, checks):
    monkeypatch.setattr(doctor, "detect", lambda: CPU)
    monkeypatch.setattr(doctor, "run_checks", lambda hardware: checks)


def test_the_exit_code_is_3_only_when_something_essential_fails(monkeypatch, capsys):
    answers(monkeypatch, [Check("gpu", "warn", "none", "get one")])
    assert app.main(["doctor"]) == 0
    assert capsys.readouterr().out == "warn  gpu: none\n      fix: get one\n\nReady.\n"
    answers(monkeypatch, [Check("torch", "fail", "broken", "mend it"), Check("hub", "ok", "fine")])
    assert app.main(["doctor"]) == 3
    assert capsys.readouterr().out.endswith("Not ready: torch.\n")


def test_json_says_the_same(monkeypatch, capsys):
    answers(monkeypatch, [Check("torch", "fail", "broken", "mend it")])
    assert app.main(["doctor", "--json"]) == 3
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False and answer["hardware"]["kind"] == "cpu"
    assert answer["checks"] == [{"name": "torch", "state": "fail", "detail": "broken", "fix": "mend it"}]


def test_this_machine_is_examined_whole(monkeypatch):
    monkeypatch.setattr(
        doctor, "check_quantizer", lambda hardware, *, usable_torch: Check("bitsandbytes", "ok", "tried")
    )
    names = [check.name for check in doctor.run_checks(CPU)]
    assert names[:3] == ["python", "gpu", "torch"] and {"bitsandbytes", "hub cache", "hub"} <= set(names)
