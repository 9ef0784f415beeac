"""Machines to plan for, as data: what `plan` must know of hosts that are not here. Knows nothing of tables or plans."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.description import build, nearest
from trainer.errors import ConfigError
from trainer.recipe import require

KNOWN = Path(__file__).with_name("machines.toml")
"""The machines that come with the trainer, each with the source of its numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One host and what joins it to others. Bandwidths are GB/s (10^9 bytes) in one direction."""

    device: Literal["cuda", "cpu"]

    ranks: int
    """Ranks of a host, where ``--gpus`` does not say otherwise: one for each of its GPUs."""

    host_gib: float
    """Memory of the host, which its ranks share equally."""

    host_gb_per_second: float
    """Bandwidth of the host's memory, which its ranks share equally."""

    intra_host_gb_per_second: float
    """From one rank to the others of its host."""

    inter_host_gb_per_second: float
    """From one rank to those of other hosts."""

    hbm_gib: float = 0.0
    """Memory of one device; 0 for a CPU."""

    hbm_gb_per_second: float = 0.0
    """Bandwidth of a device's memory."""

    host_link_gb_per_second: float = 0.0
    """Between a device and the memory of its host."""

    about: str = ""
    source: str = ""
    """Where the numbers are from."""

    def __post_init__(self) -> None:
        require(self.ranks >= 1, f"ranks is {self.ranks}, expected 1 or more")
        of_device = ("hbm_gib", "hbm_gb_per_second", "host_link_gb_per_second")
        of_host = ("host_gib", "host_gb_per_second", "intra_host_gb_per_second", "inter_host_gb_per_second")
        for name in of_host + (of_device if self.device == "cuda" else ()):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} is {value:g}, expected above 0")
        for name in of_device if self.device == "cpu" else ():
            value = getattr(self, name)
            require(value == 0, f"{name} is {value:g}, but device is 'cpu', which has none; leave it out")

    def with_hbm(self, hbm_gib: float) -> Machine:
        """The same machine with other memory on its devices.

        Raises:
            ConfigError: it has no devices, or that is no size of memory.
        """
        if self.device == "cpu":
            raise ConfigError("--hbm-gib is given, but the device is a CPU, which has no HBM; leave it out")
        if not 0 < hbm_gib < math.inf:
            raise ConfigError(f"--hbm-gib is {hbm_gib:g}, expected above 0")
        return dataclasses.replace(self, hbm_gib=hbm_gib)


def machine_of(name: str | None, own: Path | None = None) -> tuple[str, Machine]:
    """The machine of that name in the file ``own``, else among the known ones; of a file of one, that one.

    Raises:
        ConfigError: the file or the name is wrong; one line that names the key and the nearest right one.
    """
    machines = read_machines(own or KNOWN)
    if name is None and own is not None and len(machines) == 1:
        name = next(iter(machines))
    if name is None:
        raise ConfigError(f"--device is missing; expected one of {', '.join(machines)}")
    if name not in machines:
        raise ConfigError(
            f"--device is {name!r}, which {own or 'the trainer'} does not know; {nearest(name, list(machines))}"
        )
    return name, machines[name]


def read_machines(path: Path) -> dict[str, Machine]:
    """The machines of a TOML file, by name.

    Raises:
        ConfigError: it cannot be read, or a key, type or value is wrong.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read: {reason}; name an existing TOML file") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    loose = next((key for key, value in data.items() if not isinstance(value, dict)), None)
    if loose is not None or not data:
        what = f"{loose} lies outside of a section" if data else "has no sections"
        raise ConfigError(f"{path}: {what}; put each machine's keys below its name, like [h100]")
    try:
        return {name: build(Machine, plain, name) for name, plain in data.items()}
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
