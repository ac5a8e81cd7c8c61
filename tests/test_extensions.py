"""Adapter kinds and generators that a call registers in this process."""

from typing import Literal

import pytest
import torch

from hyperscale.config import extensions
from hyperscale.config.adaptation import (
    ADAPTER_SETTINGS,
    GENERATOR_SETTINGS,
    AdaptationSettings,
    AdapterSection,
    Ia3Settings,
    LoraSettings,
    SharedSettings,
)
from hyperscale.config.extensions import register_adapter_kind, register_generator
from hyperscale.errors import PluginError
from hyperscale.export.peft_format import PEFT_METHODS, peft_limitation
from hyperscale.model.adapters.ia3 import Ia3
from hyperscale.model.adapters.prefix import Prefix
from hyperscale.model.adapters.registry import ADAPTER_KINDS, build_kinds
from hyperscale.model.architectures import architecture_of
from hyperscale.model.generators.independent import Shared
from hyperscale.model.generators.registry import GENERATORS
from tests.tiny import adapted_model


class ScaleSettings(Ia3Settings):
    """(IA)³ by another name."""

    kind: Literal["a_scale"] = "a_scale"  # type: ignore[assignment]


class Scale(Ia3):
    name = "a_scale"


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a test registers."""
    for registry in (ADAPTER_SETTINGS, GENERATOR_SETTINGS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    for name in ("_adapter_kinds", "_generators"):
        monkeypatch.setattr(extensions, name, {})


def test_the_tables_of_settings_and_implementations_agree():
    assert set(ADAPTER_SETTINGS) == set(ADAPTER_KINDS)
    assert set(GENERATOR_SETTINGS) == set(GENERATORS)
    by_its_settings = {"vera"}
    with_peft_form = {kind for kind in ADAPTER_SETTINGS if ADAPTER_SETTINGS[kind].has_peft_form}
    assert with_peft_form == set(PEFT_METHODS) | by_its_settings


def test_a_registered_kind_with_a_peft_form(tiny_llama_folder):
    register_adapter_kind(ScaleSettings, Scale, peft=PEFT_METHODS["ia3"](None))
    chosen = AdaptationSettings.model_validate({"adapters": [{"kind": "a_scale", "targets": ["k"]}, {"kind": "lora"}]})
    assert [type(one) for one in chosen.adapters] == [ScaleSettings, LoraSettings]
    assert [kind.name for kind in build_kinds(chosen.adapters)] == ["lora", "a_scale"]  # packaged kinds act first
    assert not chosen.has_peft_form
    alone = chosen.model_copy(update={"adapters": chosen.adapters[:1]})
    assert alone.has_peft_form
    adapted = adapted_model(tiny_llama_folder, alone.model_dump())
    assert peft_limitation(adapted.site_map, architecture_of("llama")) is None
    assert AdaptationSettings.model_validate(chosen.model_dump()) == chosen


def test_a_registered_generator(tiny_llama_folder):
    class Once(SharedSettings):
        kind: Literal["once"] = "once"  # type: ignore[assignment]

    register_generator(Once, lambda spec: Shared(spec.site_map, spec.specs))
    adapted = adapted_model(tiny_llama_folder, {"generator": {"kind": "once"}}, num_tasks=3)
    assert isinstance(adapted.generator, Shared)
    assert {len(tensor) for named in adapted.generator(torch.arange(3)).values() for tensor in named.values()} == {1}


def test_an_invalid_registration_is_an_error(tiny_llama_folder):
    with pytest.raises(PluginError, match="adapter kind 'a_scale': has_peft_form must be true exactly where peft is"):
        register_adapter_kind(ScaleSettings, Scale)
    with pytest.raises(PluginError, match=r"is not a settings class: derive it from AdapterSection"):
        register_adapter_kind(SharedSettings, Scale)  # type: ignore[arg-type]
    with pytest.raises(PluginError, match=r'AdapterSection has no kind: declare `kind: Literal\["name"\] = "name"`'):
        register_adapter_kind(AdapterSection, Scale)

    class Duplicate(AdapterSection):
        kind: Literal["bottleneck"] = "bottleneck"

    with pytest.raises(PluginError, match="adapter kind 'bottleneck' is registered already; choose another name"):
        register_adapter_kind(Duplicate, Scale)

    class Inside(AdapterSection):
        kind: Literal["inside"] = "inside"
        length: int = 2

    register_adapter_kind(Inside, Prefix)
    with pytest.raises(PluginError, match="adapter kind 'inside' acts on keys, where only the package's own prefix"):
        build_kinds([Inside()])


def test_a_failing_import_of_an_implementation_is_reported():
    class Lost(AdapterSection):
        kind: Literal["lost"] = "lost"

    register_adapter_kind(Lost, "no_such_package.kinds:Lost")
    with pytest.raises(PluginError, match=r"'no_such_package\.kinds:Lost' cannot be imported: ModuleNotFoundError"):
        build_kinds([Lost()])
