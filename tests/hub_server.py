"""A small Hugging Face Hub for tests: ``python hub_server.py FOLDER``, then ``HF_ENDPOINT=http://127.0.0.1:PORT``.

Holds models and datasets in memory, with commits, LFS uploads, ranges, private and gated repositories. Tokens:
``hf_owner`` belongs to the user ``user``; ``hf_stranger`` to somebody else; any other is invalid. Requests are noted in
``FOLDER/requests.log``; the port is in ``FOLDER/port``. ``FOLDER/fail-commits`` makes commits fail while it exists.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

USERS = {
    "hf_owner": "user",
    "hf_stranger": "stranger",
    "hf_mteb": "mteb",
    "hf_if_ir": "if-ir",
    "hf_mair": "MAIR-Bench",
    "hf_infosearch": "jianqunZ",
}
PINNED = ("mteb", "if-ir")  # owners whose repositories stand in for pinned ones: any commit id is their last commit
DATE = "2026-01-01T00:00:00.000Z"


class Repo:
    def __init__(self, kind: str, name: str, private: bool) -> None:
        self.kind, self.name, self.private, self.gated = kind, name, private, False
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.lfs: set[str] = set()
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        parts = [f"{path}:{git_oid(content)}" for path, content in sorted(files.items())]
        sha = hashlib.sha1(f"{self.kind}{self.name}{len(self.commits)}{parts}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.branches.get("main" if self.name.split("/")[0] in PINNED else revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def failure(status: int, code: str, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status, headers={"X-Error-Code": code, "X-Error-Message": message})


class Hub:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.log = (folder / "requests.log").open("a", buffering=1)

    def user(self, request: web.Request) -> str | None:
        return USERS.get(request.headers.get("Authorization", "").removeprefix("Bearer "))

    def find(self, request: web.Request, kind: str) -> Repo | web.Response:
        name = f"{request.match_info['user']}/{request.match_info['name']}"
        repo = self.repos.get((kind, name))
        sent, user = request.headers.get("Authorization"), self.user(request)
        if sent is not None and user is None:
            return failure(401, "InvalidToken", "Invalid credentials in Authorization header")
        owner = name.split("/")[0]
        if repo is None or (repo.private and user != owner):
            return failure(404 if user else 401, "RepoNotFound", "Repository not found")
        return repo

    @web.middleware
    async def note(self, request: web.Request, handler: Any) -> web.StreamResponse:
        response = await handler(request)
        self.log.write(f"{request.method} {request.path_qs} {response.status}\n")
        return response

    async def whoami(self, request: web.Request) -> web.Response:
        user = self.user(request)
        if user is None:
            return failure(401, "InvalidToken", "Invalid username or password.")
        return web.json_response(
            {
                "type": "user",
                "name": user,
                "fullname": user,
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}},
            }
        )

    async def create(self, request: web.Request) -> web.Response:
        body, user = await request.json(), self.user(request)
        if user is None:
            return failure(401, "InvalidToken", "Invalid username or password.")
        owner = body.get("organization") or user
        if owner != user:
            return failure(403, "Forbidden", f"You don't have the rights to create a repo under {owner}")
        kind, name = body.get("type", "model"), f"{owner}/{body['name']}"
        url = f"http://{request.host}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.repos:
            return web.json_response({"error": "You already created this repo", "url": url}, status=409)
        if kind == "space" and body.get("sdk") != "gradio":
            return failure(400, "BadRequest", "a Space needs an SDK")
        self.repos[kind, name] = Repo(kind, name, body.get("private") or body.get("visibility") == "private")
        return web.json_response({"url": url, "name": name, "id": name})

    async def info(self, request: web.Request) -> web.Response:
        found = self.at(request, request.match_info["kind"][:-1])
        if isinstance(found, web.Response):
            return found
        repo, sha, files = found
        card = {}
        if "README.md" in files and files["README.md"].startswith(b"---"):
            import yaml

            card = yaml.safe_load(files["README.md"].split(b"---")[1])
        siblings = [{"rfilename": path} for path in sorted(files)]
        return web.json_response(
            {"_id": sha[:24], "id": repo.name, "modelId": repo.name, "author": repo.name.split("/")[0], "sha": sha,
             "lastModified": DATE, "createdAt": DATE, "private": repo.private, "gated": "manual" if repo.gated else False,
             "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings, "cardData": card}
        )  # fmt: skip

    def entry(self, path: str, content: bytes, repo: Repo) -> dict[str, Any]:
        found: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": git_oid(content),
        }
        if path in repo.lfs:
            found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return found

    def folders(self, files: dict[str, bytes]) -> set[str]:
        return {"/".join(path.split("/")[:end]) for path in files for end in range(1, path.count("/") + 1)}

    def at(self, request: web.Request, kind: str) -> tuple[Repo, str, dict[str, bytes]] | web.Response:
        """The repository, the commit and its files that a request asks for."""
        repo = self.find(request, kind)
        if isinstance(repo, web.Response):
            return repo
        commit = repo.at(request.match_info.get("revision", "main"))
        return failure(404, "RevisionNotFound", "Invalid rev id") if commit is None else (repo, *commit)

    async def tree(self, request: web.Request) -> web.Response:
        found = self.at(request, request.match_info["kind"][:-1])
        if isinstance(found, web.Response):
            return found
        repo, _, files = found
        under, deep = (
            request.match_info.get("path", "").strip("/"),
            request.query.get("recursive", "").lower() in ("true", "1"),
        )
        if under and under not in self.folders(files):
            return failure(404, "EntryNotFound", f"{under} does not exist")
        inside = f"{under}/" if under else ""
        rows = [self.entry(path, content, repo) for path, content in sorted(files.items()) if path.startswith(inside)]
        rows += [{"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
                 for path in sorted(self.folders(files)) if path.startswith(inside)]  # fmt: skip
        if not deep:
            rows = [row for row in rows if "/" not in row["path"][len(inside) :]]
        return web.json_response(rows)

    async def paths_info(self, request: web.Request) -> web.Response:
        found = self.at(request, request.match_info["kind"][:-1])
        if isinstance(found, web.Response):
            return found
        repo, _, files = found
        body = await request.json() if request.content_type == "application/json" else await request.post()
        paths = body["paths"] if isinstance(body["paths"], list) else body.getall("paths")
        rows = [self.entry(path, files[path], repo) for path in paths if path in files]
        rows += [{"type": "directory", "path": path, "oid": "0" * 40} for path in paths if path in self.folders(files)]
        return web.json_response(rows)

    async def preupload(self, request: web.Request) -> web.Response:
        repo = self.writable(request)
        if isinstance(repo, web.Response):
            return repo
        body = await request.json()
        _, files = repo.at(request.match_info["revision"]) or ("", {})
        modes = []
        for file in body["files"]:
            old = files.get(file["path"])
            mode = "lfs" if file["path"].endswith((".parquet", ".safetensors")) else "regular"
            digest = None if old is None else hashlib.sha256(old).hexdigest() if mode == "lfs" else git_oid(old)
            modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": digest})
        return web.json_response({"files": modes})

    def writable(self, request: web.Request) -> Repo | web.Response:
        repo = self.find(request, request.match_info["kind"][:-1])
        if isinstance(repo, web.Response):
            return repo
        if self.user(request) != repo.name.split("/")[0]:
            return failure(403, "Forbidden", "You are not allowed to write to this repository")
        return repo

    async def lfs(self, request: web.Request) -> web.Response:
        body = await request.json()
        objects = []
        for item in body["objects"]:
            answer = {"oid": item["oid"], "size": item["size"], "authenticated": True}
            if item["oid"] not in self.objects:
                answer["actions"] = {"upload": {"href": f"http://{request.host}/lfs/{item['oid']}", "header": {}}}
            objects.append(answer)
        return web.json_response({"transfer": "basic", "objects": objects}, content_type="application/vnd.git-lfs+json")

    async def put(self, request: web.Request) -> web.Response:
        content = await request.read()
        assert hashlib.sha256(content).hexdigest() == request.match_info["oid"]
        self.objects[request.match_info["oid"]] = content
        return web.Response()

    async def commit(self, request: web.Request) -> web.Response:
        repo = self.writable(request)
        if isinstance(repo, web.Response):
            return repo
        if (self.folder / "fail-commits").exists():
            return failure(500, "Broken", "the disk of the Hub is full")
        branch = request.match_info["revision"]
        if branch not in repo.branches:
            return failure(404, "RevisionNotFound", "Invalid rev id")
        files = dict(repo.commits[repo.branches[branch]])
        for line in (await request.read()).splitlines():
            row = json.loads(line)
            kind, value = row["key"], row["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
                repo.lfs.add(value["path"])
            elif kind == "deletedFile":
                files.pop(value["path"])
            elif kind == "deletedFolder":
                files = {path: content for path, content in files.items() if not path.startswith(f"{value['path']}/")}
        sha = repo.commit(branch, files)
        url = f"http://{request.host}/{'' if repo.kind == 'model' else repo.kind + 's/'}{repo.name}/commit/{sha}"
        return web.json_response({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    async def validate(self, request: web.Request) -> web.Response:
        return web.json_response({"errors": [], "warnings": []})

    async def refs(self, request: web.Request) -> web.Response:
        repo = self.find(request, request.match_info["kind"][:-1])
        if isinstance(repo, web.Response):
            return repo
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in repo.branches.items()]
        return web.json_response({"branches": branches, "tags": [], "converts": []})

    async def branch(self, request: web.Request) -> web.Response:
        repo = self.writable(request)
        if isinstance(repo, web.Response):
            return repo
        name = request.match_info["branch"]
        if name in repo.branches:
            return failure(409, "Conflict", f"Reference already exists: {name}")
        repo.branches[name] = repo.branches["main"]
        return web.json_response({}, status=201)

    async def settings(self, request: web.Request) -> web.Response:
        repo = self.writable(request)
        if isinstance(repo, web.Response):
            return repo
        body = await request.json()
        repo.private = body.get("private", body.get("visibility") == "private")
        repo.gated = bool(body.get("gated", repo.gated))
        return web.json_response({"private": repo.private})

    async def resolve(self, request: web.Request) -> web.StreamResponse:
        kind = next((kind for kind in ("dataset", "space") if request.path.startswith(f"/{kind}s/")), "model")
        found = self.at(request, kind)
        if isinstance(found, web.Response):
            return found
        repo, sha, files = found
        if repo.gated and self.user(request) != repo.name.split("/")[0]:
            return failure(403, "GatedRepo", f"Access to {kind} {repo.name} is restricted and you are not in the list.")
        path = request.match_info["path"]
        if path not in files:
            return failure(404, "EntryNotFound", f"{path} does not exist")
        content = files[path]
        etag = hashlib.sha256(content).hexdigest() if path in repo.lfs else hashlib.sha1(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes", "X-Linked-Etag": f'"{etag}"',
                   "X-Linked-Size": str(len(content))}  # fmt: skip
        status = 200
        if "Range" in request.headers:
            first, last = request.headers["Range"].removeprefix("bytes=").split("-")
            begin, end = int(first), min(int(last) if last else len(content) - 1, len(content) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
            content, status = content[begin : end + 1], 206
        if request.method == "HEAD":
            return web.Response(status=status, headers={**headers, "Content-Length": str(len(content))})
        return web.Response(body=content, status=status, headers=headers)


def make_app(hub: Hub) -> web.Application:
    app = web.Application(client_max_size=1 << 30, middlewares=[hub.note])
    repo = r"/api/{kind:models|datasets|spaces}/{user}/{name}"
    add = app.router.add_route
    add("GET", "/api/whoami-v2", hub.whoami)
    add("POST", "/api/repos/create", hub.create)
    add("POST", "/api/validate-yaml", hub.validate)
    add("GET", repo, hub.info)
    add("GET", repo + "/revision/{revision}", hub.info)
    add("GET", repo + "/tree/{revision}", hub.tree)
    add("GET", repo + "/tree/{revision}/{path:.*}", hub.tree)
    add("GET", repo + "/refs", hub.refs)
    add("PUT", repo + "/settings", hub.settings)
    add("POST", repo + "/branch/{branch}", hub.branch)
    add("POST", repo + "/paths-info/{revision}", hub.paths_info)
    add("POST", repo + "/preupload/{revision}", hub.preupload)
    add("POST", repo + "/commit/{revision}", hub.commit)
    for prefix in ("", "/datasets", "/spaces"):
        add("POST", prefix + "/{user}/{name}.git/info/lfs/objects/batch", hub.lfs)
        for method in ("GET", "HEAD"):
            add(method, prefix + "/{user}/{name}/resolve/{revision}/{path:.*}", hub.resolve)
    add("PUT", "/lfs/{oid}", hub.put)
    return app


async def serve() -> None:
    folder = Path(sys.argv[1])
    runner = web.AppRunner(make_app(Hub(folder)), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    part = folder / "port.part"
    part.write_text(str(site._server.sockets[0].getsockname()[1]))
    part.rename(folder / "port")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve())
