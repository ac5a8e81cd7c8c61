"""A trained generator from Python: every task's adapters without a backbone."""

import copy
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hyperscale.data.tasks import Task
from hyperscale.errors import BundleError, nearest
from hyperscale.export.exporter import TrainedGenerator, export_bundles
from hyperscale.export.generator_folder import FILES, write_generator
from hyperscale.export.module_tensors import tensors_by_module
from hyperscale.export.opening import open_generator
from hyperscale.places import local_path, open_place

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Generator:
    """A trained generator and the tasks that it knows; `Generator.from_pretrained` reads one.

    It lies on the CPU in fp32. No backbone is loaded, except by `describe` and `with_described`.
    """

    def __init__(self, trained: TrainedGenerator, source: str) -> None:
        self._trained = trained
        self._source = source

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, backbone: str | Path | None = None
    ) -> "Generator":
        """Read a generator.

        Args:
            source: a run folder (its newest checkpoint is read), a checkpoint, the folder of a saved generator, or the
                id of one on the Hugging Face hub. What exists on this machine comes before the hub.
            revision: branch, tag or commit of a hub id.
            backbone: where the backbone lies on this machine, if not where it lay at training. `describe` reads it
                there, and PEFT bundles name it as their base model.

        Raises:
            CheckpointError: there is no whole checkpoint there.
            BundleError: a saved generator is damaged, incomplete or of a newer version, or the hub does not give it.

        Example:
            >>> generator = hs.Generator.from_pretrained("runs/demo")
            >>> generator.tasks
            ('tweets', 'plural', 'past')
        """
        place = str(source)
        from_hub = _HUB_ID.fullmatch(place) and not open_place(place).exists()
        if revision is not None and not from_hub:
            raise BundleError(
                f"revision={revision!r} is for a generator on the hub, and {place} is not one; leave it out"
            )
        trained = open_generator(_download(place, revision) if from_hub else place)
        if backbone is not None:
            trained = _with_backbone(trained, str(backbone))
        return cls(trained, place)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that the generator knows, in the order of their numbers."""
        return tuple(task.name for task in self._trained.tasks)

    @property
    def scores(self) -> Mapping[str, Mapping[str, float]]:
        """Task -> metric -> the last validation score in percent; without tasks that this run did not measure."""
        return self._trained.scores

    def adapters(self, task: str) -> dict[str, dict[str, Tensor]]:
        """Return one task's adapters.

        Returns:
            Module path in the backbone -> tensor name -> fp32 tensor. LoRA has PEFT's names and shapes: `lora_A`
            [rank, in] and `lora_B` [out, rank], with the scale alpha / rank in `lora_B`. `bottleneck_down` is
            [width, D], `bottleneck_up` [D, width], with their `_bias`; `ia3_delta` and `norm_delta` are [D], to be
            added to 1 and to the norm's weight; `prefix_keys` and `prefix_values` are [length, D].

        Raises:
            BundleError: the generator does not know the task; the message names the nearest one.

        Example:
            >>> adapters = generator.adapters("tweets")
            >>> adapters["model.layers.0.self_attn.q_proj"]["lora_A"].shape
            torch.Size([8, 576])
        """
        if task not in self.tasks:
            raise BundleError(
                f"the generator has no task '{task}'.{nearest(task, self.tasks)} It has: {', '.join(self.tasks)}"
            )
        return tensors_by_module(self._trained.weights_of(self.tasks.index(task)), self._trained.site_map)

    def describe(self, text: str) -> dict[str, dict[str, Tensor]]:
        """Return the adapters of a task that exists only as a description; loads the backbone to read it.

        The generator must have been trained with `adaptation.task_encoder.kind: text`. Every call loads the backbone:
        use `with_described` for several tasks.

        Returns:
            The same form as `adapters`.

        Raises:
            BundleError: the generator does not read descriptions, or the backbone is another one now.
            DataError: the text is empty.
            BackboneError: the backbone cannot be found.

        Example:
            >>> adapters = generator.describe("Does a review of a film sound happy?")
        """
        name = "described"
        while name in self.tasks:
            name += "-1"
        task = Task.model_validate(
            {"name": name, "description": text, "source": "none.jsonl", "input": "{text}", "target": "{target}"}
        )
        return self._with([task]).adapters(name)

    def with_described(self, tasks: Sequence[str | Path]) -> "Generator":
        """Return a generator that also knows tasks by their descriptions; loads the backbone once to read them.

        Args:
            tasks: task names or task files; a classification must list its `labels`.

        Raises:
            BundleError, DataError, BackboneError: as `describe`; also a task that is known already.

        Example:
            >>> more = generator.with_described(["style.yaml"])
            >>> more.export("bundles", tasks=["style"])
        """
        return self._with([str(task) for task in tasks])

    def export(
        self,
        output: str | Path,
        tasks: Sequence[str] = (),
        format: Literal["auto", "peft", "native"] | None = None,
    ) -> dict[str, Path]:
        """Write a bundle for each task into `output/<task>`.

        Args:
            tasks: the tasks to write; by default all.
            format: `peft` (PEFT loads the folder, and vLLM if it is LoRA), `native` (every kind of adapter) or `auto`;
                by default as the recipe says.

        Returns:
            Task -> folder of its bundle.

        Raises:
            BundleError: an unknown task, adapters that PEFT has no type for, or a folder that cannot be written.

        Example:
            >>> generator.export("bundles", tasks=["tweets"], format="peft")
            {'tweets': PosixPath('bundles/tweets')}
        """
        return export_bundles(self._trained, local_path(output), (tasks,) if isinstance(tasks, str) else tasks, format)

    def save_pretrained(self, folder: str | Path, *, licence: str = "unknown") -> Path:
        """Write the generator into a folder of its own, whole or not at all; docs/generator_format.md describes it.

        The folder holds no path of this machine and no secret. An earlier saved generator there is replaced.

        Args:
            licence: goes into the model card; an identifier of the hub, such as `apache-2.0`.

        Raises:
            BundleError: the folder holds other files, or cannot be written.

        Example:
            >>> generator.save_pretrained("my-generator", licence="apache-2.0")
            PosixPath('/home/me/my-generator')
        """
        return write_generator(self._trained, local_path(folder), licence)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str = "Upload a generator",
        licence: str = "unknown",
    ) -> str:
        """Save the generator into a repository of the Hugging Face hub, which is made if it does not exist.

        Args:
            repo_id: `owner/name`.
            private: who may read a new repository; by default as the owner's settings say.
            revision: the branch; by default `main`.
            token: by default the one of `hf auth login`.

        Returns:
            The address of the commit.

        Raises:
            BundleError: the hub refuses the repository or the files, or cannot be reached.

        Example:
            >>> generator.push_to_hub("me/my-generator", private=True)
            'https://huggingface.co/me/my-generator/commit/…'
        """
        from huggingface_hub import HfApi  # noqa: PLC0415 (half a second, and needed here alone)

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory(prefix="hyperscale-") as scratch:
            folder = write_generator(self._trained, Path(scratch) / "generator", licence)
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                commit = api.upload_folder(
                    repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
                )
            except _hub_errors() as error:
                raise BundleError(f"the generator cannot be pushed to {repo_id}: {error}") from error
        return str(commit.commit_url)

    def __repr__(self) -> str:
        trained = self._trained
        adaptation = trained.recipe.adaptation
        parameters = sum(parameter.numel() for parameter in trained.generator.parameters())
        kinds = " + ".join(one.kind for one in adaptation.adapters)
        lines = [
            f"Generator({self._source!r}): {adaptation.generator.kind}, {parameters:,} parameters",
            f"  makes    {kinds} at {len(trained.site_map.sites)} sites of {trained.backbone['name']}",
            f"  trained  {trained.recipe.name}, step {trained.step}",
            f"  tasks    {', '.join(self.tasks)}",
        ]
        return "\n".join(lines)

    def _with(self, tasks: Sequence[str | Task]) -> "Generator":
        from hyperscale.serving.describe import with_described_tasks  # noqa: PLC0415 (brings transformers)

        # The task encoder adds new tasks in place. Add them to a copy, so that this generator stays as it is.
        own = replace(self._trained, generator=copy.deepcopy(self._trained.generator))
        with torch.no_grad():
            return Generator(with_described_tasks(own, tasks), self._source)


def _with_backbone(trained: TrainedGenerator, name: str) -> TrainedGenerator:
    """Return a generator whose backbone lies elsewhere."""
    is_local = Path(name).is_dir()
    recipe = trained.recipe.model_copy(
        update={"backbone": trained.recipe.backbone.model_copy(update={"name": name, "revision": None})}
    )
    place = str(Path(name).absolute()) if is_local else name
    return replace(
        trained, recipe=recipe, backbone={**trained.backbone, "path": place, "is_local": is_local or "/" not in name}
    )


def _download(repo_id: str, revision: str | None) -> str:
    """Return the local folder of a generator on the hub, fetched if it is not in the cache."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 (half a second, and needed here alone)

    try:
        return str(snapshot_download(repo_id, revision=revision, allow_patterns=list(FILES)))
    except _hub_errors() as error:
        raise BundleError(
            f"{repo_id} is not a folder on this machine, and the hub does not provide it: {error}"
        ) from error


def _hub_errors() -> tuple[type[Exception], ...]:
    """Return what the hub's client raises: for a wrong name, a refused upload, or a hub that does not answer.

    Its HTTP library changes with huggingface_hub's version, so that library's class is taken from the client's own.
    """
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    own = [base for base in HfHubHTTPError.__mro__ if issubclass(base, Exception) and base is not Exception]
    return OSError, ValueError, RuntimeError, *own
