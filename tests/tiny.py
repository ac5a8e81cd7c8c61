"""Tiny backbones with random weights and real tokenizers, made in a folder as `save_pretrained` would leave them.

And what the worker makes of them: an adapted model.
"""

import io
import json
import string
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import sentencepiece
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from hyperscale.config.adaptation import AdaptationSettings
from hyperscale.config.backbone import BackboneSettings
from hyperscale.model.adapted import AdaptedModel
from hyperscale.model.architectures import architecture_of
from hyperscale.model.backbone import load_dense, open_backbone
from hyperscale.model.build import Blueprint
from hyperscale.model.sites import is_norm

_SENTENCES = (
    "The plot is thin, but the actors are wonderful and the music stays with you.",
    "I returned this camera after two days: the battery was dead and the screen was scratched.",
    "Heavy rain is expected in the north today, with strong winds along the coast.",
    "Shares of the company fell by 12.5% on Monday after its results disappointed investors.",
    "thank you so much for the lovely flowers!!! you made my day :)",
    "What is the capital of the country that borders both France and Portugal?",
    "Please book a table for four people at an Italian restaurant tomorrow at 7 pm.",
    "It was neither the best film of the year nor the worst; it was simply long.",
    "Scientists have found water beneath the surface of one of the planet's small moons.",
    "Congratulations, you have won a free ticket! Call 0800 123 456 now to claim your prize.",
    "My new headphones sound great, although the cable could have been a little longer.",
    "Nobody in the village remembered who had painted the door of the old mill blue.",
)
_WORDS = ("walk", "carry", "sing", "city", "box", "child", "run", "bring", "colour", "favourite", "organise", "centre")
_QUESTIONS = (
    ("Review: {}\nSentiment:", ("positive", "negative")),
    ("Write the past tense of: {}\nAnswer:", ("walked", "carried", "sang")),
    ("Write the plural of: {}\nAnswer:", ("cities", "boxes", "children")),
)
TEXTS = (
    *_SENTENCES,
    *(
        f"{question.format(subject)} {answer}"
        for question, answers in _QUESTIONS
        for subject, answer in product((*_SENTENCES[:4], *_WORDS), answers)
    ),
)
"""What the tokenizers are trained on: sentences, and questions as the packaged tasks put them."""

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tiny_llama(folder: Path, **changes: object) -> Path:
    """Save a LLaMA of two layers, grouped queries and tied embeddings, with a byte-level BPE tokenizer.

    Args:
        folder: where to; made if need be.
        changes: fields of `LlamaConfig` that differ.

    Returns:
        `folder`. Its logits are of order 1.
    """
    return _save(LlamaForCausalLM, LlamaConfig(**(llama_sizes(folder) | changes)), folder)


def llama_sizes(folder: Path) -> dict[str, object]:
    """Save a tokenizer, and return the fields of a configuration that go with it."""
    tokenizer = _byte_level_bpe()
    tokenizer.save_pretrained(folder)
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def tiny_t5(folder: Path, **changes: object) -> Path:
    """Save a T5 v1.1 (gated feed-forward, untied head) of two and two layers, with a SentencePiece tokenizer.

    Args:
        folder: where to; made if need be.
        changes: fields of `T5Config` that differ.

    Returns:
        `folder`. Its logits are of order 1.
    """
    config = T5Config(**(_t5_sizes(folder) | changes))
    return _save(T5ForConditionalGeneration, config, folder, has_own_head=not config.scale_decoder_outputs)


def _t5_sizes(folder: Path) -> dict[str, object]:
    """Save a tokenizer, and return the fields of a configuration that go with it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(_sentencepiece_model())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 100}))
    return {
        "vocab_size": len(AutoTokenizer.from_pretrained(folder)),
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


WINDOW = 5
"""How many tokens a sliding window holds in the models of `FAMILIES`: fewer than the tests' prompts have."""
_WINDOWED = {"use_sliding_window": True, "sliding_window": WINDOW}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_TWO_BASES = {
    _SLIDING: {"rope_type": "default", "rope_theta": 100.0},
    _FULL: {"rope_type": "default", "rope_theta": 10_000.0},
}
FAMILIES: Mapping[str, Mapping[str, object]] = {
    "mistral": {"head_dim": 12, "sliding_window": WINDOW},
    "qwen2": {**_WINDOWED, "max_window_layers": 1},
    "qwen3": {"head_dim": 12, **_WINDOWED, "max_window_layers": 1},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.6,
        "logits_scaling": 1.7,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "smollm3": {**_WINDOWED, "no_rope_layer_interval": 2},
    "gemma2": {
        "head_dim": 12,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 9,
        "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 2.0,
    },
    "gemma3_text": {
        "head_dim": 12,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 9,
        "final_logit_softcapping": 2.0,
        "rope_parameters": _TWO_BASES,
    },
    "olmo2": {},
    "olmo3": {"sliding_window": WINDOW, "layer_types": [_SLIDING, _FULL], "rope_parameters": _TWO_BASES},
    "phi3": {"sliding_window": WINDOW},
    "mt5": {},
    "umt5": {},
}
"""Model type -> fields of a tiny model's configuration in which what sets the family apart has an effect."""


def tiny_family(folder: Path, model_type: str, **changes: object) -> Path:
    """Save a model of a family of the table, of two blocks a stack; a decoder's queries share keys.

    The weights of its norms and its biases are random too.
    """
    row = architecture_of(model_type)
    sizes = _t5_sizes(folder) if row.is_encoder_decoder else llama_sizes(folder)
    fields = {**sizes, **FAMILIES.get(model_type, {}), **changes}
    if row.is_encoder_decoder:
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # only T5's own is read from spiece.model
    has_own_head = fields["tie_word_embeddings"] is False
    config = CONFIG_MAPPING[model_type](**fields)
    return _save(getattr(transformers, row.model_class), config, folder, has_own_head, disturbed=True)


def _save(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    folder: Path,
    has_own_head: bool = False,
    disturbed: bool = False,
) -> Path:
    """Save a random model.

    Args:
        has_own_head: give an encoder-decoder a head of its own, whatever transformers makes of its configuration.
        disturbed: make the weights of norms and the biases random too; transformers starts them all alike.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if "EncDecAttention.q" in name or "EncDecAttention.o" in name:
                parameter.data.mul_(4)  # at random the decoder would see only the mean of its source, which is nothing
            if disturbed and (name.endswith("bias") or is_norm(model.get_submodule(name.rpartition(".")[0]))):
                parameter.data.add_(0.2 * torch.randn(parameter.shape))
        if has_own_head and config.is_encoder_decoder:
            # T5 v1.1 has a head of its own, which transformers 5 makes only when it reads one. Its std stands in for
            # the 1 / sqrt(d_model) that v1.1 no longer applies: logits of 20 would hide every difference in a softmax.
            head = torch.randn(config.vocab_size, config.d_model) * config.d_model**-0.5
            model.lm_head.weight = nn.Parameter(head)
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder)
    return folder


def _byte_level_bpe() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _sentencepiece_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXTS for line in text.splitlines()),
        model_writer=model,
        model_type="unigram",
        vocab_size=240,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def adapted_model(
    folder: Path, adaptation: Mapping[str, object] | None = None, num_tasks: int = 3, **backbone: object
) -> AdaptedModel:
    """Load a backbone in fp32 and give it a generator: what the worker builds, without an engine.

    Args:
        adaptation: fields of `AdaptationSettings`.
        backbone: fields of `BackboneSettings` besides `name`.
    """
    settings = AdaptationSettings.model_validate(adaptation or {})
    frozen = BackboneSettings.model_validate({"name": str(folder), "dtype": "float32"} | backbone)
    backbone_folder = open_backbone(frozen)
    module = load_dense(backbone_folder, frozen)
    blueprint = Blueprint.of_backbone(module, backbone_folder.architecture, settings.adapters)
    return blueprint.adapt(module, blueprint.build_generator(settings, num_tasks, seed=0))


def disturb(generator: nn.Module, std: float = 0.05) -> None:
    """Move every parameter, as training would: what starts at zero then makes a difference, another for every task."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=random))


def recomputed(adapted: AdaptedModel, prompt: Tensor, count: int) -> Tensor:
    """Continue a prompt [1, T] greedily, running everything again for every token."""
    tokens: list[int] = []
    for _ in range(count):
        new = torch.tensor([tokens], dtype=torch.int64)
        if adapted.architecture.is_encoder_decoder:
            start = torch.tensor([[adapted.backbone.config.decoder_start_token_id]])
            inputs = {"input_ids": prompt, "decoder_input_ids": torch.cat([start, new], dim=1)}
        else:
            inputs = {"input_ids": torch.cat([prompt, new], dim=1)}
        tokens.append(int(adapted.backbone(**inputs, use_cache=False).logits[0, -1].argmax()))
    return torch.tensor(tokens)


def check_products(stored: nn.Module, whole: Tensor, bias: Tensor | None) -> None:
    """Compare a quantized layer's output and input gradient with products of its stored weight [out, in], fp64."""
    x = torch.randn(3, 5, whole.shape[1], generator=torch.Generator().manual_seed(1), requires_grad=True)
    other = x.detach().double().requires_grad_()
    y = stored(x)
    expected = other @ whole.T + (0.0 if bias is None else bias.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stored(x.detach()), y.detach(), rtol=0, atol=0)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(gradient)
    expected.backward(gradient.double())
    assert x.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(x.grad.double(), other.grad, rtol=1e-5, atol=1e-6)
