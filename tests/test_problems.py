"""A pydantic error becomes lines with path, value, what is allowed and the nearest spelling."""

from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from hyperscale.config.problems import describe
from hyperscale.config.section import Section


class Circle(Section):
    kind: Literal["circle"] = "circle"
    radius: float = Field(default=1.0, gt=0)


class Square(Section):
    kind: Literal["square"] = "square"
    width: int = 1


Shape = Annotated[Circle | Square, Field(discriminator="kind")]


class Inner(Section):
    words: dict[str, Circle] = {}
    mode: Literal["fast", "exact"] = "fast"


class Outer(Section):
    first: Shape
    others: tuple[Shape, ...] = ()
    maybe: Shape | None = None
    inner: Inner = Inner()
    size: int | tuple[int, int] = 1
    names: tuple[Literal["one", "two"], ...] = Field(default=("one",), min_length=1)

    @model_validator(mode="after")
    def _agree(self) -> "Outer":
        if self.size == 13:
            raise ValueError("size 13 is unlucky; use 12")
        return self


def lines(value: object) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(value)
    return describe(caught.value, Outer, "r.yaml")


def test_every_problem_has_one_line_with_its_path():
    problems = lines(
        {
            "first": {"kind": "circle", "radios": 2},
            "others": [{"kind": "squares"}, {"width": 3}, {"kind": "square", "width": "wide"}],
            "maybe": {"kind": "circle", "radius": 0},
            "inner": {"words": {"a word": {"radius": "x"}}, "mode": "fsat"},
            "size": "huge",
            "firts": 1,
        }
    )
    assert problems == [
        "r.yaml: first.radios: unknown key (value 2). Did you mean 'radius'? Known: kind, radius",
        "r.yaml: others[0].kind: 'squares' is not allowed: must be one of circle, square. Did you mean 'square'?",
        "r.yaml: others[1].kind: required, but missing: one of circle, square",
        "r.yaml: others[2].width: 'wide' is not allowed: must be a valid integer",
        "r.yaml: maybe.radius: 0 is not allowed: must be greater than 0",
        "r.yaml: inner.words.a word.radius: 'x' is not allowed: must be a valid number",
        "r.yaml: inner.mode: 'fsat' is not allowed: must be one of fast, exact. Did you mean 'fast'?",
        "r.yaml: size: 'huge' is not allowed: must be a valid integer, or a list",
        "r.yaml: firts: unknown key (value 1). Did you mean 'first'? Known: first, others, maybe, inner, size, names",
    ]


def test_missing_keys_wrong_shapes_and_our_own_checks():
    assert lines({}) == ["r.yaml: first: required, but missing"]
    assert lines(3) == ["r.yaml: 3 is not allowed: must be a mapping of keys to values"]
    assert lines({"first": 5, "others": 3}) == [
        "r.yaml: first: 5 is not allowed: must be a mapping of keys to values",
        "r.yaml: others: 3 is not allowed: must be a list",
    ]
    assert lines({"first": {"kind": "circle"}, "size": 13}) == ["r.yaml: size 13 is unlucky; use 12"]
    assert lines({"first": {"kind": "circle"}, "names": []}) == ["r.yaml: names: needs at least 1 entry, has 0"]
    assert lines({"first": {"kind": "circle"}, "names": ["tow"]}) == [
        "r.yaml: names[0]: 'tow' is not allowed: must be one of one, two. Did you mean 'two'?"
    ]
    assert len(lines({"first": {"kind": "circle"}, "size": "x" * 500})[0]) < 200
