"""A loopback server with the part of the Hugging Face hub's interface that uploads and downloads of models need."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

TOKEN = "hf_of_the_owner"
LARGE = ".safetensors"  # these go through the interface for large files


class HubServer(http.server.ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
      repositories: by name, the commits: {commit: {file name: content}}; and `refs`, {branch or tag: commit}.
      private: names of those that only the owner's token reads.
      moved: new names by old ones.
      status: if not 0, what every request is answered with.
      requests: methods and paths so far.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.objects = {}, {}
        self.private, self.moved, self.requests, self.status = set(), {}, [], 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, name, files):
        """Adds a commit to the main branch; returns its name."""
        repository = self.repositories[name]
        commit = hashlib.sha1(repr((name, len(repository["commits"]), sorted(files.items()))).encode()).hexdigest()
        repository["commits"][commit] = dict(files)
        repository["refs"]["main"] = commit
        return commit


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *arguments):
        pass

    def answer(self, status, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code="", message="no"):
        self.answer(status, {"error": message}, **({"X_Error_Code": code} if code else {}), X_Error_Message=message)

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        if self.server.status:
            return self.refuse(self.server.status)
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return getattr(self, method)(body, *found.groups())
        return self.refuse(404, message=f"this server does not know {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    @property
    def is_owner(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def find(self, name, revision=None):
        """The commit and its files; None after an answer that says why not."""
        if name in self.server.moved:
            path = self.path.replace(name, self.server.moved[name])
            return self.answer(307, Location=path)
        repository = self.server.repositories.get(name)
        if repository is None or (name in self.server.private and not self.is_owner):
            return self.refuse(404 if self.is_owner else 401, "RepoNotFound", "Repository not found")
        commit = repository["refs"].get(revision, revision)
        if commit not in repository["commits"]:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        return commit, repository["commits"][commit]

    def info(self, body, name, revision):
        if found := self.find(name, revision):
            siblings = [{"rfilename": file} for file in found[1]]
            self.answer(200, {"id": name, "modelId": name, "sha": found[0], "siblings": siblings, "tags": []})

    def tree(self, body, name, revision):
        if found := self.find(name, revision):
            entries = []
            for file, content in found[1].items():
                entry = {"type": "file", "path": file, "size": len(content), "oid": _blob(content)}
                if file.endswith(LARGE):
                    entry["lfs"] = {"oid": _sha(content), "size": len(content), "pointerSize": 134}
                entries.append(entry)
            self.answer(200, entries)

    def resolve(self, body, name, revision, file):
        if found := self.find(name, revision):
            if file not in found[1]:
                return self.refuse(404, "EntryNotFound", "Entry not found")
            content = found[1][file]
            etag = _sha(content) if file.endswith(LARGE) else _blob(content)
            self.answer(200, content, X_Repo_Commit=found[0], ETag=f'"{etag}"', X_Linked_Etag=f'"{etag}"',
                        X_Linked_Size=len(content))  # fmt: skip

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.is_owner:
            return self.refuse(401, message="Invalid username or password.")
        if asked["organization"] != "owner":
            return self.refuse(403, message="You don't have the rights to create a model under this namespace")
        url = f"{self.server.url}/{name}"
        if name in self.server.repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": url})
        self.server.repositories[name] = {"commits": {}, "refs": {}}
        self.server.commit(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        if asked.get("private") or asked.get("visibility") == "private":
            self.server.private.add(name)
        return self.answer(200, {"url": url, "id": name, "name": name})

    def yaml(self, body):
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, body, name, revision):
        files = [
            {"path": x["path"], "uploadMode": "lfs" if x["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
            for x in json.loads(body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, body, name):
        def action(item):
            return {"upload": {"href": f"{self.server.url}/objects/{item['oid']}"}}

        objects = [{**item, "actions": action(item)} for item in json.loads(body)["objects"]]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body, oid):
        assert _sha(body) == oid
        self.server.objects[oid] = body
        self.answer(200)

    def commit(self, body, name, revision):
        found = self.find(name, revision)
        if not self.is_owner:
            return self.refuse(403, message="no right to write")
        files = dict(found[1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        commit = self.server.commit(name, files)
        url = f"{self.server.url}/{name}/commit/{commit}"
        return self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url})


_MODEL = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    (rf"GET /api/models/{_MODEL}/revision/(.+)", "info"),
    (rf"GET /api/models/{_MODEL}/tree/(.+)", "tree"),
    (rf"(?:GET|HEAD) /{_MODEL}/resolve/([^/]+)/(.+)", "resolve"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "yaml"),
    (rf"POST /api/models/{_MODEL}/preupload/(.+)", "preupload"),
    (rf"POST /{_MODEL}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /objects/(\w+)", "store"),
    (rf"POST /api/models/{_MODEL}/commit/(.+)", "commit"),
)


def _sha(content):
    return hashlib.sha256(content).hexdigest()


def _blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def running():
    """Context manager: the server, answering in a thread."""
    with HubServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
