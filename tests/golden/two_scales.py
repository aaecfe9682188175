import torch

aten, prims = torch.ops.aten, torch.ops.prims


def forward(
    arg0_1,  # bf16[3, 5, 64]
    arg1_1,  # bf16[64]
    arg2_1,  # f32[]
):
    add_1 = aten.add.Tensor(arg2_1, 1)  # f32[]
    rms_norm_quantize_default_1 = torch.ops.fusionpass.rms_norm_quantize.default(arg0_1, weight=arg1_1, scale=arg2_1, scale_2=add_1)  # e4m3[3, 5, 64], e4m3[3, 5, 64]
    getitem_5 = rms_norm_quantize_default_1[0]  # e4m3[3, 5, 64]
    getitem_4 = rms_norm_quantize_default_1[1]  # e4m3[3, 5, 64]
    return (getitem_5, getitem_4)

