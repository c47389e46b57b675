"""Complex numbers are pairs of real ones in ONNX; in torch they stay what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxquant.capture import capture
from fxquant.codegen.onnx_check import check_onnx
from fxquant.codegen.onnx_complex import in_pairs
from fxquant.codegen.onnx_export import export_onnx
from fxquant.errors import ExportError


class Rotary(nn.Module):
    """Rotary embeddings as DeepSeek-V2 and Llama 4 have them, and what else there is of complex numbers."""

    def forward(self, x: Tensor, angles: Tensor) -> dict[str, Tensor]:
        turns = torch.polar(torch.ones_like(angles), angles) * 1.5
        z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        other = (z.transpose(1, 2)[:, -1:] * torch.complex(angles, angles)[:, :, None]).conj()
        return {
            "turned": torch.view_as_real(z * turns.unsqueeze(-3)).flatten(3),
            "real": other.real,
            "imaginary": other.imag,
            "scaled": torch.view_as_real((turns * angles)[0].expand(3, -1, -1)[1:]),
            "reshaped": torch.view_as_real(turns.reshape(x.shape[0], 20)),
            "picked": torch.view_as_real(turns[:, torch.tensor([1, 3])]),
        }


def test_complex_numbers_run_as_pairs(tmp_path: Path) -> None:
    program = capture(Rotary(), (torch.randn(2, 4, 5, 8), torch.randn(2, 5, 4)))
    export_onnx(program, tmp_path / "m.onnx")
    found = check_onnx(program, tmp_path / "m.onnx")
    assert len(found.rows) == 3 * 6
    assert found.ok, found


def test_a_graph_without_complex_numbers_stays() -> None:
    graph = capture(nn.Linear(4, 3), (torch.randn(2, 4),)).gm.graph
    assert in_pairs(graph) is graph


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x).real


class Magnitude(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_complex(x).abs()


@pytest.mark.parametrize(("model", "operator"), [(Fourier(), "fft_fft"), (Magnitude(), "aten.abs")])
def test_what_has_no_real_form_is_refused(model: nn.Module, operator: str, tmp_path: Path) -> None:
    program = capture(model, (torch.randn(2, 4, 2),))
    with pytest.raises(ExportError, match=f"{operator}.*no complex numbers.*What to do: rewrite that line"):
        export_onnx(program, tmp_path / "m.onnx")
