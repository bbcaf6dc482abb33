"""What the documents say can be done: their commands parse, their files and links exist."""

import re
import shlex
from pathlib import Path

import pytest

import cup3

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    file for folder in ("", "docs", "dataset", "benchmarks") for file in sorted((ROOT / folder).glob("*.md"))
]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
MARKED = re.compile(r"^<!-- test: (\S+) -->\n+```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)|(?:src|href)=\"([^\"#]+)\"")


def commands(text):
    """The commands of a block as lists of words, split as a shell splits them; redirections end a command."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        words = []
        for word in lexer:
            if set(word) <= set("&|;<>"):
                yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words


def test_commands_are_split_as_a_shell_splits_them():
    text = '# first\npython cup3.py generate --prompt "a red; b" \\\n  --count 2  # two\ncd x && A=1 python a.py > b\n'
    assert list(commands(text)) == [
        ["python", "cup3.py", "generate", "--prompt", "a red; b", "--count", "2"],
        ["cd", "x"],
        ["A=1", "python", "a.py"],
        ["b"],
    ]


def scripts():
    """(script, its words) of each command with a `.py` file that a document shows."""
    for file in DOCUMENTS:
        for block in BLOCK.findall(file.read_text()):
            for words in commands(block):
                place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
                if place is not None:
                    shown = f"{file.relative_to(ROOT)}: {' '.join(words)}"
                    yield pytest.param(words[place], words[place + 1 :], id=shown)


@pytest.mark.parametrize(("script", "words"), list(scripts()))
def test_every_command_that_is_shown_parses(script, words):
    assert (ROOT / script).exists()
    if script != "cup3.py":
        return
    try:
        cup3.parse(words)
    except SystemExit as end:
        assert end.code == 0, "the command line refuses it"  # 0: it asked for help


@pytest.fixture(scope="module")
def marked():
    """The README's marked blocks, as lists of commands."""
    blocks = MARKED.findall((ROOT / "README.md").read_text())
    return {mark: list(commands(block)) for mark, block in blocks if mark != "parse"}


def test_the_two_commands_are_there(marked):
    assert marked.keys() == {"install-and-run", "install-and-test"}
    run, test = marked["install-and-run"], marked["install-and-test"]
    assert ["python", "cup3.py"] in run
    assert test[-1][:3] == ["python", "-m", "pytest"]


@pytest.mark.parametrize("mark", ["install-and-run", "install-and-test"])
def test_what_they_install_is_there(marked, mark):
    files = [word for words in marked[mark] if "install" in words for word in words if word.endswith(".txt")]
    assert files
    assert all((ROOT / file).exists() for file in files)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    targets = [a or b for a, b in LINK.findall(document.read_text())]
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not (document.parent / target).exists()] == []
