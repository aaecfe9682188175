import torch

aten, prims = torch.ops.aten, torch.ops.prims


def forward(
    arg0_1,  # bf16[3, 5, 64]
    arg1_1,  # bf16[64]
    arg2_1,  # f32[]
):
    rms_norm_quantize_default = torch.ops.fusionpass.rms_norm_quantize.default(arg0_1, arg1_1, arg2_1, 1e-06, 'fp8_static', True)  # e4m3[3, 5, 64], bf16[3, 5, 64]
    getitem_3 = rms_norm_quantize_default[0]  # e4m3[3, 5, 64]
    getitem_2 = rms_norm_quantize_default[1]  # bf16[3, 5, 64]
    add_1 = aten.add.Tensor(arg2_1, 1)  # f32[]
    quantize_default_1 = torch.ops.fusionpass.quantize.default(getitem_2, add_1, 'fp8_static')  # e4m3[3, 5, 64]
    getitem_1 = quantize_default_1[0]  # e4m3[3, 5, 64]
    return (getitem_3, getitem_1)

