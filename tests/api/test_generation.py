"""Generation with a cache, beams and hidden states, by models that were converted while training."""

import copy

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import revwire

_SIZES = {"vocab_size": 100, "eos_token_id": None, "pad_token_id": 0}
MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, bos_token_id=1, **_SIZES
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, bos_token_id=1, **_SIZES)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0, **_SIZES)
    ),
}
UNITS = {"llama": 6, "gpt2": 6, "t5": 15}


@pytest.mark.parametrize("name", MODELS)
def test_generation(name):
    torch.manual_seed(0)
    model, ids = MODELS[name]().train(), torch.randint(3, 100, (2, 7))
    example = {"input_ids": ids, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}
    original = copy.deepcopy(model).eval()
    revwire.convert(model, example, coupling="bdia-random:1/2")
    assert len(revwire.report(model).units) == UNITS[name]
    model(**example).logits.sum().backward()
    model.eval()
    for options in ({"use_cache": True}, {"use_cache": False}, {"num_beams": 3}):
        options = {"max_new_tokens": 6, "do_sample": False, **options}
        assert torch.equal(model.generate(ids, **options), original.generate(ids, **options)), options
    with torch.no_grad():
        got, true = (m(**example, output_hidden_states=True, output_attentions=name == "t5") for m in (model, original))
    assert got.keys() == true.keys()
    assert torch.equal(got.logits, true.logits)
    states = "decoder_hidden_states" if name == "t5" else "hidden_states"
    assert all(torch.equal(a, b) for a, b in zip(got[states], true[states], strict=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("coupling", ["bdia", "re2tal"])
def test_a_cache_changes_nothing(name, coupling):
    torch.manual_seed(0)
    model, ids = MODELS[name]().train(), torch.randint(3, 100, (2, 7))
    example = {"input_ids": ids, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}
    revwire.convert(model, example, coupling=coupling).eval()
    with_cache, without = (model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(with_cache, without)
