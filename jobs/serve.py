"""Serves a model and its vectors: a page to search, an endpoint for programs.

`python jobs/serve.py --help` says how it is typed; pipeline/commands/ has it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job needs no installed package

from pipeline.entry import command

if __name__ == "__main__":
    command("serve")
