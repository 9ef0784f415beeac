"""The doctor's rules on versions that are not installed here, and its report on what is."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import doctor
from trainer.doctor import Finding, Report, Versions, check_gpus, check_kernels, check_others, check_triple

CPU: Versions = {
    "torch": "2.13.0+cpu",
    "torchrec": "1.8.0",
    "fbgemm-gpu": None,
    "fbgemm-gpu-cpu": "1.8.0",
    "torchx": "0.7.0",
    "pyarrow": "26.0.1",
    "numpy": "2.4.6",
}
CUDA: Versions = {**CPU, "torch": "2.13.0+cu130", "fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": None}


def only(findings: list[Finding]) -> Finding:
    """The one finding there is."""
    assert len(findings) == 1, findings
    return findings[0]


@pytest.mark.parametrize("versions", [CPU, CUDA, {**CUDA, "torch": "2.13.0"}, {**CPU, "torch": "2.13.0"}])
def test_a_set_that_fits_has_no_findings(versions: Versions) -> None:
    assert check_triple(versions) + check_others(versions) == []


@pytest.mark.parametrize("minor", range(5, 30))
def test_fbgemm_and_torchrec_1_x_go_with_torch_2_x_plus_5_and_with_no_other(minor: int) -> None:
    torch = f"2.{minor}.1+cpu"
    fitting = [
        x for x in range(30) if not check_triple({"torch": torch, "torchrec": f"1.{x}.0", "fbgemm-gpu-cpu": f"1.{x}.0"})
    ]
    assert fitting == [minor - 5]


def test_both_builds_of_fbgemm_are_an_error_that_removes_both_and_installs_one() -> None:
    finding = only(check_triple({**CPU, "fbgemm-gpu": "1.8.0"}))
    assert finding.level == "error"
    assert "both installed" in finding.problem
    assert finding.fix == ("pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && pip install --no-deps fbgemm-gpu-cpu==1.8.0")


def test_of_both_builds_the_cuda_one_is_kept_for_a_torch_built_for_cuda() -> None:
    finding = only(check_triple({**CUDA, "fbgemm-gpu-cpu": "1.8.0"}))
    assert finding.fix.endswith("pip install --no-deps fbgemm-gpu==1.8.0")


@pytest.mark.parametrize(("versions", "build"), [(CPU, "fbgemm-gpu-cpu"), (CUDA, "fbgemm-gpu")])
def test_no_build_of_fbgemm_is_an_error_that_names_the_one_for_this_torch(versions: Versions, build: str) -> None:
    finding = only(check_triple({**versions, "fbgemm-gpu": None, "fbgemm-gpu-cpu": None}))
    assert (finding.level, finding.fix) == ("error", f"pip install --no-deps {build}==1.8.0")


def test_the_cuda_build_with_a_cpu_torch_is_an_error() -> None:
    finding = only(check_triple({**CUDA, "torch": "2.13.0+cpu"}))
    assert "cannot load" in finding.problem
    assert finding.fix == "pip uninstall -y fbgemm-gpu && pip install --no-deps fbgemm-gpu-cpu==1.8.0"


def test_a_version_that_does_not_fit_is_named_with_the_one_that_does() -> None:
    finding = only(check_triple({**CPU, "torchrec": "1.7.0"}))
    assert finding.level == "error"
    assert "torchrec 1.7.0 does not fit torch 2.13.0+cpu" in finding.problem
    assert finding.fix == "pip install --no-deps torchrec==1.8.0"


def test_a_newer_torch_makes_errors_of_both_fbgemm_and_torchrec() -> None:
    findings = check_triple({**CPU, "torch": "2.14.0+cpu"})
    assert [finding.fix.rpartition(" ")[2] for finding in findings] == ["fbgemm-gpu-cpu==1.9.0", "torchrec==1.9.0"]


def test_a_missing_torchrec_is_installed_without_its_dependencies() -> None:
    finding = only(check_triple({**CPU, "torchrec": None}))
    assert finding.problem == "torchrec is not installed"
    assert finding.fix == "pip install --no-deps torchrec==1.8.0"


@pytest.mark.parametrize("torch", ["2.14.0.dev20260901+cpu", "2.14.0a0+git1a2b3c4", "1.13.1+cpu", "3.0.0+cpu"])
def test_a_torch_outside_the_rule_is_a_warning_and_not_a_wrong_answer(torch: str) -> None:
    findings = check_triple({**CPU, "torch": torch})
    assert [finding.level for finding in findings] == ["warning", "warning"]
    assert all("cannot tell whether" in finding.problem for finding in findings)


def test_no_torch_is_one_error_and_not_one_for_each_that_needs_it() -> None:
    assert only(check_triple(dict.fromkeys(doctor.PACKAGES))).problem == "torch is not installed"


@pytest.mark.parametrize("name", ["torchx", "pyarrow", "numpy"])
def test_each_other_package_that_is_missing_is_an_error(name: str) -> None:
    assert only(check_others({**CPU, name: None})).problem == f"{name} is not installed"


def test_kernels_that_do_not_load_are_an_error_with_what_fbgemm_said() -> None:
    assert check_kernels(CPU, None) == []
    finding = only(check_kernels(CPU, "OSError: libcuda.so.1"))
    assert finding.level == "error"
    assert finding.problem.endswith("OSError: libcuda.so.1")
    assert finding.fix == "pip uninstall -y fbgemm-gpu-cpu && pip install --no-deps fbgemm-gpu-cpu==1.8.0"


def test_gpus_that_the_installed_builds_cannot_use_are_a_warning() -> None:
    assert check_gpus(CPU, 0, has_driver=False) == []
    assert check_gpus(CUDA, 8, has_driver=True) == []
    idle = only(check_gpus({**CPU, "torch": "2.13.0"}, 8, has_driver=True))
    assert (idle.level, "8 GPU(s)" in idle.problem) == ("warning", True)
    unseen = only(check_gpus(CPU, 0, has_driver=True))
    assert (unseen.level, "sees no GPU" in unseen.problem) == ("warning", True)


def test_only_errors_make_a_report_unsound() -> None:
    warning, error = Finding("warning", "slow", "wait"), Finding("error", "broken", "mend")
    assert Report(CPU, (), (warning,)).is_sound
    assert not Report(CPU, (), (warning, error)).is_sound


def test_the_description_names_every_package_device_problem_and_fix() -> None:
    report = Report({"torch": "2.13.0", "torchrec": None}, (("cores", "2"),), (Finding("error", "broken", "mend"),))
    lines = doctor.describe(report).splitlines()
    assert lines[:3] == ["torch     2.13.0", "torchrec  -", "cores     2"]
    assert lines[-4:] == ["error: broken", "  fix: mend", "", "not sound: mend the errors above"]


def test_this_machine_is_sound_and_its_kernels_run() -> None:
    out = io.StringIO()
    assert doctor.run(out) == 0, out.getvalue()
    assert "load and run" in out.getvalue()
    assert "gloo" in out.getvalue()


def test_an_unsound_machine_ends_with_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: Report({"torch": None}, (), (Finding("error", "broken", "mend"),)))
    assert doctor.run(io.StringIO()) == 1


@pytest.mark.parametrize(
    ("trial", "failure"),
    [
        ("raise OSError('Could not load this library')", "OSError: Could not load this library"),
        ("import os; os.abort()", "the process ended with code -6"),
        ("import time; time.sleep(60)", "no answer in 3 s"),
        ("", None),
    ],
)
def test_a_build_that_fails_crashes_or_hangs_is_reported_and_does_not_end_the_doctor(
    monkeypatch: pytest.MonkeyPatch, trial: str, failure: str | None
) -> None:
    monkeypatch.setattr(doctor, "_KERNEL_TRIAL", trial)
    monkeypatch.setattr(doctor, "KERNEL_SECONDS", 3)
    assert doctor._kernel_failure() == failure


def test_missing_tools_are_warnings_with_a_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    rows, findings = doctor._tools()
    assert dict(rows) == {"C++ compiler": "-", "torchrun": "-"}
    assert [finding.level for finding in findings] == ["warning", "warning"]
    assert f'export PATH="{Path(sys.executable).parent}:$PATH"' in [finding.fix for finding in findings]


def test_the_doctor_itself_loads_without_the_libraries_that_it_judges() -> None:
    names = "torch", "torchrec", "fbgemm_gpu", "torchx", "pyarrow", "numpy"
    code = f"import sys, trainer.doctor; raise SystemExit(' '.join(set(sys.modules) & {set(names)!r}))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert said.stderr.strip() == ""
