"""The look stage: what a backbone sees in a few images, as pictures and one page."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config.config import Config
from pipeline.context import Context, result_line
from pipeline.embed.embedders import BACKBONE, EmbedderSpec, embedder_of, open_embedder
from pipeline.errors import ConfigError, DataError
from pipeline.heartbeat import now
from pipeline.images.decode import decode_image
from pipeline.images.shown import Pixels, png
from pipeline.report.page import Section, write_report
from pipeline.stages.evaluation import chosen
from pipeline.stages.tracked import captions
from pipeline.storage.places import absolute_uri, delete_file, exists, make_folder, resolve_uri
from pipeline.storage.run_folder import fingerprint
from pipeline.storage.transfer import atomic_path, write_bytes_atomic
from pipeline.train.checkpoint import state
from pipeline.uri import Place, join, public
from pipeline.use.inputs import Decode, File, read_files, readable, spread
from pipeline.use.looking import Question, Seen, check, look
from pipeline.use.masks import Classes, read_masks
from pipeline.use.page import Drawn, draw, overview, sections

log = logging.getLogger("pipeline.look")

PAGE = "look.html"
PAGE_BYTES = 6_000_000  # of the page; its pictures get smaller until it fits, the files do not
TILE = 224  # pixels of a tile in the run's report


@dataclass(frozen=True)
class Asked:
    """What the recipe asks for, with all files read."""

    model: EmbedderSpec
    decode: Decode
    images: list[File]
    left_out: list[str]
    references: tuple[tuple[Pixels, Any], ...]
    classes: Classes | None
    digests: list[str]

    def key(self, config: Config) -> str:
        """Changes with the model, the settings, and the bytes of all files."""
        settings = config.look.model_dump(mode="json", exclude={"enabled", "model"})
        return fingerprint([self.model.settings, settings, self.digests])


def key(context: Context) -> str:
    """Changes with the model, the settings, and the bytes of all files."""
    return asked(context).key(context.config)


def intact(context: Context) -> bool:
    """Whether the page is still there."""
    return exists(*resolve_uri(str(join(_folder(context), PAGE))))


def asked(context: Context) -> Asked:
    """Reads and checks all that was asked for; the network is not loaded.

    Raises:
        PipelineError: what is missing, or is no image or mask.
    """
    config = context.config
    asking = config.look
    model = _model(context)
    if asking.images:
        files = read_files(asking.images, "look.images")
    elif not (config.data.shards or config.data.source):
        raise ConfigError(
            "nothing to look at: look.images is empty",
            "name images: python jobs/look.py photo.jpg model=runs/NAME",
        )
    else:
        files = spread(context.shards(), asking.count)
    decode = partial(
        decode_image,
        channels=len(model.mean),
        max_pixels=config.data.max_image_pixels,
        value_range=model.value_range,
    )
    images, left_out = readable(files, decode, "look.images")
    references, classes, known = _references(context, decode)
    digests = [f"{file.name} {file.digest}" for file in (*files, *known)]
    return Asked(model, decode, images, left_out, references, classes, digests)


def run(context: Context, tracker: Any) -> dict[str, Any]:
    """Writes pictures and the page, and shows two pictures in the run's report."""
    request = asked(context)
    for sentence in request.left_out:
        log.warning("%s", sentence)
    asking = context.config.look
    seen = _see(request, context.config)
    facts = {
        "model": request.model.name,
        "images": f"{len(request.images)}"
        + f", {len(request.left_out)} not read" * bool(request.left_out),
        "block": "the last" if asking.block is None else str(asking.block),
    }
    names = ", ".join(request.classes.names) if request.classes else ""
    if names:
        how = "mean patch" if asking.method == "mean" else f"{asking.k} nearest patches"
        facts["masks"] = f"{names}; by the {how}"
    now("look: writing pictures")
    target = _folder(context)
    page, last = str(join(target, PAGE)), context.folder.last("look")
    drawn, files = _write_pictures(target, seen, request)
    _write_page(target, sections(drawn, seen, request.classes, facts, request.left_out), drawn)
    _delete(target, set(last["files"] if last.get("page") == page else ()) - set(files))
    for name in ("attention", "components", "similarity", "classes"):
        if name in drawn[0].pictures:
            tracker.picture(name, 0, overview(drawn, name, TILE), captions.LOOK[name])
    if isinstance(target, Path):
        tracker.artifact(target / PAGE)
    heads = f"attention of {len(seen.attention[0])} heads" if seen.attention else seen.no_attention
    text = (
        f"{_images(drawn)} by {request.model.name}: {heads}; components, "
        f"{seen.foreground:.0%} of patches are object"
        + f"; masks of {names}" * bool(names)
        + f"; {public(page)}"
    )
    result_line("look", text)
    tracker.note(text)
    return {"text": text, "page": page, "files": files, "left_out": request.left_out}


def describe(context: Context) -> str:
    """What a run would do, in a line; opens the model, and refuses what it cannot look at."""
    request = asked(context)
    _opened(request.model, _question(request, context.config), request.images, gpu=False)
    return (
        f"{_images(request.images)} by {request.model.name}; page and pictures in "
        f"{public(_folder(context))}"
    )


def _images(several: Sequence[object]) -> str:
    return f"{len(several)} image" + "s" * (len(several) != 1)


def _model(context: Context) -> EmbedderSpec:
    config = context.config
    name = config.look.model
    if not name:
        saved = state.latest(context.folder.checkpoints)
        if saved is None:
            raise ConfigError(
                f"no model to look with: look.model is empty, {context.folder} has no checkpoint",
                "give model=runs/NAME, weights, or model=timm:NAME",
            )
        name = str(chosen(context).path)
    augment = config.augment
    spec = embedder_of(  # of its own size: an embedder takes squares of whole patches only
        name,
        mean=augment.mean,
        std=augment.std,
        folder=config.run.folder,
    )
    if spec.kind != BACKBONE:
        raise DataError(
            f"look.model={public(name)} gives vectors only, and a look needs patches",
            "give a run, weights, or timm:NAME of a vision transformer",
        )
    return spec


def _references(
    context: Context, decode: Decode
) -> tuple[tuple[tuple[Pixels, Any], ...], Classes | None, list[File]]:
    asking = context.config.look
    if not asking.reference:
        return (), None, []
    files = read_files(asking.reference, "look.reference")
    masks = read_files(asking.mask, "look.mask")
    if len(files) != len(masks):
        raise DataError(
            f"look.reference names {len(files)} images, and look.mask {len(masks)} masks",
            "give one mask for each reference, in the same order",
        )
    _, left_out = readable(files, decode, "look.reference")
    if left_out:
        raise DataError(f"look.reference: {left_out[0]}", "name files that are images")
    images = [(file.name, decode(file.content)) for file in files]
    pairs = [(mask.name, mask.content) for mask in masks]
    ids, classes = read_masks(pairs, asking.classes, asking.void)
    for (name, pixels), mask, file in zip(images, ids, masks, strict=True):
        if pixels.shape[:2] != mask.shape:
            (height, width), (rows, columns) = pixels.shape[:2], mask.shape
            raise DataError(
                f"look.mask: {file.name} has {columns} x {rows} pixels, its reference {name} "
                f"{width} x {height}",
                "give a mask of the same size as its image",
            )
    known = tuple((pixels, mask) for (_, pixels), mask in zip(images, ids, strict=True))
    return known, classes, [*files, *masks]


def _question(request: Asked, config: Config) -> partial[Question]:
    """All but the size of images where the recipe leaves it to the model."""
    asking = config.look
    mark = asking.mark.split(",")
    question = partial(
        Question,
        mean=request.model.mean,
        std=request.model.std,
        block=-1 if asking.block is None else asking.block,
        mark=(int(mark[0]), int(mark[1])) if asking.mark else None,
        references=request.references,
        classes=len(request.classes.ids) if request.classes else 0,
        method=asking.method,
        k=asking.k,
    )
    return partial(question, image_size=asking.image_size) if asking.image_size else question


def _see(request: Asked, config: Config) -> Seen:
    question = _question(request, config)
    now(f"look: {_images(request.images)}")
    inputs = (request.model, question, request.images, request.decode)
    if config.train.device == "cpu":
        return _look(*inputs, gpu=False)
    import ray

    if ray.cluster_resources().get("GPU", 0) < 1:  # torch is loaded here, a task loads it again
        return _look(*inputs, gpu=False)
    seen: Seen = ray.get(
        ray.remote(_look).options(num_cpus=1, num_gpus=1).remote(*inputs, gpu=True)
    )
    return seen


def _look(
    spec: EmbedderSpec, question: partial[Question], images: list[File], decode: Decode, gpu: bool
) -> Seen:
    network, complete = _opened(spec, question, images, gpu)
    return look(network, (decode(file.content) for file in images), complete)


def _opened(
    spec: EmbedderSpec, question: partial[Question], images: Sequence[File], gpu: bool
) -> tuple[Any, Question]:
    """The network, and the question with its image size, once it is sure that they fit."""
    embedder = open_embedder(spec, gpu=gpu, threads=len(os.sched_getaffinity(0)))
    complete = question(**{"image_size": embedder.size, **question.keywords})
    references = [
        (f"reference {number}", pixels.shape[0], pixels.shape[1])
        for number, (pixels, _) in enumerate(complete.references, 1)
    ]
    check(embedder.network, complete, [(file.name, *file.size) for file in images], references)
    return embedder.network, complete


def _folder(context: Context) -> Place:
    out = context.config.look.out
    return absolute_uri(out) if out else context.folder.stage("look")


def _write_pictures(target: Place, seen: Seen, request: Asked) -> tuple[list[Drawn], list[str]]:
    """Writes the PNG files; gives small pictures for the page, and the names of the files."""
    fs, folder = resolve_uri(str(target))
    make_folder(fs, folder)
    kept, written = [], []
    images = ((file.name, request.decode(file.content)) for file in request.images)
    for number, one in enumerate(draw(images, seen, request.classes), 1):
        contents = {one.file(number, name): png(shown) for name, shown in one.pictures.items()}
        if one.mask is not None and request.classes:
            contents[one.file(number, "mask")] = request.classes.encoded(one.mask)
        for name, content in contents.items():
            write_bytes_atomic(content, fs, f"{folder}/{name}")
        written += list(contents)
        kept.append(one.small(request.classes))
    return kept, written


def _write_page(target: Place, page: Sequence[Section], drawn: Sequence[Drawn]) -> None:
    fs, folder = resolve_uri(str(target))
    with atomic_path(fs, f"{folder}/{PAGE}") as local:
        write_report(Path(local), "Look", page, _images(drawn), limit=PAGE_BYTES)


def _delete(target: Place, names: Iterable[str]) -> None:
    """Takes away pictures of an earlier look at the same place."""
    fs, folder = resolve_uri(str(target))
    for name in names:
        delete_file(fs, f"{folder}/{Path(name).name}")
