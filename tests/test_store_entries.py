"""The store's folder: its limit, several processes, damage, and files that are kept once."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest

from pipeline.host.files import LINKED_BYTES, share
from pipeline.store.entries import Damaged, Store


def entry(store: Store, name: str, size: int) -> None:
    source = store.root.parent / "engine.trt"
    source.unlink(missing_ok=True)  # an entry may be the same file
    source.write_bytes(bytes(size))
    store.commit(name, [source], {})
    os.utime(store.entry(name) / "stored.json", (len(entries(store)),) * 2)  # one second apart


def entries(store: Store) -> list[str]:
    return sorted(path.name for path in store.root.iterdir() if path.is_dir())


def small_store(tmp_path: Path, limit: int) -> Store:
    root = tmp_path / "engines"
    root.mkdir()
    return Store(root, limit)


def test_above_the_limit_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    store = small_store(tmp_path, limit=4000)
    for name in "abc":
        entry(store, name, 1000)
    content = store.content("a")
    assert content is not None
    store.restore("a", content["files"], tmp_path)  # used again

    entry(store, "d", 1000)

    assert entries(store) == ["a", "c", "d"]


def test_what_another_process_holds_stays_and_what_a_killed_one_left_goes(tmp_path: Path) -> None:
    store = small_store(tmp_path, limit=2000)
    entry(store, "held", 1000)
    entry(store, "free", 500)
    (store.root / "killed.partial").mkdir()

    with store.locked("held", print):
        entry(store, "new", 600)

    assert entries(store) == ["held", "new"]


def test_an_engine_above_the_limit_is_not_kept_and_nothing_is_left(tmp_path: Path) -> None:
    store = small_store(tmp_path, limit=100)
    with pytest.raises(OSError, match=r"above store.limit_gib"):
        entry(store, "large", 101)
    assert entries(store) == []


def test_a_second_process_waits_for_the_first_and_says_so(tmp_path: Path) -> None:
    store, told, got = small_store(tmp_path, 1000), threading.Event(), threading.Event()

    def second() -> None:
        with store.locked("key", lambda message: told.set()):
            got.set()

    with store.locked("key", print):
        thread = threading.Thread(target=second)
        thread.start()
        assert told.wait(10) and not got.is_set()
    thread.join(10)
    assert got.is_set()


@pytest.mark.parametrize("what", ["engine.trt", "stored.json"])
@pytest.mark.parametrize("how", ["changed", "cut", "missing"])
def test_a_damaged_entry_is_recognised_and_leaves_nothing_in_the_run_folder(
    what: str, how: str, tmp_path: Path
) -> None:
    store, into = small_store(tmp_path, 2000), tmp_path / "run"
    entry(store, "key", 1000)
    into.mkdir()
    victim = store.entry("key") / what
    content = victim.read_bytes()
    match how:
        case "changed":
            victim.write_bytes(content.replace(content[-9:], b'"":0,' + content[-4:]))
        case "cut":
            victim.write_bytes(content[:-1] if what == "engine.trt" else content[:-3])
        case "missing":
            victim.unlink()

    with pytest.raises(Damaged, match=what):
        stored = store.content("key")
        assert stored is not None
        store.restore("key", stored["files"], into)
    assert list(into.iterdir()) == []


def test_a_large_file_is_shared_and_a_small_one_copied(tmp_path: Path) -> None:
    for size, shared in ((LINKED_BYTES, True), (LINKED_BYTES - 1, False)):
        source, target = tmp_path / f"{size}.trt", tmp_path / f"{size}.too"
        source.write_bytes(b"x" * size)
        for _ in range(2):  # over a name that is there already, too
            share(source, target)
            assert target.samefile(source) == shared and target.read_bytes() == source.read_bytes()
        assert not list(tmp_path.glob("*.part"))
        source.unlink()
        assert target.stat().st_size == size


def test_a_file_is_copied_where_another_file_system_begins(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not os.access(elsewhere, os.W_OK) or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    source = tmp_path / "engine.trt"
    source.write_bytes(os.urandom(LINKED_BYTES))
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        copy = Path(folder) / "engine.trt"
        share(source, copy)
        assert copy.stat().st_dev != source.stat().st_dev and copy.read_bytes() == source.read_bytes()
        assert list(Path(folder).iterdir()) == [copy]


def test_a_run_and_the_store_share_the_engine_and_one_that_was_written_into_is_noticed(tmp_path: Path) -> None:
    store, run, again = small_store(tmp_path, 1e9), tmp_path / "run", tmp_path / "again"
    run.mkdir()
    again.mkdir()
    engine = run / "engine.trt"
    engine.write_bytes(os.urandom(LINKED_BYTES))
    store.commit("key", [engine], {})
    assert (store.entry("key") / "engine.trt").samefile(engine)
    content = store.content("key")
    assert content is not None
    store.restore("key", content["files"], again)
    assert (again / "engine.trt").samefile(engine)

    shutil.rmtree(run)
    store.restore("key", content["files"], again)

    with (again / "engine.trt").open("r+b") as file:  # which nothing of ours does
        file.write(b"other")
    with pytest.raises(Damaged, match=r"engine\.trt was changed"):
        store.restore("key", content["files"], tmp_path)
    assert not (tmp_path / "engine.trt").exists()
