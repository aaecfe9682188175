import torch

aten, prims = torch.ops.aten, torch.ops.prims


def forward(
    arg0_1,  # bf16[3, 5, 64]
    arg1_1,  # bf16[3, 5, 64]
    arg2_1,  # bf16[64]
    arg3_1,  # f32[]
):
    add_rms_norm_quantize_default = torch.ops.fusionpass.add_rms_norm_quantize.default(arg0_1, arg1_1, weight=arg2_1, scale=arg3_1, norm_out=True)  # e4m3[3, 5, 64], bf16[3, 5, 64], bf16[3, 5, 64]
    getitem_5 = add_rms_norm_quantize_default[0]  # e4m3[3, 5, 64]
    getitem_4 = add_rms_norm_quantize_default[1]  # bf16[3, 5, 64]
    getitem_3 = add_rms_norm_quantize_default[2]  # bf16[3, 5, 64]
    sum_1 = aten.sum.dim_IntList(getitem_4, [-1])  # bf16[3, 5]
    mul_3 = aten.mul.Tensor(getitem_3, 2)  # bf16[3, 5, 64]
    return (getitem_5, sum_1, mul_3)

