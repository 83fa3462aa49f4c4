"""Rules for the cluster files of `ray up`: Ray's own schema, then what this project asks for."""

from __future__ import annotations

import copy
import io
import re
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from cluster.checks.text import WORLD, floating, open_binds, uncompilable, walk

Config = dict[str, Any]
PINNED = re.compile(
    r"raydino\s*(==\s*\d+(\.\d+)+|@\s*\S+@(v?\d+(\.\d+)+|[0-9a-f]{7,40})\b"
    r"|@\s*\S+/raydino-\d+(\.\d+)+\S*\.whl)"
)
SHARED = re.compile(r"\bmount(point)?\b.*\s/[\w/]+|\b(s3|gs|gcs)://")
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


def launch_problems(document: Config) -> list[str]:
    """What is wrong with a cluster file, one sentence each; the schema's word comes first."""
    if said := _schema(document):
        return [said]
    config = _prepared(document)  # with Ray's defaults, some of which are open
    return [
        *_token(config),
        *_open(config),
        *_head(config),
        *_groups(config),
        *_installation(config),
        *_compilers(config),
        *_images(config),
        *(_aws_parameters(config) if config["provider"]["type"] == "aws" else []),
    ]


def _prepared(document: Config) -> Config:
    from ray.autoscaler._private.util import prepare_config

    silence = io.StringIO()
    with redirect_stdout(silence), redirect_stderr(silence):
        prepared: Config = prepare_config(copy.deepcopy(document))
    return prepared


def _schema(document: Config) -> str:
    """What Ray itself says about the file before it starts anything."""
    import click
    import jsonschema
    from ray.autoscaler._private.util import validate_config

    try:
        validate_config(_prepared(document))
    except jsonschema.ValidationError as error:
        place = ".".join(str(part) for part in error.absolute_path)
        return f"{place or 'the file'}: {error.message.splitlines()[0][:200]} (Ray's schema)"
    except (click.ClickException, KeyError, NotImplementedError, ValueError, TypeError) as error:
        return f"Ray refuses the file: {type(error).__name__} {str(error).splitlines()[0:1]}"
    return ""


def _starting(config: Config, key: str) -> list[str]:
    return [one for one in config[key] if re.search(r"\bray\s+start\b", one)]


def _token(config: Config) -> list[str]:
    found = []
    for key in STARTS:
        if not _starting(config, key):
            found.append(f"{key}: no `ray start`")
        elif not all(re.search(r"RAY_AUTH_MODE=token\b", c) for c in _starting(config, key)):
            found.append(f"{key}: Ray starts without RAY_AUTH_MODE=token, so anybody may use it")
    mounts = {str(k): str(v) for k, v in config["file_mounts"].items()}
    tokens = [local for remote, local in mounts.items() if remote.endswith(".ray/auth_token")]
    if not tokens:
        found.append("file_mounts: no ~/.ray/auth_token, so the machines have no token")
    elif not tokens[0].startswith(("~", "/")):
        found.append("file_mounts: the token is read from a file in the project; keep it in ~/.ray")
    return found


def _open(config: Config) -> list[str]:
    kind = config["provider"]["type"]
    found = []
    for place, value in walk(config):
        if isinstance(value, str):
            found += open_binds(place, value)
            if WORLD.search(value):
                found.append(f"{place}: opens a port to every address ({value.strip()[:40]})")
    if kind == "local":
        return found
    if not config["provider"].get("use_internal_ips"):
        found.append("provider.use_internal_ips is not true, so machines get public addresses")
    for name, group in config["available_node_types"].items():
        node = group["node_config"]
        if kind == "aws" and not node.get("SecurityGroupIds"):
            found.append(
                f"{name}: no SecurityGroupIds, and Ray would make a group that opens port 22 to all"
            )
        if any(card.get("accessConfigs") for card in node.get("networkInterfaces", [])):
            found.append(f"{name}: accessConfigs gives the machine a public address")
    return found


def _head(config: Config) -> list[str]:
    found = []
    starts = _starting(config, STARTS[0])
    if not all(re.search(r"--num-cpus[= ]0\b", command) for command in starts):
        found.append("head_start_ray_commands: no --num-cpus=0, so tasks would run on the head")
    elif config["provider"]["type"] != "local":
        head = config["available_node_types"][config["head_node_type"]]
        if head["resources"].get("CPU") != 0:
            found.append(
                f"{config['head_node_type']}: resources without CPU: 0 draw work to the head"
            )
    if not any("mlflow" in c.lower() for c in config[STARTS[0]]):
        found.append("head_start_ray_commands: no MLflow, neither a server nor MLFLOW_TRACKING_URI")
    return found


def _groups(config: Config) -> list[str]:
    if config["provider"]["type"] == "local":  # hosts that are there; Ray finds out what they have
        return [] if config["provider"].get("worker_ips") else ["provider.worker_ips is empty"]
    workers = {
        name: group
        for name, group in config["available_node_types"].items()
        if name != config["head_node_type"] and group["max_workers"] > 0
    }
    found = []
    cpu = [group for group in workers.values() if not group["resources"].get("GPU")]
    if not any(group["min_workers"] == 0 for group in cpu):
        found.append("available_node_types: no group without GPUs that scales from 0, for decoding")
    if len(cpu) == len(workers):
        found.append("available_node_types: no group with GPUs, for training")
    return found


def _installation(config: Config) -> list[str]:
    setup = [*config["setup_commands"], *config["head_setup_commands"]]
    setup += config["worker_setup_commands"]
    found = []
    if not any(PINNED.search(command) for command in setup):
        found.append("setup_commands: raydino is not installed at a version (raydino @ …@v0.2.0)")
    if not any(SHARED.search(command) for command in setup):
        found.append("setup_commands: no storage that all machines share")
    return found


def _compilers(config: Config) -> list[str]:
    """Of the groups with GPUs; a container brings its own (`dockerfile_problems`)."""
    common = [*config["setup_commands"], *config["worker_setup_commands"]]
    if config["provider"]["type"] == "local":  # Ray finds out which hosts have GPUs
        groups = {"setup_commands": common}
    else:
        groups = {
            name: [*config["setup_commands"], *group.get("worker_setup_commands", common)]
            for name, group in config["available_node_types"].items()
            if group["resources"].get("GPU")
        }
    if any(value for _, value in walk(config.get("docker", {})) if isinstance(value, str)):
        return []
    return [
        f"{n}: {said}" for n, given in groups.items() for said in uncompilable("\n".join(given))
    ]


def _images(config: Config) -> list[str]:
    found = []
    for place, value in walk(config):
        name = place.rpartition(".")[2]
        if name in {"image", "head_image", "worker_image"} and isinstance(value, str) and value:
            found += [f"{place}: {said}"] if (said := floating(value)) else []
        if name == "sourceImage" and "/family/" in str(value):
            found.append(f"{place}: the newest image of a family is another one tomorrow; name one")
    return found


def _aws_parameters(config: Config) -> list[str]:
    """What EC2 would refuse of a node_config, by the model of its client, where that is here."""
    try:
        import botocore.session
        from botocore.validate import ParamValidator
    except ImportError:  # it comes with boto3, which `ray up` on AWS needs anyway
        return []
    service = botocore.session.get_session().get_service_model("ec2")
    shape = service.operation_model("RunInstances").input_shape
    found = []
    for name, group in config["available_node_types"].items():
        # Ray makes one interface of SubnetIds and adds the counts
        given = {k: v for k, v in group["node_config"].items() if k != "SubnetIds"}
        report = ParamValidator().validate(given | {"MinCount": 1, "MaxCount": 1}, shape)
        if report.has_errors():
            said = report.generate_report().splitlines()[0]
            found.append(f"{name}.node_config: {said[:200]} (EC2)")
    return found
