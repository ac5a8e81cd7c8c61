"""The README.md of a saved generator: the model card that the Hugging Face hub shows."""

import yaml

from hyperscale.export.exporter import TrainedGenerator
from hyperscale.export.portable import BackboneName


def render_card(trained: TrainedGenerator, backbone: BackboneName, licence: str) -> str:
    """Return the card: front matter for the hub, the tasks with their scores, and how to use the folder.

    `licence`: an identifier of the hub, such as `apache-2.0`.
    """
    front = {
        "library_name": "hyperscale",
        **({"base_model": backbone.name} if backbone.kind == "hub" else {}),
        "license": licence,
        "tags": ["hypernetwork", "multi-task", "adapters", *sorted({site.kind for site in trained.site_map.sites})],
    }
    adaptation = trained.recipe.adaptation
    parameters = sum(parameter.numel() for parameter in trained.generator.parameters())
    first = trained.tasks[0].name
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {trained.recipe.name}",
        "",
        f"A generator of adapters for {len(trained.tasks)} tasks on one frozen backbone.",
        "",
        f"- Backbone: `{backbone.name}` ({_origin(backbone)}), sha256 of its weights `{trained.backbone['digest']}`",
        f"- Adapters: {', '.join(one.kind for one in adaptation.adapters)}; generator: {adaptation.generator.kind}",
        f"- Parameters of the generator: {parameters:,}",
        f"- Run: {trained.recipe.name}, step {trained.step}",
        "",
        "## Tasks",
        "",
        "| task | description | validation score (%) |",
        "|---|---|---|",
        *(_row(trained, index) for index in range(len(trained.tasks))),
        "",
        "## How to use",
        "",
        "```python",
        "import hyperscale as hs",
        "",
        'generator = hs.Generator.from_pretrained("THIS FOLDER OR ITS HUB ID")',
        f"adapters = generator.adapters({first!r})  # module path -> tensor name -> tensor",
        f'generator.export("bundles", tasks=[{first!r}])  # a folder that PEFT loads where it knows the adapters',
        "```",
        "",
    ]
    return "\n".join(lines)


def _origin(backbone: BackboneName) -> str:
    match backbone.kind:
        case "hub":
            return f"Hugging Face hub, revision {backbone.revision or 'not pinned'}"
        case "packaged":
            return "packaged with hyperscale"
        case "local":
            return "a folder of the training machine; only its last name is kept"


def _row(trained: TrainedGenerator, index: int) -> str:
    task = trained.tasks[index]
    scores = trained.scores.get(task.name, {})
    shown = ", ".join(f"{metric} {value:.1f}" for metric, value in scores.items()) or "not measured in this run"
    description = " ".join(task.description.split()).replace("|", "\\|")
    return f"| {task.name} | {description} | {shown} |"
