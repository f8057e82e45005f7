"""Every way in which a download can go wrong, against a real HTTP server on localhost that misbehaves on request.

It ends in verified files or in one line, no file has a name that it does not deserve, and a later run completes.
"""

import collections
import contextlib
import http.server
import io
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import types

import prepare
import pyarrow.parquet
import pytest
from conftest import REPO

VAL, HOLDOUT, SHARD = "shard_06542.parquet", "shard_06541.parquet", "shard_00000.parquet"
FOLDER = "/datasets/karpathy/climbmix-400b-shuffle/resolve/main/"
TOKEN = "hf_secret_0123456789"
SETTINGS = dict(DATASET="climbmix", VOCAB_SIZE=300, MAX_SEQ_LEN=16, DOWNLOAD_WAITS=(0,) * 5, CHUNK_BYTES=2**10)


def parquet(column, name="text"):
    """As bytes, uncompressed and in small row groups, so that faults can be placed."""
    table, file = pyarrow.table({name: column}), io.BytesIO()
    pyarrow.parquet.write_table(table, file, compression="none", row_group_size=100, use_dictionary=False)
    return file.getvalue()


draw = random.Random(0).random
GOOD = {name: parquet([f"{draw()} " * 4 for _ in range(1500)]) for name in (VAL, HOLDOUT, SHARD)}  # 120 kB each
SIZE = len(GOOD[SHARD])


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as Hugging Face does. `faults[name]` lists a dict for each request; after them it is healthy.

    status, headers: instead of a file; body: another; cut: share of it after which the connection ends; length:
    added to Content-Length; ranges: False ignores Range; stall: seconds of silence at the end; slow: after each 1 kB.
    """

    def log_message(self, *args):
        pass

    def do_GET(self):
        with contextlib.suppress(ConnectionError):
            name = self.path.removeprefix(FOLDER)
            self.server.names.append(name)
            self.server.headers.append(self.headers)
            faults = self.server.faults[name]
            self.answer(name, **(faults.pop(0) if faults else {}))

    def answer(self, name, status=None, headers={}, body=None, cut=1, length=0, ranges=True, stall=0, slow=0):
        body = GOOD[name] if body is None else body
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if ranges else 0
        if start and start >= len(body):
            status = status or 416
        self.send_response(status or (206 if start else 200))
        headers = headers if status else {"Content-Length": len(body) - start + length}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        end = 0 if status else int(len(body) * cut)
        for piece in range(start, end, 1024):
            self.server.sent[name] += min(1024, end - piece)  # before the client can have it
            self.wfile.write(body[piece:min(piece + 1024, end)])
            time.sleep(slow)
        time.sleep(stall)


@contextlib.contextmanager
def serving():
    """A server with the `names` and `headers` of its requests, and the bytes `sent`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as hub:
        hub.names, hub.headers = [], []
        hub.faults, hub.sent = collections.defaultdict(list), collections.Counter()
        threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        yield hub
        hub.shutdown()


def values(header, hub):
    return [headers[header] for headers in hub.headers]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A healthy server that prepare.py uses, without waits between attempts, and in chunks as small as the files."""
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setenv("NETRC", os.devnull)
        for key, value in dict(SETTINGS, CACHE=tmp_path).items():
            monkeypatch.setattr(prepare, key, value)
        prepare.raw_dir().mkdir(parents=True)
        yield hub


def failure(command, *arguments):
    """The line `command` ends with, or None. It leaves complete files, and parts where it fails."""
    try:
        line = command(*arguments)
    except SystemExit as error:
        line = error.code
        assert isinstance(line, str) and "\n" not in line and len(line) < 250
    for path in prepare.raw_dir().iterdir():
        if path.suffix == ".part":
            assert line and path.stem in GOOD
        else:
            assert path.read_bytes() == GOOD[path.name]
    return line


def fetch(*names):
    line = failure(prepare.fetch_all, names, 2)
    if line:
        assert re.fullmatch(r"download of shard_\d+\.parquet failed: .*; check .* and run the command again: .*", line)
    else:
        assert all((prepare.raw_dir() / name).exists() for name in names)
    return line


def run_main(monkeypatch, shards=1):
    monkeypatch.setattr(sys, "argv", ["prepare.py", f"--num-shards={shards}"])
    return failure(prepare.main)


def case(title, *faults, part=b"", requests=2, sent=1, problem=None, seconds=0, **settings):
    """The server's first answers, what lies there, constants and environment; then what must hold: requests and
    least seconds until success or the problem, and how many files' bytes were sent when a later run has ended."""
    return pytest.param(types.SimpleNamespace(**locals()), id=title)


def busy(seconds):
    return dict(status=429, headers={"Retry-After": str(seconds)})


CUT, BROKEN = dict(cut=0.5), dict(status=500)
DAMAGED = GOOD[SHARD].replace(GOOD[SHARD][-20_000:-19_900], b"\xff" * 100)
AT_ONCE = dict(requests=0, DOWNLOAD_WAITS=(9,))


@pytest.mark.parametrize("case", [
    case("refused connection is tried again", HF_ENDPOINT="http://127.0.0.1:9", requests=0, problem="ConnectionError",
         seconds=0.4, DOWNLOAD_WAITS=(0.4,)),
    case("endpoint without a scheme", problem="MissingSchema", HF_ENDPOINT="huggingface.co", **AT_ONCE),
    case("token of two lines", problem="InvalidHeader", HF_TOKEN=f"{TOKEN}\nx", **AT_ONCE),
    case("token beyond latin-1", problem="UnicodeEncodeError", HF_TOKEN=f"{TOKEN}\u2026", **AT_ONCE),
    *(case(f"HTTP {status} fails at once", dict(status=status), requests=1, problem=f"HTTP {status}", HF_TOKEN=TOKEN)
      for status in (401, 403, 404)),
    case("broken server is asked again after the waits", BROKEN, BROKEN, requests=3, seconds=0.4,
         DOWNLOAD_WAITS=(0.1, 0.3)),
    case("busy server is asked again after Retry-After", busy(1), seconds=1),
    case("busy server is given up", busy(0), busy(0), problem="HTTP 429", DOWNLOAD_WAITS=(9,)),
    case("Retry-After is bounded", busy(9), MAX_RETRY_AFTER=0),
    case("cut connection is resumed", CUT),
    case("cut connection starts anew where Range is ignored", CUT, dict(ranges=False), sent=1.5),
    case("connection cut for ever is resumed by a later run", *[CUT] * 6, requests=6, problem="Error"),
    case("silent server is given up and resumed", CUT | dict(stall=9), DOWNLOAD_TIMEOUT=0.3),
    case("file longer than announced", *[dict(length=-1000)] * 6, requests=6, sent=7, problem="not a parquet file"),
    case("file shorter than announced is asked for its rest", dict(length=1000)),
    case("bad content is fetched again", dict(body=DAMAGED), sent=2),
    case("part that is the whole file is accepted", part=GOOD[SHARD], requests=1, sent=0),
    case("part of another file is replaced", part=GOOD[VAL][:1000], sent=2),
    case("part longer than the file is replaced", part=b"x" * 10**6),
])
def test_download(hub, monkeypatch, capfd, case):
    hub.faults[SHARD] += case.faults
    if case.part:
        (prepare.raw_dir() / f"{SHARD}.part").write_bytes(case.part)
    with monkeypatch.context() as patch:
        for key, value in case.settings.items():
            patch.setenv(key, value) if key.startswith("HF") else patch.setattr(prepare, key, value)
        start = time.monotonic()
        line = fetch(SHARD)
    assert case.seconds <= time.monotonic() - start < 5
    assert case.problem in line if case.problem else line is None
    assert TOKEN not in "".join([line or "", *capfd.readouterr()])  # exceptions quote the header that they reject
    assert hub.names == [SHARD] * case.requests
    assert fetch(SHARD) is None
    assert abs(hub.sent[SHARD] - case.sent * SIZE) <= case.requests * 1024  # a cut loses a chunk


def test_cut_behind_a_redirect_is_resumed_and_the_other_host_never_gets_the_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN + "\n")  # as read from a file
    with serving() as other:
        location = f"http://localhost:{other.server_port}{FOLDER}{SHARD}"
        hub.faults[SHARD] = [dict(status=302, headers={"Location": location})] * 2
        other.faults[SHARD] = [CUT]
        assert fetch(SHARD) is None
    assert values("Authorization", hub) == [f"Bearer {TOKEN}"] * 2
    assert values("Authorization", other) == [None] * 2
    assert values("Range", other)[0] is None and values("Range", other)[1]


BAD = {
    "html": b"<!DOCTYPE html><html>Please log in</html>",
    "truncated": GOOD[SHARD][:-1],
    "row group": DAMAGED,
    "no text column": parquet(["a", "b"], name="content"),
    "numbers": parquet([1, 2, 3]),
    "only nulls": parquet(pyarrow.array([None, None], pyarrow.string())),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_content_is_never_named_and_is_replaced_where_it_has_the_name(hub, kind):
    assert fetch(VAL) is None
    hub.faults[SHARD] = [dict(body=BAD[kind])] * 6
    assert f"{SHARD} failed: not a parquet file of text" in fetch(VAL, SHARD)
    assert [path.name for path in prepare.raw_dir().iterdir()] == [VAL]
    (prepare.raw_dir() / SHARD).write_bytes(BAD[kind])  # damaged since it was fetched
    assert fetch(VAL, SHARD) is None
    assert hub.names == [VAL] + [SHARD] * 7


class FullFile(io.FileIO):
    def write(self, data):
        if self.tell() > SIZE // 2:
            raise OSError(28, "No space left on device")
        return super().write(data)


def test_full_disk_is_one_line_at_once_and_a_later_run_with_room_resumes(hub, monkeypatch):
    monkeypatch.setattr(prepare, "DISK_GB", dict(climbmix=0))  # or the disk is found too small before any request
    monkeypatch.setattr(prepare, "open", FullFile, raising=False)
    assert run_main(monkeypatch) == "cannot prepare climbmix: [Errno 28] No space left on device"
    assert len(set(hub.names)) == len(hub.names)
    hub.headers.clear()
    monkeypatch.delattr(prepare, "open")
    assert run_main(monkeypatch) is None
    assert any(values("Range", hub))


def test_failure_of_one_file_stops_the_others(hub):
    hub.faults.update({VAL: [dict(status=404)], SHARD: [dict(slow=0.05)]})  # 6 s
    start = time.monotonic()
    assert VAL in fetch(VAL, SHARD)
    assert time.monotonic() - start < 3 and not (prepare.raw_dir() / SHARD).exists()
    assert fetch(VAL, SHARD) is None


def test_command_prepares_verifies_and_then_needs_no_network(hub, monkeypatch, capsys):
    for first in (True, False):
        assert run_main(monkeypatch) is None
        out = capsys.readouterr().out
        assert "\nready: climbmix-" in out and ("training a tokenizer" in out) == first
        assert sorted(hub.names) == sorted(GOOD)
        monkeypatch.setenv("HF_ENDPOINT", "nowhere")


def test_validation_shard_failing_alone_prepares_nothing_and_a_later_run_completes(hub, monkeypatch):
    hub.faults[VAL] = [BROKEN] * 6
    assert f"{VAL} failed: HTTP 500" in run_main(monkeypatch)
    with pytest.raises(SystemExit, match="run: uv run prepare.py"):
        prepare.load_manifest()
    assert run_main(monkeypatch) is None


@pytest.mark.parametrize("shards", [0, -2, 6542])
def test_impossible_number_of_shards_is_refused_without_a_request(hub, monkeypatch, shards):
    assert run_main(monkeypatch, shards) == f"--num-shards {shards}: choose 1 to 6541, or -1 for all"
    assert hub.names == []


# torch takes seconds to import and is not used here
DRIVER = f"""
import sys, pathlib, unittest.mock
sys.modules.update(dict.fromkeys(("torch", "torch.nn", "torch.nn.functional"), unittest.mock.MagicMock()))
import prepare
vars(prepare).update({SETTINGS!r}, CACHE=pathlib.Path(sys.argv.pop()))
prepare.main()
"""


@pytest.mark.parametrize("number, code, words", [
    (0, 0, ""), (signal.SIGKILL, -9, ""),
    (signal.SIGINT, 1, "interrupted: what is complete is kept; run the command again to go on\n"),
])
def test_second_command_waits_for_the_first_and_continues(hub, tmp_path, monkeypatch, number, code, words):
    hub.faults[SHARD] = [dict(slow=0.02)]  # 2.4 s
    command = [sys.executable, "-c", DRIVER, "--num-shards", "1", tmp_path]
    process = subprocess.Popen(command, cwd=REPO, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    part, deadline = prepare.raw_dir() / f"{SHARD}.part", time.monotonic() + 60
    while not part.exists() or part.stat().st_size < 0.2 * SIZE or len(list(part.parent.glob("*.parquet"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    threading.Timer(0.2, process.send_signal, [number]).start()
    assert run_main(monkeypatch) is None
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, words)
    assert out.endswith("\n") or number == signal.SIGKILL
    assert sorted(hub.names) == sorted([*GOOD, SHARD] if number else GOOD)
    assert not number or int(hub.headers[-1]["Range"][6:-1]) >= 0.2 * SIZE
