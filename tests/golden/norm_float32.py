import torch

aten, prims = torch.ops.aten, torch.ops.prims


def forward(
    arg0_1,  # bf16[3, 5, 64]
    arg1_1,  # bf16[64]
):
    convert_element_type = prims.convert_element_type.default(arg0_1, torch.float32)  # f32[3, 5, 64]
    rms_norm_default = torch.ops.fusionpass.rms_norm.default(convert_element_type, weight=arg1_1)  # f32[3, 5, 64]
    return (rms_norm_default,)

