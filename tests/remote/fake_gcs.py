"""A bucket of Google Cloud Storage in this process's memory.

Two faces of one dictionary: a file system for `fsspec` (`gs://`, through which
`etils.epath` goes), and a server of the part of the JSON API that TensorStore
uses. Objects appear whole, there is no append, no rename and no directory.
"""

import contextlib
import http.server
import io
import json
import re
import sys
import threading
import types
import urllib.parse
from collections.abc import Iterator

import fsspec
from etils.epath import backend
from fsspec.registry import _registry


class Objects:
  """Name -> (content, generation), and what was asked for."""

  def __init__(self):
    self.lock = threading.Lock()
    self.found: dict[str, tuple[bytes, int]] = {}
    self.uploads: list[str] = []
    self._generation = 0

  def put(self, name: str, data: bytes) -> int:
    with self.lock:
      self._generation += 1
      self.found[name] = data, self._generation
      self.uploads.append(name)
      return self._generation


class FakeFiles(fsspec.AbstractFileSystem):
  """What epath asks of a bucket."""

  protocol = ("gcs", "gs")
  cachable = False
  objects: Objects

  @classmethod
  def _strip_protocol(cls, path):
    path = path if isinstance(path, str) else str(path)
    return re.sub(r"^(gs|gcs)://", "", path).strip("/")

  def info(self, path, **kwargs):
    path = self._strip_protocol(path)
    if path in self.objects.found:
      size = len(self.objects.found[path][0])
      return {"name": path, "size": size, "type": "file", "mtime": 0}
    if any(name.startswith(path + "/") for name in list(self.objects.found)):
      return {"name": path, "size": 0, "type": "directory", "mtime": 0}
    raise FileNotFoundError(path)

  def ls(self, path, detail=True, **kwargs):
    path = self._strip_protocol(path)
    start = path + "/"
    names = {
      start + name[len(start) :].split("/")[0]
      for name in list(self.objects.found)
      if name.startswith(start)
    }
    if not names:
      return [self.info(path)] if detail else [self.info(path)["name"]]
    rows = [self.info(name) for name in sorted(names)]
    return rows if detail else [row["name"] for row in rows]

  def _open(self, path, mode="rb", **kwargs):
    path = self._strip_protocol(path)
    if "r" in mode:
      if path not in self.objects.found:
        raise FileNotFoundError(path)
      return io.BytesIO(self.objects.found[path][0])
    if mode != "wb":
      raise NotImplementedError(f"no {mode} on an object store")
    return _Upload(self.objects, path)

  def makedirs(self, path, exist_ok=False):
    del path, exist_ok

  def mkdir(self, path, create_parents=True, **kwargs):
    del path, create_parents

  def rm(self, path, recursive=False, maxdepth=None):
    del maxdepth
    path = self._strip_protocol(path)
    names = [
      name
      for name in list(self.objects.found)
      if name == path or (recursive and name.startswith(path + "/"))
    ]
    if not names:
      raise FileNotFoundError(path)
    for name in names:
      self.objects.found.pop(name, None)

  def cp_file(self, path1, path2, **kwargs):
    with contextlib.suppress(FileNotFoundError):  # a directory is nothing
      data = self._open(path1).read()
      self.objects.put(self._strip_protocol(path2), data)

  def modified(self, path):
    raise NotImplementedError


class _Upload(io.BytesIO):
  def __init__(self, objects, path):
    super().__init__()
    self._to = objects, path

  def close(self):
    if not self.closed:
      objects, path = self._to
      objects.put(path, self.getvalue())
    super().close()


def _handler(objects: Objects) -> type:
  class Handler(http.server.BaseHTTPRequestHandler):
    """objects: get, list, insert, delete; with generation preconditions."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
      pass

    def _answer(self, status, data=b"", **headers):
      self.send_response(status)
      for name, value in headers.items():
        self.send_header(name.replace("_", "-"), str(value))
      self.send_header("Content-Length", str(len(data)))
      self.end_headers()
      self.wfile.write(data)

    def _asked(self):
      url = urllib.parse.urlsplit(self.path)
      query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
      parts = url.path.split("/")
      bucket = parts[parts.index("b") + 1]
      rest = parts[parts.index("o") + 1 :]
      name = urllib.parse.unquote("/".join(rest))
      return bucket, name, query

    def _stale(self, full, query):
      """Whether the object is not of the generation that was asked for."""
      _, now = objects.found.get(full, (b"", 0))
      wanted = query.get("ifGenerationMatch")
      unwanted = query.get("ifGenerationNotMatch")
      return (wanted is not None and int(wanted) != now) or (
        unwanted is not None and int(unwanted) == now
      )

    def do_GET(self):
      bucket, name, query = self._asked()
      if not name:
        prefix = f"{bucket}/{query.get('prefix', '')}"
        rows = [
          {"name": n[len(bucket) + 1 :], "size": str(len(d)), "generation": g}
          for n, (d, g) in sorted(objects.found.items())
          if n.startswith(prefix)
        ]
        return self._answer(200, json.dumps({"items": rows}).encode())
      full = f"{bucket}/{name}"
      if full not in objects.found:
        return self._answer(404)
      data, generation = objects.found[full]
      if self._stale(full, query):
        return self._answer(304 if "ifGenerationNotMatch" in query else 412)
      more = {"x_goog_generation": generation}
      span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
      if not span:
        return self._answer(200, data, **more)
      first, last, size = *span.groups(), len(data)
      if not first:
        first, last = max(0, size - int(last)), size - 1
      first, last = int(first), min(int(last or size - 1), size - 1)
      if first >= size:
        return self._answer(416)
      more["Content_Range"] = f"bytes {first}-{last}/{size}"
      return self._answer(206, data[first : last + 1], **more)

    def do_POST(self):
      bucket, _, query = self._asked()
      data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
      full = f"{bucket}/{query['name']}"
      if self._stale(full, query):
        return self._answer(412)
      generation = objects.put(full, data)
      row = {"name": query["name"], "generation": str(generation)}
      return self._answer(200, json.dumps(row).encode())

    def do_DELETE(self):
      bucket, name, query = self._asked()
      if self._stale(f"{bucket}/{name}", query):
        return self._answer(412)
      found = objects.found.pop(f"{bucket}/{name}", None)
      return self._answer(404 if found is None else 204)

  return Handler


@contextlib.contextmanager
def bucket(monkeypatch) -> Iterator[Objects]:
  """Makes `gs://` name objects in memory, for this process."""
  objects = Objects()
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(objects))
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  address = f"http://127.0.0.1:{server.server_port}"
  monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
  monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
  files = type("Files", (FakeFiles,), {"objects": objects})
  monkeypatch.setitem(_registry, "gcs", files)
  # Orbax asks Google's own client whether the bucket has real folders.
  plain = types.SimpleNamespace(hierarchical_namespace_enabled=False)
  cloud, storage = (types.ModuleType(n) for n in ("cloud", "storage"))
  cloud.storage = storage
  storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda _: plain)
  monkeypatch.setitem(sys.modules, "google.cloud", cloud)
  monkeypatch.setitem(sys.modules, "google.cloud.storage", storage)
  backend.fsspec_backend._get_filesystem.cache_clear()
  try:
    yield objects
  finally:
    backend.fsspec_backend._get_filesystem.cache_clear()
    server.shutdown()
    server.server_close()
