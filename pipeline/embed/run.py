"""Embeds a set of shards: from images to a finished table of vectors. Start at `embed_set`.

CPU tasks read and decode units of row groups; a pool of actors, one a GPU where there are any,
embeds them and writes a part each. So CPU nodes decode for GPU nodes, and what an accelerator waits
is measured. A part that is there is not made again.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.embed.embedders import EmbedderSpec, open_embedder
from pipeline.embed.parts import finished_part
from pipeline.embed.pool import Pace, as_ours, embedded_by_pool, embedded_in_one_task
from pipeline.embed.units import Decoding, Unit, reads_of, units_of
from pipeline.embed.vectors import MARK, VERSION, Facts, VectorSet, open_vectors, part_name
from pipeline.errors import DataError
from pipeline.heartbeat import doing, now
from pipeline.images.value_range import FULL
from pipeline.shards.columns import BAD_IMAGE_SCHEMA
from pipeline.shards.shard_set import ShardSet
from pipeline.storage.places import absolute_uri, delete_file, list_files, resolve_uri
from pipeline.storage.run_folder import fingerprint
from pipeline.storage.transfer import read_mark, write_bytes_atomic, write_parquet_atomic
from pipeline.uri import Place, public

log = logging.getLogger("pipeline.embed")

FEW = 4  # units that one task embeds by itself: a pool would take longer to start


@dataclass(frozen=True)
class Request:
    """What is to be embedded.

    Attributes:
        spec: the model.
        shards: the images, with the range of values that they are decoded with.
        outputs: of `embedders.OUTPUTS`.
        blocks: last blocks whose CLS is kept.
        dtype: of what is stored, float32 or float16.
        max_pixels: larger images are refused.
        max_bad_fraction: with more images that cannot be decoded there is no table. No vector
            depends on it.
    """

    spec: EmbedderSpec
    shards: ShardSet
    outputs: tuple[str, ...] = ("cls",)
    blocks: int = 4
    dtype: str = "float32"
    max_pixels: int = 200_000_000
    max_bad_fraction: float = 1.0

    @property
    def key(self) -> str:
        """Changes with the model, the images and all that the vectors depend on."""
        shards = self.shards
        columns = [shards.image_column, shards.label_column, shards.reads_labels]
        ranges = [self.spec.value_range, shards.value_range or FULL]
        asked = [self.outputs, self.blocks, self.dtype, self.max_pixels]
        return fingerprint([VERSION, self.spec.settings, shards.digest, columns, ranges, asked])


@dataclass(frozen=True)
class Report:
    """What embedding took.

    Attributes:
        vectors: the table.
        bad: rows of the bad image table.
        embedded: images embedded by this call; the others were there.
        pace: what it took; of no images where nothing was to be done.
        workers: actors that embedded, at most.
        seconds: of the call.
    """

    vectors: VectorSet
    bad: tuple[dict[str, str], ...]
    embedded: int
    pace: Pace
    workers: int
    seconds: float

    @property
    def images_per_s(self) -> float:
        """Of this call, the start of its workers counted too."""
        return self.embedded / max(1e-9, self.seconds)


def embed_set(
    request: Request, folder: str, bad_table: Place | None = None, *, replaced: bool = False
) -> Report:
    """Embeds a set, or what is missing of it; needs a Ray to be joined.

    Args:
        request: what to embed.
        folder: of the vectors; a path that all nodes reach, or a URI.
        bad_table: where the images go that could not be decoded; None: nowhere.
        replaced: a table of another model there is expected, and replaced without a warning.

    Raises:
        PipelineError: the model or the images cannot be used, the folder holds what is not ours, or
            too many images could not be decoded. Parts that are whole are not made again.
    """
    begin = time.monotonic()
    folder = absolute_uri(folder)
    facts = facts_of(request)
    image_bytes = facts["image_size"] ** 2 * facts["channels"]
    units = units_of(request.shards, image_bytes)
    finished = _finished(folder, units, facts, logging.DEBUG if replaced else logging.WARNING)
    missing = [unit for unit in units if unit.number not in finished]
    if finished and missing:
        log.info("%d of %d parts were embedded before", len(finished), len(units))
    pace, workers = Pace(), 0
    if missing:
        shards = request.shards
        kind, size, channels = request.spec.kind, facts["image_size"], facts["channels"]
        decoding = Decoding(shards.columns, kind, size, channels, request.max_pixels)
        run = embedded_in_one_task if len(missing) <= FEW else embedded_by_pool
        done = sum(rows for rows, _ in finished.values())
        with doing(f"embed: {done:,} of {shards.rows:,} images"):
            paces = run(reads_of(missing), request.spec, decoding, facts, folder)
            for unit_pace, workers in paces:  # noqa: B007  (all say the same of the workers)
                pace = pace + unit_pace
                now(f"embed: {done + pace.images:,} of {shards.rows:,} images")
    parts, bad = [], []
    for unit in units:
        part = finished.get(unit.number) or finished_part(folder, unit, facts["key"])
        if part is None:
            raise DataError(
                f"{public(folder)}/{part_name(unit.number)} is gone or was written by another job",
                "let one job at a time write there, and run the same command again",
            )
        parts.append((part_name(unit.number), part[0]))
        bad += part[1]
    if not sum(rows for _, rows in parts):
        why = f": {bad[0]['reason']}, {bad[0]['detail']}" if bad else ""
        raise DataError(
            f"no image of {public(request.shards.uri)} could be embedded{why}",
            "look whether the model takes such images, by its channels",
        )
    if bad_table is not None:
        _write_bad(bad, bad_table)
    _check_bad(request, bad, bad_table)
    fs, path = resolve_uri(folder)
    _sweep(folder, {name for name, _ in parts})
    mark = {**facts, "parts": parts, "bad": len(bad)}
    write_bytes_atomic((json.dumps(mark, indent=1) + "\n").encode(), fs, f"{path}/{MARK}")
    seconds = time.monotonic() - begin
    return Report(open_vectors(folder), tuple(bad), pace.images, pace, workers, seconds)


def facts_of(request: Request) -> Facts:
    """What a table of vectors says of itself; opens the model, in a task of its own.

    Raises:
        PipelineError: the model cannot be opened.
    """
    asked = repr([request.spec.settings, request.outputs, request.blocks])
    if asked not in _known_models:
        _known_models.clear()
        _known_models[asked] = _asked_of_a_task(request)
    model = _known_models[asked]
    return {**model, **_set_facts(request), "version": VERSION, "key": request.key}


_known_models: dict[str, Facts] = {}  # of the last model: several sets are embedded by one


def _asked_of_a_task(request: Request) -> Facts:
    import ray
    from ray.exceptions import RayTaskError

    known = ray.remote(_model_facts).options(num_cpus=0.5)
    try:
        model: Facts = ray.get(known.remote(request.spec, request.outputs, request.blocks))
    except RayTaskError as error:
        raise as_ours(error) from error
    return model


def _model_facts(spec: EmbedderSpec, outputs: Sequence[str], blocks: int) -> Facts:
    embedder = open_embedder(spec)
    embedder.outputs([], outputs, blocks)  # says what it does not have
    return {
        "model": spec.name,
        "kind": spec.kind,
        "digest": spec.digest,
        "dim": embedder.dim,
        "image_size": embedder.size,
        "channels": embedder.channels,
        "mean": list(embedder.mean),
        "std": list(embedder.std),
        "patch_size": embedder.patch_size,
        "grid": list(embedder.grid),
        "registers": embedder.registers,
        "batch_size": spec.batch_size,
        "precision": "bfloat16" if spec.half else "float32",
    }


def _set_facts(request: Request) -> Facts:
    shards = request.shards
    return {
        "outputs": list(request.outputs),
        "blocks": request.blocks,
        "dtype": request.dtype,
        "value_range": shards.value_range or FULL,
        "class_names": list(shards.class_names),
        "shards": {
            "uri": shards.uri,
            "digest": shards.digest,
            "rows": shards.rows,
            "image_column": shards.image_column,
            "label_column": shards.label_column,
            "labels": shards.reads_labels,
        },
    }


def remove_vectors(folder: str) -> None:
    """Takes a table away, and nothing else that may be in its folder."""
    fs, path = resolve_uri(folder)
    delete_file(fs, f"{path}/{MARK}")
    _sweep(folder, set())


# ---- What is in the folder already.


def _finished(
    folder: str, units: Sequence[Unit], facts: Facts, level: int
) -> dict[int, tuple[int, list[dict[str, str]]]]:
    """Parts of this very table, by their numbers. Those of another one are taken away, and said."""
    fs, path = resolve_uri(folder)
    names = {info.base_name for info in list_files(fs, path, recursive=False)}
    if others := sorted(n for n in names if n.endswith(".parquet") and not _is_part(n)):
        raise DataError(
            f"{public(folder)} holds files that are no vectors of ours, such as {others[0]}",
            "give another folder: embed.vectors=…",
        )
    there = [unit for unit in units if part_name(unit.number) in names]
    with ThreadPoolExecutor(16) as pool:  # footers of remote files are a round trip each
        parts = list(pool.map(lambda unit: finished_part(folder, unit, facts["key"]), there))
    finished = {u.number: part for u, part in zip(there, parts, strict=True) if part is not None}
    mark = read_mark(fs, f"{path}/{MARK}")
    if mark and mark.get("key") != facts["key"]:
        delete_file(fs, f"{path}/{MARK}")
        log.log(level, "%s", _changed(public(folder), mark, facts))
    elif (stale := sum(map(_is_part, names)) - len(finished)) and not mark:
        log.log(level, "%s: %d parts of other settings are made anew", public(folder), stale)
    # After the mark: who opened the earlier table is told so, and never reads two models as one.
    _delete(folder, {n for n in names if _is_part(n)} - {part_name(n) for n in finished})
    return finished


def _changed(folder: str, mark: Facts, facts: Facts) -> str:
    model = mark.get("digest") != facts["digest"]
    images = mark.get("shards", {}).get("digest") != facts["shards"]["digest"]
    if model:
        what = f"the model {mark.get('model')} of then is not the {facts['model']} of now"
    elif images:
        what = "the images are others by now"
    else:
        names = sorted(n for n in facts if facts[n] != mark.get(n) and n not in ("key", "shards"))
        what = f"other settings ({', '.join(names)})"
    return f"{folder} held vectors that do not fit: {what}; all are made anew"


def _is_part(name: str) -> bool:
    head, _, number = name.removesuffix(".parquet").partition("-")
    return name.endswith(".parquet") and head == "part" and number.isdigit()


def _sweep(folder: str, names: set[str]) -> None:
    """Takes away parts of an earlier table that had more of them, and what a kill left behind."""
    fs, path = resolve_uri(folder)
    there = [info.base_name for info in list_files(fs, path, recursive=False)]
    left = {name for name in there if name.startswith(".part-") and name.endswith(".tmp")}
    _delete(folder, left | {name for name in there if _is_part(name) and name not in names})


def _delete(folder: str, names: Collection[str]) -> None:
    fs, path = resolve_uri(folder)
    with ThreadPoolExecutor(16) as pool:  # a round trip each
        list(pool.map(lambda name: delete_file(fs, f"{path}/{name}"), names))


def _check_bad(request: Request, bad: Sequence[dict[str, str]], table: Place | None) -> None:
    rows, limit = request.shards.rows, request.max_bad_fraction
    if len(bad) <= limit * rows:
        return
    reasons = Counter(row["reason"] for row in bad).most_common()
    raise DataError(
        f"{len(bad):,} of {rows:,} images of {public(request.shards.uri)} could not be decoded "
        f"({100 * len(bad) / rows:.3g} %, allowed {100 * limit:g} %): "
        + ", ".join(f"{count:,} {reason}" for reason, count in reasons),
        f"they are listed in {public(table)}; "
        * (table is not None)
        + "look whether the model takes such images, or set data.max_bad_fraction higher and run "
        "again: no image is embedded twice",
    )


def _write_bad(bad: Sequence[dict[str, str]], place: Place) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(list(bad), schema=BAD_IMAGE_SCHEMA)
    write_parquet_atomic(table, *resolve_uri(str(place)), row_group_size=65_536)
