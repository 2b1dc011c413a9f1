"""`sarfm.io.files`: writes survive kills and full disks, names and archives stay inside, one writer at a time."""

import io
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile

import pytest

from sarfm.io.files import (
    CorruptData,
    StoreLocked,
    atomic_path,
    atomic_write,
    carried,
    inside,
    lock,
    read_json,
    sha256,
    unpack,
    write_json,
)


def python(code, *arguments):
    """Start a child interpreter."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.row(2)
def test_kill_while_writing_leaves_the_old_or_the_new_file(tmp_path):
    code = """
        import sys
        from sarfm.io.files import atomic_write
        for k in range(10**6):
            with atomic_write(sys.argv[1]) as file:
                for _ in range(50):
                    file.write(bytes([k % 251]) * 20_000)
            if k == 0:
                print("ready", flush=True)
    """
    path = tmp_path / "state.bin"
    for attempt in range(8):
        child = python(code, path)
        child.stdout.readline()
        time.sleep(0.011 * attempt)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        content = path.read_bytes()
        assert len(content) == 1_000_000 and len(set(content)) == 1


def test_error_keeps_the_old_file_and_leaves_no_litter(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "a.json") as file:
        file.write(b"{")
        raise RuntimeError
    with pytest.raises(TypeError, match="JSON holds numbers"):
        write_json(tmp_path / "a.json", {"new": object()})
    assert read_json(tmp_path / "a.json") == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.row(7)
def test_full_disk_names_file_and_size(tmp_path):
    code = """
        import resource, sys
        from sarfm.io.files import atomic_write
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
        try:
            with atomic_write(sys.argv[1]) as file:
                for _ in range(40):
                    file.write(bytes(100_000))
        except OSError as error:
            print(error)
    """
    path = tmp_path / "big.bin"
    path.write_bytes(b"old")
    said = python(code, path).communicate()[0]
    assert "disk full, needs about 2.0 MB" in said and str(path) in said
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", 1)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640


def test_atomic_path_for_libraries_that_open_files_themselves(tmp_path):
    with atomic_path(tmp_path / "deep" / "scene.nc") as temporary:
        assert temporary.parent == tmp_path / "deep" and temporary.suffix == ".nc"
        temporary.write_bytes(b"x")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["scene.nc"]


def test_mode_is_checked(tmp_path):
    with pytest.raises(ValueError, match="got 'a'"), atomic_write(tmp_path / "a", mode="a"):
        pass


def test_damaged_json_names_the_file(tmp_path):
    (tmp_path / "run.json").write_bytes(b'{"a": \xff')
    with pytest.raises(CorruptData, match=r"run\.json"):
        read_json(tmp_path / "run.json")


def test_corrupt_data_survives_a_worker():
    error = CorruptData.at("a.nc", "is cut", variable="hh")
    assert isinstance(error, ValueError) and "a.nc" in str(error) and "'hh'" in str(error)
    assert str(type(error)(str(error))) == str(error)  # as torch's DataLoader raises it again


OUTSIDE = [
    "../a",
    "a/../../b",
    "/etc/passwd",
    "//proc/self/root",
    "C:/a",
    "C:a",
    r"..\a",
    r"a\..\..\b",
    r"\\host\share\a",
    "",
    ".",
    "a\0b",
    "link/a",
    "..",
    "./../a",
]


@pytest.mark.row(11)
@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_are_refused(tmp_path, name):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"stays inside|leads out"):
        inside(tmp_path / "root", name)


@pytest.mark.parametrize("name", ["a", "a/b.tif", "a b#c?.tif", "ä/ö.png", "a/./b", "..a/b"])
def test_names_that_stay_are_joined(tmp_path, name):
    assert inside(tmp_path, name) == tmp_path / name


def tar_with(path, change, mode="w"):
    """Make a tar with one good member and one changed by the caller."""
    with tarfile.open(path, mode) as archive:
        for name in ("good.txt", "member"):
            info = tarfile.TarInfo(name)
            info.size = 3
            if name == "member":
                change(info)
            archive.addfile(info, io.BytesIO(b"abc") if info.isreg() else None)


def as_link(kind, target):
    """Turn a tar member into a link."""

    def change(info):
        info.type, info.linkname, info.size = kind, target, 0

    return change


def as_kind(kind):
    """Turn a tar member into a device or pipe."""

    def change(info):
        info.type, info.size = kind, 0

    return change


def named(name):
    """Rename a tar member."""

    def change(info):
        info.name = name

    return change


HOSTILE_TARS = {
    "upward": named("../escaped"),
    "absolute": named("/tmp/sarfm-escaped"),
    "proc": named("//proc/self/root/escaped"),
    "upward inside": named("a/../../escaped"),
    "symlink": as_link(tarfile.SYMTYPE, "/etc/passwd"),
    "symlink up": as_link(tarfile.SYMTYPE, ".."),
    "hard link": as_link(tarfile.LNKTYPE, "../../outside"),
    "device": as_kind(tarfile.CHRTYPE),
    "block device": as_kind(tarfile.BLKTYPE),
    "pipe": as_kind(tarfile.FIFOTYPE),
}


@pytest.mark.row(11)
@pytest.mark.parametrize("case", HOSTILE_TARS)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_hostile_tar_writes_nothing(tmp_path, case, mode):
    tar_with(tmp_path / "bad.tar", HOSTILE_TARS[case], mode)
    with pytest.raises(ValueError, match=r"bad\.tar is refused"):
        unpack(tmp_path / "bad.tar", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == [] and sorted(p.name for p in tmp_path.iterdir()) == [
        "bad.tar",
        "data",
    ]


def hostile_zip(path, case):
    """Make a zip with one good and one hostile member."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good.txt", b"abc")
        if case == "symlink":
            info = zipfile.ZipInfo("link")
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, "/etc/passwd")
        elif case == "bomb":
            archive.writestr("zeros", bytes(30_000_000))
        else:
            archive.writestr(case, b"abc")


@pytest.mark.row(11)
@pytest.mark.parametrize("case", ["../up", "/tmp/sarfm-escaped", "a/../../up", r"..\up", "C:/up", "symlink", "bomb"])
def test_hostile_zip_writes_nothing(tmp_path, case):
    hostile_zip(tmp_path / "bad.zip", case)
    with pytest.raises(ValueError, match=r"bad\.zip is refused"):
        unpack(tmp_path / "bad.zip", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == [] and sorted(p.name for p in tmp_path.iterdir()) == [
        "bad.zip",
        "data",
    ]


@pytest.mark.row(11)
def test_quota(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", os.urandom(5000))
    with pytest.raises(ValueError, match="quota"):
        unpack(tmp_path / "a.zip", tmp_path / "data", quota_bytes=4000)


@pytest.mark.row(11)
def test_member_below_a_link_that_stood_there_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sub").symlink_to(tmp_path)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("sub/escaped", b"abc")
    with pytest.raises(ValueError, match="leads out"):
        unpack(tmp_path / "a.zip", tmp_path / "data")
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_archive_is_corrupt_data(tmp_path, damage):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", os.urandom(5000))
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes({"cut": bytes(content[:3000]), "flip": bytes(content), "empty": b""}[damage])
    with pytest.raises(CorruptData, match=r"a\.zip"):
        unpack(path, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_good_archives_are_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/y/one.txt", b"1")
        archive.writestr("empty/", b"")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "a.zip", "inner/a.zip")
    assert unpack(tmp_path / "a.zip", tmp_path / "data") == [tmp_path / "data/x/y/one.txt"]
    unpack(tmp_path / "a.tar.gz", tmp_path / "data")
    assert (
        sha256(tmp_path / "data/inner/a.zip") == sha256(tmp_path / "a.zip") == sha256(tmp_path / "a.zip", progress=True)
    )


WRITER = """
    import sys, time
    from sarfm.io.files import lock
    with lock(sys.argv[1]):
        print("locked", flush=True)
        time.sleep(60)
"""


@pytest.mark.row(17)
def test_second_writer_is_told_who_writes(tmp_path):
    child = python(WRITER, tmp_path / "store")
    assert child.stdout.readline() == "locked\n"
    with pytest.raises(StoreLocked, match=f"process {child.pid} on"), lock(tmp_path / "store"):
        pass
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    with lock(tmp_path / "store"):  # a killed one's lock is recovered
        pass
    assert not (tmp_path / "store.lock").exists()


@pytest.mark.row(17)
def test_lock_of_a_dead_process_with_living_children_is_recovered(tmp_path):
    code = """
        import os, sys, time
        from sarfm.io.files import lock
        with lock(sys.argv[1]):
            worker = os.fork()
            if worker == 0:
                print(os.getpid(), flush=True)  # here, it has let go of the lock
                os.close(1)
                time.sleep(60)
            time.sleep(60)
    """
    parent = python(code, tmp_path / "store")
    worker = int(parent.stdout.readline())
    try:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        with lock(tmp_path / "store"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.row(17)
def test_no_update_is_lost_between_two_writers(tmp_path):
    code = """
        import sys, time
        from sarfm.io.files import StoreLocked, lock, read_json, write_json
        done = 0
        while done < 100:
            try:
                with lock(sys.argv[1]):
                    write_json(sys.argv[1], read_json(sys.argv[1]) + 1)
                    done += 1
            except StoreLocked:
                time.sleep(0.0005)
    """
    write_json(tmp_path / "count.json", 0)
    children = [python(code, tmp_path / "count.json") for _ in range(4)]
    assert [child.wait() for child in children] == [0] * 4
    assert json.loads((tmp_path / "count.json").read_text()) == 400


def test_carried_folders():
    assert (carried("data_catalogs") / "borneo.nc").exists() and carried("run_notebooks").is_dir()
    with pytest.raises(ValueError, match="run_notebooks"):
        carried("secrets")


def test_import_is_cheap():
    code = (
        "import sys, sarfm.io.files; print(sorted({'numpy', 'torch', 'xarray', 'pydantic', 'tqdm'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
