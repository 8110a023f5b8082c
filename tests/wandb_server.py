"""A W&B host on loopback: keeps all that it receives, and fails as it is told to.

It answers as much of the protocol as wandb-core 0.31 needs to carry a run through: GraphQL by the name of the operation,
the file stream, uploads. `receive` tells the operations apart, for tests that wait for one.
"""

import contextlib
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

Answer = Callable[["Request"], int]
"""The status for a request; 0 never answers."""


class Request:
    """One request: method, path, body, and the operation's name and variables where it is GraphQL."""

    def __init__(self, method: str, path: str, headers: str, body: bytes) -> None:
        self.method, self.path, self.headers, self.body = method, path, headers, body
        self.operation, self.variables = "", dict[str, Any]()
        if path == "/graphql":
            document = json.loads(body)
            found = re.search(r"(?:query|mutation)\s+(\w+)", document["query"])
            self.operation = found[1] if found else ""
            self.variables = document.get("variables") or {}


class WandbServer:
    """What arrived, and how to answer."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answer: Answer = lambda request: 200
        self.url = ""
        self.stopping = threading.Event()
        self.artifacts: list[dict[str, Any]] = []
        self.known_runs = set[str]()

    def received(self) -> bytes:
        """Every byte: paths, headers, bodies."""
        return b"\n".join(f"{r.path}\n{r.headers}\n".encode() + r.body for r in self.requests)

    def uploads(self) -> dict[str, bytes]:
        """Uploaded files by the name under which they were announced."""
        return {r.path.removeprefix("/upload/"): r.body for r in self.requests if r.path.startswith("/upload/")}

    def streamed(self, name: str) -> list[dict[str, Any]]:
        """The lines of one of a run's files that the file stream brought."""
        found = []
        for request in self.requests:
            if request.path.endswith("/file_stream"):
                content = json.loads(request.body).get("files", {}).get(name, {}).get("content", [])
                found += [json.loads(line) for line in content]
        return found

    def describe_run(self, name: str) -> dict[str, Any]:
        """What a resume asks of a run that is known."""
        rows, summaries = self.streamed("wandb-history.jsonl"), self.streamed("wandb-summary.json")
        bucket = {
            "id": "b",
            "name": name,
            "summaryMetrics": json.dumps(summaries[-1] if summaries else {}),
            "displayName": "r",
            "logLineCount": 0,
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            "notes": "",
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"id": "p", "name": "smollm2", "entity": {"id": "e", "name": "me"}, "bucket": bucket}

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the history, without wandb's own columns."""
        found = self.streamed("wandb-history.jsonl")
        return [{name: value for name, value in row.items() if not name.startswith("_")} for row in found]

    def reply(self, request: Request) -> dict[str, Any]:
        """The data of a GraphQL answer."""
        v, operation = request.variables, request.operation
        project = {"id": "p", "name": "smollm2", "entity": {"id": "e", "name": "me"}}
        if operation == "UpsertBucket":
            self.known_runs.add(v["name"])
            bucket = {"id": "b", "name": v.get("name") or "run1", "displayName": "r", "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in v["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if operation == "CreateArtifact":
            self.artifacts.append(v["input"])
            artifact = {"id": f"a{len(self.artifacts)}", "state": "PENDING", "artifactSequence": {"id": "s"}}
            return {"createArtifact": {"artifact": artifact}}
        if operation == "CreateArtifactManifest" or operation == "UpdateArtifactManifest":
            file: dict[str, Any] = {
                "id": "f",
                "name": v.get("name"),
                "uploadUrl": f"{self.url}/upload/manifest-{len(self.requests)}",
                "uploadHeaders": [],
            }
            manifest = {"id": "m", "file": file}
            return {operation[0].lower() + operation[1:]: {"artifactManifest": manifest}}
        if operation == "CreateArtifactFiles":
            edges = [
                {
                    "node": {
                        "id": "n",
                        "name": spec["name"],
                        "displayName": spec["name"],
                        "uploadUrl": f"{self.url}/upload/{spec['name']}",
                        "uploadHeaders": [],
                        "artifact": {"id": spec["artifactID"]},
                    }
                }
                for spec in v["input"]["artifactFiles"]
            ]
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if operation == "CommitArtifact":
            return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": "d"}}}
        if operation == "ArtifactType":
            return {"project": None}
        if operation == "ArtifactByID":
            return {"artifact": describe_artifact(v["id"], self.artifacts[int(v["id"][1:]) - 1])}
        if operation == "RunResumeStatus":
            return {"model": self.describe_run(v["name"]) if v["name"] in self.known_runs else None}
        if operation == "Viewer":
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        return {}


def describe_artifact(name: str, created: dict[str, Any]) -> dict[str, Any]:
    """What the service asks of an artifact that has arrived."""
    return {
        "id": name,
        "artifactSequence": {"name": created["artifactCollectionName"], "project": None},
        "versionIndex": 0,
        "artifactType": {"name": created["artifactTypeName"]},
        "description": None,
        "metadata": None,
        "ttlDurationSeconds": -2,
        "ttlIsInherited": True,
        "tags": [],
        "historyStep": None,
        "state": "COMMITTED",
        "size": 1,
        "digest": "d",
        "commitHash": None,
        "fileCount": 1,
        "createdAt": "2026-11-24T00:00:00Z",
        "updatedAt": None,
    }


@contextlib.contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server on a free port of loopback, for the length of the block."""
    server = WandbServer()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def handle_request(self) -> None:
            request = Request(self.command, self.path, str(self.headers), self.read_body())
            server.requests.append(request)
            status = server.answer(request)
            if status == 0:
                server.stopping.wait()
                self.close_connection = True
                return
            content = json.dumps(
                {"data": server.reply(request)} if request.operation and status == 200 else {}
            ).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = handle_request

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that was killed."""

    with Server(("127.0.0.1", 0), Handler) as listener:
        server.url = f"http://127.0.0.1:{listener.server_address[1]}"
        thread = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.stopping.set()
        listener.shutdown()
