"""How processes meet, what their errors are taken for, and who is said to keep the others waiting."""

import os
import socket
import time
import warnings
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from saescale.trainers.mesh import watch
from saescale.trainers.mesh.channel import collective
from saescale.trainers.mesh.distributed import join, joined
from saescale.trainers.mesh.layout import Layout, MeshBroken
from saescale.trainers.mesh.network import interface_to, meeting_at
from saescale.trainers.mesh.watch import Watch

CPU = torch.device("cpu")


@pytest.mark.parametrize(("device", "told"), [("cuda", 3), ("cuda:1", 1)])
def test_nccl_is_told_which_gpu(device: str, told: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses one without a number, which is what a worker of Ray has: "cuda", the only one that it sees."""
    given: dict[str, Any] = {}

    def init(*_: Any, **options: Any) -> None:
        given.update(options)
        raise dist.DistNetworkError("that is all there is to see here")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(dist, "init_process_group", init)
    with pytest.raises(MeshBroken, match="rank 0 of a mesh of 1 shards x 1 replicas did not meet the others"):
        join(Layout(), 0, meeting_at("127.0.0.1"), "nccl", device)
    assert given["device_id"] == torch.device("cuda", told)


def test_a_meeting_has_the_address_that_others_know_and_no_other() -> None:
    def listening() -> set[tuple[str, int]]:
        found = psutil.Process().net_connections("tcp")
        return {tuple(each.laddr) for each in found if each.status == psutil.CONN_LISTEN}

    meeting, before = meeting_at("127.0.0.1"), listening()
    group = join(Layout(), 0, meeting)
    new = listening() - before
    group.leave()
    assert ("127.0.0.1", int(meeting.rpartition(":")[2])) in new
    assert {ip for ip, _ in new} == {"127.0.0.1"}  # gloo's as well
    assert meeting_at("10.1.2.3").startswith("tcp://10.1.2.3:")
    assert meeting_at("fd00::7").startswith("tcp://[fd00::7]:")


def test_gloo_listens_where_the_meeting_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine's name resolves to: to the loopback, on many."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    seen: list[str | None] = []

    def init(*_: Any, **__: Any) -> None:
        seen.append(os.environ.get("GLOO_SOCKET_IFNAME"))
        raise dist.DistNetworkError("that is all there is to see here")

    monkeypatch.setattr(dist, "init_process_group", init)
    for own in (None, "mine"):
        if own:
            monkeypatch.setenv("GLOO_SOCKET_IFNAME", own)
        with pytest.raises(MeshBroken):
            join(Layout(), 0, meeting_at("127.0.0.1"))
        assert os.environ.get("GLOO_SOCKET_IFNAME") == own
    assert seen == [interface_to("127.0.0.1"), "mine"]
    # By another way: the kernel's own list of addresses.
    there = {
        address.address: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
    }
    for address, name in there.items():
        assert interface_to(address) == name
    assert interface_to("no.such.host.invalid") is None


def test_what_fails_in_a_process_itself_is_not_said_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken mesh is tried again with the same processes; an error of its own, or of its GPU, would come again."""
    monkeypatch.setattr(watch, "_MISSED_S", 0.1)
    layout = Layout(1, 1)
    for error in (RuntimeError("shapes differ"), RuntimeError("CUDA error: an illegal memory access")):
        with (
            pytest.raises(RuntimeError, match=str(error)),
            joined(layout, 0, meeting_at("127.0.0.1"), "gloo", CPU, 10.0),
            collective() if "CUDA" in str(error) else warnings.catch_warnings(),
        ):
            raise error
    with (
        pytest.raises(MeshBroken, match="the mesh of 1 shards x 1 replicas broke: Connection closed by peer"),
        joined(layout, 0, meeting_at("127.0.0.1"), "gloo", CPU, 10.0),
        collective(),
    ):
        raise RuntimeError("Connection closed by peer")


def test_who_keeps_the_others_waiting_is_said_before_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under NCCL nobody can say it after."""
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(watch, "_BEAT_S", 0.05)
    monkeypatch.setattr(watch, "_MISSED_S", 1.0)
    said: list[str] = []
    at: list[float] = []

    def warn(text: str, kind: type[Warning], **_: Any) -> None:
        at.append(time.monotonic())
        said.append(text)

    monkeypatch.setattr(warnings, "warn", warn)
    layout = Layout(3)
    watches = [Watch(layout, rank, deadline_s=2.5) for rank in range(3)]
    last = time.monotonic()
    watches[0].entered("sum_shards")
    watches[1].entered("sum_shards")
    watches[1].entered("select")
    watches[2].close()
    until = time.monotonic() + 20
    while not said and time.monotonic() < until:
        time.sleep(0.05)
    assert at[0] - last >= 1.25  # not earlier than half of it
    assert said[0].startswith("the mesh of 3 shards x 1 replicas waits: rank 2 (shard 2, replica 0; ")
    assert said[0].endswith("last heard of at start) gives no sign of life")
    found = watches[1].suspects()
    assert found is not None
    assert "rank 2" in found
    assert "rank 0" not in found
    for each in watches[:2]:
        each.close()
