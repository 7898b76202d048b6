"""A Hugging Face Hub on loopback: as much of its HTTP API as pushing and loading a model takes.

Routes, headers and error codes are those that `huggingface_hub` 2.4 reads (`hf_api`, `_commit_api`, `lfs`,
`file_download`, `utils/_http`). Repositories live in memory and follow git's rules: a commit is whole or is not.

Large files travel by LFS' basic transfer, not by Xet: that is a protocol of its own, between a compiled client and a
content-addressed store beside the Hub. The client takes LFS where `HF_HUB_DISABLE_XET` is set or `hf_xet` is missing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import transformers
from huggingface_hub import constants, file_download, hf_api
from huggingface_hub.utils import _http

USER = "me"
TOKEN = "hf_right"
READER = "hf_reader"  # a token that may not write


@dataclass(frozen=True)
class File:
    """A file of a repository."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """The ETag: sha256 of an LFS file, git's sha1 of any other."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repo:
    """A repository: commits, each with all its files, and branches that point to them."""

    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File]) -> str:
        names = "".join(f"{path} {file.oid}\n" for path, file in sorted(files.items()))
        oid = hashlib.sha1(f"{len(self.commits)}\n{names}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def files(self, branch: str = "main") -> dict[str, bytes]:
        """Return path -> content, without what the Hub itself puts into a new repository."""
        files = self.commits[self.branches[branch]]
        return {path: file.data for path, file in files.items() if path != ".gitattributes"}


class Refusal(Exception):
    """An answer other than 2xx, with the `X-Error-Code` by which the client tells them apart."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "") -> None:
        super().__init__(message)
        self.status = status
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.headers = {key: value for key, value in headers.items() if value}


class Cut(Exception):
    """The connection breaks here."""


class HubServer(ThreadingHTTPServer):
    """The server and its state; `with HubServer() as hub` serves until the end of the block.

    Attributes:
        token: The one token that is accepted.
        repos: Id -> repository.
        objects: sha256 -> content of uploaded large files.
        requests: What was asked for, e.g. `"GET /me/adapter/resolve/main/README.md"`.
        cuts: Name of a method of `_Handler` -> how many of its requests are still to break off, half-way through the
            file that they carry.
        statuses: Name of such a method -> the status, e.g. 429, with which all of its requests are refused.
        silent: Names of such methods whose requests are not answered while the server runs.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.store = f"http://localhost:{self.server_port}/store"  # another host by name, as the Hub's store is
        self.token = TOKEN
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cuts: Counter[str] = Counter()
        self.statuses: dict[str, int] = {}
        self.silent: set[str] = set()
        self.ended = threading.Event()

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def well(self) -> None:
        """Answer every request again."""
        self.cuts.clear(), self.statuses.clear(), self.silent.clear()

    def __exit__(self, *args: Any) -> None:
        self.ended.set()
        self.shutdown()
        super().__exit__(*args)


def connect(hub: HubServer, home: Path, patch: pytest.MonkeyPatch) -> None:
    """Let the client of this process ask a Hub, logged in, with an empty cache, and without waits between attempts.

    huggingface_hub takes HF_ENDPOINT and HF_HOME when it is imported, and this process has imported it long before:
    what it made of them is replaced.
    """
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_OFFLINE": False,
    }.items():
        patch.setattr(constants, name, value)
    patch.setattr(hf_api.api, "endpoint", hub.url)  # the client behind the bare functions
    patch.setattr(transformers.utils.hub, "_hf_api", None)  # transformers' own, made at its first use
    for module in (_http, file_download):  # how many attempts there are stays the client's affair
        patch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
    for name in ("NO_PROXY", "no_proxy"):
        patch.setenv(name, "127.0.0.1,localhost")
    patch.setenv("HF_TOKEN", TOKEN)
    _http.close_session()


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Let the client wait for a silent Hub for a moment only, where it has a limit: at files, not at its API."""
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        patch.setattr(constants, name, 0.2)
    patch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.2)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HubServer

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {path}")
        answer, names = self._route(path)
        self.cut = self.server.cuts[answer.__name__] > 0
        self.server.cuts[answer.__name__] -= self.cut
        try:
            length = int(self.headers.get("Content-Length", 0))
            self.body = self.rfile.read(length // 2 if self.cut else length)
            if self.cut and length:
                raise Cut
            if answer.__name__ in self.server.silent:
                self.server.ended.wait()
                raise Cut
            if status := self.server.statuses.get(answer.__name__):
                raise Refusal(status, HTTPStatus(status).phrase)
            answer(self, **names)
        except Refusal as refusal:
            self._send(refusal.status, json.dumps({"error": str(refusal)}).encode(), refusal.headers)
        except Cut:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _route(self, path: str) -> tuple[Callable[..., None], dict[str, str]]:
        for methods, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split():
                return answer, {key: unquote(value) for key, value in match.groupdict().items()}
        return _Handler.no_such_route, {}

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def log_message(self, *args: Any) -> None:
        """Write nothing."""

    # Who may see and write what

    def _known(self) -> bool:
        """Whether a token came along; a wrong one is refused even where none is needed, as the Hub does."""
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {self.server.token}", f"Bearer {READER}"):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return given is not None

    def _user(self) -> None:
        """Of whatever writes."""
        if not self._known():
            raise Refusal(401, "Invalid username or password.")
        if self.headers.get("Authorization") == f"Bearer {READER}":
            raise Refusal(403, "this token has no write permission")

    def _repo(self, repo: str) -> Repo:
        known, found = self._known(), self.server.repos.get(repo)
        if found and (known or not found.private):
            return found
        if known:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        # The Hub sends no code here: the client concludes it from the 401, but only of an address with https.
        raise Refusal(401, "Invalid username or password.", "RepoNotFound")

    def _commit(self, repo: str, revision: str) -> tuple[str, dict[str, File]]:
        found = self._repo(repo)
        oid = found.branches.get(revision, revision)
        if oid not in found.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, found.commits[oid]

    # The API

    def validate_yaml(self) -> None:
        self._send_json({"errors": [], "warnings": []})

    def create_repo(self) -> None:
        self._user()
        asked = json.loads(self.body)
        name = f"{asked['organization'] or USER}/{asked['name']}"
        url = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repos:
            return self._send_json(url | {"error": "You already created this model repo"}, status=409)
        repo = self.server.repos[name] = Repo(private=asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", lfs=False)})
        self._send_json(url)

    def check_write(self, repo: str) -> None:
        if self.cut:
            raise Cut
        self._user()
        self._repo(repo)
        self._send_json({})

    def create_branch(self, repo: str, revision: str) -> None:
        self._user()
        branches = self._repo(repo).branches
        if revision in branches:
            raise Refusal(409, f"Reference already exists: {revision}")
        branches[revision] = branches["main"]
        self._send(200)

    def info(self, repo: str, revision: str = "main") -> None:
        oid, files = self._commit(repo, revision)
        private = self.server.repos[repo].private
        siblings = [{"rfilename": path} for path in files]
        self._send_json({"id": repo, "sha": oid, "private": private, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str) -> None:
        _, files = self._commit(repo, revision)
        entries: list[dict[str, Any]] = []
        for path, file in files.items():
            entry = {"type": "file", "path": path, "size": len(file.data), "oid": file.oid}
            lfs = {"oid": file.oid, "size": len(file.data), "pointerSize": 134}
            entries.append(entry | ({"lfs": lfs} if file.lfs else {}))
        self._send_json(entries)

    def preupload(self, repo: str, revision: str) -> None:
        self._user()
        _, files = self._commit(repo, revision)
        answer = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            mode = "lfs" if path.endswith((".safetensors", ".bin")) else "regular"
            oid = files[path].oid if path in files else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send_json({"files": answer})

    def lfs_batch(self, repo: str) -> None:
        self._user()
        self._repo(repo)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.server.store}/{asked['oid']}"}}
            there = asked["oid"] in self.server.objects
            objects.append({"oid": asked["oid"], "size": asked["size"]} | ({} if there else {"actions": upload}))
        self._send_json({"transfer": "basic", "objects": objects})

    def put_object(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, f"content is not of sha256 {oid}")
        self.server.objects[oid] = self.body
        self._send(200)

    def commit(self, repo: str, revision: str) -> None:
        self._user()
        _, files = self._commit(repo, revision)
        files = dict(files)
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refusal(400, f"Your push was rejected because an LFS pointer points to no file: {value}")
                files[value["path"]] = File(self.server.objects[value["oid"]], lfs=True)
        oid = self.server.repos[repo].commit(revision, files)
        self._send_json({"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        commit, files = self._commit(repo, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit)
        file, headers = files[path], {"X-Repo-Commit": commit}
        if not file.lfs:
            return self._send(200, file.data, headers | {"ETag": f'"{file.oid}"'})
        linked = {"X-Linked-Size": str(len(file.data)), "X-Linked-Etag": f'"{file.oid}"'}
        self._send(302, b"", headers | linked | {"Location": f"{self.server.store}/{file.oid}"})

    def get_object(self, oid: str) -> None:
        if "Authorization" in self.headers:
            raise Refusal(400, "the store was shown the Hub's token")
        data = self.server.objects[oid]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        end = max(start, len(data) // 2) if self.cut else len(data)
        headers = {"Content-Length": str(len(data) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206 if start else 200, data[start:end], headers)
        if self.cut:
            raise Cut

    def no_such_route(self) -> None:
        raise Refusal(404, f"this server has no {self.command} {self.path}")


_REPO = r"/(?P<repo>[^/]+(/[^/]+)?)"  # a few old ones have no namespace
_MODEL = "/api/models" + _REPO
_REVISION = r"/(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("GET", _MODEL + "/auth-check/write", _Handler.check_write),
    ("POST", _MODEL + "/branch" + _REVISION, _Handler.create_branch),
    ("POST", _MODEL + "/preupload" + _REVISION, _Handler.preupload),
    ("POST", _MODEL + "/commit" + _REVISION, _Handler.commit),
    ("GET", _MODEL + "/revision" + _REVISION, _Handler.info),
    ("GET", _MODEL + "/tree" + _REVISION, _Handler.tree),
    ("GET", _MODEL, _Handler.info),
    ("POST", _REPO + r"\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/store/(?P<oid>[0-9a-f]{64})", _Handler.put_object),
    ("GET", r"/store/(?P<oid>[0-9a-f]{64})", _Handler.get_object),
    ("GET HEAD", _REPO + "/resolve" + _REVISION + "/(?P<path>.+)", _Handler.resolve),
]
