"""Data, tokenizer, dataloader and yardstick of autoresearch. Fixed during research: edit train.py.

    uv run prepare.py [--num-shards N] [--download-workers N]

Fetches text, trains a tokenizer, tokenizes every split once: in the order of this file.
"""

import argparse
import base64
import bisect
import faulthandler
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import socket
import sys
import sysconfig
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pyarrow.parquet
import requests
import rustbpe
import tiktoken
import torch
import torch.nn.functional as F
from filelock import FileLock
from tqdm import tqdm

# ---------------------------------------------------------------------------
# Constants, which all comparable experiments share

PROFILES = {  # dataset, VOCAB_SIZE, MAX_SEQ_LEN, EVAL_TOKENS
    "full": ("climbmix", 8192, 2048, 40 * 2**19),
    "small": ("tinystories", 4096, 512, 2**21),
    "tiny": ("python", 2048, 256, 2**18),
}
FULL_GB = 15  # with less memory, or fewer multiprocessors, `full` does not end within ten minutes
FULL_MULTIPROCESSORS = 60
NVIDIA = "0x10de"  # as PCI vendors
AMD = "0x1002"
DATASETS = ("climbmix", "tinystories", "python")
SPLITS = ("val", "holdout", "train")
CACHE = Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser()
PREPARE = "run: uv run prepare.py"  # the remedy for whatever is missing or stale


def time_budget():
    """Seconds of training: 300, or what the human asks for with AUTORESEARCH_MINUTES."""
    minutes = os.environ.get("AUTORESEARCH_MINUTES") or "5"
    try:
        seconds = 60 * float(minutes)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise SystemExit(f"AUTORESEARCH_MINUTES={minutes} must be a positive number")
    return seconds


TIME_BUDGET = time_budget()


def available_cpus(root=Path("/")):
    """CPUs that this process may use: OMP_NUM_THREADS, else the affinity mask, cut by the quota of its cgroup."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if chosen.isdecimal() and int(chosen) > 0:
        return int(chosen)
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count()
    cgroups = root / "sys/fs/cgroup"
    limits = [[cgroups / "cpu/cpu.cfs_quota_us", cgroups / "cpu/cpu.cfs_period_us"]]  # of version 1
    own = root / "proc/self/cgroup"
    if own.exists():  # version 2: the limits of all parents hold
        folder = cgroups / own.read_text().rpartition("0::/")[2].strip()
        limits += [[parent / "cpu.max"] for parent in (folder, *folder.parents)]
    for files in limits:
        try:
            quota, period = " ".join(file.read_text() for file in files).split()
        except OSError:
            continue  # no such limit here
        if quota not in ("max", "-1"):
            cpus = min(cpus, math.ceil(int(quota) / int(period)))
    return cpus


def gpu_makers(root=Path("/")):
    """PCI vendors of the devices of this machine, with NVIDIA where WSL has its driver. It only reads files."""
    makers = [path.read_text().strip() for path in (root / "sys/bus/pci/devices").glob("*/vendor")]
    if (root / "usr/lib/wsl/lib/libcuda.so.1").exists():
        makers.append(NVIDIA)
    return makers


def refuse_gpu(gpu):
    raise SystemExit(f"torch {torch.__version__} cannot use {gpu}. Update the driver, or start the container with its "
                     "GPU. For an older GPU or driver, run: uv pip install --no-config torch==2.11.0+cu126 --index-url "
                     "https://download.pytorch.org/whl/cu126 && export UV_NO_SYNC=1. To use the CPU, run: export "
                     "AUTORESEARCH_PROFILE=tiny")


def choose_profile():
    """(profile, reason) for this machine."""
    forced = os.environ.get("AUTORESEARCH_PROFILE")
    if forced in PROFILES:
        return forced, "AUTORESEARCH_PROFILE"
    if forced:
        raise SystemExit(f"AUTORESEARCH_PROFILE={forced} is unknown: choose one of {', '.join(PROFILES)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about an old driver: refuse_gpu() says it
        usable = torch.cuda.is_available()
    if usable:
        gpu = torch.cuda.get_device_properties(0)
        built_for = [int(arch[3:]) for arch in torch.cuda.get_arch_list() if re.fullmatch(r"sm_\d+", arch)]
        if 10 * gpu.major + gpu.minor < min(built_for, default=0):
            refuse_gpu(f"{gpu.name} (sm_{gpu.major}{gpu.minor}, built for sm_{min(built_for)} and newer)")
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        gigabytes = round(gpu.total_memory / 1e9)
        multiprocessors = gpu.multi_processor_count
        reason = f"{gpu.name}: {gigabytes} GB, {multiprocessors} multiprocessors, {'bf16' if bf16 else 'no bf16'}"
        full = bf16 and gigabytes >= FULL_GB and multiprocessors >= FULL_MULTIPROCESSORS
        return "full" if full else "small", reason
    if torch.backends.mps.is_available():
        return "small", "Apple GPU"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "tiny", "no GPU"
    makers = gpu_makers()
    if NVIDIA in makers:
        refuse_gpu(f"this NVIDIA GPU (built for CUDA {torch.version.cuda}; nvidia-smi shows what the driver can do)")
    if AMD in makers:  # perhaps the small one of an AMD CPU
        return "tiny", "the AMD GPU needs a torch for ROCm, see README"
    return "tiny", "no GPU"


PROFILE, PROFILE_REASON = choose_profile()
DATASET, VOCAB_SIZE, MAX_SEQ_LEN, EVAL_TOKENS = PROFILES[PROFILE]
DATASET = os.environ.get("AUTORESEARCH_DATASET") or DATASET
if DATASET not in DATASETS:  # the absolute path of a folder
    DATASET = str(Path(DATASET).expanduser().resolve())
    if not Path(DATASET).is_dir():
        raise SystemExit(f"AUTORESEARCH_DATASET={DATASET} is neither one of {', '.join(DATASETS)} nor a folder")

# ---------------------------------------------------------------------------
# Text: every kind of dataset is a stream of (split, document)

HUB_REPOS = {"climbmix": "karpathy/climbmix-400b-shuffle", "tinystories": "karpathy/tinystories-gpt4-clean"}
CLIMBMIX_VAL, CLIMBMIX_HOLDOUT = 6542, 6541  # the last two shards; those before are for training
DEFAULT_SHARDS = 10
DISK_GB = {"climbmix": 0.226, "tinystories": 3.0, "python": 0.1}  # text and tokens; climbmix: a shard
FOLDER_SUFFIXES = (".parquet", ".jsonl", ".txt", ".md", ".py", ".rst")
FILE_CHARS = 20_000  # a longer text file is several documents
PYTHON_BYTES = 100_000_000  # so that two cores are ready within a minute
PYTHON_FILE_BYTES = 32_000  # a few longer files, many of them generated, would be a third of a held-out split


def raw_dir():
    return CACHE / "raw" / Path(DATASET).name


def hub_files(num_shards):
    """{file: its split}; the one file of tinystories holds all splits."""
    if DATASET == "tinystories":
        return {"tinystories_gpt4_clean.parquet": None}
    shards = {CLIMBMIX_VAL: "val", CLIMBMIX_HOLDOUT: "holdout"}
    shards |= dict.fromkeys(range(CLIMBMIX_HOLDOUT if num_shards == -1 else num_shards), "train")
    return {f"shard_{i:05d}.parquet": split for i, split in shards.items()}


def digest(text):
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def tinystories_split(row):
    if row < 10_000:
        return "holdout"
    if row < 20_000:
        return "val"
    return "train"


def split_of(text):
    """Split of a document of the python dataset or a folder, by content alone."""
    percent = int.from_bytes(digest(text), "big") % 100
    if percent < 2:
        return "val"
    if percent < 4:
        return "holdout"
    return "train"


def read_parquet(path):
    """Yield the strings of column `text`."""
    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        types = {field.name: field.type for field in file.schema_arrow}
        if types.get("text") not in (pyarrow.string(), pyarrow.large_string()):
            raise ValueError("no column `text` of strings")
        for batch in file.iter_batches(batch_size=1024, columns=["text"]):
            yield from filter(None, batch.column(0).to_pylist())


def read_jsonl(path):
    """Yield the `text` of every line; lone surrogates, which UTF-8 cannot encode, are replaced."""
    with open(path, encoding="utf-8-sig") as lines:  # some files begin with a byte-order mark
        for number, line in enumerate(lines, 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise ValueError(f"line {number} has no string `text`")
                yield row["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_text(path):
    """Yield pieces of whole lines, so that a few books fill three splits."""
    with open(path, encoding="utf-8-sig") as file:
        while text := file.read(FILE_CHARS) + file.readline(FILE_CHARS):
            yield text


@functools.lru_cache(None)  # once each, though a folder is read several times
def complain(path, reason):
    print(f"skipped {path}: {reason}", file=sys.stderr)


def folder_files():
    """Every text file below the folder, sorted; links to folders are not followed."""
    files = []
    for parent, _, names in os.walk(DATASET, onerror=lambda error: complain(error.filename, error.strerror)):
        files += [Path(parent, name) for name in names if name.lower().endswith(FOLDER_SUFFIXES)]
    return sorted(path for path in files if os.path.isfile(path))  # neither a pipe nor a broken link


def folder_documents():
    """Yield the folder's documents; what cannot be read is named and left out."""
    readers = {".parquet": read_parquet, ".jsonl": read_jsonl}
    for path in folder_files():
        try:
            yield from readers.get(path.suffix.lower(), read_text)(path)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            complain(path, str(error).splitlines()[0])


@functools.lru_cache(1)
def python_documents():
    """The interpreter's Python files, each text once, ordered by hash."""
    paths = sysconfig.get_paths()
    texts = {}
    for root in {paths["stdlib"], paths["purelib"], paths["platlib"]}:
        for path in Path(root).rglob("*.py"):
            if "site-packages" in path.relative_to(root).parts:
                continue  # of the base interpreter
            try:
                if path.stat().st_size <= PYTHON_FILE_BYTES:
                    text = path.read_text(encoding="utf-8")
                    texts[digest(text)] = text
            except (OSError, UnicodeDecodeError):
                pass  # the standard library tests other encodings
    chosen = []
    size = 0
    for key in sorted(texts):
        size += len(texts[key].encode())
        if size > PYTHON_BYTES:
            break
        chosen.append(texts[key])
    return chosen


def documents(num_shards):
    """Yield (split, text) of the whole dataset."""
    if DATASET in HUB_REPOS:
        for name, split in hub_files(num_shards).items():
            for row, text in enumerate(read_parquet(raw_dir() / name)):
                yield split or tinystories_split(row), text
    elif DATASET == "python":
        for text in python_documents():
            yield split_of(text), text
    else:
        for text in folder_documents():
            yield split_of(text), text


def disk_gb(num_shards):
    """About what text and token files take on disk."""
    if DATASET not in DATASETS:
        return sum(path.stat().st_size for path in folder_files()) / 1e9
    return DISK_GB[DATASET] * (len(hub_files(num_shards)) if DATASET == "climbmix" else 1)


def progress_bar(what):
    """Rewritten in place, in a file twice a minute."""
    return tqdm(desc=what, unit="B", unit_scale=True, file=sys.stdout, mininterval=0.5 if sys.stdout.isatty() else 30)


# ---------------------------------------------------------------------------
# Download

DOWNLOAD_WAITS = (1, 2, 4, 8, 16)  # seconds between the attempts at one file
DOWNLOAD_TIMEOUT = 10  # seconds without a byte; Ctrl-C may take as long
MAX_RETRY_AFTER = 300  # seconds
CHUNK_BYTES = 2**16  # the most that a cut connection loses


def is_text(path):
    """Whether all of `path` is a parquet file of text."""
    try:
        return sum(1 for _ in read_parquet(path)) > 0
    except (OSError, ValueError, pyarrow.ArrowException):
        return False


def fetch_all(names, workers):
    """Have all files complete and verified in raw_dir()."""
    raw_dir().mkdir(parents=True, exist_ok=True)
    stop = threading.Event()  # set on the first failure and on Ctrl-C
    with progress_bar("downloading") as bar, ThreadPoolExecutor(workers) as pool:
        try:
            for done in as_completed([pool.submit(fetch, name, bar, stop) for name in names]):
                done.result()  # raises what fetch() raised
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def fetch(name, bar, stop):
    """Have one file complete and verified; until then it is `<name>.part`, which any run continues."""
    path, part = raw_dir() / name, raw_dir() / f"{name}.part"
    if is_text(path):
        return
    for wait in (*DOWNLOAD_WAITS, None):
        try:
            receive(name, part, bar, stop)
            if is_text(part):
                return os.replace(part, path)
            part.unlink()
            problem, hopeless = "not a parquet file of text", False
        except requests.HTTPError as error:
            status, retry_after = error.response.status_code, error.response.headers.get("Retry-After", "")
            problem, hopeless = f"HTTP {status}", status in (401, 403, 404)
            if retry_after.isdigit() and wait is not None:
                wait = min(int(retry_after), MAX_RETRY_AFTER)
        except (requests.RequestException, UnicodeError) as error:
            problem = type(error).__name__  # its text may hold the token
            hopeless = isinstance(error, ValueError)  # a malformed URL or header
        if hopeless or wait is None or stop.wait(wait):
            raise SystemExit(f"download of {name} failed: {problem}; check the network, HF_ENDPOINT and HF_TOKEN, "
                             "and run the command again: it goes on where it was")


def receive(name, part, bar, stop):
    """One request for a file, from where its part ends; urllib3 checks its length."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    url = f"{endpoint.rstrip('/')}/datasets/{HUB_REPOS[DATASET]}/resolve/main/{name}"
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    if token := os.environ.get("HF_TOKEN", "").strip():
        headers["Authorization"] = f"Bearer {token}"  # requests drops it when redirected to another host
    with requests.get(url, headers=headers, stream=True, timeout=DOWNLOAD_TIMEOUT) as response:
        if response.status_code == 416 and have:
            return  # nothing follows: is_text() tells whether it is whole
        response.raise_for_status()
        with open(part, "ab" if response.status_code == 206 else "wb") as file:
            for chunk in response.iter_content(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
                if stop.is_set():
                    raise SystemExit("stopped")


# ---------------------------------------------------------------------------
# Tokenizer

# GPT-4's, but with digits in groups of two at most: a small vocabulary has no room for 1,000 triples
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [f"<|reserved_{i}|>" for i in range(4)]  # the first is BOS
FORMAT = 3  # of tokenizer and token files; a change of it makes old caches stale
TRAIN_CHARS = 500_000_000  # from which the tokenizer is learnt ...
TRAIN_SHARDS = 2  # ... within the first shards, so that it does not depend on how many were fetched
TRAIN_DOC_CHARS = 10_000  # ... at the beginnings of documents
SEGMENT_CHARS = 100_000  # encoded at a time: a megabyte without a space overflows the regex


def tokenizer_texts(num_shards):
    chars = 0
    for split, text in documents(TRAIN_SHARDS if num_shards == -1 else min(num_shards, TRAIN_SHARDS)):
        if split == "train":
            yield text[:TRAIN_DOC_CHARS]
            chars += min(len(text), TRAIN_DOC_CHARS)
            if chars >= TRAIN_CHARS:
                return


class Tokenizer:
    """Byte-level BPE served by tiktoken. Ids: bytes and merges first, then SPECIAL_TOKENS.

    On disk it is tiktoken's text format: lines of "<base64 of a token's bytes> <rank>".
    """

    def __init__(self, ranks):
        self.ranks = ranks
        special_tokens = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding("autoresearch", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks,
                                          special_tokens=special_tokens)

    @classmethod
    def train(cls, texts, vocab_size):
        bpe = rustbpe.Tokenizer()
        bpe.train_from_iterator(texts, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
        if len(ranks) + len(SPECIAL_TOKENS) < vocab_size:
            raise SystemExit(f"{DATASET} has too little text for {VOCAB_SIZE=}: it gives {len(ranks)} tokens. Add text")
        return cls(ranks)

    @classmethod
    def from_directory(cls):
        """The tokenizer of the prepared dataset."""
        load_manifest("tokenizer")
        lines = (data_dir() / "tokenizer.tiktoken").read_text().splitlines()
        return cls({base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)})

    def save(self, directory):
        """Write it, after a round trip that must give the text back."""
        text = "Hello world! 1234\n\tdéjà vu \u4f60\u597d \U0001f680" + "".join(map(chr, range(0xD800)))
        if self.decode(self.encode(text)) != text:
            raise SystemExit("the new tokenizer does not reproduce its text, so it was not saved")
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in self.ranks.items()]
        (directory / "tokenizer.tiktoken").write_text("".join(lines))

    def get_vocab_size(self):
        return self.encoding.n_vocab

    def get_bos_token_id(self):
        return len(self.ranks)

    def encode_numpy(self, text):
        """Ids of a text as uint16; the names of special tokens are plain text. Releases the GIL."""
        ids = [np.empty(0, np.uint16)]
        for i in range(0, len(text), SEGMENT_CHARS):
            segment = self.encoding.encode_to_numpy(text[i:i + SEGMENT_CHARS], disallowed_special=())
            ids.append(segment.astype(np.uint16))
        return np.concatenate(ids)

    def encode(self, text, prepend=None):
        """Ids of a text, after the id `prepend` if there is one; a list of them for a list of texts."""
        if not isinstance(text, str):
            return [self.encode(one, prepend) for one in text]
        return ([] if prepend is None else [prepend]) + self.encode_numpy(text).tolist()

    def decode(self, ids):
        return self.encoding.decode(ids)

    def token_bytes(self):
        """(V,) int64 numpy array: the raw bytes each id stands for, 0 for special tokens."""
        sizes = [len(self.encoding.decode_single_token_bytes(i)) for i in range(len(self.ranks))]
        return np.array(sizes + [0] * len(SPECIAL_TOKENS))


# ---------------------------------------------------------------------------
# Token files: each split once, as a flat uint16 file plus one uint32 length per document

BATCH_DOCUMENTS, TASK_DOCUMENTS = 4096, 64  # in memory, and in a thread, at a time
MIN_EVAL_ROWS = 32  # of validation text: fewer measure nothing


def data_dir():
    place = hashlib.sha256(DATASET.encode()).hexdigest()[:8]  # two folders may have the same name
    return CACHE / "data" / f"{Path(DATASET).name}-{place}-{VOCAB_SIZE}"


def fingerprint():
    """Hash of what the token files are made from; the python dataset is frozen when first prepared."""
    paths = [] if DATASET in DATASETS else folder_files()
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    source = [FORMAT, SPLIT_PATTERN, SPECIAL_TOKENS, DATASET, VOCAB_SIZE, stats]
    return hashlib.sha256(json.dumps(source).encode()).hexdigest()


def file_hash(path):
    return hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest()


def load_manifest(*checked):
    """The dataset's manifest; SystemExit when it is stale or a file is damaged.

    The sizes of all files are compared, and the content of those whose names begin with one of `checked`.
    """
    folder = data_dir()
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest.get("made_from") != fingerprint():
            raise ValueError("it has changed since")
        for name, sha256 in manifest["sha256"].items():
            damaged = (folder / name).stat().st_size != manifest["bytes"][name]
            if damaged or name.startswith(checked) and file_hash(folder / name) != sha256:
                raise ValueError(f"{folder / name} is damaged")
        return manifest
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{DATASET} is not prepared: {error}; {PREPARE}") from None


def dataset_id():
    """The dataset's name and 8 digits that change with its content."""
    content = json.dumps(load_manifest()["sha256"], sort_keys=True)
    return f"{Path(DATASET).name}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def disjoint(stream):
    """A stream of (split, text) without texts that are held out for another split."""
    held_out = {}  # digest: split
    for split, text in stream:
        key = digest(text)
        if split != "train":
            held_out.setdefault(key, split)
        if text and held_out.get(key, split) == split:
            yield split, text


def write_token_files(tokenizer, stream, folder):
    def encode(texts):  # in parallel, because tiktoken releases the GIL
        return [tokenizer.encode_numpy(text) for text in texts]

    with progress_bar("tokenizing") as bar, ThreadPoolExecutor(available_cpus()) as pool:
        while batch := list(itertools.islice(stream, BATCH_DOCUMENTS)):
            splits, texts = zip(*batch)
            tasks = [texts[i:i + TASK_DOCUMENTS] for i in range(0, len(texts), TASK_DOCUMENTS)]
            encoded = list(itertools.chain.from_iterable(pool.map(encode, tasks)))
            for split in SPLITS:
                chosen = [ids for ids, where in zip(encoded, splits) if where == split]
                with open(folder / f"{split}.tokens", "ab") as file:
                    file.write(b"".join(chosen))
                with open(folder / f"{split}.lengths", "ab") as file:
                    file.write(np.array([len(ids) for ids in chosen], np.uint32))
            bar.update(sum(map(len, texts)))


def build(num_shards):
    """Train the tokenizer and write all token files beside data_dir(), then move them there at once."""
    # a node of a cluster has its own: not every network file system has locks
    new = data_dir().with_name(f"{data_dir().name}.{socket.gethostname()}.part")
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
    new.mkdir(parents=True)
    try:
        made_from = fingerprint()  # before reading: what changes meanwhile makes the result stale
        print(f"training a tokenizer of {VOCAB_SIZE} tokens on {DATASET}", flush=True)
        tokenizer = Tokenizer.train(tokenizer_texts(num_shards), VOCAB_SIZE)
        tokenizer.save(new)
        write_token_files(tokenizer, disjoint(documents(num_shards)), new)
        sizes = {path.name: path.stat().st_size for path in new.iterdir()}
        for split in SPLITS:
            rows = sizes[f"{split}.tokens"] // 2 // MAX_SEQ_LEN
            if rows < MIN_EVAL_ROWS:
                raise SystemExit(f"{DATASET} has too little text: {split} has {rows} rows of {MAX_SEQ_LEN} tokens, "
                                 f"and {MIN_EVAL_ROWS} are needed. Add text")
        hashes = {name: file_hash(new / name) for name in sizes}
        manifest = dict(made_from=made_from, num_shards=num_shards, bytes=sizes, sha256=hashes)
        (new / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        shutil.rmtree(data_dir(), ignore_errors=True)
        os.replace(new, data_dir())
        token_files.cache_clear()
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


# ---------------------------------------------------------------------------
# Rows: B x T batches without padding

BUFFER_SIZE = 1000  # pieces to choose from
WINDOW_DOCS = 2**20  # documents shuffled together: bounds memory


@functools.lru_cache(1)
def token_files(folder):
    """{split: (tokens, lengths of documents)}, opened once: what changes in a run changes the next."""
    load_manifest("val", "holdout")
    return {split: (np.memmap(folder / f"{split}.tokens", np.uint16, "r"),
                    np.memmap(folder / f"{split}.lengths", np.uint32, "r")) for split in SPLITS}


def shuffled_pieces(lengths, T, epoch):
    """Yield (start, n) of every piece of every document, in an order fixed by `epoch`.

    A document longer than T tokens is cut into pieces of T, so that it is used to its end: lengths 3 and 5 with T 4
    give (0, 3), (3, 4) and (7, 1) in some order, which is the same in every version of numpy.
    """
    base = 0  # tokens of the windows before
    for first in range(0, len(lengths), WINDOW_DOCS):
        length = lengths[first:first + WINDOW_DOCS].astype(np.int64)
        begin = base + np.cumsum(length) - length  # of each document
        pieces = -(-length // T)  # of each document
        nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # 0, 1, ... within a document
        start = np.repeat(begin, pieces) + nth * T
        n = np.minimum(np.repeat(length, pieces) - nth * T, T)
        order = np.random.RandomState([epoch, first // WINDOW_DOCS]).permutation(len(n))
        yield from zip(start[order].tolist(), n[order].tolist())
        base += int(length.sum())


def pack_rows(tokens, lengths, T, bos, buffer_size):
    """Yield (row, epoch) endlessly: rows of T+1 tokens, filled with BOS + piece, BOS + piece, ...

    Best fit: the longest piece of the buffer that fits comes next, the oldest among equals. When none fits, the
    shortest is cropped and its rest goes back. So every token is used once per epoch; the last row of an epoch is
    filled up from the next one. `row` is overwritten by the next one.
    """
    row, used = np.empty(T + 1, np.uint16), 0
    for epoch in itertools.count(1):
        stream = enumerate(shuffled_pieces(lengths, T, epoch))
        buffer = []  # sorted (n, arrival, start)
        while True:
            for arrival, (start, n) in itertools.islice(stream, buffer_size - len(buffer)):
                bisect.insort(buffer, (n, arrival, start))
            if not buffer:
                break
            room = T - used  # after the BOS
            fitting = bisect.bisect_right(buffer, (room, math.inf))
            if fitting:
                longest = buffer[fitting - 1][0]
                n, _, start = buffer.pop(bisect.bisect_left(buffer, (longest,)))
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


def make_dataloader(tokenizer, B, T, split, device=None, buffer_size=BUFFER_SIZE):
    """Endless iterator of (inputs, targets, epoch): (B, T) int64 tensors on `device`, epochs from 1.

    Every row starts with BOS; targets are inputs shifted by one. The rows do not depend on B. A copy to a CUDA GPU is
    asynchronous, from a pinned block of its own, which torch reuses only when the copy has ended.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    rows = pack_rows(*token_files(data_dir())[split], T, tokenizer.get_bos_token_id(), buffer_size)
    device = torch.device(device or "cpu")
    cuda = device.type == "cuda"

    def batches():
        while True:
            batch = torch.empty((B, T + 1), dtype=torch.uint16, pin_memory=cuda)
            for target in batch.numpy():
                row, epoch = next(rows)
                target[:] = row
            if cuda:
                batch = batch.to(device, non_blocking=True)
            batch = batch.to(torch.int64).to(device)  # converted first: MPS has no uint16
            # copies, so that a model that edits its inputs does not edit the targets
            yield batch[:, :-1].clone(), batch[:, 1:].clone(), epoch

    return batches()


# ---------------------------------------------------------------------------
# The yardstick: bits per byte

PROBE_ROWS = 8  # are probed for causality, and the last batch
PROBE_TOLERANCE = 1e-3  # honest models move by 0


class YardstickError(Exception):
    """The logits are not those of a causal model of the next token."""


def probe_causality(model, inputs, logits, first):
    """Raise YardstickError unless every position's logits depend on the tokens up to there alone.

    The rows, from number `first` on, are given again with the tokens after a cut replaced: none in row 0, all but the
    first in row 1, ...
    """
    if not torch.isfinite(logits).all():
        raise YardstickError("some logits are not finite")
    (B, T), V = inputs.shape, logits.shape[-1]
    cuts = [T - 1, *torch.linspace(0, T - 2, max(PROBE_ROWS, B) - 1).long().tolist()]  # the last token kept in a row
    cuts = [cuts[row % len(cuts)] for row in range(first, first + B)]
    replaced = (torch.arange(T) > torch.tensor(cuts)[:, None]).to(inputs.device)  # (B, T)
    shift = torch.randint(1, V, (B, T), generator=torch.Generator().manual_seed(first)).to(inputs.device)
    other = model(torch.where(replaced, (inputs + shift) % V, inputs))
    moved = torch.stack([(a.float() - b.float()).abs().amax(-1) for a, b in zip(other, logits)])  # a row at a time
    moved = torch.where(replaced, 0, moved).nan_to_num(math.inf)
    for row, cut in enumerate(cuts):
        if moved[row].max() > PROBE_TOLERANCE:
            position = int(moved[row].argmax())
            change = f"not causal: tokens after position {cut} were replaced"
            if cut == T - 1:
                change = "rows are mixed, dropout is on or state is kept between calls: nothing was replaced"
            raise YardstickError(f"{change}, and the logits at position {position} of row {first + row} "
                                 f"moved by {moved[row, position]:.3g}")


@torch.no_grad()
def evaluate_bpb(model, tokenizer, batch_size, split="val"):
    """Bits per byte of `model` on rows of `split`, the same ones for every batch size.

    model(inputs) takes (B, T) int64 and returns logits (B, T, V); it never sees a target. The result is the
    cross-entropy in nats of the targets that have bytes, over ln 2 times those bytes.
    """
    device = next(iter(model.parameters()), torch.empty(0)).device
    sum_device = "cpu" if device.type == "mps" else device  # MPS has no float64
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(device)
    vocab_size = tokenizer.get_vocab_size()
    rows = min(EVAL_TOKENS, len(token_files(data_dir())[split][0])) // MAX_SEQ_LEN  # one pass at most
    nats = torch.zeros((), dtype=torch.float64, device=sum_device)
    nbytes = torch.zeros((), dtype=torch.int64, device=device)
    loader = make_dataloader(tokenizer, batch_size, MAX_SEQ_LEN, split, device)
    model.eval()
    for first in range(0, rows, batch_size):
        inputs, targets, _ = next(loader)
        logits = model(inputs.clone())  # the probe needs what a model may edit
        shape = tuple(getattr(logits, "shape", ()))
        if shape != (*inputs.shape, vocab_size):
            raise YardstickError(f"the model returned {shape}, not logits of shape {(*inputs.shape, vocab_size)}")
        if first < PROBE_ROWS or first + batch_size >= rows:
            logits = logits.clone()  # a model may use the same memory in every call
            probe_causality(model, inputs, logits, first)
        for row, wanted in zip(logits, targets[:rows - first]):  # the last batch is scored in part
            loss = F.cross_entropy(row.float(), wanted, reduction="none")
            weight = token_bytes[wanted]
            nats += torch.where(weight > 0, loss, 0).to(sum_device).double().sum()
            nbytes += weight.sum()
    if not torch.isfinite(nats):
        raise YardstickError("some logits are not finite")
    return nats.item() / (math.log(2) * nbytes.item())


def start_watchdog(seconds=TIME_BUDGET + 300):
    """End this process with its stacks and exit code 1 if it still runs after `seconds`."""
    faulthandler.dump_traceback_later(seconds, exit=True)


# ---------------------------------------------------------------------------
# The command


def prepare(num_shards, download_workers):
    """Have the dataset complete and verified."""
    if num_shards not in (None, -1) and not 1 <= num_shards <= CLIMBMIX_HOLDOUT:
        raise SystemExit(f"--num-shards {num_shards}: choose 1 to {CLIMBMIX_HOLDOUT}, or -1 for all")
    if DATASET != "climbmix":
        num_shards = 1  # the other datasets are used whole
    gigabytes = disk_gb(num_shards or DEFAULT_SHARDS)
    print(f"{PROFILE} ({PROFILE_REASON}): {DATASET}, about {gigabytes:.1f} GB on disk in {CACHE}", flush=True)
    ledger = Path(__file__).with_name("results.tsv")
    if not ledger.exists():
        ledger.write_text("commit\tval_bpb\tmemory_gb\tstatus\tdescription\n")
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):  # a second prepare.py waits
        try:
            prepared_shards = load_manifest("")["num_shards"]
        except SystemExit:
            prepared_shards = 0
        if prepared_shards == 0 or num_shards not in (None, prepared_shards):
            num_shards = num_shards or DEFAULT_SHARDS
            missing = gigabytes - sum(path.stat().st_size for path in raw_dir().glob("*")) / 1e9
            free = shutil.disk_usage(CACHE).free / 1e9
            if free < missing:
                raise SystemExit(f"the disk of {CACHE} has {free:.1f} GB free, and {missing:.1f} GB are needed: free "
                                 "some, or set AUTORESEARCH_CACHE to a folder on another disk")
            if DATASET in HUB_REPOS:
                fetch_all(hub_files(num_shards), download_workers)
            build(num_shards)
    print(f"ready: {dataset_id()} for profile {PROFILE} in {data_dir()}; now run: uv run train.py")


def main():
    parser = argparse.ArgumentParser(description="Prepare the data of all experiments.")
    parser.add_argument("--num-shards", type=int, help=f"of climbmix, -1 for all (default {DEFAULT_SHARDS})")
    parser.add_argument("--download-workers", type=int, default=8)
    args = parser.parse_args()
    try:
        prepare(args.num_shards, args.download_workers)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: what is complete is kept; run the command again to go on") from None
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise SystemExit(f"cannot prepare {DATASET}: {error}") from None


if __name__ == "__main__":
    main()
