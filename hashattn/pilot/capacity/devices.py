"""Devices by name: memory and bandwidth as their makers state them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import MappingProxyType

from hashattn.base.checks import is_text, require, require_numbers
from hashattn.base.environment import processor
from hashattn.base.errors import HashAttnError

THIS_MACHINE = "this-machine"


class DeviceError(HashAttnError, ValueError):
    """No device of this name is known."""


@dataclass(frozen=True)
class Device:
    """memory: bytes. bandwidth: bytes a second between memory and processor, None for this machine,
    where it is measured. source: where both numbers are from. Raises ValueError."""

    name: str
    label: str
    memory: float
    bandwidth: float | None
    source: str

    def __post_init__(self) -> None:
        require(is_text(self.name), "name", self.name, "a text")
        require_numbers(vars(self), positive=("memory",))
        if self.bandwidth is not None:
            require_numbers(vars(self), positive=("bandwidth",))


def _gpu(name: str, label: str, gigabytes: float, gigabytes_a_second: float, source: str) -> Device:
    return Device(name, label, gigabytes * 1e9, gigabytes_a_second * 1e9, source)


_SHEET = "NVIDIA, {} datasheet".format
DEVICES = MappingProxyType({
    device.name: device
    for device in (
        _gpu("l4-24gb", "NVIDIA L4", 24, 300, _SHEET("L4")),
        _gpu("a10-24gb", "NVIDIA A10", 24, 600, _SHEET("A10")),
        _gpu("rtx3090-24gb", "GeForce RTX 3090", 24, 936, "NVIDIA, RTX 3090 specifications"),
        _gpu("rtx4090-24gb", "GeForce RTX 4090", 24, 1008, "NVIDIA, Ada GPU architecture paper"),
        _gpu("rtx5090-32gb", "GeForce RTX 5090", 32, 1792, "NVIDIA, RTX 5090 specifications"),
        _gpu("a100-40gb", "NVIDIA A100 40 GB", 40, 1555, _SHEET("A100")),
        _gpu("l40s-48gb", "NVIDIA L40S", 48, 864, _SHEET("L40S")),
        _gpu("a100-80gb", "NVIDIA A100 80 GB SXM", 80, 2039, _SHEET("A100")),
        _gpu("h100-pcie-80gb", "NVIDIA H100 PCIe", 80, 2000, _SHEET("H100 PCIe")),
        _gpu("h100-80gb", "NVIDIA H100 SXM", 80, 3350, _SHEET("H100")),
        _gpu("h200-141gb", "NVIDIA H200 SXM", 141, 4800, _SHEET("H200")),
        _gpu("b200-180gb", "NVIDIA B200", 180, 8000, _SHEET("DGX B200")),
        _gpu("mi300x-192gb", "AMD Instinct MI300X", 192, 5300, "AMD, Instinct MI300X data sheet"),
    )
})  # fmt: skip


def device_named(name: str) -> Device:
    """The device of a name of DEVICES, or this machine's processor ("this-machine").

    DeviceError naming the known ones.
    """
    if name == THIS_MACHINE:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device(name, processor(), float(memory), None, "this machine's operating system")
    if name not in DEVICES:
        raise DeviceError(
            f"device {name!r} is not known: give {THIS_MACHINE} or one of {', '.join(DEVICES)}"
        )
    return DEVICES[name]
