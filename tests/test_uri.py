"""What of an address is secret, for each scheme, and that nothing else is taken from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.load import load
from pipeline.errors import ConfigError, PipelineError
from pipeline.track.journal import Journal, read
from pipeline.uri import has_secret, public, public_address, split_user

S = "SEKRETxyz"
SECRET = [
    f"s3://AKIA:{S}@bucket/x", f"s3://AKIA:ab/{S}@bucket/x", f"s3://AKIA:ab/c+d/{S}@bucket/x",
    f"s3://AKIA:12/{S}@bucket/x", f"s3://AKIA:ab%2F{S}@bucket/x", f"s3://AKIA:{S}%40bucket/x",
    f"s3://AKIA:{S}", f"s3://AKIA:{S}/bucket", f"S3://K:{S}@B/x", f"s3a://K:{S}@b",
    f"s3:/K:{S}@b/x", f"s3://K:a?{S}@b", f"s3://K:a#{S}@b", f"s3://{S}@bucket/x",
    f"s3://bucket/x?secret_key={S}", f"s3://bucket/x?region=eu&secret_key={S}",
    f"s3://bucket/x?region=eu;secret_key={S}", f"s3://bucket/x?session_token={S}",
    f"s3://bucket/x?X-Amz-Signature={S}", f"s3://bucket/x?{S}", f"s3://bucket/x?{S}=",
    f"s3://bucket/x?endpoint_override=http://K:{S}@host",
    f"s3://bucket/x?endpoint_override=http%3A%2F%2FK%3A{S}%40host",
    f"s3://bucket/x?endpoint_override=K:{S}@host",
    f"s3://bucket/x?endpoint_override=http://host?key={S}", f"s3://bucket/x#token={S}",
    f"gs://bucket/x?access_token={S}", f"gs://{S}@bucket/x", f"gcs://anonymous:{S}@bucket",
    f"abfs://account.dfs.core.windows.net/c/x?sv=2022&sig={S}", f"abfs://account:{S}@container/x",
    f"abfs://a.dfs.core.windows.net/c?client_id=b&tenant_id=a&client_secret={S}",
    f"abfss://container@account.dfs.core.windows.net/x?sig={S}", f"abfs://:{S}@account/c",
    f"abfs://account:a/{S}@container/x", f"hdfs://user:{S}@host/x",
    f"hdfs://host/x?password={S}", f"https://user:{S}@host/x", f"https://{S}@host/x",
    f"https://host/x?token={S}", f"HTTPS://host/x?SIG={S}", f"https://host/x?%73ig={S}",
    f"https://host/x?{S}", f"https://host/x#token={S}", f"http://user:pa/{S}@host:5000",
    f"http://user:p@{S}@host:5000", f"http://user:12/{S}@host:5000", f"http://[::1]:{S}@host",
    f"http://u:a/b:{S}@host", f"postgresql+psycopg2://u:{S}@h/db", f"file://u:{S}@host/x",
    f"unknown://u:{S}@h", f"unknown://h/x?key={S}", f"/data/a,s3://K:{S}@b/x",
    f"s3://a/x,s3://K:a/{S}@b/x", f"s3://a/x?region=eu,s3://b/x?sig={S}",
]  # fmt: skip
PLAIN = [
    "s3://bucket/x", "s3://bucket/x?region=eu-central-1&endpoint_override=localhost:9000&scheme=http",
    "s3://b/x?endpoint_override=http%3A%2F%2Fh%3A9000", "s3://b/a@b:c/x", "s3://bucket/x?",
    "gs://bucket/x?anonymous=true", "gs://anonymous@bucket/x",
    "abfs://container@account.dfs.core.windows.net/x", "az://container/x",
    "abfss://container@account.dfs.core.windows.net/a@b/x?enable_tls=true",
    "hdfs://namenode:8020/x", "hdfs://me@namenode:8020/x", "hdfs://namenode:8020/me@home/x",
    "viewfs://cluster/x", "file:///data/a@b/x", "file:///data/a:b@c", "data/me@home/photos",
    "/data/what?.png", "builtin:photos", "http://127.0.0.1:5000", "http://[::1]:5000/mlflow",
    "http://h:5000/#/experiments/1/runs/ab?workflowType=machine_learning&compareRunsMode=CHART",
    "databricks://profile", "sqlite:////a/b@c.db", "sqlite:///a.db", "hf://datasets/u/n@main/x",
    "s3://a/x?region=eu,gs://b/x", "me@home", "C:/x/y",
]  # fmt: skip


def test_what_may_be_secret_is_seen_and_not_shown() -> None:
    for uri in SECRET:
        assert has_secret(uri), uri
        for text in (public(uri), public_address(uri), public(f"cannot open '{uri}': (x) {uri}")):
            assert S not in text, (uri, text)
        error = PipelineError(f"cannot open {uri}", f"look at {uri}.")
        assert S not in repr(error) + str(error)


def test_all_else_stays_as_it_is() -> None:
    for uri in PLAIN:
        assert not has_secret(uri), (uri, public_address(uri))
        text = f"cannot open '{uri}': {uri}, and {uri}"
        assert public(text) == text
    assert public("s3://K:x@b/c?region=x") == "s3://b/c?region=x"
    assert public("s3://b/c?region=x&k=v") == "s3://b/c?region=x…"
    assert public("s3://KEY:half") == "s3://…"
    assert public_address(f"http://u:a {S} 'b@host/x") == "http://host/x"


def test_user_and_password_leave_an_address() -> None:
    for uri, parts in (
        ("http://u:pa/ss@h:5000/m", ("u", "pa/ss", "http://h:5000/m")),
        ("http://u:p@x@h:5000", ("u", "p@x", "http://h:5000")),
        ("https://ann%40x:p%2Fw@h", ("ann@x", "p/w", "https://h")),
        ("HTTP://u:12/p@h", ("u", "12/p", "HTTP://h")),
        ("http://h:5000/a", ("", "", "http://h:5000/a")),
    ):
        assert split_user(uri) == parts


FIELDS = ("data.source", "data.shards", "run.folder", "run.name", "evaluate.queries", "model.init",
          "track.uri", "track.experiment", "curate.against", "leaks.sets.a", "retrieve.seeds.a",
          "optim.lr", "data.labels", "no.such", "model.encoder", "distill.teacher")  # fmt: skip


def test_no_field_takes_a_secret(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    for uri in SECRET:
        with pytest.raises(ConfigError) as caught:
            load([f"data.source={uri}"])
        assert S not in repr(caught.value), uri
    for field in FIELDS:
        for uri in (f"s3://AKIA:ab/{S}@bucket/x", f"https://host/x?sig={S}"):
            name, _, leaf = field.rpartition(".")
            text = f"{leaf}: '{uri}'"
            for part in reversed(name.split(".")):
                text = f"{part}: {{{text}}}"
            recipe.write_text(text)
            for arguments in ([f"{field}={uri}"], [str(recipe)], ["curate.preset=dedup", uri]):
                with pytest.raises(ConfigError) as caught:
                    load(arguments)
                assert S not in repr(caught.value), (field, uri)
    for uri in (f"user:{S}@host:5000", f"user:pa/{S}@host"):
        with pytest.raises(ConfigError) as caught:
            load([f"track.uri={uri}"])
        assert S not in repr(caught.value)
    for uri in PLAIN:
        assert load([f"data.source={uri}"]).data.source == uri


def test_the_journal_holds_no_secret(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    uri = SECRET[1]
    journal.append("pack", tags={"a": f'of "{uri}"\n', "b": [uri, 1.5, None]}, open={uri: "x\\"})
    journal.close()
    assert S not in journal.path.read_text()
    ((_, event),) = read(journal.path)
    assert event["tags"] == {"a": 'of "s3://bucket/x"\n', "b": ["s3://bucket/x", 1.5, None]}


def test_tracebacks_hold_no_secret() -> None:
    for raising in (
        f"raise OSError('no {SECRET[1]}')",
        f"import threading; t = threading.Thread(target=open, args=['{SECRET[1]}']); t.start()",
    ):
        code = f"from pipeline import log; log.configure()\n{raising}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "Traceback" in done.stderr and "s3:" in done.stderr
        assert S not in done.stderr.replace(raising, "")


def test_a_page_of_pictures_is_searched_at_once() -> None:
    """The search was quadratic in the letters of a picture, and a report took hours."""
    picture = "A" * 3_000_000
    page = f"<img src='data:image/png;base64,{picture}'> s3://key:secret@host/a <p>{picture}</p>"
    shown = public(page)
    assert shown == page.replace("key:secret@", "")
