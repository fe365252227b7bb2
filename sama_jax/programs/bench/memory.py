"""Measures the memory that a process needs above what it had when the measurement began."""

import re
from pathlib import Path
from typing import Protocol, runtime_checkable

CLEAR_REFS = Path("/proc/self/clear_refs")


class HostMemory:
    """Measures resident memory by the kernel's count, from the making up to the first `stop`."""

    def __init__(self):
        if CLEAR_REFS.exists():
            CLEAR_REFS.write_text("5")  # the high-water mark starts anew
        self._before = _resident("VmRSS")
        self._most: int | None = None

    def stop(self) -> int | None:
        """Returns bytes; None where the system does not say. What comes later is not looked at."""
        if self._most is None:
            now = _resident("VmHWM")
            self._most = None if now is None or self._before is None else now - self._before
        return self._most


def _resident(name: str) -> int | None:
    """Returns bytes: VmRSS now, VmHWM at most so far; None elsewhere than on Linux."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    found = re.search(rf"{name}:\s+(\d+) kB", status.read_text())
    return None if found is None else 1024 * int(found[1])


@runtime_checkable
class CountsMemory(Protocol):
    """A device as `jax.devices()` returns it, as far as its memory goes."""

    def memory_stats(self) -> dict[str, int] | None:
        """Returns counts of bytes by name."""
        ...


class DeviceMemory:
    """Measures an accelerator's memory by JAX's count, from the making up to the first `stop`."""

    def __init__(self, device: CountsMemory):
        self._device = device
        self._before = self._read("bytes_in_use")
        self._most: int | None = None

    def stop(self) -> int:
        """Returns bytes. What comes later is not looked at."""
        if self._most is None:
            self._most = self._read("peak_bytes_in_use") - self._before
        return self._most

    def _read(self, name: str) -> int:
        return (self._device.memory_stats() or {}).get(name, 0)
