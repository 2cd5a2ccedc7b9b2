"""Google Cloud Storage's JSON API on a loopback port, kept in memory.

Real clients talk to it: gcsfs (by STORAGE_EMULATOR_HOST) and TensorStore (by
TENSORSTORE_GCS_HTTP_URL). It knows what those two ask for, counts the bytes
that each of several processes reads of each object, and refuses what a test
says.
"""

import base64
import collections
import dataclasses
import email
import http.server
import itertools
import json
import re
import threading
import urllib.parse
import uuid

_PAGE = 1000


def crc32c(data: bytes) -> str:
  """As the API has it: of Castagnoli's polynomial, big-endian, in base 64."""
  try:
    import google_crc32c

    value = google_crc32c.value(data)
  except ImportError:
    value = 0xFFFFFFFF
    for byte in data:
      value ^= byte
      for _ in range(8):
        value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    value ^= 0xFFFFFFFF
  return base64.b64encode(value.to_bytes(4, "big")).decode()


@dataclasses.dataclass
class Stored:
  data: bytes
  generation: int
  updated: str

  def described(self, bucket: str, name: str) -> dict:
    return {
      "kind": "storage#object",
      "id": f"{bucket}/{name}/{self.generation}",
      "name": name,
      "bucket": bucket,
      "generation": str(self.generation),
      "metageneration": "1",
      "contentType": "application/octet-stream",
      "storageClass": "STANDARD",
      "size": str(len(self.data)),
      "crc32c": crc32c(self.data),
      "etag": f"etag{self.generation}",
      "timeCreated": self.updated,
      "updated": self.updated,
    }


class FakeGCS(http.server.ThreadingHTTPServer):
  """The server; a context manager that serves within a thread.

  Attributes:
    objects: by bucket and name.
    sent: bytes read, by (who, bucket/name); who, as `environment` was told.
    forbidden: (bucket, what follows "storage.objects."), answered with 403.
  """

  daemon_threads = True
  request_queue_size = 128

  def __init__(self, port: int = 0):
    super().__init__(("127.0.0.1", port), _Handler)
    self.objects: dict[str, dict[str, Stored]] = collections.defaultdict(dict)
    self.sent: collections.Counter = collections.Counter()
    self.forbidden: set[tuple[str, str]] = set()
    self.uploads: dict[str, tuple[str, str, bytearray]] = {}
    self.lock = threading.RLock()
    self._generations = itertools.count(1_700_000_000_000_000)

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_address[1]}"

  def environment(self, who: str = "test") -> dict[str, str]:
    """What a process needs to find it."""
    url = f"{self.url}/as/{who}"
    return {
      "FSSPEC_GS_TOKEN": "anon",
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
      "STORAGE_EMULATOR_HOST": url,
      "TENSORSTORE_GCS_HTTP_URL": url,
    }

  def put(self, bucket: str, name: str, data: bytes) -> Stored:
    with self.lock:
      generation = next(self._generations)
      seconds = generation % 86_400
      time = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
      kept = Stored(bytes(data), generation, f"2026-01-01T{time}.000Z")
      self.objects[bucket][name] = kept
      return kept

  def put_folder(self, folder, url: str) -> None:
    """Copies a folder's files to gs://BUCKET/PATH."""
    bucket, _, path = url.removeprefix("gs://").partition("/")
    for file in sorted(folder.rglob("*")):
      if file.is_file():
        name = f"{path}/{file.relative_to(folder).as_posix()}"
        self.put(bucket, name.lstrip("/"), file.read_bytes())

  def names(self, bucket: str) -> list[str]:
    with self.lock:
      return sorted(self.objects[bucket])

  def __enter__(self) -> "FakeGCS":
    threading.Thread(target=self.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *_) -> None:
    self.shutdown()
    self.server_close()

  def handle_error(self, request, client_address) -> None:
    """Clients that were killed are no news."""


class _Refused(Exception):
  def __init__(self, status: int, reason: str):
    super().__init__(reason)
    self.status = status


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  # An answer is one packet: a second would wait for the first one's receipt.
  wbufsize = -1
  disable_nagle_algorithm = True
  server: FakeGCS

  def log_message(self, *_) -> None:
    pass

  def do_GET(self) -> None:
    self._answer("GET")

  def do_POST(self) -> None:
    self._answer("POST")

  def do_PUT(self) -> None:
    self._answer("PUT")

  def do_DELETE(self) -> None:
    self._answer("DELETE")

  def _answer(self, method: str) -> None:
    body = self._body()
    try:
      status, headers, data = self._route(method, self.path, self.headers, body)
    except _Refused as error:
      status, headers = error.status, {"Content-Type": "application/json"}
      data = _json({"error": {"code": status, "message": str(error)}})
    self.send_response(status)
    for key, value in headers.items():
      self.send_header(key, value)
    if status in (204, 304):  # Which have none.
      data = b""
    else:
      self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)
    self.wfile.flush()

  def _body(self) -> bytes:
    if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length") or 0))
    parts = []
    while size := int(self.rfile.readline().split(b";")[0], 16):
      parts.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b"".join(parts)

  def _route(self, method, target, headers, body):
    url = urllib.parse.urlsplit(target)
    query = dict(urllib.parse.parse_qsl(url.query))
    _, _, self.who, path = url.path.split("/", 3)  # Of /as/WHO/...
    path = f"/{path}"
    if path.startswith("/batch/"):
      return self._batch(headers, body)
    if found := re.fullmatch("/upload/storage/v1/b/([^/]+)/o", path):
      return self._upload(method, found[1], query, headers, body)
    if found := re.fullmatch("/(?:download/)?storage/v1/b/([^/]+)", path):
      return self._found({"kind": "storage#bucket", "name": found[1]})
    if found := re.fullmatch("/(?:download/)?storage/v1/b/([^/]+)/o", path):
      return self._list(found[1], query)
    name = "/(?:download/)?storage/v1/b/([^/]+)/o/(.+)"
    copy = re.fullmatch(f"{name}/(copyTo|rewriteTo)/b/([^/]+)/o/(.+)", path)
    if copy:
      return self._copy(*map(urllib.parse.unquote, copy.groups()))
    if found := re.fullmatch(f"{name}/moveTo/o/(.+)", path):
      bucket, key, to = map(urllib.parse.unquote, found.groups())
      moved = self._copy(bucket, key, "moveTo", bucket, to)
      self._delete(bucket, key, {})
      return moved
    if found := re.fullmatch(name, path):
      bucket, key = map(urllib.parse.unquote, found.groups())
      if method == "DELETE":
        return self._delete(bucket, key, query)
      return self._get(bucket, key, query, headers)
    raise _Refused(501, f"the fake does not know {method} {target}")

  def _found(self, what: dict, status: int = 200):
    return status, {"Content-Type": "application/json"}, _json(what)

  def _require(self, bucket: str, verb: str) -> None:
    if (bucket, verb) in self.server.forbidden:
      raise _Refused(
        403,
        "pod@project.iam.gserviceaccount.com does not have "
        f"storage.objects.{verb} access to the Google Cloud Storage object.",
      )

  def _object(self, bucket: str, key: str) -> Stored:
    with self.server.lock:
      found = self.server.objects[bucket].get(key)
    if found is None:
      raise _Refused(404, f"No such object: {bucket}/{key}")
    return found

  def _get(self, bucket, key, query, headers):
    self._require(bucket, "get")
    found = self._object(bucket, key)
    wanted = query.get("generation")
    if wanted not in (None, str(found.generation)):
      raise _Refused(404, f"No such generation: {bucket}/{key}#{wanted}")
    _check_generation(query, found)
    if query.get("alt") != "media":
      return self._found(found.described(bucket, key))
    data, status = found.data, 200
    said = {
      "Content-Type": "application/octet-stream",
      "x-goog-generation": str(found.generation),
      "x-goog-hash": f"crc32c={crc32c(data)}",
    }
    if part := re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range", "")):
      start, stop = part.groups()
      first = int(start) if start else max(len(data) - int(stop), 0)
      last = min(int(stop) if start and stop else len(data) - 1, len(data) - 1)
      if first >= len(data):
        raise _Refused(416, "The requested range cannot be satisfied.")
      said["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
      data, status = data[first : last + 1], 206
    with self.server.lock:
      self.server.sent[self.who, f"{bucket}/{key}"] += len(data)
    return status, said, data

  def _list(self, bucket, query):
    self._require(bucket, "list")
    prefix, between = query.get("prefix", ""), query.get("delimiter")
    after = query.get("pageToken", "")
    most = min(int(query.get("maxResults", _PAGE)), _PAGE)
    low, high = query.get("startOffset", ""), query.get("endOffset")
    items, folders, more = [], [], None
    with self.server.lock:
      stored = sorted(self.server.objects[bucket].items())
    for name, found in stored:
      if not name.startswith(prefix) or name < low or (high and name >= high):
        continue
      entry = name
      if between and between in (rest := name[len(prefix) :]):
        entry = prefix + rest[: rest.index(between) + len(between)]
      if entry <= after or (folders and entry == folders[-1]):
        continue
      if len(items) + len(folders) == most:
        more = max([x["name"] for x in items[-1:]] + folders[-1:])
        break
      if entry == name:
        items.append(found.described(bucket, name))
      else:
        folders.append(entry)
    said = {"kind": "storage#objects", "items": items, "prefixes": folders}
    return self._found(said | ({"nextPageToken": more} if more else {}))

  def _upload(self, method, bucket, query, headers, body):
    kind = query.get("uploadType")
    if method == "PUT" or "upload_id" in query:
      return self._continue(query["upload_id"], headers, body)
    self._require(bucket, "create")
    if kind == "media":
      return self._store(bucket, query["name"], body, query)
    if kind == "multipart":
      text = b"Content-Type: " + headers["Content-Type"].encode()
      message = email.message_from_bytes(text + b"\r\n\r\n" + body)
      about = message.get_payload()[0].get_payload(decode=True)
      # The parser takes line ends of the data for the boundary's.
      boundary = message.get_boundary().encode()
      raw = body.split(b"--" + boundary)[2]
      content = raw.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
      return self._store(bucket, json.loads(about)["name"], content, query)
    if kind == "resumable":
      name = query.get("name") or json.loads(body)["name"]
      number = uuid.uuid4().hex
      self.server.uploads[number] = bucket, name, bytearray()
      where = f"{self.server.url}/as/{self.who}/upload/storage/v1/b/{bucket}/o"
      where += f"?uploadType=resumable&upload_id={number}"
      return 200, {"Location": where}, b""
    raise _Refused(501, f"the fake does not know uploadType={kind!r}")

  def _continue(self, number, headers, body):
    bucket, name, data = self.server.uploads[number]
    said = headers.get("Content-Range", "bytes 0-0/*")
    data += body
    if said.endswith("/*"):
      return 308, {"Range": f"bytes=0-{len(data) - 1}"} if data else {}, b""
    del self.server.uploads[number]
    return self._store(bucket, name, data, {})

  def _store(self, bucket, name, data, query):
    with self.server.lock:
      _check_generation(query, self.server.objects[bucket].get(name))
      kept = self.server.put(bucket, name, data)
    return self._found(kept.described(bucket, name))

  def _copy(self, bucket, key, how, bucket2, key2):
    self._require(bucket2, "create")
    kept = self.server.put(bucket2, key2, self._object(bucket, key).data)
    said = kept.described(bucket2, key2)
    size = str(len(kept.data))
    if how == "rewriteTo":
      said = {
        "kind": "storage#rewriteResponse",
        "done": True,
        "resource": said,
        "objectSize": size,
        "totalBytesRewritten": size,
      }
    return self._found(said)

  def _delete(self, bucket, key, query):
    self._require(bucket, "delete")
    with self.server.lock:
      _check_generation(query, self._object(bucket, key))
      del self.server.objects[bucket][key]
    return 204, {}, b""

  def _batch(self, headers, body):
    """Several requests in one, as gcsfs deletes."""
    text = b"Content-Type: " + headers["Content-Type"].encode()
    message = email.message_from_bytes(text + b"\r\n\r\n" + body)
    answers = []
    for part in message.get_payload():
      request = part.get_payload(decode=True).decode()
      method, target = request.split()[:2]
      target = f"/as/{self.who}/storage{target.partition('/storage')[2]}"
      try:
        status, _, data = self._route(method, target, {}, b"")
      except _Refused as error:
        status, data = error.status, str(error).encode()
      answers.append(
        f"--batch\r\nContent-Type: application/http\r\nContent-ID: <response-"
        f"{part.get('Content-ID', '').strip('<>')}>\r\n\r\nHTTP/1.1 {status} "
        f"OK\r\nContent-Length: {len(data)}\r\n\r\n{data.decode()}\r\n"
      )
    whole = "".join(answers) + "--batch--\r\n"
    said = {"Content-Type": "multipart/mixed; boundary=batch"}
    return 200, said, whole.encode()


def _check_generation(query: dict[str, str], found: Stored | None) -> None:
  wanted = query.get("ifGenerationMatch")
  if wanted and int(wanted) != (found.generation if found else 0):
    raise _Refused(412, "At least one of the pre-conditions did not hold.")
  unwanted = query.get("ifGenerationNotMatch")
  if unwanted and int(unwanted) == (found.generation if found else 0):
    raise _Refused(304, "Not modified.")


def _json(what: dict) -> bytes:
  return json.dumps(what).encode()
