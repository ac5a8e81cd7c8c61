"""Writes what the program itself knows into docs/ and README.md.

The recipe's JSON schema, the help of every command, and the families of backbones.

`make docs` runs it; a test compares the committed files with a fresh rendering.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

VERBS = (
    *("train", "adapt", "submit", "evaluate", "compare", "predict", "export"),
    *("tasks", "models", "validate", "plan", "schema", "doctor", "track", "completion"),
)


def run(*arguments: str) -> str:
    """Return what `hyperscale ARGUMENTS` prints, at a fixed width and without colour."""
    program = Path(sys.executable).with_name("hyperscale")
    environment = os.environ | {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    result = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, check=True)
    return re.sub(r"[ \t]+$", "", result.stdout, flags=re.MULTILINE).strip() + "\n"


def render_help() -> str:
    """Return docs/cli.md."""
    parts = ["# The command line", "Written by `make docs`.", f"```text\n{run('--help')}```"]
    parts += [f"## hyperscale {verb}\n\n```text\n{run(verb, '--help')}```" for verb in VERBS]
    return "\n\n".join(parts) + "\n"


_MODELS = ("<!-- what `hyperscale models --markdown` prints; `make docs` writes it -->", "<!-- end of the models -->")


def render_models(table: str) -> str:
    """Return docs/models.md from what `hyperscale models --markdown` prints."""
    head = "# Families of backbones\n\nWritten by `make docs`, from the tables of the program: `hyperscale models`."
    return f"{head}\n\n{table}"


def render_readme(table: str) -> str:
    """Return README.md with the table, less its notes, between the two marks."""
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(_MODELS[0])
    _, _, after = rest.partition(_MODELS[1])
    rows, _, _ = table.partition("\n\n")
    return f"{before}{_MODELS[0]}\n\n{rows}\n\n{_MODELS[1]}{after}"


def render(folder: Path) -> list[Path]:
    """Write the rendered files into `folder`, README.md beside it, and return the paths."""
    table = run("models", "--markdown")
    texts = {
        "recipe.schema.json": run("schema"),
        "cli.md": render_help(),
        "models.md": render_models(table),
        "../README.md": render_readme(table),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


if __name__ == "__main__":
    for path in render(Path(__file__).resolve().parent):
        print(f"wrote {path.resolve()}")
