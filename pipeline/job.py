"""The command line of all jobs: recipe, overrides, --help, --dry-run, one-sentence errors."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence

from pipeline import log
from pipeline.config.config import Config
from pipeline.config.load import describe, load
from pipeline.environment import prefer_utf8
from pipeline.errors import PipelineError
from pipeline.heartbeat import beating, doing

PLACES = (
    "Relative paths, in a recipe too, count from the folder where the job is started. "
    "A recipe that is\nnot there is looked for in the project's own folder."
)


def main(
    stages: Sequence[str],
    doc: str,
    arguments: Sequence[str] | None = None,
    shorthand: Mapping[str, str] | None = None,
    words: Sequence[str] = (),
    recipe: str = "",
    implied: Sequence[str] = (),
) -> None:
    """Runs stages with the process's arguments; exits 2 on a user's mistake.

    Args:
        stages: names in `pipeline.stages.ORDER`, or `doctor` or `serve` alone.
        doc: what `--help` says first.
        arguments: default: `sys.argv[1:]`.
        shorthand: short names of this job for fields, `{"model": "embed.model"}`; under `""` the
            list field that takes what is neither a recipe nor `name=value`.
        words: fields that take such words instead, one each, in this order.
        recipe: that is read where none is named.
        implied: `name=value` that this job means whatever a recipe says; the command line may say
            otherwise.
    """
    shorthand = shorthand or {}
    prefer_utf8()
    typed = list(sys.argv[1:] if arguments is None else arguments)
    flags = [a for a in typed if a.startswith("-")]
    if {"-h", "--help"} & set(flags):
        short = [f"{name} for {field}" for name, field in shorthand.items() if name]
        names = f"Short names here: {', '.join(short)}.\n\n" * bool(short)
        _print(
            f"{doc.strip()}\n\n{PLACES}\n\n{names}"
            f"Fields (section.field=value) [default]:{describe()}"
        )
        return
    log.configure()
    try:
        if unknown := [flag for flag in flags if flag != "--dry-run"]:
            raise PipelineError(
                f"unknown option {unknown[0].partition('=')[0]}" + "=…" * ("=" in unknown[0]),
                "options are --dry-run and --help; fields are set as section.field=value",
            )
        spelled = spelled_out([a for a in typed if not a.startswith("-")], shorthand, words)
        if recipe and not any(_is_recipe(one) for one in spelled):
            spelled = [recipe, *spelled]
        config = load([*implied, *spelled])
        with beating(), doing("loading the libraries"):
            _start(config, stages, dry=bool(flags))
    except PipelineError as error:
        if os.environ.get("PIPELINE_DEBUG"):
            raise
        sys.stdout.flush()
        sys.stderr.write(f"error: {error.what}\n" + (f"  {error.hint}\n" if error.hint else ""))
        sys.exit(2)
    except KeyboardInterrupt:
        if os.environ.get("PIPELINE_DEBUG"):
            raise
        sys.stdout.flush()
        sys.stderr.write("interrupted; the same command goes on from the last checkpoint\n")
        sys.exit(130)  # 128 + SIGINT


def spelled_out(
    arguments: Sequence[str], shorthand: Mapping[str, str], words: Sequence[str] = ()
) -> list[str]:
    """Arguments with the short names of a job as the fields that they stand for.

    Args:
        arguments: recipe, `name=value`, and what a job takes besides (images to look at).
        shorthand: as for `main`.
        words: as for `main`.

    Raises:
        PipelineError: more words than this job takes.
    """
    loose: list[str] = []
    fields = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name in shorthand:
            fields.append(f"{shorthand[name]}={value}")
        elif (
            ("" in shorthand or words)
            and not _is_recipe(argument)
            and not (equals and "/" not in name)
        ):
            loose.append(argument)
        else:
            fields.append(argument)
    if words:
        return [*fields, *_in_order(loose, words, fields)]
    if loose:  # a JSON list is a YAML one, whatever is in the names
        fields.append(f"{shorthand['']}={json.dumps(loose)}")
    return fields


def _in_order(loose: Sequence[str], words: Sequence[str], fields: Sequence[str]) -> list[str]:
    """Words as the fields that they stand for; a field that is set by its name takes none."""
    named = {field.partition("=")[0] for field in fields}
    free = [field for field in words if field not in named]
    if len(loose) > len(free):
        raise PipelineError(
            f"{loose[len(free)]} is one word too many",
            f"words are, in this order, {', '.join(words)}; everything else is name=value",
        )
    return [f"{field}={word}" for field, word in zip(free, loose, strict=False)]


def _is_recipe(argument: str) -> bool:
    return "=" not in argument and argument.endswith((".yaml", ".yml"))


def _start(config: Config, stages: Sequence[str], dry: bool) -> None:
    if list(stages) == ["serve"]:
        from pipeline.stages.serve import serve

        with doing("opening what is served"):
            serve(config, dry)
    elif list(stages) == ["start"]:
        from pipeline.start.start import start

        with doing("looking at the images"):
            start(config, dry)
    elif dry:
        from pipeline.doctor.dry_run import dry_run

        with doing("checking what the job would do"):
            dry_run(config, stages)
    elif list(stages) == ["doctor"]:
        from pipeline.doctor.doctor import doctor

        with doing("looking at this machine and the shards"):
            doctor(config)
    else:
        from pipeline.rounds import run

        with doing("looking at the inputs"):
            run(config, stages)


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
