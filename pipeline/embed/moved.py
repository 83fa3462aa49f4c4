"""Where the pictures and the model of a table are by now, if its run folder was moved whole."""

from __future__ import annotations

from collections.abc import Iterator

DEEPEST = 3  # folders of a run: export/onnx/<name>


def beside(vectors: str, place: str) -> Iterator[str]:
    """Places to look at, where what a table of vectors names is not where it was.

    A table keeps absolute places. Of a run in `a/` that is in `b/` by now, `a/shards` is
    `b/shards`. Whoever asks must compare digests: something else may have the same name.

    Args:
        vectors: address of the table, in the folder of a run.
        place: as the table has it.
    """
    run = vectors.rstrip("/").rpartition("/")[0]
    names = [name for name in place.split("/") if name]
    for depth in range(1, min(len(names), DEEPEST) + 1):
        there = "/".join([run, *names[-depth:]])
        if run and there != place.rstrip("/"):
            yield there
