"""Figures: one legend for all panels, all formats in them, titles that say where the figures are from."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octo_run.engine.evaluation import codec_report, figure, plots
from octo_run.engine.evaluation.codec_report import Row as Distortion
from octo_run.engine.evaluation.needle import Cell
from octo_run.engine.evaluation.perplexity import Row

MANY = ["bf16", *(f"{kind}{bits}" for kind in ("oct", "octopus", "turbo", "polar", "mixed") for bits in (2, 3, 4)),
        *(f"auto:{size}" for size in (48, 52, 60)), "oct4:oct2", "bf16:oct3", *(f"oct{bits}, as they are"
        for bits in (2, 3, 4))]  # fmt: skip


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figure, as it is when it is written."""
    from matplotlib.figure import Figure

    kept: dict[str, Any] = {}
    write = Figure.savefig

    def savefig(self: Figure, path: Any, **options: Any) -> None:
        kept["figure"] = self
        write(self, path, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return kept


def distortion(data: str, codec: str, size: int) -> Distortion:
    return Distortion(data=data, codec=codec, bytes=size, mse=1 / size, mse_stderr=0.0, cosine=0.9, ip_error=None,
                      kl=None, bound=0.5 / size)  # fmt: skip


def change(kv: str, percent: float, size: float, *, partial: bool = False) -> Row:
    return Row(kv=kv, perplexity=9.0, stderr=0.1, delta_percent=percent, delta_stderr=0.05, kl_mean=float(kv != "bf16"),
               kl_p99=0.0, top1_agreement=1.0, bytes_per_token=size, tokens_per_s=9.0, tokens=100,
               partial=partial)  # fmt: skip


def test_one_legend_fits_all_panels(drawn: dict[str, Any], tmp_path: Path) -> None:
    """The panels lack different codecs: a codec has one colour, and the legend's, in each."""
    rows = [distortion("gaussian", name, size) for name in ("octopus2", "octopus2-q", "kivi2") for size in (40, 50)]
    rows += [distortion("keys", name, size) for name in ("octopus2", "kivi2") for size in (40, 50)]
    plots.plot_distortion(rows, tmp_path / "a.png", "the model\nocto-run eval codec")
    (legend,) = drawn["figure"].legends
    assert all(axes.get_legend() is None for axes in drawn["figure"].axes)
    shown = [line.get_color() for line in legend.get_lines()]
    assert len(set(shown)) == 4 and [text.get_text().split()[0] for text in legend.get_texts()][1:] == [
        "octopus-q", "kivi", "bound"
    ]  # fmt: skip
    first, second = [{line.get_color() for line in axes.get_lines()} for axes in drawn["figure"].axes]
    assert first == {*shown} and second == {shown[0], shown[2], shown[3]}
    assert "the model" in drawn["figure"].get_suptitle() and "octo-run eval codec" in drawn["figure"].get_suptitle()


@pytest.mark.parametrize("kinds", [("gaussian",), ("gaussian", "keys", "keys, mean out", "values")])
def test_the_legend_of_all_codecs_has_room(drawn: dict[str, Any], tmp_path: Path, kinds: tuple[str, ...]) -> None:
    """Each family with what it is, beside one panel and beside four."""
    rows = [
        distortion(kind, name, 40 + size) for kind in kinds for size, name in enumerate(codec_report.all_names(128))
    ]
    plots.plot_distortion(rows, tmp_path / "a.png", "the model")
    drawn["figure"].draw_without_rendering()
    page, (legend,) = drawn["figure"].bbox, drawn["figure"].legends
    box = legend.get_window_extent()
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0
    assert not any(box.overlaps(axes.get_window_extent()) for axes in drawn["figure"].axes)


@pytest.mark.parametrize("far", [1e300, math.inf, math.nan])
def test_what_no_axis_holds_is_named_in_the_title(drawn: dict[str, Any], tmp_path: Path, far: float) -> None:
    rows = [change("bf16", 0, 2000.0), change("oct4", 1.0, 900.0), change("oct2", far, 500.0)]
    plots.plot_perplexity(rows, tmp_path / "a.png", "the model")
    assert "not drawn, worse by 1,000,000,000 % or more: oct2" in drawn["figure"].get_suptitle()
    (axes,) = drawn["figure"].axes
    assert [text.get_text().split(":")[0] for text in axes.get_legend().get_texts()] == ["bf16", "oct4"]


def test_bf16_is_a_point_and_all_formats_are_told_apart(drawn: dict[str, Any], tmp_path: Path) -> None:
    """However many there are, the legend has room beside the panel and below the title."""
    rows = [change(kv, 0.04 * place, 16384.0 / (1 + place % 7)) for place, kv in enumerate(MANY)]
    command = f"octo-run eval ppl --kv {','.join(MANY)} --plot a.png"
    plots.plot_perplexity(rows, tmp_path / "a.png", f"the model, a text\n{command}")
    (axes,) = drawn["figure"].axes
    legend = axes.get_legend()
    assert sorted(text.get_text().split(": ")[0] for text in legend.get_texts()) == sorted(MANY)
    assert (16384.0, 0.0) in [tuple(point) for line in axes.get_lines() for point in line.get_xydata()]
    assert not axes.texts, "labels beside points overlap"
    told = drawn["figure"].get_suptitle()
    assert "the model" in told and "".join(command.split()) in "".join(told.split())
    drawn["figure"].draw_without_rendering()
    page = drawn["figure"].bbox
    title, panel = drawn["figure"]._suptitle.get_window_extent(), axes.get_window_extent()
    box = legend.get_window_extent()
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    assert page.x0 <= title.x0 and title.x1 <= page.x1 and title.y1 <= page.y1
    assert not box.overlaps(panel) and not box.overlaps(title) and not panel.overlaps(title)
    assert panel.width > 0.4 * page.width and panel.height > 0.4 * page.height


@pytest.mark.parametrize("word", ["8x4x128@16x32768,", "MW@", "iil. ", "--option value "])
def test_titles_fit_the_page(drawn: dict[str, Any], tmp_path: Path, word: str) -> None:
    plots.plot_perplexity([change("bf16", 0, 9000)], tmp_path / "a.png", f"the model\n{word * 40}")
    drawn["figure"].draw_without_rendering()
    page, title = drawn["figure"].bbox, drawn["figure"]._suptitle.get_window_extent()
    assert page.x0 <= title.x0 and title.x1 <= page.x1
    if len(word) > 4:
        assert title.width > 0.6 * page.width, "lines are as long as they can be"


def test_a_format_has_one_colour_in_every_company() -> None:
    alone = {name: figure.styles([name])[name].colour for name in MANY}
    together = figure.styles(MANY)
    assert {name: style.colour for name, style in together.items()} == alone
    assert len({*together.values()}) == len(MANY)
    assert alone["oct2"] == alone["oct3, as they are"] == alone["oct4:oct2"] == alone["bf16:oct3"] != alone["octopus2"]
    named = [alone[name] for name in ("bf16", "oct2", "octopus2", "turbo2", "polar2", "mixed2", "auto:48")]
    assert len({*named}) == len(named)
    stored = ["bf16/bf16", "bf16/oct3", "int8/oct3", "int4/oct3", "int4-128/oct3", "int8/bf16", "int8/oct4"]
    assert len({*figure.styles(stored).values()}) == len(stored)
    assert figure.family("bf16/oct3") == "oct" and figure.family("int4-128/oct3") == "int4-128"


def test_colours_can_be_read_on_the_page() -> None:
    names = [*MANY, *(f"{one}/oct3" for one in ("fp32", "fp8", "int8", "int4", "int4-128")), "t34", "kivi2", "cuDNN"]
    for name in {figure.family(name) for name in names}:
        red, green, blue = (int(figure.colour(name)[place : place + 2], 16) / 255 for place in (1, 3, 5))
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (red, green, blue)]
        level = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (level + 0.05) > 2.5, name


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_figures_are_white_whatever_matplotlib_is_set_to(ending: str, tmp_path: Path) -> None:
    import matplotlib

    path, again = tmp_path / f"a{ending}", tmp_path / f"b{ending}"
    rows = [change("bf16", 0, 9000), change("oct3", 0.4, 900)]
    about = "the model, $a$ and {b} \N{SNOWMAN}\N{CJK UNIFIED IDEOGRAPH-65E5}.txt, 50 %$"
    with matplotlib.rc_context({"figure.facecolor": "black", "savefig.transparent": True, "text.usetex": True}):
        plots.plot_perplexity(rows, path, about)
        assert matplotlib.rcParams["figure.facecolor"] == "black"
    plots.plot_perplexity(rows, again, about)
    assert path.read_bytes() == again.read_bytes(), "nor does it have the date"
    if ending == ".png":
        pixels = matplotlib.image.imread(path)
        assert all(pixels[row, column].tolist() == [1, 1, 1, 1] for row, column in itertools.product((0, -1), (0, -1)))


@pytest.fixture
def another_font(tmp_path: Path) -> Iterator[None]:
    """A font that has three letters which matplotlib's own has not, as a system may have one."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from matplotlib.font_manager import fontManager

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((900, 0))
    pen.lineTo((450, 900))
    pen.closePath()
    names, before = [".notdef", "a", "b", "c"], [*fontManager.ttflist]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap(dict(zip(map(ord, "日本한"), names[1:], strict=True)))
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Three Letters", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "three.ttf")
    fontManager.addfont(tmp_path / "three.ttf")
    yield
    fontManager.ttflist = before


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_letters_come_from_a_font_that_has_them(
    drawn: dict[str, Any], another_font: None, tmp_path: Path, ending: str
) -> None:
    """What no font has is escaped: nobody can read boxes."""
    rows = [change("bf16", 0, 9000), change("oct3", 0.4, 900)]
    plots.plot_perplexity(rows, tmp_path / f"a{ending}", "日本한.txt\noct-run \U0001078e\ufffe")
    title = drawn["figure"].get_suptitle()
    assert "日本한.txt" in title and "oct-run \\U0001078e\\ufffe" in title
    assert drawn["figure"]._suptitle.get_fontfamily()[:2] == ["DejaVu Sans", "Three Letters"]


@pytest.mark.filterwarnings("error")
def test_letters_that_no_font_has_are_escaped(
    drawn: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from matplotlib.font_manager import fontManager

    monkeypatch.setattr(fontManager, "ttflist", [font for font in fontManager.ttflist if "DejaVu" in font.name])
    plots.plot_perplexity([change("bf16", 0, 9000)], tmp_path / "a.png", "日.txt, ü")
    assert "\\u65e5.txt, ü" in drawn["figure"].get_suptitle()


def test_partial_figures_say_so(drawn: dict[str, Any], tmp_path: Path) -> None:
    plots.plot_perplexity([change("bf16", 0, 9000, partial=True)], tmp_path / "a.png", "the model")
    assert "partial: 100 tokens scored" in drawn["figure"].get_suptitle()
    cells = [
        Cell("oct3", length, depth, 1, 1, 1, 1.0, None, 0.0, 1.0, 0.0, None, partial=True)
        for length, depth in ((512, 0.0), (512, 1.0), (1024, 0.0))
    ]
    plots.plot_recall(cells, tmp_path / "b.png", "the model")
    assert "partial: not all questions" in drawn["figure"].get_suptitle()
    assert [text.get_text() for text in drawn["figure"].axes[0].texts] == ["100"] * 3


def test_figures_can_be_read_on_every_shade() -> None:
    from matplotlib import colormaps

    def luminance(colour: Any) -> float:
        parts = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in colour[:3]]
        return float(0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2])

    for step in range(101):
        back = colormaps["viridis"](step / 100)
        level = luminance(back) + 0.05
        contrast = level / 0.05 if figure.ink(back) == "black" else 1.05 / level
        assert contrast >= 4.5, step


def test_the_report_explains_names_and_has_no_aims() -> None:
    rows = [distortion("gaussian", name, size) for name, size in (("oct2", 40), ("oct3", 56), ("oct4", 72))]
    report = codec_report.markdown(rows, "facts")
    assert "reach" not in report and "- `oct`: octo-run's formats" in report
