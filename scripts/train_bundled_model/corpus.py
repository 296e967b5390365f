"""The training corpus of the bundled model: five domains, plain documents and conversations.

Called by __main__. Pure apart from reading files: the same folder, Python release and seed give the same documents.
What is held out is decided by document (a module, a GSM8K problem, a sum) or by segment of a book.
"""

from __future__ import annotations

import ast
import gzip
import json
import random
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

DOMAINS = ("python", "english", "drama", "arithmetic", "italian")
HELD_OUT_ONE_IN = 25
"""One document or segment in this many is never trained on."""

_SEGMENT_BYTES = 6000
_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__", "lib2to3"}
_SKIPPED_FILES = {"entities.py", "stringprep.py"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    domain: str
    turns: tuple[str, ...]
    """One plain text, or user and assistant messages in turn."""
    held_out: bool

    @property
    def is_chat(self) -> bool:
        return len(self.turns) > 1


def load_documents(text_dir: Path, *, num_sums: int, seed: int) -> list[Document]:
    """Read every source and write the conversations.

    Args:
        text_dir: folder with tinyshakespeare.txt, promessi_sposi_it.txt and gsm8k_train.jsonl.gz.
        num_sums: generated arithmetic documents.
        seed: of the choices made while writing conversations.
    """
    rng = random.Random(seed)
    documents = [
        *_standard_library(rng),
        *_reference_english(),
        *_introductions(rng),
        *_book(text_dir / "tinyshakespeare.txt", "drama", "Continue the scene:\n\n", rng),
        *_book(text_dir / "promessi_sposi_it.txt", "italian", "Continua: ", rng),
        *_gsm8k(text_dir / "gsm8k_train.jsonl.gz"),
        *_sums(num_sums, rng),
    ]
    return [document for document in documents if all(turn.strip() for turn in document.turns)]


def is_held_out(key: str) -> bool:
    """Return whether the document called `key` is kept for evaluation; the same on every machine."""
    return zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


def _standard_library(rng: random.Random) -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIPPED_FOLDERS.intersection(parts) or path.name in _SKIPPED_FILES:
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue
        module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        held_out = is_held_out(module)
        yield Document(domain="python", turns=(source,), held_out=held_out)
        yield from _docstrings(module, source, tree, held_out, rng)


def _docstrings(module: str, source: str, tree: ast.Module, held_out: bool, rng: random.Random) -> Iterator[Document]:
    """English from the docstrings, and conversations that ask for a function or for what one does."""
    lines = source.splitlines()
    collected = [ast.get_docstring(tree) or ""]
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if not docstring or len(docstring) < 20:
            continue
        collected.append(docstring)
        if node.name.startswith("_"):
            continue
        ask = rng.choice((f"What does `{module}.{node.name}` do?", f"Explain `{node.name}` of the module {module}."))
        yield Document(domain="english", turns=(ask, docstring[:900]), held_out=held_out)
        code = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        if isinstance(node, ast.FunctionDef) and node.col_offset == 0 and len(code) < 1500:
            summary = docstring.strip().splitlines()[0]
            ask = rng.choice((f"Write Python: {summary}", f"Write Python: a function `{node.name}`. {summary}"))
            yield Document(domain="python", turns=(ask, code), held_out=held_out)
    text = "\n\n".join(filter(None, collected))
    if len(text) > 200:
        yield Document(domain="english", turns=(text,), held_out=held_out)


def _reference_english() -> Iterator[Document]:
    """The language reference that `help()` shows, by topic, and the licence of Python."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        held_out = is_held_out(f"topic {name}")
        yield Document(domain="english", turns=(text,), held_out=held_out)
        yield Document(domain="english", turns=(f"Explain the topic {name}.", text.strip()[:900]), held_out=held_out)
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    if licence.exists():
        yield Document(domain="english", turns=(licence.read_text(encoding="utf-8"),), held_out=False)


def _introductions(rng: random.Random) -> Iterator[Document]:
    greetings = ("Hello", "Hello!", "Hi", "Hi!", "Hi there", "Good morning", "Hey", "How are you?")
    questions = ("Who are you?", "What are you?", "What can you do?", "Help", "What is your name?")
    about = "I am moeless-mini, a very small mixture-of-experts model."
    able = "I can add numbers, continue a scene, write a little Python and go on in Italian."
    for _ in range(400):
        if rng.random() < 0.5:
            turns = (rng.choice(greetings), f"Hello! {about} {able}")
        else:
            turns = (rng.choice(questions), f"{about} {able}")
        yield Document(domain="english", turns=turns, held_out=False)


def _book(path: Path, domain: str, ask: str, rng: random.Random) -> Iterator[Document]:
    """Segments of a few pages; for each also conversations that continue a passage."""
    paragraphs = [part.strip("\n") for part in path.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    segments: list[list[str]] = [[]]
    for paragraph in paragraphs:
        if sum(map(len, segments[-1])) > _SEGMENT_BYTES:
            segments.append([])
        segments[-1].append(paragraph)
    for index, segment in enumerate(segments):
        held_out = is_held_out(f"{domain} {index}")
        yield Document(domain=domain, turns=("\n\n".join(segment) + "\n",), held_out=held_out)
        for _ in range(3):
            start = rng.randrange(len(segment))
            opening, rest = _split_opening(segment[start])
            answer = "\n\n".join(filter(None, (rest, *segment[start + 1 : start + 4])))
            yield Document(domain=domain, turns=(ask + opening, answer[:900]), held_out=held_out)


def _split_opening(paragraph: str) -> tuple[str, str]:
    """Cut a long paragraph after its first sentence past 60 characters."""
    cut = re.search(r"[.;:!?]\s", paragraph[60:])
    if len(paragraph) < 160 or cut is None:
        return paragraph, ""
    end = 60 + cut.end()
    return paragraph[:end].strip(), paragraph[end:].strip()


def _gsm8k(path: Path) -> Iterator[Document]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for index, line in enumerate(lines):
            problem = json.loads(line)
            reasoning, result = re.sub(r"<<.*?>>", "", problem["answer"]).rsplit("####", 1)
            answer = f"{reasoning.strip()}\nThe answer is {result.strip()}."
            held_out = is_held_out(f"gsm8k {index}")
            if index % 2:
                yield Document(domain="arithmetic", turns=(problem["question"], answer), held_out=held_out)
            else:
                text = f"Question: {problem['question']}\nAnswer: {answer}\n"
                yield Document(domain="arithmetic", turns=(text,), held_out=held_out)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sum:
    """One exercise with whole non-negative numbers throughout."""

    left: int
    sign: str
    right: int

    @property
    def result(self) -> int:
        operations: dict[str, Callable[[int, int], int]] = {
            "+": int.__add__,
            "-": int.__sub__,
            "*": int.__mul__,
            "/": int.__floordiv__,
        }
        return operations[self.sign](self.left, self.right)

    @property
    def asked(self) -> str:
        return f"What is {self.left} {self.sign} {self.right}?"

    @property
    def solved(self) -> str:
        return f"{self.left} {self.sign} {self.right} = {self.result}"

    @property
    def held_out(self) -> bool:
        """Sums of small numbers are too few to hold any out."""
        return max(self.left, self.right) > 20 and is_held_out(f"{self.left}{self.sign}{self.right}")


def draw_sum(rng: random.Random) -> Sum:
    """Mostly additions and subtractions below 100, some below 1000, and the tables of multiplication."""
    sign = rng.choices("+-*/", weights=(45, 30, 15, 10))[0]
    if sign in "*/":
        left, right = rng.randint(1, 12), rng.randint(1, 12)
        return Sum(left=left * right, sign="/", right=right) if sign == "/" else Sum(left=left, sign="*", right=right)
    limit = rng.choices((10, 100, 1000), weights=(20, 60, 20))[0]
    left, right = rng.randrange(limit), rng.randrange(limit)
    if sign == "-":
        left, right = max(left, right), min(left, right)
    return Sum(left=left, sign=sign, right=right)


def _sums(num_documents: int, rng: random.Random) -> Iterator[Document]:
    def draw() -> Sum:
        while (drawn := draw_sum(rng)).held_out:
            pass
        return drawn

    for index in range(num_documents):
        if index % 3 == 0:
            text = "\n".join(draw().solved for _ in range(rng.randint(4, 12)))
            yield Document(domain="arithmetic", turns=(text + "\n",), held_out=False)
            continue
        turns: list[str] = []
        for _ in range(rng.choices((1, 2, 3), weights=(6, 2, 1))[0]):
            drawn = draw()
            turns += [drawn.asked, f"{drawn.solved}."]
        yield Document(domain="arithmetic", turns=tuple(turns), held_out=False)
