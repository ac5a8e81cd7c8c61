"""Registration calls for adapter kinds and generators from outside the package.

Reading a recipe needs the settings class. Building a model also needs the implementation, which imports torch. An
implementation given as an import path `package.module:name` is imported only then.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hyperscale.config.adaptation import ADAPTER_SETTINGS, GENERATOR_SETTINGS, AdapterSection, GeneratorSection
from hyperscale.config.plugins import import_object
from hyperscale.config.section import Section
from hyperscale.errors import PluginError

Implementation = str | Callable[[Any], Any]


@dataclass(frozen=True)
class Extension:
    """What implements a registered kind."""

    implementation: Implementation
    peft: Any = None
    """Of an adapter kind: its `PeftMethod`, or the import path of one."""


_adapter_kinds: dict[str, Extension] = {}
_generators: dict[str, Extension] = {}


def register_adapter_kind(settings: type[AdapterSection], implementation: Implementation, peft: Any = None) -> None:
    """Add an adapter kind, for recipes to name by the `kind` of its settings.

    Args:
        settings: its section of a recipe, with `kind: Literal["name"] = "name"`. `has_peft_form` must say whether
            `peft` is given.
        implementation: takes the settings and returns an `AdapterKind` (hyperscale/model/adapters/kinds.py).
        peft: how the kind is written as a PEFT folder, a `PeftMethod` (hyperscale/export/peft_format.py); bundles of a
            kind without one are native.

    Raises:
        PluginError: the settings are not an adapter section, or the name is taken.
    """
    kind = _kind_of(settings, AdapterSection)
    if settings.has_peft_form != (peft is not None):
        raise PluginError(f"adapter kind '{kind}': has_peft_form must be true exactly where peft is given")
    ADAPTER_SETTINGS.register(kind, settings)
    _adapter_kinds[kind] = Extension(implementation, peft)


def register_generator(settings: type[GeneratorSection], implementation: Implementation) -> None:
    """Add a generator, for recipes to name by the `kind` of its settings.

    Args:
        settings: its section of a recipe, with `kind: Literal["name"] = "name"`.
        implementation: takes a `GeneratorSpec` (hyperscale/model/generators/registry.py) and returns an `nn.Module`
            that fulfils `Generator`.

    Raises:
        PluginError: the settings are not a generator section, or the name is taken.
    """
    kind = _kind_of(settings, GeneratorSection)
    GENERATOR_SETTINGS.register(kind, settings)
    _generators[kind] = Extension(implementation)


def adapter_implementation(kind: str) -> Callable[[Any], Any]:
    """Return the function that makes a registered adapter kind from its settings."""
    return _implementation(ADAPTER_SETTINGS.find, _adapter_kinds, kind)


def generator_implementation(kind: str) -> Callable[[Any], Any]:
    """Return the function that makes a registered generator from a `GeneratorSpec`."""
    return _implementation(GENERATOR_SETTINGS.find, _generators, kind)


def peft_method_of(kind: str) -> Any:
    """Return the `PeftMethod` of a registered adapter kind, or None if it has none."""
    extension = _adapter_kinds.get(kind) if ADAPTER_SETTINGS.find(kind) else None
    peft = extension.peft if extension else None
    return import_object(peft) if isinstance(peft, str) else peft


def _kind_of(settings: Any, base: type[Section]) -> str:
    if not (isinstance(settings, type) and issubclass(settings, base)):
        raise PluginError(f"{settings!r} is not a settings class: derive it from {base.__name__}")
    field = settings.model_fields.get("kind")
    if field is None or not isinstance(field.default, str):
        raise PluginError(f'{settings.__name__} has no kind: declare `kind: Literal["name"] = "name"`')
    return field.default


def _implementation(find: Callable[[str], Any], extensions: dict[str, Extension], kind: str) -> Callable[[Any], Any]:
    if find(kind) is None or kind not in extensions:
        raise PluginError(f"'{kind}' has no implementation: no installed package registers it")
    implementation = extensions[kind].implementation
    function: Callable[[Any], Any] = (
        import_object(implementation) if isinstance(implementation, str) else implementation
    )
    return function
