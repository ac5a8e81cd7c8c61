"""Writes what the program itself knows into docs/: the recipe's JSON schema and the help of every command.

`make docs` runs it; a test compares the committed files with a fresh rendering.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

VERBS = (
    *("train", "adapt", "submit", "evaluate", "compare", "predict", "export"),
    *("tasks", "validate", "plan", "schema", "doctor", "track", "completion"),
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


def render(folder: Path) -> list[Path]:
    """Write the rendered files into `folder` and return their paths."""
    texts = {"recipe.schema.json": run("schema"), "cli.md": render_help()}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


if __name__ == "__main__":
    for path in render(Path(__file__).resolve().parent):
        print(f"wrote {path}")
