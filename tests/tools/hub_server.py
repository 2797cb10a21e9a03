"""A Hub of our own on localhost: the routes that huggingface_hub uses to make, fill, list and read a model repository.

Contents are kept in memory. Large files go through the LFS protocol: a batch request says which are there already, the
others are PUT. `refuse_put_after` lets that many bodies in and refuses the next, which is how an upload is interrupted.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "a-token-for-tests"
LARGE = 20_000  # bytes from which a file goes through LFS, besides every safetensors file


class Hub:
    """State of the server; `with Hub() as hub` runs it in a thread."""

    def __init__(self):
        self.repos: dict[
            str, dict[str, tuple[str, bytes | str]]
        ] = {}  # repo -> path -> ("file", body) or ("lfs", oid)
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}  # sha256 -> content of large files
        self.puts: list[str] = []  # sha256 of every large file that was sent and taken
        self.commits: dict[str, list[str]] = {}
        self.refuse_put_after: int | None = None
        self.lock = threading.Lock()
        self.unknown: list[str] = []  # requests that this server has no answer for

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def content(self, repo: str, path: str) -> bytes:
        kind, value = self.repos[repo][path]
        return self.objects[value] if kind == "lfs" else value


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *_):
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, content, status: int = 200, headers: dict | None = None, send_body: bool = True):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if send_body:
            self.wfile.write(body)

    def _dispatch(self, routes: dict):
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid credentials"}, 401)
        for pattern, handle in routes.items():
            if match := re.fullmatch(pattern, path):
                return handle(body, *match.groups())
        self.state.unknown.append(f"{self.command} {self.path}")
        return self._answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    def do_GET(self):
        repo = r"([\w.-]+/[\w.-]+)"
        self._dispatch(
            {
                "/api/whoami-v2": lambda _: self._answer({"name": "me", "type": "user", "orgs": []}),
                rf"/api/models/{repo}/tree/([^/]+)": self._tree,
                rf"/api/models/{repo}/tree/([^/]+)/(.+)": lambda *_: self._answer([]),
                rf"/api/models/{repo}(?:/revision/[^/]+)?": self._info,
                rf"/{repo}/resolve/([^/]+)/(.+)": self._file,
            }
        )

    def do_HEAD(self):
        self._dispatch({r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)": lambda *a: self._file(*a, send_body=False)})

    def do_POST(self):
        repo = r"([\w.-]+/[\w.-]+)"
        self._dispatch(
            {
                "/api/repos/create": self._create,
                "/api/validate-yaml": lambda _: self._answer({"errors": [], "warnings": []}),
                rf"/api/models/{repo}/preupload/([^/]+)": self._preupload,
                rf"/api/models/{repo}/commit/([^/]+)": self._commit,
                rf"/{repo}\.git/info/lfs/objects/batch": self._batch,
                "/verify": self._verify,
            }
        )

    def do_PUT(self):
        self._dispatch({"/lfs/([0-9a-f]{64})": self._put})

    # ------------------------------------------------------------ routes

    def _create(self, body):
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        exists = repo in self.state.repos
        self.state.repos.setdefault(repo, {})
        self.state.commits.setdefault(repo, ["0" * 40])
        if not exists:
            self.state.private[repo] = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self._answer({"url": f"{self.state.url}/{repo}", "id": repo, "name": repo}, 409 if exists else 200)

    def _oid(self, repo, path) -> str | None:
        if path not in self.state.repos[repo]:
            return None
        kind, value = self.state.repos[repo][path]
        return value if kind == "lfs" else git_sha1(value)

    def _preupload(self, body, repo, _revision):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] > LARGE or file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": self._oid(repo, file["path"]),
            }
            for file in json.loads(body)["files"]
        ]
        self._answer({"files": files})

    def _batch(self, body, _repo):
        objects = []
        for wanted in json.loads(body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.state.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.state.url}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.state.url}/verify"},
                }
            objects.append(answer)
        self._answer({"transfer": "basic", "objects": objects})

    def _put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer({"error": "content does not have this sha256"}, 400)
        with self.state.lock:  # the client sends several files at once
            refused = self.state.refuse_put_after is not None and len(self.state.puts) >= self.state.refuse_put_after
            if not refused:
                self.state.puts.append(oid)
                self.state.objects[oid] = body
        return self._answer({"error": "interrupted"}, 403) if refused else self._answer(b"")

    def _verify(self, body):
        wanted = json.loads(body)
        held = self.state.objects.get(wanted["oid"])
        self._answer({}, 200 if held is not None and len(held) == wanted["size"] else 404)

    def _commit(self, body, repo, _revision):
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(self.state.repos[repo])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = ("file", base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.state.objects:
                    return self._answer({"error": f"LFS object {value['oid']} was never uploaded"}, 400)
                files[value["path"]] = ("lfs", value["oid"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.state.repos[repo] = files
        oid = hashlib.sha1(body).hexdigest()
        self.state.commits[repo].append(oid)
        return self._answer({"commitUrl": f"{self.state.url}/{repo}/commit/{oid}", "commitOid": oid})

    def _tree(self, _body, repo, _revision):
        items = []
        for path in self.state.repos[repo]:
            content, kind = self.state.content(repo, path), self.state.repos[repo][path][0]
            item = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
            if kind == "lfs":
                item |= {
                    "oid": "f" * 40,
                    "lfs": {"oid": self._oid(repo, path), "size": len(content), "pointerSize": 130},
                }
            items.append(item)
        self._answer(items)

    def _info(self, _body, repo):
        if repo not in self.state.repos:
            return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": path} for path in self.state.repos[repo]]
        sha = self.state.commits[repo][-1]
        return self._answer(
            {
                "id": repo,
                "modelId": repo,
                "sha": sha,
                "siblings": siblings,
                "private": self.state.private[repo],
                "tags": [],
            }
        )

    def _file(self, _body, repo, _revision, path, send_body=True):
        if repo not in self.state.repos:
            return self._answer(b"", 404, {"X-Error-Code": "RepoNotFound"}, send_body)
        if path not in self.state.repos[repo]:
            return self._answer(b"", 404, {"X-Error-Code": "EntryNotFound"}, send_body)
        headers = {"ETag": f'"{self._oid(repo, path)}"', "X-Repo-Commit": self.state.commits[repo][-1]}
        return self._answer(self.state.content(repo, path), 200, headers, send_body)
