"""Kubernetes objects, checked against the schemas of their kinds."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from pipeline.errors import UserError

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where there is libyaml


def schema_errors(documents: list[dict[str, Any]], crds: Path | None) -> list[str]:
    """What is wrong with objects by their schemas, unknown fields included, one line each.

    Kubernetes' own kinds are checked by the schemas of `kubernetes-validate`, others by the definitions in the folder
    `crds` (as of `kubectl get crd rayjobs.ray.io -o yaml`).
    """
    known = _definitions(crds) if crds is not None else {}
    problems = []
    for document in documents:
        if not isinstance(document, dict) or not {"apiVersion", "kind", "metadata"} <= document.keys():
            problems.append("a document is no Kubernetes object: it lacks apiVersion, kind or metadata")
            continue
        kind = f"{document['apiVersion']} {document['kind']}"
        name = f"{kind} {document['metadata'].get('name')}"
        schema = known.get((document["apiVersion"], document["kind"]))
        if schema is not None:
            found = jsonschema.Draft202012Validator(schema).iter_errors(document)
            problems += [f"{name}: {'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in found]
            continue
        try:
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
        except kubernetes_validate.ValidationError as error:
            problems.append(f"{name}: {'.'.join(map(str, error.path))}: {error.message[:300]}")
        except kubernetes_validate.SchemaNotFoundError:
            group = document["apiVersion"].partition("/")[0]
            problems.append(
                f"{name}: there is no schema for {kind}: give --crds DIR with its definition, as of `kubectl get crd "
                f"{document['kind'].lower()}s.{group} -o yaml`"
            )
    return problems


def read_documents(files: list[Path]) -> list[dict[str, Any]]:
    """All objects in YAML files.

    Raises:
        UserError: a file cannot be read or is no YAML.
    """
    found = []
    for file in files:
        try:
            found += [document for document in yaml.load_all(file.read_text(encoding="utf-8"), _LOADER) if document]
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{file} cannot be read as YAML: {error}") from error
    return found


@lru_cache
def _definitions(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Schemas of custom kinds by apiVersion and kind, made strict."""
    files = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    if not files:
        raise UserError(f"--crds={folder} holds no YAML files.")
    found = {}
    for document in read_documents(files):
        if document.get("kind") == "CustomResourceDefinition":
            spec = document["spec"]
            for version in spec["versions"]:
                schema = _strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    return found


def _strict(schema: Any) -> Any:
    """The schema with unknown fields refused, and Kubernetes' extensions put in JSON Schema's words."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _strict(value) for key, value in schema.items()}
    if found.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
        found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    open_ended = found.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in found
    if isinstance(found.get("properties"), dict) and found.get("type") == "object" and not open_ended:
        found["additionalProperties"] = False
    if found.get("nullable") and isinstance(found.get("type"), str):
        found["type"] = [found["type"], "null"]
    return found
