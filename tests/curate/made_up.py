"""A finished curation, made up from real photographs: all tables, and what is true of them.

Tiles of photographs with planted copies, equal files, flat tiles, broken files, images of an
evaluation set and seeds. Similarities, components and decisions follow from the tiles by plain
loops and full matrices, so that a report can be checked against them.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from pipeline.curate.rows import tables
from pipeline.curate.steps import steps
from pipeline.pack.demo import tiles as demo

HOSTILE = "web/<script>alert('1')</script>\"&'"
THRESHOLD, LOWEST, GUARD = 0.9, 0.8, 0.06
LEAK_THRESHOLD = THRESHOLD + 0.03
ATTACKS = ("jpeg", "half", "crop", "mirror", "light", "blur", "overlay", "grey", "rotate")
STEPS = ("fingerprint", "quality", "exact", "calibrate", "join", "components")


@dataclass
class Row:
    """One made-up image and what happens to it."""

    encoded: bytes
    thumbnail: bytes
    source: str
    label: int
    width: int
    height: int
    vector: np.ndarray[Any, Any]
    error: str = ""
    stats: tuple[float, float, float, float, float] = (0, 0, 0, 0, 0)
    image_id: bytes = b""
    reason: str = "kept"
    rule: str = ""
    score: float = float("nan")
    keeper: int = -1
    similarity: float = float("nan")
    component: bytes = b""
    query: bytes = b""
    part: str = ""
    leaf: int = -1
    hits: int = 0


@dataclass
class Run:
    """Where the tables are, and the truth about them."""

    root: Path
    rows: list[Row]
    evaluation: list[Row]
    seeds: list[Row]
    edges: list[tuple[int, int, float]] = field(default_factory=list)
    components: dict[bytes, list[int]] = field(default_factory=dict)
    results: list[steps.Step] = field(default_factory=list)

    @property
    def sets(self) -> dict[str, str]:
        return {"cats": str(self.root / "cats"), "clean": str(self.root / "clean")}

    @property
    def leaked(self) -> dict[str, int]:
        """Images of each evaluation set that any row matches, not only as its best match."""
        leaking = [row.vector for row in self.rows if row.reason == "leaks_evaluation"]
        if not leaking or not self.evaluation:
            return {}
        queries = np.stack([row.vector for row in self.evaluation]).astype(np.float64)
        best = (queries @ np.stack(leaking).astype(np.float64).T).max(1)
        return {"cats": int((best > LEAK_THRESHOLD).sum())}

    @property
    def seed_sets(self) -> dict[str, str]:
        return {"seeds": str(self.root / "seeds")}

    def reasons(self) -> Counter[str]:
        return Counter(row.reason for row in self.rows)


def calibration(threshold: float = THRESHOLD) -> dict[str, Any]:
    """As calibrate gives it."""
    steps = np.linspace(0.5, 0.99, 50)
    curve = [
        [float(t), float(1 / (1 + np.exp(25 * (t - 0.9945)))), float(10 ** (-16 * (t - 0.5) - 0.3))]
        for t in steps
    ]
    curve[-5:] = [[t, recall, 0.0] for t, recall, _ in curve[-5:]]
    return {
        "threshold": threshold,
        "penalty": 0.02,
        "target": 1e-6,
        "low": threshold - 0.02,
        "high": threshold + 0.015,
        "reached": 1.6e-6,
        "images": 1576,
        "attacked": 500,
        "negatives": 1_240_000,
        "extrapolated": True,
        "copies": 37,
        "warning": "",
        "recall": 0.914,
        "recalls": dict(zip(ATTACKS, (1, 0.999, 0.62, 1, 0.97, 1, 0.81, 0.99, 0.83), strict=True)),
        "curve": curve,
    }


def write_run(
    root: Path, images: int = 2000, seed: int = 0, files: int = 4, off: Sequence[str] = ()
) -> Run:
    """Makes everything up; `off` names tables that are not written (their stage is off)."""
    rng = np.random.default_rng(seed)
    photos = list(demo._photographs().values()) if images > 1 else []
    rows = [_tile(photos, rng) for _ in range(int(images * 0.8))] if images > 1 else []
    evaluation = [_tile(photos, rng) for _ in range(60)] if images > 1 else []
    seeds = [_tile(photos, rng, label=rng.choice([3, 13])) for _ in range(30)] if photos else []
    if images == 1:
        rows = [_row(Image.linear_gradient("L").convert("RGB"), "web/one", 0)]
    if images >= 1000:
        rows += _group(photos, 45) + _chain(photos, rng)
    while len(rows) < images:
        rows.append(_planted(len(rows), rows, evaluation, photos, rng))
    rng.shuffle(rows)  # type: ignore[arg-type]
    for row in rows:
        row.image_id = hashlib.blake2b(row.encoded, digest_size=16).digest()
    for row in [*evaluation, *seeds]:
        row.image_id = hashlib.blake2b(row.encoded, digest_size=16).digest()
    run = Run(root, rows, evaluation, seeds)
    _decide(run, set(off))
    _write(run, files, set(off))
    return run


def _tile(photos: list[Image.Image], rng: np.random.Generator, label: int | None = None) -> Row:
    label = int(rng.integers(len(photos)) ** 2 / len(photos)) if label is None else int(label)
    photo = photos[label]
    side = int(rng.integers(90, 220))
    width, height = side, int(side * rng.choice([1, 0.75, 1.33]))
    width, height = min(width, photo.width), min(height, photo.height)
    left = int(rng.integers(photo.width - width + 1))
    top = int(rng.integers(photo.height - height + 1))
    names = ["web/animals", "web/space", "scans/lab", "phone/2024", HOSTILE]
    return _row(
        photo.crop((left, top, left + width, top + height)), names[label % len(names)], label
    )


def _row(image: Image.Image, source: str, label: int, quality: int = 90) -> Row:
    stream, small = io.BytesIO(), io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    thumbnail = image.copy()
    thumbnail.thumbnail((96, 96))
    thumbnail.save(small, "JPEG", quality=80)
    grey = np.asarray(image.convert("L"), np.float64)
    counts = np.bincount(grey.astype(np.uint8).ravel(), minlength=256) / grey.size
    entropy = float(-(counts[counts > 0] * np.log2(counts[counts > 0])).sum())
    low, middle, high = np.percentile(grey, [5, 50, 95])
    return Row(
        stream.getvalue(),
        small.getvalue(),
        source,
        label,
        *image.size,
        vector=_vector(image),
        stats=(float(low), float(middle), float(high), float(grey.std()), entropy),
    )


def _vector(image: Image.Image) -> np.ndarray[Any, Any]:
    grey = np.asarray(image.convert("L").resize((32, 32)), np.float64)
    flat = dctn(grey, norm="ortho")[:12, :12].ravel()[1:]
    flat = np.sign(flat) * np.sqrt(np.abs(flat))
    return (flat / max(1e-9, float(np.linalg.norm(flat)))).astype(np.float16)


def _planted(
    number: int,
    rows: list[Row],
    evaluation: list[Row],
    photos: list[Image.Image],
    rng: np.random.Generator,
) -> Row:
    """Copies, equal files, leaks, flat, small, long and broken ones in turn."""
    kind = number % 20
    of = rows[int(rng.integers(max(1, len(rows) // 3)))]
    if kind < 9 and not of.error:
        image = Image.open(io.BytesIO(of.encoded)).convert("RGB")
        image = image.point(lambda v: min(255, int(v * (0.8 + 0.05 * kind))))
        return _row(image, of.source, of.label, quality=40 + kind)
    if kind < 12:
        return Row(**{**of.__dict__, "source": "phone/2024"})
    if kind < 15 and evaluation:
        leak = evaluation[int(rng.integers(20))]
        image = Image.open(io.BytesIO(leak.encoded)).convert("RGB")
        return _row(image.resize((80, 80)), "web/animals", leak.label, 50 + kind)
    if kind < 17:
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        return _row(Image.new("RGB", (96, 96), colour), "scans/lab", 0)
    if kind == 17:
        tile = _tile(photos, rng)
        image = Image.open(io.BytesIO(tile.encoded))
        return _row(image.resize((24, 20)), tile.source, tile.label)
    if kind == 18:
        tile = _tile(photos, rng)
        return _row(Image.open(io.BytesIO(tile.encoded)).resize((300, 40)), tile.source, tile.label)
    row = Row(rng.bytes(500), b"", HOSTILE, 0, 0, 0, np.zeros(143, np.float16))
    row.error = "cannot identify image <file>"
    return row


def _group(photos: list[Image.Image], size: int) -> list[Row]:
    """One picture, saved again and again."""
    image = photos[3].crop((60, 40, 230, 200)).convert("RGB")
    return [
        _row(image.resize((170 - 2 * i, 160 - 2 * i)), "web/animals", 3, 30 + i)
        for i in range(size)
    ]


def _chain(photos: list[Image.Image], rng: np.random.Generator) -> list[Row]:
    """From one picture to another in small steps: each like the next, the ends unlike."""
    rows = []
    for _ in range(3):
        a, b = (
            photos[int(k)].convert("RGB").crop((30, 30, 190, 190)).resize((120, 120))
            for k in rng.choice(len(photos), 2, replace=False)
        )
        rows += [_row(Image.blend(a, b, step / 9), "web/space", 5) for step in range(10)]
    return rows


def _decide(run: Run, off: set[str]) -> None:
    rows = run.rows
    for row in rows:
        if row.error:
            row.reason, row.rule = "undecodable", ""
        elif min(row.width, row.height) < 32:
            row.reason, row.rule, row.score = "too_small", "min_side", min(row.width, row.height)
        elif (aspect := max(row.width / row.height, row.height / row.width)) > 4:
            row.reason, row.rule, row.score = "aspect", "max_aspect", aspect
        elif row.stats[3] < 4:
            row.reason, row.rule, row.score = "flat", "min_contrast", row.stats[3]
    first: dict[bytes, int] = {}
    for i, row in enumerate(rows):
        if row.reason == "kept" and first.setdefault(row.image_id, i) != i:
            row.reason, row.rule, row.keeper = "duplicate_bytes", "bytes", first[row.image_id]
            row.similarity = 1.0
    alive = [i for i, row in enumerate(rows) if row.reason == "kept"]
    if "leaks" not in off and alive and run.evaluation:
        queries = np.stack([row.vector for row in run.evaluation]).astype(np.float64)
        for i in alive:
            found = queries @ rows[i].vector.astype(np.float64)
            if found.max() > LEAK_THRESHOLD:
                row, best = rows[i], int(found.argmax())
                row.reason, row.rule = "leaks_evaluation", "cats"
                row.similarity, row.query = float(found[best]), run.evaluation[best].image_id
    if "edges" not in off and len(alive) > 1:
        _components(run, alive)
    alive = [i for i, row in enumerate(rows) if row.reason == "kept"]
    if "retrieved" not in off and run.seeds:
        _retrieve(run, alive)
        alive = [i for i, row in enumerate(rows) if row.reason == "kept"]
    if "balanced" not in off:
        count: Counter[int] = Counter()
        for i in sorted(alive, key=lambda i: rows[i].image_id):
            row = rows[i]
            row.leaf = row.label * 6 + row.image_id[3] % 6
            count[row.leaf] += 1
            if count[row.leaf] > 14 or row.leaf % 17 == 5:
                row.reason = "balanced_out"
            else:
                row.part = "balanced"
    for row in rows:
        if row.reason == "kept" and not row.part:
            row.part = "pool"


def _components(run: Run, alive: list[int]) -> None:
    rows = run.rows
    vectors = np.stack([rows[i].vector for i in alive]).astype(np.float64)
    similarity = np.triu(vectors @ vectors.T, 1)
    a, b = np.nonzero(similarity > LOWEST)
    graph = coo_array((2 - similarity[a, b], (a, b)), shape=similarity.shape)
    forest = minimum_spanning_tree(graph.tocsr()).tocoo()
    run.edges = [
        (alive[int(i)], alive[int(j)], float(similarity[min(i, j), max(i, j)]))
        for i, j in zip(forest.row, forest.col, strict=True)
    ]
    strong = similarity > THRESHOLD
    _, labels = connected_components(coo_array(strong))
    for label in np.unique(labels):
        members = [alive[int(i)] for i in np.flatnonzero(labels == label)]
        if len(members) < 2:
            continue
        name = min(rows[i].image_id for i in members)
        run.components[name] = members
        left = sorted(members, key=lambda i: (-rows[i].width * rows[i].height, rows[i].image_id))
        while left:
            free = [i for i in left if rows[i].reason != "leaks_evaluation"]
            keeper = (free or left)[0]
            again = []
            for i in left:
                close = float(rows[i].vector.astype(float) @ rows[keeper].vector.astype(float))
                if i != keeper and close < THRESHOLD - GUARD:
                    again.append(i)
                    continue
                row = rows[i]
                row.component, row.keeper = name, keeper
                if row.reason != "leaks_evaluation":
                    row.similarity = 1.0 if i == keeper else close
                    if i != keeper:
                        row.reason, row.rule = "duplicate_near", "near"
            left = again


def _retrieve(run: Run, alive: list[int]) -> None:
    rows = run.rows
    vectors = np.stack([rows[i].vector for i in alive]).astype(np.float64)
    for seed in run.seeds:
        found = vectors @ seed.vector.astype(np.float64)
        for place in np.argsort(-found)[:12]:
            row = rows[alive[int(place)]]
            row.hits += 1
            if row.hits == 1 or found[place] > row.similarity:
                row.similarity, row.query = float(found[place]), seed.image_id
    for place, i in enumerate(alive):
        if not rows[i].hits and place % 8 == 0:
            rows[i].reason = "not_retrieved"


def _write(run: Run, files: int, off: set[str]) -> None:
    rows, root = run.rows, run.root
    cuts = np.linspace(0, len(rows), files + 1).astype(int)
    chained = _chained(run)
    for index in range(files):
        low, high = int(cuts[index]), int(cuts[index + 1])
        some, name = list(enumerate(rows))[low:high], f"{index:05d}"

        def put(table: str, columns: dict[str, list[Any]], schema: pa.Schema) -> None:
            if table not in off:
                made = pa.Table.from_pydict(columns, schema)
                tables.write_table(made, str(root / table), name)  # noqa: B023

        tables.write_table(_fingerprints(some), str(root / "fingerprint"), name)
        bad = {"undecodable", "too_small", "aspect", "flat"}
        put(
            "quality",
            {
                "row": [i for i, _ in some],
                "reason": [r.reason if r.reason in bad else "" for _, r in some],
                "rule": [r.rule if r.reason in bad else "" for _, r in some],
                "value": [r.score for _, r in some],
            },
            tables.QUALITY,
        )
        passing = [(i, r) for i, r in some if r.reason not in bad]
        put(
            "exact",
            {
                "row": [i for i, _ in passing],
                "keeper": [r.keeper if r.rule == "bytes" else i for i, r in passing],
                "method": ["bytes" if r.rule == "bytes" else "" for _, r in passing],
            },
            tables.EXACT,
        )
        mine = [e for e in run.edges if low <= e[0] < high]
        put(
            "edges",
            dict(zip(("a", "b", "similarity"), map(list, zip(*mine, strict=True)), strict=True))
            if mine
            else {"a": [], "b": [], "similarity": []},
            tables.EDGES,
        )
        joined = [(i, r) for i, r in some if r.component]
        put(
            "components",
            {
                "row": [i for i, _ in joined],
                "component": [r.component for _, r in joined],
                "size": [len(run.components[r.component]) for _, r in joined],
                "keeper": [r.keeper for _, r in joined],
                "keeper_id": [rows[r.keeper].image_id for _, r in joined],
                "similarity": [1.0 if r.keeper == i else r.similarity for i, r in joined],
                "chained": [i in chained for i, _ in joined],
            },
            tables.COMPONENTS,
        )
        leaking = [(i, r) for i, r in some if r.reason == "leaks_evaluation"]
        put(
            "leaks",
            {
                "row": [i for i, _ in leaking],
                "set": [r.rule for _, r in leaking],
                "query_id": [r.query for _, r in leaking],
                "similarity": [r.similarity for _, r in leaking],
            },
            tables.LEAKS,
        )
        asked = [(i, r) for i, r in some if r.hits]
        put(
            "retrieved",
            {
                "row": [i for i, _ in asked],
                "part": ["sample" for _ in asked],
                "set": ["seeds" for _ in asked],
                "query_id": [r.query for _, r in asked],
                "similarity": [r.similarity for _, r in asked],
                "rank": [0 for _ in asked],
                "hits": [r.hits for _, r in asked],
                "cluster": [-1 for _ in asked],
            },
            tables.RETRIEVED,
        )
        weighed = [(i, r) for i, r in some if r.leaf >= 0]
        put(
            "balanced",
            {
                "row": [i for i, _ in weighed],
                "leaf": [r.leaf for _, r in weighed],
                "top": [r.label for _, r in weighed],
                "chosen": [r.reason == "kept" for _, r in weighed],
            },
            tables.BALANCED,
        )
        put("decisions", _decisions(some, rows), tables.DECISIONS)
    for folder, those in (("cats", run.evaluation), ("clean", []), ("seeds", run.seeds)):
        tables.write_table(_fingerprints(list(enumerate(those))), str(root / folder), "00000")
    run.results = results(root, files)


def results(root: Path, files: int) -> list[steps.Step]:
    """Steps as they would have been accounted."""
    found = []
    for number, step in enumerate(STEPS):
        accounts = tuple(
            {"rows": 500, "bytes": 3_000_000 // (number + 1), "_seconds": 1.0} for _ in range(files)
        )
        found.append(
            steps.Step(
                name=step,
                key=f"k{number}",
                folder=str(root / step),
                accounts=accounts,
                reused=files if step == "quality" else number % 3,
                seconds=40.0 / (number + 1),
                cpu_s=61.0 / (number + 1),
                peak_bytes=(300 + 40 * number) * 2**20,
            )
        )
    return found


def _chained(run: Run) -> set[int]:
    """Rows that are too unlike the first keeper of their component."""
    found = set()
    for members in run.components.values():
        free = [i for i in members if run.rows[i].reason != "leaks_evaluation"] or members
        first = min(
            free, key=lambda i: (-run.rows[i].width * run.rows[i].height, run.rows[i].image_id)
        )
        found |= {i for i in members if run.rows[i].keeper != first}
    return found


def _fingerprints(some: list[tuple[int, Row]]) -> pa.Table:
    columns: dict[str, Any] = {
        "row": [i for i, _ in some],
        "image_id": [r.image_id for _, r in some],
        "source": [f"photos/{r.source}/{i}.jpg" for i, r in some],
        "bytes": [len(r.encoded) for _, r in some],
        "width": [r.width for _, r in some],
        "height": [r.height for _, r in some],
        "error": [r.error for _, r in some],
        "pixel_hash": [r.image_id for _, r in some],
        "brightness_p05": [r.stats[0] for _, r in some],
        "brightness_p50": [r.stats[1] for _, r in some],
        "brightness_p95": [r.stats[2] for _, r in some],
        "contrast": [r.stats[3] for _, r in some],
        "entropy": [r.stats[4] for _, r in some],
        "sharpness": [100.0 for _ in some],
        "edges": [50.0 for _ in some],
        "saturation": [0.5 for _ in some],
        "descriptor": [list(r.vector) for _, r in some],
        "views": [[0.0] * (9 * 143) for _ in some],
        "thumbnail": [r.thumbnail for _, r in some],
    }
    for name in ("descriptor", "views"):
        columns[name] = [np.asarray(v, np.float16) for v in columns[name]]
    return pa.Table.from_pydict(columns, tables.FINGERPRINT)


def _decisions(some: list[tuple[int, Row]], rows: list[Row]) -> dict[str, list[Any]]:
    return {
        "image_id": [r.image_id.hex() for _, r in some],
        "kept": [r.reason == "kept" for _, r in some],
        "reason": [r.reason for _, r in some],
        "keeper_id": [
            rows[r.keeper].image_id.hex() if r.reason.startswith("duplicate") else None
            for _, r in some
        ],
        "similarity": [None if np.isnan(r.similarity) else r.similarity for _, r in some],
        "component": [r.component.hex() or None for _, r in some],
        "cluster": [r.leaf if r.leaf >= 0 else None for _, r in some],
        "query_id": [r.query.hex() or None for _, r in some],
        "score": [None if np.isnan(r.score) else r.score for _, r in some],
        "rule": [r.rule or None for _, r in some],
        "part": [r.part or None for _, r in some],
        "source": [r.source for _, r in some],
        "hits": [r.hits for _, r in some],
        "row": [i for i, _ in some],
    }
