"""Data, tokenizer, dataloader and yardstick of autoresearch. Fixed during research: edit train.py.

    uv run prepare.py [--num-shards N] [--download-workers N]

Fetches text, trains a tokenizer and tokenizes every split once into AUTORESEARCH_CACHE
(default ~/.cache/autoresearch). Running it again verifies what is there and returns.
The file reads in the order data flows: text, tokenizer, token files, rows, bits per byte.
"""

import argparse
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import faulthandler
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import socket
import sys
import sysconfig
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import requests
import rustbpe
import tiktoken
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout  # torch itself depends on filelock

# ---------------------------------------------------------------------------
# Constants. An experiment is comparable only with others that share all of them.

TIME_BUDGET = 300  # seconds of training
PROFILES = {  # name: (dataset, VOCAB_SIZE, MAX_SEQ_LEN, EVAL_TOKENS)
    "full": ("climbmix", 8192, 2048, 40 * 2**19),  # a CUDA GPU
    "small": ("tinystories", 4096, 512, 2**21),  # Apple MPS
    "tiny": ("python", 2048, 256, 2**18),  # CPU only
}
DATASETS = ("climbmix", "tinystories", "python")
SPLITS = ("val", "holdout", "train")


def _choose_profile():
    if torch.cuda.is_available():
        return "full"
    return "small" if torch.backends.mps.is_available() else "tiny"


def _choose_dataset(default):
    name = os.environ.get("AUTORESEARCH_DATASET") or default
    if name in DATASETS:
        return name
    folder = Path(name).expanduser().resolve()
    if not folder.is_dir():
        raise SystemExit(f"AUTORESEARCH_DATASET={name} is neither one of {', '.join(DATASETS)} nor a folder")
    return str(folder)


PROFILE = os.environ.get("AUTORESEARCH_PROFILE") or _choose_profile()
if PROFILE not in PROFILES:
    raise SystemExit(f"AUTORESEARCH_PROFILE={PROFILE} is unknown: choose one of {', '.join(PROFILES)}")
DATASET, VOCAB_SIZE, MAX_SEQ_LEN, EVAL_TOKENS = PROFILES[PROFILE]
DATASET = _choose_dataset(DATASET)

CACHE = Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser()
PREPARE = "run: uv run prepare.py"  # the remedy for whatever is missing or stale

# ---------------------------------------------------------------------------
# Text: the four kinds of dataset, as streams of (split, document)

HUB_REPOS = {"climbmix": "karpathy/climbmix-400b-shuffle", "tinystories": "karpathy/tinystories-gpt4-clean"}
CLIMBMIX_SHARD = "shard_{:05d}.parquet"
CLIMBMIX_VAL, CLIMBMIX_HOLDOUT = 6542, 6541  # the last two shards; all before them are for training
DEFAULT_SHARDS = 10
TINYSTORIES_FILE = "tinystories_gpt4_clean.parquet"
FOLDER_SUFFIXES = (".parquet", ".jsonl", ".txt", ".md", ".py", ".rst")
FILE_CHARS = 20_000  # a longer text file is several documents
PYTHON_BYTES = 100_000_000  # cap of the python dataset: ready within a minute on two cores


def digest(text):
    """16 bytes that identify a document by its content."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def split_of(text):
    """Split of a document of the python dataset or a folder: 2 % val, 2 % holdout, by content alone."""
    return {0: "val", 1: "val", 2: "holdout", 3: "holdout"}.get(int.from_bytes(digest(text), "big") % 100, "train")


def hub_files(num_shards):
    """Names of a Hugging Face dataset's files in the order in which documents() reads them."""
    if DATASET == "tinystories":
        return [TINYSTORIES_FILE]
    num_shards = CLIMBMIX_HOLDOUT if num_shards == -1 else num_shards
    return [CLIMBMIX_SHARD.format(i) for i in (CLIMBMIX_VAL, CLIMBMIX_HOLDOUT, *range(num_shards))]


def read_parquet(path):
    """Yield the non-null strings of a parquet file's `text` column; ValueError when it has none."""
    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        if "text" not in file.schema_arrow.names:
            raise ValueError(f"no column `text`, only {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(batch_size=1024, columns=["text"]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise ValueError(f"column `text` holds {type(text).__name__}, not strings")
                if text:
                    yield text


def read_file(path):
    """Yield the documents of one file of a user's folder; raises OSError or ValueError.

    A text longer than FILE_CHARS is cut at the ends of lines, so that a few books give all three splits.
    """
    if path.suffix.lower() == ".parquet":
        yield from read_parquet(path)
    elif path.suffix.lower() == ".jsonl":
        with open(path, encoding="utf-8-sig") as lines:  # some editors begin a file with a byte-order mark
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                        raise ValueError(f"line {number} has no field `text` that is a string")
                    yield row["text"]
    else:
        with open(path, encoding="utf-8-sig") as file:
            while text := file.read(FILE_CHARS) + file.readline(FILE_CHARS):
                yield text


def folder_files(folder):
    """Every text file below `folder`, sorted, each once however many links lead to it."""
    found, seen = {}, set()
    unreadable = lambda error: found.setdefault(error.filename, Path(error.filename))  # folder_documents() names it
    for parent, subfolders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link back up: do not walk the loop
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        for path in (Path(parent, name) for name in sorted(names) if name.lower().endswith(FOLDER_SUFFIXES)):
            if path.is_file():  # neither a pipe nor a broken link
                found.setdefault(os.path.realpath(path), path)
    return list(found.values())


@functools.lru_cache(None)  # once each, though a folder is read for the tokenizer and again for the token files
def complain(line):
    print(line, file=sys.stderr)


def folder_documents(folder):
    """Yield the documents of a folder; a file that cannot be read is named, counted and left out."""
    skipped = 0
    for path in folder_files(folder):
        count = 0
        try:
            for count, text in enumerate(read_file(path), 1):
                yield text
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            skipped += 1
            if skipped <= 10:
                reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error).splitlines()[0]
                complain(f"skipped {'the rest of ' if count else ''}{path}: {reason}")
    if skipped:
        complain(f"skipped {skipped} unreadable files of {folder}: mend them and run again to include them")


@functools.lru_cache(1)
def python_documents():
    """Source files of the running interpreter, without repeats, ordered by content hash, at most 100 MB."""
    paths = sysconfig.get_paths()
    texts = {}
    for root in {paths["stdlib"], paths["purelib"], paths["platlib"]}:
        for path in Path(root).rglob("*.py"):
            if "site-packages" in path.parts[len(Path(root).parts):]:
                continue  # the base interpreter's packages are not this environment's
            with contextlib.suppress(OSError, UnicodeDecodeError):  # Lib/test has files in other encodings
                text = path.read_text(encoding="utf-8")
                texts[digest(text)] = text
    sizes = itertools.accumulate(len(texts[key].encode()) for key in sorted(texts))
    return [texts[key] for key, size in zip(sorted(texts), sizes) if size <= PYTHON_BYTES]


def documents(num_shards):
    """Yield (split, text) over the whole dataset, validation and holdout first where files are per split."""
    if DATASET in HUB_REPOS:
        for number, name in enumerate(hub_files(num_shards)):
            for row, text in enumerate(read_parquet(raw_dir() / name)):
                if DATASET == "tinystories":
                    yield "holdout" if row < 10_000 else "val" if row < 20_000 else "train", text
                else:
                    yield SPLITS[min(number, 2)], text
    else:
        for text in python_documents() if DATASET == "python" else folder_documents(DATASET):
            yield split_of(text), text


class Progress:
    """A progress line: rewritten in place on a terminal; in a file after 10, 16, 26, ... seconds, 20 lines a day."""

    def __init__(self):
        self.start = time.monotonic()
        self.next = 10

    def show(self, line, end=False):
        seconds = time.monotonic() - self.start
        if sys.stdout.isatty():
            print(f"\r{line:<78}", end="\n" if end else "", flush=True)
        elif end or seconds >= self.next:
            self.next = 1.6 * seconds
            print(line, flush=True)


@contextlib.contextmanager
def locked(folder):
    """Hold the lock file beside `folder`, which one process at a time may change."""
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another prepare.py is at work on {folder}: waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------------------
# Download

DOWNLOAD_WAITS = (1, 2, 4, 8, 16)  # seconds between the attempts at one file
DOWNLOAD_TIMEOUT = 10  # seconds without a byte; also the longest that Ctrl-C may take
MAX_RETRY_AFTER = 300  # seconds
CHUNK_BYTES = 2**16  # the most that a cut connection loses


def verify_parquet(path):
    """Decode a whole downloaded file; one that is not a parquet file of text is deleted and raises ValueError."""
    try:
        if not sum(1 for _ in read_parquet(path)):
            raise ValueError("it has no text")
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        path.unlink()
        raise ValueError(f"not a parquet file of text ({str(error).splitlines()[0]})") from None


class Downloader:
    """Fetches files of a Hugging Face dataset repo into `folder`, several at a time.

    A file is first `<name>.part`, which a later attempt or a later run continues by Range, and gets
    its name only when every row group of it reads as text.
    """

    def __init__(self, repo, folder):
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        self.url = f"{endpoint.rstrip('/')}/datasets/{repo}/resolve/main/"
        self.remedies = dict.fromkeys((401, 403), f"set HF_TOKEN to a token that may read {repo}")
        self.remedies[404] = f"check that HF_ENDPOINT has {repo}"
        self.folder = folder
        self.stop = threading.Event()  # set on the first failure and on Ctrl-C
        self.sizes, self.have, self.received = {}, collections.Counter(), collections.Counter()  # bytes by name

    def fetch_all(self, names, workers):
        """Have every file of `names` complete and verified; SystemExit with one line if any of them fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder), concurrent.futures.ThreadPoolExecutor(workers) as pool:
            progress, done = Progress(), 0
            waiting = files = [pool.submit(self.fetch, name) for name in names]
            try:
                while waiting:
                    finished, waiting = concurrent.futures.wait(files, 0.5, concurrent.futures.FIRST_EXCEPTION)
                    done = sum(not file.exception() for file in finished)
                    progress.show(self.describe(done, len(names), time.monotonic() - progress.start))
                    for file in finished:
                        file.result()  # raises what fetch() raised
            finally:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
                progress.show(self.describe(done, len(names), time.monotonic() - progress.start), end=True)

    def describe(self, done, files, seconds):
        have, known = sum(self.have.values()), sum(self.sizes.values())
        total = known / max(1, len(self.sizes)) * files  # files not begun count as the mean
        rate = sum(self.received.values()) / max(seconds, 1e-3)
        left = "{}:{:02}".format(*divmod(round(max(0, total - have) / rate), 60)) if rate else "?"
        return (f"downloaded {done}/{files} files | {have / 1e6:,.0f}/{total / 1e6:,.0f} MB | "
                f"{rate / 1e6:.1f} MB/s | {left} left")

    def fetch(self, name):
        """Have one file complete and verified, or raise SystemExit with what to do."""
        path, part, bad = self.folder / name, self.folder / f"{name}.part", 0
        if path.exists():
            self.sizes[name] = self.have[name] = path.stat().st_size
            with contextlib.suppress(ValueError):  # damaged since: fetch it again
                return verify_parquet(path)
        for wait in (*DOWNLOAD_WAITS, None):
            remedy = None
            try:
                self.receive(name, part)
                verify_parquet(part)
                return os.replace(part, path)
            except requests.HTTPError as error:
                status, retry_after = error.response.status_code, error.response.headers.get("Retry-After", "")
                problem = f"HTTP {status} from {urllib.parse.urlsplit(error.response.url).hostname}"
                remedy = self.remedies.get(status)
                if wait is not None and retry_after.isdigit():
                    wait = min(int(retry_after), MAX_RETRY_AFTER)
            except requests.RequestException as error:
                if isinstance(error, ValueError):  # a malformed URL or header, whose text may hold the token
                    problem, remedy = type(error).__name__, "check HF_ENDPOINT and HF_TOKEN"
                else:
                    while error.__context__:  # the innermost says it in words: Connection refused
                        error = error.__context__
                    problem = f"{getattr(error, 'strerror', None) or error}: {urllib.parse.urlsplit(self.url).hostname}"
            except ValueError as error:
                problem, bad = str(error), bad + 1
                remedy = bad > 1 and "it came twice: check HF_ENDPOINT or run again later"
            except OSError as error:  # a full disk or a missing permission does not pass by waiting
                problem, remedy = f"{error.strerror or error}: {self.folder}", "mend that and run again to continue"
            if remedy or wait is None or self.stop.wait(wait):
                break
        raise SystemExit(f"download failed: {name}: {problem}; {remedy or 'run again to continue from what is there'}")

    def receive(self, name, part):
        """One request for one file, from where its .part ends; urllib3 compares the length with the announced one."""
        have = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
        if token := os.environ.get("HF_TOKEN", "").strip():
            headers["Authorization"] = f"Bearer {token}"  # requests drops it when redirected to another host
        with requests.get(self.url + name, headers=headers, stream=True, timeout=DOWNLOAD_TIMEOUT) as response:
            if response.status_code == 416 and have:
                return  # nothing comes after the part: the verification tells whether it is the file
            response.raise_for_status()
            have = have if response.status_code == 206 else 0
            self.have[name], self.sizes[name] = have, have + (response.raw.length_remaining or 0)
            with open(part, "ab" if have else "wb") as file:
                for chunk in response.iter_content(CHUNK_BYTES):
                    file.write(chunk)
                    self.have[name] += len(chunk)
                    self.received[name] += len(chunk)
                    if self.stop.is_set():
                        raise SystemExit("stopped")


# ---------------------------------------------------------------------------
# Tokenizer

# GPT-4's split pattern, with digits in groups of at most two: a small vocabulary has no room for 1,000 triples.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [f"<|reserved_{i}|>" for i in range(4)]  # the first is BOS
TRAIN_CHARS = 500_000_000  # the tokenizer learns from at most this much of the training split ...
TRAIN_SHARDS = 2  # ... and of these first shards, so that it does not depend on how many were fetched
TRAIN_DOC_CHARS = 10_000  # no document weighs more than this
SEGMENT_CHARS = 100_000  # longer texts are encoded in segments: a megabyte without a space overflows the regex


def clean(text):
    """`text` with lone surrogates, which UTF-8 cannot encode, replaced by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Tokenizer:
    """Byte-level BPE served by tiktoken. Ids: bytes and merges first, then SPECIAL_TOKENS; BOS starts a row.

    On disk it is `tokenizer.tiktoken`, one line "<base64 of the token's bytes> <rank>" each, and
    `tokenizer.json` with the format's version, the split pattern and the special tokens.
    """

    def __init__(self, ranks, pattern=SPLIT_PATTERN, special_tokens=SPECIAL_TOKENS):
        self.ranks, self.pattern, self.special_tokens = ranks, pattern, special_tokens
        special = {name: len(ranks) + i for i, name in enumerate(special_tokens)}
        self.encoding = tiktoken.Encoding("autoresearch", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=special)

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn `vocab_size` tokens from an iterator of texts; SystemExit when there is too little text."""
        bpe = rustbpe.Tokenizer()
        texts = (clean(text[:TRAIN_DOC_CHARS]) for text in texts)
        bpe.train_from_iterator(texts, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
        if len(ranks) + len(SPECIAL_TOKENS) < vocab_size:
            raise SystemExit(f"{DATASET} has text for {len(ranks)} tokens, VOCAB_SIZE={vocab_size} needs more: "
                             "add text")
        return cls(ranks)

    @classmethod
    def from_directory(cls, directory=None):
        """The tokenizer of the prepared dataset, or of `directory`; SystemExit when it is missing or broken."""
        directory = Path(directory) if directory else (load_manifest() and data_dir())
        try:
            meta = json.loads((directory / "tokenizer.json").read_text())
            if meta["format"] != FORMAT:
                raise ValueError(f"format {meta['format']}, not {FORMAT}")
            lines = (directory / "tokenizer.tiktoken").read_text().splitlines()
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
            return cls(ranks, meta["pattern"], meta["special_tokens"])
        except (OSError, ValueError, KeyError) as error:
            raise SystemExit(f"tokenizer in {directory} is unusable ({error}); {PREPARE}") from None

    def save(self, directory):
        """Write both files, after a round trip that must give the text back."""
        for text in ("Hello world! 1234\n\tdéjà vu \u4f60\u597d \U0001f680", "".join(map(chr, range(0xD800)))):
            if self.decode(self.encode(text)) != text:
                raise SystemExit(f"the tokenizer does not give {text[:20]!r} back: not saved")
        lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in self.ranks.items())
        meta = {"format": FORMAT, "pattern": self.pattern, "special_tokens": self.special_tokens}
        (directory / "tokenizer.tiktoken").write_text(lines)
        (directory / "tokenizer.json").write_text(json.dumps(meta, indent=1) + "\n")

    def get_vocab_size(self):
        return self.encoding.n_vocab

    def get_bos_token_id(self):
        return len(self.ranks)

    def encode_numpy(self, text):
        """Ids of one text as uint32; special tokens in the text are plain text. Releases the GIL."""
        segments = [text[i:i + SEGMENT_CHARS] for i in range(0, len(text), SEGMENT_CHARS)]
        ids = [self.encoding.encode_to_numpy(clean(segment), disallowed_special=()) for segment in segments]
        return np.concatenate(ids) if ids else np.empty(0, np.uint32)

    def encode(self, text, prepend=None):
        """Ids of a text, or a list of them for a list of texts; `prepend` is an id or a special token's name."""
        if not isinstance(text, str):
            return [self.encode(one, prepend) for one in text]
        if isinstance(prepend, str):
            prepend = self.encoding.encode_single_token(prepend)
        return ([] if prepend is None else [prepend]) + self.encode_numpy(text).tolist()

    def decode(self, ids):
        return self.encoding.decode(ids)

    def token_bytes(self):
        """(V,) int64 numpy array: the raw bytes each id stands for, 0 for special tokens."""
        sizes = [len(self.encoding.decode_single_token_bytes(i)) for i in range(len(self.ranks))]
        return np.array(sizes + [0] * len(self.special_tokens))


# ---------------------------------------------------------------------------
# Token files: each split once, as a flat uint16 file plus one uint32 length per document

FORMAT = 1  # of everything under data_dir(); a change of it makes old caches stale
TASK_CHARS = 2**18  # text that one worker tokenizes at a time
MIN_EVAL_ROWS = 32  # fewer rows of validation text than this measure nothing


def raw_dir():
    """Where the downloaded files of a Hugging Face dataset lie, shared by all profiles."""
    return CACHE / "raw" / DATASET


def data_dir():
    """Where the tokenizer and token files of this dataset and vocabulary lie."""
    name = DATASET
    if DATASET not in DATASETS:
        name = f"{Path(DATASET).name}-{hashlib.sha256(DATASET.encode()).hexdigest()[:8]}"
    return CACHE / "data" / f"{name}-{VOCAB_SIZE}"


def fingerprint():
    """What the token files were made from. The python dataset is frozen when first prepared."""
    source = {"format": FORMAT, "dataset": DATASET, "vocab_size": VOCAB_SIZE}
    if DATASET not in DATASETS:
        stats = [(str(path.relative_to(DATASET)), path.stat().st_size, path.stat().st_mtime_ns)
                 for path in folder_files(DATASET)]
        source["files"] = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    return source


def load_manifest():
    """The prepared dataset's manifest as a dict; SystemExit with the remedy when it is missing or stale."""
    path = data_dir() / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        if manifest["source"] != fingerprint():
            raise SystemExit(f"{DATASET} has changed since it was prepared; {PREPARE}")
        for name, file in manifest["files"].items():
            if (data_dir() / name).stat().st_size != file["bytes"]:
                raise SystemExit(f"{data_dir() / name} does not have its {file['bytes']} bytes; {PREPARE}")
        return manifest
    except FileNotFoundError as error:
        raise SystemExit(f"no prepared data for {DATASET} ({error.filename} is missing); {PREPARE}") from None
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{path} is unreadable ({error}); {PREPARE}") from None


def dataset_id():
    """Name of the dataset and 8 digits that change with its content, for the summary of a run."""
    files = load_manifest()["files"]
    content = "".join(files[name]["sha256"] for name in sorted(files))
    return f"{Path(DATASET).name}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def file_sha256(path):
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha.update(chunk)
    return sha.hexdigest()


def verified(num_shards):
    """Whether the prepared data is there, was made from what is wanted now, and is intact."""
    try:
        manifest = load_manifest()
    except SystemExit:
        return False
    return num_shards in (None, manifest["num_shards"]) and all(
        file_sha256(data_dir() / name) == file["sha256"] for name, file in manifest["files"].items())


def in_order(pool, function, items, ahead):
    """pool.map that keeps at most `ahead` items in memory."""
    futures = collections.deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) >= ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def tasks(stream):
    """Group a stream of (split, text) into (split, [text, ...]) of about TASK_CHARS characters."""
    held_out = {}  # digest: split of every val and holdout document, so that no text is in two splits
    groups = {split: [] for split in SPLITS}
    chars = collections.Counter()
    for split, text in stream:
        key = digest(text)
        if held_out.get(key, split) != split or not text:
            continue
        if split != "train":
            held_out[key] = split
        groups[split].append(text)
        chars[split] += len(text)
        if chars[split] >= TASK_CHARS:
            yield split, groups[split]
            groups[split], chars[split] = [], 0
    yield from groups.items()


def write_token_files(tokenizer, stream, folder):
    """Tokenize a stream of (split, text) in parallel into `folder`; returns {split: {documents, tokens, bytes}}.

    The threads run in parallel because tiktoken releases the GIL; the files do not depend on how many there are.
    """
    def encode(task):
        split, texts = task
        ids = [tokenizer.encode_numpy(text).astype(np.uint16) for text in texts]
        return split, ids, sum(len(clean(text).encode()) for text in texts)

    workers = os.cpu_count() or 1
    counts = {split: dict(documents=0, tokens=0, bytes=0) for split in SPLITS}
    progress, total = Progress(), 0
    with contextlib.ExitStack() as stack:
        open_all = {(split, kind): stack.enter_context(open(folder / f"{split}.{kind}", "wb"))
                    for split in SPLITS for kind in ("tokens", "lengths")}
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(workers))
        for split, ids, nbytes in in_order(pool, encode, tasks(stream), 2 * workers):
            open_all[split, "tokens"].write(b"".join(one.tobytes() for one in ids))
            open_all[split, "lengths"].write(np.array([len(one) for one in ids], np.uint32).tobytes())
            counts[split]["documents"] += len(ids)
            counts[split]["tokens"] += sum(map(len, ids))
            counts[split]["bytes"] += nbytes
            total += nbytes
            rate = total / (time.monotonic() - progress.start)
            progress.show(f"tokenized {total / 1e6:,.0f} MB | {rate / 1e6:.1f} MB/s")
        progress.show(f"tokenized {total / 1e6:,.0f} MB in {time.monotonic() - progress.start:.0f} s", end=True)
    return counts


def build(num_shards):
    """Train the tokenizer and write all token files beside data_dir(), then move them there at once."""
    # each node of a cluster has its own: some network file systems keep no lock between nodes
    new = data_dir().with_name(f"{data_dir().name}.{socket.gethostname()}.part")
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
    new.mkdir(parents=True)
    try:
        source = fingerprint()  # before reading: a file that changes meanwhile makes the result stale
        print(f"training a tokenizer of {VOCAB_SIZE} tokens on {DATASET}", flush=True)
        tokenizer = Tokenizer.train(tokenizer_texts(num_shards), VOCAB_SIZE)
        tokenizer.save(new)
        counts = write_token_files(tokenizer, documents(num_shards), new)
        for split, count in counts.items():
            if count["tokens"] < MIN_EVAL_ROWS * MAX_SEQ_LEN:
                raise SystemExit(f"{DATASET} has {count['tokens']} tokens for the {split} split, at least "
                                 f"{MIN_EVAL_ROWS * MAX_SEQ_LEN} are needed: add text")
        files = {path.name: dict(bytes=path.stat().st_size, sha256=file_sha256(path)) for path in sorted(new.iterdir())}
        versions = {module.__name__: module.__version__ for module in (np, pyarrow, tiktoken)}
        manifest = dict(source=source, num_shards=num_shards, splits=counts, files=files, versions=versions)
        (new / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        shutil.rmtree(data_dir(), ignore_errors=True)
        os.replace(new, data_dir())
        token_files.cache_clear()
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def tokenizer_texts(num_shards):
    """The fixed part of the training split from which the tokenizer is learnt."""
    chars = 0
    for split, text in documents(TRAIN_SHARDS if num_shards == -1 else min(num_shards, TRAIN_SHARDS)):
        if split == "train":
            yield text
            chars += min(len(text), TRAIN_DOC_CHARS)
            if chars >= TRAIN_CHARS:
                return


# ---------------------------------------------------------------------------
# Rows: B x T batches without padding

BUFFER_SIZE = 1000  # pieces to choose from
WINDOW_DOCS = 2**20  # documents shuffled together: bounds memory on large datasets


def shuffled_pieces(lengths, T, epoch):
    """Yield (start, n) of every piece of every document, in an order fixed by `epoch`.

    A document longer than T tokens is cut into pieces of T, so that long documents are used to their
    end and the pieces of one do not fill a whole batch. RandomState's stream is the same in all versions of numpy.
    """
    base = 0
    for first in range(0, len(lengths), WINDOW_DOCS):
        length = lengths[first:first + WINDOW_DOCS].astype(np.int64)
        begin = base + np.cumsum(length) - length  # of each document
        count = -(-length // T)  # its pieces
        nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        start = np.repeat(begin, count) + nth * T
        n = np.minimum(np.repeat(length, count) - nth * T, T)
        order = np.random.RandomState([epoch, first // WINDOW_DOCS]).permutation(len(n))
        yield from zip(start[order].tolist(), n[order].tolist())
        base += int(length.sum())


def pack_rows(tokens, lengths, T, bos, buffer_size):
    """Yield (row, epoch) endlessly: rows of T+1 tokens, filled with BOS + piece, BOS + piece, ... to the brim.

    Best fit: the longest piece of the buffer that fits comes next, the oldest among equals. When none
    fits, the shortest is cropped to fill the row and its rest goes back to the buffer, so no token is
    lost. Every token is used once per epoch; the last row of an epoch is filled up from the next one.
    `row` is overwritten by the next one. On English texts of 6,000 tokens and T 2048, 0.13 pieces a row are
    cropped, where plain concatenation cuts one; throwing away what is cropped would lose 79 % of the tokens.
    """
    row, used = np.empty(T + 1, np.uint16), 0
    for epoch in itertools.count(1):
        stream = enumerate(shuffled_pieces(lengths, T, epoch))
        buffer = []  # sorted (n, arrival, start)
        while True:
            while len(buffer) < buffer_size and (piece := next(stream, None)):
                arrival, (start, n) = piece
                bisect.insort(buffer, (n, arrival, start))
            if not buffer:
                break
            room = T - used  # after the BOS
            fitting = bisect.bisect_right(buffer, (room, math.inf))
            if fitting:
                oldest = bisect.bisect_left(buffer, (buffer[fitting - 1][0],))
                n, _, start = buffer.pop(oldest)
            else:
                rest, arrival, start = buffer.pop(0)
                n = room
                bisect.insort(buffer, (rest - n, arrival, start + n))
            row[used] = bos
            row[used + 1:used + 1 + n] = tokens[start:start + n]
            used += n + 1
            if used == T + 1:
                yield row, epoch
                used = 0


@functools.lru_cache(1)
def token_files(folder):
    """{split: (tokens uint16, lengths of the documents uint32)}, memory-mapped.

    Opened once: a dataset that changes during a run, or is prepared anew, changes the next run and not this one.
    """
    load_manifest()
    return {split: (np.memmap(folder / f"{split}.tokens", np.uint16, "r"),
                    np.memmap(folder / f"{split}.lengths", np.uint32, "r")) for split in SPLITS}


def cropped_share(T, bos):
    """Share of the validation rows that end in a cropped piece: a crop adds a row start to those of the pieces."""
    tokens, lengths = token_files(data_dir())["val"]
    epoch = itertools.takewhile(lambda item: item[1] == 1, pack_rows(tokens, lengths, T, bos, BUFFER_SIZE))
    starts = [np.count_nonzero(row == bos) for row, _ in epoch]
    return max(0, sum(starts) - (-(-lengths.astype(np.int64) // T)).sum()) / len(starts)


def make_dataloader(tokenizer, B, T, split, device=None, buffer_size=BUFFER_SIZE):
    """Endless iterator of (inputs, targets, epoch): two (B, T) int64 tensors on `device`, epochs from 1.

    Every row starts with BOS and targets are inputs shifted by one. The stream of rows does not depend
    on B. The copy to a GPU is asynchronous and free of races: each batch has a pinned block of its own,
    which torch's host allocator reuses only when the copy out of it has ended.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    tokens, lengths = token_files(data_dir())[split]
    device = torch.device(device or "cpu")

    def batches():
        rows = pack_rows(tokens, lengths, T, tokenizer.get_bos_token_id(), buffer_size)
        while True:
            batch = torch.empty((B, T + 1), dtype=torch.uint16, pin_memory=device.type == "cuda")
            for target, (row, epoch) in zip(batch.numpy(), rows):
                target[:] = row
            if device.type == "mps":
                batch = batch.to(torch.int64)  # it has no uint16
            batch = batch.to(device, non_blocking=True)
            # copies: inputs that share memory with the targets would let a model edit its own targets
            yield batch[:, :-1].to(torch.int64, copy=True), batch[:, 1:].to(torch.int64, copy=True), epoch

    return batches()


# ---------------------------------------------------------------------------
# The yardstick: bits per byte

LOSS_SLICE_BYTES = 2**28  # of float64 logits at a time
PROBE_ROWS = 8  # the first batch is probed for causality, the last, and what it takes to have so many rows
PROBE_TOLERANCE = 1e-3  # an honest model moves by exactly 0 in float32 on a CPU


class YardstickError(Exception):
    """The model cannot be scored: its logits are not those of a causal model of the next token."""


def eval_rows(split="val"):
    """Rows that are scored: EVAL_TOKENS of them, or one pass over the split where that is less."""
    return min(EVAL_TOKENS, len(token_files(data_dir())[split][0])) // MAX_SEQ_LEN


def check_logits(logits, inputs, vocab_size):
    if not torch.is_tensor(logits) or tuple(logits.shape) != (*inputs.shape, vocab_size):
        raise YardstickError(f"the model returned {tuple(getattr(logits, 'shape', ()))}, "
                             f"not logits of shape {(*inputs.shape, vocab_size)}")


def probe_causality(model, inputs, logits, first):
    """Raise YardstickError unless the logits at every position depend on the tokens up to there alone.

    The rows are given again with the tokens after a cut replaced, another cut in each row: none is replaced
    in row 0, all but the first in row 1, and so on to the last token alone. `first` is the number of the
    first row among those scored. One forward pass; what it returns is never scored.
    """
    if not bool(torch.isfinite(logits).all()):
        raise YardstickError("some logits are not finite")
    (B, T), V = inputs.shape, logits.shape[-1]
    cycle = [T - 1, *torch.linspace(0, T - 2, max(PROBE_ROWS, B) - 1).long().tolist()]
    cuts = [cycle[row % len(cycle)] for row in range(first, first + B)]
    after = (torch.arange(T) > torch.tensor(cuts)[:, None]).to(inputs.device)  # (B, T)
    shift = torch.randint(1, V, (B, T), generator=torch.Generator().manual_seed(first)).to(inputs.device)
    other = model(torch.where(after, (inputs + shift) % V, inputs))
    moved = torch.stack([(a.float() - b.float()).abs().amax(-1) for a, b in zip(other, logits)])  # a row at a time
    moved = torch.where(after, 0, moved).nan_to_num(math.inf)
    for row, cut in enumerate(cuts):
        if moved[row].max() > PROBE_TOLERANCE:
            position = int(moved[row].argmax())
            change = f"not causal: tokens after position {cut} were replaced" if cut < T - 1 else (
                "rows are mixed, dropout is on or state is kept between calls: nothing was changed in this row")
            raise YardstickError(f"{change}, and the logits at position {position} of row {first + row} "
                                 f"moved by {moved[row, position]:.3g}")


@torch.no_grad()
def evaluate_bpb(model, tokenizer, batch_size, split="val"):
    """Bits per byte of `model` on a fixed number of rows of `split`, the same for every batch size.

    The model is called as model(inputs) with (B, T) int64 and returns logits (B, T, V); it never sees a
    target. The result is the cross-entropy in nats, summed over the targets that have bytes, over ln 2
    times the sum of those bytes. Raises YardstickError when the logits are not those of a causal model.
    """
    device = next(iter(model.parameters()), torch.empty(0)).device
    total_device = "cpu" if device.type == "mps" else device  # MPS has no float64
    loss_dtype = torch.float32 if device.type == "mps" else torch.float64
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(device)
    rows, vocab_size = eval_rows(split), tokenizer.get_vocab_size()
    slice_rows = max(1, LOSS_SLICE_BYTES // (8 * MAX_SEQ_LEN * vocab_size))
    nats = torch.zeros((), dtype=torch.float64, device=total_device)
    nbytes = torch.zeros((), dtype=torch.int64, device=device)
    loader = make_dataloader(tokenizer, batch_size, MAX_SEQ_LEN, split, device)
    was_training = model.training
    model.eval()
    for first in range(0, rows, batch_size):
        inputs, targets, _ = next(loader)
        logits = model(inputs.clone())  # a model that edits its input must not edit that of the probe
        check_logits(logits, inputs, vocab_size)
        if first < PROBE_ROWS or first + batch_size >= rows:
            logits = logits.clone()  # a model may write the logits of every call to the same memory
            probe_causality(model, inputs, logits, first)
        targets = targets[:rows - first]  # the last batch is computed whole, in the same shape, and scored in part
        for some, wanted in zip(logits[:len(targets)].split(slice_rows), targets.split(slice_rows)):
            loss = F.cross_entropy(some.to(loss_dtype).flatten(0, 1), wanted.flatten(), reduction="none")
            weight = token_bytes[wanted.flatten()]
            nats += torch.where(weight > 0, loss, 0).to(total_device, torch.float64).sum()
            nbytes += weight.sum()
    model.train(was_training)
    bpb = nats.item() / (math.log(2) * nbytes.item())
    if not math.isfinite(bpb):
        raise YardstickError(f"the loss is {bpb}: some logits are not finite")
    return bpb


def start_watchdog(seconds=600):
    """End this process with its stacks on stderr and exit code 1 if it still runs after `seconds`."""
    faulthandler.dump_traceback_later(seconds, exit=True)


# ---------------------------------------------------------------------------


def prepare(num_shards, download_workers):
    """Make the dataset of this profile complete and verified, or raise SystemExit with one line."""
    if num_shards not in (None, -1) and not 1 <= num_shards <= CLIMBMIX_HOLDOUT:
        raise SystemExit(f"--num-shards {num_shards}: choose 1 to {CLIMBMIX_HOLDOUT}, or -1 for all")
    if download_workers < 1:
        raise SystemExit(f"--download-workers {download_workers}: choose 1 or more")
    if VOCAB_SIZE > 2**16:
        raise SystemExit(f"VOCAB_SIZE={VOCAB_SIZE} does not fit uint16: choose at most {2**16}")
    if DATASET != "climbmix":
        num_shards = 1  # the other datasets are used whole
    ledger = Path(__file__).with_name("results.tsv")
    if not ledger.exists():
        ledger.write_text("commit\tval_bpb\tmemory_gb\tstatus\tdescription\n")
    data_dir().parent.mkdir(parents=True, exist_ok=True)
    with locked(data_dir()):
        if not verified(num_shards):
            num_shards = num_shards or DEFAULT_SHARDS
            if DATASET in HUB_REPOS:
                Downloader(HUB_REPOS[DATASET], raw_dir()).fetch_all(hub_files(num_shards), download_workers)
            build(num_shards)
    splits = load_manifest()["splits"]
    for split, count in splits.items():
        print(f"{split:8} {count['documents']:10,} documents {count['tokens']:14,} tokens "
              f"{count['bytes'] / 1e6:9,.1f} MB")
    share = cropped_share(MAX_SEQ_LEN, Tokenizer.from_directory().get_bos_token_id())
    print(f"rows of {MAX_SEQ_LEN} tokens: none is lost to cropping, {100 * share:.1f} % of the rows end in a "
          "cropped piece")
    print(f"ready: {dataset_id()} for profile {PROFILE} in {data_dir()}; now run: uv run train.py")


def main():
    parser = argparse.ArgumentParser(description="Download and tokenize the data of an experiment, once.")
    parser.add_argument("--num-shards", type=int, help="climbmix training shards of 100 MB, -1 for all "
                        f"(default: what is prepared, else {DEFAULT_SHARDS})")
    parser.add_argument("--download-workers", type=int, default=8, help="files fetched at a time (default 8)")
    args = parser.parse_args()
    try:
        prepare(args.num_shards, args.download_workers)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: complete files are kept, run again to continue") from None
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise SystemExit(f"cannot prepare {DATASET}: {error}") from None


if __name__ == "__main__":
    main()
