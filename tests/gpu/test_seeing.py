"""On a GPU: times of fused ops, and dumps with PTX of our kernels and of Inductor's."""

import pytest
import torch

import fusionpass
from tests.report.stack import Stack, rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def test_each_fused_op_has_a_time_here():
    with torch.device("cuda"):
        report = fusionpass.explain(Stack(3, odd=(1,)), rows(64).cuda())
    assert any(record.backend == "triton" for record in report.fused)
    report.measure()
    assert report.times
    for time in report.times.values():
        assert (time.why, time.device) == ("", torch.cuda.get_device_name())
        # Captured in CUDA graphs, calls of this size take microseconds; the host's part alone would be tens of them.
        assert 0 < time.us < 50
        assert 0 < time.replaced_us < 50


def test_a_compiled_model_is_measured_too(tmp_path):
    model = Stack(2).cuda()
    with torch.no_grad():
        fusionpass.compile(model)(rows(64).cuda())
    report = fusionpass.report(model)
    report.measure()
    assert all(not time.why for time in report.times.values())
    page = report.write_html(tmp_path / "report.html").read_text()
    assert torch.cuda.get_device_name() in page


def test_ptx_of_our_kernels_and_of_inductors(tmp_path):
    model = Stack(2, odd=(1,)).cuda()
    with torch.no_grad(), fusionpass.dump(tmp_path, ptx=True) as folder:
        fusionpass.compile(model, cuda_graphs="off")(rows(64).cuda())
    ours = [path.read_text() for path in folder.glob("graph_*/ptx/*.ptx")]
    assert any("// fusionpass.rms_norm_quantize.default in layers.0.norm" in text for text in ours)
    names = {path.stem for path in (folder / "triton").rglob("*.ptx")}
    assert "norm_kernel" in names
    assert any(name.startswith("triton_") for name in names), "and what Inductor wrote for the odd layer"
    index = (folder / "index.md").read_text()
    assert "| `norm_kernel" in index
    assert "**rms_norm_quantize** in layers.0.norm" in index
