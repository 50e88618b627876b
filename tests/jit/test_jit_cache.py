"""The cache, with builds that take no time."""

import errno
import os
import shutil
import stat
import threading
from dataclasses import replace
from pathlib import Path

import filelock
import pytest

from tsm_jit import cli
from tsm_jit._jit import cache, spec

MANIFEST = "manifest.json"
# The cache folder, an entry, and its files.
PLACES = ["", "{key}", "{key}/" + spec.LIBRARY, "{key}/" + MANIFEST]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def folders() -> set[str]:
    return {path.name for path in cache.cache_folder().iterdir() if path.is_dir()}


@pytest.fixture
def entry(build_spec, builder) -> cache.Entry:
    return builder.get(build_spec)


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_an_entry_is_private_and_all_that_is_left(build_spec, builder, umask):
    before = os.umask(umask)
    try:
        entry = builder.get(build_spec)
    finally:
        os.umask(before)
    assert {path.name for path in entry.folder.parent.iterdir()} == {build_spec.key, f"{build_spec.key}.lock"}
    assert {path.name for path in entry.folder.iterdir()} == {cache.LOG, MANIFEST, spec.LIBRARY}
    assert {mode(path) for path in (entry.folder, entry.folder.parent)} == {0o700}
    assert {mode(path) for path in entry.folder.iterdir()} == {0o600}


def test_an_entry_appears_whole_by_one_rename(build_spec, builder, monkeypatch):
    seen, synced, rename, fsync = [], set(), os.replace, os.fsync

    def watched(source, target):
        seen.append(cache.find(build_spec))
        assert {path.stat().st_ino for path in Path(source).iterdir()} <= synced, "its files are on the disk"
        rename(source, target)
        seen.append(cache.find(build_spec))

    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(os, "replace", watched)
    assert [None, builder.get(build_spec)] == seen


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "truncated library": lambda folder: os.truncate(folder / spec.LIBRARY, 1000),
    "flipped bit": lambda folder: flip(folder / spec.LIBRARY),
    "missing library": lambda folder: (folder / spec.LIBRARY).unlink(),
    "missing manifest": lambda folder: (folder / MANIFEST).unlink(),
    "empty manifest": lambda folder: (folder / MANIFEST).write_bytes(b""),
    "binary manifest": lambda folder: (folder / MANIFEST).write_bytes(b"\xff\0\x80"),
    "half a manifest": lambda folder: os.truncate(folder / MANIFEST, 100),
    "list as manifest": lambda folder: (folder / MANIFEST).write_text("[1]"),
    "manifest of nothing": lambda folder: (folder / MANIFEST).write_text("{}"),
    "file as entry": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_never_returned_and_is_built_again(build_spec, builder, entry, damage):
    DAMAGES[damage](entry.folder)
    assert cache.find(build_spec) is cache.read(entry.folder) is None
    assert builder.get(build_spec) == entry == cache.find(build_spec)
    assert len(builder.folders) == 2
    assert folders() == {build_spec.key}
    assert any(str(entry.folder) in line for line in builder.lines)


def test_a_failure_is_recorded_and_not_tried_again_but_another_key_is(build_spec, builder):
    builder.error = spec.BuildError("the sky is falling")
    for _ in range(2):
        assert builder.get(build_spec).error == "the sky is falling"
    assert len(builder.folders) == 1
    assert (cache.cache_folder() / build_spec.key / cache.LOG).is_file()
    assert cache.find(build_spec) is None
    builder.error = None
    assert builder.get(replace(build_spec, cxx=("another",))).error is None


@pytest.mark.parametrize("error", [OSError("killed"), OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failure_that_may_pass_is_not_recorded_and_leaves_nothing(build_spec, builder, error):
    builder.error = error
    with pytest.raises(type(error)):
        builder.get(build_spec)
    assert folders() == set()


def test_with_replace_a_failing_build_keeps_the_entry_and_a_good_one_replaces_it(build_spec, builder, entry):
    builder.error = spec.BuildError("no")
    with pytest.raises(spec.BuildError):
        builder.get(build_spec, replace=True)
    assert cache.find(build_spec) == entry
    builder.error = None
    (entry.folder / "old").touch()
    assert builder.get(build_spec, replace=True) == entry
    assert not (entry.folder / "old").exists()


def test_an_entry_is_found_whatever_tools_made_it_the_newest_first_but_before_it_a_portable_one(build_spec, builder):
    entries = [builder.get(replace(build_spec, cxx=("g++ 12",)))]
    os.utime(entries[0].folder, (0, 0))
    assert cache.find(build_spec) == entries[0]
    entries.append(builder.get(replace(build_spec, cxx=("g++ 13",))))
    assert cache.find(build_spec) == entries[1]
    entries.append(builder.get(replace(build_spec, portable=True, architectures="all")))
    os.utime(entries[2].folder, (0, 0))
    assert cache.find(build_spec) == entries[2]
    assert cache.find(replace(build_spec, cflags=("-O0",))) is None


def test_an_entry_for_other_gpus_is_the_last_choice_and_only_if_its_ptx_is_for_all(build_spec, builder):
    here = replace(build_spec, gpus=("H100",))
    builder.get(replace(build_spec, gpus=("PTX 80",)))  # the builder takes them for architectures
    assert cache.find(here, other_gpus=True) is None
    other = builder.get(replace(build_spec, gpus=("PTX 75",)))
    assert cache.find(here) is None
    assert cache.find(here, other_gpus=True) == other
    assert builder.get(here) == cache.find(here, other_gpus=True)


def test_leftovers_of_a_killed_build_go_with_the_next_and_those_of_another_host_when_old(build_spec, builder, entry):
    name = builder.folders[0].name
    host = name.split("-")[-2]
    elsewhere, old = (name.replace(host, digit * 8) for digit in "01")
    other_key = name.replace(build_spec.key, "0" * len(build_spec.key))
    for left in (name, elsewhere, old, other_key):
        (cache.cache_folder() / left / "host").mkdir(parents=True)
    os.utime(cache.cache_folder() / old, (0, 0))
    builder.get(build_spec, replace=True)
    assert folders() == {build_spec.key, elsewhere, other_key}


@pytest.mark.parametrize("error", [NotImplementedError(), OSError(errno.ENOLCK, "No locks available")])
def test_without_locks_two_build_and_the_second_takes_the_entry_of_the_first(build_spec, builder, monkeypatch, error):
    def no_lock(*arguments, **options):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", no_lock)
    monkeypatch.setattr(filelock.FileLock, "__enter__", no_lock)
    barrier, there, results = threading.Barrier(2), [], []
    builder.during = lambda: (barrier.wait(30), there.extend(folder.is_dir() for folder in builder.folders))
    threads = [threading.Thread(target=lambda: results.append(builder.get(build_spec))) for _ in range(2)]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert there[:2] == [True, True], "none removes what another one builds"
    assert results == 2 * [cache.find(build_spec)]
    assert folders() == {build_spec.key}
    assert cli.main(["clean"]) == 0


def test_a_waiting_process_logs_and_takes_the_result(build_spec, builder):
    started, waits = threading.Event(), threading.Event()
    builder.during = lambda: (started.set(), waits.wait(30))
    first = threading.Thread(target=builder.get, args=(build_spec,))
    first.start()
    assert started.wait(30)
    lines = []
    entry = cache.get_or_build(build_spec, builder, lambda line: (lines.append(line), waits.set()))
    first.join()
    assert f"{build_spec.key}.lock" in lines[0]
    assert entry == cache.find(build_spec)
    assert len(builder.folders) == 1


@pytest.mark.parametrize("bit", [0o020, 0o002])
@pytest.mark.parametrize("place", PLACES)
def test_a_folder_that_others_can_write_raises_with_its_path(build_spec, builder, entry, place, bit):
    path = cache.cache_folder() / place.format(key=build_spec.key)
    path.chmod(mode(path) | bit)
    for take in (lambda: cache.find(build_spec), lambda: builder.get(build_spec)):
        with pytest.raises(PermissionError) as caught:
            take()
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("place", PLACES)
def test_a_folder_of_another_user_raises_unless_root_owns_or_reads_it(
    build_spec, builder, shared, as_user, monkeypatch, place
):
    monkeypatch.setenv("TSM_JIT_CACHE", str(shared / "cache"))
    build_spec = replace(build_spec, portable=True)  # readable by all
    entry = builder.get(build_spec)
    assert as_user(lambda: cache.find(build_spec)) == str(entry)
    path = cache.cache_folder() / place.format(key=build_spec.key)
    os.chown(path, 54321, -1)
    assert as_user(lambda: cache.find(build_spec)).startswith(f"PermissionError: {path} ")
    assert as_user(lambda: cache.find(build_spec), user=54321) == str(entry)
    assert cache.find(build_spec) == entry


def test_a_read_only_cache_serves_what_it_has_and_else_is_reported(build_spec, builder, shared, as_user, monkeypatch):
    monkeypatch.setenv("TSM_JIT_CACHE", str(shared / "cache"))
    build_spec = replace(build_spec, portable=True)
    entry = builder.get(build_spec)
    assert as_user(lambda: builder.get(build_spec)) == str(entry)
    result = as_user(lambda: builder.get(replace(build_spec, cflags=("-O0",))))
    assert result.startswith(f"PermissionError: {shared / 'cache'} is read-only")


@pytest.mark.parametrize(
    ("options", "left"),
    [("", "other old building"), ("--all", "building"), ("--older-than 1", "ours other building")],
)
def test_clean_removes_what_it_reports_and_never_a_build_in_progress(build_spec, builder, options, left):
    ours, other, old = spec.here("cpu"), replace(build_spec, torch_version="1"), replace(build_spec, torch_version="2")
    names = {"ours": ours.key, "other": other.key, "old": old.key, "building": f"{ours.key}.tmp-0-0"}
    for one in (ours, other, old):
        builder.get(one)
    for name in ("not-of-us", names["building"]):
        (cache.cache_folder() / name).mkdir()
    os.utime(cache.cache_folder() / old.key, (0, 0))
    with filelock.FileLock(cache.cache_folder() / f"{ours.key}.lock"):
        assert cli.main(["clean", *options.split()]) == 0
        assert folders() == {"not-of-us", *(names[name] for name in left.split())}
    assert cli.main(["clean", "--all"]) == 0
    assert folders() == {"not-of-us"}
