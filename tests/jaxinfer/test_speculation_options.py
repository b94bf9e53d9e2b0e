"""What a start refuses of how it is to speculate: by field, value, limit and what to do."""

import pytest

from jaxinfer.errors import InvalidConfig
from jaxinfer.start_options import Options


@pytest.mark.parametrize(("changes", "words"), [
    ({"draft_model": ""}, "draft_model: is '', which names no model; leave it out to decode without one"),
    ({"draft_model": "", "speculation": "draft_model"}, "draft_model: is ''"),
    ({"num_speculative_tokens": 0}, "num_speculative_tokens: must be an integer of at least 1, got 0; to speculate no "
                                    "more, leave out what drafts"),
    ({"num_speculative_tokens": 2.5}, "at least 1, got 2.5"),
    ({"num_speculative_tokens": 16}, "num_speculative_tokens: must be at most 15, got 16; lower it"),
    ({"max_num_seqs": 0}, "max_num_seqs: must be an integer of at least 1, got 0$"),
])  # fmt: skip
def test_it_is_refused(changes, words):
    with pytest.raises(InvalidConfig, match=words):
        Options(**{"model": "demo", "draft_model": "demo-draft"} | changes).validate()
    Options(model="demo", draft_model="demo-draft", num_speculative_tokens=15).validate()
