"""All examples of the first model of an evaluation; needs a Ray to be joined."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from pipeline.card.examples.kept import Asked, Examples, Look, Neighbour, Shown
from pipeline.card.examples.looks import Looks, looks_of
from pipeline.card.examples.nearest import Answered, Row, nearest_of
from pipeline.card.inputs.networks import Network
from pipeline.card.inputs.tables import place_of
from pipeline.card.scoring.request import Request
from pipeline.card.shown.mistakes import ImageOf
from pipeline.embed.image_reader import ImageReader
from pipeline.embed.vectors import VectorSet, open_vectors
from pipeline.errors import PipelineError
from pipeline.heartbeat import now
from pipeline.search.rows import label_name
from pipeline.uri import join, public

log = logging.getLogger("pipeline.evaluate")

ASKED, NEIGHBOURS, LOOKED = 6, 7, 4
BEGINNINGS = ("init", "step0", "untrained")  # what a model is compared with, by preference


def examples_of(request: Request, image_of: ImageOf, readers: Sequence[ImageReader]) -> Examples:
    """Neighbours of a few images, and what the model and its beginning see in some of them.

    Args:
        request: of an evaluation that is done, whose tables of vectors are there.
        image_of: small JPEGs by image id.
        readers: of the encoded images of the reference and of the queries.
    """
    if request.sets is None or request.sets.from_vectors:
        return Examples()
    import ray

    first = request.networks[0]
    tables = {
        what: open_vectors(place_of(join(request.folder, "vectors"), 0, first, what))
        for what in request.sets.each
    }
    now("evaluate: neighbours of a few images")
    task = ray.remote(nearest_of).options(num_cpus=1)
    reference, queries = tables["reference"], tables.get("queries")
    answered: list[Answered] = ray.get(task.remote(reference, queries, ASKED, NEIGHBOURS))
    asked = tuple(_asked(one, reference, queries or reference, image_of) for one in answered)
    looks, before = _looks(request, first, answered, readers)
    shown = tuple(
        Look(replace(one.image, picture=picture), pictures)
        for one, picture, pictures in zip(asked, looks.images, looks.pictures, strict=False)
    )
    return Examples(first.name, asked, shown, before, (looks.remark,) if looks.remark else ())


def _asked(one: Answered, reference: VectorSet, queries: VectorSet, image_of: ImageOf) -> Asked:
    name = _label(one.query, queries)
    neighbours = []
    for row, cosine in zip(one.rows, one.cosines, strict=True):
        label = _label(row, reference)
        right = label == name if label and name else None
        neighbours.append(Neighbour(_shown(row, label, image_of), cosine, right))
    return Asked(_shown(one.query, name, image_of), tuple(neighbours))


def _label(row: Row, table: VectorSet) -> str:
    return label_name(row.label, tuple(table.facts.get("class_names", ())))


def _shown(row: Row, label: str, image_of: ImageOf) -> Shown:
    name = public(row.source).rstrip("/").rpartition("/")[2] or f"{row.image_id[:8]}…"
    return Shown(_picture(row.image_id, image_of), name, label)


def _picture(image_id: str, image_of: ImageOf) -> bytes:
    try:
        picture = image_of(image_id)
    except (KeyError, PipelineError, OSError) as error:  # the words are worth a page without it
        log.warning("evaluate    no picture of %s: %s", image_id, error)
        return b""
    return bytes(picture) if picture is not None else b""


def _looks(
    request: Request, first: Network, answered: Sequence[Answered], readers: Sequence[ImageReader]
) -> tuple[Looks, str]:
    """Pictures of the first images, and the name of the beginning."""
    import ray

    beside = [one for one in request.networks if one.of == first.name]
    begun = next((one for role in BEGINNINGS for one in beside if one.role == role), None)
    if begun is None or not answered:
        return Looks(), ""
    ids = [one.query.image_id for one in answered[:LOOKED]]
    try:
        images = [_encoded(one, readers) for one in ids]
    except (KeyError, PipelineError, OSError) as error:  # the scores are there without pictures
        log.warning("evaluate    no pictures of patches: %s", error)
        return Looks(remark="the images cannot be read"), begun.name
    now("evaluate: what the model sees in a few images")
    gpus = int(request.gpu and ray.cluster_resources().get("GPU", 0) >= 1)
    task = ray.remote(looks_of).options(num_cpus=1, num_gpus=gpus)
    specs = begun.spec, first.spec
    looks: Looks = ray.get(task.remote(*specs, images, request.max_pixels, bool(gpus)))
    return looks, begun.name


def _encoded(image_id: str, readers: Sequence[ImageReader]) -> bytes:
    """An image as it is stored.

    Raises:
        KeyError: no reader has it.
    """
    for reader in readers:
        if image_id in reader:
            return reader[image_id]
    raise KeyError(f"image {image_id[:8]}… is in neither set")
