"""`cluster/check.py` passes what is here and says what is wrong with anything else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.check import CHECKED, FOLDER, problems
from cluster.checks.text import secret_lines

FILES = sorted(path for pattern in CHECKED for path in FOLDER.glob(pattern))
NAMES = {str(path.relative_to(FOLDER)) for path in FILES}
CLOUDS = ["aws.yaml", "gcp.yaml"]
LAUNCHED = [*CLOUDS, "onprem.yaml"]
RUNTIME = ["runtime-env.yaml", "runtime-env-pip.yaml"]
CLUSTERS = ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml"]
# Secrets are put together here, so that this file shows none.
AWS_KEY = "AKIA" + "IOSFODNN7EXAMPLE"
TOKEN = "0123456789abcdef" * 4
PRIVATE = "-----BEGIN OPENSSH " + "PRIVATE KEY-----"


def named(path: Path) -> str:
    return str(path.relative_to(FOLDER))


def test_no_platform_lacks_its_files() -> None:
    assert {*LAUNCHED, *CLUSTERS, "kuberay/mlflow.yaml"} <= NAMES


@pytest.mark.parametrize("path", FILES, ids=named)
def test_ours_pass(path: Path) -> None:
    assert problems(path) == []


# (files, what is looked for, what stands there instead, what is said)
BROKEN = [
    # runtime environments
    (RUNTIME, "STOP_WAIT_TIME_S:", "STOP_WAIT:", r"no RAY_JOB_STOP_WAIT_TIME_S"),
    (RUNTIME, '"600"', '"3"', r"=3 is too short"),
    (RUNTIME, '"600"', '"long"', r"=long is no number"),
    (RUNTIME, '"600"', "600", r"^Ray refuses the file: .*env_vars"),
    (RUNTIME, "env_vars:", "retries: 3\nenv_vars:", r"^retries is no field"),
    # Ray's schema
    (LAUNCHED, "upscaling_speed:", "upscaling_spede:", r"'upscaling_spede' was unexpected"),
    (CLOUDS, "max_workers: 20", "max_workers: many", r"max_workers: 'many' is not of type"),
    (CLOUDS, "resources: {CPU: 0}", "resources: {CPU: -1}", r"less than the minimum of 0"),
    (["onprem.yaml"], "  head_ip: REPLACE\n", "", r"Please supply|Ray refuses"),
    # token
    (LAUNCHED, "RAY_AUTH_MODE=token MLF", "MLF", r"^worker_start.*without RAY_AUTH_MODE=token"),
    (LAUNCHED, "RAY_AUTH_MODE=token RAY", "RAY", r"^head_start.*without RAY_AUTH_MODE=token"),
    (LAUNCHED, "  ~/.ray/auth_token: ~/.ray/auth_token\n", "", r"no ~/.ray/auth_token"),
    (LAUNCHED, "auth_token: ~/.ray/", "auth_token: cluster/", r"a file in the project"),
    # secrets
    (LAUNCHED, "cluster_name: raydino", f"cluster_name: {AWS_KEY}", r"line \d+ holds an AWS key"),
    (LAUNCHED, "export RAY_AUTH", f"export RAY_AUTH_TOKEN={TOKEN} RAY_AUTH", r"a Ray token"),
    (CLUSTERS, "{name: RAY_JOB_STOP_WAIT_TIME_S, value: ", "{name: RAY_AUTH_TOKEN, value: ",
     r"RAY_AUTH_TOKEN has its value in the file"),
    (LAUNCHED, "cluster_name:", f"# {PRIVATE}\ncluster_name:", r"holds a private key"),
    (LAUNCHED, '"raydino @ git+https://', '"raydino @ git+https://me:word@',
     r"holds a password in an address"),
    (LAUNCHED, '"raydino @ git+https://', '"raydino @ git+https://me:wo/rd@',
     r"holds a password in an address"),
    (LAUNCHED, "cluster_name:", "# https://host/x?sv=1&sig=abc\ncluster_name:", r"a key in a"),
    # open to the world
    (LAUNCHED, "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", r"dashboard listens at"),
    (LAUNCHED, "bash ~/raydino-mlflow.sh start /mnt/shared/mlflow", "mlflow server --host 0.0.0.0",
     r"--host 0.0.0.0 listens for everybody"),
    (["aws.yaml"], "  use_internal_ips: true", "  use_internal_ips: true\n  security_group: "
     "{IpPermissions: [{FromPort: 22, IpRanges: [{CidrIp: 0.0.0.0/0}]}]}",
     r"opens a port to every address"),
    (["aws.yaml"], "      SecurityGroupIds: [sg-REPLACE]\n", "", r"^head: no SecurityGroupIds"),
    (CLOUDS, "use_internal_ips: true", "use_internal_ips: false", r"public addresses"),
    (["gcp.yaml"], "subnetworks/REPLACE\n", "subnetworks/REPLACE\n"
     "          accessConfigs: [{type: ONE_TO_ONE_NAT}]\n", r"^head: accessConfigs"),
    (CLUSTERS, "serviceType: ClusterIP", "serviceType: NodePort", r"a NodePort service"),
    (CLUSTERS, "serviceType: ClusterIP", "enableIngress: true", r"a way in from outside"),
    (["kuberay/mlflow.yaml"], "type: ClusterIP", "type: LoadBalancer", r"a LoadBalancer service"),
    (["kuberay/mlflow.yaml"], "--host=$(POD_IP)", "--host=0.0.0.0", r"listens for everybody"),
    (["kuberay/mlflow.yaml"], "hosts=raydino-mlflow:*,", "hosts=*,", r"without its check of host"),
    (["kuberay/storage.yaml"], "namespaceSelector: {}\n          podSelector: {matchLabels: "
     "{app.kubernetes.io/name: kuberay-operator}}", "ipBlock: {cidr: 0.0.0.0/0}", r"every address"),
    (["mlflow.sh"], '--host "$host"', "--host 0.0.0.0", r"listens for everybody"),
    # images
    (CLUSTERS, "image: REPLACE.example/raydino:0.2.0", "image: REPLACE.example:5000/raydino",
     r"has no tag"),
    (["kuberay/mlflow.yaml"], "raydino:0.2.0", "raydino:latest", r"is another one tomorrow"),
    (["Dockerfile"], "python:3.11.14-slim-bookworm", "python", r"image python has no tag"),
    (["gcp.yaml"], "images/ubuntu-2404-noble-amd64-vREPLACE", "images/family/ubuntu-2404-lts",
     r"newest image of a family"),
    (LAUNCHED, "initialization_commands:", "docker: {image: rayproject/ray, container_name: r}\n"
     "initialization_commands:", r"^docker.image: image rayproject/ray has no tag"),
    # a head with work on it
    (LAUNCHED, "--num-cpus=0 ", "", r"no --num-cpus=0, so tasks would run on the head"),
    (CLOUDS, "resources: {CPU: 0}", "resources: {CPU: 8}", r"draw work to the head"),
    (CLUSTERS, '{num-cpus: "0", num-gpus: "0"}', "{}", r'no num-cpus: "0"'),
    # groups
    (CLOUDS, "min_workers: 0\n    # `python", "min_workers: 2\n    # `python", r"scales from 0"),
    (CLUSTERS, "minReplicas: 0", "minReplicas: 1", r"scales from 0"),
    (CLOUDS, ", GPU: 4}", "}", r"no group with GPUs"),
    (["onprem.yaml"], "worker_ips: [REPLACE]", "worker_ips: []", r"worker_ips is empty"),
    # what compiles on machines with GPUs
    (CLOUDS, "python3-dev gcc g++", "python3-dev", r"^gpu: no C compiler.*install gcc"),
    (CLOUDS, "python3-dev gcc g++", "gcc", r"^gpu: no Python headers.*install python3-dev"),
    (["onprem.yaml"], "command -v gcc", "command -v cc", r"^setup_commands: no C compiler"),
    (["onprem.yaml"], "/Python.h", "", r"^setup_commands: no Python headers"),
    (["Dockerfile"], "gcc g++ libc6-dev ", "", r"^no C compiler"),
    (["Dockerfile"], "FROM python:3.11.14-slim-bookworm", "FROM debian:12.12",
     r"^no Python headers"),
    (CLUSTERS, "emptyDir: {medium: Memory, sizeLimit: 60Gi}", "emptyDir: {}",
     r"^gpu: no emptyDir of medium Memory at /dev/shm"),
    # versions, storage
    (LAUNCHED, "raydino@v0.2.0", "raydino", r"not installed at a version"),
    (LAUNCHED, "raydino@v0.2.0", "raydino@main", r"not installed at a version"),
    (CLUSTERS, 'rayVersion: "2.60.0"\n', "\n", r"rayVersion is missing"),
    (CLUSTERS, "authOptions: {mode: token}", "authOptions: {mode: disabled}", r"is not token"),
    # KubeRay's and Kubernetes' schema, EC2's parameters
    (CLUSTERS, "autoscalerOptions:", "autoscalerOption:", r"'autoscalerOption' was unexpected"),
    (CLUSTERS, "maxReplicas: 4", "maxReplicas: four", r"'four' is not of type 'integer'"),
    (CLUSTERS, "mode: token}", "mode: tokens}", r"'tokens' is not one of"),
    (CLUSTERS, "terminationGracePeriodSeconds: 60", "terminationGraceSeconds: 60",
     r"'terminationGraceSeconds' was unexpected"),
    (["kuberay/mlflow.yaml"], "replicas: 1", "replica: 1", r"'replica' was unexpected"),
    (["aws.yaml"], "InstanceType: m6i.xlarge", "InstanceTyp: m6i.xlarge", r"InstanceTyp.*\(EC2\)"),
]  # fmt: skip
CASES = [
    pytest.param(name, old, new, said, id=f"{name}-{number}")
    for number, (names, old, new, said) in enumerate(BROKEN)
    for name in names
]


@pytest.mark.parametrize(("name", "old", "new", "said"), CASES)
def test_a_broken_file_is_named_in_one_sentence(
    name: str, old: str, new: str, said: str, tmp_path: Path
) -> None:
    content = (FOLDER / name).read_text()
    assert old in content, "the text to break is gone"
    path = tmp_path / Path(name).name
    path.write_text(content.replace(old, new, 1))
    found = problems(path)
    assert len(found) == 1, found
    assert re.search(said, found[0]), found
    assert "\n" not in found[0]
    assert TOKEN not in found[0] and AWS_KEY not in found[0]


@pytest.mark.parametrize("name", LAUNCHED)
def test_shared_storage_is_asked_for(name: str, tmp_path: Path) -> None:
    document = yaml.safe_load((FOLDER / name).read_text())
    document["setup_commands"] = [c for c in document["setup_commands"] if "mount" not in c]
    path = tmp_path / name
    path.write_text(yaml.safe_dump(document))
    assert problems(path) == ["setup_commands: no storage that all machines share"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_shared_storage_is_asked_for_in_pods(name: str, tmp_path: Path) -> None:
    content = (FOLDER / name).read_text()
    claim = "persistentVolumeClaim: {claimName: raydino-shared}"
    path = tmp_path / "manifest.yaml"
    path.write_text(content.replace(claim, "emptyDir: {}"))
    assert [said.partition(":")[0] for said in problems(path)] == ["head", "gpu", "cpu"]


def test_defaults_of_ray_are_judged_too(tmp_path: Path) -> None:
    """Without start commands Ray takes its own, with a dashboard for everybody and no token."""
    document = yaml.safe_load((FOLDER / "aws.yaml").read_text())
    del document["head_start_ray_commands"]
    path = tmp_path / "aws.yaml"
    path.write_text(yaml.safe_dump(document))
    found = "\n".join(problems(path))
    for said in ("without RAY_AUTH_MODE=token", "dashboard listens at 0.0.0.0", "no --num-cpus=0"):
        assert said in found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is no YAML"),
        ("a: {b: 1}\nc: 2\na: {b: 3}\n", "a stands twice, on lines 1 and 3"),
        ("", "is empty"),
        ("- 1", "is neither a cluster file nor a manifest"),
        ("apiVersion: v1\nkind: Wish\nmetadata: {name: a}\n", "not a kind of Kubernetes"),
        ("apiVersion: v1\nkind: Secret\nmetadata: {name: a}\nstringData: {a: b}", "its values"),
        ("apiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {name: a}\n", "a way in"),
        ("cluster_name: a\nprovider: {type: moon}\n", "Ray refuses"),
    ],
)
def test_other_files(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(text)
    found = problems(path)
    assert len(found) == 1 and said in found[0], found


def test_a_secret_is_not_repeated_and_a_digest_is_none() -> None:
    assert len(secret_lines(f"x: {TOKEN}\ny: {AWS_KEY}\n")) == 2
    assert secret_lines(f"image: a/b@sha256:{TOKEN}\n") == []
    assert (
        secret_lines("hdfs://host:8020/me@home s3://b/x?region=eu http://h:1/$KEY?token=$T") == []
    )
    assert secret_lines("raydino @ git+https://git.example/raydino@" + TOKEN[:40]) == []


def test_the_operators_own_definition_is_taken_in(tmp_path: Path) -> None:
    """With a definition that lacks a field that we use, and with one that has it."""
    properties = {
        name: {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        for name in ("metadata", "spec")
    } | {"apiVersion": {"type": "string"}, "kind": {"type": "string"}}
    schema = {"type": "object", "properties": properties}
    definition = {
        "spec": {
            "names": {"kind": "RayCluster"},
            "versions": [{"name": "v1", "schema": {"openAPIV3Schema": schema}}],
        }
    }
    path = FOLDER / "kuberay" / "raycluster.yaml"
    assert problems(path, [definition]) == []
    properties["spec"] = {"type": "object", "properties": {"headGroupSpec": {"type": "object"}}}
    (said,) = problems(path, [definition])
    assert "was unexpected" in said or "were unexpected" in said


def test_as_a_command(tmp_path: Path) -> None:
    script = FOLDER / "check.py"
    bad = tmp_path / "bad.yaml"
    bad.write_text((FOLDER / "onprem.yaml").read_text().replace("--num-cpus=0 ", ""))
    shown = subprocess.run(
        [sys.executable, str(script), str(FOLDER / "onprem.yaml"), str(bad)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert shown.returncode == 1, shown.stderr
    good, wrong, why = shown.stdout.splitlines()
    assert good.endswith("onprem.yaml: ok (5 lines to fill in: grep REPLACE)")
    assert wrong.startswith(f"{bad}: wrong")
    assert "no --num-cpus=0" in why
