"""Sends to MLflow what the journal of a run still holds, after the server was away.

    python jobs/sync.py runs/<name>             the rest
    python jobs/sync.py s3://bucket/runs/<name> likewise, of a run folder at a URI
    python jobs/sync.py runs/<name> --again     everything, e.g. to another server

The server is MLFLOW_TRACKING_URI, or the local one, which is started if it does not run. Runs that
are not there yet are made; runs that a killed job left open are ended.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job needs no installed package


def main(arguments: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    flags = {argument for argument in arguments if argument.startswith("-")}
    folders = [argument for argument in arguments if argument not in flags]
    if flags & {"-h", "--help"} or not folders or flags - {"--again"}:
        print(__doc__)
        return 0 if flags & {"-h", "--help"} else 2

    from pipeline import log
    from pipeline.environment import prefer_utf8
    from pipeline.errors import PipelineError
    from pipeline.stages.sync import sync_run
    from pipeline.uri import public

    prefer_utf8()
    log.configure()
    try:
        for folder in folders:
            sent = sync_run(folder, again="--again" in flags)
            print(f"{public(folder)}: {sent} sent")
    except PipelineError as error:
        if os.environ.get("PIPELINE_DEBUG"):
            raise
        sys.stdout.flush()
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
