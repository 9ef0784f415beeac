"""Named resources: what one host has, for ``-h`` of the components. Register your own where these do not fit yours."""

from torchx.specs import Resource


def cpu() -> Resource:
    """A host without GPUs."""
    return Resource(cpu=16, gpu=0, memMB=64_000)


def gpu1() -> Resource:
    """A host of one GPU. Cloud providers put at least this much beside one: 8 cores, which read and map, and 32 GB."""
    return _gpus(1)


def gpu2() -> Resource:
    """A host of two GPUs."""
    return _gpus(2)


def gpu4() -> Resource:
    """A host of four GPUs."""
    return _gpus(4)


def gpu8() -> Resource:
    """A host of eight GPUs."""
    return _gpus(8)


def _gpus(number: int) -> Resource:
    return Resource(cpu=8 * number, gpu=number, memMB=32_000 * number)
