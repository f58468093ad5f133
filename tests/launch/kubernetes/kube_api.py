"""A fake Kubernetes API server for `kubectl diff`, with objects in memory."""

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
    """Returns an object's path in the API."""
    group = document["apiVersion"]
    prefix = f"/api/{group}" if "/" not in group else f"/apis/{group}"
    meta = document["metadata"]
    scope = "" if document["kind"] in CLUSTER_WIDE else f"/namespaces/{meta['namespace']}"
    return f"{prefix}{scope}/{plural(document['kind'])}/{meta['name']}"


@contextmanager
def kube_api(kinds: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs a server for the kinds of some documents; yields its URL, and its objects by path."""
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
                self.respond({"kind": "APIVersions", "versions": ["v1"]})
            elif path == "/apis":
                groups = [version.split("/") for version in versions if "/" in version]
                self.respond(
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
                self.respond({"kind": "APIResourceList", "groupVersion": version, "resources": resources[version]})
            elif path in objects:
                self.respond(objects[path])
            else:
                self.respond({"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}, 404)

        def do_POST(self) -> None:
            self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))), 201)

        def do_PATCH(self) -> None:
            patch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.respond(merged(objects[urlsplit(self.path).path], patch))

        def respond(self, content: dict[str, Any], status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Logs nothing, to keep the test output short."""

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
    """Applies a JSON merge patch (RFC 7386)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result
