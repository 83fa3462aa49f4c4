"""The commands of the chain, from images to weights."""

from __future__ import annotations

from pipeline.commands.command import Command

TRAINING = (
    "data.source", "evaluate.queries", "run.name", "run.folder", "optim.passes",
    "optim.global_batch_size", "optim.lr", "train.accumulation", "train.device",
)  # fmt: skip

START = Command(
    "start",
    ("start",),
    "Looks at images and machine, and writes the recipe that fits, with reasons.",
    (
        "python jobs/start.py photos/",
        "python jobs/start.py photos/ weights.safetensors     adapts these weights",
        "python jobs/start.py photos/ gpu_gb=24 --dry-run     for a GPU of that size, anywhere",
    ),
    """
Writes photos.yaml, each value with its reason as a comment, and says what to run. --dry-run writes
nothing and says steps, memory, disk and hours. With RAY_ADDRESS set it asks that cluster what it
has. Any field that you set stands in the recipe as you give it.
""",
    (
        "data.source", "model.init", "start.recipe", "evaluate.queries", "start.gpu_gb",
        "start.hours", "optim.passes", "curate.preset",
    ),
    {
        "recipe": "start.recipe",
        "weights": "model.init",
        "data": "data.source",
        "queries": "evaluate.queries",
        "gpu_gb": "start.gpu_gb",
        "hours": "start.hours",
    },
    ("data.source", "model.init"),
)  # fmt: skip
RUN = Command(
    "run",
    ("pack", "curate", "adapt", "pretrain", "evaluate", "export", "embed", "search", "look"),
    "Runs the whole chain, from images to weights and a verdict; skips what is done.",
    (
        "python jobs/run.py configs/demo.yaml",
        "python jobs/run.py configs/small.yaml data.source=photos/ run.name=photos --dry-run",
        "python jobs/run.py configs/vits14.yaml data.source=photos/ run.name=photos",
    ),
    """
The first word is a recipe, such as jobs/start.py writes; behind it its fields are set. The same
command again goes on where the last one stopped. Writes runs/<name>/: report.html, weights/, …
""",
    (*TRAINING, "curate.preset"),
    {"rounds": "curate.rounds"},
)
ADAPT = Command(
    "adapt",
    ("pack", "curate", "adapt", "pretrain", "evaluate", "export"),
    "Adapts released weights to your images, and measures what that did.",
    (
        "python jobs/adapt.py weights.safetensors photos/",
        "python jobs/adapt.py timm:vit_small_patch14_dinov2 photos/ queries=val/ run.name=leaves",
        "python jobs/adapt.py dinov2_vits14.pth photos/ optim.steps=500 --dry-run",
    ),
    """
The first word names weights: a dinov2 .pth, a Hugging Face or timm folder, .safetensors, timm:NAME,
or a run or export of ours. The second names images, with a folder for each class where there are
classes. The recipe is derived from both and printed with reasons; what you set stays.
""",
    (
        "model.init", "data.source", "evaluate.queries", "run.name", "run.folder", "optim.steps",
        "optim.lr", "train.tune", "curate.preset",
    ),
    {"weights": "model.init", "data": "data.source", "queries": "evaluate.queries"},
    ("model.init", "data.source"),
    "configs/adapt.yaml",
    ("adapt.enabled=true",),
)  # fmt: skip
PACK = Command(
    "pack",
    ("pack",),
    "Packs images into image shards.",
    (
        "python jobs/pack.py data.source=photos/ data.shards=shards/",
        "python jobs/pack.py data.source=photos/ run.name=photos --dry-run",
        "python jobs/pack.py 'data.source=hub/train-*.parquet' run.name=hub",
    ),
    """
A source is a folder of any depth, tar or zip files, hub-style parquet or image shards, local or a
URI. Bad images are listed in runs/<name>/pack/bad_images_train.parquet with their reason.
""",
    (
        "data.source", "data.shards", "run.name", "run.folder", "data.labels", "data.image_column",
        "data.label_column", "data.max_bad_fraction", "data.follow_links", "data.shard_mb",
    ),
)  # fmt: skip
CURATE = Command(
    "curate",
    ("curate",),
    "Chooses the images worth training on, and says of each other one why it is not.",
    (
        "python jobs/curate.py configs/curate.yaml data.shards=shards/",
        "python jobs/curate.py configs/curate.yaml data.shards=shards/ --dry-run",
        "python jobs/curate.py configs/curate.yaml curate.query=photo.jpg",
    ),
    """
Writes runs/<name>/curated (image shards), runs/<name>/curate/steps/decisions (a row an image) and
runs/<name>/curate/report.html. curate.query only says whether that image is a copy of one that was
curated before.
""",
    (
        "data.shards", "run.name", "curate.preset", "curate.embedder", "curate.shards",
        "curate.query", "dedup.threshold", "quality.min_sharpness", "balance.images",
    ),
)  # fmt: skip
PRETRAIN = Command(
    "pretrain",
    ("pretrain",),
    "Trains a DINOv2 backbone on image shards; the same command again resumes.",
    (
        "python jobs/pretrain.py configs/cifar10.yaml data.shards=shards/ optim.lr=1e-3",
        "python jobs/pretrain.py configs/cifar10.yaml data.shards=shards/ --dry-run",
        "python jobs/pretrain.py configs/vits14.yaml data.shards=s3://bucket/shards",
    ),
    """
Writes runs/<name>/checkpoints and metrics.jsonl. Ctrl-C or SIGTERM end it in a checkpoint.
""",
    ("data.shards", "model.init", *TRAINING[1:]),
)
EVALUATE = Command(
    "evaluate",
    ("pack", "evaluate"),
    "Says how good a backbone is: a card of scores beside baselines, and a verdict.",
    (
        "python jobs/evaluate.py model=runs/photos data=labelled/ queries=test/",
        "python jobs/evaluate.py models=[timm:vit_small_patch14_dinov2,runs/photos] data=labelled/",
        "python jobs/evaluate.py configs/cifar10.yaml evaluate.queries=cifar10/test",
    ),
    """
The first scores a run, the second two models side by side, the third the run of the recipe. data is
a folder with a folder for each class, packed shards, or vectors of jobs/embed.py. Without queries
each image is classified by the others. Writes runs/<name>/evaluate/card.html and card.json.
""",
    (
        "evaluate.models", "evaluate.reference", "evaluate.queries", "evaluate.scores",
        "evaluate.decide_by", "evaluate.image_size", "evaluate.dense", "evaluate.cards", "run.name",
    ),
    {
        "model": "evaluate.models",
        "models": "evaluate.models",
        "data": "evaluate.reference",
        "queries": "evaluate.queries",
        "scores": "evaluate.scores",
        "dense": "evaluate.dense",
        "dense_queries": "evaluate.dense_queries",
        "cards": "evaluate.cards",
    },
)  # fmt: skip
EXPORT = Command(
    "export",
    ("export",),
    "Writes the teacher's backbone as safetensors, loads it back and compares.",
    (
        "python jobs/export.py configs/cifar10.yaml",
        "python jobs/export.py run.name=photos export.onnx=true",
        "python jobs/export.py run.name=photos --dry-run",
    ),
    """
Writes runs/<name>/weights/: dinov2, huggingface and timm, as each of them reads it; with
export.onnx=true ONNX too.
""",
    (
        "run.name", "run.folder", "export.onnx", "export.onnx_sizes", "export.checkpoint",
    ),
)  # fmt: skip
COMMANDS = (START, RUN, ADAPT, PACK, CURATE, PRETRAIN, EVALUATE, EXPORT)
