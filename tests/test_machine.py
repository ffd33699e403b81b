"""What is free of a machine's memory, within the limits that a process was given."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from snugfit import distributed, machine

CPU = torch.device("cpu")


def cgroup(folder: Path, files: dict[str, object]) -> None:
    """The files of one cgroup."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")


def second(limit: object, used: int, pages: int = 0) -> dict[str, object]:
    """Files of a cgroup of the second version."""
    stat = f"anon {used - pages}\nfile {pages}\ninactive_file {pages // 2}\nactive_file {pages - pages // 2}"
    return {"memory.max": limit, "memory.current": used, "memory.stat": stat}


def test_a_cgroup_limits_what_is_free(tmp_path: Path) -> None:
    """What a group's limit leaves is free, pages of files among it; of nested groups each one's limit counts."""
    groups, mount = tmp_path / "groups", tmp_path / "mount"
    groups.write_text("0::/box/inner\n")
    cgroup(mount / "box", second(1000, 700, 200))
    cgroup(mount / "box/inner", second("max", 600, 100))
    assert machine._left_by_cgroups(groups, mount) == [500]
    cgroup(mount / "box/inner", second(900, 800))
    assert min(machine._left_by_cgroups(groups, mount)) == 100
    # a container that sees its group as the root, under another path
    groups.write_text("0::/elsewhere\n")
    cgroup(mount, second(2000, 1500))
    assert machine._left_by_cgroups(groups, mount) == [500]


def test_a_cgroup_of_the_first_version_limits_what_is_free(tmp_path: Path) -> None:
    """The same of the older files, which other controllers have not."""
    groups, mount = tmp_path / "groups", tmp_path / "mount"
    groups.write_text("4:memory:/box\n2:cpu,cpuacct:/box\n0::/\n")
    stat = "active_file 1\ntotal_active_file 30\ntotal_inactive_file 70"
    files = {"memory.limit_in_bytes": 1000, "memory.usage_in_bytes": 400, "memory.stat": stat}
    cgroup(mount / "memory/box", files)
    assert machine._left_by_cgroups(groups, mount) == [700]


@pytest.mark.parametrize("content", ["", "0::/box\n"])
def test_without_limits_nothing_is_taken_away(tmp_path: Path, content: str) -> None:
    """A system without cgroups, or with files that cannot be read, has no such limit."""
    (tmp_path / "groups").write_text(content)
    assert machine._left_by_cgroups(tmp_path / "groups", tmp_path / "mount") == []
    assert machine._left_by_cgroups(tmp_path / "none", tmp_path / "mount") == []


@pytest.mark.parametrize(("kind", "key"), [(resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")])
def test_limits_of_the_process_count(kind: int, key: str) -> None:
    """What a limit of this process leaves is all that is free."""
    before = resource.getrlimit(kind)
    room = 1 << 28
    used = machine._status_bytes(key)
    if not used:
        pytest.skip("this system does not say what a process holds")
    resource.setrlimit(kind, (used + room, before[1]))
    try:
        assert room // 2 < machine.free_bytes(CPU) <= 2 * room
    finally:
        resource.setrlimit(kind, before)
    assert machine.free_bytes(CPU) > 2 * room


def test_processes_share_what_a_group_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of several processes has its part of a cgroup's limit."""
    monkeypatch.setattr(machine, "_left_by_cgroups", lambda: [1000])
    monkeypatch.setattr(distributed, "local_size", lambda: 4)
    assert machine.free_bytes(CPU) == 250


@pytest.mark.parametrize(
    ("free", "share", "reserved", "expected"), [(60, 1.0, 40, 60), (60, 0.5, 40, 10), (5, 0.5, 0, 5), (60, 0.25, 40, 0)]
)
def test_a_share_of_a_gpu_limits_what_is_free(
    monkeypatch: pytest.MonkeyPatch, free: int, share: float, reserved: int, expected: int
) -> None:
    """Of a GPU no more is free than torch's share of this process leaves, less what torch holds."""
    asked: list[object] = []

    def fraction(device: object) -> float:
        asked.append(device)
        return share

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 100))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", fraction)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved)
    assert machine.free_bytes(torch.device("cuda")) == expected
    assert machine.free_bytes(torch.device("cuda:1")) == expected
    assert asked == [3, 1]  # torch takes no device without a number here
