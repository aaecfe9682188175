import torch

aten, prims = torch.ops.aten, torch.ops.prims


def forward(
    arg0_1,  # bf16[3, 5, 64]
    arg1_1,  # bf16[3, 5, 64]
    arg2_1,  # bf16[64]
):
    add_rms_norm_default = torch.ops.fusionpass.add_rms_norm.default(arg0_1, arg1_1, weight=arg2_1, residual_out=False)  # bf16[3, 5, 64]
    getitem = add_rms_norm_default[0]  # bf16[3, 5, 64]
    return (getitem,)

