"""The curate stage from config to shards, in one process; `test_curate_jobs.py` has it on Ray."""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from pipeline import job
from pipeline.config.curation import Dedup
from pipeline.config.load import load
from pipeline.curate import run_choose
from pipeline.curate.look import look_at_pairs
from pipeline.curate.look.second_look import Verdict
from pipeline.curate.report import report
from pipeline.curate.run_decide import proportions
from pipeline.curate.steps import tasks
from pipeline.shards.shards import open_shards
from pipeline.stages.curate import params
from pipeline.storage.run_folder import RunFolder
from tests.curate.kinds import KINDS
from tests.curate.piles import hub
from tests.data import encoded, packed
from tests.standins import tasks_here


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    tasks_here(monkeypatch)


def blobs(seed: int, size: int = 64) -> Image.Image:
    """A picture of coarse random structure: unlike any other, and easily told from its copies."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (9, 9, 3), np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


FIXED = [
    "dedup.threshold=0.9",
    "dedup.max_share=1",
    "quality.min_entropy=1",
    "quality.min_sharpness=1",
]


BY_COPIES = "curate.embedder=descriptor"  # needs no weights


def curate(folder: Path, *arguments: str, name: str = "r") -> RunFolder:
    """Runs jobs/curate.py in this process."""
    given = [f"run.folder={folder}", f"run.name={name}", "track.enabled=false"]
    job.main(["curate"], "doc", [*given, "curate.preset=dedup", *FIXED, *arguments])
    return RunFolder.of(str(folder), name)


def decisions(run: RunFolder) -> list[dict]:
    folder = run.path / "curate" / "steps" / "decisions"
    return [
        row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


def assert_balanced(run: RunFolder, rows: int) -> Counter:
    """in = kept + removed, per source and in total, and the shards hold what is kept."""
    found = decisions(run)
    assert [row["row"] for row in found] == list(range(rows))
    assert all(row["kept"] is (row["reason"] == "kept") for row in found)
    result = run.last("curate")
    counts = Counter(row["reason"] for row in found)
    assert result["reasons"] == dict(counts)
    per_source: dict[str, Counter] = {}
    for row in found:
        per_source.setdefault(row["source"], Counter())[row["reason"]] += 1
    assert result["sources"] == {k: dict(v) for k, v in per_source.items()}
    shards = open_shards(str(run.path / "curated"))
    ids = pa.concat_tables([pq.read_table(f.path) for f in shards.files])["image_id"].to_pylist()
    assert ids == sorted(row["image_id"] for row in found if row["kept"])
    known = {row["image_id"] for row in found}
    for row in found:
        if row["reason"].startswith("duplicate"):
            assert row["rule"] == "earlier" or row["keeper_id"] in known
        if row["reason"] == "leaks_evaluation":
            assert row["query_id"] and row["rule"]
    return counts


def wild(count: int = 30) -> list[bytes]:
    """Pictures with planted copies: 3 smaller ones, 2 mirrored, 2 of equal pixels, 2 of equal
    bytes, and 3 flat, 2 small, 1 long, 1 broken one.
    """
    images = [blobs(seed) for seed in range(count)]
    found = [encoded(image, "JPEG", quality=95) for image in images]
    found += [encoded(images[i].resize((48, 48)), "JPEG", quality=80) for i in range(3)]
    found += [encoded(ImageOps.mirror(images[i]), "JPEG", quality=80) for i in range(3, 5)]
    found += [encoded(Image.open(io.BytesIO(found[i])), "PNG") for i in range(5, 7)]
    found += [found[7], found[8]]
    found += [encoded(Image.new("RGB", (64, 64), (40 * i, 90, 20))) for i in range(3)]
    found += [encoded(blobs(900 + i, 20)) for i in range(2)]
    found += [encoded(blobs(950).resize((300, 40))), b"not a picture"]
    return found


WILD = Counter(
    kept=30, duplicate_near=7, duplicate_bytes=2, flat=3, too_small=2, aspect=1, undecodable=1
)


def test_a_wild_pile_as_hubs_store_it(tmp_path):
    images = wild()
    hub(tmp_path / "hub", [images[:20], images[20:]], caption=[str(i) for i in range(len(images))])
    run = curate(tmp_path, f"data.shards={tmp_path}/hub")
    assert assert_balanced(run, len(images)) == WILD
    rows = decisions(run)
    # a JPEG and its PNG have equal pixels: the larger file stays
    assert [row["rule"] for row in rows[5:7]] == ["pixels"] * 2
    assert [row["keeper_id"] for row in rows[5:7]] == [row["image_id"] for row in rows[35:37]]
    report = (run.path / "curate" / "report.html").read_text()
    assert "copy of another image" in report
    assert "http" not in report.replace("http://www.w3.org", "")  # it needs nothing else
    shards = open_shards(str(run.path / "curated"))
    table = pq.read_table(shards.files[0].path)
    assert table.column("caption").null_count == 0


def test_more_near_copies_than_allowed_end_the_stage_with_its_report(tmp_path, capsys):
    """Planted: 20 near copies among 30 images. Equal bytes and pixels are certain: not counted."""
    images = [blobs(seed) for seed in range(10)]
    found = [encoded(image, "JPEG", quality=95) for image in images]
    near = [encoded(x.resize((48, 48)), "JPEG", quality=q) for x in images for q in (70, 80)]
    hub(tmp_path / "hub", [found, near])
    with pytest.raises(SystemExit) as ending:
        curate(tmp_path, f"data.shards={tmp_path}/hub", f"dedup.max_share={Dedup().max_share}")
    said = capsys.readouterr().err
    assert ending.value.code == 2 and "20 of 30 images (66.7 %) would go as near copies" in said
    assert "dedup.max_share=0.3" in said and "set dedup.max_share=0.67 and run the same" in said
    assert (tmp_path / "r" / "curate" / "report.html").exists()
    assert not (tmp_path / "r" / "curated").exists()
    run = curate(tmp_path, f"data.shards={tmp_path}/hub", "dedup.max_share=0.67")
    assert assert_balanced(run, 30) == Counter(kept=10, duplicate_near=20)

    again = [encoded(Image.open(io.BytesIO(x)), "PNG") for x in found]
    hub(tmp_path / "same", [found, again, again, found])
    run = curate(tmp_path, f"data.shards={tmp_path}/same", "dedup.max_share=0", name="same")
    assert assert_balanced(run, 40)["kept"] == 10


def test_what_mlflow_prints_above_the_pictures():
    arguments = ["curate.preset=dedup", "curate.against=runs/one"]
    assert params(load(arguments), 36, 0.91234) == {
        "preset": "dedup",
        "images": 36,
        "copy_embedder": "descriptor",
        "threshold": "0.9123",
        "seed": 0,
        "against": "runs/one",
    }
    balanced = params(load(["curate.preset=balanced", "balance.images=9", BY_COPIES]), 0, None)
    assert len(balanced) <= 8 and balanced["balanced_images"] == 9
    assert balanced["threshold"] == "none" and balanced["embedder"] == "descriptor"


def test_the_order_of_rows_changes_nothing(tmp_path):
    images = wild()
    hub(tmp_path / "a", [images])
    mixed = [images[i] for i in np.random.default_rng(5).permutation(len(images))]
    hub(tmp_path / "b", [mixed[:11], mixed[11:30], mixed[30:]])
    one = curate(tmp_path, f"data.shards={tmp_path}/a", name="a")
    other = curate(tmp_path, f"data.shards={tmp_path}/b", name="b")
    assert assert_balanced(one, len(images)) == assert_balanced(other, len(images))
    kept = [sorted(r["image_id"] for r in decisions(x) if r["kept"]) for x in (one, other)]
    assert kept[0] == kept[1]
    assert one.last("curate")["digest"] == other.last("curate")["digest"]


@pytest.mark.parametrize("count", [1, 2])
def test_one_and_two_images(tmp_path, count):
    hub(tmp_path / "hub", [[encoded(blobs(i)) for i in range(count)]])
    run = curate(tmp_path, f"data.shards={tmp_path}/hub")
    assert assert_balanced(run, count) == {"kept": count}


def test_thresholds_of_few_images_are_the_defaults(tmp_path):
    hub(tmp_path / "hub", [[encoded(blobs(i)) for i in range(3)]])
    run = curate(tmp_path, f"data.shards={tmp_path}/hub", "dedup.threshold=auto")
    assert assert_balanced(run, 3) == {"kept": 3}
    assert 0.5 < run.last("curate")["threshold"] < 1


def said(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_no_images_are_one_sentence(tmp_path, capsys):
    hub(tmp_path / "hub", [[]])
    with pytest.raises(SystemExit):
        curate(tmp_path, f"data.shards={tmp_path}/hub")
    assert said(capsys)[0] == "error: curation kept none of 0 images"


def test_all_duplicates(tmp_path):
    image = blobs(1)
    copies = [encoded(image, "JPEG", quality=q) for q in range(60, 90)] + [encoded(image)] * 9
    hub(tmp_path / "hub", [copies])
    run = curate(tmp_path, f"data.shards={tmp_path}/hub")
    counts = assert_balanced(run, len(copies))
    assert counts == {"kept": 1, "duplicate_near": 30, "duplicate_bytes": 8}


def test_all_filtered(tmp_path, capsys):
    hub(tmp_path / "hub", [[encoded(Image.new("RGB", (64, 64), (i, 0, 0))) for i in range(9)]])
    with pytest.raises(SystemExit):
        curate(tmp_path, f"data.shards={tmp_path}/hub")
    lines = said(capsys)
    assert lines[0] == "error: curation kept none of 9 images" and len(lines) == 2
    run = RunFolder.of(str(tmp_path), "r")
    assert {row["reason"] for row in decisions(run)} == {"flat"}  # the decisions are there
    assert "almost nothing to see" in (run.path / "curate" / "report.html").read_text()
    assert not (run.path / "curate" / "_done.json").exists()


@pytest.mark.parametrize("scope", ["images", "components"])
def test_a_reference_set_that_equals_the_pool(tmp_path, capsys, scope):
    images = [encoded(blobs(i)) for i in range(12)]
    hub(tmp_path / "hub", [images])
    with pytest.raises(SystemExit):
        curate(
            tmp_path,
            f"data.shards={tmp_path}/hub",
            f"leaks.sets.same={tmp_path}/hub",
            f"leaks.scope={scope}",
        )
    assert said(capsys)[0] == "error: curation kept none of 12 images"
    rows = decisions(RunFolder.of(str(tmp_path), "r"))
    assert {(r["reason"], r["rule"]) for r in rows} == {("leaks_evaluation", "same")}
    assert all(r["query_id"] == r["image_id"] and r["similarity"] > 0.99 for r in rows)


def test_leaks_and_their_components(tmp_path):
    images = [blobs(i) for i in range(20)]
    pool = [encoded(image, "JPEG", quality=95) for image in images]
    pool += [encoded(images[i], "JPEG", quality=70) for i in (0, 1, 2)]  # copies within the pool
    tests = [encoded(images[i].resize((50, 50)), "JPEG", quality=90) for i in (0, 5)]
    tests += [encoded(blobs(99))]
    hub(tmp_path / "hub", [pool])
    hub(tmp_path / "test", [tests])
    sets = [f"data.shards={tmp_path}/hub", f"leaks.sets.test={tmp_path}/test"]
    strict = curate(tmp_path, *sets, name="strict")
    counts = assert_balanced(strict, len(pool))
    assert counts == {"kept": 18, "leaks_evaluation": 3, "duplicate_near": 2}
    whole = curate(tmp_path, *sets, "leaks.scope=components", "leaks.threshold=0.95", name="whole")
    assert assert_balanced(whole, len(pool))["leaks_evaluation"] == 3


def test_leaks_alone_compare_no_image_of_the_pool_with_another(tmp_path):
    images = [blobs(i) for i in range(12)]
    pool = [encoded(image, "JPEG", quality=95) for image in [*images, images[3]]]
    pool.append(encoded(images[5], "JPEG", quality=60))
    hub(tmp_path / "hub", [pool])
    hub(tmp_path / "test", [[encoded(images[i].resize((50, 50))) for i in (0, 5)]])
    sets = [f"data.shards={tmp_path}/hub", f"leaks.sets.test={tmp_path}/test"]
    run = curate(tmp_path, *sets, "dedup.enabled=false")
    counts = assert_balanced(run, 14)
    assert counts == {"kept": 10, "leaks_evaluation": 3, "duplicate_bytes": 1}
    assert run.last("curate")["leaked"] == {"test": 2}
    steps = run.path / "curate" / "steps"
    assert (steps / "copies" / "shuffle").exists()
    assert not (steps / "copies" / "pairs").exists() and not (steps / "edges").exists()
    # what was not compared can be compared with all the same
    blobs(4).save(tmp_path / "photo.png")
    hub(tmp_path / "more", [[encoded(blobs(4).resize((48, 48))), encoded(blobs(70))]])
    more = [f"data.shards={tmp_path}/more", f"curate.against={run.path}"]
    more = curate(tmp_path, *more, "dedup.enabled=false", name="more")
    assert [row["rule"] for row in decisions(more)] == ["earlier", ""]


def test_each_set_is_told_all_of_its_images_that_leaked(tmp_path, monkeypatch):
    """A row is a leak of one image only, though it may be like several, and of several sets."""
    hub(tmp_path / "hub", [[encoded(blobs(i), "JPEG", quality=95) for i in range(8)]])
    shared = encoded(blobs(3).resize((50, 50)))
    hub(tmp_path / "a", [[shared, encoded(blobs(3).resize((56, 56))), encoded(blobs(90))]])
    hub(tmp_path / "b", [[shared, encoded(blobs(91))]])
    seen = []
    write = report.write
    monkeypatch.setattr(
        report, "write", lambda page, *some: seen.append(some) or write(page, *some)
    )
    sets = [f"leaks.sets.{name}={tmp_path}/{name}" for name in "ab"]
    run = curate(tmp_path, f"data.shards={tmp_path}/hub", *sets)
    assert assert_balanced(run, 8)["leaks_evaluation"] == 1
    told = {one.name: (one.leaked, one.images) for one in seen[0][0].leaks}
    assert told == {"a": (2, 3), "b": (1, 2)}
    assert run.last("curate")["leaked"] == {"a": 2, "b": 1}


@pytest.fixture
def weights(tmp_path):
    """A backbone that has learned nothing."""
    import torch

    from pipeline.model.vit import BackboneSpec
    from pipeline.model.weights import save_backbone

    torch.manual_seed(0)
    spec = BackboneSpec(image_size=28, width=64, depth=1, heads=1)
    return save_backbone(spec.build().eval(), spec, tmp_path / "weights")


def test_another_limit_embeds_nothing_again(tmp_path, weights):
    images = wild()
    hub(tmp_path / "hub", [images[:20], images[20:]])
    given = [f"data.shards={tmp_path}/hub", f"curate.copy_embedder={weights}"]
    given += ["dedup.threshold=0.9999"]
    run = curate(tmp_path, *given)
    first = Counter(row["reason"] for row in decisions(run))
    assert first["flat"] == 3
    steps = run.path / "curate" / "steps"
    embedded = pa.concat_tables(pq.read_table(p) for p in steps.glob("embed_copy/*.parquet"))
    # one of each group of equal images, whatever its quality; the broken one has no vector
    assert len(embedded) == len(images) - 2 - 2 - 1
    stamps = {p: p.stat().st_mtime_ns for p in steps.glob("embed_copy/**/*")}
    other = ["quality.min_side=50", "dedup.threshold=0.999"]
    run = curate(tmp_path, *given, *other)
    assert {p: p.stat().st_mtime_ns for p in steps.glob("embed_copy/**/*")} == stamps
    counts = assert_balanced(run, len(images))
    assert counts["too_small"] == first["too_small"] + 4  # and the long one
    fresh = curate(tmp_path, *given, *other, name="fresh")
    steps = ("curate", "steps", "decisions")
    assert files_of(run, *steps) == files_of(fresh, *steps)
    # an embedder of its own for what images show is no other case
    own = [given[0], f"curate.embedder={weights}", "balance.images=9", "balance.resampling=1"]
    run = curate(tmp_path, *own, name="own")
    shown = run.path / "curate" / "steps" / "embed"
    stamps = {p: p.stat().st_mtime_ns for p in shown.rglob("*")}
    assert len(stamps) > 2
    run = curate(tmp_path, *own, "quality.min_side=50", "dedup.threshold=0.8", name="own")
    assert {p: p.stat().st_mtime_ns for p in shown.rglob("*")} == stamps
    assert_balanced(run, len(images))


def test_thresholds_near_an_earlier_one_join_nothing_again(tmp_path):
    images = [blobs(i) for i in range(12)]
    images += [Image.blend(blobs(i), blobs(50 + i), 0.1 * (i + 1)) for i in range(5)]
    hub(tmp_path / "hub", [[encoded(image) for image in images]])
    place, seen = f"data.shards={tmp_path}/hub", set()

    def stamps():
        pairs = run.path / "curate" / "steps" / "copies" / "pairs"
        return {path: path.stat().st_mtime_ns for path in pairs.rglob("*.parquet")}

    run = curate(tmp_path, place, "dedup.threshold=0.8")
    first = stamps()
    assert first
    for threshold, again in ((0.97, False), (0.76, False), (0.74, True), (0.9, False)):
        run = curate(tmp_path, place, f"dedup.threshold={threshold}")
        assert (stamps() != first) is again, threshold
        first = stamps()
        fresh = curate(tmp_path, place, f"dedup.threshold={threshold}", name=f"t{threshold}")
        steps = ("curate", "steps", "decisions")
        assert files_of(run, *steps) == files_of(fresh, *steps)
        seen.add(run.last("curate")["images"])
    assert len(seen) > 1


def test_vectors_of_another_image_size_or_mean_are_not_compared(tmp_path, capsys, weights):
    hub(tmp_path / "hub", [[encoded(blobs(i)) for i in range(4)]])
    blobs(2).save(tmp_path / "photo.png")
    own = [f"curate.copy_embedder={weights}", "dedup.threshold=0.9999"]
    one = curate(tmp_path, f"data.shards={tmp_path}/hub", *own, name="one")
    asked = [*own, f"curate.against={one.path}"]
    for given, what in (
        (["curate.image_size=42"], "image size 42, there its own"),
        (["augment.mean=[0.5, 0.5, 0.5]"], "mean [0.5, 0.5, 0.5], there [0.485, 0.456, 0.406]"),
        (["augment.std=[0.5, 0.5, 0.5]"], "std [0.5, 0.5, 0.5], there [0.229, 0.224, 0.225]"),
    ):
        for todo in (f"data.shards={tmp_path}/hub", f"curate.query={tmp_path}/photo.png"):
            capsys.readouterr()
            with pytest.raises(SystemExit):
                curate(tmp_path, todo, *asked, *given, name="two")
            told, hint = said(capsys)
            assert f"in another way ({what})" in told and "curate.image_size" in hint
    curate(tmp_path, f"curate.query={tmp_path}/photo.png", *asked, name="two")
    assert "photo.png is like" in capsys.readouterr().out


def test_equal_images_of_a_seed_set_are_one_seed(tmp_path):
    hub(tmp_path / "hub", [[encoded(blobs(i)) for i in range(20)]])
    seed = blobs(3).rotate(3)
    hub(tmp_path / "seeds", [[encoded(seed)] * 3, [encoded(seed, compress_level=1)]])
    given = [f"data.shards={tmp_path}/hub", f"retrieve.seeds.mine={tmp_path}/seeds", BY_COPIES]
    given += ["retrieve.include=false", "retrieve.mode=sample", "retrieve.neighbours=2"]
    run = curate(tmp_path, *given)
    assert assert_balanced(run, 20) == {"kept": 2, "not_retrieved": 18}
    assert {row["hits"] for row in decisions(run) if row["kept"]} == {1}
    assert run.last("curate")["retrieved"]["sets"]["mine"]["seeds"] == 1


def test_parts_switched_off(tmp_path):
    images = wild()
    hub(tmp_path / "hub", [images])
    place = f"data.shards={tmp_path}/hub"
    run = curate(tmp_path, place, "dedup.enabled=false", name="a")
    counts = assert_balanced(run, len(images))
    assert counts == WILD + Counter(kept=5) - Counter(duplicate_near=5)
    run = curate(tmp_path, place, "quality.enabled=false", name="b")
    counts = assert_balanced(run, len(images))
    assert set(counts) == {"kept", "undecodable", "duplicate_bytes", "duplicate_near"}
    run = curate(tmp_path, place, "mix.pool=0.5", name="c")
    counts = assert_balanced(run, len(images))
    assert 5 < counts["kept"] < 25 and counts["balanced_out"] == 30 - counts["kept"]


def test_seeds_and_balance(tmp_path):
    pool = [encoded(blobs(i)) for i in range(60)]
    seeds = [encoded(blobs(i).resize((60, 60)).rotate(4)) for i in range(4)]
    hub(tmp_path / "hub", [pool])
    hub(tmp_path / "seeds", [seeds])
    place = [f"data.shards={tmp_path}/hub", f"retrieve.seeds.mine={tmp_path}/seeds", BY_COPIES]
    sample = ["retrieve.mode=sample", "retrieve.neighbours=3"]
    run = curate(tmp_path, *place, *sample, name="sample")
    counts = assert_balanced(run, 64)
    parts = Counter(row["part"] for row in decisions(run) if row["kept"])
    assert parts["as_is"] == 4 and 4 < parts["sample"] <= 12
    assert counts["not_retrieved"] == 64 - counts["kept"] - counts["duplicate_near"]
    retrieved = [row for row in decisions(run) if row["part"] == "sample"]
    assert sum(row["hits"] for row in retrieved) == 12
    assert run.last("curate")["retrieved"]["sets"]["mine"]["collisions"] == 12 - parts["sample"]

    run = curate(tmp_path, *place, *sample, "retrieve.include=false", name="queries")
    assert_balanced(run, 60)  # seeds are no inputs
    assert {row["part"] for row in decisions(run)} == {"sample", ""}

    both = ["balance.images=20", "curate.preset=balanced", "balance.resampling=1", BY_COPIES]
    run = curate(tmp_path, place[0], *both, name="balanced")
    counts = assert_balanced(run, 60)
    assert counts == {"kept": 20, "balanced_out": 40}
    run = curate(tmp_path, *place, *sample, *both, name="both")
    assert_balanced(run, 64)
    parts = Counter(row["part"] for row in decisions(run) if row["kept"])
    assert set(parts) == {"as_is", "sample", "balanced"}


def test_a_second_run_does_nothing_and_a_changed_one_what_it_must(tmp_path, capsys):
    images = wild()
    hub(tmp_path / "hub", [images])
    place = f"data.shards={tmp_path}/hub"
    run = curate(tmp_path, place)
    capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*.parquet")}
    curate(tmp_path, place)
    assert "curate      up to date" in capsys.readouterr().out
    curate(tmp_path, place, "dedup.chains=keep")  # only what comes after the pairs
    changed = {
        p.relative_to(run.path / "curate" / "steps").parts[0]
        for p, stamp in before.items()
        if "steps" in p.parts and p.stat().st_mtime_ns != stamp
    }
    assert not changed & {"fingerprint", "quality", "exact", "edges"}
    # a lost shard is written again
    (run.path / "curated" / "part-00000.parquet").unlink()
    curate(tmp_path, place, "dedup.chains=keep")
    assert_balanced(run, len(images))


def test_a_damaged_table_is_named_and_refused(tmp_path, capsys):
    images = wild()
    hub(tmp_path / "hub", [images])
    place = f"data.shards={tmp_path}/hub"
    run = curate(tmp_path, place)
    prints = run.path / "curate" / "steps" / "fingerprint" / "00000.parquet"
    content = bytearray(prints.read_bytes())
    content[len(content) // 3] ^= 0xFF
    prints.write_bytes(content)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        curate(tmp_path, place, "dedup.threshold=0.8", "dedup.probes=3")
    what, hint = said(capsys)
    assert "fingerprint/00000.parquet cannot be read" in what and "delete" in hint


def test_what_is_read_is_never_written_over(tmp_path, capsys):
    hub(tmp_path / "one", [[encoded(blobs(i)) for i in range(4)]])
    run = curate(tmp_path, f"data.shards={tmp_path}/one")
    for arguments in (
        [f"data.shards={run.path}/curated"],
        [f"data.shards={tmp_path}/one", f"curate.against={run.path}"],
        [f"data.shards={tmp_path}/one", f"retrieve.seeds.x={run.path}/curated", BY_COPIES],
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            curate(tmp_path, *arguments)
        assert "the curated shards would be written to" in said(capsys)[0]
        assert open_shards(str(run.path / "curated")).rows == 4


def test_images_are_added_to_a_curated_set(tmp_path):
    first = [encoded(blobs(i), "JPEG", quality=95) for i in range(20)]
    second = [encoded(blobs(i), "JPEG", quality=60) for i in range(5)]  # copies of what is there
    second += [first[7], encoded(Image.new("RGB", (64, 64), "red"))]
    second += [encoded(blobs(100 + i)) for i in range(6)]
    hub(tmp_path / "one", [first])
    hub(tmp_path / "two", [second])
    hub(tmp_path / "three", [[second[8], encoded(blobs(3).resize((50, 50))), encoded(blobs(200))]])
    one = curate(tmp_path, f"data.shards={tmp_path}/one", name="one")
    two = curate(tmp_path, f"data.shards={tmp_path}/two", f"curate.against={one.path}", name="two")
    counts = Counter(row["reason"] for row in decisions(two))
    assert counts == {"kept": 6, "duplicate_near": 6, "flat": 1}
    rows = decisions(two)
    assert {row["rule"] for row in rows if row["reason"] == "duplicate_near"} == {"earlier"}
    ids = {row["image_id"] for row in decisions(one)}
    assert {row["keeper_id"] for row in rows if row["rule"] == "earlier"} <= ids
    assert open_shards(str(two.path / "curated")).rows == 26  # the earlier ones and the new ones
    assert two.last("curate")["threshold"] == one.last("curate")["threshold"]
    # a third pile meets both
    three = curate(
        tmp_path, f"data.shards={tmp_path}/three", f"curate.against={two.path}", name="three"
    )
    assert [row["reason"] for row in decisions(three)] == ["duplicate_near"] * 2 + ["kept"]
    assert open_shards(str(three.path / "curated")).rows == 27


def test_adding_nothing_but_copies_leaves_the_earlier_images_as_they_are(tmp_path):
    hub(tmp_path / "one", [[encoded(blobs(i), "JPEG", quality=95) for i in range(6)]])
    copies = [encoded(blobs(i), "JPEG", quality=60) for i in range(3)]
    hub(tmp_path / "two", [[*copies, encoded(Image.new("RGB", (64, 64), "red"))]])
    one = curate(tmp_path, f"data.shards={tmp_path}/one", name="one")
    two = curate(tmp_path, f"data.shards={tmp_path}/two", f"curate.against={one.path}", name="two")
    assert [row["reason"] for row in decisions(two)] == ["duplicate_near"] * 3 + ["flat"]
    before, after = (
        pa.concat_tables(
            pq.read_table(f.path) for f in open_shards(str(run.path / "curated")).files
        )
        for run in (one, two)
    )
    assert after.equals(before) and after.num_rows == 6
    assert two.last("curate")["images"] == 6


def test_images_are_added_to_a_set_whose_own_were_not_compared(tmp_path, capsys):
    """Also where those were compared once, when there were more of them."""
    hub(tmp_path / "first", [[encoded(blobs(i)) for i in range(6)]])
    hub(tmp_path / "next", [[encoded(blobs(i)) for i in range(20, 26)]])
    hub(tmp_path / "more", [[encoded(blobs(i)) for i in range(29, 19, -1)]])
    hub(tmp_path / "last", [[encoded(blobs(i).resize((50, 50))) for i in (2, 20, 25, 29)]])
    a = curate(tmp_path, f"data.shards={tmp_path}/first", name="a")
    against = f"curate.against={a.path}"
    curate(tmp_path, f"data.shards={tmp_path}/more", against, name="b")
    off = [against, "dedup.enabled=false"]
    for name in ("b", "fresh"):
        b = curate(tmp_path, f"data.shards={tmp_path}/next", *off, name=name)
        given = [f"data.shards={tmp_path}/last", f"curate.against={b.path}"]
        c = curate(tmp_path, *given, name=f"c_{name}")
        rows = decisions(c)
        assert [row["rule"] for row in rows] == ["earlier"] * 3 + [""]
        ids = [decisions(a)[2], decisions(b)[0], decisions(b)[5]]
        assert [row["keeper_id"] for row in rows[:3]] == [row["image_id"] for row in ids]
        blobs(23).save(tmp_path / "photo.png")
        capsys.readouterr()
        curate(tmp_path, f"curate.query={tmp_path}/photo.png", name=name)
        assert f"is like {decisions(b)[3]['image_id']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "at"),
    [(["data.shards={}/other"], "/copies/pairs"), (["mix.pool=0.5"], "/curated")],
    ids=["copies", "decisions"],
)
def test_an_earlier_run_that_is_half_curated_anew_is_refused(
    tmp_path, capsys, monkeypatch, changed, at
):
    """Some of its tables are new, while its mark and its curated set are the old ones."""

    hub(tmp_path / "old", [[encoded(blobs(i)) for i in range(6)]])
    hub(tmp_path / "other", [[encoded(blobs(i)) for i in range(10, 14)]])
    old = f"data.shards={tmp_path}/old"
    one = curate(tmp_path, old, name="one")
    inner = tasks._run

    def killed(folder, *rest):
        if at in folder:
            raise Killed
        yield from inner(folder, *rest)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(tasks, "_run", killed)
        curate(tmp_path, old, *(text.format(tmp_path) for text in changed), name="one")
    capsys.readouterr()
    given = [f"data.shards={tmp_path}/other", f"curate.against={one.path}"]
    with pytest.raises(SystemExit):
        curate(tmp_path, *given, name="two")
    what, hint = said(capsys)
    assert "one was curated anew, and that did not finish" in what and "start that" in hint
    curate(tmp_path, old, name="one")  # as it was
    assert_balanced(one, 6)
    three = curate(tmp_path, *given, name="three")
    assert open_shards(str(three.path / "curated")).rows == 10


def test_images_are_added_with_the_threshold_that_is_there(tmp_path, capsys):
    hub(tmp_path / "old", [[encoded(blobs(i)) for i in range(6)]])
    hub(tmp_path / "new", [[encoded(blobs(i)) for i in range(5, 9)]])
    one = curate(tmp_path, f"data.shards={tmp_path}/old", name="one")
    new = [f"data.shards={tmp_path}/new", f"curate.against={one.path}"]
    with pytest.raises(SystemExit):
        curate(tmp_path, *new, "dedup.threshold=0.8", name="two")
    what, hint = said(capsys)
    assert "dedup.threshold=0.8, but" in what and "was curated with 0.9" in what
    assert "leave dedup.threshold out" in hint
    auto = ["dedup.threshold=auto", "dedup.false_positives=1e-9"]
    two = curate(tmp_path, *new, *auto, name="two")
    assert two.last("curate")["threshold"] == 0.9  # nothing is calibrated
    shown = capsys.readouterr().out
    assert "dedup.false_positives and dedup.calibration_images change nothing" in shown
    stored = one.path / "curate" / "steps" / "copies.json"
    form = stored.read_text()
    stored.write_text(form.replace('"probes"', '"looks"'))  # of another version
    with pytest.raises(SystemExit):
        curate(tmp_path, *new, name="early")
    assert "was curated by another version" in said(capsys)[0]
    assert not (tmp_path / "early" / "curate" / "steps").exists()  # before images are decoded
    stored.write_text(form)
    none = curate(tmp_path, f"data.shards={tmp_path}/old", "dedup.enabled=false", name="none")
    with pytest.raises(SystemExit):
        curate(tmp_path, new[0], f"curate.against={none.path}", name="three")
    what, hint = said(capsys)
    assert "was curated without comparing images (dedup.enabled=false" in what
    assert "dedup.enabled=true" in hint


def test_parts_as_proportions(tmp_path):
    pool = [encoded(blobs(i)) for i in range(80)]
    seeds = [encoded(blobs(i).resize((60, 60)).rotate(4)) for i in range(16)]
    hub(tmp_path / "hub", [pool])
    hub(tmp_path / "seeds", [seeds])
    given = [f"data.shards={tmp_path}/hub", f"retrieve.seeds.mine={tmp_path}/seeds", BY_COPIES]
    given += ["retrieve.mode=sample", "retrieve.neighbours=4"]
    plain = curate(tmp_path, *given, name="plain")
    before = Counter(row["part"] for row in decisions(plain) if row["kept"])
    run = curate(tmp_path, *given, "mix.by=proportion", "mix.as_is=2", name="mixed")
    counts = assert_balanced(run, 96)
    after = Counter(row["part"] for row in decisions(run) if row["kept"])
    assert after["as_is"] == before["as_is"] == 16 and before["sample"] > 20
    assert 2 <= after["sample"] <= 16  # half as many, as a draw gives it
    gone = [row["rule"] for row in decisions(run) if row["reason"] == "balanced_out"]
    assert gone == ["mix.sample"] * (before["sample"] - after["sample"])
    assert counts["balanced_out"] == len(gone)
    twice = curate(tmp_path, *given, "mix.by=proportion", "mix.as_is=4", name="less")
    ids = [{row["image_id"] for row in decisions(r) if row["kept"]} for r in (twice, run, plain)]
    assert ids[0] < ids[1] < ids[2]


def test_proportions_are_those_of_the_weights():
    every = {"pool": 1.0, "as_is": 3.0, "sample": 1.0, "cluster": 0.0, "balanced": 0.5}
    images = {"as_is": 60, "sample": 500, "cluster": 70, "balanced": 1000}
    found = proportions(every, images)
    kept = {part: found[part] * count for part, count in images.items()}
    assert kept == pytest.approx({"as_is": 60, "sample": 20, "cluster": 0, "balanced": 10})
    assert proportions(every, {}) == dict.fromkeys(every, 0.0)


def test_too_many_clusters_are_refused_before_anything_is_read(tmp_path, capsys, monkeypatch):
    hub(tmp_path / "hub", [[encoded(blobs(i)) for i in range(9)]])
    hub(tmp_path / "seeds", [[encoded(blobs(30))]])
    given = [f"data.shards={tmp_path}/hub", f"retrieve.seeds.mine={tmp_path}/seeds", BY_COPIES]
    monkeypatch.setattr(run_choose, "TASK_ELEMENTS", 143 * 7)
    for dry in ([], ["--dry-run"]):
        with pytest.raises(SystemExit):
            curate(tmp_path, *given, "retrieve.clusters=100000", *dry, name="many")
        what, hint = said(capsys)
        assert "retrieve.clusters: 9 clusters of vectors of 143 numbers" in what  # 9 images
        assert "do not fit into a task of 2 GB: 7 do" in what and "at most 7" in hint
    assert not (tmp_path / "many" / "curate" / "steps").exists()
    monkeypatch.setattr(run_choose, "TASK_ELEMENTS", 143 * 9)
    curate(tmp_path, *given, "retrieve.clusters=100000", name="fits")


def test_what_is_like_an_added_copy_only_stays(tmp_path, monkeypatch):
    """The second is like the first, which was curated before, and the third like the second."""
    same = Verdict(True, "", 0.0, (0.5, 0.5))
    monkeypatch.setattr(
        look_at_pairs, "second_look", lambda a, b: same
    )  # blends are no copies by it
    pictures = [blobs(4), Image.blend(blobs(4), blobs(5), 0.5), blobs(5)]
    hub(tmp_path / "one", [[encoded(pictures[0]), encoded(blobs(9))]])
    hub(tmp_path / "two", [[encoded(pictures[1]), encoded(pictures[2])]])
    hub(tmp_path / "all", [[encoded(picture) for picture in pictures]])
    low = "dedup.threshold=0.55"  # .73, .64, the ends .23
    whole = curate(tmp_path, f"data.shards={tmp_path}/all", low, "dedup.chains=keep", name="all")
    assert assert_balanced(whole, 3) == {"kept": 1, "duplicate_near": 2}  # a chain of three
    one = curate(tmp_path, f"data.shards={tmp_path}/one", low, name="one")
    two = [f"data.shards={tmp_path}/two", f"curate.against={one.path}", low]
    for chains in ("split", "keep"):
        found = decisions(curate(tmp_path, *two, f"dedup.chains={chains}", name=chains))
        assert [row["reason"] for row in found] == ["duplicate_near", "kept"]
        assert found[0]["rule"] == "earlier"
        assert found[0]["keeper_id"] == decisions(one)[0]["image_id"]
        assert found[0]["component"] == found[1]["component"]


def test_looking_up_one_image(tmp_path, capsys):
    hub(tmp_path / "hub", [[encoded(blobs(i)) for i in range(12)]])
    run = curate(tmp_path, f"data.shards={tmp_path}/hub")
    ImageOps.mirror(blobs(4)).resize((50, 50)).save(tmp_path / "photo.jpg")
    blobs(77).save(tmp_path / "other.png")
    capsys.readouterr()
    curate(tmp_path, f"curate.query={tmp_path}/photo.jpg")
    shown = capsys.readouterr().out
    assert f"is like {decisions(run)[4]['image_id']}" in shown and "kept" in shown
    assert ": alike, similarity" in shown and "is a copy" not in shown
    assert Image.open(run.path / "curate" / "query.png").width > 600
    curate(tmp_path, f"curate.query={tmp_path}/other.png")
    assert "other.png is like nothing in the set" in capsys.readouterr().out


MISTAKES = [
    (["curate.preset="], "nothing to curate: curate.preset is empty", "curate.preset=dedup"),
    (["data.shards="], "no images: neither data.shards nor data.source", "data.source="),
    (["leaks.sets.x=/not/there"], "leaks.sets.x=/not/there cannot be read as shards", "check"),
    (["retrieve.seeds.pool=hub"], "a seed set cannot be called pool", "another name"),
    (["retrieve.seeds.x=/not/there"], "retrieve.seeds.x=/not/there cannot be read", "check"),
    (["curate.copy_embedder=/no/model.onnx"], "curate.copy_embedder=/no/model.onnx", ".onnx"),
    (["balance.images=9"], "curate.embedder names no network", "none is at hand"),
    (["curate.against=/no/run"], "/no/run holds no finished curation", "run folder"),
    (["curate.query=/no/photo.jpg"], "curate.query=/no/photo.jpg: there is no such file", ""),
    (["evaluate.queries=/no/set"], "evaluate.queries=/no/set cannot be read", "jobs/pack.py"),
]


@pytest.mark.parametrize(("arguments", "what", "hint"), MISTAKES, ids=lambda x: str(x)[:40])
def test_mistakes_are_one_sentence(tmp_path, capsys, arguments, what, hint):
    hub(tmp_path / "hub", [[encoded(blobs(i)) for i in range(2)]])
    given = [f"run.folder={tmp_path}", "run.name=r", f"data.shards={tmp_path}/hub"]
    with pytest.raises(SystemExit) as ended:
        job.main(["curate"], "doc", [*given, "curate.preset=dedup", *arguments])
    assert ended.value.code == 2
    lines = said(capsys)
    assert len(lines) <= 2 and what in lines[0]
    assert hint in lines[-1]


def test_what_goes_by_meaning_asks_for_a_network(tmp_path, capsys):
    hub(tmp_path / "hub", [[encoded(blobs(i)) for i in range(20)]])
    (tmp_path / "photos" / "checkpoints" / "step-00000005").mkdir(parents=True)
    given = [f"data.shards={tmp_path}/hub", "balance.images=9", "balance.resampling=1"]
    for dry in ([], ["--dry-run"]):
        with pytest.raises(SystemExit):
            curate(tmp_path, *given, *dry)
        what, hint = said(capsys)
        assert "go by what an image shows, and curate.embedder names no network" in what
        assert f"at hand are {tmp_path}/photos), or to descriptor" in hint
    capsys.readouterr()
    curate(tmp_path, *given, BY_COPIES)
    assert "curate.embedder=descriptor tells copies" in "".join(capsys.readouterr())


def test_training_reads_what_is_kept(tmp_path, capsys):
    from pipeline.config.load import load
    from pipeline.context import Context

    images = wild()
    hub(tmp_path / "hub", [images])
    run = curate(tmp_path, f"data.shards={tmp_path}/hub")
    given = [f"run.folder={tmp_path}", "run.name=r", f"data.shards={tmp_path}/hub"]
    context = Context(load([*given, "curate.preset=dedup"]), run)
    assert context.shards().rows == 30
    assert context.shards().digest == run.last("curate")["digest"]
    assert Context(load(given), run).shards().rows == len(images)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        job.main(["pretrain"], "doc", [*given[:1], "run.name=new", given[2], "curate.preset=dedup",
                                       "optim.steps=1"])  # fmt: skip
    assert "the images are not curated yet" in said(capsys)[0]


def test_a_dry_run_counts_rules_and_writes_nothing(tmp_path, capsys):
    images = wild()
    hub(tmp_path / "hub", [images])
    place = [f"run.folder={tmp_path}/runs", f"data.shards={tmp_path}/hub", "curate.preset=dedup"]
    logging.getLogger("pipeline").handlers.clear()
    job.main(["curate"], "doc", [*place, "--dry-run"])
    shown = capsys.readouterr().out
    assert f"of a sample of {len(images)} of {len(images)} images" in shown
    assert "min_side" in shown and "fingerprint" in shown
    assert f"calibrated: all pairs of {len(images)} images, 1e-06 of them" in shown
    assert not (tmp_path / "runs").exists()


def test_presets_warn_about_vectors_that_they_are_not_for(tmp_path, capsys):
    hub(tmp_path / "hub", [[encoded(blobs(i)) for i in range(30)]])
    hub(tmp_path / "seeds", [[encoded(blobs(200 + i)) for i in range(5)]])
    given = [f"run.folder={tmp_path}", "run.name=r", "track.enabled=false"]
    given += ["curate.preset=lvd142m", f"retrieve.seeds.mine={tmp_path}/seeds", BY_COPIES]
    given += ["retrieve.clusters=3", "quality.min_sharpness=1", f"data.shards={tmp_path}/hub"]
    job.main(["curate"], "doc", given)
    shown = capsys.readouterr().out
    assert "those of SSCD vectors" in shown and "calibrated instead" in shown
    assert "need a trained network" in shown
    assert_balanced(RunFolder.of(str(tmp_path), "r"), 35)


def test_the_demo_loses_what_was_planted(tmp_path, monkeypatch):
    from pipeline.pack.demo.tiles import make_demo

    report = make_demo(tmp_path / "photos")
    for name in ("train", "test"):
        packed(tmp_path / "photos" / name, tmp_path / name)
    shards, test = (open_shards(str(tmp_path / name / "shards")) for name in ("train", "test"))
    given = ["configs/demo.yaml", f"run.folder={tmp_path}", "track.enabled=false"]
    given += [f"data.shards={shards.uri}", "data.source=", f"evaluate.queries={test.uri}"]
    root = Path(__file__).parents[2]
    given[0] = str(root / given[0])
    job.main(["curate"], "doc", given)
    run = RunFolder.of(str(tmp_path), "demo")
    assert_balanced(run, shards.rows)
    sources = pq.read_table(run.path / "curate/steps/fingerprint/00000.parquet")[
        "source"
    ].to_pylist()
    gone: Counter = Counter()
    for row, source in zip(decisions(run), sources, strict=True):
        kind = source.split("/")[1].split("_")[0]
        if not row["kept"]:
            gone[kind, row["reason"]] += 1
    assert gone["flat", "flat"] == report.flat == 24
    assert gone["near", "duplicate_near"] + gone["tile", "duplicate_near"] == report.near_duplicates
    assert gone["leak", "leaks_evaluation"] == report.leaks == 12
    assert sum(gone.values()) == 24 + 60 + 12  # nothing else: no pair that an eye would doubt
    page = (run.path / "curate" / "report.html").read_text()
    assert "almost nothing to see" in page and "copy of another image" in page
    assert json.loads((run.path / "curate" / "_done.json").read_text())["result"]["images"] > 3400


def files_of(run: RunFolder, *parts: str) -> dict[str, bytes]:
    root = run.path.joinpath(*parts)
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.parquet"))}


class Killed(BaseException):
    """Ends a run as nothing else does."""


def test_a_run_that_is_killed_again_and_again_goes_on_where_it_was(tmp_path, monkeypatch):
    """Killed after every fifth task: no task is run twice, and the result has the same bytes."""

    images = wild()
    hub(tmp_path / "hub", [images[:15], images[15:40], images[40:]])
    hub(tmp_path / "test", [[encoded(blobs(3))]])
    hub(tmp_path / "seeds", [[encoded(blobs(i).rotate(5)) for i in range(6)]])
    sets = [f"data.shards={tmp_path}/hub", f"leaks.sets.test={tmp_path}/test"]
    sets += ["leaks.scope=components", f"retrieve.seeds.mine={tmp_path}/seeds", BY_COPIES]
    sets += ["retrieve.mode=sample", "balance.images=9", "balance.resampling=1"]
    sets += ["data.shard_mb=0.01"]
    inner, ran = tasks._run, []

    def counted(folder, tasks, *rest):
        for name, account in inner(folder, tasks, *rest):
            ran.append((folder, name))
            yield name, account

    monkeypatch.setattr(tasks, "_run", counted)
    whole = curate(tmp_path, *sets, name="whole")
    assert_balanced(whole, len(images) + 6)
    clean, starts = len(ran), 0
    assert clean > 60
    ran.clear()

    def killed(folder, tasks, *rest):
        for name, account in counted(folder, tasks, *rest):
            if len(ran) % 5 == 0:
                raise Killed  # the account is written, the driver has not seen it
            yield name, account

    monkeypatch.setattr(tasks, "_run", killed)
    run = None
    while run is None:
        starts += 1
        try:
            run = curate(tmp_path, *sets, name="killed")
        except Killed:
            assert starts < clean
    assert starts > clean / 6
    assert len(ran) == len(set(ran)) == clean
    decided = ("curate", "steps", "decisions")
    assert files_of(run, *decided) == files_of(whole, *decided)
    assert files_of(run, "curated") == files_of(whole, "curated")


@pytest.mark.slow
def test_a_run_folder_in_a_bucket(tmp_path, s3, monkeypatch, capsys):
    s3.make("pile")
    images = wild()
    local = hub(tmp_path / "hub", [images[:20], images[20:]])
    for file in local.files:
        s3.client().upload_file(file.path, "pile", f"hub/{file.name}")
    monkeypatch.setenv("RAYDINO_HOME", str(tmp_path / "home"))
    given = ["run.folder=s3://pile/runs", "run.name=r", "track.enabled=false"]
    given += ["curate.preset=dedup", *FIXED, "data.shards=s3://pile/hub"]
    with s3.broken(r"^PUT /pile/runs/r/curate/steps", 503, skip=4, times=2) as faults:
        job.main(["curate"], "doc", given)
    assert faults.done == 2
    found = s3.objects("pile", "runs/r/")
    assert {"runs/r/curate/report.html", "runs/r/curate/_done.json"} <= found.keys()
    assert "runs/r/curated/_manifest.json" in found
    here = curate(tmp_path, f"data.shards={tmp_path}/hub", name="here")
    mine = files_of(here, "curate", "steps", "decisions")
    for name, content in mine.items():
        assert s3.read("pile", f"runs/r/curate/steps/decisions/{name}") == content
    assert open_shards("s3://pile/runs/r/curated").digest == here.last("curate")["digest"]
    # another machine has only the bucket
    monkeypatch.setenv("RAYDINO_HOME", str(tmp_path / "other"))
    capsys.readouterr()
    job.main(["curate"], "doc", given)
    assert "curate      up to date" in capsys.readouterr().out
    assert not list((tmp_path / "other").rglob("fingerprint"))  # tables stay where they are
    blobs(2).save(tmp_path / "photo.png")
    job.main(["curate"], "doc", [*given, f"curate.query={tmp_path}/photo.png"])
    assert "photo.png is like" in capsys.readouterr().out


def test_what_differs_in_one_place_stays_and_is_told(tmp_path):
    """One street with other number plates: in the pile, an evaluation set, and what is added."""
    plates = list(KINDS["plates"](np.random.default_rng(3), 14))
    small = [image.resize((240, 180), Image.Resampling.BICUBIC) for image in plates]
    hub(
        tmp_path / "hub",
        [[encoded(x) for x in plates[:10]] + [encoded(x, "JPEG") for x in small[:3]]],
    )
    hub(tmp_path / "test", [[encoded(small[4], "JPEG")]])
    given = [f"data.shards={tmp_path}/hub", f"leaks.sets.test={tmp_path}/test"]
    run = curate(tmp_path, *given)
    found = decisions(run)
    counts = assert_balanced(run, 13)
    assert counts == Counter(kept=9, duplicate_near=3, leaks_evaluation=1)
    assert [row["reason"] for row in found[10:]] == ["duplicate_near"] * 3
    assert [row["keeper_id"] for row in found[10:]] == [row["image_id"] for row in found[:3]]
    assert found[4]["reason"] == "leaks_evaluation" and found[4]["rule"] == "test"
    looked = run.last("curate")["looks"]
    edges = looked["looks/edges"]
    assert edges["pairs"] == 12 and edges["same"] == 3 and edges["differ"] == 9
    assert looked["looks/leaks"]["same"] >= 1 and looked["looks/leaks"]["differ"] >= 9
    report = (run.path / "curate" / "report.html").read_text()
    assert "Looked alike, kept" in report and "9 differ somewhere" in report

    hub(tmp_path / "more", [[encoded(x) for x in plates[11:]] + [encoded(small[1], "JPEG")]])
    more = [f"data.shards={tmp_path}/more", f"curate.against={run.path}"]
    added = decisions(curate(tmp_path, *more, name="more"))
    assert [row["reason"] for row in added] == ["kept"] * 3 + ["duplicate_near"]
    assert added[3]["rule"] == "earlier" and added[3]["keeper_id"] == found[1]["image_id"]


@pytest.mark.slow
def test_an_emptied_step_leaves_nothing_of_ours(tmp_path):
    """All steps of curations that use every part, of sets whose names hold dots and blanks."""
    images = [blobs(i) for i in range(40)]
    pool = [encoded(image, "JPEG", quality=95) for image in images]
    pool += [encoded(images[i].resize((48, 48)), "JPEG", quality=80) for i in range(5)]
    hub(tmp_path / "hub", [pool[:25], pool[25:]])
    hub(tmp_path / "test", [[encoded(images[i].resize((50, 50))) for i in (0, 30)]])
    hub(tmp_path / "seeds", [[encoded(images[i].rotate(4)) for i in range(8, 12)]])
    recipe = tmp_path / "all.yaml"
    recipe.write_text(
        f"leaks: {{sets: {{'v2. photos': {tmp_path}/test}}, scope: components}}\n"
        f"retrieve: {{seeds: {{'i.1k': {tmp_path}/seeds}}}}\n"
        f"data: {{shards: {tmp_path}/hub}}\ndedup: {{threshold: auto}}\n"
    )
    emptied = 0
    for given in (
        [
            "retrieve.mode=sample",
            "retrieve.neighbours=3",
            "balance.images=10",
            BY_COPIES,
            "balance.levels=[6,3]",
        ],
        ["retrieve.mode=cluster", "retrieve.clusters=4", "retrieve.cluster_seeds=1", BY_COPIES],
    ):
        run = curate(tmp_path, str(recipe), *given, "dedup.threshold=auto", name=given[0][-6:])
        root = run.path / "curate" / "steps"
        folders = [path.parent for path in root.rglob("_key.json")]
        files = [path for path in root.rglob("*") if path.is_file()]
        for folder in folders:
            inner = [other for other in folders if other != folder and folder in other.parents]
            own = {
                path
                for path in files
                if folder in path.parents and not any(other in path.parents for other in inner)
            }
            tables = {Path(name) for name in tasks.step_files(str(folder))}
            assert tables <= own, (folder, tables - own)
            tasks.empty_step(str(folder), [str(path) for path in tables])
            left = {path for path in own if path.exists()}
            assert not left, (folder, left)
            emptied += 1
    assert emptied > 60
