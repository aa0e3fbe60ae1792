"""Does a fit on a GPU say what the same fit says on the CPU? Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from diffing import CrosscoderConfig, fit_crosscoder
from diffing.crosscoder.model import FILE_NAME, CrosscoderFit
from diffing.crosscoder.select import find_cut, select_above
from diffing.crosscoder.sparse import decode_entries, encode_entries, take_columns
from diffing.crosscoder.training import Training
from tests.faults.test_fit_killed import VARIANTS, config, data, fit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def _step(device: str) -> list[torch.Tensor]:
    """Selection, both sparse products and their gradients of one problem in float64, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((300, 24), (64, 24), (64,), (64, 24))
    inputs, *drawn = (torch.randn(*shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes)
    encoder, bias, decoder = (tensor.requires_grad_(True) for tensor in drawn)
    norms = torch.ones(64, dtype=torch.float64, device=device)
    with torch.no_grad():
        cut = find_cut(inputs, encoder, bias, norms, 4.0)
        support, values = select_above(inputs, encoder, bias, cut / norms)
    values = encode_entries(values, inputs, encoder, bias, support)
    loss = (inputs - decode_entries(values, decoder, support)).square().sum()
    loss = loss + (take_columns(decoder.norm(dim=1), support) * values).sum()
    loss.backward()
    found = [loss.detach(), support.column_energy(values.detach()), support.rows, support.columns]
    return [tensor.cpu() for tensor in (*found, encoder.grad, bias.grad, decoder.grad) if tensor is not None]


def test_selection_and_gradients_are_those_of_the_cpu_in_float64():
    for on_gpu, on_cpu in zip(_step("cuda"), _step("cpu"), strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-10, atol=1e-10)


def _unexplained(found: CrosscoderFit) -> float:
    batch = next(iter(data().sequential(4000)))
    x = found.stack(batch)
    written = found.decode(found.encode(x))
    assert isinstance(written, torch.Tensor)
    return float((x - written).square().sum() / (x - x.mean(dim=0)).square().sum())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_is_fitted_as_well_as_on_the_cpu_and_comes_back_there(variant):
    on_gpu, on_cpu = (fit(variant, config(**VARIANTS[variant], device=device)) for device in ("cuda", "cpu"))
    assert {getattr(on_gpu, name).device.type for name in ("encoder", "decoder", "gate", "mean", "scale")} == {"cpu"}
    if variant != "difference":
        assert _unexplained(on_gpu) == pytest.approx(_unexplained(on_cpu), abs=0.02)
    assert on_gpu.l0 == pytest.approx(on_cpu.l0, rel=0.1)


def test_a_fit_stopped_on_a_gpu_goes_on_there(tmp_path, monkeypatch):
    settings, advance = CrosscoderConfig(n_latents=64, k=4, steps=30, save_every=7, device="cuda"), Training.advance

    def stop_at_17(self, batch):
        if self.step == 17:
            raise KeyboardInterrupt
        advance(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "advance", stop_at_17)
        with pytest.raises(KeyboardInterrupt):
            fit_crosscoder(data(), settings, out=tmp_path)
    resumed, whole = fit_crosscoder(data(), settings, out=tmp_path), fit_crosscoder(data(), settings)
    assert (tmp_path / FILE_NAME).is_file()
    torch.testing.assert_close(resumed.decoder, whole.decoder, rtol=1e-4, atol=1e-5)
