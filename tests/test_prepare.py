"""Text, tokenizer, token files and rows."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare

REPO = Path(__file__).parents[1]
BOS = 60_000


def run(*args, **env):
    """Run a command of the repo as a user would."""
    return subprocess.run([sys.executable, *args], cwd=REPO, env=os.environ | env, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder as the dataset, with a cache of its own and a vocabulary that little text can fill."""
    text = tmp_path / "mine"
    text.mkdir()
    monkeypatch.setattr(prepare, "DATASET", str(text))
    monkeypatch.setattr(prepare, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(prepare, "VOCAB_SIZE", 300)
    monkeypatch.setattr(prepare, "MAX_SEQ_LEN", 8)
    return text


def fill(folder, documents=400):
    for i in range(documents):
        (folder / f"{i}.txt").write_text(f"document {i}: " + " ".join(f"word{(i * 7 + j) % 50}" for j in range(40)))


def assert_nothing_half_written():
    left = [path for path in prepare.CACHE.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert not left, left


# --- import and command line


def test_importing_both_files_has_no_side_effects():
    code = """if True:
        import os, sys
        sys.argv = ["x", "--nonsense"]
        before = set(os.listdir("."))
        def hook(event, args):
            if event in ("socket.connect", "socket.getaddrinfo"):
                os._exit(3)
        sys.addaudithook(hook)
        import prepare, train, torch
        assert not torch.cuda.is_initialized()
        assert set(os.listdir(".")) - before <= {"__pycache__"}
    """
    done = run("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name, value, listed", [
    ("AUTORESEARCH_PROFILE", "huge", "full, small, tiny"),
    ("AUTORESEARCH_DATASET", "climbmax", "climbmix, tinystories, python"),
])
def test_an_unknown_setting_is_one_line_that_lists_the_valid_ones(name, value, listed):
    done = run("prepare.py", **{name: value})
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and value in done.stderr and listed in done.stderr


def test_training_without_data_is_one_line_with_the_remedy(tmp_path):
    done = run("train.py", AUTORESEARCH_CACHE=str(tmp_path / "nothing"))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "run: uv run prepare.py" in done.stderr


def test_a_second_prepare_verifies_and_returns_within_two_seconds(prepared, capsys):
    before = {path: path.stat().st_mtime_ns for path in prepared.data_dir().iterdir()}
    start = time.monotonic()
    prepared.prepare(10, 1)
    assert time.monotonic() - start < 2
    assert before == {path: path.stat().st_mtime_ns for path in prepared.data_dir().iterdir()}
    assert "ready: text-" in capsys.readouterr().out


def test_a_dataset_that_changes_during_a_run_changes_the_next_run_only(folder):
    fill(folder)
    prepare.prepare(10, 1)
    tokenizer = prepare.Tokenizer.from_directory()
    before = next(prepare.make_dataloader(tokenizer, 4, 8, "val"))[0]
    rows = prepare.eval_rows("val")
    (folder / "new.txt").write_text("one more document")
    code = f"""if True:
        import prepare
        from pathlib import Path
        prepare.DATASET, prepare.CACHE, prepare.VOCAB_SIZE, prepare.MAX_SEQ_LEN = {str(folder)!r}, Path({str(prepare.CACHE)!r}), 300, 8
        for i in range(400):
            Path(prepare.DATASET, f"more{{i}}.txt").write_text(f"another document {{i}} of some length")
        prepare.prepare(10, 1)
    """
    assert run("-c", code).returncode == 0
    assert torch.equal(next(prepare.make_dataloader(tokenizer, 4, 8, "val"))[0], before) and prepare.eval_rows("val") == rows
    prepare.token_files.cache_clear()  # as in a new process
    assert prepare.eval_rows("val") != rows


def test_preparing_without_a_number_of_shards_keeps_what_is_there(folder, capsys):
    fill(folder)
    prepare.prepare(3, 1)
    manifest = prepare.load_manifest()
    assert prepare.verified(None) and prepare.verified(manifest["num_shards"]) and not prepare.verified(manifest["num_shards"] + 1)


@pytest.mark.parametrize("num_shards", [0, -2, 6542])
def test_an_impossible_number_of_shards_is_refused(num_shards):
    with pytest.raises(SystemExit, match=f"--num-shards {num_shards}: choose 1 to 6541"):
        prepare.prepare(num_shards, 1)


# --- a user's folder


def test_an_empty_folder_is_refused(folder):
    with pytest.raises(SystemExit, match="VOCAB_SIZE=300 needs more: add text"):
        prepare.prepare(10, 1)
    assert_nothing_half_written()


def test_too_little_text_for_the_vocabulary_is_refused(folder, monkeypatch):
    fill(folder, 3)
    monkeypatch.setattr(prepare, "VOCAB_SIZE", 60_000)
    with pytest.raises(SystemExit, match="VOCAB_SIZE=60000 needs more: add text"):
        prepare.prepare(10, 1)
    assert_nothing_half_written()


def test_too_little_text_for_the_evaluation_rows_is_refused(folder, monkeypatch):
    fill(folder)
    monkeypatch.setattr(prepare, "MAX_SEQ_LEN", 256)
    with pytest.raises(SystemExit, match=r"tokens for the val split, at least 8192 are needed: add text"):
        prepare.prepare(10, 1)
    assert_nothing_half_written()


def test_a_vocabulary_that_does_not_fit_the_token_files_is_refused(folder, monkeypatch):
    monkeypatch.setattr(prepare, "VOCAB_SIZE", 70_000)
    with pytest.raises(SystemExit, match="VOCAB_SIZE=70000 does not fit uint16"):
        prepare.prepare(10, 1)


def test_unreadable_files_are_named_counted_and_left_out(folder, capsys):
    fill(folder)
    (folder / "latin.txt").write_bytes("déjà".encode("latin-1"))
    (folder / "bad.jsonl").write_text('{"text": "fine"}\n{"txet": "no"}\n')
    (folder / "list.jsonl").write_text("[1]\n")
    (folder / "broken.parquet").write_bytes(b"PAR1 nonsense PAR1")
    (folder / "empty.md").write_text("")
    prepare.prepare(10, 1)
    errors = capsys.readouterr().err
    assert f"skipped {folder / 'latin.txt'}: not UTF-8" in errors
    assert f"skipped the rest of {folder / 'bad.jsonl'}: line 2 has no field `text` that is a string" in errors
    assert f"skipped {folder / 'list.jsonl'}: line 1 has no field" in errors
    assert "broken.parquet" in errors and "empty.md" not in errors
    assert "skipped 4 unreadable files" in errors and errors.count("\n") == 5  # each once, though it is read twice


def test_a_subfolder_without_permission_is_named(folder, monkeypatch, capsys):
    fill(folder)
    (folder / "secret").mkdir()
    scandir = os.scandir

    def refused(path):
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refused)
    assert len(list(prepare.folder_documents(folder))) == 400
    assert f"skipped {folder / 'secret'}: " in capsys.readouterr().err


def test_every_kind_of_file_below_a_folder_is_read_once_despite_links(folder):
    below = folder / "a" / "b"
    below.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["parquet", None, ""]}), below / "x.parquet")
    (below / "x.jsonl").write_text('{"text": "jsonl"}\n\n{"text": "second \\ud83d\\ude80"}\n')
    for suffix in ("txt", "md", "py", "rst", "html"):
        (below / f"x.{suffix}").write_text(suffix)
    (below / "loop").symlink_to(folder)
    (below / "again.txt").symlink_to(below / "x.txt")
    (below / "nowhere.txt").symlink_to(below / "missing.txt")
    os.mkfifo(below / "pipe.txt")
    (below / "LOUD.TXT").write_text("\ufeffloud", encoding="utf-8")  # with a byte-order mark
    assert Counter(prepare.folder_documents(folder)) == Counter(
        ["parquet", "jsonl", "second \U0001f680", "txt", "md", "py", "rst", "loud"])


def test_a_long_text_is_several_documents_that_end_with_lines_and_hold_all_of_it(folder, capsys):
    """As one document a book is in one split alone, and a folder of one book could not be prepared."""
    lines = [f"line {i} of a long book\n" for i in range(20_000)]
    (folder / "book.txt").write_text("".join(lines))
    (folder / "line.txt").write_text("x" * 500_000)
    book, line = [], []
    for text in prepare.folder_documents(folder):
        (line if set(text) == {"x"} else book).append(text)
    assert "".join(book) == "".join(lines) and all(text.endswith("book\n") for text in book)
    assert "".join(line) == "x" * 500_000 and max(map(len, book + line)) <= 2 * prepare.FILE_CHARS
    (folder / "book.txt").write_bytes("".join(lines).encode() + b"\xff")
    assert len(list(prepare.folder_documents(folder))) == len(book) + len(line) - 1
    assert f"skipped the rest of {folder / 'book.txt'}: not UTF-8" in capsys.readouterr().err


def test_a_changed_folder_is_noticed(folder):
    fill(folder)
    prepare.prepare(10, 1)
    prepare.Tokenizer.from_directory()
    (folder / "new.txt").write_text("one more document")
    with pytest.raises(SystemExit, match="has changed since it was prepared; run: uv run prepare.py"):
        prepare.Tokenizer.from_directory()


def test_a_documents_split_does_not_move_when_files_are_added(folder):
    texts = [f"text number {i}" for i in range(2000)]
    shares = Counter(map(prepare.split_of, texts))
    assert 20 <= shares["val"] <= 65 and 20 <= shares["holdout"] <= 65  # 2 % each
    assert prepare.split_of("text number 7") == prepare.split_of("text number 7") == "train"


def test_no_text_is_in_two_splits():
    stream = [("val", "a"), ("val", "b"), ("holdout", "b"), ("holdout", "c"), ("train", "a"), ("train", "c"), ("train", "d")]
    got = {(split, text) for split, texts in prepare.tasks(stream) for text in texts}
    assert got == {("val", "a"), ("val", "b"), ("holdout", "c"), ("train", "d")}


@pytest.mark.parametrize("dataset", ["climbmix", "tinystories", "python", "folder"])
def test_the_splits_of_every_kind_of_dataset_share_no_text(folder, monkeypatch, dataset):
    """The same text is in several files and rows on purpose."""
    texts = [f"story {i % 20_100}: " + " ".join(f"word{(i * 7 + j) % 50}" for j in range(8)) for i in range(20_400)]
    if dataset == "folder":
        fill(folder)
        (folder / "again.jsonl").write_text("".join(json.dumps({"text": path.read_text()}) + "\n" for path in folder.glob("*.txt")))
    else:
        monkeypatch.setattr(prepare, "DATASET", dataset)
        monkeypatch.setattr(prepare, "PYTHON_BYTES", 3_000_000)
        prepare.python_documents.cache_clear()
        prepare.raw_dir().mkdir(parents=True)
        files = {prepare.TINYSTORIES_FILE: texts, "shard_06542.parquet": texts[:400], "shard_06541.parquet": texts[200:600],
                 "shard_00000.parquet": texts[:2000]}
        for name, rows in files.items():
            pyarrow.parquet.write_table(pyarrow.table({"text": rows}), prepare.raw_dir() / name)
    prepare.prepare(1, 1)
    prepare.python_documents.cache_clear()
    tokenizer, seen = prepare.Tokenizer.from_directory(), {}
    for split in prepare.SPLITS:
        tokens, lengths = prepare.token_files(prepare.data_dir())[split]
        for part in np.split(tokens, np.cumsum(lengths)[:-1]):
            assert seen.setdefault(tokenizer.decode(part.tolist()), split) == split
    assert set(seen.values()) == set(prepare.SPLITS)


# --- tokenizer


def test_text_comes_back_from_its_tokens(tokenizer):
    for path in list(Path(os.environ["AUTORESEARCH_DATASET"]).glob("*.txt"))[:200]:
        text = path.read_text(encoding="utf-8")
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(st.characters(codec="utf-8"), max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_unicode_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(st.characters(), max_size=50))  # surrogates included
@settings(max_examples=100, deadline=None)
def test_lone_surrogates_become_replacement_characters(tokenizer, text):
    joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(tokenizer.encode(text)) == (text if text == joined else joined)


@pytest.mark.parametrize("text", ["a" * 1_000_000, " " * 1_000_000, "\n" * 1_000_000, "é\0" * 300_000, "1" * 500_000])
def test_a_line_of_megabytes_comes_back_within_seconds(tokenizer, text):
    start = time.monotonic()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.monotonic() - start < 10


def test_token_bytes_are_raw_bytes_and_zero_for_special_tokens(tokenizer):
    """Counting the bytes of decoded text made U+FFFD of split characters, 3 bytes each: bpb read too low."""
    sizes = tokenizer.token_bytes()
    for text in ("plain ascii", "déjà vu", "你好，世界", "\U0001f680\U0001f9d1\u200d\U0001f680", "\x00\x7f"):
        ids = tokenizer.encode(text, prepend=tokenizer.get_bos_token_id())
        assert sizes[ids].sum() == len(text.encode())
    assert len(sizes) == tokenizer.get_vocab_size() == prepare.VOCAB_SIZE
    assert (sizes[-4:] == 0).all() and (sizes[:-4] > 0).all()


def test_encode_takes_lists_and_prepends_by_id_or_name(tokenizer):
    bos = tokenizer.get_bos_token_id()
    plain = tokenizer.encode(["hello", "you"])
    assert tokenizer.encode(["hello", "you"], prepend=bos) == [[bos] + ids for ids in plain]
    assert tokenizer.encode("hello", prepend="<|reserved_0|>") == [bos] + plain[0]


def test_special_tokens_in_text_are_plain_text(tokenizer):
    text = "a <|reserved_0|> b"
    assert max(tokenizer.encode(text)) < tokenizer.get_bos_token_id()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_numbers_are_cut_into_groups_of_two(tokenizer):
    assert max(len(tokenizer.decode([i])) for i in tokenizer.encode("1234567890" * 20)) <= 2


def test_the_tokenizer_is_saved_as_text(tokenizer):
    folder = prepare.data_dir()
    first = (folder / "tokenizer.tiktoken").read_text(encoding="ascii").splitlines()[0].split()
    assert len(first) == 2 and first[1] == "0"
    assert json.loads((folder / "tokenizer.json").read_text())["special_tokens"][0] == "<|reserved_0|>"


def test_a_damaged_tokenizer_is_one_line_with_the_remedy(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SystemExit, match="run: uv run prepare.py"):
        prepare.Tokenizer.from_directory(tmp_path)


def test_the_tokenizer_does_not_depend_on_how_many_shards_were_fetched(monkeypatch):
    asked = []
    monkeypatch.setattr(prepare, "documents", lambda num_shards: asked.append(num_shards) or iter(()))
    for num_shards in (1, 2, 10, -1):
        list(prepare.tokenizer_texts(num_shards))
    assert asked == [1, 2, 2, 2]


# --- token files


def test_token_files_hold_every_document_in_order(folder):
    fill(folder)
    prepare.prepare(10, 1)
    tokenizer = prepare.Tokenizer.from_directory()
    for split in prepare.SPLITS:
        tokens = np.fromfile(prepare.data_dir() / f"{split}.tokens", np.uint16)
        lengths = np.fromfile(prepare.data_dir() / f"{split}.lengths", np.uint32)
        got = [tokenizer.decode(part.tolist()) for part in np.split(tokens, lengths.cumsum()[:-1])]
        assert got == [text for text in prepare.folder_documents(folder) if prepare.split_of(text) == split]
        assert prepare.load_manifest()["splits"][split]["bytes"] == sum(len(text.encode()) for text in got)


def test_token_files_do_not_depend_on_the_number_of_workers(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "TASK_CHARS", 5000)
    seen = set()
    for workers in (1, 3):
        monkeypatch.setattr(prepare.os, "cpu_count", lambda: workers)
        (tmp_path / str(workers)).mkdir()
        prepare.write_token_files(tokenizer, prepare.documents(1), tmp_path / str(workers))
        seen.add(tuple(prepare.file_sha256(path) for path in sorted((tmp_path / str(workers)).iterdir())))
    assert len(seen) == 1


def test_a_build_that_dies_leaves_nothing_and_the_next_one_completes(folder, monkeypatch):
    fill(folder)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_token_files", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError):
            prepare.prepare(10, 1)
    assert_nothing_half_written()
    prepare.data_dir().with_name(f"{prepare.data_dir().name}.{socket.gethostname()}.part").mkdir()  # as a killed run leaves it
    prepare.prepare(10, 1)
    assert prepare.load_manifest()["splits"]["train"]["documents"] > 300


def test_after_sigkill_while_tokenizing_the_next_run_completes_the_same_files(prepared, tmp_path):
    code = """if True:
        import os, signal, prepare
        real = prepare.in_order
        def dying(*args):
            for number, item in enumerate(real(*args)):
                if number == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield item
        prepare.in_order = dying
        prepare.prepare(10, 1)
    """
    env = dict(AUTORESEARCH_CACHE=str(tmp_path))
    assert run("-c", code, **env).returncode == -9
    data = tmp_path / "data" / prepared.data_dir().name
    assert not data.exists() and len(list(data.parent.glob("*.part/train.tokens"))) == 1
    done = run("prepare.py", **env)
    assert done.returncode == 0 and f"ready: {prepared.dataset_id()} " in done.stdout
    assert not list(data.parent.glob("*.part"))


def test_a_truncated_token_file_is_noticed_and_mended(folder):
    fill(folder)
    prepare.prepare(10, 1)
    path = prepare.data_dir() / "val.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(SystemExit, match="run: uv run prepare.py"):
        prepare.load_manifest()
    prepare.prepare(10, 1)
    prepare.load_manifest()


def test_the_ledger_is_created_with_its_header_and_never_touched_again(prepared):
    ledger = REPO / "results.tsv"
    assert ledger.read_text().startswith("commit\tval_bpb\tmemory_gb\tstatus\tdescription\n")


# --- rows


def rows_of(documents, T, count, buffer_size=1000):
    """The first rows packed from `documents`, lists of ids."""
    lengths = np.array([len(ids) for ids in documents], np.uint32)
    tokens = np.array([i for ids in documents for i in ids], np.uint16)
    packed = prepare.pack_rows(tokens, lengths, T, BOS, buffer_size)
    return [(row.tolist(), epoch) for (row, epoch), _ in zip(((r.copy(), e) for r, e in packed), range(count))]


def test_packing_by_hand(monkeypatch):
    """Best fit first: 5 tokens, then 2 that fit exactly; then the shortest is cropped, its rest comes back."""
    monkeypatch.setattr(prepare, "shuffled_pieces", lambda lengths, T, epoch: iter([(0, 5), (5, 4), (9, 4), (13, 2)]))
    documents = [[10, 11, 12, 13, 14], [20, 21, 22, 23], [30, 31, 32, 33], [40, 41]]
    assert rows_of(documents, 8, 2) == [
        ([BOS, 10, 11, 12, 13, 14, BOS, 40, 41], 1),
        ([BOS, 20, 21, 22, 23, BOS, 30, 31, 32], 1),
    ]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(2, 12), st.integers(1, 10))
@settings(max_examples=150, deadline=None)
def test_every_token_is_used_once_per_epoch_and_no_row_is_padded(sizes, T, buffer_size):
    ids = iter(range(50_000))
    documents = [[next(ids) for _ in range(size)] for size in sizes]
    total = sum(sizes)
    rows = rows_of(documents, T, 3 * total + 3, buffer_size)  # a row holds a token at least
    assert all(row[0] == BOS and len(row) == T + 1 for row, _ in rows)
    stream = [token for row, _ in rows for token in row if token != BOS]
    for epoch in range(2):
        assert sorted(stream[epoch * total:(epoch + 1) * total]) == list(range(total))
    epochs = [epoch for _, epoch in rows]
    assert epochs == sorted(epochs) and epochs[0] >= 1


@given(st.integers(1, 7), st.integers(1, 7))
@settings(max_examples=10, deadline=None)
def test_rows_do_not_depend_on_the_batch_size(prepared, tokenizer, one, other):
    def rows(B):
        loader = prepared.make_dataloader(tokenizer, B, 64, "val")
        batches = [next(loader) for _ in range(-(-30 // B))]
        return torch.cat([inputs for inputs, _, _ in batches])[:30], torch.cat([targets for _, targets, _ in batches])[:30]
    for a, b in zip(rows(one), rows(other)):
        assert torch.equal(a, b)


def test_batches_are_shifted_int64_that_start_with_bos_and_are_never_rewritten(prepared, tokenizer):
    """One buffer that is rewritten while a copy of it is pending silently replaces a batch by the next."""
    loader = prepared.make_dataloader(tokenizer, 4, 64, "train")
    batches = [next(loader) for _ in range(5)]
    copies = [(inputs.clone(), targets.clone()) for inputs, targets, _ in batches]
    next(loader)
    for (inputs, targets, epoch), (kept_inputs, kept_targets) in zip(batches, copies):
        assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (4, 64) and epoch == 1
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert (inputs[:, 0] == tokenizer.get_bos_token_id()).all()
        assert torch.equal(inputs, kept_inputs) and torch.equal(targets, kept_targets)
    assert len({inputs.data_ptr() for inputs, _, _ in batches}) == 5
    inputs, targets, _ = batches[0]
    inputs.zero_()
    assert torch.equal(targets, copies[0][1])  # a model that edits its input does not edit its targets


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_copy_to_the_gpu_that_is_still_queued_is_not_overwritten(prepared, tokenizer):
    ours, theirs = (prepared.make_dataloader(tokenizer, 16, 256, "train", device) for device in ("cuda", "cpu"))
    torch.cuda._sleep(2**31)  # a second in which no copy can begin
    kept = [next(ours)[:2] for _ in range(50)]
    poison = [torch.full((16, 257), 7, dtype=torch.uint16, pin_memory=True) for _ in range(50)]  # where a block is free
    assert not torch.cuda.current_stream().query(), "the copies had ended before the poison came"
    for inputs, targets in kept:
        want = next(theirs)
        assert torch.equal(inputs.cpu(), want[0]) and torch.equal(targets.cpu(), want[1])


def test_the_share_of_cropped_rows_is_that_of_the_rows(folder, capsys):
    """Documents of 8 bytes leave no room in rows of 8 + BOS: nothing is cropped; with rows of 12, every row is."""
    fill(folder)
    prepare.prepare(10, 1)
    assert re.search(r"rows of 8 tokens: none is lost to cropping, \d+\.\d % of the rows end in a cropped piece", capsys.readouterr().out)
    lengths = np.full(64, 8, np.uint32)
    lengths.tofile(prepare.data_dir() / "val.lengths")
    np.zeros(512, np.uint16).tofile(prepare.data_dir() / "val.tokens")
    path = prepare.data_dir() / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["val.lengths"]["bytes"], manifest["files"]["val.tokens"]["bytes"] = 256, 1024
    path.write_text(json.dumps(manifest))
    prepare.token_files.cache_clear()
    assert prepare.cropped_share(8, BOS) == 0 and prepare.cropped_share(12, BOS) > 0.9


def test_an_unknown_split_is_refused(tokenizer):
    with pytest.raises(ValueError, match="'test' is none of val, holdout, train"):
        prepare.make_dataloader(tokenizer, 1, 8, "test")


def test_epochs_count_from_one_and_each_has_an_order_of_its_own():
    lengths = np.full(100, 5, np.uint32)
    first, second = (list(prepare.shuffled_pieces(lengths, 8, epoch)) for epoch in (1, 2))
    assert first != second and sorted(first) == sorted(second) == [(5 * i, 5) for i in range(100)]
    assert first == list(prepare.shuffled_pieces(lengths, 8, 1))
