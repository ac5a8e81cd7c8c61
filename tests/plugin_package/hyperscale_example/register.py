"""What the entry points name. It needs no torch: implementations are import paths."""

from dataclasses import replace
from typing import Literal

from pydantic import Field

import hyperscale as hs
from hyperscale.config.tracking import TrackerSettings
from hyperscale.model.architectures import architecture_of
from hyperscale.tracking.trackers import register_tracker


class ShiftSettings(hs.AdapterSection):
    """A learned vector added to the output of projections, `y + scale · b`."""

    kind: Literal["shift"] = "shift"
    targets: tuple[str, ...] = Field(default=("q", "v"), min_length=1)
    scale: float = Field(default=1.0, gt=0)


class MixtureSettings(hs.GeneratorSection):
    """Every task's weights are a mixture of a few stored sets, with the task's code as the coefficients."""

    reads_task_codes = True
    kind: Literal["mixture"] = "mixture"


class CsvSettings(TrackerSettings):
    """A CSV file with the loss of every step; under `tracking.csv` in a recipe."""

    file: str


def adapter_kinds() -> None:
    hs.register_adapter_kind(ShiftSettings, "hyperscale_example.shift:Shift")


def generators() -> None:
    hs.register_generator(MixtureSettings, "hyperscale_example.mixture:build")


def families() -> None:
    llama = architecture_of("llama")
    hs.register_family(
        replace(llama, model_type="seed_oss", model_class="SeedOssForCausalLM", block_class="SeedOssDecoderLayer")
    )


def trackers() -> None:
    register_tracker("csv", "hyperscale_example.csv_tracker:CsvTracker", CsvSettings)


def metrics() -> None:
    hs.register_metric("length_ratio", "hyperscale_example.length_ratio:length_ratio")
