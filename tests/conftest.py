"""Every test runs on the tiny profile, on the CPU, offline, with a cache and a small text folder of its own."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"  # of results.tsv
TMP = tempfile.TemporaryDirectory(prefix="autoresearch-tests-", ignore_cleanup_errors=True)
TEXT = Path(TMP.name) / "text"
TEXT.mkdir()
for variable in ("SEED", "AUTORESEARCH_HOLDOUT", "AUTORESEARCH_MINUTES", "HF_TOKEN", "PYTHONDONTWRITEBYTECODE"):
    os.environ.pop(variable, None)
sys.dont_write_bytecode = False  # each Python that a test starts would compile all of torch anew, for ten seconds
os.environ.update(
    AUTORESEARCH_PROFILE="tiny", AUTORESEARCH_DATASET=str(TEXT), AUTORESEARCH_CACHE=str(Path(TMP.name) / "cache"),
    HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9",  # nothing listens there
    TORCH_COMPILE_DISABLE="1",  # a CPU with bf16 would compile for a minute
    OMP_NUM_THREADS="1",  # threads that wait for each other cost more than they save on models of nothing
)
sys.path.insert(0, str(REPO))


def write_text(folder, megabytes):
    """Real text that is on every machine: the standard library, in documents of about 2 kB."""
    written = 0
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = source.read_text(encoding="utf-8")
        for start in range(0, len(text), 2000):
            (folder / f"{source.stem}_{start}.txt").write_text(text[start:start + 2000], encoding="utf-8")
            written += 2000
            if written > megabytes * 1e6:
                return


write_text(TEXT, 3)


def commands(text):
    """The fenced bash blocks of a Markdown text, and the commands between backquotes in its sentences; each once."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == text.count("```bash"), "a block in a list: its here-document would not end"
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    inline = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    words = r"(git|uv|grep|tail|mv|rm|cp|cat|find|bash|squeue|[A-Z_]+=\w+ uv) [^.]"
    return list(dict.fromkeys(blocks + [span for span in inline if re.match(words, span)]))


def environment(folder):
    """For a shell in `folder`: git knows its author and nothing of this machine, programs of ../bin come first."""
    names = {f"GIT_{who}_{what}": "agent@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return names | {
        "PATH": f"{folder.parent / 'bin'}:{os.environ['PATH']}", "HOME": str(folder.parent), "LC_ALL": "C.UTF-8",
        "GIT_CONFIG_NOSYSTEM": "1", "GIT_TEMPLATE_DIR": "",
    }


def git(folder, *args):
    """What git prints, without the last line's end."""
    done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, env=environment(folder))
    assert done.returncode == 0, (args, done.stderr)
    return done.stdout.strip()


class Player:
    """Gives the commands of `page` in `folder`, with a tag in the place of nov21.

    A command that the human has taken out of the page is no fault of the page: the test is skipped.
    """

    def __init__(self, folder, tag="nov21", **env):
        self.folder, self.tag, self.env, self.played = folder, tag, environment(folder) | env, []

    def do(self, start, *, check=True, **examples):
        """Give the shortest command that begins with `start`, each example (a pattern) replaced; what it prints."""
        command = min((command for command in commands(self.page) if command.startswith(start)), key=len, default=None)
        if command is None:
            pytest.skip(f"the page has no command that begins with: {start}")
        self.played.append(command)
        command = command.replace("nov21", self.tag)
        for example, value in examples.items():
            assert re.search(example, command), (example, command)
            command = re.sub(example, lambda _: value, command)
        self.done = subprocess.run(["bash", "-c", command], cwd=self.folder, env=self.env, capture_output=True,
                                   text=True, timeout=120, start_new_session=True)
        assert not check or self.done.returncode == 0, self.done
        return self.done.stdout

    def rows(self):
        ledger = self.folder / "results.tsv"
        return [line.split("\t") for line in ledger.read_text().splitlines()[1:]] if ledger.exists() else []


def run_python(*args, **env):
    """Run Python in the repo as a user would."""
    return subprocess.run([sys.executable, *args], cwd=REPO, env=os.environ | env, capture_output=True, text=True)


def stub(path, text):
    """A shell script in the place of a program."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def stories(count, first=0):
    words = " ".join(f"word{i}" for i in range(40))
    return [f"story {i}: {words}" for i in range(first, first + count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_parquets(**files):
    """Put {stem: texts} where the downloads of the dataset lie."""
    import prepare
    import pyarrow
    import pyarrow.parquet
    prepare.raw_dir().mkdir(parents=True)
    for name, texts in files.items():
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), prepare.raw_dir() / f"{name}.parquet")


@pytest.fixture
def constants(monkeypatch):
    """A function that sets constants of prepare.py for one test: constants(VOCAB_SIZE=300)."""
    import prepare

    def set_all(**values):
        for name, value in values.items():
            monkeypatch.setattr(prepare, name, value)

    return set_all


@pytest.fixture
def folder(tmp_path, constants):
    """An empty folder as the dataset, with a cache of its own; little text is enough for it."""
    text = tmp_path / "mine"
    text.mkdir()
    constants(DATASET=str(text), CACHE=tmp_path / "cache", VOCAB_SIZE=300, MAX_SEQ_LEN=8)
    return text


@pytest.fixture
def filled(folder):
    for i, text in enumerate(stories(400)):
        (folder / f"{i}.py").write_text(text)
    return folder


@pytest.fixture(scope="session")
def prepared():
    """The prepare module with the small text folder prepared for training."""
    import prepare
    prepare.prepare(num_shards=10, download_workers=1)
    return prepare


@pytest.fixture(scope="session")
def tokenizer(prepared):
    return prepared.Tokenizer.from_directory()
