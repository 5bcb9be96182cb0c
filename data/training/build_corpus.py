"""Build data/corpus/python_docs.txt: the natural text of every haystack, one paragraph a line.

The text is the Python language reference and the docstrings of the standard library, read from the
running interpreter (Python Software Foundation License 2; see data/corpus/README.md). Everything
was trained on the committed file; another Python version gives a slightly different one.
"""

import ast
import hashlib
import re
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

OUTPUT = Path(__file__).parents[1] / "corpus" / "python_docs.txt"
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"}
MIN_CHARS, MAX_CHARS = 120, 1500


def standard_library_docstrings() -> list[str]:
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if SKIPPED_FOLDERS & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # templates and deliberately broken files
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
        texts += [text for node in nodes if (text := ast.get_docstring(node))]
    return texts


def paragraphs(text: str) -> list[str]:
    blocks = (re.sub(r"\s+", " ", block).strip() for block in re.split(r"\n\s*\n", text))
    return [b for b in blocks if MIN_CHARS <= len(b) <= MAX_CHARS and b.isascii()]


def main() -> None:
    texts = [*topics.values(), *standard_library_docstrings()]
    unique = dict.fromkeys(p for text in texts for p in paragraphs(text))
    ordered = sorted(unique, key=lambda p: hashlib.sha256(p.encode()).digest())
    OUTPUT.write_text("\n".join(ordered) + "\n")
    print(f"{len(ordered)} paragraphs, {OUTPUT.stat().st_size / 1e6:.2f} MB -> {OUTPUT}")


if __name__ == "__main__":
    main()
