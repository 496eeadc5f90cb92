"""The codec report: figures of known codecs, a model's keys, the written report."""

import pytest

from octo_run.engine.evaluation.capture import capture
from octo_run.engine.evaluation.codec_report import (
    FAMILIES,
    all_names,
    bound,
    build,
    for_models,
    gaussian,
    markdown,
    real,
)
from octo_run.engine.evaluation.figure import family
from octo_run.engine.evaluation.plots import _NAMES
from octo_run.errors import UsageError

TEXT = "In the morning the harbour was quiet, and the boats lay side by side without a sound. " * 30


def test_gaussian_rows() -> None:
    rows = list(gaussian(["octopus3", "turbo3", "octopus3-q"], 128, 1024, seed=1))
    found = {row.codec: row for row in rows}
    assert found["octopus3"].mse == pytest.approx(0.0243, rel=0.03)
    assert found["turbo3"].bytes == 50
    assert 0 < found["octopus3"].kl < found["turbo3"].kl  # type: ignore[operator]
    assert found["octopus3-q"].kl is None, "its correction is of inner products, not of vectors"
    assert all(row.mse > row.bound for row in rows)
    assert bound(build("octopus3", 128, 0)) == pytest.approx(4 ** (-3.5))


def test_keys_and_values_of_a_model() -> None:
    data = capture("octo-demo", TEXT, 192)
    assert data.k.shape == (8, 2, 192, 128) and data.q.shape == (8, 6, 192, 128)
    rows = {
        (row.data, row.codec): row
        for row in real(for_models(["octopus2", "turbo2", "octopus2-q"], 128, 0), data, seed=0)
    }
    assert {data for data, _ in rows} == {"keys", "keys, mean out", "values"}
    assert {codec for _, codec in rows} == {"octopus2", "turbo2"}
    plain, without = rows["keys", "octopus2"], rows["keys, mean out", "octopus2"]
    assert plain.mse == pytest.approx(0.083, rel=0.1)
    assert without.mse < plain.mse / 2 and without.kl < plain.kl  # type: ignore[operator]
    assert plain.mse < rows["keys", "turbo2"].mse
    report = markdown([*gaussian(["octopus2"], 128, 300, 0), *rows.values()], "Facts.")
    assert "| octopus2 | 40 |" in report and "## Keys, mean out" in report
    assert "- `octopus`: octahedral" in report and "- `turbo`: TurboQuant" in report and "`kivi`" not in report


def test_every_name_is_explained() -> None:
    """In the report and in the legend, and each family by what it is."""
    assert {family(name) for name in all_names(128)} == {*FAMILIES} == {*_NAMES} - {"bound"}


def test_a_short_text_is_refused() -> None:
    with pytest.raises(UsageError, match="give a longer --text"):
        capture("octo-demo", "Too short.", 192)
