"""A server that answers what `kubectl diff` asks of Kubernetes' API, for objects that are kept in memory."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

CLUSTER_WIDE = ("Namespace", "PriorityClass")


def plural(kind: str) -> str:
    return {"NetworkPolicy": "networkpolicies", "PriorityClass": "priorityclasses"}.get(kind, f"{kind.lower()}s")


def path_of(document: dict[str, Any]) -> str:
    """Where an object is in the API."""
    group = document["apiVersion"]
    prefix = f"/api/{group}" if "/" not in group else f"/apis/{group}"
    meta = document["metadata"]
    inside = "" if document["kind"] in CLUSTER_WIDE else f"/namespaces/{meta['namespace']}"
    return f"{prefix}{inside}/{plural(document['kind'])}/{meta['name']}"


@contextmanager
def kube_api(kinds: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The address of a server that knows the kinds of some documents, and the objects that it has, by path."""
    objects: dict[str, Any] = {}
    versions = sorted({document["apiVersion"] for document in kinds})
    resources = {
        version: [
            {
                "name": plural(kind),
                "singularName": kind.lower(),
                "kind": kind,
                "namespaced": kind not in CLUSTER_WIDE,
                "verbs": ["get", "list", "create", "patch", "update"],
            }
            for kind in sorted({d["kind"] for d in kinds if d["apiVersion"] == version})
        ]
        for version in versions
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if path == "/api":
                self.answer({"kind": "APIVersions", "versions": ["v1"]})
            elif path == "/apis":
                groups = [version.split("/") for version in versions if "/" in version]
                self.answer(
                    {
                        "kind": "APIGroupList",
                        "apiVersion": "v1",
                        "groups": [
                            {
                                "name": group,
                                "versions": [{"groupVersion": f"{group}/{version}", "version": version}],
                                "preferredVersion": {"groupVersion": f"{group}/{version}", "version": version},
                            }
                            for group, version in groups
                        ],
                    }
                )
            elif path.removeprefix("/apis/").removeprefix("/api/") in resources:
                version = path.removeprefix("/apis/").removeprefix("/api/")
                self.answer({"kind": "APIResourceList", "groupVersion": version, "resources": resources[version]})
            elif path in objects:
                self.answer(objects[path])
            else:
                self.answer({"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}, 404)

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))), 201)

        def do_PATCH(self) -> None:
            patch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(merged(objects[urlsplit(self.path).path], patch))

        def answer(self, content: dict[str, Any], status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the test's output is not the place."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", objects
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def merged(old: Any, patch: Any) -> Any:
    """JSON merge patch (RFC 7386)."""
    if not isinstance(patch, dict):
        return patch
    kept = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            kept.pop(key, None)
        else:
            kept[key] = merged(kept.get(key), value)
    return kept
