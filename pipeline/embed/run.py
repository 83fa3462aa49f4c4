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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.embed.embedders import BACKBONE, EmbedderSpec, open_embedder
from pipeline.embed.folder import finished_parts, sweep, tallied
from pipeline.embed.pool import Assignment, Pace, as_ours, embedded_by_pool, embedded_in_one_task
from pipeline.embed.units import Decoding, reads_of, units_of
from pipeline.embed.vectors import MARK, VERSION, Facts, VectorSet, open_vectors
from pipeline.errors import DataError
from pipeline.heartbeat import doing, now
from pipeline.images.value_range import FULL
from pipeline.shards.shard_set import ShardSet
from pipeline.storage.places import absolute_uri, resolve_uri
from pipeline.storage.run_folder import fingerprint
from pipeline.storage.transfer import write_bytes_atomic
from pipeline.uri import Place, public

log = logging.getLogger("pipeline.embed")

FEW = 4  # units that one task embeds by itself: a pool would take longer to start


@dataclass(frozen=True)
class Request:
    """What is to be embedded.

    Attributes:
        spec: the model.
        shards: the images, with the range of values that they are decoded with.
        outputs: of `forward.OUTPUTS`.
        blocks: last blocks whose CLS is kept.
        dtype: of what is stored, float32 or float16.
        max_pixels: larger images are refused.
        max_bad_fraction: with more images that cannot be decoded there is no table. No vector
            depends on it.
        gpu: of the cluster's GPUs, where it has some; else on CPUs alone.
    """

    spec: EmbedderSpec
    shards: ShardSet
    outputs: tuple[str, ...] = ("cls",)
    blocks: int = 4
    dtype: str = "float32"
    max_pixels: int = 200_000_000
    max_bad_fraction: float = 1.0
    gpu: bool = True

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
        bad: images that could not be decoded.
        embedded: images embedded by this call; the others were there.
        pace: what it took; of no images where nothing was to be done.
        workers: actors that embedded, at most.
        seconds: of the call.
    """

    vectors: VectorSet
    bad: int
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
    level = logging.DEBUG if replaced else logging.WARNING
    finished = finished_parts(folder, units, facts, level)
    missing = [unit for unit in units if unit.number not in finished]
    if finished and missing:
        log.info("%d of %d parts were embedded before", len(finished), len(units))
    pace, workers = Pace(), 0
    if missing:
        shards = request.shards
        kind, size, channels = request.spec.kind, facts["image_size"], facts["channels"]
        decoding = Decoding(shards.columns, kind, size, channels, request.max_pixels)
        assignment = Assignment(request.spec, decoding, facts, folder, request.gpu)
        run = embedded_in_one_task if len(missing) <= FEW else embedded_by_pool
        done = sum(part.rows for part in finished.values())
        with doing(f"embed: {done:,} of {shards.rows:,} images"):
            paces = run(reads_of(missing), assignment)
            for unit_pace, workers in paces:  # noqa: B007  (all say the same of the workers)
                pace = pace + unit_pace
                now(f"embed: {done + pace.images:,} of {shards.rows:,} images")
    tally = tallied(folder, units, finished, facts["key"], bad_table)
    if not tally.rows:
        why = f": {tally.first['reason']}, {tally.first['detail']}" if tally.first else ""
        raise DataError(
            f"no image of {public(request.shards.uri)} could be embedded{why}",
            "look whether the model takes such images, by its channels",
        )
    _check_bad(request, tally.reasons, bad_table)
    sweep(folder, {name for name, _ in tally.parts})
    mark = {**facts, "parts": tally.parts, "bad": tally.bad}
    fs, path = resolve_uri(folder)
    write_bytes_atomic((json.dumps(mark, indent=1) + "\n").encode(), fs, f"{path}/{MARK}")
    seconds = time.monotonic() - begin
    return Report(open_vectors(folder), tally.bad, pace.images, pace, workers, seconds)


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
        "precision": "bfloat16" if spec.half and spec.kind == BACKBONE else "float32",
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


def _check_bad(request: Request, bad: Mapping[str, int], table: Place | None) -> None:
    rows, limit, count = request.shards.rows, request.max_bad_fraction, sum(bad.values())
    if count <= limit * rows:
        return
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in Counter(bad).most_common())
    listed = "" if table is None else f"they are listed in {public(table)}; "
    raise DataError(
        f"{count:,} of {rows:,} images of {public(request.shards.uri)} could not be decoded "
        f"({100 * count / rows:.3g} %, allowed {100 * limit:g} %): {reasons}",
        f"{listed}look whether the model takes such images, or set data.max_bad_fraction higher "
        "and run again: no image is embedded twice",
    )
