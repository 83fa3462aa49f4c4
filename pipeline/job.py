"""The command line of all jobs: recipe, overrides, --help, --dry-run, one-sentence errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from pipeline import log
from pipeline.environment import prefer_utf8
from pipeline.errors import PipelineError
from pipeline.overrides import describe, load


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
        _print(f"{doc.strip()}\n\nFields (section.field=value) [default]:{describe()}")
        return
    log.configure()
    try:
        checking = list(stages) == ["doctor"]
        options = [] if checking else ["--dry-run"]
        if unknown := [flag for flag in flags if flag not in options]:
            raise PipelineError(
                f"unknown option {unknown[0].partition('=')[0]}",
                f"{'options are --dry-run and' if options else 'the option is'} --help; "
                "fields are set as section.field=value",
            )
        config = load([a for a in given if not a.startswith("-")])
        if checking:
            from pipeline.stages.doctor import doctor

            doctor(config)
            return
        if flags:
            from pipeline.stages.dry_run import dry_run

            dry_run(config, stages)
            return
        from pipeline.stages import run

        run(config, stages)
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


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
