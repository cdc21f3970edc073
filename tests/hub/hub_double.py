"""A double of the Hub on the loopback, for clients in processes of their own that have HF_ENDPOINT set.

It answers what `huggingface_hub` asks when a repository is made, committed to and read, with the Hub's status codes and
headers. `Hub.refuse` makes it fail as the Hub does.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

USER, TOKEN, READ_TOKEN = "user", "hf_writes", "hf_reads"
KINDS = {"models": "model", "spaces": "space"}


class Hub(ThreadingHTTPServer):
    """
    `repositories` maps (kind, id) to {"private": …, "commits": [(sha, {path: bytes}), …]}; `log` holds (method, path).

    `refuse` maps a word of a path to the status code that requests with it get.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[tuple[str, str], dict] = {}
        self.log: list[tuple[str, str]] = []
        self.refuse: dict[str, int] = {}
        self.before_commit = None
        self.lfs: dict[str, bytes] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def add(self, repo_id: str, files: dict[str, bytes], kind: str = "model", private: bool = False) -> str:
        repository = self.repositories.setdefault((kind, repo_id), {"private": private, "commits": []})
        before = repository["commits"][-1][0] if repository["commits"] else ""
        sha = hashlib.sha1((before + repr(sorted(files))).encode() + b"".join(files.values())).hexdigest()
        repository["commits"].append((sha, files))
        return sha

    def files(self, repo_id: str, kind: str = "model") -> dict[str, bytes]:
        return self.repositories[kind, repo_id]["commits"][-1][1]

    def commits(self, repo_id: str, kind: str = "model") -> list[str]:
        return [sha for sha, _ in self.repositories[kind, repo_id]["commits"]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments) -> None:
        pass

    def reply(self, data, status: int = 200, **headers) -> None:
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, what: str) -> None:
        self.reply({"error": what}, 404, X_Error_Code=what)

    def answer(self) -> None:
        hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        hub.log.append((self.command, path))
        for word, status in hub.refuse.items():
            if word in path:
                return self.reply({"error": "refused"}, status)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", TOKEN, READ_TOKEN):
            return self.reply({"error": "Invalid"}, 401, X_Error_Message="Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            role = "read" if token == READ_TOKEN else "write"
            orgs = [{"name": "lab"}]
            return self.reply({"name": USER, "type": "user", "orgs": orgs, "auth": {"accessToken": {"role": role}}})
        if path == "/api/validate-yaml":
            bad = "license: none-such" in json.loads(body)["content"]
            errors = [{"message": '"license" must be one of the list'}] if bad else []
            return self.reply({"errors": errors, "warnings": []}, 400 if bad else 200)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            hub.lfs[match[1]] = body
            return self.reply({})
        if match := re.fullmatch(r"/(?:spaces/)?(.+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            return self.reply({"objects": objects})
        if match := re.fullmatch(r"/api/(models|spaces)/([^/]+/[^/]+)(?:/(\w+)/([^/]+))?(?:/.*)?", path):
            return self.repository(KINDS[match[1]], match[2], match[3], match[4] or "main", body)
        if match := re.fullmatch(r"/(spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.repository("space" if match[1] else "model", match[2], "resolve", match[3], match[4])
        return self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def create(self, wanted: dict) -> None:
        kind, repo_id = wanted.get("type", "model"), f"{wanted['organization']}/{wanted['name']}"
        if (kind, repo_id) in self.server.repositories:
            return self.reply({"error": "You already created this repo"}, 409)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.server.add(repo_id, {".gitattributes": b""}, kind, private)
        return self.reply({"url": f"{self.server.url}/{'spaces/' if kind == 'space' else ''}{repo_id}"})

    def repository(self, kind: str, repo_id: str, operation: str | None, revision: str, body) -> None:
        hub = self.server
        known = hub.repositories.get((kind, repo_id))
        if known is None:
            return self.missing("RepoNotFound")
        if operation == "commit" and hub.before_commit:
            hub.before_commit(repo_id)
        found = [commit for commit in known["commits"] if revision in ("main", commit[0])]
        if not found:
            return self.missing("RevisionNotFound")
        sha, files = found[-1]
        match operation:
            case "resolve":
                if body not in files:
                    return self.missing("EntryNotFound")
                etag = hashlib.sha256(files[body]).hexdigest()
                return self.reply(files[body], X_Repo_Commit=sha, ETag=f'"{etag}"')
            case "preupload":
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
                return self.reply(
                    {"files": [{"path": n, "uploadMode": modes[n], "shouldIgnore": False} for n in names]}
                )
            case "commit":
                lines = [json.loads(line) for line in body.splitlines()]
                if lines[0]["value"].get("parentCommit", sha) != sha:
                    return self.reply({"error": "The main branch has changed"}, 412)
                files = dict(files)
                for value, key in ((line["value"], line["key"]) for line in lines[1:]):
                    if key == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif key == "lfsFile":
                        files[value["path"]] = hub.lfs[value["oid"]]
                    else:
                        del files[value["path"]]
                sha = hub.add(repo_id, files, kind)
                return self.reply({"commitUrl": f"{hub.url}/{repo_id}/commit/{sha}", "commitOid": sha})
            case "tree":
                return self.reply(
                    [
                        {"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
                        for name, data in files.items()
                    ]
                )
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        return self.reply({"id": repo_id, "sha": sha, "private": known["private"], "siblings": siblings})
