"""A dry run refuses what the run refuses, and says what the machine is too small for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import job
from pipeline.config.config import Config
from pipeline.config.load import load
from pipeline.context import labels_of
from pipeline.errors import PipelineError
from pipeline.shards.columns import IMAGE_SHARD_SCHEMA, MANIFEST, METADATA_KEY, SCHEMA_VERSION
from pipeline.stages import chain
from pipeline.stages.chain import ORDER
from pipeline.stages.checks.start import check_start

NOWHERE = "/there/is/nothing"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pile/` of two classes, `plain/` without any, `numbers/` of a hub, and a file."""
    folder = tmp_path_factory.mktemp("sets")
    for i in range(40):
        for place in (folder / "pile" / f"k{i % 2}", folder / "plain"):
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((16, 16, 3), 5 * i, np.uint8)).save(place / f"{i}.png")
    (folder / "numbers").mkdir()
    table = pa.table({"image": [b"x"] * 40, "label": [i % 2 for i in range(40)]})
    pq.write_table(table, folder / "numbers" / "a.parquet")
    (folder / "file").write_text("x")
    (folder / "others").mkdir()
    (folder / "others" / MANIFEST).write_text('{"source": "/another/source", "files": []}')
    source = "curated from /another/source"
    (folder / "curated").mkdir()
    (folder / "curated" / MANIFEST).write_text(json.dumps({"source": source, "files": []}))
    (folder / "claimed").mkdir()
    claim = {"source": source, "work": "/another/run", "machine": "other", "process": "process 1"}
    (folder / "claimed" / f".claim-{'0' * 16}.json").write_text(json.dumps(claim))
    (folder / "parts").mkdir()
    ours = {METADATA_KEY: json.dumps({"schema_version": SCHEMA_VERSION})}
    shard = IMAGE_SHARD_SCHEMA.with_metadata(ours).empty_table()
    pq.write_table(shard, folder / "parts" / "part-00000.parquet")
    return folder


def cases(sets: Path) -> dict[str, tuple[list[str], str, list[str]]]:
    """By name: stages, what the sentence must name, the arguments."""
    pile = f"data.source={sets}/pile"
    every = list(ORDER)
    curating = [pile, "curate.preset=dedup"]
    return {
        "queries": (every, "evaluate.queries", [pile, f"evaluate.queries={NOWHERE}"]),
        "queries of pack": (["pack"], "evaluate.queries", [pile, f"evaluate.queries={NOWHERE}"]),
        "reference": (
            every,
            "evaluate.reference",
            [pile, f"evaluate.queries={sets}/pile", f"evaluate.reference={NOWHERE}"],
        ),
        "source": (every, "data.source", [f"data.source={NOWHERE}"]),
        "pattern": (every, "data.source", [f"data.source={NOWHERE}/*.png"]),
        "shards": (["pretrain"], "data.shards", [f"data.shards={NOWHERE}"]),
        "shards of the doctor": (["doctor"], "data.shards", [f"data.shards={NOWHERE}"]),
        "seeds": (every, "retrieve.seeds.x", [*curating, f"retrieve.seeds.x={NOWHERE}"]),
        "leaks": (every, "leaks.sets.x", [*curating, f"leaks.sets.x={NOWHERE}"]),
        "embedder": (every, "curate.copy_embedder", [*curating, f"curate.copy_embedder={NOWHERE}"]),
        "earlier": (every, NOWHERE, [*curating, f"curate.against={NOWHERE}"]),
        "weights": (every, NOWHERE, [pile, f"model.init={NOWHERE}.pth"]),
        "run folder": (every, "run.folder", [pile, "run.folder=/proc/none"]),
        "run folder, file": (every, "run.folder", [pile, f"run.folder={sets}/file/runs"]),
        "shards, file": (every, "data.shards", [pile, f"data.shards={sets}/file"]),
        "shards in source": (every, "data.shards", [pile, f"data.shards={sets}/pile/x"]),
        "shards of others": (
            every,
            "holds the shards of /another/source",
            [pile, f"data.shards={sets}/others"],
        ),
        "curated, others": (
            every,
            "holds something that no curation wrote",
            [*curating, f"curate.shards={sets}/others"],
        ),
        "curated, text": (
            every,
            "holds something that no curation wrote",
            [*curating, f"curate.shards={sets}/plain"],
        ),
        "curated, other sets": (
            every,
            "holds the shards of curated from /another/source",
            [*curating, f"curate.shards={sets}/curated"],
        ),
        "curated, claimed": (
            every,
            "belongs to shards of curated from /another/source that are not finished",
            [*curating, f"curate.shards={sets}/claimed"],
        ),
        "shards without manifest": (
            every,
            "part-00000.parquet, and no manifest says whose shard that is",
            [pile, f"data.shards={sets}/parts"],
        ),
        "curated, file": (every, "curate.shards", [*curating, f"curate.shards={sets}/file"]),
        "address": (every, "track.uri", [pile, "track.enabled=true", "track.uri=ftp://host/x"]),
        "no labels": (every, "evaluate.queries", [pile, f"evaluate.queries={sets}/plain"]),
        "no votes": (
            every,
            "evaluate.reference",
            [f"data.source={sets}/plain", f"evaluate.queries={sets}/pile"],
        ),
        "names, numbers": (every, "names", [pile, f"evaluate.queries={sets}/numbers"]),
        "not packed": (["curate"], "jobs/pack.py", [*curating]),
        "not curated": (
            ["pretrain"],
            "jobs/curate.py",
            [f"data.shards={sets}/numbers", "curate.preset=dedup"],
        ),
        "nothing to curate": (["curate"], "curate.preset", [f"data.shards={sets}/numbers"]),
        "no checkpoint": (["evaluate"], "pretrain first", [f"data.shards={sets}/numbers"]),
        "nothing to export": (["export"], "pretrain first", []),
    }


def test_a_dry_run_refuses_what_the_run_refuses(
    sets: Path,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def reached(config: Config, *_: object) -> None:
        raise AssertionError("the job started")

    monkeypatch.setattr(chain, "write_config", reached)
    wrong = []
    for name, (stages, named, arguments) in cases(sets).items():
        given = [str(recipe), "run.name=dry", "track.enabled=false", f"run.folder={tmp_path}/runs"]
        given += arguments
        for flags in (["--dry-run"], []):
            if not flags and name in ("weights", "shards of the doctor"):
                continue  # said when training begins; the doctor is a check itself
            try:
                job.main(stages, "doc", [*given, *flags])
                wrong.append(f"{name} {flags}: accepted")
            except SystemExit as ended:
                said = capsys.readouterr().err
                if ended.code != 2 or named not in said or "Traceback" in said:
                    wrong.append(f"{name} {flags}: {said}")
            except AssertionError as error:
                wrong.append(f"{name} {flags}: {error}")
    assert not wrong, "\n".join(wrong)
    left = [p for p in tmp_path.rglob("*") if p.name not in ("runs", "dry", ".job.lock")]
    assert not left


def test_a_sound_recipe_passes_and_leaves_nothing(
    sets: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(recipe), f"data.source={sets}/pile", f"evaluate.queries={sets}/pile"]
    given += [f"run.folder={tmp_path}/runs", "optim.global_batch_size=8", "train.workers=1"]
    job.main(list(ORDER), "doc", [*given, "--dry-run"])
    shown = capsys.readouterr().out
    lines = {line.split()[0]: line for line in shown.splitlines()}
    assert "about 40 images" in lines["pack"]
    assert "(not packed yet)" in lines["data"]  # whole
    assert "GiB free" in lines["disk"] and "run.folder" in lines["disk"]
    assert "on this machine" in lines["time"]
    assert not list(tmp_path.iterdir())


def test_a_recipe_of_the_project_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(["configs/demo.yaml"]).run.name == "demo"
    with pytest.raises(PipelineError) as error:
        load(["configs/dem.yaml"])
    assert str(Path(job.__file__).parents[1] / "configs" / "demo.yaml") in error.value.hint
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text("run: {name: mine}\n")
    assert load(["configs/demo.yaml"]).run.name == "mine"  # one that is here comes first


def test_queries_that_are_in_the_training_folder_too_are_counted_before_the_pack(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two classes, whose part `val` is asked; of a second folder two of four images are copies."""
    rng = np.random.default_rng(0)
    for i in range(24):
        place = tmp_path / "pile" / ("val" if i % 4 == 0 else "train") / f"k{i % 2 + i // 12}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(place / f"{i}.png")
    (tmp_path / "pile" / "val" / "readme.txt").write_text("x")
    (tmp_path / "pile" / "readme.txt").write_text("x")
    images = sorted((tmp_path / "pile").rglob("*.png"))
    for i in range(4):
        place = tmp_path / "other" / images[i].parent.name
        place.mkdir(parents=True, exist_ok=True)
        changed = b"" if i < 2 else b"."
        (place / f"copy{i}.png").write_bytes(images[i].read_bytes() + changed)
    for i in (2, 3):
        place = tmp_path / "new" / images[i].parent.name
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(images[i].read_bytes() + b".")
    for folder, said in (
        ("pile/val", "6 of 6 queries are also in data.source="),
        ("other", "2 of 4 queries are also in data.source="),
        ("new", "no query is also in data.source="),
    ):
        given = [str(recipe), f"data.source={tmp_path}/pile", f"run.folder={tmp_path}/runs"]
        given += [f"evaluate.queries={tmp_path}/{folder}", "optim.global_batch_size=8"]
        job.main(list(ORDER), "doc", [*given, "train.workers=1", "--dry-run"])
        shown = capsys.readouterr()
        assert said in shown.out + shown.err, (folder, shown)


def test_what_is_evaluated_without_queries_is_said(
    sets: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = [str(recipe), f"run.folder={tmp_path}/runs", "optim.global_batch_size=8"]
    place += ["train.workers=1", "--dry-run"]
    for folder, said in (
        ("pile", f"k-NN: each image of data.source={sets}/pile by the others"),
        ("plain", f"data.source={sets}/plain has no labels: health and rank_me"),
    ):
        job.main(list(ORDER), "doc", [*place, f"data.source={sets}/{folder}"])
        shown = capsys.readouterr().out
        assert said in shown, shown
    with pytest.raises(SystemExit):
        fields = [f"data.source={sets}/plain", "evaluate.decide_by=knn10_top1"]
        job.main(list(ORDER), "doc", [*place, *fields])
    assert "evaluate.decide_by=knn10_top1 needs labels, but data.source=" in capsys.readouterr().err


def test_evaluation_sets_keep_their_labels_with_data_labels_none(
    sets: Path, recipe: Path, tmp_path: Path
) -> None:
    def known(*arguments: str) -> dict[str, str]:
        given = [str(recipe), f"data.source={sets}/pile", "data.labels=none", "run.name=none"]
        config = load([*given, "track.enabled=false", f"run.folder={tmp_path}", *arguments])
        found = check_start(config, ["pack", "pretrain"])
        return {field: one.labels.kind for field, one in found.items()}

    kinds = {"data.source": "none", "evaluate.queries": "names", "evaluate.reference": "names"}
    both = [f"evaluate.queries={sets}/pile", f"evaluate.reference={sets}/pile"]
    assert known(*both) == kinds
    numbers = [f"evaluate.queries={sets}/numbers", f"evaluate.reference={sets}/numbers"]
    assert set(known(*numbers).values()) == {"none", "numbers"}
    with pytest.raises(PipelineError, match=r"data\.source=.* has no labels to vote with"):
        known(both[0])
    config = load(["data.labels=none"])
    fields = ("data.source", "evaluate.queries", "evaluate.reference")
    assert [labels_of(config, field) for field in fields] == ["none", "auto", "auto"]
    assert labels_of(load(["data.labels=folder"]), "evaluate.queries") == "folder"
