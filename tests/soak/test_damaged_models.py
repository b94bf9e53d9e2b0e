"""Model folders that a broken download, a full disk or a stranger has made."""

import damaged_models
import pytest
from figures import Figures

from checkpoints.convert import convert

MB = 1_000_000
MOST_SECONDS, MOST_MB = 5.0, 1500
"""Of one load, in a full run; what all of them may add to the memory of a process."""


@pytest.mark.parametrize("form", ["Hugging Face", "converted"])
def test_damaged_models(form: str, repository, tmp_path, beside, count, is_full: bool, figures: Figures):
    """Whatever is in the files: the model loads, or a typed error names the file; the process lives."""
    original = repository / "checkpoints" / "demo" / "draft"
    if form == "converted":
        convert(original, tmp_path / "converted")
        original = tmp_path / "converted"
    total = count(40, 10_000) if form == "Hugging Face" else count(15, 2_000)
    loads = beside.submit(damaged_models.load_damaged, original, tmp_path / "work", 7, total, is_full).result()
    figures(loads=total, codes=dict(loads.codes), slowest_s=loads.slowest, memory_growth_MB=loads.memory / MB)
    assert not loads.unexpected, "\n".join(loads.unexpected)
    assert loads.codes.total() == total and {"loaded", "ModelFormatError"} <= loads.codes.keys()
    assert loads.memory / MB < MOST_MB
    if is_full:
        assert loads.slowest < MOST_SECONDS
