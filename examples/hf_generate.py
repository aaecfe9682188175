"""A Hugging Face model, unmodified: FP8 linears, compiled in place, `generate` as ever."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fusionpass

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Random weights here; `from_pretrained("...")` in earnest.
    model = LlamaForCausalLM(CONFIG).to(device, torch.bfloat16).eval()
    prompt = torch.randint(3, 256, (1, 12), device=device)

    print(fusionpass.quantize_(model, "fp8_static", calibration=[prompt], skip="lm_head"))
    # A static cache, so that decoding compiles once; fusionpass compiles, not generate.
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    eager = model.generate(prompt, **options)
    fusionpass.compile(model, numerics="eager")
    compiled = model.generate(prompt, **options)

    report = fusionpass.report(model)
    print(report)
    print("eager   ", eager[0, 12:].tolist())
    print("compiled", compiled[0, 12:].tolist())
    assert report.count("rms_norm_quantize", scheme="fp8_static") == 1, "the first norm has no residual in front of it"
    assert report.count("add_rms_norm_quantize", scheme="fp8_static") == 2 * CONFIG.num_hidden_layers - 1
    assert not report.refused
    assert not report.missed
    # A GPU's kernels may be one unit in the last place off, which random weights turn into another token.
    assert compiled.equal(eager) or device == "cuda", "the same tokens"


if __name__ == "__main__":
    main()
