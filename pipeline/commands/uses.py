"""The commands for a backbone in use, and for what is around a run."""

from __future__ import annotations

from pipeline.commands.command import Command

FINETUNE = Command(
    "finetune",
    ("pack", "finetune"),
    "Fine-tunes a backbone into a classifier of labelled images, and exports it.",
    (
        "python jobs/finetune.py model=runs/photos data=photos/ queries=val/",
        "python jobs/finetune.py model=timm:vit_small_patch16_224 data=photos/ finetune.tune=head",
        "python jobs/finetune.py model=runs/photos data=photos/ --dry-run",
    ),
    """
Classes are folders, or a label column. Without queries= a fifth of each class is held out and
scored. Writes runs/<name>/finetune/huggingface; without run.name the run is called finetune.
Without model= the run's own teacher is taken. The same command goes on after a kill.
""",
    (
        "finetune.model", "data.source", "evaluate.queries", "finetune.tune", "finetune.epochs",
        "finetune.lr", "finetune.label_fraction", "finetune.batch_size", "run.name",
    ),
    {"model": "finetune.model", "data": "data.source", "queries": "evaluate.queries"},
)  # fmt: skip
EMBED = Command(
    "embed",
    ("pack", "embed"),
    "Makes a table of vectors of images, by a run, weights, timm, ONNX or pixels.",
    (
        "python jobs/embed.py model=runs/photos data.source=photos/",
        "python jobs/embed.py model=runs/photos/weights/huggingface data.shards=shards/ --dry-run",
        "python jobs/embed.py configs/demo.yaml embed.outputs=[cls,mean,patches]",
    ),
    """
A source is packed into runs/<name>/shards first; without run.name the run is called embed. Writes
runs/<name>/vectors (parquet, see docs/embed.md) and lists bad images in runs/<name>/embed. Without
model= the run's own teacher embeds the run's images. The same command goes on after a kill.
""",
    (
        "embed.model", "data.source", "data.shards", "embed.vectors", "embed.outputs",
        "embed.image_size", "embed.batch_size", "run.name",
    ),
    {"model": "embed.model", "vectors": "embed.vectors"},
)  # fmt: skip
SEARCH = Command(
    "search",
    ("search",),
    "Finds what is like an image among images that are embedded.",
    (
        "python jobs/search.py vectors=runs/photos query=photo.jpg k=20",
        "python jobs/search.py vectors=runs/photos query=3f9a2c,other.png min_similarity=0.8",
        "python jobs/search.py vectors=runs/photos query=holiday/ run.name=holiday",
    ),
    """
A query is an image file, the id of an image of the set or its beginning, a folder of images, or
parquet of images or vectors. Writes search.html and neighbours.parquet into runs/search/search.
""",
    (
        "search.vectors", "search.query", "search.k", "search.min_similarity", "search.index",
        "search.model", "search.decisions", "run.name",
    ),
    {
        "vectors": "search.vectors",
        "query": "search.query",
        "k": "search.k",
        "index": "search.index",
        "model": "search.model",
        "min_similarity": "search.min_similarity",
    },
)  # fmt: skip
LOOK = Command(
    "look",
    ("look",),
    "Looks at images through a backbone: attention, parts, similarity, masks.",
    (
        "python jobs/look.py photo.jpg more/ model=runs/photos",
        "python jobs/look.py street.jpg model=runs/photos mark=120,80",
        "python jobs/look.py street.jpg model=runs/photos reference=other.jpg mask=other.png",
    ),
    """
Words are image files and folders. Writes look.html and PNGs.
""",
    (
        "look.model", "look.image_size", "look.block", "look.mark", "look.reference", "look.mask",
        "look.method", "look.k", "look.count", "look.out",
    ),
    {
        "": "look.images",
        "model": "look.model",
        "image_size": "look.image_size",
        "block": "look.block",
        "mark": "look.mark",
        "reference": "look.reference",
        "mask": "look.mask",
        "void": "look.void",
        "method": "look.method",
        "k": "look.k",
        "count": "look.count",
        "out": "look.out",
    },
)  # fmt: skip
SERVE = Command(
    "serve",
    ("serve",),
    "Serves a model and its vectors: a page to search, an endpoint for programs.",
    (
        "python jobs/serve.py model=runs/photos vectors=runs/photos/vectors",
        "python jobs/serve.py vectors=runs/photos/vectors port=0",
    ),
    """
It prints an address with a token, for this machine alone. Ctrl-C ends it. It needs ray[serve].
""",
    (
        "serve.model", "serve.vectors", "serve.host", "serve.port", "serve.replicas", "serve.gpus",
        "serve.needs_token", "serve.max_mb",
    ),
    {
        "model": "serve.model",
        "vectors": "serve.vectors",
        "host": "serve.host",
        "port": "serve.port",
        "replicas": "serve.replicas",
        "gpus": "serve.gpus",
    },
)  # fmt: skip
DOCTOR = Command(
    "doctor",
    ("doctor",),
    "Says what this machine has and lacks; with shards, how fast it feeds images.",
    (
        "python jobs/doctor.py",
        "python jobs/doctor.py configs/vits14.yaml data.shards=shards/",
        "RAY_ADDRESS=auto python jobs/doctor.py",
    ),
    """
Without arguments: Python, packages, GPU, memory, disk, Ray, MLflow and compilers, each with what to
do, and a verdict. Where there are GPUs it compiles a kernel and adds numbers up over them: some
minutes. With shards it times reading and decoding. It writes nothing that stays.
""",
    ("data.shards", "data.source", "run.folder", "resources.cpus", "resources.object_store_gb"),
)
SYNC = Command(
    "sync",
    ("sync",),
    "Sends to MLflow what a run's journal still holds after the server was away.",
    (
        "python jobs/sync.py runs/<name>             the rest",
        "python jobs/sync.py s3://bucket/runs/<name> likewise, of a run folder at a URI",
        "python jobs/sync.py runs/<name> --again     everything, e.g. to another server",
    ),
    """
The server is MLFLOW_TRACKING_URI, or the local one, which is started if it does not run. Runs that
are not there yet are made; runs that a killed job left open are ended.
""",
    flags=("--again",),
)
COMMANDS = (FINETUNE, EMBED, SEARCH, LOOK, SERVE, DOCTOR, SYNC)
