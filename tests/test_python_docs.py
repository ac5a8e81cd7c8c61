"""docs/python.md is run to the letter, block after block, on a tiny backbone."""

import re
from pathlib import Path
from typing import Any

import pytest

import hyperscale as hs

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "python.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def test_every_block_runs(
    tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-llama").symlink_to(tiny_llama_folder)
    assert len(BLOCKS) >= 6
    names: dict[str, Any] = {"__name__": "docs"}
    for number, block in enumerate(BLOCKS, start=1):
        exec(compile(block, f"docs/python.md, block {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert "TrainResult('demo'): 3 steps in " in printed
    assert "torch.Size([8, 32]) torch.Size([32, 8])" in printed


def test_every_public_name_is_documented() -> None:
    returned = {"TrainResult", "MultiTaskModel", "Bundles"}
    assert [name for name in hs.__all__ if name not in returned and f"hs.{name}" not in PAGE] == []
    assert set(hs.__all__) >= returned
    methods = {name for public in (hs.Generator, hs.Bundles) for name in vars(public) if not name.startswith("_")}
    assert {name for name in methods if not re.search(rf"\b{name}\b", PAGE)} == set()


def test_links_lead_somewhere() -> None:
    for page in ("python.md", "generator_format.md"):
        links = re.findall(r"\]\(([^)#]+)\)", (DOCS / page).read_text())
        assert [link for link in links if "://" not in link and not (DOCS / link).exists()] == []
