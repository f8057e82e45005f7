"""Every test runs on the tiny profile, on the CPU, offline, with a cache and a small text folder of its own."""

import os
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
TMP = tempfile.TemporaryDirectory(prefix="autoresearch-tests-", ignore_cleanup_errors=True)
TEXT = Path(TMP.name) / "text"
TEXT.mkdir()
for variable in ("SEED", "AUTORESEARCH_HOLDOUT", "HF_TOKEN"):
    os.environ.pop(variable, None)
os.environ.update(
    AUTORESEARCH_PROFILE="tiny", AUTORESEARCH_DATASET=str(TEXT), AUTORESEARCH_CACHE=str(Path(TMP.name) / "cache"),
    HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9",  # nothing listens there
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


@pytest.fixture(scope="session")
def prepared():
    """The prepare module with the small text folder prepared for training."""
    import prepare
    prepare.prepare(num_shards=10, download_workers=1)
    return prepare


@pytest.fixture(scope="session")
def tokenizer(prepared):
    return prepared.Tokenizer.from_directory()
