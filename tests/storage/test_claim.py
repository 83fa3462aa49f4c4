"""Two jobs and one folder of shards: one is refused, and nobody's files are touched."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError
from pipeline.pack.pack import PackReport
from pipeline.shards.columns import image_id
from pipeline.shards.row_group import read_row_group
from pipeline.shards.shards import open_shards
from pipeline.storage import claim
from pipeline.storage.claim import Owner, claimed
from tests import data
from tests.images import hostile as h

IMAGES = {name: [h.jpeg(first + i) for i in range(12)] for name, first in (("a", 0), ("b", 50))}


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, tasks_here: None) -> None:
    """Folders a and b; tasks run one after the other in this process."""
    for name, images in IMAGES.items():
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            (tmp_path / name / f"{i}.jpg").write_bytes(image)


def packed(
    place: Path, source: str, run: str, shards: str = "", shard_bytes: int = 3000, **options: Any
) -> PackReport:
    shards = shards or str(place / "shards")
    return data.packed(place / source, place / run, shards, shard_bytes=shard_bytes, **options)


def ids(place: Path) -> set[str]:
    shards = open_shards(str(place / "shards"))
    groups = [(f, g) for f, file in enumerate(shards.files) for g in range(len(file.row_groups))]
    return {name for f, g in groups for name in read_row_group(shards, f, g).hex_ids}


def ids_of(source: str) -> set[str]:
    return {image_id(image) for image in IMAGES[source]}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def refused(place: Path, source: str, run: str, shards: str = "", shard_bytes: int = 3000) -> str:
    """The sentence with which a pack is refused that changes nothing in the folder."""
    before = contents(place / "shards") if not shards else {}
    with pytest.raises(DataError) as caught:
        packed(place, source, run, shards, shard_bytes=shard_bytes)
    assert caught.value.hint
    assert not before or contents(place / "shards") == before
    return caught.value.what


@pytest.mark.parametrize("moment", [("read", 1), ("write", 1), ("write", 3)])
@pytest.mark.parametrize(("source", "run"), [("b", "second"), ("a", "second"), ("a", "first")])
def test_who_comes_while_another_works_is_refused(
    tmp_path: Path, moment: tuple[str, int], source: str, run: str
) -> None:
    said = []

    def other(what: str, done: int, total: int) -> None:
        if (what, done) == moment:
            said.append(refused(tmp_path, source, run, shard_bytes=9000))

    packed(tmp_path, "a", "first", progress=other)
    assert f"another job is writing shards of {tmp_path}/a into {tmp_path}/shards" in said[0]
    assert ids(tmp_path) == ids_of("a")
    assert not list((tmp_path / "shards").glob(".*"))


class Stopped(BaseException):
    pass


def stopped(place: Path, moment: tuple[str, int], end: Callable[[], None]) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == moment:
            end()

    packed(place, "a", "first", progress=stop)


def killed(place: Path, moment: tuple[str, int]) -> None:
    """A pack of a dies without a chance to tidy up."""
    child = os.fork()
    if child == 0:
        stopped(place, moment, lambda: os._exit(9))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_after_a_kill_the_same_source_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    for moment in (("read", 1), ("write", 2)):
        killed(tmp_path, moment)
        assert "that are not finished" in refused(tmp_path, "b", "second")
    written = []
    packed(tmp_path, "a", "first", progress=lambda what, done, _: written.append((what, done)))
    assert ("read", 1) not in written and ("write", 2) not in written  # done before
    assert ids(tmp_path) == ids_of("a")
    assert "holds the shards of" in refused(tmp_path, "b", "second")


def test_another_run_takes_over_from_a_dead_one_on_the_same_source(tmp_path: Path) -> None:
    killed(tmp_path, ("write", 3))
    packed(tmp_path, "a", "second", shard_bytes=9000)
    assert ids(tmp_path) == ids_of("a")
    digest = open_shards(str(tmp_path / "shards")).digest
    packed(tmp_path, "a", "first")  # its accounts speak of shards that were replaced
    assert ids(tmp_path) == ids_of("a")
    names = {f.name for f in open_shards(str(tmp_path / "shards")).files}
    assert {p.name for p in (tmp_path / "shards").iterdir()} == names | {"_manifest.json"}
    assert open_shards(str(tmp_path / "shards")).digest != digest or len(names) > 1


def test_a_claim_of_another_machine_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No lock tells whether that process lives: only the same run goes on."""
    killed(tmp_path, ("write", 3))
    (mark,) = (tmp_path / "shards").glob(".claim-*.json")
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"machine": "elsewhere"}))
    assert "that are not finished" in refused(tmp_path, "a", "second")
    packed(tmp_path, "a", "first")
    assert ids(tmp_path) == ids_of("a")


def test_a_stop_before_anything_is_written_leaves_no_claim(tmp_path: Path) -> None:
    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        stopped(tmp_path, ("read", 1), stop)
    packed(tmp_path, "b", "second")
    assert ids(tmp_path) == ids_of("b")
    # the first one does not go on over what is there now
    assert "holds the shards of" in refused(tmp_path, "a", "first")


def test_shards_that_nothing_speaks_of_are_left_alone(tmp_path: Path) -> None:
    packed(tmp_path, "a", "first")
    (tmp_path / "shards" / "_manifest.json").unlink()
    for source, run in (("b", "second"), ("a", "second")):
        assert "no manifest says whose shard that is" in refused(tmp_path, source, run)
    packed(tmp_path, "a", "first")  # who wrote them may write them again
    assert ids(tmp_path) == ids_of("a")
    stray = tmp_path / "shards" / "part-00077.parquet"
    stray.write_bytes((tmp_path / "shards" / "part-00000.parquet").read_bytes())
    assert "part-00077.parquet, and no manifest" in refused(tmp_path, "a", "second")


def test_who_comes_at_the_same_moment_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look and the own claim, another one takes the folder."""
    entered = []
    real = claim.make_folder

    def meanwhile(fs: object, folder: str) -> None:
        real(fs, folder)
        if not entered:
            entered.append(claimed(folder, Owner("b", "second"), lambda: False))
            entered[0].__enter__()

    monkeypatch.setattr(claim, "make_folder", meanwhile)
    folder = str(tmp_path / "shards")
    with (
        pytest.raises(DataError, match="another job is writing shards of b"),
        claimed(folder, Owner("a", "first"), lambda: False),
    ):
        raise AssertionError("two are inside")
    assert len(list(Path(folder).glob(".claim-*"))) == 1  # the first one's is taken back
    entered[0].__exit__(None, None, None)
    assert not list(Path(folder).iterdir())


def test_a_claim_that_is_gone_stops_the_pack_before_its_manifest(tmp_path: Path) -> None:
    def take_away(what: str, done: int, total: int) -> None:
        if (what, done) == ("write", 2):
            for mark in (tmp_path / "shards").glob(".claim-*"):
                mark.unlink()

    with pytest.raises(DataError, match="is not this job's any more"):
        packed(tmp_path, "a", "first", progress=take_away)
    assert not (tmp_path / "shards" / "_manifest.json").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"source": 5}', "[" * 100_000, "\x00"])
def test_a_damaged_claim_is_somebody_elses(tmp_path: Path, text: str) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / ".claim-0123456789abcdef.json").write_text(text)
    said = refused(tmp_path, "a", "first")
    assert "belongs to shards of" in said


def test_only_files_of_a_pack_are_deleted(tmp_path: Path) -> None:
    killed(tmp_path, ("write", 2))
    mine = [
        "shards/notes.txt", "shards/part-old.parquet.bak", "shards/sub/part-00000.parquet",
        "first/work/notes.txt", "first/work/runs/thesis.txt", "first/work/shards/task.json",
        "first/work/runs/sub/task-000000.json",
    ]  # fmt: skip
    for name in mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "a" / "new.jpg").write_bytes(h.jpeg(99))  # another pack: all begins anew
    packed(tmp_path, "a", "first")
    assert {name: (tmp_path / name).read_text() for name in mine} == dict.fromkeys(mine, "mine")


@pytest.mark.long
def test_in_a_bucket(tmp_path: Path, s3: object) -> None:
    s3.make("claims")  # type: ignore[attr-defined]
    uri = "s3://claims/shards"

    def other(what: str, done: int, total: int) -> None:
        if (what, done) in (("read", 1), ("write", 2)):
            for source in ("a", "b"):
                assert "that are not finished" in refused(tmp_path, source, "second", uri)
        if (what, done) == ("write", 3):
            raise Stopped

    with pytest.raises(Stopped):
        packed(tmp_path, "a", "first", uri, progress=other)
    assert "that are not finished" in refused(tmp_path, "b", "second", uri)
    packed(tmp_path, "a", "first", uri)
    assert open_shards(uri).rows == len(IMAGES["a"])
    names = s3.objects("claims")  # type: ignore[attr-defined]
    assert not [name for name in names if "claim-" in name]
