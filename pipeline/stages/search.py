"""The search stage: what is like an image. Asked for alone it answers `search.query`, with no Ray;
in a whole chain it makes a page of neighbours of some images of the set.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config.config import Config
from pipeline.context import Context, result_line
from pipeline.embed.vectors import VectorSet, open_vectors
from pipeline.errors import ConfigError, DataError
from pipeline.heartbeat import now
from pipeline.pack.listing import Refused
from pipeline.search.answers import NEIGHBOURS, Answer, Answers, Neighbour, lines
from pipeline.search.decisions import Decisions
from pipeline.search.page import QUERIES, Pictures, Shown, said_of, write_page
from pipeline.search.queries import Asker, Reading, asked_for, bad_table
from pipeline.search.search import open_search, takes_index
from pipeline.storage.places import delete_file, resolve_uri
from pipeline.storage.run_folder import RunFolder, fingerprint
from pipeline.storage.transfer import parquet_writer_atomic, upload, write_parquet_atomic
from pipeline.uri import public

log = logging.getLogger("pipeline.search")

SAID = 3  # queries whose neighbours the console shows
PAGE, TABLE, BAD = "search.html", "neighbours.parquet", "bad.parquet"


def look_up(config: Config) -> None:
    """Answers `search.query`: a table on the console, a page and parquet in the run folder.

    Raises:
        PipelineError: nothing is asked, there are no vectors, a query cannot be used, or another
            job works in the run folder.
    """
    texts = asked_for(config.search.query)
    folder = RunFolder.of(config.run.folder, config.run.name)
    with folder.locked():  # or the page would be of one job, and the parquet of another
        _answer(config, folder, texts)


def _answer(config: Config, folder: RunFolder, texts: list[str]) -> None:
    vectors = _vectors(config, folder)
    answers = _opened(config, vectors)
    asker = Asker(vectors, answers.rows, answers.search, _reading(config))
    shown: list[Answer] = []
    queries = pairs = 0
    table = folder.at("search", TABLE)
    with parquet_writer_atomic(NEIGHBOURS, *resolve_uri(str(table))) as writer:
        for batch in asker.batches(texts):
            answered = answers.of(batch, config.search.k, config.search.min_similarity)
            writer.write_table(rows := answers.table(answered))
            shown += answered[: max(0, QUERIES - len(shown))]
            queries, pairs = queries + len(batch), pairs + len(rows)
            now(f"search: {queries:,} images asked for")
        _list_bad(asker.bad, queries, folder)
    told = answers.told(shown)
    for answer, neighbours in told if queries <= SAID else []:
        _say(answer, neighbours)
    texts = [_about(answers, config)]
    if queries > len(shown):
        texts.append(f"The first {len(shown)} of {queries:,} images that were asked for.")
    if asker.bad:
        texts.append(f"Files that are no usable images: {len(asker.bad):,}; {BAD} lists them.")
    pictures = Pictures.of(vectors, answers.rows, _most(config))
    page = _write_page(folder, answers, told, pictures, texts)
    result_line(
        "search",
        f"{pairs:,} neighbours of {queries:,} image{'s' * (queries != 1)}: {public(table)}",
    )
    result_line("page", page)


def describe(config: Config) -> None:
    """Says what a look-up would do; reads no vectors.

    Raises:
        PipelineError: nothing is asked, or there are no vectors.
    """
    folder = RunFolder.of(config.run.folder, config.run.name)
    texts, vectors = asked_for(config.search.query), _vectors(config, folder)
    how = "an index" if takes_index(vectors.rows, config.search.index) else "exact search"
    result_line("search", f"{vectors.rows:,} vectors of {vectors.facts['model']}, {how}")
    result_line("query", f"{len(texts):,} asked for: {', '.join(map(public, texts))}")
    result_line("output", f"{public(folder.at('search'))} (dry run: nothing is written)")


# ---- In a whole chain.


def check(config: Config, folder: RunFolder, embedding: bool) -> None:
    """What can be known to be wrong before a chain starts.

    Args:
        config: the recipe.
        folder: of the run.
        embedding: the chain makes the vectors itself.

    Raises:
        PipelineError: there will be no such vectors, or no index of them; or something is asked
            that a chain does not answer.
    """
    for name in ("query", "model"):
        if value := getattr(config.search, name):
            raise ConfigError(
                f"search.{name}={public(value)}, but a whole chain looks up no image of yours: it "
                f"shows {config.search.images} images of its set",
                f"leave search.{name} empty here, and ask with jobs/search.py when the run is done",
            )
    column, outputs = config.search.vectors_column, list[str](config.embed.outputs)
    if not embedding or config.search.vectors:
        outputs = list(_vectors(config, folder).outputs)
    if column not in outputs:
        raise ConfigError(
            f"search.vectors_column={column}, but the vectors have {', '.join(outputs)}",
            f"set embed.outputs=[{','.join([*outputs, column])}]",
        )
    takes_index(0, config.search.index)


def key(context: Context) -> str:
    """Changes with the vectors, the decisions that are shown on them, and what is asked."""
    settings = context.config.search
    vectors = _vectors(context.config, context.folder)
    decisions = Decisions.of(vectors.uri, settings.decisions)
    decided = decisions.key if decisions else ""
    return fingerprint([vectors.key, decided, settings.model_dump(mode="json")])


def intact(context: Context) -> bool:
    """Whether the page is still there."""
    return (context.folder.stage("search") / PAGE).is_file()


def run(context: Context, tracker: Any) -> dict[str, Any]:
    """A page of the neighbours of `search.images` images, see `evenly_picked`."""
    config, folder = context.config, context.folder
    vectors = _vectors(config, folder)
    answers = _opened(config, vectors)
    queries = answers.evenly_picked(config.search.images)
    answered = answers.of(queries, config.search.k, config.search.min_similarity)
    write_parquet_atomic(
        answers.table(answered),
        *resolve_uri(str(folder.at("search", TABLE))),
        row_group_size=65_536,
    )
    pictures = Pictures.of(vectors, answers.rows, _most(config))
    about = _about(answers, config)
    rule = f"{len(queries)} images at even steps through the ids of the set."
    page = _write_page(folder, answers, answers.told(answered), pictures, [about, rule])
    text = f"neighbours of {len(queries)} images, {about}"
    if agreed := _agreement(answers, answered):
        text += f"; {agreed}"
    result_line("search", text)
    if context.only:  # a whole run says it at its end
        result_line("page", page)
    tracker.artifact(folder.stage("search") / PAGE)
    tracker.note(text)
    index = answers.search.index
    return {"text": text, "page": page, "index": asdict(index) if index else None}


def _agreement(answers: Answers, answered: list[Answer]) -> str:
    """How many neighbours have the label of their query; "" without labels."""
    same = pairs = 0
    for answer in answered:
        label = answers.rows.labels[answer.query.row]
        others = answers.rows.labels[answer.rows]
        if label >= 0:
            same += int((others == label).sum())
            pairs += int((others >= 0).sum())
    return f"{same:,} of {pairs:,} neighbours have the label of their image" if pairs else ""


# ---- What both do.


def _vectors(config: Config, folder: RunFolder) -> VectorSet:
    place = config.search.vectors or config.embed.vectors or str(folder.uri or folder.path)
    return open_vectors(place, "search.vectors")


def _opened(config: Config, vectors: VectorSet) -> Answers:
    settings = config.search
    search = open_search(vectors, settings.vectors_column, settings.index, settings.memory_gib)
    if search.zeros:
        log.warning(
            "search      %s vectors are zero: they have no direction and are like nothing",
            f"{search.zeros:,}",
        )
    return Answers(vectors, search, Decisions.of(vectors.uri, settings.decisions))


def _reading(config: Config) -> Reading:
    return Reading(
        image_column=config.data.image_column,
        max_pixels=_most(config),
        max_image_bytes=int(config.data.max_image_mb * 2**20),
        threads=config.resources.threads or 1,
        model=config.search.model,
    )


def _most(config: Config) -> int:
    return config.data.max_image_pixels


def _about(answers: Answers, config: Config) -> str:
    search = answers.search
    how = f"index of {search.index.text()}" if search.index else "exact search"
    model = public(str(answers.vectors.facts["model"]))
    return f"{search.rows:,} images, {config.search.vectors_column} of {model}, {how}"


def _say(answer: Answer, neighbours: list[Neighbour]) -> None:
    result_line("query", public(answer.query.name))
    if said := said_of(answer, neighbours):
        result_line("", said)
    for line in lines(neighbours) if neighbours else ():
        result_line("", public(line))


def _list_bad(bad: list[Refused], queries: int, folder: RunFolder) -> None:
    """Writes the table of what cannot be asked for, or takes away that of another time.

    Raises:
        DataError: nothing can be asked for.
    """
    fs, path = resolve_uri(str(folder.at("search", BAD)))
    if not bad and not queries:
        raise DataError(
            "nothing is asked: search.query holds no image and no vector",
            "give an image file, an image id, or a folder of images",
        )
    if not bad:
        delete_file(fs, path)
        return
    write_parquet_atomic(bad_table(bad), fs, path, 65_536)
    first = f"{public(bad[0].source)} ({bad[0].reason}: {bad[0].detail})"
    if not queries:
        raise DataError(f"none of {len(bad):,} files is a usable image; the first: {first}")
    log.warning(
        "search      files that are no usable images: %s, listed in %s; the first: %s",
        f"{len(bad):,}",
        public(folder.at("search", BAD)),
        first,
    )


def _write_page(
    folder: RunFolder,
    answers: Answers,
    shown: list[Shown],
    pictures: Pictures,
    texts: list[str],
) -> str:
    """Writes the page into the run folder; gives its place."""
    if pictures.missing:
        log.warning("search      %s", pictures.missing)
    local: Path = folder.stage("search") / PAGE
    write_page(local, answers, shown, pictures, texts)
    place = folder.at("search", PAGE)
    if folder.uri:
        upload(local, *resolve_uri(str(place)))
    return public(place)
