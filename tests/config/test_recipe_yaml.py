"""YAML 1.2 as the specification has it; what is no recipe is one sentence, and at once."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.config import Config
from pipeline.config.load import field_paths, load
from pipeline.config.recipe_yaml import LARGEST, Unreadable, parsed
from pipeline.errors import ConfigError

# Text and value. The upper rows are those of YAML 1.2.2, sections 10.2.1 and 10.3.2.
MEANINGS: list[tuple[str, Any]] = [
    ("null", None), ("NULL", None), ("~", None), ("true", True), ("True", True), ("FALSE", False),
    ("0", 0), ("0o7", 7), ("0x3A", 58), ("-19", -19), ("12e03", 12000.0), ("-2E+05", -200000.0),
    ("0.", 0.0), ("-0.0", 0.0), (".5", 0.5), ("+12.3", 12.3), (".inf", math.inf),
    ("-.Inf", -math.inf), ("+.INF", math.inf),
    ("0100", 100), ("-010", -10), ("0o17", 15), ("1e-3", 0.001), ("5e4", 5e4), ("1e3", 1000.0),
    ("08", 8), ("1.", 1.0), ("685.230_15e+03", "685.230_15e+03"), ("1_000", "1_000"),
    ("1:30", "1:30"), ("12:30:45", "12:30:45"), ("190:20:30.15", "190:20:30.15"),
    ("0b1010", "0b1010"), ("0b", "0b"), ("0o8", "0o8"), ("-0x3A", "-0x3A"), ("1e", "1e"),
    (".", "."), ("e5", "e5"), ("no", "no"), ("Off", "Off"), ("y", "y"), ("tRUE", "tRUE"),
    ("Nan", "Nan"), ("inf", "inf"), ("2026-01-02", "2026-01-02"), ("=", "="), ("'5'", "5"),
    ('"true"', "true"), ("!!str 5", "5"), ("|\n 5", "5"), ("\ufeff5", 5),
]  # fmt: skip


def test_scalars_mean_what_the_specification_says() -> None:
    for text, value in MEANINGS:
        for got in (
            parsed(text),
            parsed(f"a: [{text}]" if "\n" not in text else f"a: {text}"),
        ):
            while isinstance(got, dict | list):
                got = got["a"] if isinstance(got, dict) else got[0]
            if "\ufeff" not in text or got == value:
                assert (type(got), got) == (type(value), value), text
    assert math.isnan(parsed(".nan")) and parsed("") is None


def test_mappings_that_are_merged() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {x: 3, z: 4}\nc: {<<: [*a, *b], y: 5}\nd: {'<<': 1}\n"
    assert parsed(text)["c"] == {"x": 1, "y": 5, "z": 4} == yaml.safe_load(text)["c"]
    assert parsed(text)["d"] == {"<<": 1}


BOMB = "x: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"y{i}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
REFUSED = [
    ("a: 1\nb: 2\na: 3", 3, "a stands twice, on lines 1 and 3"),
    ("a: {b: {c: 1,\n 'c': 2}}", 2, "c stands twice, on lines 1 and 2"),
    ("{a: 1, a: 1}", 1, "a stands twice, on line 1"),
    ("a: &a {b: 1}\nc:\n  <<: *a\n  <<: *a", 4, "<< stands twice, on lines 3 and 4"),
    ("a: &a {b: 1, b: 2}\nc: {<<: *a}", 1, "b stands twice"),
    ("yes: 1\nyes: 2", 2, "yes stands twice"),
    ("1: 1\n1: 2", 2, "1 stands twice"),
    ("a: [1, 2\n", 2, "expected ',' or ']'"),
    ("a:\n\tb: 1", 2, "a tab"),
    ("a: 1\n---\nb: 2", 2, "a second document"),
    ("? [a]\n: 1", 1, "a key must be a name"),
    ("a: *b", 1, "undefined alias"),
    ("a: b\x07", 1, "control character U+0007"),
    ("a\x00:\x00", 1, "control character U+0000"),
    ("a: !!python/object/apply:os.getcwd []", 1, "!!python/object/apply:os.getcwd"),
    ("a: !!int 5", 1, "!!int"),
    ("a: !!binary aGk=", 1, "!!binary"),
    ("a: !x {b: 1}", 1, "the tag !x"),
    ("a: {<<: 5}", 1, "takes a mapping"),
    ("a: &a {<<: *a}", 1, "leads too far"),
    ("a: &a [*a]", 1, "aliases"),
    (BOMB, 1, "aliases"),
    ("[" * 5000, 1, "levels deep"),
    ("- " * 5000, 1, "levels deep"),
    ("? " * 5000, 1, "levels deep"),
    ("\n".join(" " * i + "a:" for i in range(500)), 24, "levels deep"),
    ("a: " + "9" * 5000, 1, "a number of 5,000 characters"),
    ("a: 1." + "9" * 5000, 1, "a number of 5,002 characters"),
]


def test_what_has_no_meaning_is_said_with_its_line_and_at_once() -> None:
    begin = time.process_time()
    for text, line, why in REFUSED:
        with pytest.raises(Unreadable) as caught:
            parsed(text)
        assert (caught.value.line, why in caught.value.why) == (line, True), caught.value.why
        assert len(caught.value.why) < 120
    parsed("a: [" + "1," * 9000 + "1]")
    assert time.process_time() - begin < 10


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for content, said in (
        ("a: ö".encode("utf-16"), "UTF-16 text"),
        ("a: ö".encode("utf-32"), "UTF-32 text"),
        ("run:\n  name: ö".encode("latin-1"), "line 2 is not UTF-8 (byte 0xf6)"),
        (b"\x89PNG\r\n\x1a\n", "not UTF-8"),
        (b"#" * (LARGEST + 1), f"has {LARGEST + 1:,} bytes"),
        (b"- a\n- b", "holds a list"),
        (b"5", "holds a int"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load([str(path)])
        assert str(path) in caught.value.what and said in caught.value.what
        assert "\n" not in caught.value.what
    for name in ("x" * 5000, "a\x00b", str(tmp_path), ""):
        with pytest.raises(ConfigError, match="recipe") as caught:
            load([name])
        assert len(str(caught.value)) < 400


def test_text_fields_hold_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "größe=1" / "mine.yaml"  # also a path that looks like an override
    path.parent.mkdir()
    for name in ("no", "0100", "1e3", "true", "2026-01-02", "12:30", "0x1F", "größe", ".inf"):
        path.write_bytes(b"\xef\xbb\xbf" + f"run: {{name: {name}}}\n".encode())
        assert load([str(path)]).run.name == name == load([f"run.name={name}"]).run.name
    path.write_text("curate: {preset: dedup}\nleaks:\n  sets: {2026: 007, no: yes}\n")
    assert load([str(path)]).leaks.sets == {"2026": "007", "no": "yes"}
    on = ["curate.preset=dedup", "leaks.sets.2026=007"]
    assert load(on).leaks.sets == {"2026": "007"}


def test_null_in_a_text_field_means_not_given(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for word in ("null", "Null", "NULL", "~", ""):
        path.write_text(f"run:\n  name: {word}\ndata:\n  shards: {word}\n  source: nULL\n")
        config = load([str(path)])
        assert (config.run.name, config.data.shards, config.data.source) == ("mine", "", "nULL")
        if word:  # after `=` as well, and in place of what the recipe says
            path.write_text("run: {folder: there}\ndata: {shards: there}\n")
            config = load([str(path), f"data.shards={word}", f"run.folder={word}"])
            assert (config.data.shards, config.run.folder) == ("", Config().run.folder)
    for quoted in ("'null'", '"~"', "!!str null"):
        path.write_text(f"run: {{name: {quoted}}}\n")
        assert load([str(path)]).run.name == quoted.removeprefix("!!str ").strip("'\"")
    path.write_text("curate: {preset: dedup}\nleaks:\n  sets: {queries: null}\n")
    with pytest.raises(ConfigError, match=r"leaks\.sets: .*\(got None\)"):
        load([str(path)])


def test_numbers_are_numbers_and_truth_is_none(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for field, text, value in (
        ("optim.steps", "0100", 100),
        ("optim.steps", "0o17", 15),
        ("optim.steps", "1e3", 1000),
        ("optim.lr", ".5", 0.5),
        ("optim.lr", "1e-3", 0.001),
        ("optim.betas", "[.9, 95e-2]", (0.9, 0.95)),
        ("train.workers", "[2, 0o4]", (2, 4)),
        ("track.enabled", "False", False),
        ("optim.steps", "1:30", None),
        ("optim.steps", "1_000", None),
        ("optim.steps", "'5'", None),
        ("optim.steps", "true", None),
        ("optim.steps", "0.5", None),
        ("optim.steps", ".inf", None),
        ("optim.steps", "1e999", None),
        ("optim.lr", "true", None),
        ("optim.lr", ".nan", None),
        ("optim.lr", "1e999", None),
        ("optim.betas", "[true, 0.9]", None),
        ("train.workers", "true", None),
        ("train.workers", "1_000", None),
        ("track.enabled", "2", None),
    ):
        section, leaf = field.split(".")
        path.write_text(f"{section}:\n  {leaf}: {text}\n")
        for arguments in ([str(path)], [f"{field}={text}"]):
            if value is None:
                with pytest.raises(ConfigError) as caught:
                    load(arguments)
                assert caught.value.what.startswith(f"{field}: "), (text, caught.value.what)
                assert len(caught.value.what.splitlines()) == 1
            else:
                loaded = getattr(getattr(load(arguments), section), leaf)
                assert (type(loaded), loaded) == (type(value), value), (field, text)


def test_every_number_refuses_truth_and_text() -> None:
    for path, field in field_paths():
        kinds = str(field.annotation)
        if ("int" in kinds or "float" in kinds) and "bool" not in kinds and "tuple" not in kinds:
            for text in ("true", "1_0"):
                with pytest.raises(ConfigError) as caught:
                    load([f"{path}={text}"])
                assert caught.value.what.startswith(f"{path}: "), path


def test_an_override_that_is_given_twice(caplog: pytest.LogCaptureFixture) -> None:
    assert load(["optim.steps=5", "optim.steps=5"]).optim.steps == 5 and not caplog.messages
    assert load(["optim.steps=5", "optim.steps=6"]).optim.steps == 6
    assert caplog.messages == ["optim.steps is given twice, 5 and 6: the last one counts"]


def test_the_written_config_is_a_recipe(tmp_path: Path) -> None:
    """`config.yaml` of a run folder, read back: also texts that other rules take for numbers."""
    config = load(["run.name=0o17", "data.source=1e3", "optim.lr=1e-5", "track.uri="])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    assert load([str(path)]) == config
    assert Config.model_validate(yaml.safe_load(path.read_text())) == config
