"""What no file may have, whatever its kind: secrets, floating images, servers for everybody."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

# What a secret looks like. The first group is never printed.
SECRETS = {
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "an AWS secret key": r"(?i)aws_secret_access_key\s*[:=]\s*[\"']?[A-Za-z0-9/+=]{20,}",
    "a Google API key": r"\bAIza[0-9A-Za-z_-]{30,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a Ray token": r"RAY_AUTH_TOKEN\s*=\s*[\"']?[^\s\"'$;]+",
    "an access token": r"\b(?:ghp|gho|github_pat|glpat|hf|xox[bp])[_-][A-Za-z0-9_-]{16,}",
    # which may have a `/` in it; after a port an `@` is part of a path
    "a password in an address": r"://[^/\s:@$]+:(?!\d+/)[^\s@$\"']+@",
    "a key in an address": r"(?i)://[^\s\"']*[?&](?:sig|[\w-]*(?:key|secret|token|password|"
    r"signature))=[^\s&$\"']+",
    "a long random number": r"(?<![0-9a-fA-F@:])[0-9a-f]{32,}\b",
}
SECRET_NAME = re.compile(r"(?i)(token|password|passwd|secret|api_?key|access_?key)s?$")
NO_SECRETS = {"HttpTokens"}  # `required`, of the metadata service of EC2
EVERYWHERE = {"0.0.0.0", "::", "[::]", "*"}
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
WORLD = re.compile(r"(?<![\d.])0\.0\.0\.0/0|(?<![\w:])::/0")
COMPILER = re.compile(r"\b(gcc|clang|build-essential)\b")
HEADERS = re.compile(r"\bpython3[\d.]*-dev\b|\bPython\.h\b")
Place = str


def walk(value: Any, place: Place = "") -> Iterator[tuple[Place, Any]]:
    """Every (place, value) of a document; `a.b[0].c` is a place."""
    yield place, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from walk(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from walk(inner, f"{place}[{number}]")


def secret_lines(text: str) -> list[str]:
    """Lines that show a secret, by its look. The secret itself is not repeated."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for what, pattern in SECRETS.items():
            if re.search(pattern, line):
                found.append(
                    f"line {number} holds {what}: take it out, make a new one, and give it by a "
                    "file, the environment or a Kubernetes secret"
                )
                break
    return found


def secret_fields(document: Any) -> list[str]:
    """Fields and variables whose name says secret and whose value stands in the file."""
    found = []
    for place, value in walk(document):
        if not isinstance(value, dict) or place == "file_mounts":  # paths, not values
            continue
        for name, given in [*value.items(), (value.get("name"), value.get("value"))]:
            if not isinstance(name, str) or not isinstance(given, str) or not given.strip():
                continue
            if SECRET_NAME.search(name) and name not in NO_SECRETS and "$" not in given:
                where = f"{place}: " if place else ""
                found.append(f"{where}{name} has its value in the file; refer to a secret instead")
    return found


def open_binds(place: Place, command: str) -> list[str]:
    """Servers of a command line that listen for everybody."""
    found = []
    for option, host in re.findall(r"--([\w-]*host|bind)[= ]\s*([^\s;]+)", command):
        host = host.strip("\"'")
        if option == "dashboard-host" and host not in LOOPBACK:
            found.append(
                f"{place}: the dashboard listens at {host}; it runs code for whoever reaches it, "
                "so --dashboard-host=127.0.0.1 and a tunnel"
            )
        elif option != "dashboard-host" and host in EVERYWHERE:
            found.append(f"{place}: --{option} {host} listens for everybody; name one address")
    allowed = re.search(r"--allowed-hosts[= ][\"']?([^\s\"';]*)", command)
    if "--disable-security-middleware" in command or (
        allowed and "*" in re.split("[,:]", allowed[1])[0:1]
    ):
        found.append(f"{place}: MLflow without its check of host names; list them")
    return found


def floating(image: str) -> str:
    """What is wrong with the tag of a container image; empty where it is pinned."""
    if "@sha256:" in image:
        return ""
    tag = image.rpartition("/")[2].partition(":")[2]
    if not tag:
        return f"image {image} has no tag; give a version"
    if tag in {"latest", "main", "master", "nightly", "stable", "edge"}:
        return f"image {image} is another one tomorrow; give a version"
    return ""


def dockerfile_problems(text: str) -> list[str]:
    """Images that a Dockerfile starts from, without a version; no compiler for GPUs."""
    images = re.findall(r"(?im)^FROM\s+(?:--\S+\s+)*(\S+)", text)
    problems = [said for image in images if (said := floating(image))]
    headers = any(re.match(r"(.*/)?python([:@]|$)", image) for image in images)  # those have them
    return problems + uncompilable(text, headers)


def uncompilable(commands: str, headers: bool = False) -> list[str]:
    """What a machine with GPUs lacks after these commands; comments are none."""
    commands = re.sub(r"(?m)^\s*#.*$", "", commands)
    problems = []
    if not COMPILER.search(commands):
        problems.append("no C compiler, which torch.compile and Triton need on GPUs; install gcc")
    if not headers and not HEADERS.search(commands):
        problems.append("no Python headers, which Triton needs on GPUs; install python3-dev")
    return problems


def script_problems(text: str) -> list[str]:
    """Servers for everybody in a shell script."""
    joined = text.replace("\\\n", " ")
    found = []
    for number, line in enumerate(joined.splitlines(), 1):
        if not line.lstrip().startswith("#"):
            found += open_binds(f"command {number}", line)
    return found


def unfilled(text: str) -> int:
    """Lines with something that the user has yet to fill in; comments do not count."""
    return sum("REPLACE" in line.partition("# ")[0] for line in text.splitlines())
