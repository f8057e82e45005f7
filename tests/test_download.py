"""Every way in which a download can go wrong, against a real HTTP server on localhost that misbehaves on request.

Each fault ends in complete and verified files or in SystemExit with one line; no file has a name that it does
not deserve, and a later run on a healthy server completes the job.
"""

import collections
import contextlib
import errno
import http.server
import io
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))
os.environ.setdefault("AUTORESEARCH_PROFILE", "tiny")
os.environ.setdefault("AUTORESEARCH_DATASET", "python")
os.environ.setdefault("AUTORESEARCH_CACHE", tempfile.mkdtemp(prefix="autoresearch-tests-"))

import prepare  # noqa: E402

SHARD = "shard_00000.parquet"
VAL, HOLDOUT = "shard_06542.parquet", "shard_06541.parquet"
TOKEN = "hf_secret_0123456789"


def parquet_bytes(column, name="text", **options):
    """A parquet file of one column, as bytes: uncompressed and in row groups of 100, so that faults can be placed."""
    file = io.BytesIO()
    options = dict(compression="none", row_group_size=100, use_dictionary=False) | options
    pyarrow.parquet.write_table(pyarrow.table({name: column}), file, **options)
    return file.getvalue()


def documents(seed, count=1500):
    """Texts of about 80 characters, the same on every machine; more of them than read_parquet() decodes at once."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(500)]
    return [" ".join(rng.choices(words, k=12)) for _ in range(count)]


GOOD = {name: parquet_bytes(documents(name)) for name in (VAL, HOLDOUT, SHARD)}
ENVIRONMENT = {"NO_PROXY": "*", "NETRC": os.devnull, "HF_TOKEN": ""}  # nothing of the user's reaches the tests


class Hub:
    """A server of the Hugging Face layout. `faults[name]` lists a fault for each request; after them it is healthy.

    A fault is a dict: status and headers (instead of a file), redirect (to a host), body (another file), cut (the
    share of the file after which the connection ends), length (added to Content-Length), ranges (False: ignores
    Range), stall (seconds of silence after the cut), slow (seconds between pieces of 1 kB).
    """

    def __init__(self):
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                with contextlib.suppress(ConnectionError):
                    hub.answer(self)

            def log_message(self, *args):
                pass

        self.files, self.faults, self.requests = dict(GOOD), collections.defaultdict(list), []
        self.sent = collections.Counter()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request):
        name = request.path.rpartition("/")[2]
        self.requests.append((name, dict(request.headers)))
        fault = self.faults[name].pop(0) if self.faults[name] else {}
        status, headers = fault.get("status"), fault.get("headers", {})
        if "redirect" in fault:
            status, headers = 302, {"Location": fault["redirect"] + request.path}
        elif not re.fullmatch(r"/datasets/karpathy/[\w-]+/resolve/main/[\w.]+", request.path) or name not in self.files:
            status = status or 404
        if status:
            request.send_response(status)
            for key, value in headers.items():
                request.send_header(key, value)
            return request.end_headers()
        body = fault.get("body", self.files[name])
        start = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        start = int(start[1]) if start and fault.get("ranges", True) else 0
        if start and start >= len(body):
            request.send_response(416)
            return request.end_headers()
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(body) - start + fault.get("length", 0)))
        request.end_headers()
        end = int(len(body) * fault.get("cut", 1))
        for piece in range(start, end, 1024):
            request.wfile.write(body[piece:min(piece + 1024, end)])
            self.sent[name] += min(1024, end - piece)
            time.sleep(fault.get("slow", 0))
        time.sleep(fault.get("stall", 0))

    def count(self, name):
        return sum(one == name for one, _ in self.requests)


@pytest.fixture
def hub(monkeypatch):
    """A healthy server that HF_ENDPOINT names; the waits between attempts are gone, chunks are small like the files."""
    hub = Hub()
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(prepare, "DOWNLOAD_WAITS", (0,) * 5)
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 2**10)
    yield hub
    hub.close()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "raw" / "climbmix"


@pytest.fixture
def small_climbmix(hub, tmp_path, monkeypatch):
    """What makes prepare.main() work on three shards of 120 kB; returns the cache folder."""
    for name, value in SETTINGS.items():
        monkeypatch.setattr(prepare, name, value)
    monkeypatch.setattr(prepare, "CACHE", tmp_path)
    return tmp_path


SETTINGS = dict(DATASET="climbmix", VOCAB_SIZE=300, MAX_SEQ_LEN=16, DOWNLOAD_WAITS=(0,) * 5, CHUNK_BYTES=2**10)


def fetch(folder, *names, workers=2):
    """Download `names` (default: the one shard); returns the line of the failure, or None.

    Asserts what holds after every fault: one line, and on disk complete files and resumable parts only.
    """
    names, line = names or (SHARD,), None
    try:
        prepare.Downloader(prepare.HUB_REPOS["climbmix"], folder).fetch_all(names, workers)
    except SystemExit as error:
        line = error.code
        assert isinstance(line, str) and "\n" not in line and len(line) < 250
        assert line.startswith("download failed: shard_") and ".parquet: " in line
    assert_clean(folder)
    assert line or all((folder / name).exists() for name in names)
    return line


def assert_clean(folder):
    for path in folder.iterdir():
        assert path.name in (*GOOD, *(f"{name}.part" for name in GOOD))
        if path.suffix == ".parquet":
            assert len(list(prepare.read_parquet(path))) > 0  # decodes to its end


def assert_completes_later(hub, folder, *names):
    hub.faults.clear()
    hub.files = dict(GOOD)
    assert fetch(folder, *names) is None
    for name in names or (SHARD,):
        assert (folder / name).read_bytes() == GOOD[name]
        assert not (folder / f"{name}.part").exists()


def run_main(*arguments, monkeypatch):
    """prepare.main() with a command line; returns what a shell would: the exit line, or None for success."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments])
    try:
        prepare.main()
    except SystemExit as error:
        assert isinstance(error.code, str) and "\n" not in error.code
        return error.code


# ---------------------------------------------------------------------------
# Faults of the network and of the server


def test_refused_connection_is_named_and_a_later_run_completes(hub, folder, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    assert "Connection refused: 127.0.0.1; run again to continue from what is there" in fetch(folder)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    assert_completes_later(hub, folder)


def test_unknown_host_is_named_and_a_later_run_completes(hub, folder, monkeypatch):
    resolve = socket.getaddrinfo

    def offline(host, *args, **kwargs):
        if host.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setenv("HF_ENDPOINT", "http://nohost.invalid")
    assert "Name or service not known: nohost.invalid" in fetch(folder)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    assert_completes_later(hub, folder)


@pytest.mark.parametrize("endpoint", ["huggingface.co", "ftp://huggingface.co", "http://"])
def test_malformed_endpoint_fails_at_once_with_its_name(hub, folder, monkeypatch, endpoint):
    monkeypatch.setattr(prepare, "DOWNLOAD_WAITS", (60,))
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert "check HF_ENDPOINT" in fetch(folder)


def test_missing_file_fails_after_one_request(hub, folder):
    del hub.files[SHARD]
    assert "HTTP 404 from 127.0.0.1; check that HF_ENDPOINT has karpathy/climbmix" in fetch(folder)
    assert hub.count(SHARD) == 1
    assert_completes_later(hub, folder)


@pytest.mark.parametrize("status", [401, 403])
def test_refused_access_asks_for_a_token_and_does_not_print_it(hub, folder, monkeypatch, capfd, status):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.faults[SHARD] = [dict(status=status)]
    line = fetch(folder)
    assert f"HTTP {status}" in line and "set HF_TOKEN" in line
    assert hub.count(SHARD) == 1
    assert TOKEN not in line + "".join(capfd.readouterr())
    assert_completes_later(hub, folder)


@pytest.mark.parametrize("token", [TOKEN + "\nx", TOKEN + "\u2026"])
def test_malformed_token_is_not_printed(hub, folder, monkeypatch, capfd, token):
    """The exceptions of requests and http.client quote a header that they reject."""
    monkeypatch.setenv("HF_TOKEN", token)
    line = fetch(folder)
    assert TOKEN not in line + "".join(capfd.readouterr())
    monkeypatch.setenv("HF_TOKEN", "")
    assert_completes_later(hub, folder)


def test_token_reaches_the_endpoint_but_not_the_host_it_redirects_to(hub, folder, monkeypatch, capfd):
    cdn = Hub()
    monkeypatch.setenv("HF_TOKEN", TOKEN + "\n")  # as read from a file
    hub.faults[SHARD] = [dict(redirect=f"http://localhost:{cdn.port}")]
    assert fetch(folder) is None
    cdn.close()
    assert [headers.get("Authorization") for _, headers in hub.requests] == [f"Bearer {TOKEN}"]
    assert [headers.get("Authorization") for _, headers in cdn.requests] == [None]
    assert TOKEN not in "".join(capfd.readouterr())
    assert (folder / SHARD).read_bytes() == GOOD[SHARD]


def test_cut_behind_a_redirect_is_resumed_by_range(hub, folder):
    cdn = Hub()
    hub.faults[SHARD] = [dict(redirect=f"http://localhost:{cdn.port}")] * 2
    cdn.faults[SHARD] = [dict(cut=0.5)]
    assert fetch(folder) is None
    cdn.close()
    assert cdn.count(SHARD) == 2 and "Range" in cdn.requests[1][1]
    assert (folder / SHARD).read_bytes() == GOOD[SHARD]


def test_too_many_requests_waits_as_long_as_retry_after_says(hub, folder):
    hub.faults[SHARD] = [dict(status=429, headers={"Retry-After": "1"})]
    start = time.monotonic()
    assert fetch(folder) is None
    assert 1 <= time.monotonic() - start < 5
    assert hub.count(SHARD) == 2


def test_too_many_requests_for_ever_fails_and_a_later_run_completes(hub, folder):
    hub.faults[SHARD] = [dict(status=429, headers={"Retry-After": "0"})] * 6
    assert "HTTP 429 from 127.0.0.1; run again to continue from what is there" in fetch(folder)
    assert hub.count(SHARD) == 6
    assert_completes_later(hub, folder)


def test_retry_after_is_bounded(hub, folder, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_RETRY_AFTER", 0)
    hub.faults[SHARD] = [dict(status=503, headers={"Retry-After": "86400"})]
    start = time.monotonic()
    assert fetch(folder) is None
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("status", [500, 502, 503])
def test_server_error_is_retried_after_the_listed_waits(hub, folder, monkeypatch, status):
    monkeypatch.setattr(prepare, "DOWNLOAD_WAITS", (0.1, 0.3))
    hub.faults[SHARD] = [dict(status=status)] * 2
    start = time.monotonic()
    assert fetch(folder) is None
    assert time.monotonic() - start >= 0.4
    assert hub.count(SHARD) == 3


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_cut_connection_is_resumed_from_where_it_ended(hub, folder, share):
    hub.faults[SHARD] = [dict(cut=share)]
    assert fetch(folder) is None
    resumed = int(hub.requests[1][1]["Range"].removeprefix("bytes=").removesuffix("-"))
    assert len(GOOD[SHARD]) * share - prepare.CHUNK_BYTES <= resumed <= len(GOOD[SHARD]) * share
    assert (folder / SHARD).read_bytes() == GOOD[SHARD]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_cut_connection_starts_from_zero_where_range_is_ignored(hub, folder, share):
    hub.faults[SHARD] = [dict(cut=share), dict(ranges=False)]
    assert fetch(folder) is None
    assert "Range" in hub.requests[1][1]
    assert hub.sent[SHARD] == int(len(GOOD[SHARD]) * share) + len(GOOD[SHARD])
    assert (folder / SHARD).read_bytes() == GOOD[SHARD]


def test_connection_cut_for_ever_fails_and_a_later_run_resumes(hub, folder):
    hub.faults[SHARD] = [dict(cut=0.5)] * 6
    assert "run again to continue from what is there" in fetch(folder)
    part = (folder / f"{SHARD}.part").stat().st_size
    assert part > 0.4 * len(GOOD[SHARD])
    hub.sent.clear()
    assert_completes_later(hub, folder)
    assert hub.sent[SHARD] == len(GOOD[SHARD]) - part


def test_silent_server_is_given_up_and_resumed(hub, folder, monkeypatch):
    monkeypatch.setattr(prepare, "DOWNLOAD_TIMEOUT", 0.3)
    hub.faults[SHARD] = [dict(cut=0.5, stall=3)]
    start = time.monotonic()
    assert fetch(folder) is None
    assert time.monotonic() - start < 3 and "Range" in hub.requests[1][1]


@pytest.mark.parametrize("difference", [1000, -1000])
def test_file_longer_or_shorter_than_announced_is_not_accepted(hub, folder, difference):
    hub.faults[SHARD] = [dict(length=difference, ranges=False)] * 6
    assert fetch(folder)
    assert not (folder / SHARD).exists()
    assert_completes_later(hub, folder)


def test_part_that_is_the_whole_file_is_accepted_without_fetching_it_again(hub, folder):
    """A run killed between the last byte and the rename leaves such a part; the server answers its Range with 416."""
    folder.mkdir(parents=True)
    (folder / f"{SHARD}.part").write_bytes(GOOD[SHARD])
    assert fetch(folder) is None
    assert hub.sent[SHARD] == 0


@pytest.mark.parametrize("part", [GOOD[VAL][:1000], b"x" * 10**6])
def test_part_of_another_file_is_replaced(hub, folder, part):
    folder.mkdir(parents=True)
    (folder / f"{SHARD}.part").write_bytes(part)
    assert_completes_later(hub, folder)


# ---------------------------------------------------------------------------
# Faults of the content


def damaged(position):
    """The good shard with 64 bytes at `position` (a share of the file) overwritten."""
    start = int(len(GOOD[SHARD]) * position)
    return GOOD[SHARD][:start] + b"\xff" * 64 + GOOD[SHARD][start + 64:]


ZSTD = parquet_bytes(documents(SHARD), compression="zstd")
BAD_BODIES = {
    "html": b"<!DOCTYPE html><html><body>Please log in to this wireless network</body></html>",
    "empty": b"",
    "footer": GOOD[SHARD][:-100] + b"\0" * 92 + GOOD[SHARD][-8:],
    "magic": GOOD[SHARD][:-4] + b"RAP1",
    "row group": damaged(0.9),
    "compressed row group": ZSTD[:50000] + bytes(99) + ZSTD[50099:],
    "truncated": GOOD[SHARD][:-1],
    "no text column": parquet_bytes(["a", "b"], name="content"),
    "numbers": parquet_bytes([1, 2, 3]),
    "only nulls": parquet_bytes(pyarrow.array([None, None], pyarrow.string())),
    "no rows": parquet_bytes(pyarrow.array([], pyarrow.string())),
}


@pytest.mark.parametrize("kind", BAD_BODIES)
def test_bad_content_is_fetched_twice_and_never_named(hub, folder, kind):
    hub.faults[SHARD] = [dict(body=BAD_BODIES[kind])] * 6
    line = fetch(folder)
    assert "not a parquet file of text (" in line and "check HF_ENDPOINT or run again later" in line
    assert hub.count(SHARD) == 2
    assert list(folder.iterdir()) == []
    assert_completes_later(hub, folder)


def test_content_that_is_bad_once_is_fetched_again(hub, folder):
    hub.faults[SHARD] = [dict(body=damaged(0.5))]
    assert fetch(folder) is None
    assert (folder / SHARD).read_bytes() == GOOD[SHARD]


def test_null_and_empty_texts_are_left_out(hub, folder):
    hub.files[SHARD] = parquet_bytes(["one", None, "", "two"])
    assert fetch(folder) is None
    assert list(prepare.read_parquet(folder / SHARD)) == ["one", "two"]


@pytest.mark.parametrize("kind", ["row group", "truncated", "html"])
def test_named_file_that_was_damaged_since_is_fetched_again(hub, folder, kind):
    assert fetch(folder, VAL, SHARD) is None
    (folder / SHARD).write_bytes(BAD_BODIES[kind])
    assert_completes_later(hub, folder, VAL, SHARD)
    assert hub.count(VAL) == 1 and hub.count(SHARD) == 2


# ---------------------------------------------------------------------------
# Faults of this machine


def test_full_disk_fails_at_once_keeps_the_part_and_a_later_run_resumes(hub, folder, monkeypatch):
    class FullFile(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > len(GOOD[SHARD]) // 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "open", FullFile, raising=False)
        line = fetch(folder)
    assert "No space left on device" in line and str(folder) in line
    assert hub.count(SHARD) == 1
    assert_completes_later(hub, folder)
    assert "Range" in hub.requests[-1][1]


def test_full_file_system_fails_and_a_later_run_with_room_resumes(hub, tmp_path):
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True) if (
        sys.platform == "linux" and os.geteuid() == 0) else None
    if mount is None or mount.returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        folder = tmp_path / "climbmix"
        assert "No space left on device" in fetch(folder)
        subprocess.run(["mount", "-o", "remount,size=1m", tmp_path], check=True)
        assert_completes_later(hub, folder)
        assert "Range" in hub.requests[-1][1]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_failure_of_one_file_stops_the_others_and_keeps_their_parts(hub, folder):
    hub.faults[VAL] = [dict(status=404)]
    hub.faults[SHARD] = [dict(slow=0.05)]  # 6 s
    start = time.monotonic()
    assert VAL in fetch(folder, VAL, SHARD)
    assert time.monotonic() - start < 3
    assert not (folder / SHARD).exists()
    assert_completes_later(hub, folder, VAL, SHARD)


def test_two_downloads_into_one_folder_fetch_each_file_once(hub, folder):
    hub.faults[SHARD] = [dict(slow=0.002)]
    lines = []
    threads = [threading.Thread(target=lambda: lines.append(fetch(folder, VAL, SHARD))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lines == [None, None]
    assert hub.count(VAL) == hub.count(SHARD) == 1


# ---------------------------------------------------------------------------
# The command as a whole


def test_command_prepares_verifies_and_then_needs_no_network(hub, small_climbmix, monkeypatch, capsys):
    assert run_main("--num-shards", "1", monkeypatch=monkeypatch) is None
    assert "ready: climbmix-" in capsys.readouterr().out
    assert sorted(name for name, _ in hub.requests) == [SHARD, HOLDOUT, VAL]
    assert run_main("--num-shards", "1", monkeypatch=monkeypatch) is None
    assert len(hub.requests) == 3
    assert prepare.load_manifest()["splits"]["val"]["documents"] == 1500


@pytest.mark.parametrize("status", [404, 500])
def test_validation_shard_failing_alone_prepares_nothing_and_a_later_run_completes(
        hub, small_climbmix, monkeypatch, status):
    hub.faults[VAL] = [dict(status=status)] * 6
    assert f"{VAL}: HTTP {status}" in run_main("--num-shards", "1", monkeypatch=monkeypatch)
    with pytest.raises(SystemExit, match="run: uv run prepare.py"):
        prepare.load_manifest()
    assert_clean(small_climbmix / "raw" / "climbmix")
    hub.faults.clear()
    assert run_main("--num-shards", "1", monkeypatch=monkeypatch) is None
    assert prepare.load_manifest()


@pytest.mark.parametrize("shards", ["0", "-2", "6542", "100000"])
def test_impossible_number_of_shards_is_refused_before_any_request(hub, small_climbmix, monkeypatch, shards):
    assert f"--num-shards {shards}: choose 1 to 6541, or -1 for all" in run_main(
        "--num-shards", shards, monkeypatch=monkeypatch)
    assert hub.requests == [] and list(small_climbmix.iterdir()) == []


def test_impossible_number_of_workers_is_refused(hub, small_climbmix, monkeypatch):
    assert "--download-workers 0: choose 1 or more" in run_main("--download-workers", "0", monkeypatch=monkeypatch)


def start_command(hub, cache):
    """`prepare.py --num-shards 1` in a process of its own, with the SETTINGS above."""
    driver = (f"import sys; from pathlib import Path; import prepare; prepare.CACHE = Path(sys.argv.pop()); "
              f"vars(prepare).update({SETTINGS!r}); prepare.main()")
    environment = os.environ | ENVIRONMENT | {"HF_ENDPOINT": hub.url, "AUTORESEARCH_DATASET": "python"}
    return subprocess.Popen([sys.executable, "-c", driver, "--num-shards", "1", str(cache)], cwd=REPO, env=environment,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def start_and_signal_in_the_middle(hub, cache, number):
    """The command, sent a signal when two of its three files are complete and a part of the third is there."""
    hub.faults[SHARD] = [dict(slow=0.02)]  # 2.4 s in all
    process, part = start_command(hub, cache), cache / "raw" / "climbmix" / f"{SHARD}.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 0.2 * len(GOOD[SHARD])):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    start = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - start < 5
    assert {path.name for path in part.parent.iterdir()} == {VAL, HOLDOUT, part.name}
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_signal_in_the_middle_leaves_a_part_from_which_a_later_run_continues(hub, small_climbmix, monkeypatch, number):
    code, out, err = start_and_signal_in_the_middle(hub, small_climbmix, number)
    if number == signal.SIGINT:
        assert code == 1 and err == "interrupted: complete files are kept, run again to continue\n"
    else:
        assert code == -signal.SIGKILL
    hub.sent.clear()
    assert run_main("--num-shards", "1", monkeypatch=monkeypatch) is None
    assert hub.count(VAL) == hub.count(HOLDOUT) == 1
    assert 0 < hub.sent[SHARD] < 0.9 * len(GOOD[SHARD])
    assert (small_climbmix / "raw" / "climbmix" / SHARD).read_bytes() == GOOD[SHARD]


def test_two_commands_at_once_both_succeed_and_fetch_each_file_once(hub, small_climbmix):
    for name in GOOD:
        hub.faults[name] = [dict(slow=0.005)]
    both = [start_command(hub, small_climbmix) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert all("ready: climbmix-" in out and not err for out, err in outputs)
    assert sorted(name for name, _ in hub.requests) == sorted(GOOD)
    assert prepare.verified(1)


# ---------------------------------------------------------------------------
# Progress


def test_progress_tells_files_megabytes_rate_and_time_left(tmp_path):
    downloader = prepare.Downloader("karpathy/climbmix", tmp_path)
    downloader.sizes = {"a": 100_000_000, "b": 100_000_000}
    downloader.have.update(a=100_000_000, b=50_000_000)  # 30 MB of them from an earlier run
    downloader.received.update(a=100_000_000, b=20_000_000)
    assert downloader.describe(1, 4, 10) == "downloaded 1/4 files | 150/400 MB | 12.0 MB/s | 0:21 left"


def test_last_progress_line_counts_every_file_also_resumed_ones(hub, folder, capsys):
    hub.faults[SHARD] = [dict(cut=0.5), dict(ranges=False)]
    fetch(folder, VAL, SHARD)
    total = f"{(len(GOOD[VAL]) + len(GOOD[SHARD])) / 1e6:,.0f}"
    assert capsys.readouterr().out.startswith(f"downloaded 2/2 files | {total}/{total} MB | ")


def test_failure_on_a_terminal_begins_on_a_line_of_its_own(hub, folder, monkeypatch, capsys):
    """The progress line is rewritten in place; without its line end the error would be appended to it."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    hub.faults[SHARD] = [dict(status=404)]
    assert fetch(folder)
    out = capsys.readouterr().out
    assert out.endswith("\n") and out.count("\n") == 1 and all(len(line) < 80 for line in out.split("\r"))


@pytest.mark.parametrize("hours", [0.1, 1, 24])
def test_progress_into_a_file_is_at_most_about_20_lines_whatever_the_duration(monkeypatch, capsys, hours):
    seconds = 0
    with monkeypatch.context() as patch:
        patch.setattr(prepare.time, "monotonic", lambda: seconds)
        progress = prepare.Progress()
        for seconds in range(int(hours * 3600)):
            progress.show(f"{seconds} s")
        progress.show("done", end=True)
    lines = capsys.readouterr().out.splitlines()
    assert 6 <= len(lines) <= 22 and lines[0] == "10 s" and lines[-1] == "done"
