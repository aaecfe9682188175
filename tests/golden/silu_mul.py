import torch

aten, prims = torch.ops.aten, torch.ops.prims


def forward(
    arg0_1,  # bf16[3, 5, 64]
    arg1_1,  # bf16[3, 5, 64]
):
    silu_mul_default = torch.ops.fusionpass.silu_mul.default(arg0_1, arg1_1)  # bf16[3, 5, 64]
    return (silu_mul_default,)

