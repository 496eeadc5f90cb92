"""Figures: one legend for all panels, all formats in them, titles that say where the figures are from."""

from pathlib import Path
from typing import Any

import pytest

from octo_run.engine.evaluation import codec_report, plots
from octo_run.engine.evaluation.codec_report import Row as Distortion
from octo_run.engine.evaluation.perplexity import Row


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figure, as it is when it is closed."""
    from matplotlib import pyplot

    kept: dict[str, Any] = {}
    monkeypatch.setattr(pyplot, "close", lambda figure: kept.update(figure=figure))
    return kept


def distortion(data: str, codec: str, size: int) -> Distortion:
    return Distortion(data=data, codec=codec, bytes=size, mse=1 / size, mse_stderr=0.0, cosine=0.9, ip_error=None,
                      kl=None, bound=0.5 / size)  # fmt: skip


def test_one_legend_fits_all_panels(figure: dict[str, Any], tmp_path: Path) -> None:
    """The panels lack different codecs: a codec has one colour, and the legend's, in each."""
    rows = [distortion("gaussian", name, size) for name in ("octopus2", "octopus-q2", "kivi2") for size in (40, 50)]
    rows += [distortion("keys", name, size) for name in ("octopus2", "kivi2") for size in (40, 50)]
    plots.plot_distortion(rows, tmp_path / "a.png", "the model\nocto-run eval codec")
    drawn = figure["figure"]
    (legend,) = drawn.legends
    assert all(axes.get_legend() is None for axes in drawn.axes)
    shown = [line.get_color() for line in legend.get_lines()]
    assert len(set(shown)) == 4 and len(legend.get_texts()) == 4
    first, second = [[line.get_color() for line in axes.get_lines()] for axes in drawn.axes]
    assert first == shown and second == [shown[0], shown[2], shown[3]]
    assert "the model" in drawn.get_suptitle() and "octo-run eval codec" in drawn.get_suptitle()


def test_bf16_is_a_point_and_all_formats_are_told_apart(figure: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        Row(kv=kv, perplexity=9.0, stderr=0.1, delta_percent=change, delta_stderr=0.1, kl_mean=0.0, kl_p99=0.0,
            top1_agreement=1.0, bytes_per_token=size, tokens_per_s=9.0, tokens=100, partial=False)
        for kv, change, size in (("bf16", 0.0, 4096.0), ("oct3", 0.4, 900.0), ("octopus3", 0.5, 900.0))
    ]  # fmt: skip
    plots.plot_perplexity(rows, tmp_path / "a.png", "the model")
    (axes,) = figure["figure"].axes
    names = [text.get_text().split(":")[0] for text in axes.get_legend().get_texts()]
    assert sorted(names) == ["bf16", "oct3", "octopus3"] and "the model" in figure["figure"].get_suptitle()
    assert (4096.0, 0.0) in [tuple(point) for line in axes.get_lines() for point in line.get_xydata()]
    assert not axes.texts, "labels beside points overlap"


def test_figures_can_be_read_on_every_shade() -> None:
    from matplotlib import colormaps

    def luminance(colour: Any) -> float:
        parts = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in colour[:3]]
        return float(0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2])

    for step in range(101):
        back = colormaps["viridis"](step / 100)
        level = luminance(back) + 0.05
        contrast = level / 0.05 if plots.ink(back) == "black" else 1.05 / level
        assert contrast >= 4.5, step


def test_the_report_explains_names_and_has_no_aims() -> None:
    rows = [distortion("gaussian", name, size) for name, size in (("oct2", 40), ("oct3", 56), ("oct4", 72))]
    report = codec_report.markdown(rows, "facts")
    assert "reach" not in report and "oct2, oct3 and oct4 are octo-run's formats" in report
