"""Does curating with what was trained pay? Two rounds against a random part of the same size.

    python benchmarks/rounds_pay.py --cifar cifar10/ --photos imagenet-samples/ --seeds 0,1,2

The pile is what a crawl brings: of CIFAR-10's training split a long tail (the rarest class has a
hundredth of the images of the most frequent one; which is which is drawn), near copies of a few of
its images, images of other things (crops of photos), and flat pictures. A user has 20 images of
each class that show what is wanted: seeds of the retrieval and nothing else. For each seed:

    rounds   `rounds=2`: round 1 trains on the pile without copies and junk; round 2 on what the
             backbone of round 1 retrieves for the seeds, and a balanced sample
    random   a random part of the pile, of as many images as round 2 has, for the same steps
    clean    likewise, a random part of what round 1 trained on (no copies, no junk)

2,000 test images are asked, 200 of each class; 5,000 training images vote, 500 of each class, that
are in no pile. Intervals are over seeds and images: both are drawn with replacement.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from curation_pays import flat, near_copy, png  # noqa: E402

from pipeline.card.files import read_card  # noqa: E402

CLASSES, SIDE = 10, 32
OTHER, JUNK = 10, 11  # labels of what is no image of a class; nothing trains on labels
VOTES, ASKED, WANTED = 500, 200, 20  # of each class: that vote, are asked, are seeds
DRAWS = 10_000


def split(cifar: Path, pattern: str) -> tuple[list[bytes], np.ndarray]:
    """The encoded images of a split, and their labels."""
    tables = [pq.read_table(path) for path in sorted(cifar.glob(pattern))]
    column = "img" if "img" in tables[0].column_names else "image"
    images = [row["bytes"] for table in tables for row in table.column(column).to_pylist()]
    return images, np.concatenate([table.column("label").to_numpy() for table in tables])


def write(place: Path, rows: list[tuple[bytes, int]], parts: int = 1) -> None:
    """Hub-style parquet."""
    place.mkdir(parents=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for part in range(parts):
        some = rows[part::parts]
        images = pa.array([{"bytes": one, "path": None} for one, _ in some], kind)
        table = pa.table({"image": images, "label": pa.array([x for _, x in some], pa.int64())})
        pq.write_table(table, place / f"{place.name}-{part:05d}.parquet", row_group_size=1000)


def crops(photos: Path, count: int, rng: np.random.Generator) -> list[bytes]:
    """Parts of photos, at the size of the others."""
    files, made = (
        sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpeg", ".jpg", ".png")),
        [],
    )
    for number in rng.permutation(np.resize(np.arange(len(files)), count)):
        image = Image.open(files[number]).convert("RGB")
        side = int(min(image.size) * rng.uniform(0.3, 0.9))
        left, top = (int(rng.integers(0, full - side + 1)) for full in image.size)
        part = image.crop((left, top, left + side, top + side))
        made.append(png(part.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
    return made


def sets(folder: Path, seed: int, options: argparse.Namespace) -> None:
    """The pile of a seed, its seed images, and the images that vote and are asked."""
    rng = np.random.default_rng(seed)
    images, labels = split(Path(options.cifar), "train*.parquet")
    asked, answers = split(Path(options.cifar), "test*.parquet")
    of_class = [rng.permutation(np.flatnonzero(labels == c)) for c in range(CLASSES)]
    sizes = np.round(options.head * options.tail ** (-np.arange(CLASSES) / (CLASSES - 1)))
    sizes = rng.permutation(sizes.astype(int))
    votes = [(images[i], c) for c, own in enumerate(of_class) for i in own[:VOTES]]
    wanted = [i for own in of_class for i in own[VOTES : VOTES + WANTED]]
    start = VOTES + WANTED
    pool = [(images[i], c) for c, own in enumerate(of_class) for i in own[start : start + sizes[c]]]
    sources = [pool[i] for i in rng.choice(len(pool), options.sources, replace=False)]
    pile = list(pool)
    for number in rng.integers(0, len(sources), options.copies):
        data, label = sources[number]
        pile.append((near_copy(Image.open(io.BytesIO(data)).convert("RGB"), rng), label))
    pile += [(one, OTHER) for one in crops(Path(options.photos), options.others, rng)]
    pile += [(flat(SIDE, rng), JUNK) for _ in range(options.junk)]
    write(folder / "pile", [pile[i] for i in rng.permutation(len(pile))], 4)
    write(folder / "votes", votes)
    write(folder / "asked", [
        (asked[i], c) for c in range(CLASSES)
        for i in rng.permutation(np.flatnonzero(answers == c))[:ASKED]
    ])  # fmt: skip
    write(folder / "wanted", [(images[i], int(labels[i])) for i in wanted])
    (folder / "sizes.json").write_text(json.dumps(sizes.tolist()))


def train(name: str, folder: Path, seed: int, options: argparse.Namespace, more: list[str]) -> Path:
    """The chain in a process of its own; gives its run folder."""
    command = [
        *(sys.executable, str(ROOT / "jobs/run.py"), str(ROOT / options.recipe)),
        *(f"run.folder={folder}/runs", f"run.name={name}", f"run.seed={seed}"),
        *(f"evaluate.reference={folder}/votes", f"evaluate.queries={folder}/asked"),
        *("evaluate.scores=[knn]", "evaluate.during_training=500", "track.system_metrics=false"),
        *("track.enabled=false", f"optim.steps={options.steps}", "export.checkpoint=last"),
        *(f"train.eval_every={options.steps}", *options.set, *more),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder / "runs" / name


def part(of: Path, to: Path, images: int, seed: int) -> None:
    """A random part of all rows of a folder of parquet files."""
    table = pa.concat_tables(
        [pq.read_table(path, columns=["image", "label"]) for path in sorted(of.glob("*.parquet"))]
    )
    drawn = np.sort(np.random.default_rng(1000 + seed).choice(len(table), images, replace=False))
    to.mkdir(parents=True)
    pq.write_table(table.take(drawn), to / "part-00000.parquet", row_group_size=500)


def composition(shards: Path) -> np.ndarray:
    """Images of each class, of other things and of junk."""
    labels = [
        pq.read_table(p, columns=["label"]).column("label").to_numpy()
        for p in sorted(shards.glob("*.parquet"))
    ]
    return np.bincount(np.concatenate(labels), minlength=JUNK + 1)


def described(counts: np.ndarray) -> str:
    """How many images, how many of them of a class, and how evenly these are spread."""
    own = counts[:CLASSES]
    share = own / own.sum()
    even = np.exp(-(share[share > 0] * np.log(share[share > 0])).sum())
    return (
        f"{counts.sum():,} images, {own.sum() / counts.sum():.2f} of a class "
        f"({even:.1f} classes in effect, the rarest {own.min()}), "
        f"{counts[OTHER]:,} of other things, {counts[JUNK]:,} flat"
    )


def hits(place: Path, model: int = 0) -> dict[bytes, float]:
    """By image, whether k-NN is right: of the model of that number on a card."""
    models = [one for one in read_card(place).contenders if one.role == "model"]
    result = models[model].results["knn20_top1"]
    assert result.score is not None
    return {
        bytes(i): float(x) for i, x in zip(result.score.ids, result.score.terms[:, 0], strict=True)
    }


def one_seed(folder: Path, seed: int, arms: list[str], options: argparse.Namespace) -> None:
    """Runs what is not there yet; a run that was stopped goes on."""
    if not (folder / "sizes.json").is_file():
        sets(folder, seed, options)
    wanted = [
        "curate.preset=balanced", "curate.rounds=2", f"data.source={folder}/pile",
        f"retrieve.seeds.wanted={folder}/wanted", "retrieve.include=false",
        "retrieve.mode=sample", f"retrieve.neighbours={options.neighbours}",
        f"balance.images={options.balance}", "dedup.max_share=1", "data.label_column=label",
        *options.curate,
    ]  # fmt: skip
    loop = folder / "runs" / "rounds"
    if "rounds" in arms:
        train("rounds", folder, seed, options, wanted)
    if not (loop / "curated").is_dir():
        return
    images = int(composition(loop / "curated").sum())
    for arm, of in (("random", folder / "pile"), ("clean", loop / "round-1" / "curated")):
        if arm in arms:
            if not (folder / arm).is_dir():
                part(of, folder / arm, images, seed)
            train(arm, folder, seed, options, ["data.source=", f"data.shards={folder}/{arm}"])


def interval(differences: np.ndarray, rng: np.random.Generator) -> tuple[float, float, float]:
    """Mean and 95 % interval of values [seeds, images]: seeds, and images of each, are drawn."""
    seeds, images = differences.shape
    drawn = np.empty(DRAWS)
    for number in range(DRAWS):
        which = rng.integers(0, seeds, seeds)
        drawn[number] = np.mean(
            [differences[s, rng.integers(0, images, images)].mean() for s in which]
        )
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


def report(root: Path, seeds: list[int]) -> None:
    """The figures of all seeds whose runs are there."""
    values: dict[str, list[dict[bytes, float]]] = {}
    for seed in seeds:
        folder = root / f"seed-{seed}"
        runs = folder / "runs"
        print(f"seed {seed}, pile: {described(composition(folder / 'pile'))}")
        cards = {
            "round 1": (runs / "rounds" / "rounds", runs / "rounds" / "round-1" / "curated", 0),
            "round 2": (runs / "rounds" / "rounds", runs / "rounds" / "curated", 1),
            "random": (runs / "random" / "evaluate", folder / "random", 0),
            "clean": (runs / "clean" / "evaluate", folder / "clean", 0),
        }
        for arm, (card, shards, model) in cards.items():
            if (card / "card.json").is_file():
                right = hits(card, model)
                values.setdefault(arm, []).append(right)
                score = np.mean(list(right.values()))
                print(f"  {arm:<8} {score:.4f}  {described(composition(shards))}")
    rng = np.random.default_rng(0)
    for arm, each in values.items():
        matrix = np.array([[one[i] for i in sorted(one)] for one in each])
        mean, low, high = interval(matrix, rng)
        print(f"{arm:<8} {mean:.4f} [{low:.4f}, {high:.4f}]  {len(each)} seeds")
    for one, other in (("round 2", "random"), ("round 2", "clean"), ("round 2", "round 1")):
        pairs = list(zip(values.get(one, []), values.get(other, []), strict=False))
        if pairs:
            matrix = np.array([[a[i] - b[i] for i in sorted(a)] for a, b in pairs])
            mean, low, high = interval(matrix, rng)
            print(f"{one} - {other}: {mean:+.4f} [{low:+.4f}, {high:+.4f}]  {len(pairs)} seeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", required=True, help="folder of the hub's parquet files")
    parser.add_argument("--photos", required=True, help="folder of photos of other things")
    parser.add_argument("--folder", help="for piles and runs; default: a temporary one")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default="rounds,random,clean", help="empty: the figures alone")
    parser.add_argument("--recipe", default="configs/cifar10.yaml")
    parser.add_argument("--set", nargs="*", default=[], help="fields of all trainings")
    parser.add_argument("--curate", nargs="*", default=[], help="fields of the rounds")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--head", type=int, default=2500, help="images of the most frequent class")
    parser.add_argument("--tail", type=float, default=100, help="times as many as of the rarest")
    parser.add_argument("--copies", type=int, default=6000)
    parser.add_argument("--sources", type=int, default=150, help="images that are copied")
    parser.add_argument("--others", type=int, default=3000)
    parser.add_argument("--junk", type=int, default=2000)
    parser.add_argument("--neighbours", type=int, default=16)
    parser.add_argument("--balance", type=int, default=1000)
    options = parser.parse_args()
    root = Path(options.folder or tempfile.mkdtemp(prefix="rd")).absolute()
    options.cifar, options.photos = (Path(x).absolute() for x in (options.cifar, options.photos))
    seeds = [int(x) for x in options.seeds.split(",")]
    for seed in seeds:
        one_seed(root / f"seed-{seed}", seed, options.arms.split(","), options)
    report(root, seeds)


if __name__ == "__main__":
    main()
