"""Decisions on small piles against what each step's table says, read by a plain loop."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.curate.copies.leaks import best_of_groups, groups_that_leak
from pipeline.curate.decide.decide import LEFT, Mix, decide, draws, list_left, starts_of
from pipeline.curate.decide.file_rows import Known
from pipeline.curate.decide.tally import FEW, Sources, Tally, list_folders, sources_of
from pipeline.curate.rows.tables import (
    AS_IS,
    BALANCED,
    COMPONENTS,
    DECISIONS,
    EXACT,
    FINGERPRINT,
    LEAKS,
    POOL,
    QUALITY,
    REASONS,
    RETRIEVED,
    InputFile,
    Inputs,
    read_table,
    write_table,
)
from pipeline.curate.steps.steps import Output, Step
from pipeline.errors import DataError
from pipeline.shards.columns import image_id
from tests.curate.piles import fingerprints, hub, picture, step_table

IMAGES = [picture(seed) for seed in range(12)]
IMAGES[9] = IMAGES[2]  # equal bytes
IDS = [bytes.fromhex(image_id(x)) for x in IMAGES]
NAN = float("nan")


@pytest.fixture(scope="module")
def pile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Inputs, Step, Path]:
    """Twelve images in three files of two sets; row 0 cannot be decoded."""
    folder = tmp_path_factory.mktemp("pile")
    seeds = hub(folder / "seeds", [IMAGES[:3]])
    pool = hub(folder / "pool", [IMAGES[3:7], IMAGES[7:]])
    inputs = Inputs.of([("seeds", AS_IS, seeds), ("pool", POOL, pool)])
    paths = {row: f"photos/{'ab'[row % 2]}/{row}.png" for row in range(3, 12)}
    prints = fingerprints(folder / "fp", inputs, error={0: "truncated"}, source=paths)
    return inputs, prints, folder


SOURCES = {"seeds": Sources("seeds"), "pool": Sources("pool", ("photos",), ("a", "b"))}


def decided_on(
    folder: Path, file: InputFile, inputs: Inputs, known: Known, mix: Mix | None = None
) -> dict:
    """The account of one task."""
    out = Output(str(folder), file.name)
    return out.account | decide(out, file, starts_of(inputs), known, SOURCES, mix or Mix())


def decided(
    folder: Path, inputs: Inputs, known: Known, mix: Mix | None = None
) -> tuple[list[dict], Tally]:
    accounts = [decided_on(folder, file, inputs, known, mix) for file in inputs.files]
    rows = [row for file in inputs.files for row in read_table(str(folder), file.name).to_pylist()]
    assert [row["row"] for row in rows] == list(range(inputs.rows))
    return rows, Tally.of(inputs, accounts)


def test_with_no_step_all_that_decodes_is_kept(pile, tmp_path):
    inputs, prints, _ = pile
    rows, tally = decided(tmp_path, inputs, Known(prints))
    assert [row["reason"] for row in rows] == ["undecodable"] + ["kept"] * 11
    assert rows[0]["rule"] == "truncated" and not rows[0]["kept"] and rows[0]["part"] == ""
    assert [row["part"] for row in rows[1:]] == ["as_is"] * 2 + ["pool"] * 9
    assert [row["image_id"] for row in rows] == [x.hex() for x in IDS]
    assert tally.line() == "12 in = 11 kept + 1 undecodable"
    assert tally.lines() == [
        "pool/b: 5 in = 5 kept",
        "pool/a: 4 in = 4 kept",
        "seeds: 3 in = 2 kept + 1 undecodable",
    ]
    assert read_table(str(tmp_path), "00000").schema.names == DECISIONS.names


@pytest.fixture(scope="module")
def steps(pile) -> Known:
    inputs, prints, folder = pile
    quality = [(r, "", "", NAN) for r in range(12)]
    quality[0] = (0, "undecodable", "", NAN)
    quality[4] = (4, "flat", "min_entropy", 1.5)
    quality[5] = (5, "too_small", "min_side", 24.0)
    exact = [(r, r, "") for r in range(12) if r not in (0, 4, 5)]
    exact = [(9, 2, "bytes") if r == 9 else row for r, row in ((x[0], x) for x in exact)]
    exact = [(11, 3, "pixels") if row[0] == 11 else row for row in exact]
    # 6, 7, 8 are near copies, keeper 7 as 6 leaks; 2 and 10 too
    near = min(IDS[6], IDS[7], IDS[8])
    members = [
        (6, near, 3, 7, IDS[7], 0.9, False),
        (7, near, 3, 7, IDS[7], 1.0, False),
        (8, near, 3, 7, IDS[7], 0.8, False),
        (2, IDS[2], 2, 2, IDS[2], 1.0, False),
        (10, IDS[2], 2, 2, IDS[2], 0.7, False),
    ]
    leaks = [(6, "test", b"q" * 16, 0.95)]
    return Known(
        prints,
        marks=step_table(folder / "quality", inputs, QUALITY, quality),
        equal=step_table(folder / "exact", inputs, EXACT, exact),
        groups=step_table(folder / "components", inputs, COMPONENTS, members),
        leaks=step_table(folder / "leaks", inputs, LEAKS, leaks),
    )


REMOVED = {
    0: "undecodable",
    4: "flat",
    5: "too_small",
    6: "leaks_evaluation",
    8: "duplicate_near",
    9: "duplicate_bytes",
    10: "duplicate_near",
    11: "duplicate_near",
}


def test_each_step_gives_its_reason_and_what_shows_it(pile, steps, tmp_path):
    inputs, _, _ = pile
    rows, tally = decided(tmp_path, inputs, steps)
    assert {r["row"]: r["reason"] for r in rows if not r["kept"]} == REMOVED
    assert rows[4]["rule"] == "min_entropy" and rows[4]["score"] == 1.5
    assert rows[6]["rule"] == "test" and rows[6]["query_id"] == (b"q" * 16).hex()
    assert rows[6]["similarity"] == pytest.approx(0.95)
    assert (rows[8]["rule"], rows[8]["keeper_id"]) == ("near", IDS[7].hex())
    assert (rows[9]["rule"], rows[9]["keeper_id"]) == ("bytes", IDS[2].hex())
    assert (rows[11]["rule"], rows[11]["keeper_id"]) == ("pixels", IDS[3].hex())
    assert rows[8]["component"] == rows[7]["component"] == min(IDS[6], IDS[7], IDS[8]).hex()
    assert rows[1]["component"] is None and rows[1]["similarity"] is None
    known = {row["image_id"] for row in rows}
    assert {row["keeper_id"] for row in rows} - {None} <= known
    assert tally.total() == {
        "kept": 4,
        "undecodable": 1,
        "too_small": 1,
        "flat": 1,
        "duplicate_bytes": 1,
        "duplicate_near": 3,
        "leaks_evaluation": 1,
    }
    assert tally.reasons["pool/a"] == {
        "flat": 1, "leaks_evaluation": 1, "duplicate_near": 2,
    }  # fmt: skip


def test_what_is_left_is_what_is_kept_where_nothing_selects(pile, steps, tmp_path):
    inputs, _, _ = pile
    rows, _ = decided(tmp_path / "decisions", inputs, steps)
    left = []
    for file in inputs.files:
        out = Output(str(tmp_path / "alive"), file.name)
        list_left(out, file, starts_of(inputs), steps)
        table = read_table(str(tmp_path / "alive"), file.name)
        assert table.schema.equals(LEFT)
        left += table.column("row").to_pylist()
    assert left == [row["row"] for row in rows if row["kept"]]


def leaking(folder: Path, inputs: Inputs, known: Known) -> Step:
    """Groups that leak, without Ray."""
    for file in inputs.files:
        out = Output(str(folder / "files"), file.name)
        groups_that_leak(out, file, known.prints, known.leaks, known.groups)
    files = Step("files", "", str(folder / "files"), tables=tuple(inputs.by_name))
    best_of_groups(Output(str(folder / "best"), "leaking"), None, files)
    return Step("best", "", str(folder / "best"))


def test_a_leak_takes_its_component_along(pile, steps, tmp_path):
    inputs, _, _ = pile
    known = replace(steps, leaking=leaking(tmp_path, inputs, steps))
    rows, _ = decided(tmp_path / "decisions", inputs, known)
    gone = {r["row"] for r in rows if r["reason"] == "leaks_evaluation"}
    assert gone == {6, 7, 8}
    assert {rows[r]["query_id"] for r in gone} == {(b"q" * 16).hex()}
    assert [rows[r]["keeper_id"] for r in (7, 8)] == [IDS[6].hex()] * 2  # the image that matches
    assert rows[10]["reason"] == "duplicate_near"


def test_the_best_leak_of_a_component(pile, steps, tmp_path):
    inputs, _, _ = pile
    leaks = [(6, "b", b"q" * 16, 0.8), (7, "a", b"r" * 16, 0.9), (8, "a", b"p" * 16, 0.9)]
    known = replace(steps, leaks=step_table(tmp_path / "leaks", inputs, LEAKS, leaks))
    (row,) = leaking(tmp_path, inputs, known).read("leaking").to_pylist()
    assert (row["set"], row["query_id"], row["row_id"]) == ("a", b"p" * 16, IDS[8])


def retrieved(folder: Path, inputs: Inputs) -> Step:
    rows = [
        (3, "sample", "seeds", IDS[1], 0.7, 0, 2, -1),
        (6, "sample", "seeds", IDS[1], 0.6, 1, 1, -1),  # it leaks
        (7, "cluster", "seeds", IDS[2], 0.5, -1, 1, 4),
    ]
    return step_table(folder, inputs, RETRIEVED, rows)


def test_parts_and_what_no_part_wants(pile, steps, tmp_path):
    inputs, _, _ = pile
    asked = retrieved(tmp_path / "retrieved", inputs)
    rows, tally = decided(tmp_path / "one", inputs, replace(steps, retrieved=asked))
    assert {r["row"]: r["part"] for r in rows if r["kept"]} == {
        1: "as_is", 2: "as_is", 3: "sample", 7: "cluster",
    }  # fmt: skip
    assert (rows[3]["hits"], rows[3]["query_id"]) == (2, IDS[1].hex())
    assert rows[7]["cluster"] == 4 and rows[3]["cluster"] is None
    assert {r["row"]: r["reason"] for r in rows if not r["kept"]} == REMOVED
    # without components 8 and 10 are left, and nobody asked for them
    less = replace(steps, retrieved=asked, groups=None, leaks=None)
    rows, tally = decided(tmp_path / "two", inputs, less)
    assert [r["row"] for r in rows if r["reason"] == "not_retrieved"] == [8, 10]
    assert tally.total_parts() == {"as_is": 2, "sample": 2, "cluster": 1}


def test_balancing_alone_and_beside_retrieval(pile, steps, tmp_path):
    inputs, prints, _ = pile
    leaves = [(r, r % 3, 0, r in (5, 7)) for r in range(3, 12)]
    balanced = step_table(tmp_path / "balanced", inputs, BALANCED, leaves)
    rows, _ = decided(tmp_path / "one", inputs, Known(prints, balanced=balanced))
    assert [r["row"] for r in rows if r["part"] == "balanced"] == [5, 7]
    assert {r["reason"] for r in rows[3:] if not r["kept"]} == {"balanced_out"}
    assert rows[8]["cluster"] == 2
    asked = retrieved(tmp_path / "retrieved", inputs)
    rows, tally = decided(
        tmp_path / "two", inputs, Known(prints, retrieved=asked, balanced=balanced)
    )
    assert tally.total_parts() == {"as_is": 2, "sample": 2, "cluster": 1, "balanced": 1}
    assert {r["reason"] for r in rows[3:] if not r["kept"]} == {"balanced_out"}


def test_shares_of_parts_depend_on_ids_and_seed_alone(pile, tmp_path):
    inputs, prints, _ = pile
    mix = Mix(3, {"pool": 0.5, "as_is": 0.0})
    rows, tally = decided(tmp_path, inputs, Known(prints), mix)
    draw = draws(np.array([list(x) for x in IDS], np.uint8), 3)
    for row in rows[1:]:
        part = "as_is" if row["row"] < 3 else "pool"
        assert row["kept"] is bool(draw[row["row"]] < mix.shares[part])
        assert row["kept"] or (row["reason"], row["rule"]) == ("balanced_out", f"mix.{part}")
    assert tally.rows == 12


def test_a_step_that_lost_a_row_is_a_bug_that_is_seen(pile, tmp_path):
    inputs, prints, _ = pile
    accounts = [decided_on(tmp_path, file, inputs, Known(prints)) for file in inputs.files]
    for change in ({"kept": 1}, {"counts": {"pool": {"kept": 1}}}, {"parts": {}}):
        with pytest.raises(RuntimeError, match="lost or counted twice"):
            Tally.of(inputs, [accounts[0] | change, *accounts[1:]])
    other = step_table(tmp_path / "leaks", inputs, LEAKS, [(6, "x", b"q" * 16, 0.9)])
    write_table(other.read("00001"), other.folder, "00000")  # rows of another file
    with pytest.raises(RuntimeError, match="not of this file"):
        decided_on(tmp_path, inputs.files[0], inputs, Known(prints, leaks=other))


def test_a_damaged_table_is_named(pile, steps, tmp_path):
    inputs, prints, _ = pile
    leaks = step_table(tmp_path / "leaks", inputs, LEAKS, [(6, "x", b"q" * 16, 0.9)])
    path = Path(leaks.folder) / "00001.parquet"
    content = bytearray(path.read_bytes())
    content[10] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match="00001"):
        decided_on(tmp_path, inputs.files[1], inputs, Known(prints, leaks=leaks))
    path.unlink()
    with pytest.raises(DataError, match=r"00001.*cannot be read"):
        decided_on(tmp_path, inputs.files[1], inputs, Known(prints, leaks=leaks))


@pytest.mark.parametrize(
    ("paths", "root", "folders"),
    [
        ([["cat/1.jpg", "dog/2.jpg"], ["cat/x/3.jpg"]], (), ("cat", "dog")),
        ([["a/b/cat/1.jpg"], ["a/b/dog/1.jpg", "a/b/3.jpg"]], ("a", "b"), ("cat", "dog")),
        ([["a/b/1.jpg", "a/b/2.jpg"]], ("a", "b"), ()),
        ([["", ""], []], (), ()),
        ([["1.jpg"], ["cat/2.jpg", "dog/1.jpg"]], (), ("cat", "dog")),
        ([[f"{i}/x.jpg" for i in range(FEW + 1)]], (), ()),
        ([["https://h/a/1.jpg"], ["https://h/b/1.jpg"]], ("https:", "", "h"), ("a", "b")),
        ([["set.parquet#0", "set.parquet#1"]], (), ()),
    ],
)
def test_top_folders_below_the_common_root(pile, tmp_path, paths, root, folders):
    inputs, _, _ = pile
    accounts = []
    for index, names in enumerate(paths):
        file = replace(inputs.files[1], index=index)
        table = pa.table({"source": pa.array(names, pa.string())})
        write_table(table, str(tmp_path), file.name)
        accounts.append(list_folders(Output(""), file, Step("fingerprint", "", str(tmp_path))))
    source = sources_of(accounts)["pool"]
    assert (source.root, source.folders) == (root, folders)
    assert FINGERPRINT.field("source").type == pa.string()
    every = [path for names in paths for path in names]
    named = Counter(source.names(pa.chunked_array([pa.array(every, pa.string())])))
    expected = Counter()
    for path in every:  # a plain loop
        parts = path.split("/")[:-1]
        below = parts[len(root)] if len(parts) > len(root) else ""
        expected[f"pool/{below}" if below in folders else "pool"] += 1
    assert named == expected


def test_reasons_are_those_of_the_contract():
    assert set(REASONS) == {
        "kept", "undecodable", "too_small", "aspect", "flat", "duplicate_bytes", "duplicate_near",
        "leaks_evaluation", "not_retrieved", "balanced_out",
    }  # fmt: skip
