"""Devices by name."""

import pytest

from hashattn.pilot.capacity.devices import DEVICES, Device, DeviceError, device_named


def test_makers_numbers():
    h100 = device_named("h100-80gb")
    assert (h100.memory, h100.bandwidth) == (80e9, 3.35e12)
    for name, device in DEVICES.items():
        assert device.name == name and device.source
        gigabytes = float(name.rpartition("-")[2].removesuffix("gb"))
        assert device.memory == gigabytes * 1e9
        assert 2e11 < device.bandwidth < 1e13  # bytes a second, not GB


def test_this_machine_has_its_memory_and_no_stated_bandwidth():
    machine = device_named("this-machine")
    with open("/proc/meminfo") as lines:
        kibibytes = int(next(line for line in lines if line.startswith("MemTotal")).split()[1])
    assert machine.memory == kibibytes * 1024 and machine.bandwidth is None


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(DeviceError, match="'h100' is not known.*this-machine.*a100-40gb.*h200"):
        device_named("h100")


@pytest.mark.parametrize("field, value", [("memory", 0), ("bandwidth", -1.0), ("name", "")])
def test_a_device_of_ones_own_is_checked(field, value):
    fields = {"name": "x", "label": "X", "memory": 1e9, "bandwidth": 1e9, "source": "mine"}
    with pytest.raises(ValueError, match=f"{field} = "):
        Device(**fields | {field: value})
