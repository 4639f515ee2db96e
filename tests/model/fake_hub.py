"""A Hugging Face hub of a few repositories on 127.0.0.1, speaking what huggingface_hub asks for."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SHA = "c0ffee" + "0" * 34
GOOD_TOKEN, NEW_TOKEN = "hf_accepted", "hf_not_accepted"


class Hub(ThreadingHTTPServer):
    """repositories: id -> {"files": {name: bytes}, "gated": bool, "private": bool}."""

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.served = repositories, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        name, rest = "/".join(parts[:2]), parts[2:]
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in (GOOD_TOKEN, NEW_TOKEN):
            return self.answer(401, b'{"error": "Invalid username or password."}')
        repository = self.server.repositories.get(name)
        if repository is None:
            return self.answer(404 if token else 401, b"{}", X_Error_Code="RepoNotFound")
        if repository.get("gated") and token != GOOD_TOKEN and (not api or rest == ["auth-check"]):
            return self.answer(403 if token else 401, b"{}", X_Error_Code="GatedRepo")
        if rest == ["auth-check"]:
            return self.answer(200, b"{}")
        if api:
            return self.describe(name, repository, rest)
        return self.file(name, repository, "/".join(rest[2:]))

    do_HEAD = do_GET

    def describe(self, name, repository, rest):
        files = repository["files"]
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in files.items()
            ]
            return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        siblings = [{"rfilename": n, "size": len(b), "blobId": "0" * 40} for n, b in files.items()]
        gated = "manual" if repository.get("gated") else False
        info = {"id": name, "modelId": name, "sha": SHA, "siblings": siblings, "gated": gated, "private": False}
        return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")

    def file(self, name, repository, path):
        body = repository["files"].get(path)
        if body is None:
            return self.answer(404, b"", X_Error_Code="EntryNotFound")
        if self.command == "GET":
            self.server.served.append(path)
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        return self.answer(200, body, ETag=etag, X_Repo_Commit=SHA)


@contextmanager
def running(repositories):
    hub = Hub(repositories)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
