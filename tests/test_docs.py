"""The pages against the code: what a reader copies or clicks works, and what a page quotes is what runs."""

import ast
import contextlib
import importlib
import inspect
import io
import json
import re
import shlex
import subprocess
import textwrap
from functools import cache

import pytest

import losses
from dataset.packing import build_stream
from dataset.store import open_store
from dataset.tokenizer import ChatTokenizer
from tests.loops import ROOT
from training.settings import REPLACED, SAMPLE, parse

ARCHITECTURE, READMES = "docs/ARCHITECTURE.md", ["README.md", "README.zh.md"]
# What begins a line of the same part in both languages: a heading, a table's row, an equation, a question.
PARTS = r"^(#+ |\||- |\$\$|\*\*(?=.*[?？]\*\*)|!\[|```)"
# Flags of other programs, and those that the project had once.
FOREIGN = {"--standalone", "--nproc-per-node", "--nnodes", "--max-restarts", "--outfile",
           "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"}  # fmt: skip
FOREIGN |= {"--logdir", "--local-dir", "--repo-type", *REPLACED}


def listed(pattern: str) -> list[str]:
    """The project's files of this pattern, relative to its folder."""
    found = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=True)
    return found.stdout.split()


PAGES = listed("*.md")
CHINESE = [name for name in PAGES if name.endswith(".zh.md")]


def page(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced code block."""
    blocks: list[tuple[str, list[str]]] = []
    inside = False
    for line in text.splitlines():
        if fence := re.match(r"\s*```(\w*)$", line):
            inside = not inside
            if inside:
                blocks.append((fence[1], []))
        elif inside:
            blocks[-1][1].append(line)
    return [(language, "\n".join(lines)) for language, lines in blocks]


def python_blocks(text: str) -> list[str]:
    return [block for language, block in code_blocks(text) if language == "python"]


def without_code(text: str) -> str:
    return re.sub(r"^\s*```.*?^\s*```$", "", text, flags=re.M | re.S)


# ---- Two languages


def commands(text: str) -> list[str]:
    """The command lines of the code blocks, without their comments."""
    lines = [line for _, block in code_blocks(text) for line in block.splitlines()]
    starts = ("make ", "python ", "torchrun ", "pip ", "git ", "source ")
    return [line.split(" #")[0].strip() for line in lines if line.startswith(starts)]


@pytest.mark.parametrize("name", CHINESE)
def test_a_chinese_page_has_the_parts_and_commands_of_the_english_one(name):
    """A translation that no test holds describes the program of last year."""
    english, chinese = page(name.replace(".zh", "")), page(name)
    assert re.findall(PARTS, without_code(chinese), re.M) == re.findall(PARTS, without_code(english), re.M)
    assert commands(chinese) == commands(english)
    assert our_commands(chinese) == our_commands(english)
    assert python_blocks(chinese) == python_blocks(english)
    assert re.findall(r"\$\$.*\$\$", chinese) == re.findall(r"\$\$.*\$\$", english)
    assert len(re.findall("^#+ ", english, re.M)) >= 4


def test_the_first_pages_are_in_two_languages():
    assert {"README.zh.md", "docs/DERIVATION.zh.md", "docs/FAQ.zh.md"} <= {*CHINESE}


# ---- Quoted code


def test_the_readme_quotes_the_loop_and_the_loss():
    """Two copies of the lesson drift apart. When this fails, paste what it prints."""
    parts = re.split(r"^ *# -{20,}.*\n", page("train_dpo.py"), flags=re.M)
    assert len(parts) == 3, "train_dpo.py must have its lesson between two rules: comment lines of dashes"
    quoted = [block.strip("\n") for block in python_blocks(page("README.md"))]
    for code in (textwrap.dedent(parts[1]).strip("\n"), without_docstring(losses.sigmoid)):
        assert code in quoted, f"README.md lacks:\n{code}"


def without_docstring(function) -> str:
    source = inspect.getsource(function)
    first = ast.parse(source).body[0].body[0]
    lines = source.splitlines()
    if function.__doc__:
        del lines[first.lineno - 1 : first.end_lineno]
    return "\n".join(lines)


def test_the_architecture_page_shows_the_stream_that_is_built(tmp_path, monkeypatch):
    """The picture of the shift must be the shift. When this fails, paste what it prints."""
    monkeypatch.setenv("MINIDPO_CACHE", str(tmp_path / "cache"))
    record = re.search(r'^\{"prompt".*\}$', page(ARCHITECTURE), re.M)[0]
    (tmp_path / "pair.jsonl").write_text(record + "\n", "utf-8")
    tokenizer = ChatTokenizer(SAMPLE / "tokenizer.json")
    pairs = open_store(str(tmp_path / "pair.jsonl"), "preferences", tokenizer, 512)
    table = stream_table(build_stream(pairs, [0]), tokenizer)
    assert f"```\n{table}\n```" in page(ARCHITECTURE), f"{ARCHITECTURE} lacks:\n{table}"


def stream_table(stream, tokenizer) -> str:
    """A pair's positions from the end of its prompt on: what each attends to and what it predicts."""

    def shown(token: int) -> str:
        return json.dumps(tokenizer.decode([token]), ensure_ascii=False)

    tokens, positions = stream.tokens.tolist(), stream.positions.tolist()
    predicted = {index: [] for index in range(len(tokens))}
    for n, index in enumerate(stream.predictors.tolist()):
        side = ("chosen", "rejected")[stream.owners[n]]
        predicted[index].append(f"{shown(stream.targets[n].item())} {side}")
    rows = [("index", "position", "segment", "token", "attends to", "predicts")]
    for name, segment in zip(("prompt", "chosen", "rejected"), stream.segments.tolist(), strict=True):
        start, end, prefix_start, prefix_end = segment
        for index in range(end - 1 if name == "prompt" else start, end):
            seen = [f"{prefix_start}–{prefix_end - 1}"] if prefix_end else []
            seen.append(f"{start}–{index}" if index > start else f"{index}")
            here = (f"{index}", f"{positions[index]}", name, shown(tokens[index]))
            rows.append((*here, ", ".join(seen), ", ".join(predicted[index])))
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    lines = ("".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


# ---- Links, commands, flags


@pytest.mark.parametrize("name", PAGES)
def test_every_relative_link_leads_somewhere(name):
    """A page or heading that was renamed leaves dead links behind."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page(name))):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert file.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(file.read_text("utf-8")), f"{name}: {target}"


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    titles = re.findall(r"^#+ (.*)$", without_code(text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_every_command_and_flag_of_a_page_exists(name):
    """A command that a reader copies must start, and a flag that a page explains must be there."""
    for program, arguments in our_commands(page(name)):
        assert (ROOT / file_of(program)).exists(), f"{name}: there is no {program}"
        for argument in arguments:
            flag = argument.split("=")[0]
            assert flag in flags_of(program) or not flag.startswith("--"), f"{name}: {program} has no {flag}"
        settings = getattr(importlib.import_module(program), "Settings", None)
        if settings and "--help" not in arguments:
            parse(settings, "", arguments)
    known = FOREIGN.union(*map(flags_of, programs()))
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*(?![\w…-])", page(name)):
        assert flag in known, f"{name}: {flag}"


def our_commands(text: str) -> list[tuple[str, list[str]]]:
    """(module, its arguments) of each command of ours, in code blocks and between backticks."""
    code = "\n".join(block for _, block in code_blocks(text)).replace("\\\n", " ")
    code += "\n" + "\n".join(re.findall(r"`([^`\n]+)`", without_code(text)))
    pattern = r"(?:python|torchrun) .*?(?:(train_\w+)\.py|-m ([\w.]+))(?: (.*))?$"
    found = []
    for line in code.splitlines():
        for command in line.split(" # ")[0].split(" && "):
            if match := re.search(pattern, command):
                found.append((match[1] or match[2], shlex.split(match[3] or "")))
    return [command for command in found if command[0] not in ("venv", "pip", "pytest")]


def programs() -> list[str]:
    """The modules with a command line."""
    names = [name for name in listed("*.py") if not name.startswith("tests/")]
    mains = [name for name in names if "__main__" in page(name)]
    return [name.removesuffix(".py").replace("/", ".") for name in mains]


def file_of(program: str) -> str:
    return f"{program.replace('.', '/')}.py"


@cache
def flags_of(program: str) -> frozenset[str]:
    """The flags of a module, from its --help; none where it does not read the command line."""
    source = page(file_of(program))
    if not re.search(r"Parser\(|parse\(", source):
        return frozenset()
    arguments = ["export", "--help"] if '"export"' in source else ["--help"]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("sys.argv", [program, *arguments])
        with pytest.raises(SystemExit):
            importlib.import_module(program).main()
    return frozenset(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", printed.getvalue()))


# ---- The file map

ROOMS = ("model/", "dataset/", "training/", "eval/", "bench/")


@pytest.mark.parametrize("name", READMES)
def test_the_file_map_is_the_project(name):
    """Each Python file is named, or its folder if that is not a room; and what is named exists.

    A file is named by its path, or after its room: `model/  stream (the batch) · transformer · moe`.
    """
    block = next(block for _, block in code_blocks(page(name)) if re.search(r"^losses\.py", block, re.M))
    named = set(re.findall(r"(?<!\S)(?:[\w.-]+/)*[\w-]+(?:\.(?:py|md|sh)|/)(?!\S)", block))
    for entry in re.sub(r"\n +", " ", block).splitlines():
        room, _, names = entry.partition(" ")
        if room in ROOMS and "·" in names:
            named |= {f"{room}{re.match(r' *([a-z_]+)', part)[1]}.py" for part in names.split("·")}
    for path in named:
        assert (ROOT / path).exists(), f"the file map of {name} names {path}"
    for file in listed("*.py"):
        folders = {f"{parent}/" for parent in (ROOT / file).relative_to(ROOT).parents}
        known = file in named or (folders & named).difference(ROOMS) or file.endswith("__init__.py")
        assert known, f"the file map of {name} lacks {file}"


def test_the_architecture_page_names_all_of_training():
    """It groups these files by what they are about; one that it lacks is about nothing."""
    block = next(block for _, block in code_blocks(page(ARCHITECTURE)) if "the objective:" in block)
    named = re.findall(r"[a-z]+", " ".join(re.findall(r"the \w+: +(.*)", block)))
    files = [file.split("/")[1] for file in listed("*.py") if file.startswith("training/")]
    assert sorted(named) == sorted(file.removesuffix(".py") for file in files if file != "__init__.py")
