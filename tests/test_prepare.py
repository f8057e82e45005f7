"""Text, tokenizer, token files and rows."""

import contextlib
import inspect
import itertools
import os
import runpy
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import HEADER, REPO, run_python, stories, write_jsonl, write_parquets
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare

BOS = 60_000


def stored(split):
    """The documents of a split's token files."""
    tokens, lengths = prepare.token_files(prepare.data_dir())[split]
    decode = prepare.Tokenizer.from_directory().decode
    return [decode(part.tolist()) for part in np.split(tokens, np.cumsum(lengths)[:-1])]


# --- import and command


def test_importing_has_no_side_effects(tmp_path):
    code = """if True:
        import os, sys
        sys.argv, before = ["x", "--nonsense"], {*os.listdir(), "__pycache__"}
        sys.addaudithook(lambda event, args: event in ("socket.connect", "socket.getaddrinfo") and os._exit(3))
        import prepare, torch
        assert not torch.cuda.is_initialized() and before >= set(os.listdir())
    """
    done = run_python("-c", code, AUTORESEARCH_CACHE=str(tmp_path / "nothing"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name, value, listed", [
    ("PROFILE", "huge", "full, small, tiny"), ("DATASET", "climbmax", "climbmix, tinystories, python"),
    *[("MINUTES", value, "a positive number") for value in ("0", "-5", "nan", "inf", "five")]])
def test_an_unknown_setting_is_one_line_that_tells_the_valid_ones(monkeypatch, name, value, listed):
    monkeypatch.setenv(f"AUTORESEARCH_{name}", value)
    with pytest.raises(SystemExit, match=rf"\A.*{value} .*{listed}.*\Z"):
        runpy.run_path(REPO / "prepare.py")


def test_the_human_may_ask_for_longer_runs_and_the_watchdog_waits_for_them(monkeypatch):
    assert prepare.TIME_BUDGET == 300
    monkeypatch.setenv("AUTORESEARCH_MINUTES", "20")
    longer = runpy.run_path(REPO / "prepare.py")
    assert longer["TIME_BUDGET"] == 1200
    assert inspect.signature(longer["start_watchdog"]).parameters["seconds"].default == 1500


def times():
    return {path: path.stat().st_mtime_ns for path in prepare.data_dir().iterdir()}


def test_a_second_prepare_keeps_shards_data_and_ledger_within_two_seconds(folder, tmp_path, constants):
    """With more shards than the default ten it would build a smaller dataset."""
    constants(DATASET="climbmix", __file__=str(tmp_path / "prepare.py"))
    write_parquets(**{f"shard_{i:05d}": stories(100, 100 * i) for i in (*range(12), 6541, 6542)})
    ledger = tmp_path / "results.tsv"
    for shards, rows in ((12, HEADER), (3, "a night's work")):
        prepare.prepare(shards, 1)
        assert ledger.read_text() == rows and sorted(stored("train")) == sorted(stories(100 * shards))
        ledger.write_text("a night's work")
        before, start = times(), time.monotonic()
        prepare.prepare(None, 1)
        assert time.monotonic() - start < 2 and times() == before


def test_too_little_space_is_one_line_before_anything_is_written(folder, monkeypatch, constants, capsys):
    """The text of a folder was taken for a download that is there already."""
    for there in (folder, prepare.CACHE / "raw/climbmix"):
        there.mkdir(parents=True, exist_ok=True)
        with open(there / "x.txt", "wb") as file:
            file.truncate(1_500_000_000)
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e9))
    for dataset, total, missing in (("climbmix", 2.7, 1.2), (str(folder), 1.5, 1.5)):
        constants(DATASET=dataset, fetch_all=None, build=None)
        with pytest.raises(SystemExit, match=rf"\A.* has 1.0 GB free, and {missing} GB are needed: .*AUTORESEARCH_CACHE"):
            prepare.prepare(None, 1)
        line = f"tiny (AUTORESEARCH_PROFILE): {dataset}, about {total} GB on disk in {prepare.CACHE}\n"
        assert capsys.readouterr().out == line


# --- text


def test_every_kind_of_file_below_a_folder_is_read_and_what_cannot_be_is_named_once(folder, monkeypatch, capsys):
    below = folder / "a" / "b"
    (below / "secret").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["parquet", None, ""]}), below / "x.parquet")
    files = {f"x.{suffix}": suffix for suffix in ("txt", "md", "py", "rst", "html")} | {
        "x.jsonl": '{"text": "jsonl"}\n\n{"text": "\\ud83d\\ude80 \\ud83d"}\n',  # a lone surrogate
        "MARK.TXT": "\ufeffmark", "bad.jsonl": '{"text": "fine"}\n{"txet": "no"}\n', "broken.parquet": "PAR1 no PAR1"}
    for name, text in files.items():
        (below / name).write_text(text, encoding="utf-8")
    (below / "latin.txt").write_bytes(b"d\xe9j\xe0")
    (below / "linked.txt").symlink_to("x.html")
    (below / "nowhere.txt").symlink_to("missing")
    (below / "loop").symlink_to(folder)
    os.mkfifo(below / "pipe.txt")

    def scandir(path, real=os.scandir):  # permissions do not stop root
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for _ in range(2):
        texts = sorted(prepare.folder_documents())
        assert texts == ["fine", "html", "jsonl", "mark", "md", "parquet", "py", "rst", "txt", "\U0001f680 \ufffd"]
    lines = sorted(capsys.readouterr().err.splitlines())
    names = [line.split(":")[0] for line in lines]
    assert names == [f"skipped {below}/{name}" for name in ("bad.jsonl", "broken.parquet", "latin.txt", "secret")]
    assert lines[0].endswith("bad.jsonl: line 2 has no string `text`")


@pytest.fixture
def python_files(tmp_path, monkeypatch):
    """An empty folder in the place of the interpreter's."""
    paths = dict.fromkeys(("stdlib", "purelib", "platlib"), tmp_path / "lib")
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(prepare, "sysconfig", SimpleNamespace(get_paths=lambda: paths))
    monkeypatch.setattr(prepare, "DATASET", "python")
    prepare.python_documents.cache_clear()
    yield tmp_path / "lib"
    prepare.python_documents.cache_clear()


def test_the_python_dataset_has_a_size_of_its_own(python_files, constants):
    constants(PYTHON_BYTES=10_000)
    for i in range(50):
        (python_files / f"{i}.py").write_text(f"{i:03}" * 300)
    assert len(prepare.python_documents()) == 11


def test_no_ten_files_hold_more_than_a_fifth_of_a_held_out_split_of_the_python_dataset(python_files):
    """On a machine with giant files, generated ones among them, ten had 57 % of the hold-out and val_bpb was theirs."""
    for i in range(6000):
        size = 200_000 if i % 40 == 0 else 100 + i
        (python_files / f"{i}.py").write_text(f"x = {i}\n" * (size // len(f"x = {i}\n")))
    sizes = {split: [] for split in prepare.SPLITS}
    for split, text in prepare.documents(1):
        sizes[split].append(len(text))
    for split in ("val", "holdout"):
        assert sum(sorted(sizes[split])[-10:]) <= 0.2 * sum(sizes[split])


def test_a_long_text_is_cut_at_the_ends_of_lines(folder):
    """As one document a book was in one split alone."""
    book = "".join(f"line {i} of a long book\n" for i in range(20_000))
    text = book + "x" * 500_000
    (folder / "book.txt").write_text(text)
    texts = list(prepare.folder_documents())
    assert "".join(texts) == text and max(map(len, texts)) <= 2 * prepare.FILE_CHARS
    assert all(text.endswith("book\n") for text in texts if "x" not in text)


@pytest.mark.parametrize("documents, wants", [(0, "for VOCAB_SIZE=300"), (60, "val has . rows of 8 tokens, and 32 are needed")])
def test_too_little_text_is_refused_and_leaves_nothing(folder, documents, wants):
    write_jsonl(folder / "x.jsonl", stories(documents))
    with pytest.raises(SystemExit, match=f"too little text.*{wants}.*Add text"):
        prepare.prepare(None, 1)
    assert not list(prepare.CACHE.glob("data/*"))


def test_a_dataset_that_changes_during_a_run_changes_the_next_run_only(filled, monkeypatch):
    def rows():
        return next(prepare.make_dataloader(tokenizer, 4, 8, "val"))[0]

    prepare.prepare(None, 1)
    tokenizer = prepare.Tokenizer.from_directory()
    before, name = rows(), prepare.dataset_id()
    write_jsonl(filled / "more.jsonl", stories(400, 400))
    with pytest.raises(SystemExit, match="has changed since; run: uv run prepare.py"):
        prepare.Tokenizer.from_directory()
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "token_files", SimpleNamespace(cache_clear=list))  # that of another process
        prepare.prepare(None, 1)
    assert torch.equal(rows(), before)
    prepare.token_files.cache_clear()
    assert not torch.equal(rows(), before) and prepare.dataset_id() != name


@pytest.mark.parametrize("dataset, sizes", [  # of val, holdout and train
    ("climbmix", [400, 200, 1400]), ("tinystories", [10_000, 10_000, 100]),
    ("python", [9, 7, 384]), ("folder", [18, 14, 768])])
def test_token_files_hold_every_document_in_order_and_splits_share_no_text(
        filled, monkeypatch, constants, dataset, sizes):
    """The same text is in several files and rows on purpose, of which python keeps one."""
    write_jsonl(filled / "again.jsonl", stories(400))
    paths = dict.fromkeys(("stdlib", "purelib", "platlib"), filled)
    monkeypatch.setattr(prepare, "sysconfig", SimpleNamespace(get_paths=lambda: paths))
    monkeypatch.setattr(prepare, "available_cpus", lambda: 3)
    constants(BATCH_DOCUMENTS=500, TASK_DOCUMENTS=7)
    if dataset != "folder":
        constants(DATASET=dataset)
        write_parquets(tinystories_gpt4_clean=[f"story {i % 20_100}" for i in range(20_400)],
                       shard_06542=stories(400), shard_06541=stories(400, 200), shard_00000=stories(2000))
    prepare.python_documents.cache_clear()
    prepare.prepare(1, 1)
    documents = list(prepare.disjoint(prepare.documents(1)))
    prepare.python_documents.cache_clear()
    texts = [stored(split) for split in prepare.SPLITS]
    assert list(map(len, texts)) == sizes
    assert texts == [[text for where, text in documents if where == split] for split in prepare.SPLITS]
    assert not any(set(one) & set(other) for one, other in itertools.combinations(texts, 2))


# --- tokenizer


@given(st.text(st.characters(codec="utf-8"), max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_unicode_comes_back_and_its_tokens_have_its_bytes(tokenizer, text):
    """Counting the bytes of decoded tokens made U+FFFD of split characters, 3 bytes each: bpb read too low."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_special_tokens_have_no_bytes_and_are_plain_text_in_text(tokenizer):
    sizes, bos, ids = tokenizer.token_bytes(), tokenizer.get_bos_token_id(), tokenizer.encode("<|reserved_0|>")
    assert len(sizes) == tokenizer.get_vocab_size() == bos + 4 == prepare.VOCAB_SIZE
    assert (sizes[bos:] == 0).all() and (sizes[:bos] > 0).all() and max(ids) < bos
    assert tokenizer.encode(["<|reserved_0|>", ""], prepend=bos) == [[bos] + ids, [bos]]


def test_a_line_of_a_megabyte_comes_back(tokenizer):
    """Encoded at once it overflowed the regex."""
    text = "a" * 1_000_000 + " " * 1_000_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_numbers_are_cut_into_groups_of_two():
    assert max(map(len, prepare.Tokenizer.train(["1234567 " * 99], 263).ranks)) == 2


def test_the_tokenizer_does_not_depend_on_the_number_of_shards(monkeypatch, constants):
    constants(TRAIN_DOC_CHARS=5)
    shards = [("train", "a" * 8), ("val", "v")], [("train", "cccc"), ("train", "d")], [("train", "e")]
    monkeypatch.setattr(prepare, "documents", lambda count: itertools.chain(*shards[:count]))
    for chars, want in ((9, ["aaaaa", "cccc"]), (99, ["aaaaa", "cccc", "d"])):
        constants(TRAIN_CHARS=chars)
        assert [list(prepare.tokenizer_texts(count)) for count in (2, 3, -1)] == [want] * 3


# --- token files


def test_after_a_full_disk_or_a_kill_the_next_run_completes_the_same_dataset(filled, monkeypatch, constants):
    prepare.prepare(None, 1)
    want = prepare.dataset_id()
    constants(CACHE=prepare.CACHE / "second")
    for killed in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(prepare.tqdm, "update", lambda *_: os.write(os.open("/dev/full", os.O_WRONLY), b"a batch"))
            if killed:  # nothing is cleaned up
                patch.setattr(prepare.shutil, "rmtree", lambda *_, **__: None)
            with pytest.raises(OSError, match="No space left"):
                prepare.prepare(None, 1)
        assert any(prepare.CACHE.glob("data/*")) == any(prepare.CACHE.glob("data/*.part/train.tokens")) == killed
    prepare.prepare(None, 1)
    assert prepare.dataset_id() == want and list(prepare.CACHE.glob("data/*")) == [prepare.data_dir()]


@pytest.mark.parametrize("name, kept, end", [
    ("val.tokens", -2, b""), ("val.tokens", -1, b"?"), ("holdout.lengths", -1, b"?"), ("tokenizer.tiktoken", -1, b" "),
    ("train.tokens", -2, b""), ("train.tokens", -1, b"?"), ("manifest.json", 99, b""),
    ("manifest.json", 0, b'{"source": "of FORMAT 1", "files": {}}')])
def test_a_damaged_or_old_file_is_noticed_and_mended(filled, constants, name, kept, end):
    prepare.prepare(None, 1)
    path, want = prepare.data_dir() / name, prepare.dataset_id()
    whole = path.read_bytes()
    path.write_bytes(whole[:kept] + end)
    prepare.token_files.cache_clear()
    large = name == "train.tokens" and path.stat().st_size == len(whole)  # train.py does not read it at its start
    wants = pytest.raises(SystemExit, match=r"\A.* is not prepared: .*; run: uv run prepare.py\Z")
    with contextlib.nullcontext() if large else wants:
        prepare.Tokenizer.from_directory()
        prepare.token_files(prepare.data_dir())
    prepare.prepare(None, 1)
    assert path.read_bytes() == whole and prepare.dataset_id() == want
    constants(FORMAT=prepare.FORMAT + 1)
    with pytest.raises(SystemExit, match=r"\A.* has changed since; run: uv run prepare.py\Z"):
        prepare.Tokenizer.from_directory()


# --- rows


def rows_of(documents, T, count, buffer_size=1000):
    """The first rows packed from `documents`, lists of ids."""
    lengths, tokens = np.array([len(ids) for ids in documents], np.uint32), np.array(sum(documents, []), np.uint16)
    packed = prepare.pack_rows(tokens, lengths, T, BOS, buffer_size)
    return [(row.tolist(), epoch) for row, epoch in itertools.islice(packed, count)]


def test_packing_by_hand(monkeypatch):
    """Best fit first: 5 tokens, then 2 that fit exactly; then the shortest is cropped, its rest comes back."""
    pieces = [(0, 5), (5, 4), (9, 4), (13, 2)]
    monkeypatch.setattr(prepare, "shuffled_pieces", lambda lengths, T, epoch: iter(pieces))
    documents = [[10, 11, 12, 13, 14], [20, 21, 22, 23], [30, 31, 32, 33], [40, 41]]
    assert rows_of(documents, 8, 2) == [
        ([BOS, 10, 11, 12, 13, 14, BOS, 40, 41], 1), ([BOS, 20, 21, 22, 23, BOS, 30, 31, 32], 1)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(2, 12), st.integers(1, 10))
@settings(max_examples=100, deadline=None)
def test_every_token_is_used_once_per_epoch_and_no_row_is_padded(sizes, T, buffer_size):
    ends, total, stream = np.cumsum(sizes).tolist(), sum(sizes), []
    documents = [list(range(end - size, end)) for end, size in zip(ends, sizes)]
    for row, epoch in rows_of(documents, T, 2 * total + 2, buffer_size):  # a row holds a token at least
        assert row[0] == BOS and len(row) == T + 1
        assert [BOS, BOS] not in map(list, zip(row, row[1:])), "a piece of nothing"
        stream += [token for token in row if token != BOS]
        assert (epoch - 1) * total <= len(stream) <= epoch * total
    for epoch in range(2):
        assert sorted(stream[epoch * total:(epoch + 1) * total]) == list(range(total))


def test_each_epoch_has_every_piece_in_an_order_of_its_own(constants):
    constants(WINDOW_DOCS=30)
    first, again, second = (list(prepare.shuffled_pieces(np.full(100, 5, np.uint32), 4, epoch)) for epoch in (1, 1, 2))
    assert first == again != second
    assert sorted(first) == sorted(second) == [piece for i in range(100) for piece in ((5 * i, 4), (5 * i + 4, 1))]


def test_batches_of_any_size_are_the_same_rows_shifted_by_one_and_never_rewritten(prepared, tokenizer):
    """One buffer that is rewritten while a copy of it is pending silently replaces a batch by the next."""
    rows, next_tokens, _ = next(prepared.make_dataloader(tokenizer, 20, 1000, "train"))
    assert torch.equal(rows[:, 1:], next_tokens[:, :-1]) and (rows[:, 0] == tokenizer.get_bos_token_id()).all()
    batches = list(itertools.islice(prepared.make_dataloader(tokenizer, 4, 1000, "train"), 6))
    for i, (inputs, targets, _) in zip(range(0, 20, 4), batches):
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs, rows[i:i + 4])
        inputs.zero_()  # a model that edits its input does not edit its targets
        assert torch.equal(targets, next_tokens[i:i + 4])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_copy_to_the_gpu_that_is_still_queued_is_not_overwritten(prepared, tokenizer):
    ours, theirs = (prepared.make_dataloader(tokenizer, 16, 256, "train", device) for device in ("cuda", "cpu"))
    torch.cuda._sleep(2**31)  # a second in which no copy can begin
    kept = list(itertools.islice(ours, 50))
    poison = [torch.full((16, 257), 7, dtype=torch.uint16, pin_memory=True) for _ in kept]  # where a block is free
    assert not torch.cuda.current_stream().query(), "the copies had ended before the poison came"
    for got, want in zip(kept, theirs):
        assert torch.equal(got[0].cpu(), want[0]) and torch.equal(got[1].cpu(), want[1])
