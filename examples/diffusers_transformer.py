"""A diffusers transformer, unmodified: FP8 linears, compiled in place; in a pipeline it is `pipeline.transformer`."""

import torch
from diffusers import FluxTransformer2DModel

import fusionpass

EMBEDDERS = ("x_embedder", "context_embedder", "time_text_embed")


def inputs(device: str) -> dict[str, torch.Tensor | bool]:
    """Of one step: 16 patches of an image, 8 tokens of text."""
    made = {
        "hidden_states": torch.randn(1, 16, 16).bfloat16(),
        "encoder_hidden_states": torch.randn(1, 8, 64).bfloat16(),
        "pooled_projections": torch.randn(1, 32).bfloat16(),
        "timestep": torch.tensor([0.5]).bfloat16(),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    return {**{name: tensor.to(device) for name, tensor in made.items()}, "return_dict": False}


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # One block with random weights here; `from_pretrained("...", torch_dtype=torch.bfloat16)` in earnest.
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=0,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    )
    model = model.to(device, torch.bfloat16).eval()
    print(fusionpass.quantize_(model, "fp8_token", skip=EMBEDDERS))

    step = inputs(device)
    eager = model(**step)[0]
    fusionpass.compile(model, numerics="eager")
    error = ((model(**step)[0] - eager).float().norm() / eager.float().norm()).item()
    print(f"compiled against eager: {error:.2e}")
    assert error < 0.03

    report = fusionpass.report(model)
    print(report)
    assert report.count("layer_norm_quantize", scheme="fp8_token") == 1, "the norm, its modulation and the quantisation"
    # A sum with a row that is broadcast is none that `add_quantize` takes: the report says so.
    assert [record.where for record in report.refused] == ["proj_out"]


if __name__ == "__main__":
    main()
