"""A hub in one process: what huggingface_hub asks of a server to make a repository and to commit files to it.

Only the plain LFS way (HF_HUB_DISABLE_XET=1). What was sent is kept: `requests`, and the files of `commits`.
"""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LocalHub(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, authorization
        self.objects: dict[str, bytes] = {}  # of LFS, by sha256
        self.commits: dict[str, dict[str, bytes]] = {}  # by repository: path, content

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def body(self) -> bytes:
        self.server.requests.append((self.command, self.path, self.headers["Authorization"]))
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def answer(self, content: dict | list):
        sent = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def do_PUT(self):
        self.server.objects[self.path.rsplit("/", 1)[1]] = self.body()
        self.answer({})

    def do_POST(self):
        lines = [json.loads(line) for line in self.body().splitlines()]
        given, url = lines[0], self.server.url
        if self.path == "/api/repos/create":
            self.answer({"url": f"{url}/{given['organization']}/{given['name']}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = []
            for path in (f["path"] for f in given["files"]):
                mode = "lfs" if path.endswith(".safetensors") else "regular"
                files.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            self.answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            upload = {o["oid"]: {"upload": {"href": f"{url}/put/{o['oid']}"}} for o in given["objects"]}
            self.answer(
                {"transfer": "basic", "objects": [{**o, "actions": upload[o["oid"]]} for o in given["objects"]]}
            )
        elif "/commit/" in self.path:
            repository = self.path.removeprefix("/api/models/").split("/commit/")[0]
            files = self.server.commits.setdefault(repository, {})
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                else:
                    files[value["path"]] = self.server.objects[value["oid"]]
            self.answer({"commitUrl": f"{url}/{repository}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.send_error(404)

    def log_message(self, *_):
        pass
