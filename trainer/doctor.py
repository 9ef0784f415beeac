"""What is installed here and whether it fits together: versions, kernels, devices. Knows no run description.

Input: the installed packages and this machine. Output: a Report, a table of it and an exit code. The rules about
versions are pure functions of a mapping of versions, so that they need none of the libraries that they judge.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

Versions = Mapping[str, str | None]
"""Version by distribution name; None where it is not installed."""

PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchx", "pyarrow", "numpy")

KERNEL_SECONDS = 120
"""Time that loading FBGEMM and running one kernel may take; a cold disk needs 20 s."""

_KERNEL_TRIAL = (
    "import torch, fbgemm_gpu;"
    "sums = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2, 3]));"
    "raise SystemExit(0 if sums.tolist() == [0, 1, 3, 6] else f'wrong sums {sums.tolist()}')"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that does not fit, and the way to mend it."""

    level: Literal["error", "warning"]
    """``error``: training cannot work; ``warning``: it works, with the restriction that ``problem`` names."""

    problem: str
    fix: str


@dataclass(frozen=True, slots=True)
class Report:
    """What there is, and what is wrong with it."""

    versions: Versions
    machine: tuple[tuple[str, str], ...]
    """(name, description) of interpreter, processor, memory, devices, backends and tools."""

    findings: tuple[Finding, ...]

    @property
    def is_sound(self) -> bool:
        """True if training can work here."""
        return all(finding.level != "error" for finding in self.findings)


def run(out: TextIO | None = None) -> int:
    """Examine this machine and write the report to ``out`` (standard output if None); 0 if it is sound, else 1."""
    report = examine()
    stream = out or sys.stdout
    stream.write(describe(report) + "\n")
    return 0 if report.is_sound else 1


def examine() -> Report:
    """Look at the installed packages, try an FBGEMM kernel in a process of its own, and list the devices."""
    versions = {name: _version(name) for name in PACKAGES}
    findings = check_triple(versions) + check_others(versions)
    machine = [("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    machine += [("cores", str(_cores())), ("memory", _memory())]
    if versions["torch"] is not None:
        devices, device_findings = _devices(versions)
        machine += devices
        findings += device_findings
    if versions["torch"] is not None and _fbgemm_builds(versions):
        failure = _kernel_failure()
        machine.append(("fbgemm kernels", "fail" if failure else "load and run"))
        findings += check_kernels(versions, failure)
    tools, tool_findings = _tools()
    return Report(versions, tuple(machine + tools), tuple(findings + tool_findings))


def describe(report: Report) -> str:
    """The report as a table of what there is, then one paragraph per finding, then a verdict."""
    rows = [(name, version or "-") for name, version in report.versions.items()] + list(report.machine)
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    for finding in report.findings:
        lines += ["", f"{finding.level}: {finding.problem}", f"  fix: {finding.fix}"]
    verdict = "sound: ready to train" if report.is_sound else "not sound: mend the errors above"
    return "\n".join([*lines, "", verdict])


def check_triple(versions: Versions) -> list[Finding]:
    """What is wrong with torch, torchrec and FBGEMM: one FBGEMM build, fbgemm 1.X with torch 2.(X+5) and torchrec 1.X.

    >>> check_triple({"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"})
    []
    """
    torch = versions.get("torch")
    if torch is None:
        return [Finding("error", "torch is not installed", "make install, or pip install -e '.[cpu]'")]
    findings = _check_builds(versions)
    for name in [*_fbgemm_builds(versions), "torchrec"]:
        findings += _check_fits(name, versions.get(name), torch)
    return findings


def check_others(versions: Versions) -> list[Finding]:
    """What is wrong with the packages beside the triple: only whether they are there."""
    return [
        Finding("error", f"{name} is not installed", "make install, or pip install -e .")
        for name in ("torchx", "pyarrow", "numpy")
        if versions.get(name) is None
    ]


def check_kernels(versions: Versions, failure: str | None) -> list[Finding]:
    """The finding for ``failure``, the last line of what FBGEMM said when a kernel was tried; none if None."""
    if failure is None:
        return []
    wanted = _wanted_build(versions)
    fix = f"{_uninstall(*_fbgemm_builds(versions))} && {_install(wanted, _partner(versions.get('torch')))}"
    return [Finding("error", f"FBGEMM is installed but its kernels do not work: {failure}", fix)]


def check_gpus(versions: Versions, num_gpus: int, *, has_driver: bool) -> list[Finding]:
    """Whether the GPUs of this machine can be used by the builds that are installed.

    ``num_gpus`` is what torch sees, ``has_driver`` whether there is an NVIDIA driver at all.
    """
    if num_gpus and _fbgemm_builds(versions) == ["fbgemm-gpu-cpu"]:
        problem = f"torch sees {num_gpus} GPU(s), but fbgemm-gpu-cpu has no kernels for them: they cannot be used"
        fix = f"{_uninstall('fbgemm-gpu-cpu')} && {_install('fbgemm-gpu', _partner(versions.get('torch')))}"
        return [Finding("warning", problem, fix)]
    if has_driver and not num_gpus:
        problem = f"there is an NVIDIA driver, but torch {versions.get('torch')} sees no GPU: training runs on the CPU"
        fix = "make install BUILD=cuda VENV=.venv.cuda; with a CUDA build, see nvidia-smi and CUDA_VISIBLE_DEVICES"
        return [Finding("warning", problem, fix)]
    return []


def _check_builds(versions: Versions) -> list[Finding]:
    """Whether exactly one build of FBGEMM is there, and one that this torch can load."""
    builds, torch = _fbgemm_builds(versions), versions.get("torch")
    wanted = _wanted_build(versions)
    install = _install(wanted, _partner(torch))
    if not builds:
        return [Finding("error", "no FBGEMM is installed; the tables need its kernels", install)]
    if len(builds) == 2:
        problem = "fbgemm-gpu and fbgemm-gpu-cpu are both installed; each overwrote files of the other"
        return [Finding("error", problem, f"{_uninstall(*builds)} && {install}")]
    if builds == ["fbgemm-gpu"] and wanted == "fbgemm-gpu-cpu":
        problem = f"fbgemm-gpu is the CUDA build, which torch {torch} (CPU) cannot load"
        return [Finding("error", problem, f"{_uninstall('fbgemm-gpu')} && {install}")]
    return []


def _check_fits(name: str, version: str | None, torch: str) -> list[Finding]:
    """Whether ``version`` of FBGEMM or TorchRec is the one that was built for this ``torch``."""
    partner = _partner(torch)
    install = _install(name, partner)
    if version is None:
        return [Finding("error", f"{name} is not installed", install)]
    if partner is None or _release(version) is None:
        problem = f"cannot tell whether {name} {version} fits torch {torch}: not plain release versions"
        return [Finding("warning", problem, "install releases: fbgemm and torchrec 1.X go with torch 2.(X+5)")]
    if _release(version) == _release(partner):
        return []
    problem = f"{name} {version} does not fit torch {torch}: 1.X goes with torch 2.(X+5), so {partner} is right"
    return [Finding("error", problem, install)]


def _fbgemm_builds(versions: Versions) -> list[str]:
    """The builds of FBGEMM that are installed: none, one or both."""
    return [name for name in ("fbgemm-gpu", "fbgemm-gpu-cpu") if versions.get(name) is not None]


def _wanted_build(versions: Versions) -> str:
    """The build of FBGEMM for this torch: the CPU build goes with every torch, the CUDA one with those for CUDA.

    >>> _wanted_build({"torch": "2.13.0+cu130"})
    'fbgemm-gpu'
    >>> _wanted_build({"torch": "2.13.0+cpu"})
    'fbgemm-gpu-cpu'
    """
    torch, builds = versions.get("torch") or "", _fbgemm_builds(versions)
    if "+cu" in torch:
        return "fbgemm-gpu"
    if "+cpu" in torch:
        return "fbgemm-gpu-cpu"
    if len(builds) == 1:  # a version without a suffix: CUDA on Linux, CPU elsewhere; both load the CPU build
        return builds[0]
    return "fbgemm-gpu" if platform.system() == "Linux" else "fbgemm-gpu-cpu"


def _partner(torch: str | None) -> str | None:
    """The version of FBGEMM and TorchRec that was built for a version of torch; None if it is no plain release.

    >>> _partner("2.13.0+cpu")
    '1.8.0'
    """
    release = _release(torch or "")
    if release is None or release[0] != 2 or release[1] < 5:
        return None
    return f"1.{release[1] - 5}.0"


def _release(version: str) -> tuple[int, int] | None:
    """(major, minor) of a release; None for a nightly build.

    >>> _release("1.8.0"), _release("2.14.0.dev20260901+cpu")
    ((1, 8), None)
    """
    match = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)*(\.post\d+)?(\+.*)?", version)
    return (int(match[1]), int(match[2])) if match else None


def _install(name: str, version: str | None) -> str:
    """The command that installs a package alone: with dependencies TorchRec would bring the CUDA build of FBGEMM."""
    return f"pip install --no-deps {name}" + (f"=={version}" if version else "")


def _uninstall(*names: str) -> str:
    """The command that removes packages; both builds of FBGEMM go, for they share their files."""
    return f"pip uninstall -y {' '.join(names)}"


def _version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernel_failure() -> str | None:
    """Why an FBGEMM kernel does not run, None if it does; tried apart, as a build that does not fit may crash."""
    try:
        trial = subprocess.run(
            [sys.executable, "-c", _KERNEL_TRIAL], capture_output=True, text=True, timeout=KERNEL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {KERNEL_SECONDS} s"
    if trial.returncode == 0:
        return None
    said = trial.stderr.strip().splitlines()
    return said[-1] if said else f"the process ended with code {trial.returncode}"


def _devices(versions: Versions) -> tuple[list[tuple[str, str]], list[Finding]]:
    """(name, description) of each GPU and backend that torch offers, and what is wrong with them."""
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:
        fix = f"pip install --force-reinstall --no-deps torch=={(versions['torch'] or '').partition('+')[0]}"
        return [], [Finding("error", f"torch does not load: {str(error).splitlines()[0]}", fix)]
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    rows = []
    for gpu in range(num_gpus):
        properties = torch.cuda.get_device_properties(gpu)
        rows.append((f"cuda:{gpu}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    if num_gpus == 0:
        rows.append(("cuda", "no device" if torch.version.cuda else "not in this build of torch"))
    backends = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    rows.append(("backends", ", ".join(name for name, there in backends.items() if there) or "none"))
    return rows, check_gpus(versions, num_gpus, has_driver=shutil.which("nvidia-smi") is not None)


def _tools() -> tuple[list[tuple[str, str]], list[Finding]]:
    """(name, path) of the programs that training calls, and what is wrong with them."""
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    compiler = next((path for path in map(shutil.which, compilers) if path), None)
    torchrun = shutil.which("torchrun")
    findings = []
    if compiler is None:
        problem = f"no C++ compiler ({' or '.join(compilers)}): torch.compile does not work on CPU"
        findings.append(Finding("warning", problem, "install g++, or set CXX to the compiler's path"))
    if torchrun is None:
        problem = "torchrun is not on PATH: TorchX's local scheduler cannot start ranks"
        beside = Path(sys.executable).parent
        findings.append(Finding("warning", problem, f'export PATH="{beside}:$PATH"'))
    return [("C++ compiler", compiler or "-"), ("torchrun", torchrun or "-")], findings


def _cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def _memory() -> str:
    """Memory of this machine, or what a container leaves of it."""
    try:
        total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = Path("/sys/fs/cgroup/memory.max")
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            total_bytes = min(total_bytes, int(text))
    except (OSError, ValueError):
        return "unknown"
    return f"{total_bytes / 2**30:.1f} GiB"
