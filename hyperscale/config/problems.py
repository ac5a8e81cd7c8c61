"""Turns a pydantic error into lines a user can act on: where, what value, what is allowed, the nearest spelling."""

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from hyperscale.config.open_union import OpenUnion
from hyperscale.errors import nearest

_LONGEST_VALUE = 80
_TEXTS = {
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
}


@dataclass(frozen=True)
class _Place:
    """Where an error lies: the path as the user wrote it, and the annotation that holds there."""

    path: str
    annotation: Any


@dataclass(frozen=True)
class _Problem:
    path: str
    text: str
    allowed: str = ""
    """What the value must be; empty if the problem is not a wrong value."""

    def line(self, where: str) -> str:
        text = f"{self.text} is not allowed: must be {self.allowed}" if self.allowed else self.text
        return f"{where}: {self.path}: {text}" if self.path else f"{where}: {text}"


def describe(error: ValidationError, model: type[BaseModel], where: str | Callable[[str], str]) -> list[str]:
    """Return one line for each problem in `error`, in pydantic's order.

    `model` is the class that was validated; `where` names the file or section and starts every line, or does so for the
    path of a problem. A value that fits no member of a union gives one line, not one for each member.
    """
    problems: list[_Problem] = []
    for detail in error.errors(include_url=False):
        problem = _explain(detail, _locate(detail["loc"], model))
        last = problems[-1] if problems else None
        if last and last.allowed and problem.allowed and (last.path, last.text) == (problem.path, problem.text):
            problems[-1] = replace(last, allowed=f"{last.allowed}, or {problem.allowed}")
        elif problem not in problems and not (detail["type"] == "too_short" and _inside(problem.path, problems)):
            problems.append(problem)
    return [problem.line(where if isinstance(where, str) else where(problem.path)) for problem in problems]


def _explain(detail: Mapping[str, Any], place: _Place) -> _Problem:
    context, value = detail.get("ctx", {}), _show(detail["input"])
    match detail["type"]:
        case "extra_forbidden":
            key, known = str(detail["loc"][-1]), _keys(place.annotation)
            return _Problem(place.path, f"unknown key (value {value}).{nearest(key, known)} Known: {_list(known)}")
        case "missing":
            return _Problem(place.path, "required, but missing")
        case "union_tag_invalid" | "union_tag_not_found" as kind:
            discriminator = context["discriminator"].strip("'")
            path, tags = _join(place.path, discriminator), _tags(place.annotation, discriminator)
            if kind == "union_tag_not_found":
                return _Problem(path, f"required, but missing: one of {_list(tags)}")
            allowed = _one_of(tags, context["tag"])
            if _open_union(place.annotation) and not nearest(context["tag"], tags):
                allowed += ". No installed package adds it"
            return _Problem(path, f"'{context['tag']}'", allowed)
        case "literal_error":
            return _Problem(place.path, value, _one_of(_literals(place.annotation), str(detail["input"])))
        case "value_error" | "assertion_error":
            return _Problem(place.path, str(context["error"]))
        case "model_type" | "model_attributes_type" | "dict_type":
            return _Problem(place.path, value, "a mapping of keys to values")
        case "tuple_type" | "list_type" | "set_type":
            return _Problem(place.path, value, "a list")
        case "too_short":
            return _Problem(place.path, f"needs at least {context['min_length']} entry, has {context['actual_length']}")
        case _:
            return _Problem(place.path, value, _allowed(detail["type"], detail["msg"], context))


def _one_of(words: Sequence[str], word: str) -> str:
    close = nearest(word, words)
    return f"one of {_list(words)}" + (f".{close}" if close else "")


def _allowed(kind: str, message: str, context: Mapping[str, Any]) -> str:
    if kind in _TEXTS:
        return _TEXTS[kind].format(**context)
    return message.removeprefix("Input should be ").removeprefix("Input should ").partition(", unable to ")[0]


def _inside(path: str, problems: Sequence[_Problem]) -> bool:
    """Return whether an entry of the list at `path` is wrong; pydantic then may call the list too short as well."""
    return any(problem.path.startswith(f"{path}[") for problem in problems)


def _locate(location: Sequence[int | str], model: type[BaseModel]) -> _Place:
    """Follow pydantic's location through the annotations, leaving out the union labels that no user wrote."""
    place = _Place("", model)
    for key in location:
        place = _step(place, key)
    return place


def _step(place: _Place, key: int | str) -> _Place:
    annotation = _bare(place.annotation)
    arguments = get_args(annotation)
    if _is_model(annotation):
        field = annotation.model_fields.get(str(key)) or _by_alias(annotation, str(key))
        return _Place(_join(place.path, str(key)), _annotation_of(field) if field else annotation)
    if get_origin(annotation) in (dict, Mapping):
        return _Place(_join(place.path, str(key)), arguments[1])
    if isinstance(key, int):
        return _Place(f"{place.path}[{key}]", _element(arguments, key))
    if _is_union(annotation):
        return _Place(place.path, next((member for member in arguments if _has_label(member, key)), Any))
    return place


def _bare(annotation: Any) -> Any:
    """Strip `Annotated` and a `None` alternative."""
    while get_origin(annotation) is Annotated:
        opened = _open_union(annotation)
        annotation = opened.union if opened else get_args(annotation)[0]
    if _is_union(annotation):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return _bare(members[0]) if len(members) == 1 else Union[tuple(members)]  # noqa: UP007  (members are not known here)
    return annotation


def _open_union(annotation: Any) -> OpenUnion | None:
    metadata = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return next((each for each in metadata if isinstance(each, OpenUnion)), None)


def _annotation_of(field: FieldInfo) -> Any:
    """Return a field's annotation with its `OpenUnion`, which pydantic puts aside."""
    opened = next((each for each in field.metadata if isinstance(each, OpenUnion)), None)
    return Annotated[field.annotation, opened] if opened else field.annotation


def _element(arguments: Sequence[Any], position: int) -> Any:
    members = [member for member in arguments if member is not Ellipsis]
    return members[min(position, len(members) - 1)] if members else Any


def _has_label(member: Any, label: str) -> bool:
    """Whether pydantic calls this union member `label`: a discriminator's value, a class or a type."""
    member = _bare(member)
    if _is_model(member):
        tags = [_literals(field.annotation) for field in member.model_fields.values()]
        return label == member.__name__ or [label] in tags
    name = getattr(get_origin(member) or member, "__name__", str(member))
    return label.partition("[")[0].lower() == name.lower()


def _tags(annotation: Any, discriminator: str) -> list[str]:
    members = [member for member in map(_bare, get_args(_bare(annotation))) if _is_model(member)]
    return [tag for member in members for tag in _literals(member.model_fields[discriminator].annotation)]


def _literals(annotation: Any) -> list[str]:
    annotation = _bare(annotation)
    return [str(value) for value in get_args(annotation)] if get_origin(annotation) is Literal else []


def _keys(annotation: Any) -> list[str]:
    annotation = _bare(annotation)
    if not _is_model(annotation):
        return []
    return [field.alias or name for name, field in annotation.model_fields.items()]


def _by_alias(model: type[BaseModel], key: str) -> Any:
    return next((field for field in model.model_fields.values() if field.alias == key), None)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _list(words: Iterable[str]) -> str:
    return ", ".join(words)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
