"""Settings of `densenet k8s` that are not in the config."""

import ipaddress
import re
from dataclasses import dataclass, fields
from typing import Any

from launch.kubernetes.quantities import format_quantity, parse_quantity
from pipeline.errors import UserError

_IMAGE = re.compile(r"[^@\s]+?(:(?P<tag>[\w][\w.-]{0,127})|@sha256:[0-9a-f]{64})")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123
_SUBDOMAIN = re.compile(rf"(?=.{{1,253}}$){_LABEL.pattern}(\.{_LABEL.pattern})*")
_MEMORY = re.compile(r"[1-9][0-9]*(\.[0-9]{1,3})?[MGT]i?")
_MINIMUM = {"nodes": 1, "gpus-per-node": 1, "cpus-per-node": 1, "grace-period": 3}


@dataclass(frozen=True)
class Settings:
    """Cluster settings; None: the overlay's value.

    Attributes:
        memory: Of a worker pod, in Kubernetes' canonical form.
        storage_class: Of the volumes; "default" is the cluster's default class.
        stage_class: Of the node-local volumes of `data.stage`.
        secret: Its keys are environment variables of the pods; "none" is for pods that need no credentials.
        grace_period: Seconds from the deletion of a worker pod to SIGKILL.
        egress: (address block, port) pairs that pods may reach in addition.
    """

    nodes: int | None = None
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    memory: str | None = None
    storage_class: str | None = None
    stage_class: str | None = None
    secret: str | None = None
    namespace: str | None = None
    grace_period: int | None = None
    egress: tuple[tuple[str, int], ...] = ()


def parse_settings(words: list[str]) -> Settings:
    """Parses `KEY=VALUE` words.

    Raises:
        UserError: A key is unknown or set twice, or its value is not allowed.
    """
    known = [field.name.replace("_", "-") for field in fields(Settings)]
    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            raise UserError(f"--set {word} is not known: use KEY=VALUE with a KEY of {', '.join(known)}.")
        name = key.replace("-", "_")
        if name in values:
            raise UserError(f"--set {key} is set twice: use one value.")
        values[name] = _parse(key, value)
    return Settings(**values)


def check_image(image: str | None) -> str:
    """Returns the image's name if it names one image for ever: with a digest, or a tag other than `latest`.

    Raises:
        UserError: It does not.
    """
    match = _IMAGE.fullmatch(image or "")
    if match is None or match["tag"] == "latest":
        raise UserError(f"--image={image} needs a fixed tag, for example REPOSITORY:1.0, or a digest.")
    return str(image)


def _parse(key: str, value: str) -> Any:
    if key in _MINIMUM:
        if not value.isdecimal() or int(value) < _MINIMUM[key]:
            raise UserError(f"--set {key}={value}: {key} must be an integer of at least {_MINIMUM[key]}.")
        return int(value)
    if key == "memory":
        if not _MEMORY.fullmatch(value):
            raise UserError(f"--set memory={value} is not an amount of memory: use for example 200Gi.")
        return format_quantity(parse_quantity(value), binary=value.endswith("i"))
    if key == "egress":
        return tuple(_endpoint(word) for word in value.split(","))
    if key == "namespace" and not _LABEL.fullmatch(value):
        raise UserError(
            f"--set namespace={value} is not the name of a namespace: use up to 63 lowercase letters, digits and "
            f"hyphens."
        )
    if not _SUBDOMAIN.fullmatch(value):
        raise UserError(
            f"--set {key}={value} is not a Kubernetes object name: use lowercase letters, digits, hyphens and dots."
        )
    return value


def _endpoint(word: str) -> tuple[str, int]:
    address, _, port = word.rpartition(":")
    try:
        block = ipaddress.ip_network(address.strip("[]"))
        if not (port.isdecimal() and 1 <= int(port) <= 65535):
            raise ValueError(port)
    except ValueError as error:
        raise UserError(
            f"--set egress={word} is not ADDRESS:PORT: use an IP address or a block, for example 10.0.0.0/8:9000 or "
            f"169.254.20.10:53, and commas between several."
        ) from error
    return str(block), int(port)
