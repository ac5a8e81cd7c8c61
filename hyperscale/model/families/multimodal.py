"""Multimodal checkpoints whose text model is used alone: where the files keep it, and what servers call its layers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_OWN = "model."
"""What the layers of a text model begin with in its own class."""
_HEAD = "lm_head."
_PARTS = (_OWN, _HEAD)


@dataclass(frozen=True)
class Multimodal:
    """A class of multimodal models, as config.json names it."""

    model_type: str
    text_model: str = "model.language_model."
    """What the same layers begin with in transformers' class of the whole model. PEFT names them so, and vLLM expects
    these names of an adapter: with those of the text model alone it loads one and applies nothing."""
    layouts: tuple[Mapping[str, str], ...] = (
        dict(zip(_PARTS, ("model.language_model.", "lm_head."), strict=True)),
        dict(zip(_PARTS, ("language_model.model.", "language_model.lm_head."), strict=True)),
    )
    """For each way in which files name the tensors: what replaces the beginning of the text model's own names. The
    first is that of transformers' classes since 4.52, the second the one in which most checkpoints are."""

    head = f"{_HEAD}weight"
    """The text model's output layer, in its own class."""

    def stored_names(self, name: str) -> Iterator[str]:
        """Yield the names that a tensor of the text model may have in the files."""
        for layout in self.layouts:
            for own, stored in layout.items():
                if name.startswith(own):
                    yield stored + name.removeprefix(own)

    def holds_text(self, stored: str) -> bool:
        """Return whether a tensor of the files belongs to the text model."""
        return stored.startswith(tuple(prefix for layout in self.layouts for prefix in layout.values()))

    def server_name(self, name: str) -> str:
        """Return the name of a layer of the text model in the class of the whole model."""
        return self.text_model + name.removeprefix(_OWN) if name.startswith(_OWN) else name


ROWS = (Multimodal("gemma3"), Multimodal("mistral3"))
"""Gemma 3 from 4B on; Mistral Small 3.1 and later, and Ministral 3."""
_BY_TYPE = {row.model_type: row for row in ROWS}


def multimodal_of(model_type: str | None) -> Multimodal | None:
    """Return the row of a multimodal class; None of a text model's type, or of none."""
    return _BY_TYPE.get(model_type) if model_type else None
