import torch

aten, prims = torch.ops.aten, torch.ops.prims


def forward(
    arg0_1,  # bf16[3, 5, 64]
    arg1_1,  # bf16[3, 5, 64]
    arg2_1,  # f32[]
):
    gelu_mul_quantize_default = torch.ops.fusionpass.gelu_mul_quantize.default(arg0_1, arg1_1, approximate='tanh', scale=arg2_1, product_out=True)  # e4m3[3, 5, 64], bf16[3, 5, 64]
    getitem_2 = gelu_mul_quantize_default[0]  # e4m3[3, 5, 64]
    getitem_1 = gelu_mul_quantize_default[1]  # bf16[3, 5, 64]
    sum_1 = aten.sum.default(getitem_1)  # bf16[]
    return (getitem_2, sum_1)

