"""Validates Kubernetes objects against the schemas of their kinds."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from pipeline.errors import UserError

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # with libyaml, ten times as fast


def schema_errors(documents: list[dict[str, Any]], crds: Path | None) -> list[str]:
    """Returns the schema errors of objects, unknown fields included, one line each.

    Schemas of Kubernetes' own kinds are those of `kubernetes-validate`; custom kinds need their definitions in the
    folder `crds` (from `kubectl get crd rayjobs.ray.io -o yaml`).
    """
    crd_schemas = _crd_schemas(crds) if crds is not None else {}
    problems = []
    for document in documents:
        if not isinstance(document, dict) or not {"apiVersion", "kind", "metadata"} <= document.keys():
            problems.append("a document is not a Kubernetes object: it lacks apiVersion, kind or metadata")
            continue
        kind = f"{document['apiVersion']} {document['kind']}"
        name = f"{kind} {document['metadata'].get('name')}"
        schema = crd_schemas.get((document["apiVersion"], document["kind"]))
        if schema is not None:
            errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
            problems += [
                f"{name}: {'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in errors
            ]
            continue
        try:
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
        except kubernetes_validate.ValidationError as error:
            problems.append(f"{name}: {'.'.join(map(str, error.path))}: {error.message[:300]}")
        except kubernetes_validate.SchemaNotFoundError:
            group = document["apiVersion"].partition("/")[0]
            problems.append(
                f"{name}: there is no schema for {kind}: set --crds DIR with its definition, from `kubectl get crd "
                f"{document['kind'].lower()}s.{group} -o yaml`"
            )
    return problems


def read_documents(files: list[Path]) -> list[dict[str, Any]]:
    """Returns all objects in YAML files.

    Raises:
        UserError: A file cannot be read, or is not YAML.
    """
    documents = []
    for file in files:
        try:
            documents += [document for document in yaml.load_all(file.read_text(encoding="utf-8"), _LOADER) if document]
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{file} cannot be read as YAML: {error}") from error
    return documents


@lru_cache
def _crd_schemas(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Returns strict schemas of custom kinds, by apiVersion and kind."""
    files = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    if not files:
        raise UserError(f"--crds={folder} contains no YAML files.")
    schemas = {}
    for document in read_documents(files):
        if document.get("kind") == "CustomResourceDefinition":
            spec = document["spec"]
            for version in spec["versions"]:
                schema = _strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                schemas[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    return schemas


def _strict(schema: Any) -> Any:
    """Returns the schema with unknown fields forbidden, and Kubernetes' extensions translated to JSON Schema."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    if strict.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
        strict["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    open_ended = strict.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in strict
    if isinstance(strict.get("properties"), dict) and strict.get("type") == "object" and not open_ended:
        strict["additionalProperties"] = False
    if strict.get("nullable") and isinstance(strict.get("type"), str):
        strict["type"] = [strict["type"], "null"]
    return strict
