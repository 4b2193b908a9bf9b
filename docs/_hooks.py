"""Pages that are made when the documentation is built: API reference, results, launching."""

import ast
import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "internvl_jax"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages to those of docs/."""
    launching = (ROOT / "launch" / "README.md").read_text().replace("](../docs/", "](")
    pages = {"results.md": results(), "launch.md": launching}
    for module, summary in modules().items():
        pages[f"reference/{module}.md"] = f"# {module}\n\n::: {module}\n"
        pages.setdefault("reference/index.md", "# API reference\n\nFrom the docstrings.\n\n")
        pages["reference/index.md"] += f"* [`{module}`]({module}.md): {summary}\n"
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def modules() -> dict[str, str]:
    """Public modules with something public in them, and the first line of their docstring."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        tree = ast.parse(file.read_text())
        public = any(
            isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            for node in tree.body
        )
        if public and not any(part.startswith("_") for part in parts):
            found[".".join(parts)] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def results() -> str:
    """What the benchmarks have measured: a table for each file of benchmarks/results."""
    lines = [
        "# Measured results\n",
        "The files of `benchmarks/results` as they are; the script of the same name in "
        "`benchmarks/` says what is compared with what, and prints them anew. Figures are medians "
        "on the machine that a file names; where it names none, on two CPU cores that other work "
        "shared, so that ratios mean more than seconds.\n",
        "What the embedded job reaches stands in the README of the repository.\n",
    ]
    for file in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        lines += [f"## {file.stem}\n", "| figure | value |", "|---|---|"]
        figures = flatten(json.loads(file.read_text()))
        lines += [f"| `{name}` | {value} |" for name, value in figures]
        lines.append("")
    return "\n".join(lines)


def flatten(value: Any, name: str = "") -> list[tuple[str, str]]:
    """("a.b", text) of every leaf of nested JSON values."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [row for key, x in items for row in flatten(x, f"{name}.{key}".lstrip("."))]
    text = f"{value:.4g}" if isinstance(value, float) else str(value).strip().replace("\n", " ")
    return [(name, text.replace("|", "\\|"))]
