"""A section with a choice of kinds, to which plug-ins can add kinds of their own."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Union

from pydantic import BaseModel, Field, GetCoreSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema

from hyperscale.config.plugins import Registry


class OpenUnion:
    """Annotates a union of sections whose `kind` selects the section.

    A kind of the package is validated as in a closed union. Any other kind loads the plug-ins. The whole union is then
    validated with the registered kinds, so messages and paths are those of one union.
    """

    def __init__(self, registry: Registry[Any]) -> None:
        self.registry = registry
        self._packaged = frozenset(registry)

    @property
    def union(self) -> Any:
        """The union of all settings classes that are registered now."""
        return Union[tuple(self.registry[kind] for kind in self.registry)]  # noqa: UP007  (members are not known here)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(
            self._validate, handler(source), serialization=core_schema.simple_ser_schema("any")
        )

    def _validate(self, value: Any, validate_packaged: Any) -> Any:
        kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
        if not isinstance(kind, str) or kind in self._packaged:
            return validate_packaged(value)
        self.registry.find(kind)
        return _adapter(tuple(self.registry[name] for name in self.registry)).validate_python(value)


@lru_cache(maxsize=8)
def _adapter(members: tuple[type[BaseModel], ...]) -> TypeAdapter[Any]:
    union: Any = Union[members]  # noqa: UP007  (members are not known here)
    return TypeAdapter(Annotated[union, Field(discriminator="kind")])
