import torch

aten, prims = torch.ops.aten, torch.ops.prims


def forward(
    arg0_1,  # bf16[3, 5, 64]
    arg1_1,  # bf16[64]
):
    rms_norm_default = torch.ops.fusionpass.rms_norm.default(arg0_1, weight=arg1_1)  # bf16[3, 5, 64]
    return (rms_norm_default,)

