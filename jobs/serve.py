"""Serves a model and its vectors: a page to browse and search, and an endpoint for programs.

    python jobs/serve.py model=runs/photos vectors=runs/photos/vectors

It prints an address with a token, for this machine alone. Ctrl-C ends it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job needs no installed package

from pipeline.job import main

if __name__ == "__main__":
    main(
        ["serve"],
        __doc__,
        shorthand={
            "model": "serve.model",
            "vectors": "serve.vectors",
            "host": "serve.host",
            "port": "serve.port",
            "replicas": "serve.replicas",
            "gpus": "serve.gpus",
        },
    )
