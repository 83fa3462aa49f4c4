"""What the report counts, against loops over the made-up rows."""

from __future__ import annotations

import importlib.machinery
import io
import math
import shutil
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from sklearn.decomposition import PCA

from pipeline.curate.look.look_at_pairs import VERDICTS
from pipeline.curate.report.copies import read_looks
from pipeline.curate.report.map import principal
from pipeline.curate.report.read import Samples, TableFiles, draws, ids, value_draws
from pipeline.curate.report.summary import Facts, Summary, summarise
from pipeline.curate.rows import tables
from pipeline.errors import DataError
from tests.curate.conftest import summarised
from tests.curate.made_up import GUARD, THRESHOLD, Run, _chained, write_run


def test_every_image_is_counted_by_source_and_reason(run: Run, summary: Summary) -> None:
    expected = Counter((row.source, row.reason) for row in run.rows)
    counts = {(s, r): n for s, of in summary.counts.by_source.items() for r, n in of.items()}
    assert counts == expected and summary.rows == len(run.rows) == 2000
    assert summary.counts.problems == ()
    rules = Counter((row.reason, row.rule) for row in run.rows)
    assert summary.counts.by_rule == rules
    assert summary.counts.parts == {"balanced": run.reasons()["kept"]}


def test_the_funnel_ends_with_what_is_kept(run: Run, summary: Summary) -> None:
    left = len(run.rows)
    for stage in summary.stages:
        left -= sum(stage.removed.values())
        assert stage.left == left
    assert left == summary.kept == run.reasons()["kept"]
    assert len(summary.stages) == 7


def test_samples_are_the_smallest_draws_of_each_reason(run: Run, summary: Summary) -> None:
    for (reason, rule), rows in summary.counts.samples.items():
        mine = [i for i, r in enumerate(run.rows) if (r.reason, r.rule) == (reason, rule)]
        names = np.frombuffer(b"".join(run.rows[i].image_id for i in mine), np.uint8)
        order = sorted(zip(draws(names.reshape(-1, 16), 0), mine, strict=True))
        assert rows == [i for _, i in order[:24]]
    assert ("kept", "") not in summary.counts.samples


def test_pairs_fall_into_the_band_and_bar_of_their_similarity(run: Run, summary: Summary) -> None:
    edges, values = summary.edges, [s for _, _, s in run.edges]
    assert edges is not None and edges.count == len(values) and edges.above > 50
    assert edges.above == sum(s > THRESHOLD for s in values)
    for band in edges.bands:
        assert band.count == sum(band.low < s <= band.high for s in values)
        assert band.copies == (band.low >= THRESHOLD)
        known = {(a, b): s for a, b, s in run.edges}
        assert band.pairs and len(band.pairs) == min(6, band.count)
        for pair in band.pairs:
            assert known[pair.a, pair.b] == pair.similarity
            assert band.low < pair.similarity <= band.high
    for low, high, count in zip(edges.bins, edges.bins[1:], edges.counts, strict=False):
        assert count == sum(low < min(s, 1) <= high for s in values)
    assert any(abs(low - THRESHOLD) < 1e-9 for low in edges.bins)


def test_components_have_their_sizes_keepers_and_chains(run: Run, summary: Summary) -> None:
    parts, rows = summary.components, run.rows
    assert parts is not None
    sizes = Counter(len(members) for members in run.components.values())
    assert parts.sizes == sizes and parts.count == len(run.components)
    assert parts.rows == sum(map(len, run.components.values()))
    assert parts.chained == len(_chained(run)) > 5
    assert [c.size for c in parts.largest] == sorted(sizes.elements(), reverse=True)[:6]
    assert len(parts.random) == 6 and parts.chains
    for one in (*parts.largest, *parts.random, *parts.chains):
        members = run.components[bytes.fromhex(one.name)]
        assert one.size == len(members) and len({m.row for m in one.members}) == len(one.members)
        assert one.members[0].keeper and not one.members[0].chained
        for member in one.members:
            assert member.row in members and member.of == rows[member.row].keeper
            assert member.chained == (member.row in _chained(run))
            if not member.keeper:
                assert member.similarity >= THRESHOLD - GUARD
    for one in parts.chains:
        assert any(member.chained for member in one.members)


def test_leaks_count_rows_and_images_of_the_set(run: Run, summary: Summary) -> None:
    cats, clean = summary.leaks
    leaking = [row for row in run.rows if row.reason == "leaks_evaluation"]
    assert (cats.name, cats.rows, cats.images) == ("cats", len(leaking), 60)
    assert cats.leaked == run.leaked["cats"] >= len({row.query for row in leaking})
    assert sum(cats.counts) == cats.rows and len(leaking) > 16
    best = sorted((row.similarity for row in leaking), reverse=True)
    assert [match.similarity for match in cats.top] == best[:8]
    assert [match.similarity for match in cats.low] == sorted(best)[:8]
    assert (clean.name, clean.rows, clean.leaked, clean.images) == ("clean", 0, 0, 0)
    for match in (*cats.top, *cats.low):
        image = next(row for row in run.evaluation if row.image_id == match.query)
        assert cats.pictures[match.query].thumbnail == image.thumbnail


def test_an_image_that_is_the_best_match_of_no_row_leaks_all_the_same(run: Run) -> None:
    cats, clean = summarised(run, leaked={"cats": 40, "clean": 2}).leaks
    assert (cats.leaked, clean.leaked, clean.rows) == (40, 2, 0)
    with pytest.raises(AssertionError, match="rows match cats"):
        summarised(run, leaked={"clean": 2})


def test_retrieval_counts_requests_rows_and_collisions(run: Run, summary: Summary) -> None:
    (seeds,) = summary.retrieved
    hits = [row.hits for row in run.rows if row.hits]
    assert (seeds.asked, seeds.rows) == (sum(hits), len(hits)) == (30 * 12, len(hits))
    assert seeds.collisions == sum(n - 1 for n in hits) > 0 and seeds.images == 30
    assert len(seeds.seeds) == 8
    for matches in seeds.seeds:
        query = matches[0].query
        mine = [row.similarity for row in run.rows if row.hits and row.query == query]
        assert [m.similarity for m in matches] == sorted(mine, reverse=True)[:8]


def test_clusters_before_and_after(run: Run, summary: Summary) -> None:
    parts = summary.clusters
    assert parts is not None
    weighed = [row for row in run.rows if row.leaf >= 0]
    for level, number in ((parts.leaves, "leaf"), (parts.tops, "label")):
        before = Counter(getattr(row, number) for row in weighed)
        after = Counter(getattr(row, number) for row in weighed if row.reason == "kept")
        assert level.before.tolist() == sorted(before.values(), reverse=True)
        assert level.after.tolist() == sorted(after.values(), reverse=True)
        assert level.unsampled == len(set(before) - set(after))
        shares = [n / len(weighed) for n in before.values()]
        entropy = -sum(s * math.log(s) for s in shares)
        assert level.effective_before == pytest.approx(math.exp(entropy))
    assert parts.leaves.unsampled > 0
    assert (parts.considered, parts.chosen) == (len(weighed), summary.kept)
    for sheet in parts.sheets:
        for row, chosen in sheet.rows:
            assert run.rows[row].label == sheet.cluster
            assert chosen == (run.rows[row].reason == "kept")


def test_the_map_is_a_pca_of_the_descriptors(run: Run, summary: Summary) -> None:
    assert summary.map is not None and summary.map.method in ("PCA", "UMAP")
    rows = [i for i, row in enumerate(run.rows) if row.vector.any()]
    assert sorted(summary.map.rows) == rows
    assert list(summary.map.reasons) == [run.rows[i].reason for i in summary.map.rows]
    assert summary.map.places.min() >= 0 and summary.map.places.max() <= 1
    points = np.stack([run.rows[i].vector for i in rows]).astype(np.float64)
    ours, share = principal(points)
    fitted = PCA(2, svd_solver="full").fit(points)
    assert np.allclose(np.abs(ours), np.abs(fitted.transform(points)), atol=1e-9)
    assert share == pytest.approx(fitted.explained_variance_ratio_.sum())


def test_umap_lays_out_the_map_where_it_is_installed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fake:
        def __init__(self, **options: object) -> None:
            assert options["random_state"] == 0 and options["metric"] == "cosine"

        def fit_transform(self, points: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
            return points[:, :2]

    module = types.ModuleType("umap")
    module.__spec__ = importlib.machinery.ModuleSpec("umap", None)
    module.UMAP = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "umap", module)
    layout = summarise(run.root, Facts(leaked=run.leaked)).map
    assert layout is not None and (layout.method, layout.explained) == ("UMAP", 0.0)


def test_what_is_shown_has_its_picture_and_its_decision(run: Run, summary: Summary) -> None:
    assert len(summary.shown) < 800
    for row, one in summary.shown.items():
        truth = run.rows[row]
        assert one.image_id == truth.image_id.hex() and one.reason == truth.reason
        assert (one.thumbnail, one.width, one.error) == (truth.thumbnail, truth.width, truth.error)
    for row, keeper in summary.keepers.items():
        assert run.rows[row].keeper == keeper != row


@pytest.mark.long
def test_another_order_of_files_shows_the_same_images(run: Run, tmp_path: Path) -> None:
    """Samples go by image id and by exact similarity, so neither files nor rows matter."""
    other = write_run(tmp_path, files=3)
    again, before = summarised(other), summarised(run)
    assert again.counts.samples == before.counts.samples
    assert again.edges == before.edges and again.components == before.components
    assert again.clusters is not None and before.clusters is not None
    assert again.clusters.sheets == before.clusters.sheets
    assert summarised(run, seed=1).counts.samples != before.counts.samples


def test_what_does_not_add_up_is_said(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(run.root, root)
    table = tables.read_table(str(root / "decisions"), "00001")
    broken = table.slice(0, len(table) - 3)
    wrong = pa.array([not kept for kept in broken["kept"].to_pylist()[:1]], pa.bool_())
    kept = pa.chunked_array([wrong, broken["kept"].combine_chunks()[1:]])
    broken = broken.set_column(table.schema.get_field_index("kept"), "kept", kept)
    tables.write_table(broken, str(root / "decisions"), "00001")
    problems = summarise(root, Facts(leaked=run.leaked)).counts.problems
    assert any("gaps" in said for said in problems)
    assert "1 decisions say kept with a reason, or the other way round" in problems
    assert "2,000 images went in, but there are 1,997 decisions" in problems
    assert "1,996 images went in" in str(
        summarise(root, Facts(rows_in=1996, leaked=run.leaked)).counts.problems
    )


def test_no_decisions_and_damaged_tables_are_errors(run: Run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no decisions below"):
        summarise(tmp_path)
    with pytest.raises(DataError, match="no table is called wrong"):
        summarise(run.root, folders={"wrong": "x"})
    shutil.copytree(run.root, tmp_path / "run")
    file = tmp_path / "run" / "edges" / "00002.parquet"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"edges/00002\.parquet"):
        summarised(Run(tmp_path / "run", run.rows, [], []))


def test_only_named_tables_are_read(run: Run) -> None:
    folders = {"decisions": str(run.root / "decisions")}
    summary = summarise(run.root, folders=folders)
    assert summary.edges is summary.components is summary.clusters is summary.map is None
    assert summary.leaks == summary.retrieved == () and summary.rows == 2000
    assert all(not one.thumbnail for one in summary.shown.values())


def test_the_first_of_each_group_are_kept_from_any_order() -> None:
    rng = np.random.default_rng(3)
    rows = sorted(
        zip(rng.integers(0, 3, 1000), rng.integers(0, 50, 1000), range(1000), strict=True)
    )
    table = pa.table(
        {name: [int(row[k]) for row in rows] for k, name in enumerate(("group", "draw", "row"))}
    )
    table = pa.concat_tables([table, table]).take(rng.permutation(2000))  # each row twice
    kept = Samples(7, ["group"], ["draw", "row"])
    for start in range(0, 2000, 100):
        kept.add(table.slice(start, 100))
    for group in range(3):
        expected = [row[1:] for row in rows if row[0] == group][:7]
        assert [(one["draw"], one["row"]) for one in kept.groups()[group]] == expected
    assert not Samples(3, [], ["draw"]).rows()


def test_the_second_look_is_counted_and_shown(run: Run, tmp_path: Path) -> None:
    kinds = ["same"] * 7 + ["undecided"] * 2 + ["colour"] * 3 + ["shape"] * 20
    pairs = [
        {"row": i, "other": i + 1, "similarity": 0.9 + i / 1000, "same": kind == "same"}
        | {"reason": kind, "x": 0.25, "y": 0.5, "score": 0.0, "set": "", "other_id": bytes(16)}
        for i, kind in enumerate(kinds)
    ]
    for name, part in (("00000", pairs[:20]), ("00001", pairs[20:])):
        tables.write_table(pa.Table.from_pylist(part, VERDICTS), str(tmp_path / "looks"), name)
    looks = read_looks(TableFiles(str(tmp_path)), 0)
    assert (looks.pairs, looks.same, looks.undecided, len(looks.apart)) == (32, 7, 2, 12)
    for one in looks.apart:
        assert pairs[one.a]["similarity"] == one.similarity and not pairs[one.a]["same"]
        assert "undecided" in one.text or "25 % across, 50 % down" in one.text


def test_draws_are_even_and_depend_on_the_seed() -> None:
    names = np.random.default_rng(0).integers(0, 256, (4000, 16), np.uint8)
    drawn = draws(names, 1)
    assert np.histogram(drawn, 10, (0, 1))[0].min() > 320 and drawn.max() < 1
    assert not np.any(drawn == draws(names, 2))
    text = pa.chunked_array([[row.tobytes().hex() for row in names]])
    assert np.array_equal(ids(text), names)
    values = np.linspace(0.5, 1, 1000)
    assert len(np.unique(value_draws(values, 0))) == 1000


def test_thumbnails_are_pictures(run: Run) -> None:
    """The made-up run is what it says."""
    for row in run.rows[:50]:
        if not row.error:
            assert max(Image.open(io.BytesIO(row.thumbnail)).size) <= 96
