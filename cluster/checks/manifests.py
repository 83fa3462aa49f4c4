"""Rules for Kubernetes manifests: the schemas, then what this project asks for."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.checks.text import EVERYWHERE, floating, open_binds, walk

Object = dict[str, Any]
OURS = Path(__file__).with_name("kuberay.yaml")
KUBERNETES = "1.31"  # the oldest that is checked against; newer ones have all of its fields
GPU = "nvidia.com/gpu"
OUTWARD = {"NodePort", "LoadBalancer"}


def manifest_problems(document: Object, definitions: list[Object]) -> list[str]:
    """What is wrong with one object, one sentence each; the schema's word comes first.

    Args:
        document: one object of a manifest.
        definitions: CustomResourceDefinitions of the operator, where the user has them.
    """
    if said := _schema(document, definitions):
        return [said]
    kind, spec = document.get("kind"), document.get("spec", {})
    found = [*_outward(document), *_pods(document)]
    if kind in ("Ingress", "HTTPRoute", "Route"):
        found.append(f"{kind}: a way in from outside; use kubectl port-forward")
    if kind == "Secret" and (document.get("data") or document.get("stringData")):
        found.append("Secret: its values stand in the file; make it with kubectl create secret")
    if kind == "RayCluster":
        found += _cluster(spec)
    elif kind == "RayJob" and "rayClusterSpec" in spec:
        found += _cluster(spec["rayClusterSpec"])
    return found


def _schema(document: Object, definitions: list[Object]) -> str:
    kind = document.get("kind")
    if kind not in ("RayCluster", "RayJob"):
        return _kubernetes(document, "")
    if said := _first_error(_ours(), document, "KubeRay's schema"):
        return said
    for place, value in walk(document):
        name = place.rpartition(".")[2]
        if name in ("template", "submitterPodTemplate"):
            wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "template": value}
            if said := _kubernetes(wrapped, place):
                return said
        elif name == "headService" and (said := _kubernetes(value, place)):
            return said
    for definition in definitions:
        if definition["spec"]["names"]["kind"] != kind:
            continue
        version = document["apiVersion"].partition("/")[2]
        for one in definition["spec"]["versions"]:
            if one["name"] == version:
                schema = _strict(one["schema"]["openAPIV3Schema"])
                return _first_error(schema, document, "the operator's definition")
        return f"{kind}: the operator's definition has no version {version}"
    return ""


@functools.cache
def _ours() -> Object:
    schema: Object = yaml.safe_load(OURS.read_text())
    return schema


def _first_error(schema: Object, document: Object, whose: str) -> str:
    import jsonschema

    errors = jsonschema.Draft7Validator(schema).iter_errors(document)
    error = next(iter(sorted(errors, key=lambda e: len(e.absolute_path), reverse=True)), None)
    if error is None:
        return ""
    place = ".".join(str(part) for part in error.absolute_path)
    return f"{place or document.get('kind')}: {error.message[:200]} ({whose})"


def _kubernetes(document: Object, place: str) -> str:
    """Against the schema of Kubernetes itself, unknown fields refused."""
    try:
        import kubernetes_validate
    except ImportError:
        return "pods are not checked: pip install kubernetes-validate, which has their schema"
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        inner = ".".join(str(part) for part in list(error.absolute_path)[1 if place else 0 :])
        where = ".".join(filter(None, [place, inner])) or str(document.get("kind"))
        return f"{where}: {error.message[:200]} (Kubernetes' schema)"
    except kubernetes_validate.SchemaNotFoundError:
        return f"{document.get('kind')}: not a kind of Kubernetes or KubeRay that is known here"
    return ""


def _strict(schema: Any) -> Any:
    """A schema of Kubernetes as JSON Schema; unknown fields are refused instead of dropped."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: _strict(value) for key, value in schema.items()}
    closed = not schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and closed:
        made.setdefault("additionalProperties", False)
    return made


def _outward(document: Object) -> Iterator[str]:
    for place, value in walk(document):
        name = place.rpartition(".")[2]
        if name in ("type", "serviceType") and value in OUTWARD:
            yield f"{place}: a {value} service can be reached from outside; use ClusterIP"
        elif name == "enableIngress" and value:
            yield f"{place}: a way in from outside; use kubectl port-forward"
        elif name in ("hostNetwork", "hostPort") and value:
            yield f"{place}: opens the ports of the pod on its node"
        elif name == "privileged" and value:
            yield f"{place}: a privileged container is root on its node"
        elif name == "cidr" and value in ("0.0.0.0/0", "::/0") and ".from" in place:
            yield f"{place}: lets every address in"
        elif name == "dashboard-host" and value in EVERYWHERE:
            yield f"{place}: leave it out; the operator sets it for the network of the pods"
        elif isinstance(value, list) and name in ("command", "args"):
            yield from open_binds(place, " ".join(map(str, value)))
        elif name == "entrypoint" and isinstance(value, str):
            yield from open_binds(place, value)


def _pods(document: Object) -> Iterator[str]:
    for place, value in walk(document):
        if place.endswith(("containers", "initContainers")) and isinstance(value, list):
            for number, container in enumerate(value):
                if said := floating(container.get("image", "")):
                    yield f"{place}[{number}]: {said}"


def _cluster(spec: Object) -> Iterator[str]:
    if spec.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode is not token, so every pod that reaches the head may use it"
    head = spec["headGroupSpec"]
    if head.get("rayStartParams", {}).get("num-cpus") != "0":
        yield 'headGroupSpec.rayStartParams: no num-cpus: "0", so tasks would run on the head'
    groups = {group["groupName"]: group for group in spec.get("workerGroupSpecs", [])}
    gpu = [name for name, group in groups.items() if any(GPU in r for r in _limits(group))]
    if not any(g["minReplicas"] == 0 and n not in gpu for n, g in groups.items()):
        yield "workerGroupSpecs: no group without GPUs that scales from 0, for decoding"
    if not gpu:
        yield "workerGroupSpecs: no group with GPUs, for training"
    for name, group in {"head": head, **groups}.items():
        if not _shares(group["template"]["spec"]):
            yield f"{name}: no volume of a claim is mounted, so it shares no storage"
        if name in gpu and not _has_shared_memory(group["template"]["spec"]):
            yield (
                f"{name}: no emptyDir of medium Memory at /dev/shm; a container has 64 MB there, "
                "too little for NCCL and Ray"
            )
    if not spec.get("rayVersion"):
        yield "rayVersion is missing; the operator needs it for token authentication"


def _limits(group: Object) -> list[Object]:
    containers = group["template"]["spec"]["containers"]
    return [container.get("resources", {}).get("limits", {}) for container in containers]


def _shares(pod: Object) -> bool:
    claims = {v["name"] for v in pod.get("volumes", []) if "persistentVolumeClaim" in v}
    mounts = pod["containers"][0].get("volumeMounts", [])
    return any(mount["name"] in claims for mount in mounts)


def _has_shared_memory(pod: Object) -> bool:
    memory = {
        v["name"] for v in pod.get("volumes", []) if v.get("emptyDir", {}).get("medium") == "Memory"
    }
    mounts = pod["containers"][0].get("volumeMounts", [])
    return any(m["name"] in memory and m["mountPath"] == "/dev/shm" for m in mounts)
