"""AdamW over the generator: schedule, clipping and a state that fits any number of ranks."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor, nn

from hyperscale.config.training import OptimizerSettings
from hyperscale.model.generators.roles import code_parameters, head_weights

_MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate_at(step: int, total_steps: int, settings: OptimizerSettings) -> float:
    """Return the learning rate of optimizer step `step` (from 0): linear warm-up, then the schedule down to 0."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
    left = 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return settings.learning_rate * max(0.0, left)


class GeneratorOptimizer:
    """Steps the generator from gradients that are already summed over ranks.

    `fixed_rows`: parameter name -> how many of its first rows never move, whatever weight decay or rounding would do.
    """

    def __init__(
        self,
        generator: nn.Module,
        settings: OptimizerSettings,
        total_steps: int,
        fixed_rows: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._settings = settings
        self._total_steps = total_steps
        self._named = dict(generator.named_parameters())
        self._fixed_rows = fixed_rows
        ratios = dict.fromkeys(code_parameters(generator), settings.trunk_learning_rate_ratio)
        ratios |= dict.fromkeys(head_weights(generator), settings.head_learning_rate_ratio)
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self._named.items():
            groups.setdefault(ratios.get(name, 1.0), []).append(parameter)
        self._adamw = torch.optim.AdamW(
            [{"params": parameters, "ratio": ratio} for ratio, parameters in groups.items()],
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of optimizer step `step` (from 0), without the ratios of a hypernetwork's parts."""
        return learning_rate_at(step, self._total_steps, self._settings)

    def clip(self) -> Tensor:
        """Scale the gradients down to `clip_norm`.

        Returns:
            Their norm before clipping, a scalar on their device: reading it waits for a GPU.
        """
        limit = self._settings.clip_norm
        return torch.nn.utils.clip_grad_norm_(self._named.values(), math.inf if limit is None else limit)

    def step(self, step: int) -> None:
        """Update the generator and clear the gradients; `step` counts from 0."""
        rate = self.learning_rate(step)
        for group in self._adamw.param_groups:
            group["lr"] = rate * group["ratio"]
        with self._rows_restored():
            self._adamw.step()
        self.clear()

    def clear(self) -> None:
        """Drop the gradients without an update: parameters, moments and update counts stay as they are."""
        self._adamw.zero_grad(set_to_none=True)

    @contextmanager
    def _rows_restored(self) -> Iterator[None]:
        fixed = {name: self._named[name][:rows].detach().clone() for name, rows in self._fixed_rows.items()}
        yield
        with torch.no_grad():
            for name, rows in fixed.items():
                self._named[name][: len(rows)].copy_(rows)

    def tensors(self) -> dict[str, Tensor]:
        """Return CPU copies of the moments and update counts, by parameter name."""
        moments: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            for key in (*_MOMENTS, "step"):
                if key in self._adamw.state[parameter]:
                    moments[f"{key}/{name}"] = self._adamw.state[parameter][key].detach().cpu().clone()
        return moments

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned. Parameters without an entry begin with empty moments."""
        for name, parameter in self._named.items():
            if f"step/{name}" in tensors:
                state = {key: tensors[f"{key}/{name}"].to(parameter.device).clone() for key in _MOMENTS}
                self._adamw.state[parameter] = {"step": tensors[f"step/{name}"].clone(), **state}
