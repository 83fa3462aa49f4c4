"""The command line of all jobs: recipe, overrides, --help, --dry-run, one-sentence errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

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


def main(stages: Sequence[str], doc: str, arguments: Sequence[str] | None = None) -> None:
    """Runs stages with the process's arguments; exits 2 on a user's mistake.

    Args:
        stages: names in `pipeline.stages.ORDER`, or `doctor` alone.
        doc: what `--help` says first.
        arguments: default: `sys.argv[1:]`.
    """
    prefer_utf8()
    given = list(sys.argv[1:] if arguments is None else arguments)
    flags = [a for a in given if a.startswith("-")]
    if {"-h", "--help"} & set(flags):
        _print(f"{doc.strip()}\n\n{PLACES}\n\nFields (section.field=value) [default]:{describe()}")
        return
    log.configure()
    try:
        if unknown := [flag for flag in flags if flag != "--dry-run"]:
            raise PipelineError(
                f"unknown option {unknown[0].partition('=')[0]}" + "=…" * ("=" in unknown[0]),
                "options are --dry-run and --help; fields are set as section.field=value",
            )
        config = load([a for a in given if not a.startswith("-")])
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


def _start(config: Config, stages: Sequence[str], dry: bool) -> None:
    if dry:
        from pipeline.stages.dry_run import dry_run

        with doing("checking what the job would do"):
            dry_run(config, stages)
    elif list(stages) == ["doctor"]:
        from pipeline.stages.doctor import doctor

        with doing("looking at this machine and the shards"):
            doctor(config)
    else:
        from pipeline.stages import run

        with doing("looking at the inputs"):
            run(config, stages)


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
