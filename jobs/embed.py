"""Makes a table of vectors of images, by a run, weights, a timm model, ONNX or the descriptor.

    python jobs/embed.py model=runs/photos data.source=photos/
    python jobs/embed.py model=runs/photos/weights/huggingface data.shards=shards/ --dry-run
    python jobs/embed.py configs/demo.yaml embed.outputs=[cls,mean,patches]

A source is packed into runs/<name>/shards first; without run.name the run is called embed. Writes
runs/<name>/vectors (parquet, see docs/embed.md) and lists bad images in runs/<name>/embed. Without
model= the run's own teacher embeds the run's images. The same command goes on after a kill.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job needs no installed package

from pipeline.job import main

if __name__ == "__main__":
    main(["pack", "embed"], __doc__, shorthand={"model": "embed.model", "vectors": "embed.vectors"})
