"""A small Hub on loopback, for the real `huggingface_hub` client: repositories in memory, a commit for every change.

    def test_something(hub_server, tmp_path):
        done = hub_server.run(script, tmp_path / "home", "an argument")     # a process of its own, see `HubServer.run`
        hub_server.read("someone/model", "README.md")

The client reads `HF_ENDPOINT` when it is imported; that is why it runs in a process of its own.
"""

import base64
import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

from tests.fresh_process import environment

USER, TOKEN = "someone", "hf_not_a_real_token"
DATE = "2023-07-09T00:00:00.000Z"
# As on the Hub: large or binary files are stored apart, under their SHA-256.
LARGE = (".safetensors", ".bin", ".png", ".parquet")


class RefusalError(Exception):
    """An answer that is no success.

    Args:
        status: HTTP status.
        message: For people.
        code: What the client tells errors apart by, such as `EntryNotFound`.
        **content: Further fields of the answer.
    """

    def __init__(self, status: int, message: str, code: str | None = None, **content: object):
        super().__init__(message)
        self.status, self.message, self.code, self.content = status, message, code, content


@dataclass(frozen=True)
class Commit:
    """All files of a repository at one time."""

    oid: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """Commits by their hash, and the branches, tags and pull requests that point to them."""

    name: str
    commits: dict[str, Commit] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.add("refs/heads/main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def add(self, reference: str, title: str, files: dict[str, bytes]) -> Commit:
        """A new commit, to which the reference then points."""
        oid = hashlib.sha1(f"{self.name} {len(self.history)} {title}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, files)
        self.history.append(oid)
        self.references[reference] = oid
        return self.commits[oid]

    def reference(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.references), None)

    def at(self, revision: str) -> Commit:
        """The commit that a revision names."""
        reference = self.reference(revision)
        oid = self.references[reference] if reference else revision
        if oid not in self.commits:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]


class HubServer:
    """The server and what it holds.

    Args:
        endpoint: Its address, for `HF_ENDPOINT`.
        repositories: By name.
        requests: Method and path of every request, in order.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def files(self, repository: str, revision: str = "main") -> list[str]:
        """Names of a repository's files."""
        return sorted(self.repositories[repository].at(revision).files)

    def read(self, repository: str, path: str, revision: str = "main") -> bytes:
        """Content of a file."""
        return self.repositories[repository].at(revision).files[path]

    def write(self, repository: str, path: str, content: bytes, revision: str = "main") -> str:
        """Commits a file, as somebody else would; makes the repository if there is none. Returns the commit's hash."""
        with self.lock:
            own = self.repositories.setdefault(repository, Repository(repository))
            files = {**own.at(revision).files, path: content}
            return own.add(own.reference(revision), f"Change {path}", files).oid

    def titles(self, repository: str) -> list[str]:
        """Titles of a repository's commits, oldest first."""
        own = self.repositories[repository]
        return [own.commits[oid].title for oid in own.history]

    def environment(self, home: Path, **variables: str) -> dict[str, str]:
        """Environment of a process that takes this server for the Hub.

        Args:
            home: For the process's caches.
            **variables: Further ones.
        """
        return environment(
            home,
            HF_ENDPOINT=self.endpoint,
            HF_TOKEN=TOKEN,
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_DISABLE_IMPLICIT_TOKEN="0",
            NO_PROXY="127.0.0.1",
            **variables,
        )

    def run(self, script: str, home: Path, *arguments: object, check: bool = True, **variables: str) -> str:
        """What a Python script prints that runs in a process of its own and takes this server for the Hub.

        Args:
            script: Its source.
            home: For its caches.
            *arguments: It finds them in `sys.argv[1:]`.
            check: Whether it must end without an error; otherwise, its error output is returned as well.
            **variables: Of the environment, such as `PYTHONPATH`.
        """
        home.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            cwd=home,
            env=self.environment(home, **variables),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0 or not check, done.stderr[-4000:]
        return done.stdout if check else done.stdout + done.stderr


@pytest.fixture(scope="module", name="hub_server")
def served_hub() -> Iterator[HubServer]:
    """A Hub for the tests of one module, empty at first. A module that imports this function can use `hub_server`."""
    server = HubServer()
    yield server
    server.close()


def metadata_errors(card: str) -> list[str]:
    """What the Hub would find wrong with a card's metadata (its more common rules)."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\n|$)", card, re.DOTALL)
    if block is None:
        return []
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"not valid YAML: {error}"]
    if data is None:
        return []
    if not isinstance(data, dict):
        return ["metadata must be an object"]
    return [*_field_errors(data), *_model_index_errors(data.get("model-index", []))]


def _field_errors(data: dict) -> Iterator[str]:
    texts = {"license", "library_name", "pipeline_tag"}
    for name in texts & data.keys():
        if not isinstance(data[name], str):
            yield f'"{name}" must be a string'
    for name in {"tags", "datasets", "metrics", "language", "base_model"} & data.keys():
        values = data[name] if isinstance(data[name], list) else [data[name]]
        if not all(isinstance(value, str) and value for value in values):
            yield f'"{name}" must be an array of non-empty strings'
        elif name in ("base_model", "datasets"):
            for value in values:
                if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", value, re.ASCII):
                    yield f'"{name}" with value "{value}" is not valid. Use an id from the Hub.'


def _model_index_errors(entries: object) -> Iterator[str]:
    if not isinstance(entries, list):
        yield '"model-index" must be an array'
        return
    required = {"task": ("type",), "dataset": ("name", "type")}
    for entry in entries:
        if not isinstance(entry.get("name"), str):
            yield '"model-index[0].name" is required'
        for result in entry.get("results", []):
            for part, names in required.items():
                for name in names:
                    if not isinstance(result.get(part, {}).get(name), str):
                        yield f'"model-index[0].results[0].{part}.{name}" is required'
            for metric in result.get("metrics", []):
                value = metric.get("value")
                is_bad = isinstance(value, float) and (value != value or abs(value) == float("inf"))
                if not isinstance(metric.get("type"), str) or value is None or is_bad:
                    yield '"model-index[0].results[0].metrics[0]" needs a type and a finite value'


def _is_large(path: str, size: int) -> bool:
    # The client sends an empty file with the commit, whatever its name.
    return path.endswith(LARGE) and size > 0


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob_id(content: bytes) -> str:
    """Git's name for a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _content_id(path: str, content: bytes) -> str:
    """By which the client tells whether it has this content."""
    return _sha256(content) if _is_large(path, len(content)) else _blob_id(content)


def _file_info(path: str, content: bytes) -> dict:
    info: dict = {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
    if _is_large(path, len(content)):
        info["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
    return info


_REPOSITORY = r"/api/models/(?P<repository>[^/]+/[^/]+)"


class _Handler(BaseHTTPRequestHandler):
    """Answers one request; `hub` is set on a subclass."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    # Headers and content go out together; the client would wait for an acknowledgement between them.
    wbufsize = -1
    disable_nagle_algorithm = True

    routes = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/repos/create", "create"),
        ("GET", rf"{_REPOSITORY}", "info"),
        ("GET", rf"{_REPOSITORY}/revision/(?P<revision>[^/]+)", "info"),
        ("GET", rf"{_REPOSITORY}/refs", "refs"),
        ("GET", rf"{_REPOSITORY}/commits/(?P<revision>[^/]+)", "commits"),
        ("GET", rf"{_REPOSITORY}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
        ("POST", rf"{_REPOSITORY}/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("POST", rf"{_REPOSITORY}/branch/(?P<branch>[^/]+)", "create_branch"),
        ("POST", rf"{_REPOSITORY}/tag/(?P<revision>[^/]+)", "create_tag"),
        ("POST", rf"{_REPOSITORY}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"{_REPOSITORY}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/(?P<repository>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "large_batch"),
        ("PUT", r"/large/(?P<oid>[0-9a-f]{64})", "large_put"),
        ("GET", r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def do_GET(self) -> None:
        self._handle("GET")

    def do_HEAD(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def log_message(self, *arguments: object) -> None:
        """Nothing: `requests` has them."""

    def _handle(self, method: str) -> None:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        self.content = self._read_content()
        with self.hub.lock:
            self.hub.requests.append((self.command, address.path))
            try:
                self._route(method, address.path)
            except RefusalError as refused:
                headers = {"X-Error-Message": refused.message}
                if refused.code:
                    headers["X-Error-Code"] = refused.code
                if refused.code == "EntryNotFound":
                    headers["X-Repo-Commit"] = str(refused.content.pop("commit"))
                self._answer(refused.status, {"error": refused.message, **refused.content}, headers)

    def _route(self, method: str, path: str) -> None:
        for allowed, pattern, name in self.routes:
            found = re.fullmatch(pattern, path)
            if found and allowed == method:
                given = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                getattr(self, f"answer_{name}")(**given)
                return
        raise RefusalError(404, f"No such page: {method} {path}")

    def _read_content(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        """Sends JSON, or bytes as they are."""
        is_bytes = isinstance(content, bytes)
        body = content if is_bytes else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if is_bytes else "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self) -> dict:
        return json.loads(self.content)

    def _must_be_user(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise RefusalError(401, "Invalid credentials in Authorization header")

    def _repository(self, name: str) -> Repository:
        if name not in self.hub.repositories:
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        return self.hub.repositories[name]

    # Accounts and repositories

    def answer_whoami(self) -> None:
        self._must_be_user()
        self._answer(
            200, {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}}
        )

    def answer_validate(self) -> None:
        errors = [{"message": message} for message in metadata_errors(self._json()["content"])]
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def answer_create(self) -> None:
        self._must_be_user()
        wish = self._json()
        name = f"{wish.get('organization') or USER}/{wish['name']}"
        url = f"{self.hub.endpoint}/{name}"
        if not name.startswith(f"{USER}/"):
            raise RefusalError(403, f"You have no right to create {name}")
        if name in self.hub.repositories:
            raise RefusalError(409, "You already created this model repo", url=url)
        self.hub.repositories[name] = Repository(name)
        self._answer(200, {"url": url, "name": name, "id": name})

    def answer_create_branch(self, repository: str, branch: str) -> None:
        self._must_be_user()
        own = self._repository(repository)
        if f"refs/heads/{branch}" in own.references:
            raise RefusalError(409, "Reference already exists")
        start = json.loads(self.content or b"{}").get("startingPoint", "main")
        own.references[f"refs/heads/{branch}"] = own.at(start).oid
        self._answer(200, {})

    def answer_create_tag(self, repository: str, revision: str) -> None:
        self._must_be_user()
        own = self._repository(repository)
        own.references[f"refs/tags/{self._json()['tag']}"] = own.at(revision).oid
        self._answer(200, {})

    # What is there

    def answer_info(self, repository: str, revision: str = "main") -> None:
        commit = self._repository(repository).at(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        about = {"id": repository, "modelId": repository, "author": USER, "private": False, "tags": []}
        dates = {"lastModified": DATE, "createdAt": DATE}
        self._answer(200, {**about, **dates, "sha": commit.oid, "siblings": siblings, "downloads": 0, "likes": 0})

    def answer_refs(self, repository: str) -> None:
        own = self._repository(repository)
        kinds: dict[str, list] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        places = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
        for reference, oid in own.references.items():
            prefix = next(prefix for prefix in places if reference.startswith(prefix))
            name = reference if prefix == "refs/pr/" else reference.removeprefix(prefix)
            kinds[places[prefix]].append({"name": name, "ref": reference, "targetCommit": oid})
        self._answer(200, kinds)

    def answer_commits(self, repository: str, revision: str) -> None:
        own = self._repository(repository)
        newest = own.history.index(own.at(revision).oid)
        self._answer(
            200,
            [
                {"id": oid, "title": own.commits[oid].title, "message": "", "date": DATE, "authors": [{"user": USER}]}
                for oid in reversed(own.history[: newest + 1])
            ],
        )

    def answer_tree(self, repository: str, revision: str, path: str = "") -> None:
        commit = self._repository(repository).at(revision)
        prefix = f"{path}/" if path else ""
        below = {name: content for name, content in commit.files.items() if name.startswith(prefix)}
        if path and not below:
            raise RefusalError(404, f"{path} does not exist on {revision!r}", "EntryNotFound", commit=commit.oid)
        is_recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        files = [
            _file_info(name, content)
            for name, content in sorted(below.items())
            if is_recursive or "/" not in name.removeprefix(prefix)
        ]
        folders = {
            prefix + name.removeprefix(prefix).split("/")[0] for name in below if "/" in name.removeprefix(prefix)
        }
        tops = [
            {"type": "directory", "path": name, "oid": _blob_id(name.encode()), "size": 0} for name in sorted(folders)
        ]
        self._answer(200, [*tops, *files])

    def answer_paths_info(self, repository: str, revision: str) -> None:
        files = self._repository(repository).at(revision).files
        wanted = parse_qs(self.content.decode()).get("paths", [])
        self._answer(200, [_file_info(path, files[path]) for path in wanted if path in files])

    def answer_resolve(self, repository: str, revision: str, path: str) -> None:
        commit = self._repository(repository).at(revision)
        if path not in commit.files:
            raise RefusalError(404, "Entry not found", "EntryNotFound", commit=commit.oid)
        content = commit.files[path]
        self._answer(200, content, {"X-Repo-Commit": commit.oid, "ETag": f'"{_content_id(path, content)}"'})

    # Uploads

    def answer_preupload(self, repository: str, revision: str) -> None:
        self._must_be_user()
        files = self._repository(repository).at(revision).files
        infos = []
        for file in self._json()["files"]:
            path = file["path"]
            mode = "lfs" if _is_large(path, file["size"]) else "regular"
            known = {"oid": _content_id(path, files[path])} if path in files else {}
            infos.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        self._answer(200, {"files": infos, "commitOid": self._repository(repository).at(revision).oid})

    def answer_large_batch(self, repository: str) -> None:
        self._must_be_user()
        self._repository(repository)
        objects = []
        for wanted in self._json()["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/large/{wanted['oid']}"}}
            is_here = wanted["oid"] in self.hub.large_files
            objects.append(wanted if is_here else {**wanted, "actions": upload})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def answer_large_put(self, oid: str) -> None:
        if _sha256(self.content) != oid:
            raise RefusalError(400, "The content does not have this checksum")
        self.hub.large_files[oid] = self.content
        self._answer(200, b"")

    def answer_commit(self, repository: str, revision: str) -> None:
        self._must_be_user()
        own = self._repository(repository)
        header, *operations = (json.loads(line) for line in self.content.splitlines())
        parent = own.at(revision)
        expected = header["value"].get("parentCommit")
        if expected and not parent.oid.startswith(expected):
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for operation in operations:
            self._apply(operation["key"], operation["value"], files, parent.oid)
        reference, pull_request = own.reference(revision), {}
        if "create_pr" in self.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in own.references)
            reference = f"refs/pr/{number}"
            pull_request = {"pullRequestUrl": f"{self.hub.endpoint}/{repository}/discussions/{number}"}
        if reference is None:
            raise RefusalError(400, f"{revision} is no branch")
        commit = own.add(reference, header["value"]["summary"], files)
        url = f"{self.hub.endpoint}/{repository}/commit/{commit.oid}"
        self._answer(200, {"success": True, "commitOid": commit.oid, "commitUrl": url, **pull_request})

    def _apply(self, key: str, value: dict, files: dict[str, bytes], parent: str) -> None:
        """Makes one change of a commit."""
        path = value["path"]
        if key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self.hub.large_files:
                raise RefusalError(400, f"The content of {path} was not uploaded")
            files[path] = self.hub.large_files[value["oid"]]
        else:
            gone = [name for name in files if name == path or name.startswith(f"{path.rstrip('/')}/")]
            if not gone:
                raise RefusalError(404, "A file with this name doesn't exist", "EntryNotFound", commit=parent)
            for name in gone:
                del files[name]
