"""Adapters of many tasks on a transformers model that the caller already holds.

`adapt` takes the place of PEFT's `get_peft_model`. The returned module trains in any loop: the caller's own,
transformers' `Trainer`, or Accelerate.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hyperscale.config.adaptation import AdaptationSettings
from hyperscale.config.problems import describe
from hyperscale.config.section import Section
from hyperscale.errors import ConfigError, nearest
from hyperscale.export.peft_format import require_peft_support, write_peft
from hyperscale.export.replacement import whole_folder
from hyperscale.model.architectures import architecture_of
from hyperscale.model.build import Blueprint
from hyperscale.model.generators.generator import num_parameters
from hyperscale.model.injection import Injection, adapting
from hyperscale.model.weights import Weights
from hyperscale.places import local_path

Task = int | str
"""A task's number, or its name."""
_GENERATOR = "generator."


def adapt(
    model: PreTrainedModel,
    adapters: Sequence[Section | Mapping[str, Any] | str] = ("lora",),
    generator: Section | Mapping[str, Any] | str = "hypernetwork",
    num_tasks: int | None = None,
    *,
    task_names: Sequence[str] | None = None,
    seed: int = 0,
    **adaptation: Any,
) -> "MultiTaskModel":
    """Freeze a model and give it a generator of adapters for several tasks.

    The generator's parameters are all that trains. They are fp32 and lie on the model's device. At the start the
    adapted model computes exactly what the model computes, except with prefix adapters.

    Args:
        model: a transformers model with a language-model head, of a supported family.
        adapters: settings such as `LoraSettings(rank=16)`, the same as a mapping with `kind`, or a kind's name.
        generator: settings, a mapping with `kind`, or a kind's name: `hypernetwork`, `per_layer`, `independent`,
            `shared`.
        num_tasks: how many tasks there are; not needed with `task_names`.
        task_names: names by which tasks can be chosen; by default `task0`, `task1`, ….
        seed: the same seed gives the same parameters on every rank and machine.
        adaptation: further fields of `AdaptationSettings`, such as `init="paper"`.

    Raises:
        BackboneError: the model's family is not supported.
        ConfigError: the settings are wrong, or the model has no layer that an adapter targets.

    Example:
        >>> model = hs.adapt(AutoModelForCausalLM.from_pretrained(name), [hs.LoraSettings(rank=8)], num_tasks=4)
        >>> with model.tasks([0, 3, 1]):
        ...     model(**batch).loss.backward()
    """
    settings = _settings({"adapters": adapters, "generator": generator, **adaptation})
    names = _task_names(num_tasks, task_names)
    blueprint = Blueprint.of_backbone(model, architecture_of(model.config.model_type), settings.adapters)
    model.requires_grad_(False)
    module = blueprint.build_generator(settings, len(names), seed).to(next(model.parameters()).device)
    return MultiTaskModel(model, module, blueprint, settings, names)


class MultiTaskModel(nn.Module):
    """A frozen transformers model whose adapters a generator makes for the tasks of each batch.

    `parameters()` lists the frozen model's, too; those that train have `requires_grad`. `state_dict()` is the
    generator's alone, since the frozen model never changes. Other attributes (`config`, `device`, …) are the model's.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        generator: nn.Module,
        blueprint: Blueprint,
        settings: AdaptationSettings,
        task_names: Sequence[str],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.generator = generator
        self.blueprint = blueprint
        self.settings = settings
        self.task_names = tuple(task_names)
        self._injection: Injection = blueprint.inject(backbone)
        self._chosen: Tensor | None = None
        self._until_backward = ExitStack()
        self.training = backbone.training

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the model takes `num_items_in_batch`; `Trainer` asks."""
        parameters = inspect.signature(self.backbone.forward).parameters.values()
        return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)

    @contextmanager
    def tasks(self, tasks: Sequence[Task] | Tensor | Task) -> Iterator[Self]:
        """Choose the task of each sample for the forwards, and their backwards, inside the `with`.

        Args:
            tasks: one task for each sample of the batch, or a single task for all of them.

        Raises:
            ValueError: a task that does not exist.
        """
        before, self._chosen = self._chosen, self._numbers(tasks)
        try:
            yield self
        finally:
            self._until_backward.close()
            self._chosen = before

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        task_ids: Sequence[Task] | Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """Run the adapted model and return its own output.

        Args:
            input_ids: [B, T].
            task_ids: [B], the task of each sample; by default those of the surrounding `tasks` block.

        Raises:
            ValueError: no task is chosen, or not one for each sample.
        """
        self._until_backward.close()
        named_inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        inputs |= {name: value for name, value in named_inputs.items() if value is not None}
        stack = ExitStack()
        stack.enter_context(self._adapting(self._tasks_of(task_ids, _batch_size(inputs))))
        try:
            output = self.backbone(**inputs)
        except BaseException:
            stack.close()
            raise
        if torch.is_grad_enabled() and _recomputes_blocks(self.backbone):
            self._until_backward = stack  # blocks run again in the backward pass, with the same adapters
        else:
            stack.close()
        return output

    @torch.no_grad()
    def generate(self, input_ids: Tensor, task_ids: Sequence[Task] | Tensor | None = None, **options: Any) -> Any:
        """Generate as transformers' `generate` does, each sample with its task's adapters, generated once.

        Args:
            input_ids: [B, T]; decoder-only models want padding on the left.
            task_ids: [B]; by default the tasks of the surrounding `tasks` block.
            options: what transformers' `generate` takes. Beams and several returned sequences are supported.
        """
        self._until_backward.close()
        tasks = self._tasks_of(task_ids, len(input_ids))
        copies = _sequences_per_sample(self.backbone.generation_config, options)
        if self.blueprint.architecture.is_encoder_decoder:
            with self._adapting(tasks):
                encoder: Any = self.backbone.get_encoder()
                encoded = encoder(input_ids, attention_mask=options.get("attention_mask"))
            options["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded.last_hidden_state)
        with self._adapting(tasks if len(tasks) == 1 else tasks.repeat_interleave(copies)):
            return self.backbone.generate(input_ids, **options)  # type: ignore[operator]  # nn.Module hides its type

    def weights(self, task: Task) -> Weights:
        """Return one task's adapter weights, fp32 [1, S, …] by group of sites."""
        with torch.no_grad():
            weights: Weights = self.generator(self._numbers(task))
        return weights

    def save_adapters(self, folder: str | Path, tasks: Sequence[Task] | None = None) -> dict[str, Path]:
        """Write each task's adapters as a folder that PEFT and vLLM load; an earlier folder of a task is replaced.

        Args:
            folder: gets one folder for each task, by its name.
            tasks: only these; by default all.

        Returns:
            Task name -> its folder.

        Raises:
            BundleError: PEFT has no form for these adapters, or a folder cannot be written; the earlier one stays.

        Example:
            >>> model.save_adapters("adapters")
            >>> PeftModel.from_pretrained(backbone, "adapters/news")
        """
        numbers = range(len(self.task_names)) if tasks is None else self._numbers(tasks).tolist()
        require_peft_support(self.blueprint.site_map, self.blueprint.architecture)
        base, dtype = str(self.backbone.name_or_path), next(self.backbone.parameters()).dtype
        written = {}
        for number in numbers:
            target = local_path(folder) / self.task_names[number]
            weights = {
                group: {name: tensor.cpu() for name, tensor in named.items()}
                for group, named in self.weights(number).items()
            }
            with whole_folder(target, "adapter") as building:
                site_map, architecture = self.blueprint.site_map, self.blueprint.architecture
                write_peft(building, weights, site_map, architecture, base, dtype, self.settings.adapters)
            written[self.task_names[number]] = target
        return written

    def print_trainable_parameters(self) -> None:
        """Print the number of trained parameters and of all parameters."""
        trained, frozen = num_parameters(self.generator), num_parameters(self.backbone)
        total = trained + frozen
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")

    def state_dict(self, *args: Any, prefix: str = "", **options: Any) -> Any:
        """Return the generator's state, its names as they are in this module: `generator.…`."""
        return self.generator.state_dict(*args, prefix=f"{prefix}{_GENERATOR}", **options)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returned."""
        own = {name.removeprefix(_GENERATOR): tensor for name, tensor in state_dict.items()}
        return self.generator.load_state_dict(own, strict=strict, assign=assign)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "backbone":  # not there yet while the module is built or unpickled
                raise
            return getattr(self.backbone, name)

    def _numbers(self, tasks: Sequence[Task] | Tensor | Task) -> Tensor:
        """Return task numbers [N] on the generator's device."""
        device = next(self.generator.parameters()).device
        if isinstance(tasks, Tensor):
            numbers = tasks.reshape(-1).to(device=device, dtype=torch.int64)
        else:
            listed = [tasks] if isinstance(tasks, int | str) else list(tasks)
            numbers = torch.tensor([self._number(task) for task in listed], dtype=torch.int64, device=device)
        count = len(self.task_names)
        if not len(numbers) or int(numbers.min()) < 0 or int(numbers.max()) >= count:
            raise ValueError(f"tasks {numbers.tolist()}: give at least one, each from 0 to {count - 1}")
        return numbers

    def _number(self, task: Task) -> int:
        if not isinstance(task, str):
            return int(task)
        if task not in self.task_names:
            known = ", ".join(self.task_names)
            raise ValueError(f"no task '{task}'.{nearest(task, self.task_names)} The model has: {known}")
        return self.task_names.index(task)

    def _tasks_of(self, task_ids: Sequence[Task] | Tensor | None, batch_size: int) -> Tensor:
        tasks = self._chosen if task_ids is None else self._numbers(task_ids)
        if tasks is None:
            raise ValueError(
                "no task is chosen: pass task_ids, or call the model inside 'with model.tasks([…]):'. "
                "model.backbone(…) runs without adapters"
            )
        if len(tasks) not in (1, batch_size):
            raise ValueError(
                f"{len(tasks)} tasks for a batch of {batch_size} samples: give one for each, or one for all"
            )
        return tasks

    def _adapting(self, tasks: Tensor) -> AbstractContextManager[None]:
        return adapting(self._injection, self.generator, tasks, next(self.backbone.parameters()).dtype)


def _settings(fields: Mapping[str, Any]) -> AdaptationSettings:
    plain = dict(fields)
    plain["adapters"] = [_with_kind(one) for one in _listed(fields["adapters"])]
    plain["generator"] = _with_kind(fields["generator"])
    try:
        return AdaptationSettings.model_validate(plain)
    except ValidationError as error:
        raise ConfigError("\n".join(describe(error, AdaptationSettings, "adapt"))) from error


def _listed(adapters: Any) -> Sequence[Any]:
    return [adapters] if isinstance(adapters, str | Mapping | Section) else list(adapters)


def _with_kind(settings: Section | Mapping[str, Any] | str) -> Any:
    if isinstance(settings, Section):
        return settings.model_dump()
    return {"kind": settings} if isinstance(settings, str) else dict(settings)


def _task_names(num_tasks: int | None, task_names: Sequence[str] | None) -> tuple[str, ...]:
    if task_names is None:
        if num_tasks is None or num_tasks < 1:
            raise ConfigError(f"adapt: num_tasks {num_tasks} must be at least 1, or give task_names")
        return tuple(f"task{number}" for number in range(num_tasks))
    names = tuple(task_names)
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"adapt: task_names must be different names, at least one, not {list(names)}")
    if num_tasks not in (None, len(names)):
        raise ConfigError(f"adapt: num_tasks {num_tasks} contradicts task_names, which has {len(names)}")
    return names


def _batch_size(inputs: Mapping[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "labels"):
        if isinstance(inputs.get(name), Tensor):
            return len(inputs[name])
    raise ValueError("the batch has none of input_ids, inputs_embeds, decoder_input_ids, labels")


def _recomputes_blocks(backbone: PreTrainedModel) -> bool:
    """Return whether blocks run again in the backward pass."""
    # transformers renamed the property after our oldest version; the new one warns about the old name
    name = "is_activation_checkpointing"
    return bool(getattr(backbone, name if hasattr(backbone, name) else "is_gradient_checkpointing"))


def _sequences_per_sample(defaults: Any, options: Mapping[str, Any]) -> int:
    """Return how many sequences transformers' `generate` runs for each sample."""
    config = options.get("generation_config") or defaults
    return max(
        int(options.get(name) or getattr(config, name, None) or 1) for name in ("num_beams", "num_return_sequences")
    )
