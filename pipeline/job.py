"""The command line of all jobs: recipe, overrides, --help, --dry-run, one-sentence errors.

`python jobs/NAME.py` and, where the package is installed, `raydino NAME` are the same command.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata

from pipeline import log
from pipeline.commands.command import Command
from pipeline.commands.help import everything, index, nearest_command, screen, section
from pipeline.commands.table import COMMANDS
from pipeline.config.config import Config
from pipeline.config.load import load
from pipeline.environment import prefer_utf8
from pipeline.errors import ConfigError, PipelineError
from pipeline.heartbeat import FIRST_S, beating, doing
from pipeline.live import terminal

SYNC = "sync"
AGAIN = "--again"


def command(name: str, arguments: Sequence[str] | None = None) -> None:
    """Runs a command of the table with the process's arguments; exits 2 on a user's mistake.

    Args:
        name: in `pipeline.commands.table`.
        arguments: default: `sys.argv[1:]`.
    """
    _run(COMMANDS[name], list(sys.argv[1:] if arguments is None else arguments))


def raydino() -> None:
    """The command `raydino`: its first word names one of the table."""
    prefer_utf8()
    log.say_as_command()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        command(name, arguments)
    elif name in ("-h", "--help"):
        _print(index(_version()))
    elif name == "--version":
        _print(_version())
    else:
        _guarded(lambda: _unknown(name))


def main(
    stages: Sequence[str],
    doc: str,
    arguments: Sequence[str] | None = None,
    shorthand: Mapping[str, str] | None = None,
    words: Sequence[str] = (),
    recipe: str = "",
    implied: Sequence[str] = (),
) -> None:
    """Runs stages as a command that is not in the table; `Command` says what each argument is."""
    asked = Command(
        stages[-1],
        tuple(stages),
        doc.strip(),
        shorthand=shorthand or {},
        words=tuple(words),
        recipe=recipe,
        implied=tuple(implied),
    )
    _run(asked, list(sys.argv[1:] if arguments is None else arguments))


def _run(asked: Command, typed: list[str]) -> None:
    prefer_utf8()
    flags = [a for a in typed if a.startswith("-")]
    if text := [flag for flag in flags if flag == "-h" or flag.partition("=")[0] == "--help"]:
        _guarded(lambda: _print(_help(asked, text[0].partition("=")[2])))
        return
    log.configure()
    words = [a for a in typed if not a.startswith("-")]
    _guarded(lambda: _do(asked, flags, words))


def _help(asked: Command, what: str) -> str:
    if not what:
        return screen(asked)
    return everything(asked) if what == "all" else section(what)


def _do(asked: Command, flags: Sequence[str], typed: Sequence[str]) -> None:
    """Reads the config and starts the stages."""
    options = asked.flags or ("--dry-run",)
    if unknown := [flag for flag in flags if flag not in options]:
        raise PipelineError(
            f"unknown option {unknown[0].partition('=')[0]}" + "=…" * ("=" in unknown[0]),
            f"options are {', '.join(options)} and --help; fields are set as section.field=value",
        )
    if asked.stages == (SYNC,):
        _sync(typed, again=AGAIN in flags)
        return
    spelled = spelled_out(typed, asked.shorthand, asked.words)
    if asked.recipe and not any(_is_recipe(one) for one in spelled):
        spelled = [asked.recipe, *spelled]
    config = load([*asked.implied, *spelled])
    with terminal(), beating(first_s=FIRST_S), doing("loading the libraries"):
        _start(config, asked.stages, dry=bool(flags))


def _guarded(run: Callable[[], object]) -> None:
    """Says a user's mistake in one sentence and exits."""
    debug = os.environ.get("PIPELINE_DEBUG")
    try:
        run()
    except PipelineError as error:
        if debug:
            raise
        sys.stdout.flush()
        said = f"error: {error.what}\n" + (f"  {error.hint}\n" if error.hint else "")
        sys.stderr.write(log.as_typed(said))
        sys.exit(2)
    except KeyboardInterrupt:
        if debug:
            raise
        sys.stdout.flush()
        sys.stderr.write("interrupted; the same command goes on from the last checkpoint\n")
        sys.exit(130)  # 128 + SIGINT


def _unknown(name: str) -> None:
    near = nearest_command(name)
    hint = f"did you mean raydino {near}?" if near else "raydino --help lists them"
    raise ConfigError(f"no command {name}", hint)


def _version() -> str:
    try:
        return metadata.version("raydino")
    except metadata.PackageNotFoundError:  # a clone that is not installed
        return "(from a clone)"


def _sync(folders: Sequence[str], again: bool) -> None:
    """Sends what the journals of runs still hold.

    Raises:
        PipelineError: no folder is named, or it is none of a run, or the server refuses.
    """
    if not folders:
        raise PipelineError("no run is named", "python jobs/sync.py runs/<name>")
    from pipeline.stages.sync import sync_run
    from pipeline.uri import public

    for folder in folders:
        _print(f"{public(folder)}: {sync_run(folder, again=again)} sent")


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
    try:
        sys.stdout.write(log.as_typed(text) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        log.nobody_reads()
