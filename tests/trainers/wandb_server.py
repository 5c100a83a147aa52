"""As much of a W&B server as runs, artifacts and workspaces need, on loopback; it keeps all that it receives."""

import gzip
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

ENTITY = "me"


class WandbServer(ThreadingHTTPServer):
    """`received`: (GraphQL operation, variables) and (path, body) of streams, in order; `files`: what was uploaded, by
    run or artifact and name; `views`: saved workspaces by name. `refuse(path)` True: answered with status 500."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[tuple[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.views: dict[str, dict[str, Any]] = {}
        self.answers_views = True  # servers older than workspaces do not know them
        self.refuse: Callable[[str], bool] = lambda path: False
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client drops idle connections when it ends."""

    def asked(self, operation: str) -> list[Any]:
        """The variables of each such operation."""
        return [variables for name, variables in self.received if name == operation]

    def runs(self) -> dict[str, dict[str, Any]]:
        """The last variables with which each run was created or changed, by run id."""
        found: dict[str, dict[str, Any]] = {}
        for variables in self.asked("UpsertBucket"):
            given = {key: value for key, value in variables.items() if value is not None}
            found[variables["name"]] = found.get(variables["name"], {}) | given
        return found

    def config(self, run: str) -> dict[str, Any]:
        """The config of a run, from all its changes."""
        merged: dict[str, Any] = {}
        for variables in self.asked("UpsertBucket"):
            if variables["name"] == run and variables.get("config"):
                merged |= {k: v["value"] for k, v in json.loads(variables["config"]).items()}
        return merged

    def streamed(self, run: str, file: str) -> list[Any]:
        """The lines of a streamed file of a run, such as wandb-history.jsonl, as JSON."""
        return [
            json.loads(line)
            for path, body in self.received
            if path.endswith(f"/{run}/file_stream")
            for line in body.get("files", {}).get(file, {}).get("content", [])
        ]

    def exit_codes(self, run: str) -> list[int]:
        return [
            body["exitcode"]
            for path, body in self.received
            if path.endswith(f"/{run}/file_stream") and body.get("complete")
        ]


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    server = WandbServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, format: str, *args: Any) -> None: ...

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while length := int(self.rfile.readline(), 16):
                data += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refused(self) -> bool:
        if not self.server.refuse(self.path):
            return False
        self._answer({"error": "broken"}, 500)
        return True

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        body = self._read()
        if not self._refused():
            self.server.files[unquote(self.path.removeprefix("/up/"))] = body
            self._answer({})

    def do_POST(self) -> None:
        body = json.loads(self._read())
        if self._refused():
            return
        if not self.path.endswith("/graphql"):
            self.server.received.append((self.path, body))
            return self._answer({})
        operation = re.search(r"(?:query|mutation)\s+(\w+)", body["query"])
        assert operation
        name, variables = operation.group(1), body.get("variables") or {}
        self.server.received.append((name, variables))
        answer = getattr(self, f"_{name}", lambda _: {})(variables)
        self._answer({"data": answer})

    # --- GraphQL, by the name of the operation

    def _upload(self, *parts: str) -> str:
        return "/".join([self.server.url, "up", *parts])

    def _Viewer(self, _: Any) -> Any:
        teams = {"edges": [{"node": {"id": "t", "name": ENTITY}}]}
        viewer = {
            "id": "u",
            "entity": ENTITY,
            "username": ENTITY,
            "flags": "{}",
            "teams": teams,
            "apiKeys": {"edges": []},
        }
        return {"viewer": viewer}

    def _ServerFeaturesQuery(self, _: Any) -> Any:
        return {"serverInfo": {"features": []}}

    def _RunResumeStatus(self, _: Any) -> Any:
        return {"model": None}

    def _UpsertBucket(self, variables: Any) -> Any:
        project = {"id": "p", "name": variables.get("project"), "entity": {"id": "e", "name": ENTITY}}
        bucket = {"id": "b", "name": variables.get("name"), "displayName": "x", "config": "{}", "project": project}
        return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}

    def _CreateRunFiles(self, variables: Any) -> Any:
        run = variables.get("run") or variables.get("runName") or "run"
        files = [{"name": f, "uploadUrl": self._upload(run, f)} for f in variables.get("files", [])]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}

    def _ArtifactType(self, _: Any) -> Any:
        return {"project": {"artifact": None}}

    def _CreateArtifact(self, variables: Any) -> Any:
        number = len(self.server.asked("CreateArtifact"))
        sequence = {"latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": f"a{number}", "state": "PENDING", "artifactSequence": sequence}}}

    def _CreateArtifactManifest(self, variables: Any) -> Any:
        uploaded = {"id": "f", "uploadUrl": self._upload(variables["artifactID"], "manifest"), "uploadHeaders": []}
        file = uploaded if variables.get("includeUpload") else {"id": "f"}
        manifest = {"id": f"m-{variables['artifactID']}", "file": file}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def _UpdateArtifactManifest(self, variables: Any) -> Any:
        artifact = variables["artifactManifestID"].removeprefix("m-")
        file = {"id": "f", "uploadUrl": self._upload(artifact, "manifest"), "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": variables["artifactManifestID"], "file": file}}}

    def _CreateArtifactFiles(self, variables: Any) -> Any:
        nodes = [
            {
                "storagePath": f"{spec['artifactID']}/{spec['name']}",
                "uploadUrl": self._upload(spec["artifactID"], spec["name"]),
                "uploadHeaders": [], "uploadMultipartUrls": None, "artifact": {"id": spec["artifactID"]},
            }
            for spec in variables["input"]["artifactFiles"]
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _CommitArtifact(self, variables: Any) -> Any:
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "d"}}}

    def _View(self, variables: Any) -> Any:
        if not self.server.answers_views:
            return {"project": None}
        view = self.server.views.get(variables["viewName"])
        edges = [{"node": {"id": "v", **{key: view[key] for key in ("displayName", "spec")}}}] if view else []
        return {"project": {"allViews": {"edges": edges}}}

    def _UpsertView2(self, variables: Any) -> Any:
        self.server.views[variables["name"]] = variables
        return {"upsertView": {"view": {"id": "v", "name": variables["name"]}, "inserted": True}}
