"""Waiting for vendors: what is being fetched is waited for, what fails is told at once."""

import pytest

from adytum.attestation.collect.devices import Devices, collect, waiting
from adytum.attestation.core.errors import CollectionError, NotThereYet


def test_what_is_being_fetched_is_waited_for() -> None:
    came: list[str] = []
    slept: list[float] = []

    def ask() -> str:
        if len(came) < 3:
            raise NotThereYet("the vendor has not given it yet")
        return "evidence"

    assert waiting(ask, lambda: came.append("one more"), slept.append) == "evidence"
    assert len(slept) == 3


def test_what_never_comes_ends() -> None:
    asked = 0

    def ask() -> str:
        nonlocal asked
        asked += 1
        raise NotThereYet("the vendor has not given it yet")

    with pytest.raises(NotThereYet):
        waiting(ask, lambda: None, lambda seconds: None)
    assert 10 < asked < 100


def test_a_device_that_fails_is_told_at_once() -> None:
    refreshed: list[int] = []

    def ask() -> str:
        raise CollectionError("broken")

    with pytest.raises(CollectionError, match="broken"):
        waiting(ask, lambda: refreshed.append(1))
    assert refreshed == []


def test_simulated_devices_need_nothing() -> None:
    devices = Devices.of("simulated", "none")
    assert (devices.cpu.provider, devices.cc_mode()) == ("simulated", "none")
    devices.set_ready()
    devices.refresh()


def test_nothing_to_collect() -> None:
    with pytest.raises(CollectionError, match="name a CPU or GPUs"):
        collect("none", "none", bytes(32))
