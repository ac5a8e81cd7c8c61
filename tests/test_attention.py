"""Attention whose heads share keys and values."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.masking_utils import eager_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as eager_with_softcap
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as eager_with_sinks
from transformers.models.llama.modeling_llama import eager_attention_forward

from hyperscale.errors import BackboneError
from hyperscale.model.architectures import ARCHITECTURES
from hyperscale.model.attention import GROUPED, grouped_attention
from tests import tiny


@pytest.mark.parametrize(("heads", "groups", "tokens"), [(9, 3, 5), (8, 1, 1), (4, 4, 7)])
@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("special", ["", "softcap", "s_aux"])
def test_grouped_attention_is_transformers_own(heads: int, groups: int, tokens: int, is_masked: bool, special: str):
    torch.manual_seed(0)
    keys_length, width = 11, 16
    shapes = ((2, heads, tokens, width), (2, groups, keys_length, width), (2, groups, keys_length, width))
    mask = torch.where(torch.rand(2, 1, tokens, keys_length, dtype=torch.float64) < 0.3, -1e9, 0.0)
    sinks = torch.randn(heads, dtype=torch.float64)
    module = SimpleNamespace(num_key_value_groups=heads // groups, training=False, sinks=sinks)
    states = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    eager = {"": eager_attention_forward, "softcap": eager_with_softcap, "s_aux": eager_with_sinks}[special]
    options = {"": {}, "softcap": {"softcap": 0.7}, "s_aux": {"s_aux": sinks}}[special]
    results = []
    for attend in (eager, grouped_attention):
        inputs = [state.clone().requires_grad_() for state in states]
        output, weights = attend(module, *inputs, mask if is_masked else None, scaling=width**-0.5, **options)  # type: ignore[operator]
        output.sin().sum().backward()
        results.append([output, weights, *(state.grad for state in inputs)])
    for theirs, ours in zip(*results, strict=True):
        # transformers takes the softmax in fp32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def attend(**options: object) -> tuple[torch.Tensor, torch.Tensor]:
    states = [torch.randn(1, heads, 3, 8) for heads in (4, 2, 2)]
    return grouped_attention(torch.nn.Module(), *states, None, scaling=0.3, **options)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "head_mask", "position_bias"])
def test_an_unsupported_attention_option_is_an_error(name: str):
    with pytest.raises(BackboneError, match=rf"does not compute {name}, which Module asks for; set backbone.attention"):
        attend(**{name: torch.ones(1)})
    attend(**{name: None})


def record_options(model: transformers.PreTrainedModel) -> set[str]:
    """Return the names of the options with a value that reach a model's attention."""
    names: set[str] = set()

    def attention(*args: object, **options: object) -> object:
        named = set(inspect.signature(grouped_attention).parameters)
        names.update(name for name, value in options.items() if value is not None and name not in named)
        return grouped_attention(*args, **options)

    transformers.AttentionInterface.register("recording", attention)
    transformers.AttentionMaskInterface.register("recording", eager_mask)
    model.config._attn_implementation = "recording"
    try:
        ids = torch.tensor([[3, 4, 5, 6]])
        options = {"output_attentions": True, "output_hidden_states": True, "use_cache": True, "return_dict": True}
        model(ids, labels=ids, position_ids=torch.arange(4)[None], num_items_in_batch=torch.tensor(4), **options)
        model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    finally:
        del transformers.AttentionInterface._global_mapping["recording"]
        del transformers.AttentionMaskInterface._global_mapping["recording"]
    return names


DECODERS = [name for name in ARCHITECTURES if not ARCHITECTURES[name].is_encoder_decoder]


@pytest.mark.parametrize("family", DECODERS)
def test_every_option_that_transformers_passes_is_known(family: str):
    sizes = {"hidden_size": 48, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 30, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.CONFIG_MAPPING[family](**sizes, **heads, **tiny.FAMILIES.get(family, {}))
    model = getattr(transformers, ARCHITECTURES[family].model_class)(config).eval()
    options = record_options(model)  # raises what grouped_attention raises
    assert {"position_ids", "num_items_in_batch"} <= options


def test_a_sliding_window_is_in_the_mask():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 30, "head_dim": 4}
    config = transformers.MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=2)
    model = transformers.MistralForCausalLM(config).eval()
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    logits = []
    for implementation in ("eager", GROUPED):
        model.config._attn_implementation = implementation
        logits.append(model(ids).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-6, atol=1e-6)
    model.config.sliding_window = 100
    assert not torch.allclose(model(ids).logits, logits[0], atol=1e-6)
