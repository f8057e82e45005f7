"""Claude Code's settings allow what program.md and docs/many-gpus.md tell an agent, and nothing else."""

import inspect
import json
import re

import pytest

import prepare
from conftest import REPO, commands, git

SETTINGS = json.loads((REPO / ".claude/settings.json").read_text())


def simple_commands(block):
    """The parts of a block that Claude Code checks one by one: without here-documents, redirections, words of loops."""
    block = re.sub(r"<<'END'(.*)\n(?:.*\n)*?END\n?", r"\1\n", block)
    tokens = re.findall(r"""('[^']*'|"[^"]*")|\\\n|(&&|[;|\n])|2>&1|>>? ?\S+|(.)""", block)
    parts = "".join("\0" if separator else quoted + other for quoted, separator, other in tokens).split("\0")
    parts = [re.sub(r"^(until|do|done)\b", "", part.strip()).strip() for part in parts]
    return [part for part in parts if part]


def matches(rule, command):
    """Claude Code's Bash rules: * stands for anything, and :* at the end for nothing or further words."""
    words = rule.removesuffix(":*")
    pattern = ".*".join(map(re.escape, words.split("*"))) + ("( .*)?" if words != rule else "")
    return re.fullmatch(pattern, command, re.DOTALL) is not None


def rules(kind, tool):
    """What stands between the brackets, in `allow` or `deny`."""
    return [rule[len(tool) + 1:-1] for rule in SETTINGS["permissions"][kind] if rule.startswith(f"{tool}(")]


def test_the_settings_allow_every_command_of_the_pages():
    """A command that a human adds to program.md needs a rule in .claude/settings.json."""
    parts = ["SEED=49 uv run train.py"]
    for path in (REPO / "program.md", REPO / "docs/many-gpus.md"):
        text = path.read_text().split("\n## Several agents\n")[0]  # which a human starts
        parts += [part for block in commands(text) for part in simple_commands(block)]
    for part in parts:
        assert any(matches(rule, part) for rule in rules("allow", "Bash")), part
        assert not any(matches(rule, part) for rule in rules("deny", "Bash")), part


@pytest.mark.parametrize("command", [
    "uv add numpy", "uv run python", "uv run pytest", "pip install numpy", "rm results.tsv", "python3 x.py", "git push",
    "git stash", "git clean -fdx", "git checkout main", "git checkout HEAD prepare.py", "git reset --hard HEAD~1",
    "git commit -am x", "git commit prepare.py -F -", "git add .", "git branch -D main", "git config user.name x",
    "sed -i s/a/b/ prepare.py", "tee prepare.py", "curl localhost", "AUTORESEARCH_HOLDOUT=1 uv run train.py",
])
def test_the_settings_do_not_allow(command):
    assert not any(matches(rule, command) for rule in rules("allow", "Bash"))


def test_the_settings_let_the_agent_edit_train_py_and_its_own_records_alone():
    allowed = [rule for rule in rules("allow", "Edit") if "slots" not in rule]
    assert allowed == ["./train.py", "./run.log", "./results.tsv", "./learned.md"]
    denied = [rule[2:].replace("**", ".*") for rule in rules("deny", "Edit")]
    tracked = git(REPO, "ls-files").splitlines()
    assert [name for name in tracked if not any(re.match(rule, name) for rule in denied)] == ["train.py"]


def test_no_rule_leaves_room_for_an_option_of_git_that_runs_a_program():
    """`git -C slots/* commit` permitted `git -C slots/0 -c core.fsmonitor='any program;' commit`."""
    for rule in rules("allow", "Bash"):
        assert not re.match(r"git [^*]*\*[^*]* (commit|reset|log|cherry-pick)\b", rule), rule


def test_what_is_not_allowed_is_refused_and_never_asked_of_a_human_who_sleeps():
    """Claude Code 2.1.332 would let it pass in its own default mode, or wait for an answer in others."""
    assert SETTINGS["permissions"]["defaultMode"] == "dontAsk"


def test_a_run_stays_in_the_foreground_and_ends_before_the_shells_time_limit():
    """What outlasted the limit went on in the background, beside the next run over the same run.log."""
    env = SETTINGS["env"]
    assert env["CLAUDE_CODE_DISABLE_BACKGROUND_TASKS"] == "1"
    watchdog = inspect.signature(prepare.start_watchdog).parameters["seconds"].default
    assert int(env["BASH_MAX_TIMEOUT_MS"]) >= int(env["BASH_DEFAULT_TIMEOUT_MS"]) > 1000 * watchdog
