"""Proxies, users without name or home, locales, and places for sockets; without Ray."""

from __future__ import annotations

import getpass
import os
import pwd
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from pipeline import environment
from pipeline.errors import PipelineError
from pipeline.storage import run_folder as files
from pipeline.storage.places import absolute_uri

PLAIN = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
NO_PROXY = ("no_proxy", "NO_PROXY")


def proxies(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name in NO_PROXY:  # so that what the code sets is undone as well
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_loopback_bypasses_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    url = "http://127.0.0.1:5000/x"
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        proxies(monkeypatch, **{name: "http://proxy:1"})
        environment.bypass_proxies()
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "localhost,127.0.0.1,::1"
        assert not requests.utils.get_environ_proxies(url)
        assert urllib.request.proxy_bypass_environment("127.0.0.1:5000")
        if "http" in name.lower():
            assert requests.utils.get_environ_proxies("http://elsewhere/x")
    for before, after in (
        ({"NO_PROXY": "a,.b"}, {name: "a,.b,localhost,127.0.0.1,::1" for name in NO_PROXY}),
        ({"no_proxy": "a", "NO_PROXY": "localhost, b"},
         {"no_proxy": "a,localhost,127.0.0.1,::1", "NO_PROXY": "localhost, b,127.0.0.1,::1"}),
        ({"no_proxy": "*"}, {"no_proxy": "*", "NO_PROXY": None}),
    ):  # fmt: skip
        proxies(monkeypatch, HTTP_PROXY="http://proxy:1", **before)
        environment.bypass_proxies()
        environment.bypass_proxies()  # a second time changes nothing
        assert {name: os.environ.get(name) for name in NO_PROXY} == after
        assert not requests.utils.get_environ_proxies(url)
    proxies(monkeypatch)
    environment.bypass_proxies()
    assert not set(NO_PROXY) & os.environ.keys()


def test_a_user_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert not environment.has_home()
    environment.name_user()
    assert getpass.getuser() == f"uid{os.getuid()}"
    monkeypatch.setenv("USER", "ann")
    environment.name_user()
    assert getpass.getuser() == "ann"


def test_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAYDINO_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for home in ("/", "/proc/none"):
        monkeypatch.setenv("HOME", home)
        assert not environment.has_home()
        with pytest.raises(PipelineError, match="home") as caught:
            files.home()
        assert "RAYDINO_HOME" in caught.value.hint
    with pytest.raises(PipelineError, match="has no home"):
        absolute_uri("~nobody-of-that-name/photos")
    environment.own_token()
    token = os.environ.pop("RAY_AUTH_TOKEN")
    assert len(token) == 64
    monkeypatch.setenv("HOME", str(tmp_path))
    environment.own_token()
    assert "RAY_AUTH_TOKEN" not in os.environ  # Ray makes one there
    assert files.home() == tmp_path / ".cache" / "raydino"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("mine")
    monkeypatch.setattr(environment, "has_home", lambda: False)  # it is there, read-only
    environment.own_token()
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_the_place_of_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pipeline")
    short = Path(environment.tempfile.mkdtemp(dir="/tmp"))
    long = short / ("x" * 40)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(short))
    folders = [environment.socket_folder()]
    assert Path(folders[0]).parent == short and not caplog.messages
    for wrong in (str(long), "/nowhere"):
        monkeypatch.setenv("TMPDIR", wrong)
        folders.append(environment.socket_folder())
        assert Path(folders[-1]).parent == Path("/tmp") and wrong in caplog.messages[-1]
    assert list(long.iterdir()) == []
    assert all(len(f + environment.SOCKET) <= environment.SOCKET_BYTES for f in folders)
    for folder in (*folders, str(long), str(short)):
        Path(folder).rmdir()


def test_a_job_under_a_locale_that_is_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "größe"
    folder.mkdir()
    recipe = folder / "mäß.yaml"
    recipe.write_bytes("run: {name: größe}\nnö_such: 1\n".encode())
    script = folder / "job.py"
    script.write_text("from pipeline import job\njob.main(['pack'], '')\n")
    for more in ({}, {"PYTHONIOENCODING": "ascii"}):
        done = subprocess.run(
            [sys.executable, script, recipe, f"data.source={folder}"],
            env=os.environ | PLAIN | more,
            capture_output=True,
            timeout=60,
        )
        said = done.stderr.decode("utf-8")
        assert done.returncode == 2 and "Traceback" not in said, said
        shown = r"n\xf6" if more else "nö"
        assert f"error: {shown}_such: no such field" in said
