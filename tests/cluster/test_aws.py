"""`cluster/aws.yaml` through Ray's own AWS provider, against moto: instances as the file says."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws

from cluster.check import FOLDER, problems

REGION = "us-west-2"


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An account that exists in this process only."""
    from ray.autoscaler._private.aws import utils

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps the key of its key pair in ~/.ssh
    (tmp_path / ".ssh").mkdir()
    for cached in (utils.resource_cache, utils.client_cache):
        cached.cache_clear()
    with mock_aws():
        yield
    for cached in (utils.resource_cache, utils.client_cache):
        cached.cache_clear()


def filled_in() -> tuple[dict[str, Any], dict[str, str]]:
    """The file with what its comments ask for, made in the account; (cluster file, its parts)."""
    ec2, iam = boto3.client("ec2"), boto3.client("iam")
    network = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    place = {"CidrBlock": "10.0.1.0/24", "AvailabilityZone": f"{REGION}a"}
    subnet = ec2.create_subnet(VpcId=network, **place)["Subnet"]["SubnetId"]
    group = ec2.create_security_group(GroupName="g", Description="g", VpcId=network)["GroupId"]
    for name in ("raydino-head", "raydino-worker"):
        iam.create_instance_profile(InstanceProfileName=name)
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    text = (FOLDER / "aws.yaml").read_text()
    made = {
        "ami-REPLACE": image,
        "subnet-REPLACE": subnet,
        "sg-REPLACE": group,
        "iam::REPLACE:": "iam::123456789012:",
    }
    for old, new in made.items():
        assert old in text
        text = text.replace(old, new)
    document: dict[str, Any] = yaml.safe_load(text)
    return document, made


def test_instances_are_what_the_file_says(account: None) -> None:
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND

    document, made = filled_in()
    config = bootstrap_aws(prepare_config(copy.deepcopy(document)))
    ec2 = boto3.client("ec2")
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, group in config["available_node_types"].items():
        kind = "head" if name == "head" else "worker"
        provider.create_node(group["node_config"], {TAG_RAY_NODE_KIND: kind}, 1)
    found = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    assert {i["InstanceType"] for i in found} == {"m6i.xlarge", "g6e.12xlarge", "c6i.16xlarge"}
    for instance in found:
        assert instance["SubnetId"] == made["subnet-REPLACE"]
        assert [g["GroupId"] for g in instance["SecurityGroups"]] == [made["sg-REPLACE"]]
        spot = instance.get("InstanceLifecycle") == "spot"
        assert spot == (instance["InstanceType"] != "m6i.xlarge")
    # Ray opened nothing: the group has no rule that lets anybody in, and there is no other group
    groups = ec2.describe_security_groups()["SecurityGroups"]
    assert not [g for g in groups if g["GroupName"].startswith("ray-autoscaler")]
    for group in groups:
        opened = [r for p in group["IpPermissions"] for r in p["IpRanges"]]
        assert not any(r["CidrIp"] == "0.0.0.0/0" for r in opened)


def test_without_a_group_of_ones_own_ray_opens_ssh_to_all(account: None, tmp_path: Path) -> None:
    """Why `check.py` asks for SecurityGroupIds."""
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.util import prepare_config

    document, _ = filled_in()
    for group in document["available_node_types"].values():
        del group["node_config"]["SecurityGroupIds"]
    bootstrap_aws(prepare_config(copy.deepcopy(document)))
    groups = boto3.client("ec2").describe_security_groups()["SecurityGroups"]
    opened = [r["CidrIp"] for g in groups for p in g["IpPermissions"] for r in p["IpRanges"]]
    assert "0.0.0.0/0" in opened
    path = tmp_path / "open.yaml"
    path.write_text(yaml.safe_dump(document))
    assert {said.partition(":")[0] for said in problems(path)} == {"head", "gpu", "cpu"}
