import ctypes
from types import SimpleNamespace

import pytest
import torch

from octo_run.engine.energy import EnergyMeter


class FakeLibrary:
    """NVML with one GPU, whose counter stands at ``millijoules``; ``broken`` names the calls that fail."""

    def __init__(self, millijoules, broken=()):
        self.millijoules, self.broken = millijoules, broken

    def nvmlInit_v2(self):
        return int("init" in self.broken)

    def nvmlDeviceGetHandleByUUID(self, name, handle):
        assert name == b"GPU-12-34"
        return int("handle" in self.broken)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, total):
        total._obj.value = self.millijoules
        return int("energy" in self.broken)


@pytest.fixture
def meter(monkeypatch):
    def build(library):
        def load(name):
            if library is None:
                raise OSError(name)
            return library

        monkeypatch.setattr(ctypes, "CDLL", load)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
        return EnergyMeter(torch.device("cuda"))

    return build


def test_the_counter_is_read_in_joules(meter):
    assert meter(FakeLibrary(1234500)).joules() == pytest.approx(1234.5)


@pytest.mark.parametrize("broken", ["init", "handle", "energy"])
def test_a_failing_library_gives_no_energy(meter, broken):
    assert meter(FakeLibrary(1, broken)).joules() is None


def test_no_library_or_no_gpu_gives_no_energy(meter):
    assert meter(None).joules() is None
    assert EnergyMeter(torch.device("cpu")).joules() is None
