"""What went in: curation in five numbers, the sets, and what all of it cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.report.page import Bar, Bars, Heading, Links, Numbers, Section, Table, Text
from pipeline.report.units import bytes_of, time_of
from pipeline.run_report.facts import RunFacts
from pipeline.run_report.words import images, speed, stage_name
from pipeline.uri import public

COPIES = ("duplicate_bytes", "duplicate_near")
POOR = ("undecodable", "too_small", "aspect", "flat")
CHOICE = ("not_retrieved", "balanced_out")
BUILTIN = "photographs that come with scikit-image and scikit-learn"
REPORT = "curate/report.html"
NOT_CURATED = (
    "Nothing was curated: the network was trained on all packed images. curate.preset=dedup takes "
    "copies and images without content away."
)
SETS = {"train": "training", "queries": "test", "reference": "reference", "keep": "guard"}


def curation_sections(facts: RunFacts) -> Iterator[Section]:
    """Five numbers and the way to curation's own report, or that nothing was curated."""
    done = facts.result("curate")
    if not done or not facts.config.curate.preset:
        if "pretrain" in facts.results:
            yield Heading("Curation")
            yield Text(NOT_CURATED)
        return
    reasons: Mapping[str, int] = done.get("reasons", {})
    whole, kept = int(done.get("images_in", 0)), int(done.get("images", 0))

    def count(names: tuple[str, ...]) -> int:
        return sum(int(reasons.get(name, 0)) for name in names)

    numbers = [
        (f"{whole:,}", "images in"),
        (f"{kept:,}", f"kept ({100 * kept / whole:.1f}\u00a0%)" if whole else "kept"),
        (f"{count(COPIES):,}", "copies of another image"),
        (f"{count(POOR):,}", "fail a quality rule"),
        (f"{count(('leaks_evaluation',)):,}", "copies of test images"),
    ]
    chosen = count(CHOICE)
    text = ""
    if chosen:
        text = f"{images(chosen)} more are left out so that common things do not drown rare ones."
    yield Heading("Curation", "Each image has exactly one reason to stay or to go.")
    yield Numbers(numbers, note=text)
    if (facts.path / REPORT).is_file():
        yield Links([("What was left out, with pictures", REPORT)])


def data_sections(facts: RunFacts) -> Iterator[Section]:
    """The sets with their sizes, where they are from, and what was left out of them."""
    packs = facts.result("pack")
    packed = {name: packs[name] for name in SETS if isinstance(packs.get(name), dict)}
    sources = {name: str(one["source"]) for name, one in facts.datasets("pack").items()}
    rows = [_packed(facts, name, one, sources.get(name, "")) for name, one in packed.items()]
    trained = facts.training_images()
    if not rows and facts.card:
        sets = [("reference", facts.card.reference), ("test", facts.card.queries)]
        rows = [
            [name, one.images, len(one.class_names) or "", "", "", _from(one.name)]
            for name, one in sets
            if one
        ]
    if not rows and not trained:
        return
    names = ("set", "images", "classes", "size", "left out when packed", "from")
    text = f"The network was trained on {images(trained)}." if trained else ""
    yield Heading("Data", text)
    if rows:
        columns: dict[str, list[Any]] = {
            name: [row[i] for row in rows] for i, name in enumerate(names)
        }
        yield Table({name: values for name, values in columns.items() if any(map(str, values))})


def _packed(facts: RunFacts, name: str, one: Mapping[str, Any], source: str) -> list[Any]:
    left = [
        f"{int(number):,} {singular if number == 1 else plural}"
        for number, singular, plural in (
            (one.get("duplicates", 0), "identical file", "identical files"),
            (one.get("disagreeing", 0), "of them in another class", "of them in other classes"),
            (one.get("bad_images", 0), "broken", "broken"),
            (one.get("other_files", 0), "other file", "other files"),
        )
        if number
    ]
    return [
        SETS.get(name, name),
        int(one.get("images", 0)),
        one.get("classes") or "",
        bytes_of(float(one.get("bytes", 0))),
        ", ".join(left) or "nothing",
        BUILTIN if source.startswith(f"{facts.folder.at('source')}/") else _from(source),
    ]


def _from(source: str) -> str:
    """The last parts of a path: what people call it."""
    shown = public(source).rstrip("/")
    parts = shown.split("/")
    return "/".join(parts[-3:]) if len(parts) > 4 else shown


def cost_sections(facts: RunFacts) -> Iterator[Section]:
    """Time, images, images a second, and the machine."""
    took = facts.seconds()
    if not took:
        return
    done = facts.result("pretrain")
    # the stages inside of a round are part of its time
    shown = {name: seconds for name, seconds in took.items() if "/" not in name}
    numbers = [(time_of(sum(shown.values())), "in all stages")]
    if per_second := float(done.get("images_per_s") or 0):
        numbers.append((speed(per_second), "images a second while training"))
    seen = int(done.get("step") or 0) * facts.config.optim.global_batch_size
    if seen:
        numbers.append((f"{seen:,}", "images seen in training"))
    if memory := float(done.get("peak_memory_gib") or 0):
        numbers.append((bytes_of(memory * 2**30), "of memory in a training process at most"))
    if size := float(facts.result("export").get("bytes") or 0):
        numbers.append((bytes_of(size), "of weights"))
    machine = str(done.get("machine", ""))
    yield Heading("Cost", f"Trained on a machine with {machine}." if machine else "")
    yield Numbers(numbers)
    yield Bars(
        [Bar(stage_name(name), [(s, "var(--c0)")], time_of(s)) for name, s in shown.items()],
        "Time of each stage",
    )
