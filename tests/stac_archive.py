"""A STAC API over a folder, with the faults that servers have: `python stac_archive.py FOLDER`, a process of its own.

A path begins with the name of a fault: /hang waits for an event that only /release sets, /flaky fails twice and then
answers, /broken always fails, /busy asks to wait for an hour and then answers, /loop repeats a page, /short gives fewer
items than it states, /get links its pages by GET. /count tells how many requests came for each.
"""

import json
import re
import sys
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event
from urllib.parse import parse_qs, urlsplit

PAGE, RELEASED, COUNT = 3, Event(), Counter()


class Archive(BaseHTTPRequestHandler):
    """Answer searches over items.json, and ranges of the files of a folder."""

    protocol_version = "HTTP/1.1"

    def send(self, status, body, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    def handle_fault(self):
        """Do what the path's first part says; True where that was all."""
        fault = urlsplit(self.path).path.split("/")[1]
        COUNT[fault] += 1
        if fault == "hang":
            RELEASED.wait()
            self.close_connection = True
            return True
        if fault == "broken" or (fault == "flaky" and COUNT[fault] in (1, 3)):
            self.send(503 if fault == "broken" else 500, {"description": "out of order"})
            return True
        if fault == "busy" and COUNT[fault] == 1:
            self.send(429, {}, Retry_After=3600)
            return True
        return False

    def do_GET(self):
        where = urlsplit(self.path)
        first, *rest = where.path.strip("/").split("/")
        if first in ("count", "release"):
            if first == "release":
                RELEASED.set()
            return self.send(200, dict(COUNT))
        if self.handle_fault():
            return None
        if rest == ["search"]:
            asked = {key: values[0] for key, values in parse_qs(where.query).items()}
            return self.search(first, json.loads(asked["question"]))
        path = self.server.folder / first
        if first.endswith(".tif"):
            return self.file(path)
        base = f"http://{self.headers['Host']}/{first}"
        kind = "application/geo+json"
        links = [
            {"rel": "self", "href": base},
            {"rel": "search", "href": f"{base}/search", "type": kind, "method": "POST"},
        ]
        conforms = [f"https://api.stacspec.org/v1.0.0/{part}" for part in ("core", "item-search")]
        about = {"type": "Catalog", "id": "archive", "description": "-", "stac_version": "1.0.0"}
        return self.send(200, about | {"links": links, "conformsTo": conforms})

    do_HEAD = do_GET

    def file(self, path):
        if not path.is_file():
            return self.send(404, {})
        data, asked = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.send(200, data)
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return self.send(416, b"")
        return self.send(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}")

    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.handle_fault():
            self.search(urlsplit(self.path).path.split("/")[1], question)

    def search(self, fault, question):
        base = f"http://{self.headers['Host']}"
        items = json.loads((self.server.folder / "items.json").read_text().replace("BASE", base))
        begin, end = question["datetime"].split("/")
        found = [i for i in items if begin <= i["properties"]["datetime"] <= end]
        found = [i for i in found if i["collection"] in question["collections"]]
        start = 0 if fault == "loop" else question.get("token", 0)
        following = question | {"token": start + PAGE}
        link = {"rel": "next", "href": f"{base}/{fault}/search", "method": "POST", "body": following}
        if fault == "get":
            link = {"rel": "next", "href": f"{base}/get/search?question={json.dumps(following)}", "method": "GET"}
        page = found[start : start + PAGE]
        more = start + PAGE < len(found) or fault == "loop"
        stated = {"numberMatched": len(found) + (2 if fault == "short" else 0)}
        self.send(200, {"type": "FeatureCollection", "features": page, "links": [link] if more else [], **stated})

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Archive)
    server.folder = Path(sys.argv[1])
    print(server.server_port, flush=True)
    server.serve_forever()
